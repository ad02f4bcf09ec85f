"""Fake quantization against the formula of ONNX's specification, ONNX Runtime and torch's own kernels."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from nayer_edge.errors import UsageError
from nayer_edge.export.qat.fake_quant import (
    Grid,
    LearntRange,
    fake_quantize,
    fake_quantize_weight,
    least_error_limit,
    scale_and_zero,
    weight_limit,
)

VALUES = torch.cat([torch.linspace(-3.0003, 5.0001, 801), torch.tensor([-1e9, 0.0, 1e9, 0.125, 0.375, -0.125])])


def by_hand(x: np.ndarray, low: float, high: float, bits: int, symmetric: bool) -> np.ndarray:
    """The levels of the integer type one by one: every value goes to the nearest one. (No value is near a tie.)"""
    if symmetric:
        smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale, zero = max(-low, high) / largest, 0
    else:
        smallest, largest = 0, 2**bits - 1
        scale = (high - low) / largest
        zero = int(np.rint(np.float32(-low / scale)))
    levels = np.arange(smallest, largest + 1)
    distance = np.abs(np.asarray(x, np.float64)[:, None] / np.float32(scale) - (levels - zero))
    return ((levels[distance.argmin(axis=1)] - zero) * scale).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 3.0), (-2.5, 0.0)])
def test_the_formula(bits: int, symmetric: bool, low: float, high: float) -> None:
    found = LearntRange(low, high, Grid(bits, symmetric))(VALUES).detach().numpy()
    assert len(np.unique(found)) <= 2**bits
    np.testing.assert_allclose(found, by_hand(VALUES.numpy(), low, high, bits, symmetric), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "symmetric"), [("uint8", False), ("int8", True)])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (-31.75, 32.0)], ids=["", "ties: scale 1/4"])
def test_onnx_runtime_quantizes_alike(kind: str, symmetric: bool, low: float, high: float) -> None:
    grid = Grid(8, symmetric)
    scale, zero = scale_and_zero(torch.tensor(low), torch.tensor(high), grid)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [
            numpy_helper.from_array(scale.numpy(), "scale"),
            numpy_helper.from_array(zero.numpy().astype(kind), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = np.asarray(session.run(None, {"x": VALUES.numpy()})[0])
    found = fake_quantize(VALUES, scale, zero, grid.smallest, grid.largest).numpy()
    np.testing.assert_array_equal(found, wanted)


def test_torch_quantizes_weights_alike() -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        scale = weight_limit(weight, axis).flatten() / 127
        wanted = torch.fake_quantize_per_channel_affine(
            weight, scale, torch.zeros(len(scale), dtype=torch.int32), axis, -127, 127
        )
        torch.testing.assert_close(fake_quantize_weight(weight, axis, 127), wanted)
    assert len(fake_quantize_weight(weight, 0, 7)[0].unique()) <= 15
    assert float(fake_quantize_weight(weight, None, 7).abs().max()) == pytest.approx(float(weight.abs().max()))


def test_a_channel_of_zeros_stays_zero_and_finite() -> None:
    weight = torch.zeros(2, 3, requires_grad=True)
    found = fake_quantize_weight(weight, 0, 127)
    found.sum().backward()
    assert found.tolist() == [[0.0] * 3] * 2
    assert weight.grad is not None
    assert bool(torch.isfinite(weight.grad).all())
    dead = LearntRange(0.0, 0.0, Grid())
    assert dead(torch.zeros(3)).tolist() == [0.0] * 3
    assert dead.range() == (0.0, 0.0)


def test_the_gradient_passes_straight_through_inside_and_stops_outside() -> None:
    quantizer = LearntRange(-1.0, 1.0, Grid(4))
    x = torch.tensor([-2.0, -0.33, 0.0, 0.71, 5.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_the_gradient_of_the_scale_is_that_of_lsq() -> None:
    """Esser et al. 2020, Eq. 3: −x/s + round(x/s) inside, the level itself outside."""
    x = torch.tensor([-30.0, -1.3, 0.24, 2.6, 30.0])
    scale = torch.tensor(0.5, requires_grad=True)
    wanted = torch.tensor([-8.0, *(torch.round(x[1:4] / 0.5) - x[1:4] / 0.5).tolist(), 7.0])
    for index in range(len(x)):
        scale.grad = None
        fake_quantize(x[index], scale, torch.zeros(()), -8, 7).backward()
        assert scale.grad is not None
        assert float(scale.grad) == pytest.approx(float(wanted[index]), abs=1e-5)


def test_a_range_grows_where_clipping_costs_most() -> None:
    """Least squares on values that a range of half their size clips."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    quantizer = LearntRange(-0.5, 0.5, Grid(4))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    errors = []
    for _ in range(150):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.1 * errors[0]
    low, high = quantizer.range()
    assert -3.2 < low < -1.5
    assert 1.5 < high < 3.2


@pytest.mark.parametrize(("low", "high"), [(-0.37, 1.91), (0.0, 6.1), (-2.0, 0.0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_quantizer_that_is_given_the_range_finds_the_same_grid(low: float, high: float, symmetric: bool) -> None:
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    quantizer = LearntRange(low, high, Grid(8, symmetric))
    with torch.no_grad():
        quantizer.growth += torch.tensor([0.21, -0.13])
    scale, zero = scale_and_zero(*(quantizer.ends * quantizer.growth.exp()).detach(), quantizer.grid)
    ends = [np.array(end, np.float32) for end in quantizer.range()]
    levels = [np.array(end, np.int8 if symmetric else np.uint8) for end in ((-127, 127) if symmetric else (0, 255))]
    found_zero, found_scale = compute_scale_zp(*ends, *levels, symmetric=symmetric)
    assert float(found_scale) == pytest.approx(float(scale), rel=1e-6)
    assert int(found_zero) == int(zero)


def test_least_error_limits_clip_outliers_and_beat_the_largest_value() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 12.0
    limit = least_error_limit(weight, 0, 7)
    assert limit.shape == (4, 1)
    assert float(limit[0, 0]) < 12
    largest, best = ((fake_quantize_weight(weight, 0, 7, chosen) - weight).square().sum(1) for chosen in (None, limit))
    assert bool((best <= largest + 1e-6).all())
    assert float(best[0]) < float(largest[0])
    whole = least_error_limit(weight, None, 7)
    assert whole.ndim == 0


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_grids_that_do_not_exist_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match="2 to 8 bits"):
        Grid(bits)
