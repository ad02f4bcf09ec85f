"""Random crop, flip and mixup on the device, with separate random parameters for each image of the batch.

A zero-padded crop is a translation with zero fill, and its gradient is the opposite translation. Forward and backward
are therefore one gather each; autograd's backward of an indexing operation would be a scatter.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from nayer_edge.config import Augment
from nayer_edge.runtime.distributed import SINGLE, World


def crop_and_flip(
    images: Num[Tensor, "B C H W"], augment: Augment, random: torch.Generator, world: World = SINGLE
) -> Num[Tensor, "B C H W"]:
    """Zero-pads, crops at a random position and flips with probability 1/2; differentiable.

    Args:
        images: of any numeric dtype; the result keeps it and is channels-last.
        augment: padding in pixels, and whether to flip.
        random: generator on the images' device.
        world: ranks that share the batch; parameters are drawn for the whole batch, and each rank uses its share.
    """
    if augment.pad == 0 and not augment.flip:
        return images
    count, device = images.shape[0] * world.size, images.device
    shifts = torch.randint(-augment.pad, augment.pad + 1, (2, count), generator=random, device=device, dtype=torch.long)
    flips = torch.randint(0, 2, (count,), generator=random, device=device, dtype=torch.long).bool()
    shifts, flips = world.share(shifts, dim=1), world.share(flips)
    if not augment.flip:
        flips = torch.zeros_like(flips)
    return translate(images, shifts[0], shifts[1], flips, augment.pad)


def mixup(images: Float[Tensor, "B C H W"], share: float, random: torch.Generator) -> Float[Tensor, "B C H W"]:
    """Mixes a fraction of the images with others of the batch: w x + (1 − w) x', w ~ U(0, 1).

    Mixup (Zhang et al., ICLR 2018, https://arxiv.org/abs/1710.09412, α = 1). Targets are not mixed: the teacher labels
    the mixed image, as in Beyer et al., CVPR 2022 (https://arxiv.org/abs/2106.05237).

    Args:
        share: expected fraction of images to mix, from 0 to 1.
        random: generator on the images' device.
    """
    count, device = images.shape[0], images.device
    chosen, weights = torch.rand(2, count, generator=random, device=device).unbind()
    others = torch.randperm(count, generator=random, device=device)
    return blend(images, images[others], torch.where(chosen < share, weights, 1.0))


def blend(
    images: Float[Tensor, "B C H W"], others: Float[Tensor, "B C H W"], weights: Float[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """w x + (1 − w) x' for each pair."""
    return torch.lerp(others, images, weights[:, None, None, None])


def translate(
    images: Num[Tensor, "B C H W"],
    dy: Int[Tensor, " B"],
    dx: Int[Tensor, " B"],
    flips: Bool[Tensor, " B"],
    pad: int,
) -> Num[Tensor, "B C H W"]:
    """Crops each zero-padded image at row `pad` + dy, column `pad` + dx, and mirrors it where `flips` is true."""
    return _Translate.apply(images, dy, dx, flips, pad)  # pyright: ignore[reportReturnType]


def _gather(images: Tensor, rows: Tensor, columns: Tensor, pad: int) -> Tensor:
    """images[b, :, rows[b, y], columns[b, x]] with zeros outside; indices exceed the image by at most `pad`."""
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    batch = torch.arange(images.shape[0], device=images.device)[:, None, None]
    return padded[batch, rows[:, :, None] + pad, columns[:, None, :] + pad].permute(0, 3, 1, 2)


class _Translate(torch.autograd.Function):
    """out[y, x] = in[y + dy, X + dx], where X = x, or W − 1 − x if mirrored."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Num[Tensor, "B C H W"],
        dy: Int[Tensor, " B"],
        dx: Int[Tensor, " B"],
        flips: Bool[Tensor, " B"],
        pad: int,
    ) -> Num[Tensor, "B C H W"]:
        ctx.save_for_backward(dy, dx, flips)
        ctx.pad = pad
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device) + dy[:, None]
        x = torch.arange(width, device=images.device)
        columns = torch.where(flips[:, None], width - 1 - x, x) + dx[:, None]
        return _gather(images, rows, columns, pad)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        dy, dx, flips = ctx.saved_tensors
        height, width = gradient.shape[2:]
        rows = torch.arange(height, device=gradient.device) - dy[:, None]
        x = torch.arange(width, device=gradient.device) - dx[:, None]
        columns = torch.where(flips[:, None], width - 1 - x, x)
        return _gather(gradient, rows, columns, ctx.pad), None, None, None, None
