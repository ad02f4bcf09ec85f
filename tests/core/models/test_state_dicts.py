"""Users' checkpoints in all supported forms, and malicious ones."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import functools
import operator
import os
import pathlib
import pickletools
import types
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models.checkpoint_files import Placeholder, read_checkpoint
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, weights_digest
from nayer_edge.models.state_dicts import key_taken, load_weights, read_state_dict
from nayer_edge.runtime.compute import seeded
from nayer_edge.storage.tensors import load_tensors, save_tensors

SPEC = InputSpec(channels=2, height=6, width=9, mean=(0.2, 0.4), std=(0.5, 0.25))
CLASSES = ("été", "日本", "c")


@pytest.fixture
def network() -> Classifier:
    with seeded(0):
        return build_classifier("nayer:resnet8", SPEC, CLASSES).eval()


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
    with pytest.raises(UsageError, match="contains no state dict"):
        read_state_dict(tmp_path / "w.pt")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UsageError, match="There are no weights"):
            read_state_dict(path)


class Hostile:
    """Creates a file when unpickled."""

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
        assert b"mkdir" in archive.read(names[0]), "the file was harmless: this test proves nothing"
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
    with pytest.raises(UsageError, match="do not match nayer:resnet8 with 3 classes") as caught:
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
    assert "2 with another shape (fc.bias, fc.weight)" in caught.value.why


def test_one_element_tensors_and_scalars_match(network: Classifier, tmp_path: Path) -> None:
    """A counter may be a scalar or have one element, but eight slopes do not match one."""

    class Slope(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.slope = nn.PReLU(channels)
            self.count = nn.Buffer(torch.tensor(3))

    one = Classifier(Slope(1), "python:slope.py:build", SPEC, CLASSES)
    state = Slope(8).state_dict()
    with pytest.raises(UsageError) as caught:
        load_weights(one, state, tmp_path / "w.safetensors")
    assert "1 with another shape (slope.weight)" in caught.value.why
    load_weights(one, {"slope.weight": torch.full((1,), 0.5), "count": torch.tensor([7])}, tmp_path / "w.safetensors")
    assert one.backbone.state_dict()["slope.weight"].tolist() == [0.5]
    assert one.backbone.state_dict()["count"].item() == 7


# ------------------------------------------------------------------ several sets of weights


@pytest.mark.parametrize("average", ["model_ema", "state_dict_ema", "ema", "ema_state_dict", "swa_model"])
def test_a_running_average_must_be_chosen(network: Classifier, tmp_path: Path, average: str) -> None:
    plain = dict(network.backbone.state_dict())
    averaged = {name: value + 1 if value.is_floating_point() else value for name, value in plain.items()}
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, "model": plain, average: averaged}, path)
    with pytest.raises(UsageError, match="contains 2 sets of weights: model") as caught:
        read_state_dict(path)
    assert average in caught.value.what
    assert "--set teacher.weights_key=model" in caught.value.fix
    assert torch.equal(read_state_dict(path, average)["fc.bias"], averaged["fc.bias"])
    assert torch.equal(read_state_dict(path, "model")["fc.bias"], plain["fc.bias"])
    assert key_taken(path, average) == average
    with pytest.raises(UsageError, match=r"no weights under 'modle'\. Did you mean 'model'") as caught:
        read_state_dict(path, "modle")
    assert f"{average} ({len(plain)} tensors)" in caught.value.why
    torch.save({average: averaged}, path)
    assert torch.equal(read_state_dict(path)["fc.bias"], averaged["fc.bias"])
    assert key_taken(path) == average, "the key is reported"


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("other", ["best_state_dict", "best", "model_best", "teacher", "avg_model", "polyak", "net"])
def test_the_last_and_the_best_must_be_chosen(network: Classifier, tmp_path: Path, key: str, other: str) -> None:
    last = dict(network.backbone.state_dict())
    best = {name: value + 1 if value.is_floating_point() else value for name, value in last.items()}
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, key: last, other: best}, path)
    with pytest.raises(UsageError, match="contains 2 sets of weights"):
        read_state_dict(path)
    assert torch.equal(read_state_dict(path, other)["fc.bias"], best["fc.bias"])
    # A part of another network, or the same weights twice, leave no doubt.
    if other in {"best_state_dict", "best", "model_best", "net"}:
        torch.save({key: last, other: {f"module.{name}": value.clone() for name, value in last.items()}}, path)
        assert torch.equal(read_state_dict(path)["fc.bias"], last["fc.bias"])
        torch.save({key: last, other: {"loss.weight": torch.ones(2)}}, path)
        assert torch.equal(read_state_dict(path)["fc.bias"], last["fc.bias"])


def test_averages_under_a_prefix_must_be_chosen(network: Classifier, tmp_path: Path) -> None:
    """As saved by Lightning: both in one flat state dict."""
    plain = network.backbone.state_dict()
    flat = {f"model.{n}": v for n, v in plain.items()} | {f"ema_model.{n}": v + 1 for n, v in plain.items()}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {**flat, "criterion.weight": torch.ones(3)}, "optimizer_states": [{}]}, path)
    with pytest.raises(UsageError, match="2 sets of these weights: ema_model, model"):
        load_weights(network, read_state_dict(path), path)
    with seeded(1):
        other = build_classifier("nayer:resnet8", SPEC, CLASSES)
    load_weights(other, read_state_dict(path, "ema_model"), path)
    assert torch.equal(other.backbone.state_dict()["fc.bias"], plain["fc.bias"] + 1)
    assert key_taken(path, "ema_model") == "state_dict.ema_model"


def test_a_prefix_in_several_sets_must_be_chosen(network: Classifier, tmp_path: Path) -> None:
    """As self-distillation with a running average saves them; the raw weights were taken silently."""
    raw = network.backbone.state_dict()
    path = tmp_path / "both.pt"

    def parts(add: float) -> dict[str, Any]:
        return {f"{part}.{name}": value + add for part in ("teacher", "student") for name, value in raw.items()}

    torch.save({"state_dict": parts(0), "state_dict_ema": parts(1)}, path)
    with pytest.raises(UsageError) as refused:
        read_state_dict(path, "teacher")
    assert "state_dict.teacher, state_dict_ema.teacher" in refused.value.what
    for place, added in (("state_dict", 0), ("state_dict_ema", 1)):
        found = read_state_dict(path, f"{place}.teacher")
        assert torch.equal(found["conv1.weight"], raw["conv1.weight"] + added)
        assert key_taken(path, f"{place}.teacher") == f"{place}.teacher"


def test_equal_copies_under_a_prefix_are_one_set(network: Classifier, tmp_path: Path) -> None:
    raw = {f"backbone.{name}": value for name, value in network.backbone.state_dict().items()}
    torch.save({"model": raw, "state_dict": raw}, tmp_path / "both.pt")
    found = read_state_dict(tmp_path / "both.pt", "backbone")
    assert torch.equal(found["conv1.weight"], raw["backbone.conv1.weight"])


@pytest.mark.parametrize("missing", [(), ("fc.bias",)])
def test_an_average_inside_the_weights_must_be_chosen(
    network: Classifier, tmp_path: Path, missing: tuple[str, ...]
) -> None:
    raw = network.backbone.state_dict()
    average = {name: value + 1 for name, value in raw.items() if name not in missing}
    path = tmp_path / "both.pt"
    torch.save({**raw, "ema": average}, path)
    with pytest.raises(UsageError, match="contains 2 sets of weights"):
        read_state_dict(path)
    assert torch.equal(read_state_dict(path, "ema")["conv1.weight"], raw["conv1.weight"] + 1)


def test_an_average_without_counters_must_be_chosen(network: Classifier, tmp_path: Path) -> None:
    raw = network.backbone.state_dict()
    average = {f"ema.{name}": value for name, value in raw.items() if not name.endswith("num_batches_tracked")}
    tensors = {f"model.{name}": value for name, value in raw.items()} | average
    with pytest.raises(UsageError, match="2 sets of these weights: ema, model"):
        load_weights(network, tensors, tmp_path / "both.pt")


def test_teacher_and_student_in_one_file(network: Classifier, tmp_path: Path) -> None:
    state = network.backbone.state_dict()
    torch.save({"teacher": state, "student": state}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="contains 2 sets"):
        read_state_dict(tmp_path / "w.pt")


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"model.{name}",
        lambda name: f"backbone.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.model.{name}",
        lambda name: f"net.encoder.{name}",
        lambda name: name.replace(".", "._orig_mod.", 1),
    ],
)
def test_prefixes_of_wrappers(network: Classifier, tmp_path: Path, rename: Callable[[str], str]) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {rename(name): value for name, value in network.backbone.state_dict().items()})
    with seeded(1):
        other = build_classifier("nayer:resnet8", SPEC, CLASSES)
    loaded = load_weights(other, read_state_dict(path), path)
    assert weights_digest(other) == weights_digest(network)
    assert loaded.ignored == ()


def test_a_prefix_that_only_the_network_has(network: Classifier, tmp_path: Path) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_classifier("nayer:resnet8", SPEC, CLASSES).backbone

    wrapped = Classifier(Wrapped(), "test:wrapped", SPEC, CLASSES)
    load_weights(wrapped, network.backbone.state_dict(), tmp_path / "w.pt")
    assert torch.equal(wrapped.backbone.state_dict()["inner.fc.bias"], network.backbone.state_dict()["fc.bias"])


def test_torchs_averaged_model(network: Classifier, tmp_path: Path) -> None:
    """torch.optim.swa_utils.AveragedModel stores a counter beside the weights."""
    averaged = torch.optim.swa_utils.AveragedModel(network.backbone)
    torch.save(averaged.state_dict(), tmp_path / "w.pt")
    with seeded(1):
        other = build_classifier("nayer:resnet8", SPEC, CLASSES)
    loaded = load_weights(other, read_state_dict(tmp_path / "w.pt"), tmp_path / "w.pt")
    assert weights_digest(other) == weights_digest(network)
    assert loaded.ignored == ("n_averaged",)
    assert loaded.facts() == {"prefix": "module.", "ignored": ["n_averaged"]}


def test_a_loss_beside_the_weights(network: Classifier, tmp_path: Path) -> None:
    torch.save({"best_loss": torch.tensor(0.3), "model": network.backbone.state_dict()}, tmp_path / "w.pt")
    assert set(read_state_dict(tmp_path / "w.pt")) == set(network.backbone.state_dict())


def test_options_and_numbers_beside_the_weights(network: Classifier, tmp_path: Path) -> None:
    """As stored by timm's and many other training scripts; none of it is code."""
    import numpy as np

    path = tmp_path / "w.pth.tar"
    torch.save(
        {"state_dict": network.backbone.state_dict(), "args": argparse.Namespace(lr=0.1), "best": np.float64(0.93)},
        path,
    )
    assert set(read_state_dict(path)) == set(network.backbone.state_dict())


