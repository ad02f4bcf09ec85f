"""Crop and flip against a plain loop, and their gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nayer_edge.config import Augment
from nayer_edge.training.augment import _Translate, crop_and_flip, mixup


def plain(images: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, flips: torch.Tensor, pad: int) -> torch.Tensor:
    """Pad, crop and mirror, image by image."""
    height, width = images.shape[2:]
    padded = F.pad(images, (pad, pad, pad, pad))
    made = []
    for index in range(len(images)):
        top, left = int(dy[index]) + pad, int(dx[index]) + pad
        crop = padded[index, :, top : top + height, left : left + width]
        made.append(crop.flip(-1) if flips[index] else crop)
    return torch.stack(made)


@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("shape", [(9, 3, 8, 8), (9, 1, 5, 11)])
def test_translation_and_gradient(pad: int, shape: tuple[int, int, int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=random, dtype=torch.float64, requires_grad=True)
    dy = torch.randint(-pad, pad + 1, (shape[0],), generator=random)
    dx = torch.randint(-pad, pad + 1, (shape[0],), generator=random)
    flips = torch.arange(shape[0]) % 2 == 0
    ours = _Translate.apply(images, dy, dx, flips, pad)
    wanted = plain(images, dy, dx, flips, pad)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
    weight = torch.rand(shape, generator=random, dtype=torch.float64)
    (mine,) = torch.autograd.grad((ours * weight).sum(), images, retain_graph=True)
    (theirs,) = torch.autograd.grad((wanted * weight).sum(), images)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_every_image_has_its_own_draw_and_half_are_mirrored() -> None:
    images = torch.arange(6 * 6, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(4000, -1, -1, -1).contiguous()
    made = crop_and_flip(images, Augment(pad=2, flip=True), torch.Generator().manual_seed(0))
    assert made.dtype == torch.uint8
    different = {bytes(image.contiguous().numpy().tobytes()) for image in made}
    assert len(different) == 5 * 5 * 2
    # In an image that was not mirrored, the pixel right of the centre is larger by one.
    centre = made[:, 0, 3, 3].int()
    inside = (centre > 0) & (made[:, 0, 3, 2] > 0)
    mirrored = (made[:, 0, 3, 2].int() - centre)[inside] == 1
    assert 0.46 < float(mirrored.float().mean()) < 0.54


def test_without_flip_nothing_is_mirrored_and_without_both_nothing_changes() -> None:
    images = torch.rand(50, 1, 6, 6)
    assert crop_and_flip(images, Augment(pad=0, flip=False), torch.Generator()) is images
    ramp = torch.arange(1.0, 7).expand(200, 1, 6, 6).contiguous()
    made = crop_and_flip(ramp, Augment(pad=1, flip=False), torch.Generator().manual_seed(0))
    inner = made[:, 0, 2:4]
    assert bool((inner[:, :, 3] > inner[:, :, 2]).all())


def test_equal_streams_give_equal_crops() -> None:
    images = torch.rand(20, 3, 8, 8)
    first, second, third = (
        crop_and_flip(images, Augment(pad=2), torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_of_a_batch_is_mixed(share: float) -> None:
    """Every image is a unit vector, so a mixture shows its two images and their weights."""
    images = torch.eye(400).reshape(400, 1, 20, 20)
    made = mixup(images, share, torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(made.sum(1), torch.ones(400))
    own, others = made.diag(), (made - made.diag().diag())
    assert int((others > 0).sum(1).max()) <= 1, "at most two images in a mixture"
    mixed = own < 1
    assert abs(float(mixed.float().mean()) - share) < 0.08
    assert torch.equal(made[~mixed], torch.eye(400)[~mixed])
    if share:
        # U(0, 1): its mean and its standard deviation.
        assert abs(float(own[mixed].mean()) - 0.5) < 0.07
        assert abs(float(own[mixed].std()) - 12**-0.5) < 0.05
