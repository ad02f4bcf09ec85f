"""Quantization end to end: agreement, the choice of method, mixed precision, determinism, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional as F

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.export.int8.calibration import METHODS
from nayer_edge.export.onnx_file import metadata_of
from nayer_edge.export.parity import agreement
from nayer_edge.export.to_int8 import Int8Result, run_onnx, to_int8
from nayer_edge.export.to_onnx import to_onnx

Once = Callable[[str, Callable[[Path], object]], Path]
SHAPE = (3, 16, 16)
TARGETS = ("cpu", "arm", "tensorrt", "tensorrt-rtx")
# The other targets have the same scheme in other types.
OTHERS_SLOW = pytest.mark.parametrize(
    "target", ["cpu", *(pytest.param(target, marks=pytest.mark.slow) for target in TARGETS[1:])]
)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 16, 1),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Hardswish(), Block(32, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def draw(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten noisy patterns."""
    patterns = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = F.interpolate(patterns[labels], scale_factor=4) + 0.7 * torch.randn(n, *SHAPE, generator=generator)
    return images.clamp(0, 1), labels


@pytest.fixture(scope="module")
def trained(once: Once) -> Path:
    """A network trained for a moment, so that its classes mean something."""
    return once("to-int8-trained", train) / "fp32.onnx"