VALUES: dict[str, Any] = {
    "PosixPath": pathlib.PosixPath("runs/x"),
    "PureWindowsPath": pathlib.PureWindowsPath("C:/runs"),
    "array": np.zeros(3),
    "array of words": np.array(["cat", "dog"]),
    "array of objects": np.array([None, 1], dtype=object),
    "word": np.str_("cat"),
    "truth": np.bool_(True),
    "uint8": np.uint8(3),
    "float16": np.float16(2),
    "dtype": np.dtype("int16"),
    "type": np.float32,
    "defaultdict": collections.defaultdict(int, {"a": 1}),
    "deque": collections.deque([1, 2], maxlen=3),
    "counter": collections.Counter("aab"),
    "date": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
    "timedelta": datetime.timedelta(seconds=3),
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=7),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_beside_the_weights(network: Classifier, tmp_path: Path, name: str) -> None:
    path, state = tmp_path / "last.ckpt", network.backbone.state_dict()
    torch.save({"hyper_parameters": {"x": VALUES[name], VALUES[name].__class__.__name__: [VALUES[name]]},
                "state_dict": state}, path)  # fmt: skip
    read = read_state_dict(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], value) for key, value in state.items())


class Options:
    """A class of the user's."""


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (functools.partial(int), "functools.partial"),
        (Options(), "test_state_dicts.Options"),
        (Options, "test_state_dicts.Options"),
        (os.path.join, "posixpath.join"),
        (operator.attrgetter("a"), "operator.attrgetter"),
        (range(3), "range"),
    ],
)
def test_functions_and_classes_stay_refused(network: Classifier, tmp_path: Path, value: object, name: str) -> None:
    torch.save({"state_dict": network.backbone.state_dict(), "x": value}, tmp_path / "w.pt")
    with pytest.raises(IntegrityError, match="nothing in it was run") as caught:
        read_state_dict(tmp_path / "w.pt")
    assert f"{name} imported and run" in caught.value.why
    assert "weights_only" not in str(caught.value)
    assert "safe_globals" not in str(caught.value)


