"""Classifiers and their cards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from nayer_edge.batchnorm import raise_bn_momentum
from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier, save_classifier, weights_digest
from nayer_edge.models.prior import batch_norms
from nayer_edge.runtime.compute import seeded

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


@pytest.mark.parametrize("size", [(12, 12), (3, 5), (6, 9)])
def test_images_are_resized_for_the_network(size: tuple[int, int]) -> None:
    """Larger, smaller and equal, as torchvision resizes them; gradients reach the images as they are."""
    network = Classifier(nn.Identity(), "test:identity", SPEC, CLASSES, {"resize": list(size)})
    images = torch.rand(3, 2, 6, 9, requires_grad=True)
    normalised = v2.functional.normalize(images, [0.2, 0.4], [0.5, 0.25])
    wanted = v2.functional.resize(normalised, list(size), v2.InterpolationMode.BILINEAR, antialias=True)
    torch.testing.assert_close(network(images), wanted)
    network(images).sum().backward()
    assert images.grad is not None
    assert images.grad.shape == images.shape


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_torchvision_models_get_another_stem(channels: int) -> None:
    spec = InputSpec(channels=channels, height=32, width=40)
    network = build_classifier("torchvision:mobilenet_v3_small", spec, CLASSES).eval()
    assert network(torch.rand(2, channels, 32, 40)).shape == (2, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet8", "has no source"),
        ("keras:resnet8", "no model source 'keras'"),
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'"),
        ("nayer:resnet9", "Did you mean 'resnet8'"),
        ("nayer:", "no network"),
        ("", "has no source"),
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
    assert path.read_bytes() == first, "equal weights give equal bytes"


def test_the_card_keeps_the_size_that_the_network_takes(network: Classifier, tmp_path: Path) -> None:
    path, images = tmp_path / "teacher.safetensors", torch.rand(2, 2, 6, 9)
    with seeded(0):
        resized = build_classifier("nayer:resnet8", SPEC, CLASSES, resize=(20, 16)).eval()
    save_classifier(resized, path, {})
    read = load_classifier(path)
    assert (read.resize, read.spec) == ((20, 16), SPEC)
    assert torch.equal(read(images), resized(images))
    assert network.resize is None
    assert weights_digest(resized) != weights_digest(network), "the same weights, another function"


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.update(rebuild={"resize": 224}),
        lambda card: card.update(rebuild={"resize": [224]}),
        lambda card: card.update(rebuild={"resize": [224, 0]}),
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


def test_weights_that_do_not_match_the_card(network: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_classifier(network, path, {})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="does not match its card"):
        load_classifier(path)
    path.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        load_classifier(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(IntegrityError, match="is missing, so a model card cannot be read"):
        load_classifier(path)


# ------------------------------------------------------------------ model properties used by the training loop


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


def test_batchnorm_momentum_of_long_schedules_is_raised() -> None:
    network = build_classifier("torchvision:mobilenet_v3_small", InputSpec(), CLASSES)
    assert {norm.momentum for norm in batch_norms(network)} == {0.01}
    raise_bn_momentum(network)
    assert {norm.momentum for norm in batch_norms(network)} == {0.1}
    norms = [nn.BatchNorm2d(2, momentum=momentum) for momentum in (0.3, 0.1, None)]
    raise_bn_momentum(Classifier(nn.Sequential(*norms), "test:norms", InputSpec(), CLASSES))
    assert [norm.momentum for norm in norms] == [0.3, 0.1, None]


def test_the_digest_covers_every_bit_but_not_the_memory_format(network: Classifier) -> None:
    digest = weights_digest(network)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    assert weights_digest(network) == digest
    with torch.no_grad():
        network.backbone.get_submodule("bn1").running_var[0] += 1e-6
    assert weights_digest(network) != digest
