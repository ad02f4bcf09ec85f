"""FP16 graphs: what is half, and what stays float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import nn

from nayer_edge.export.fp16 import converted, fp32_nodes, to_fp16
from nayer_edge.export.parity import compare
from nayer_edge.export.to_int8 import run_onnx, to_int8
from nayer_edge.export.to_onnx import to_onnx

Once = Callable[[str, Callable[[Path], object]], Path]
IMAGES = np.random.default_rng(0).random((6, 3, 12, 12), np.float32)


@pytest.fixture(scope="module")
def fp32(once: Once) -> Path:
    """A network that fits into FP16."""

    def export(folder: Path) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        )
        to_onnx(network, (3, 12, 12), folder / "fp32.onnx", metadata={"nayer_edge.classes": "[]"})

    return once("fp16-fp32", export) / "fp32.onnx"


def test_weights_are_half_and_inputs_and_outputs_float32(fp32: Path, tmp_path: Path) -> None:
    digest = to_fp16(fp32, tmp_path / "fp16.onnx")
    assert digest == to_fp16(fp32, tmp_path / "again.onnx")
    model = onnx.load(tmp_path / "fp16.onnx")
    assert {t.data_type for t in model.graph.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {p.key: p.value for p in model.metadata_props}["nayer_edge.precision"] == "fp16"
    assert (tmp_path / "fp16.onnx").stat().st_size < fp32.stat().st_size
    reference, half = (run_onnx(path, IMAGES) for path in (fp32, tmp_path / "fp16.onnx"))
    assert compare(reference, half, tolerance=1e-2).verdict == "match"
    assert compare(reference, half, tolerance=0.0).verdict == "differs", "it really computes in FP16"


class Scaled(nn.Module):
    """Convolutions in the range of FP16, and between them something that is not.

    Args:
        kind: what.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c, self.d = (nn.Conv2d(inputs, 8, 3, padding=1) for inputs in (3, 8, 8, 8))
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            if kind in ("rescaled", "residual", "skip"):
                self.a.weight *= 20
                self.b.weight *= 4e5
            elif kind == "tiny":
                self.b.weight *= 1e-6
                self.b.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]
            elif kind == "weight":
                self.b.weight[0, 0] = 1e6
            elif kind == "logits":
                self.fc.weight *= 1e6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1e5 / 2e5 if self.kind == "image" else x
        y = torch.relu(self.a(x))
        z = self.b(y)
        if self.kind == "rescaled":
            z = z * 2e-6
        elif self.kind == "skip":
            z = (self.d(y) + z) * 2e-6
        elif self.kind == "residual":
            z = z + torch.relu(z)  # two nodes in FP32 read one tensor
            z = z / z.abs().amax((2, 3), keepdim=True)
        elif self.kind == "tiny":
            z = z * 1e6
        elif self.kind == "norm":
            y = y * 3000
            z = 3000 * z / y.square().mean((2, 3), keepdim=True).sqrt()
        elif self.kind == "weight":
            z = z * 1e-5
        return self.fc(self.c(z).mean((2, 3)))


@pytest.fixture(scope="module")
def scaled(once: Once) -> Callable[[str], Path]:
    """(kind) → the FP32 file of `Scaled`."""

    def exported(kind: str) -> Path:
        def export(folder: Path) -> None:
            torch.manual_seed(0)
            to_onnx(Scaled(kind).eval(), (3, 12, 12), folder / "fp32.onnx")

        return once(f"fp16-{kind}", export) / "fp32.onnx"

    return exported


def every_tensor_rounded(path: Path) -> np.ndarray:
    """Logits of a device that rounds every FP16 tensor. ONNX Runtime on a CPU computes much of an FP16 graph in FP32,
    and there the overflow does not show. Of two images: it is slow."""
    with np.errstate(all="ignore"):
        return np.asarray(ReferenceEvaluator(str(path)).run(None, {"images": IMAGES[:2]})[0])


KINDS = ("rescaled", "residual", "skip", "tiny", "norm", "weight", "logits", "image")


@pytest.mark.parametrize("kind", [*KINDS[:3], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[3:])])
def test_what_fp16_cannot_hold_stays_in_fp32(scaled: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    fp32 = scaled(kind)
    to_fp16(fp32, tmp_path / "fp16.onnx", IMAGES)
    reference, half = (every_tensor_rounded(path) for path in (fp32, tmp_path / "fp16.onnx"))
    assert np.isfinite(half).all()
    assert np.abs(half - reference).max() < 0.01 * np.abs(reference).max()
    kept = fp32_nodes(tmp_path / "fp16.onnx")
    model = onnx.load(tmp_path / "fp16.onnx")
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    assert kept
    assert set(convolutions) - set(kept), "the rest is FP16"
    assert all("FP16" in why for why in kept.values())
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv":
            wanted = TensorProto.FLOAT if node.name in kept else TensorProto.FLOAT16
            assert types[node.input[1]] == wanted, node.name
    assert [value.name for value in model.graph.output] == ["logits"]
    # Without them, the answers are wrong in silence.
    broken = tmp_path / "broken.onnx"
    onnx.save(converted(onnx.load(fp32)), broken)
    assert not np.abs(every_tensor_rounded(broken) - reference).max() < 0.01 * np.abs(reference).max()


@pytest.mark.parametrize(
    "kind", [*KINDS[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("skip", "tiny", "logits"))]
)
def test_int8_graphs_with_fp16_rest_keep_it_in_fp32_too(
    scaled: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    fp32 = scaled(kind)
    result = to_int8(fp32, tmp_path / "int8.onnx", IMAGES, "tensorrt", method="minmax")
    reference, found = (run_onnx(path, IMAGES, as_written=True) for path in (fp32, result.path))
    assert np.isfinite(found).all()
    assert np.abs(found - reference).max() < 0.05 * np.abs(reference).max()
    kept = dict(result.record["fp32_nodes"])
    assert kept == fp32_nodes(tmp_path / "int8.onnx")
    assert set(result.excluded_nodes) <= set(kept)
    assert result.coverage.int8 == result.coverage.eligible - len(result.excluded_nodes)
    # The factor behind a convolution is folded into its weights, after which everything fits.
    fits = kind in ("rescaled", "tiny")
    assert (result.coverage.fraction == 1, not kept) == (fits, fits)


def test_what_fits_is_converted_as_before(fp32: Path, tmp_path: Path) -> None:
    unchecked = to_fp16(fp32, tmp_path / "unchecked.onnx")
    assert to_fp16(fp32, tmp_path / "fp16.onnx", IMAGES) == unchecked
    assert fp32_nodes(tmp_path / "fp16.onnx") == {}


def test_tiny_weights_survive_int8_with_fp16_scales(tmp_path: Path) -> None:
    """A scale that FP16 rounds to zero would turn a channel into NaN, one that ORT replaces by 1 into zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[1].weight *= 1e-3
        model[1].weight[0] *= 1e-8
        model[1].bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]
    to_onnx(model, (3, 12, 12), tmp_path / "fp32.onnx")
    to_int8(tmp_path / "fp32.onnx", tmp_path / "m.onnx", IMAGES, "tensorrt", method="minmax")
    reference, found = (run_onnx(tmp_path / name, IMAGES) for name in ("fp32.onnx", "m.onnx"))
    assert compare(reference, found, tolerance=0.05 * np.abs(reference).max()).verdict == "match"