def train(folder: Path) -> None:
    torch.manual_seed(0)
    model, generator = network(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        images, labels = draw(64, generator)
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    path = folder / "fp32.onnx"
    to_onnx(model, SHAPE, path, metadata={"nayer_edge.classes": "[]"})
    images, labels = draw(500, torch.Generator().manual_seed(5))
    accuracy = (run_onnx(path, images.numpy()).argmax(1) == labels.numpy()).mean()
    assert accuracy > 0.8, "the fixture must have learnt something"


CALIBRATION = draw(128, torch.Generator().manual_seed(1))[0].numpy()
HOLDOUT = draw(400, torch.Generator().manual_seed(2))[0].numpy()


RESULT = TypeAdapter(Int8Result)


@pytest.fixture(scope="module")
def auto(trained: Path, once: Once) -> Callable[[str], Int8Result]:
    """(target) → the file that the best of all methods makes, with the sensitivity of its layers."""

    def made(target: str) -> Int8Result:
        def make(folder: Path) -> None:
            path = folder / "m.onnx"
            result = to_int8(trained, path, CALIBRATION, target, holdout_images=HOLDOUT, sensitivity=True)
            (folder / "result.json").write_bytes(RESULT.dump_json(result))

        return RESULT.validate_json((once(f"to-int8-auto-{target}", make) / "result.json").read_bytes())

    return made


@pytest.fixture(scope="module")
def minmax(trained: Path, once: Once) -> Path:
    """The file for cpu that minmax alone makes, without hold-out images."""

    def make(folder: Path) -> None:
        to_int8(trained, folder / "m.onnx", CALIBRATION, "cpu", method="minmax")

    return once("to-int8-minmax", make) / "m.onnx"


@OTHERS_SLOW
def test_int8_agrees_with_fp32_and_the_best_method_wins(
    trained: Path, auto: Callable[[str], Int8Result], target: str
) -> None:
    result = auto(target)
    assert set(result.scores) == set(METHODS)
    best = max(result.scores.values(), key=lambda s: (s.top1, -s.mean_kl))
    assert result.scores[result.method] == best
    # Another device's graph is measured as it is written: this processor's fused kernels are not that device's.
    int8 = run_onnx(result.path, HOLDOUT, as_written=target != "cpu")
    measured = agreement(run_onnx(trained, HOLDOUT), int8)
    assert measured.top1 >= 0.985
    assert measured.mean_kl < 1e-2
    assert result.coverage.fraction == 1.0
    # What is recorded was measured on the very graph that was written, its FP16 included.
    assert result.record["final"] == pytest.approx(measured.as_record(), rel=1e-6)


def test_the_record_is_json_and_says_what_was_done(auto: Callable[[str], Int8Result]) -> None:
    result = auto("cpu")
    record = json.loads(json.dumps(result.record, allow_nan=False))
    assert record["method"] == result.method
    assert set(record["methods"]) == set(METHODS)
    assert record["calibration"]["n"] == 128
    assert record["calibration"]["provenance"] == "synthetic"
    assert record["calibration"]["sha256"] != record["holdout"]["sha256"]
    assert len(record["sensitivity"]) == result.coverage.eligible
    assert record["bias_correction"].keys() == {"applied", "before", "after"}
    assert record["file_sha256"] == result.sha256
    assert record["coverage"]["verified"] is True


@OTHERS_SLOW
def test_the_same_input_gives_the_same_bytes_and_no_other_file(
    trained: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = sorted(trained.parent.iterdir())
    for name in ("a", "b"):
        to_int8(trained, tmp_path / f"{name}.onnx", CALIBRATION, target, method="mse", holdout_images=HOLDOUT[:50])
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "here"]
    assert not list(here.iterdir())
    assert sorted(trained.parent.iterdir()) == before
    assert capfd.readouterr() == ("", "")


def test_metadata_is_ours_and_kept(minmax: Path) -> None:
    metadata = metadata_of(onnx.load(minmax))
    assert metadata["nayer_edge.classes"] == "[]"
    assert metadata["nayer_edge.precision"] == "int8"
    assert metadata["nayer_edge.calibration"] == "minmax, 128 synthetic images"
    assert not [key for key in metadata if not key.startswith("nayer_edge.")]
    assert [e.domain for e in onnx.load(minmax).opset_import] == [""]


def test_layers_are_excluded_until_the_drop_holds(trained: Path, tmp_path: Path) -> None:
    """INT8 calibrated on near-black images saturates; mixed precision must notice and repair it."""
    dark = CALIBRATION[:32] * 0.1
    spoilt = to_int8(
        trained, tmp_path / "a.onnx", dark, "cpu", method="minmax", holdout_images=HOLDOUT, bias_correction="off"
    )
    assert spoilt.record["final"]["top1"] < 0.95
    mended = to_int8(
        trained, tmp_path / "b.onnx", dark, "cpu", method="minmax", holdout_images=HOLDOUT,
        bias_correction="off", max_drop=0.02,
    )  # fmt: skip
    assert mended.record["drop_held"]
    assert mended.excluded_nodes
    assert mended.record["fall_back"][0]["float_layers"] == 0
    assert agreement(run_onnx(trained, HOLDOUT), run_onnx(mended.path, HOLDOUT)).top1 >= 0.98
    assert (
        {name for name, _ in mended.coverage.not_int8}
        == set(mended.excluded_nodes)
        == set(mended.record["float_nodes"])
    )


def test_no_layer_is_excluded_where_the_drop_holds_anyway(trained: Path, tmp_path: Path) -> None:
    result = to_int8(
        trained, tmp_path / "m.onnx", CALIBRATION, "cpu", method="mse", holdout_images=HOLDOUT, max_drop=0.02
    )
    assert result.excluded_nodes == ()
    assert result.record["drop_held"]


def test_bias_correction_is_kept_only_where_it_helps(trained: Path, tmp_path: Path) -> None:
    result = to_int8(trained, tmp_path / "m.onnx", CALIBRATION, "cpu", method="minmax", holdout_images=HOLDOUT)
    outcome = result.record["bias_correction"]
    before, after = ((o["top1"], -o["mean_kl"]) for o in (outcome["before"], outcome["after"]))
    assert outcome["applied"] == (after > before)
    assert result.record["final"]["top1"] == max(before, after)[0]


@pytest.mark.slow
def test_the_record_says_whether_biases_were_corrected(trained: Path, tmp_path: Path) -> None:
    modes: tuple[Literal["off", "on", "auto"], ...] = ("off", "on", "auto")
    results = {
        mode: to_int8(
            trained, tmp_path / f"{mode}.onnx", CALIBRATION, "cpu", method="minmax", holdout_images=HOLDOUT,
            bias_correction=mode,
        )
        for mode in modes
    }  # fmt: skip
    corrected = {mode: result.sha256 != results["off"].sha256 for mode, result in results.items()}
    assert corrected["on"]
    assert {mode: r.record["bias_correction"]["applied"] for mode, r in results.items()} == corrected


def test_excluded_layers_keep_their_own_bias(trained: Path, tmp_path: Path) -> None:
    """A correction for rounding that does not take place would be an error of its own."""
    layers = [n.name for n in onnx.load(trained).graph.node if n.op_type in ("Conv", "Gemm")]
    result = to_int8(
        trained, tmp_path / "m.onnx", CALIBRATION, "cpu", method="minmax", holdout_images=HOLDOUT,
        bias_correction="on", nodes_to_exclude=layers,
    )  # fmt: skip
    np.testing.assert_allclose(run_onnx(result.path, HOLDOUT), run_onnx(trained, HOLDOUT), atol=1e-4)


def test_uint8_input_is_quantized_too(trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    to_onnx(network(), SHAPE, tmp_path / "fp32.onnx", uint8_input=True)
    result = to_int8(tmp_path / "fp32.onnx", tmp_path / "m.onnx", CALIBRATION, "cpu", method="minmax")
    assert result.coverage.fraction == 1.0
    assert onnx.load(result.path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


@pytest.mark.parametrize(
    ("images", "why"),
    [
        (np.zeros((0, *SHAPE), np.float32), "n of at least 1"),
        (np.zeros((4, 1, 16, 16), np.float32), "the model takes"),
        (np.full((4, *SHAPE), 128.0, np.float32), r"\[0, 1\]"),
    ],
)
def test_wrong_calibration_is_refused_before_any_work(
    trained: Path, tmp_path: Path, images: np.ndarray, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        to_int8(trained, tmp_path / "m.onnx", images, "cpu", method="minmax")
    assert not (tmp_path / "m.onnx").exists()


def test_what_needs_a_holdout_says_so(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'auto' needs hold-out images"):
        to_int8(trained, tmp_path / "m.onnx", CALIBRATION, "cpu")
    with pytest.raises(UsageError, match="max_drop needs hold-out images"):
        to_int8(trained, tmp_path / "m.onnx", CALIBRATION, "cpu", method="minmax", max_drop=0.01)


def test_unknown_targets_and_methods_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no target 'gpu'"):
        to_int8(trained, tmp_path / "m.onnx", CALIBRATION, "gpu", method="minmax")
    with pytest.raises(UsageError, match="no calibration method 'min-max'"):
        to_int8(trained, tmp_path / "m.onnx", CALIBRATION, "cpu", method="min-max")  # pyright: ignore[reportArgumentType]


def test_a_model_with_nothing_to_quantize_is_refused(tmp_path: Path) -> None:
    to_onnx(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), SHAPE, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="nothing that runs in INT8") as caught:
        to_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", CALIBRATION, "cpu", method="minmax")
    assert "no convolution and no matrix product" in caught.value.why
    depthwise = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    to_onnx(depthwise, SHAPE, tmp_path / "d.onnx")
    with pytest.raises(UsageError, match="nothing that runs in INT8") as caught:
        to_int8(tmp_path / "d.onnx", tmp_path / "q.onnx", CALIBRATION, "tensorrt", method="minmax")
    assert "depthwise" in caught.value.why


def test_quantizing_twice_is_refused(minmax: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantized already"):
        to_int8(minmax, tmp_path / "q.onnx", CALIBRATION, "cpu", method="minmax")


def test_a_damaged_file_is_an_integrity_error(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(trained.read_bytes()[:-1000])
    with pytest.raises(IntegrityError):
        to_int8(tmp_path / "cut.onnx", tmp_path / "q.onnx", CALIBRATION, "cpu", method="minmax")


def test_the_cpu_graph_says_the_same_with_and_without_vnni(tmp_path: Path) -> None:
    """Without VNNI, x86 adds two products of bytes in 16 bits, where 255 · 127 · 2 does not fit: bright images under
    large weights of one sign would be clipped. The fused kernels must agree with Q/DQ computed in float, on any x86."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        for layer in (model[0], model[2]):
            next(layer.parameters()).uniform_(0.9, 1.0)
    to_onnx(model.eval(), SHAPE, tmp_path / "fp32.onnx", metadata={"nayer_edge.classes": "[]"})
    images = 1 - 0.1 * np.random.default_rng(0).random((64, *SHAPE), dtype=np.float32)
    made = to_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", images, "cpu", method="minmax")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = ort.InferenceSession(str(made.path), options, providers=["CPUExecutionProvider"])
    expected = exact.run(None, {exact.get_inputs()[0].name: images})[0]
    assert made.coverage.fraction == 1
    np.testing.assert_allclose(run_onnx(made.path, images), expected, rtol=0.01)
    for initializer in onnx.load(made.path).graph.initializer:
        values = onnx.numpy_helper.to_array(initializer)
        if values.dtype == np.int8 and values.ndim > 1:
            assert 2 * 255 * int(np.abs(values.astype(int)).max()) < 2**15
