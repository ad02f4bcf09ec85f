"""Classifiers, their cards, and foreign weights, hostile ones included."""

from __future__ import annotations

import json
import os
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nayer_edge.compute import seeded
from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models import (
    Classifier,
    batch_norms,
    build_classifier,
    load_classifier,
    load_tensors,
    load_weights,
    read_state_dict,
    save_classifier,
    save_tensors,
    weights_digest,
)

SPEC = InputSpec(channels=2, height=6, width=9, mean=(0.2, 0.4), std=(0.5, 0.25))
CLASSES = ("été", "日本", "c")


@pytest.fixture
def network() -> Classifier:
    with seeded(0):
        return build_classifier("nayer:resnet8", SPEC, CLASSES).eval()


def test_normalisation_is_part_of_the_classifier(network: Classifier) -> None:
    images = torch.rand(3, 2, 6, 9)
    normalised = torch.stack(((images[:, 0] - 0.2) / 0.5, (images[:, 1] - 0.4) / 0.25), dim=1)
    torch.testing.assert_close(network(images), network.backbone(normalised))
    assert network.parameter_count == sum(p.numel() for p in network.backbone.parameters())
    assert not {"mean", "std"} & set(network.state_dict())


def test_one_mean_for_all_channels() -> None:
    spec = InputSpec(channels=3, height=4, width=4, mean=(0.5,), std=(0.25,))
    network = Classifier(nn.Identity(), "test:identity", spec, CLASSES)
    torch.testing.assert_close(network(torch.full((1, 3, 4, 4), 0.75)), torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_torchvision_models_get_another_stem(channels: int) -> None:
    spec = InputSpec(channels=channels, height=32, width=40)
    network = build_classifier("torchvision:mobilenet_v3_small", spec, CLASSES).eval()
    assert network(torch.rand(2, channels, 32, 40)).shape == (2, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet8", "does not say where"),
        ("keras:resnet8", "no model source 'keras'"),
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'"),
        ("nayer:resnet9", "Did you mean 'resnet8'"),
        ("nayer:", "no network"),
        ("", "does not say where"),
    ],
)
def test_unknown_models(model: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_classifier(model, SPEC, CLASSES)


# ------------------------------------------------------------------ cards


def test_round_trip(network: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "student" / "student.safetensors"
    save_classifier(network, path, {"note": "ñ"})
    read = load_classifier(path)
    images = torch.rand(2, 2, 6, 9)
    assert torch.equal(read(images), network(images))
    assert (read.model, read.spec, read.classes) == (network.model, network.spec, CLASSES)
    assert not read.training
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["classes"] == list(CLASSES)
    assert card["params"] == network.parameter_count
    assert card["note"] == "ñ"
    first = path.read_bytes()
    save_classifier(network, path, {})
    assert path.read_bytes() == first, "equal weights, equal bytes"


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.pop("classes"),
        lambda card: card.pop("sha256"),
        lambda card: card.update(schema="nayer-edge/model/9"),
        lambda card: card.update(classes=3),
        lambda card: card["input"].update(channels=0),
        lambda card: card["input"].update(mean=[0.5, 0.5, 0.5]),
        lambda card: card["input"].update(size=3),
        lambda card: card.update(input=None),
    ],
)
def test_a_damaged_card_is_refused(
    network: Classifier, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "s.safetensors"
    save_classifier(network, path, {})
    card = json.loads(path.with_suffix(".json").read_text())
    change(card)
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(IntegrityError, match="is not a model card"):
        load_classifier(path)


def test_weights_that_are_not_the_cards(network: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_classifier(network, path, {})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="not the file that its card describes"):
        load_classifier(path)
    path.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        load_classifier(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(IntegrityError, match="is missing, so a model card cannot be read"):
        load_classifier(path)


# ------------------------------------------------------------------ foreign weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"module.module.{name}": value for name, value in state.items()}},
    ],
)
def test_nested_keys_and_prefixes_are_understood(
    network: Classifier, tmp_path: Path, wrap: Callable[[dict[str, Any]], Any]
) -> None:
    path = tmp_path / "weights.pt"
    state = network.backbone.state_dict()
    torch.save(wrap(dict(state)), path)
    read = read_state_dict(path)
    assert set(read) == set(state)
    with seeded(1):
        other = build_classifier("nayer:resnet8", SPEC, CLASSES)
    assert weights_digest(other) != weights_digest(network)
    load_weights(other, read, path)
    assert weights_digest(other) == weights_digest(network)


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "w.pt")
    assert set(read_state_dict(tmp_path / "w.pt")) == {"module.a", "b"}


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 3}, [torch.zeros(1)], torch.zeros(1)])
def test_files_without_weights(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="holds no state dict"):
        read_state_dict(tmp_path / "w.pt")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UsageError, match="There are no weights"):
            read_state_dict(path)


