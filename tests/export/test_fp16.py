"""FP16 graphs: what is half, what stays float32, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from nayer_edge.errors import UsageError
from nayer_edge.export.fp16 import to_fp16
from nayer_edge.export.parity import compare
from nayer_edge.export.to_int8 import run_onnx
from nayer_edge.export.to_onnx import to_onnx

IMAGES = np.random.default_rng(0).random((6, 3, 12, 12), np.float32)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def test_weights_are_half_and_inputs_and_outputs_float32(tmp_path: Path) -> None:
    to_onnx(network(), (3, 12, 12), tmp_path / "fp32.onnx", metadata={"nayer_edge.classes": "[]"})
    digest = to_fp16(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx")
    assert digest == to_fp16(tmp_path / "fp32.onnx", tmp_path / "again.onnx")
    model = onnx.load(tmp_path / "fp16.onnx")
    assert {t.data_type for t in model.graph.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {p.key: p.value for p in model.metadata_props}["nayer_edge.precision"] == "fp16"
    assert (tmp_path / "fp16.onnx").stat().st_size < (tmp_path / "fp32.onnx").stat().st_size
    reference, half = (run_onnx(tmp_path / f"{name}.onnx", IMAGES) for name in ("fp32", "fp16"))
    assert compare(reference, half, tolerance=1e-2).verdict == "match"
    assert compare(reference, half, tolerance=0.0).verdict == "differs", "it really computes in FP16"


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[5].weight[0, 0] = 1e6  # pyright: ignore[reportIndexIssue]
    to_onnx(model, (3, 12, 12), tmp_path / "fp32.onnx")
    with pytest.raises(UsageError, match="FP16 ends at 65504"):
        to_fp16(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx")


def test_tiny_weights_survive_int8_with_fp16_scales(tmp_path: Path) -> None:
    """A scale that FP16 rounds to zero would turn a channel into NaN, one that ORT replaces by 1 into zeros."""
    from nayer_edge.export.to_int8 import to_int8

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
