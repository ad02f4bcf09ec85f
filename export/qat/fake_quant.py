"""Fake quantization: rounds floats to the grid of an integer type, differentiably.

The formula is that of ONNX's QuantizeLinear and DequantizeLinear,

    level = clip(round(x / scale) + zero, smallest, largest),   value = (level − zero) · scale,

halves rounded to even. Rounding uses the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432). Everything
else has its exact gradient, which for the scale is that of LSQ (Esser et al., ICLR 2020, Eq. 3) and for the zero point
that of LSQ+ (Bhalgat et al. 2020, Eq. 4). torch's FakeQuantize modules are not used: whether they observe depends on
the values of buffers, which torch.export cannot trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nayer_edge.errors import UsageError


@dataclass(frozen=True)
class Grid:
    """The levels of an activation's integer type.

    Attributes:
        bits: 2 to 8.
        symmetric: levels −2^(b−1) … 2^(b−1)−1 with a zero point of 0; otherwise 2^b levels between the ends of a range.
            UINT8 and INT8 with a zero point are the same grid, shifted.

    Raises:
        UsageError: another number of bits.
    """

    bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"Fake quantization to {self.bits} bits is not supported.", fix="Use 2 to 8 bits.")

    @property
    def smallest(self) -> int:
        """Lowest level."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def largest(self) -> int:
        """Highest level."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


class _Round(torch.autograd.Function):
    """round(x), halves to even, with a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


def round_straight_through(x: Tensor) -> Tensor:
    """round(x), halves to even; its gradient is that of x."""
    return _Round.apply(x)  # pyright: ignore[reportReturnType]


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, smallest: int, largest: int) -> Tensor:
    """x rounded to the grid; differentiable in x, scale and zero.

    Args:
        x: any shape.
        scale: step of the grid, > 0; a scalar, or a shape that broadcasts to x's.
        zero: the level of 0.0, an integer in a float tensor of scale's shape.
        smallest: lowest level.
        largest: highest level.
    """
    level = (round_straight_through(x / scale) + zero).clamp(smallest, largest)
    return (level - zero) * scale


def scale_and_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, as ONNX Runtime's quantizer computes them; differentiable.

    Args:
        low: lowest value to represent, ≤ 0.
        high: highest value, ≥ 0. If both are 0, the scale is 1.
        grid: levels.
    """
    if grid.symmetric:
        scale = torch.maximum(-low, high) / grid.largest
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (grid.largest - grid.smallest)
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = round_straight_through(grid.smallest - low / safe).clamp(grid.smallest, grid.largest)
    return torch.where(scale > 0, scale, torch.ones_like(scale)), zero


class LearntRange(nn.Module):
    """Fake quantization of an activation with a learnt range.

    Each end is its calibrated value times exp(growth), so an optimiser step changes ranges of any size by the same
    factor. No end changes its sign, and an end at 0, as after a ReLU, stays there. (Learning thresholds in the
    logarithmic domain follows TQT, Jain et al., MLSys 2020.)

    Args:
        low: lowest calibrated value.
        high: highest calibrated value.
        grid: levels.
    """

    ends: Tensor

    def __init__(self, low: float, high: float, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("ends", torch.tensor([min(low, 0.0), max(high, 0.0)]))
        self.growth = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        """x rounded to the grid."""
        low, high = self.ends * self.growth.exp()
        scale, zero = scale_and_zero(low, high, self.grid)
        return fake_quantize(x, scale, zero, self.grid.smallest, self.grid.largest)

    @torch.no_grad()
    def range(self) -> tuple[float, float]:
        """(lowest, highest) value of the grid. A quantizer computes the same scale and zero point from them."""
        low, high = self.ends * self.growth.exp()
        scale, zero = scale_and_zero(low, high, self.grid)
        if not bool(self.ends.any()):
            return 0.0, 0.0
        if self.grid.symmetric:
            return float(-scale * self.grid.largest), float(scale * self.grid.largest)
        return float((self.grid.smallest - zero) * scale), float((self.grid.largest - zero) * scale)


def weight_limit(weight: Tensor, axis: int | None) -> Tensor:
    """Largest absolute value of each slice along `axis` (without one, of the tensor), in a shape that broadcasts."""
    if axis is None:
        return weight.detach().abs().amax()
    others = [a for a in range(weight.ndim) if a != axis % weight.ndim]
    return weight.detach().abs().amax(dim=others, keepdim=True)


def fake_quantize_weight(weight: Tensor, axis: int | None, largest: int, limit: Tensor | None = None) -> Tensor:
    """A weight rounded to a symmetric grid of levels −largest … largest, with one scale per slice along `axis`.

    Args:
        weight: any shape.
        axis: of the output channels; None for a single scale.
        largest: highest level: 127 at 8 bits, or the target's (targets.py), 7 at 4 bits.
        limit: value of the highest level, if it is learnt; by default the largest absolute value of each slice, as in
            ONNX Runtime's quantizer.
    """
    limit = weight_limit(weight, axis) if limit is None else limit
    scale = torch.where(limit > 0, limit, torch.full_like(limit, float(largest))) / largest
    return fake_quantize(weight, scale, torch.zeros_like(scale), -largest, largest)


@torch.no_grad()
def least_error_limit(weight: Tensor, axis: int | None, largest: int) -> Tensor:
    """The limit of each slice with the lowest squared error, from its largest absolute value down to a third of it."""
    whole = weight_limit(weight, axis)
    best, least = whole, torch.full_like(whole, float("inf"))
    others = [a for a in range(weight.ndim) if axis is None or a != axis % weight.ndim]
    for factor in torch.linspace(1.0, 1 / 3, 67).tolist():
        error = (fake_quantize_weight(weight, axis, largest, whole * factor) - weight).square()
        error = error.sum(dim=others, keepdim=axis is not None)
        best, least = torch.where(error < least, whole * factor, best), torch.minimum(error, least)
    return best
