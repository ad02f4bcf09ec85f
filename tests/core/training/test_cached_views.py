"""Cached teacher logits per fixed view: they belong to the drawn image and are computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from nayer_edge.config import Augment
from nayer_edge.memory_bank import MemoryBank, to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.training.augment import translate
from nayer_edge.training.cached_views import ViewCache

Stream = Callable[[int], torch.Generator]
SHAPE = (2, 8, 8)


@pytest.fixture
def bank(stream: Stream) -> MemoryBank:
    """Twelve images of random pixels in a bank for sixteen."""
    made = MemoryBank(SHAPE, 16 * 128, torch.device("cpu"))
    made.add(*more(12, stream(0)))
    return made


def more(count: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (count, *SHAPE), generator=random, dtype=torch.uint8)
    return images, torch.arange(count) % 3


@pytest.fixture
def cache(bank: MemoryBank, teacher: Classifier, compute: Compute, stream: Stream) -> Callable[..., ViewCache]:
    return lambda augment, views, mixup=0.0: ViewCache(bank, augment, views, teacher, compute, stream(7), mixup)


@pytest.mark.parametrize("mixup", [0.0, 0.5, 1.0])
def test_logits_are_those_of_the_images_that_come_with_them(
    bank: MemoryBank, cache: Callable[..., ViewCache], teacher: Classifier, stream: Stream, mixup: float
) -> None:
    """Also after the ring buffer has overwritten images with cached logits, alone or in a mixture."""
    views = cache(Augment(pad=1), 4, mixup)
    for seed in range(12):
        images, logits = views.draw(10, stream(seed))
        with torch.no_grad():
            torch.testing.assert_close(logits, teacher(images), rtol=1e-4, atol=1e-5)
        if seed % 2:
            bank.add(*more(3, stream(100 + seed)))
    assert views.asked == 120
    assert views.computed < 120


def test_every_view_goes_through_the_teacher_once(cache: Callable[..., ViewCache], stream: Stream) -> None:
    views = cache(Augment(pad=1), 3)
    for seed in range(60):
        views.draw(20, stream(seed))
    computed = views.computed
    assert computed <= 12 * 3 + 20  # in one batch a view may appear twice
    for seed in range(60, 80):
        views.draw(20, stream(seed))
    assert views.computed == computed


@pytest.mark.parametrize("mixup", [0.3, 1.0])
def test_a_share_of_the_views_is_mixed_with_an_earlier_image(
    teacher: Classifier, compute: Compute, stream: Stream, mixup: float
) -> None:
    """Without crops a view is its image, so every mixture is explained by two images and a weight."""
    bank = MemoryBank(SHAPE, 128 * 200, torch.device("cpu"))
    bank.add(*more(200, stream(0)))
    images = to_unit(bank.images).double().flatten(1)
    views = ViewCache(bank, Augment(pad=0, flip=False), 1, teacher, compute, stream(7), mixup)
    mixed = views.at(torch.arange(200), torch.zeros(200, dtype=torch.long))[0].double().flatten(1)
    again = views.at(torch.arange(200), torch.zeros(200, dtype=torch.long))[0].double().flatten(1)
    assert torch.equal(mixed, again), "a view does not change"
    own = []
    for place in range(1, 200):
        if torch.equal(mixed[place], images[place]):
            continue
        # The best weight for every earlier image, by least squares; one of them has no residual.
        direction = images[place] - images[:place]
        share = ((mixed[place] - images[:place]) * direction).sum(1) / direction.square().sum(1)
        left = (mixed[place] - images[:place] - share[:, None] * direction).abs().amax(1)
        assert (left < 1e-6).sum() == 1, place
        own.append(float(share[left.argmin()]))
    assert abs(len(own) / 199 - mixup) < 0.1
    assert min(own) >= 0
    assert max(own) <= 1
    assert abs(sum(own) / len(own) - 0.5) < 0.12, "the weights are not from U(0, 1)"


@pytest.mark.parametrize(("augment", "total"), [(Augment(pad=1), 18), (Augment(pad=1, flip=False), 9)])
def test_views_are_crops_and_flips_of_the_banks_images(
    bank: MemoryBank, cache: Callable[..., ViewCache], stream: Stream, augment: Augment, total: int
) -> None:
    everything = {}
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            for flip in (False, True) if augment.flip else (False,):
                moved = (torch.full((len(bank),), shift) for shift in (dy, dx))
                images = translate(bank.images, *moved, torch.full((len(bank),), flip), 1)
                for index, image in enumerate(to_unit(images).contiguous()):
                    everything[image.numpy().tobytes()] = index
    assert len(everything) == total * len(bank)
    views = cache(augment, 1000)
    assert views.views == total, "there are not more views than crops and flips"
    few = cache(augment, 2)
    seen: Counter[int] = Counter()
    distinct = set()
    for seed in range(40):
        images, _ = few.draw(20, stream(seed))
        for image in images.contiguous():
            seen[everything[image.numpy().tobytes()]] += 1
            distinct.add(image.numpy().tobytes())
    assert len(seen) == len(bank)
    assert len(distinct) == 2 * len(bank)
    assert {everything[image.numpy().tobytes()] for image in views.draw(200, stream(0))[0].contiguous()} <= set(seen)


def test_a_cache_continues_from_its_tensors(bank: MemoryBank, cache: Callable[..., ViewCache], stream: Stream) -> None:
    one, other = cache(Augment(pad=1), 4), cache(Augment(pad=1), 4)
    for seed in range(5):
        one.draw(10, stream(seed))
    bank.add(*more(6, stream(1)))
    other.restore({name: tensor.clone() for name, tensor in one.tensors().items()})
    for seed in range(5, 10):
        (images, logits), (same_images, same_logits) = one.draw(10, stream(seed)), other.draw(10, stream(seed))
        assert torch.equal(images, same_images)
        assert torch.equal(logits, same_logits)


def test_all_crops_are_equally_frequent_over_the_bank(teacher: Classifier, compute: Compute, stream: Stream) -> None:
    """With one view per image, and as many images as crops, every crop has one image."""
    bank = MemoryBank(SHAPE, 9 * 128, torch.device("cpu"))
    bank.add(*more(9, stream(0)))
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    still = torch.zeros(9, dtype=torch.bool)
    crop_of = {}
    for number, (dy, dx) in enumerate(shifts):
        images = translate(bank.images, torch.full((9,), dy), torch.full((9,), dx), still, 1)
        crop_of |= {image.numpy().tobytes(): number for image in to_unit(images).contiguous()}
    views = ViewCache(bank, Augment(pad=1, flip=False), 1, teacher, compute, stream(7))
    drawn, _ = views.draw(200, stream(1))
    assert {crop_of[image.numpy().tobytes()] for image in drawn.contiguous()} == set(range(9))


def test_only_the_places_of_the_banks_images_are_saved(
    bank: MemoryBank, cache: Callable[..., ViewCache], stream: Stream
) -> None:
    """The cache allocates more, and again after it was restored."""
    one, other = cache(Augment(pad=1), 4), cache(Augment(pad=1), 4)
    one.draw(10, stream(0))
    bank.add(*more(1, stream(1)))
    one.draw(10, stream(2))
    saved = one.tensors()
    assert len(saved["logits"]) == len(saved["known"]) == len(bank) == 13
    other.restore({name: tensor.clone() for name, tensor in saved.items()})
    for seed in range(3, 8):
        bank.add(*more(2, stream(100 + seed)))
        (images, logits), (same_images, same_logits) = one.draw(10, stream(seed)), other.draw(10, stream(seed))
        assert torch.equal(images, same_images)
        assert torch.equal(logits, same_logits)