class Hostile:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "x": Hostile(proof)}, tmp_path / "w.pth")
    with pytest.raises(IntegrityError, match="nothing in it was run") as caught:
        read_state_dict(tmp_path / "w.pth")
    assert caught.value.exit_code == 4
    assert not proof.exists()
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        operations = [operation.name for operation, _, _ in pickletools.genops(archive.read(names[0]))]
        assert b"mkdir" in archive.read(names[0]), "the file was harmless: this test shows nothing"
        assert "REDUCE" in operations


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_damaged_state_dicts(network: Classifier, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "w.pt"
    torch.save(network.backbone.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match="can be read safely"):
        read_state_dict(path)


def test_damaged_safetensors(network: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, network.backbone.state_dict())
    whole = path.read_bytes()
    assert set(read_state_dict(path)) == set(network.backbone.state_dict())
    huge = (2**62).to_bytes(8, "little") + whole[8:]
    for data in (whole[:-1], whole[:100], b"", b"{}", huge, whole[:8] + b"\xff" * 20 + whole[28:]):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="not readable as model weights"):
            read_state_dict(path)
    with pytest.raises(IntegrityError, match="not readable as a thing"):
        load_tensors(tmp_path / "absent.safetensors", "a thing")


def test_weights_of_another_architecture_are_named_with_counts(network: Classifier, tmp_path: Path) -> None:
    other = build_classifier("nayer:resnet20", SPEC, CLASSES)
    state = other.backbone.state_dict()
    mine = set(network.backbone.state_dict())
    path = tmp_path / "w.safetensors"
    with pytest.raises(UsageError, match="not those of nayer:resnet8 with 3 classes") as caught:
        load_weights(network, state, path)
    assert f"{len(set(state) - mine)} not in the model" in caught.value.why
    assert "layer1.1.bn1.bias" in caught.value.why
    assert "missing" not in caught.value.why
    with pytest.raises(UsageError) as caught:
        load_weights(other, network.backbone.state_dict(), path)
    assert f"{len(set(state) - mine)} missing" in caught.value.why
    more = build_classifier("nayer:resnet8", SPEC, (*CLASSES, "d")).backbone.state_dict()
    with pytest.raises(UsageError) as caught:
        load_weights(network, more, path)
    assert "2 of another shape (fc.bias, fc.weight)" in caught.value.why


# ------------------------------------------------------------------ what the loop asks about a model


def test_batchnorms_in_the_order_of_modules() -> None:
    network = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm2d(5, track_running_stats=False)),
        nn.InstanceNorm2d(6, track_running_stats=True),
        nn.GroupNorm(1, 7),
        nn.BatchNorm2d(8),
    )
    assert [norm.num_features for norm in batch_norms(network)] == [3, 4, 8]
    assert len(batch_norms(build_classifier("nayer:wrn_40_2", SPEC, CLASSES))) == 2 * 18 + 1


def test_the_digest_sees_every_bit_and_not_the_memory_format(network: Classifier) -> None:
    digest = weights_digest(network)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    assert weights_digest(network) == digest
    with torch.no_grad():
        network.backbone.get_submodule("bn1").running_var[0] += 1e-6
    assert weights_digest(network) != digest
