"""Mean and variance per channel, the quantities that L_bn compares, in one pass over the activation.

`torch.var_mean` over a channels-last activation takes twenty times as long on a CPU as the kernel that BatchNorm
itself uses, and its autograd formula makes several passes more; docs/LOG.md has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def channel_statistics(x: Float[Tensor, "B C *HW"]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and biased variance over everything but the channel, float32 whatever the input; differentiable."""
    return _ChannelStatistics.apply(x)  # pyright: ignore[reportReturnType]


class _ChannelStatistics(torch.autograd.Function):
    """d mean/dx = 1/N and d variance/dx = 2 (x − mean)/N: the gradient is one affine map per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type == "cpu":
            unused = torch.zeros(x.shape[1])
            mean, variance = torch.ops.aten.batch_norm_update_stats(x, unused, unused, 0.0)
        else:
            axes = [0, *range(2, x.ndim)]
            variance, mean = torch.var_mean(x.float(), dim=axes, correction=0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        mean_gradient, variance_gradient = gradients
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        scale = variance_gradient * (2 / count)
        shift = mean_gradient / count - scale * mean
        # An evaluated BatchNorm is that map in one kernel, with float32 factors whatever the activation's type.
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        return F.batch_norm(x, zero, one, scale, shift, eps=0.0)