def test_no_constructor_of_an_array_is_called(tmp_path: Path) -> None:
    """NumPy trusts the state of an array in a pickle: one that claims to hold no objects could point anywhere."""
    torch.save({"x": np.zeros(3), "p": pathlib.PosixPath("a")}, tmp_path / "w.pt")
    content = read_checkpoint(tmp_path / "w.pt")
    assert {type(value) for value in content.values()} == {Placeholder}


# ------------------------------------------------------------------ files of other programs


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("w.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "a Git LFS pointer"),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "a Git LFS pointer"),
        # The signatures are those of the formats' specifications.
        ("w.h5", b"\x89HDF\r\n\x1a\n" + bytes(600), "a Keras file"),
        ("w.pt", b"\x89HDF\r\n\x1a\n" + bytes(600), "a Keras file"),
        ("w.onnx", b"\x08\x09\x12\x07pytorch", "an ONNX file"),
        ("w.bin", b"\x08\x09\x12\x07pytorch", "an ONNX file"),
        ("w.tflite", b"\x1c\0\0\0TFL3" + bytes(40), "a TensorFlow Lite file"),
        ("w.pb", b"\n\x10\n\x05input", "a TensorFlow graph"),
        ("w.gguf", b"GGUF\x03\0\0\0", "a GGUF file"),
        ("w.pth", b"<!DOCTYPE html>\n<html>Sign in</html>", "a web page"),
        ("w.pth.gz", b"\x1f\x8b\x08\0", "a gzip archive"),
    ],
)
def test_files_of_other_programs_are_named(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=words) as caught:
        read_state_dict(tmp_path / name)
    assert "weights_only" not in str(caught.value)


def test_zip_files_of_other_programs(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    with pytest.raises(UsageError, match=r"a NumPy archive \(\.npz\)"):
        read_state_dict(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("weights/w.pt", b"x")
    with pytest.raises(UsageError, match="a zip archive, not a PyTorch checkpoint"):
        read_state_dict(tmp_path / "w.zip")


def test_the_content_decides_not_the_suffix(network: Classifier, tmp_path: Path) -> None:
    state = network.backbone.state_dict()
    save_tensors(tmp_path / "w.pt", state)
    assert read_state_dict(tmp_path / "w.pt").keys() == state.keys()
    torch.save(dict(state), tmp_path / "w.safetensors")
    assert read_state_dict(tmp_path / "w.safetensors").keys() == state.keys()


def test_a_state_dict_in_a_list(network: Classifier, tmp_path: Path) -> None:
    state = network.backbone.state_dict()
    for content in ([state, {"lr": 1}], (7, state)):
        torch.save(content, tmp_path / "w.pt")
        assert read_state_dict(tmp_path / "w.pt").keys() == state.keys()
    assert key_taken(tmp_path / "w.pt") == "1"
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(UsageError, match="It is a list"):
        read_state_dict(tmp_path / "w.pt")


# ------------------------------------------------------------------ names of wrappers, heads and averages


@pytest.mark.parametrize(
    "rename",
    [
        # fartashf/vsepp#10: DataParallel around a part.
        lambda name: name.replace("layer1.", "layer1.module."),
        lambda name: f"model.{name.replace('layer2.', 'layer2.module.')}",
        lambda name: f"_fsdp_wrapped_module.{name.replace('layer1.', 'layer1._fsdp_wrapped_module.')}",
        lambda name: name.replace("layer1.0.", "layer1.0._checkpoint_wrapped_module."),
        # MMPretrain.
        lambda name: ("head." if name.startswith("fc") else "backbone.") + name,
        lambda name: f"model.{'head' if name.startswith('fc') else 'backbone'}.{name}",
        lambda name: f"classifier.{name}" if name.startswith("fc") else name,
    ],
)
def test_wrappers_inside_and_heads_elsewhere(network: Classifier, tmp_path: Path, rename: Callable[[str], str]) -> None:
    path = tmp_path / "w.pt"
    torch.save({rename(name): value for name, value in network.backbone.state_dict().items()}, path)
    with seeded(1):
        other = build_classifier("nayer:resnet8", SPEC, CLASSES)
    load_weights(other, read_state_dict(path), path)
    assert weights_digest(other) == weights_digest(network)


def test_a_network_with_a_part_of_that_name(tmp_path: Path) -> None:
    """A layer that is called `module` in the user's own code is found, too."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.ModuleDict({"module": nn.Linear(2, 3)})

    one, other = (Classifier(Own(), "python:own.py:build", SPEC, CLASSES) for _ in range(2))
    torch.save(one.backbone.state_dict(), tmp_path / "w.pt")
    load_weights(other, read_state_dict(tmp_path / "w.pt"), tmp_path / "w.pt")
    assert weights_digest(other) == weights_digest(one)


def test_two_heads_are_not_chosen_between(network: Classifier, tmp_path: Path) -> None:
    state = network.backbone.state_dict()
    both = {f"backbone.{n}": v for n, v in state.items() if not n.startswith("fc")}
    both |= {f"{head}.{n}": v for head in ("head", "student") for n, v in state.items() if n.startswith("fc")}
    with pytest.raises(UsageError, match="do not match") as caught:
        load_weights(network, both, tmp_path / "w.pt")
    assert "2 missing (fc.bias, fc.weight)" in caught.value.why


def test_an_average_without_buffers_is_left_out(network: Classifier, tmp_path: Path) -> None:
    """LitEma of latent-diffusion stores only parameters, under names without dots."""
    state = network.backbone.state_dict()
    parameters = {name for name, _ in network.backbone.named_parameters()}
    flat = {f"model.{n}": v for n, v in state.items()} | {"model_ema.decay": torch.tensor(0.9)}
    flat |= {f"model_ema.{n.replace('.', '')}": v + 1 for n, v in state.items() if n in parameters}
    torch.save({"state_dict": flat}, tmp_path / "w.ckpt")
    with seeded(1):
        other = build_classifier("nayer:resnet8", SPEC, CLASSES)
    loaded = load_weights(other, read_state_dict(tmp_path / "w.ckpt"), tmp_path / "w.ckpt")
    assert weights_digest(other) == weights_digest(network)
    assert len(loaded.ignored) == len(parameters) + 1


# ------------------------------------------------------------------ types, heads, values


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(network: Classifier, tmp_path: Path, kind: torch.dtype) -> None:
    state = {n: v.to(kind) if v.is_floating_point() else v for n, v in network.backbone.state_dict().items()}
    with seeded(1):
        other = build_classifier("nayer:resnet8", SPEC, CLASSES)
    loaded = load_weights(other, state, tmp_path / "w.pt")
    assert all(v.dtype == torch.float32 for n, v in other.backbone.state_dict().items() if v.is_floating_point())
    torch.testing.assert_close(other.backbone.state_dict()["fc.weight"], state["fc.weight"].float(), rtol=0, atol=0)
    assert loaded.notes == (f"stored as {str(kind).removeprefix('torch.')}",)


def test_quantized_weights(network: Classifier, tmp_path: Path) -> None:
    state = dict(network.backbone.state_dict())
    state["fc.weight"] = (state["fc.weight"] * 10).to(torch.int8)
    with pytest.raises(UsageError, match=r"fc\.weight in .* has the type int8"):
        load_weights(network, state, tmp_path / "w.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(network: Classifier, tmp_path: Path, value: float) -> None:
    state = {name: tensor.clone() for name, tensor in network.backbone.state_dict().items()}
    before = weights_digest(network)
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    with pytest.raises(UsageError, match=r"1 of \d+ tensors in .* contain NaN or infinity: layer1\.0\.conv1\.weight"):
        load_weights(network, state, tmp_path / "w.pt")
    assert weights_digest(network) == before, "partly loaded"


def test_a_head_for_other_classes(network: Classifier, tmp_path: Path) -> None:
    thousand = build_classifier("nayer:resnet8", SPEC, tuple(map(str, range(1000)))).backbone.state_dict()
    with pytest.raises(UsageError) as caught:
        load_weights(network, thousand, tmp_path / "w.pt")
    assert caught.value.why.startswith("Their head has 1000 outputs, but the recipe has 3 classes.")
    assert "fc.bias is 1000 in the file, 3 in the model" in caught.value.why
    assert "one name for each of the 1000 outputs" in caught.value.fix


def test_no_head(network: Classifier, tmp_path: Path) -> None:
    state = {name: value for name, value in network.backbone.state_dict().items() if not name.startswith("fc.")}
    with pytest.raises(UsageError) as caught:
        load_weights(network, state, tmp_path / "w.pt")
    assert caught.value.why.startswith("They have no classifier head: Keys: 2 missing (fc.bias, fc.weight)")


def test_other_channels(network: Classifier, tmp_path: Path) -> None:
    state = build_classifier("nayer:resnet8", InputSpec(channels=3), CLASSES).backbone.state_dict()
    with pytest.raises(UsageError) as caught:
        load_weights(network, state, tmp_path / "w.pt")
    assert "images of 3 channels" in caught.value.why
    assert caught.value.fix == "Add --set teacher.input.channels=3"


def test_auxiliary_heads_are_skipped(tmp_path: Path) -> None:
    spec = InputSpec(height=96, width=96)
    whole = build_classifier("torchvision:googlenet", spec, CLASSES, {"aux_logits": True}).backbone.state_dict()
    plain = build_classifier("torchvision:googlenet", spec, CLASSES)
    loaded = load_weights(plain, whole, tmp_path / "w.pt")
    assert set(loaded.ignored) == set(whole) - set(plain.backbone.state_dict())
    assert all(name.startswith("aux") for name in loaded.ignored)


def test_tensors_to_ignore_are_named_by_the_user(network: Classifier, tmp_path: Path) -> None:
    state = {**network.backbone.state_dict(), "projector.0.weight": torch.ones(2, 2)}
    with pytest.raises(UsageError, match="do not match nayer:resnet8") as caught:
        load_weights(network, state, tmp_path / "w.pt")
    assert 'teacher.weights_ignore=["projector."]' in caught.value.fix
    assert load_weights(network, state, tmp_path / "w.pt", ["projector."]).ignored == ("projector.0.weight",)


def test_the_nearest_names(network: Classifier, tmp_path: Path) -> None:
    state = {name.replace("downsample", "down_sample"): v for name, v in network.backbone.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load_weights(network, state, tmp_path / "w.pt")
    assert "For layer2.0.downsample.0.weight: Did you mean 'layer2.0.down_sample.0.weight'?" in caught.value.why


def test_old_checkpoints_lack_the_batch_counter(network: Classifier, tmp_path: Path) -> None:
    state = {n: v for n, v in network.backbone.state_dict().items() if not n.endswith("num_batches_tracked")}
    with seeded(1):
        other = build_classifier("nayer:resnet8", SPEC, CLASSES)
    load_weights(other, state, tmp_path / "w.pt")
    assert all(torch.equal(other.backbone.state_dict()[name], value) for name, value in state.items())


def test_a_whole_pickled_network(network: Classifier, tmp_path: Path) -> None:
    torch.save(network.backbone, tmp_path / "w.pt")
    with pytest.raises(IntegrityError, match="nothing in it was run") as caught:
        read_state_dict(tmp_path / "w.pt")
    assert "nayer_edge.models.zoo.resnet.ResNet" in caught.value.why
    assert "torch.save(model.state_dict(), …)" in caught.value.fix


def test_torchscript(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    scripted.save(str(tmp_path / "w.pt"))
    with pytest.raises(IntegrityError, match="nothing in it was run"):
        read_state_dict(tmp_path / "w.pt")
