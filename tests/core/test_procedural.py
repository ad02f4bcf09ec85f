"""Procedural images and steps on their pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nayer_edge import losses, procedural
from nayer_edge.config import Augment, Synthesis
from nayer_edge.distillation import Distillation
from nayer_edge.memory_bank import to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.synthesis import Round

Start = Callable[..., Distillation]
Stream = Callable[[int], torch.Generator]
SHAPES = ((1, 16, 16), (3, 12, 20), (13, 9, 7), (1, 4, 4))
MOVED = {"g_steps": 3, "lambda_ce": 0.5, "lambda_adv": 1.33}
PROCEDURAL = {"synthesis_prior": "procedural", **{f"synthesis_{key}": value for key, value in MOVED.items()}}
STILL = {"synthesis_lambda_adv": 0, "synthesis_lambda_ce": 0}


# ------------------------------------------------------------------ the families


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", procedural.FAMILIES)
def test_every_family_makes_different_images_of_any_shape(
    family: str, shape: tuple[int, int, int], stream: Stream
) -> None:
    make = procedural.FAMILIES[family]
    images = make(8, shape, stream(0))
    assert images.shape == (8, *shape)
    assert images.dtype == torch.float32
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert torch.equal(images, make(8, shape, stream(0)))
    assert not torch.equal(images, make(8, shape, stream(1)))
    assert len(images.flatten(1).unique(dim=0)) == 8, "two images are alike"


def test_noise_is_coarse(stream: Stream) -> None:
    """White noise has equal power at all frequencies; 1/f^a has far more at the lower ones."""
    power = torch.fft.rfft2(procedural.spectrum_noise(200, (1, 32, 32), stream(0))).abs().square().mean((0, 1))
    assert float(power[2, 0]) > 5 * float(power[16, 0])
    assert float(power[0, 2]) > 5 * float(power[0, 16])


def test_noise_on_both_axes_of_a_rectangle_has_one_scale(stream: Stream) -> None:
    """Frequencies are in cycles per pixel, so an oblong image is not stretched."""
    images = procedural.spectrum_noise(400, (1, 16, 48), stream(0))
    down = (images[:, :, 1:] - images[:, :, :-1]).square().mean()
    along = (images[..., 1:] - images[..., :-1]).square().mean()
    assert float(down) == pytest.approx(float(along), rel=0.15)


def test_leaves_are_flat(stream: Stream) -> None:
    images = procedural.dead_leaves(50, (1, 32, 32), stream(0), leaves=5)
    colours = [len(image.unique()) for image in images]
    assert max(colours) <= 6, "one ground and five leaves"
    assert sum(count > 2 for count in colours) > 20


def test_strokes_have_two_colours_and_soft_edges(stream: Stream) -> None:
    """The ground fills most of the image, and the pen is the value that lies furthest from it."""
    images = procedural.strokes(100, (1, 32, 32), stream(0)).flatten(1)
    ground = images.median(dim=1).values
    apart = (images - ground[:, None]).abs()
    drawn = apart.amax(1) > 0.2
    assert float(drawn.float().mean()) > 0.6
    inked = (apart > 0.5 * apart.amax(1, keepdim=True)).float().mean(1)[drawn]
    assert 0.02 < float(inked.mean()) < 0.4


def test_networks_are_smooth_in_the_plane(stream: Stream) -> None:
    images = procedural.coordinate_networks(100, (1, 32, 32), stream(0))
    near = (images[..., 1:] - images[..., :-1]).square().mean()
    far = (images[..., 16:] - images[..., :-16]).square().mean()
    assert float(near) < 0.5 * float(far)


def test_canvases_take_all_families_and_are_drawn_in_portions(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def constant(name: str, value: float) -> Callable[..., Tensor]:
        def make(count: int, shape: tuple[int, int, int], _random: torch.Generator) -> Tensor:
            asked.append((name, count))
            return torch.full((count, *shape), value)

        return make

    monkeypatch.setattr(procedural, "FAMILIES", {"a": constant("a", 0.0), "b": constant("b", 1.0)})
    monkeypatch.setattr(procedural, "PIXELS", 3 * 16)
    images = procedural.canvases(1000, (1, 4, 4), stream(0), ("a", "b"))
    assert max(count for _, count in asked) == 3
    assert {name: sum(count for n, count in asked if n == name) for name in "ab"} == {"a": 500, "b": 500}
    values = images[:, 0, 0, 0]
    # A mixture of two images is grey if they are of different families: in half of the cases.
    grey = float(((values > 0) & (values < 1)).float().mean())
    assert grey == pytest.approx(procedural.MIXED / 2, abs=0.04)


@pytest.mark.parametrize(
    ("classes", "count", "wanted"),
    [([0, 0, 0, 1, 2, 2], 4, [2, 1, 1]), ([0, 0, 0, 1, 2, 2], 6, [3, 1, 2]), ([2, 2, 2], 2, [0, 0, 2])],
)
def test_classes_take_turns(classes: list[int], count: int, wanted: list[int]) -> None:
    places = procedural.balanced(torch.tensor(classes), count)
    assert len(set(places.tolist())) == count, "an image was taken twice"
    assert torch.tensor(classes)[places].bincount(minlength=3).tolist() == wanted


# ------------------------------------------------------------------ rounds


def made(
    plain: Classifier, student: Classifier | None, compute: Compute, random: torch.Generator, **keys: float
) -> Round:
    config = Synthesis.model_validate({**MOVED, "prior": "procedural", "batch": 30, **keys})
    return procedural.procedural_round(plain, student and student.eval(), config, compute, random)


def test_a_round_is_labelled_by_the_teacher(
    plain: Classifier, student: Classifier, compute: Compute, stream: Stream
) -> None:
    found = made(plain, student, compute, stream(0))
    assert found.images.shape == (30, 2, 8, 8)
    assert torch.equal(found.labels, plain(to_unit(found.images)).argmax(1))
    loss_bn, loss_ce, loss_adv = found.losses.tolist()
    assert math.isnan(loss_bn)
    assert loss_ce == pytest.approx(float(losses.class_loss(plain(to_unit(found.images)), found.labels)), rel=1e-4)
    assert loss_adv < 0


def test_a_round_is_balanced_as_far_as_its_canvases_allow(plain: Classifier, compute: Compute, stream: Stream) -> None:
    supply = procedural.canvases(procedural.SUPPLY * 30, plain.spec.shape, stream(0))
    there = plain(supply).argmax(1).bincount(minlength=3)
    assert int(there.min()) < 10 or int(there.max()) > 20, "the supply is balanced already: this test proves nothing"
    counts = made(plain, None, compute, stream(0), lambda_ce=0).labels.bincount(minlength=3)
    # Rounding to bytes may carry an image at the border into another class.
    assert int(counts.min()) >= min(10, int(there.min())) - 1


def test_pixels_move_by_the_losses_that_have_a_weight(
    plain: Classifier, student: Classifier, compute: Compute, stream: Stream
) -> None:
    """Without a student, as in warm-up and for calibration, all but L_adv."""
    still = made(plain, None, compute, stream(0), lambda_ce=0)
    assert torch.equal(still.images, made(plain, student, compute, stream(0), lambda_adv=0, lambda_ce=0).images)
    assert float(still.losses[2]) == 0
    moved = made(plain, student, compute, stream(0))
    assert not torch.equal(still.images, moved.images)
    alone = made(plain, None, compute, stream(0))
    assert not torch.equal(still.images, alone.images)
    assert torch.equal(alone.images, made(plain, student, compute, stream(0), lambda_adv=0).images)


@pytest.mark.parametrize("augment", [Augment(pad=0, flip=False), Augment(pad=1, flip=True)])
def test_a_step_raises_the_divergence(
    plain: Classifier, student: Classifier, compute: Compute, stream: Stream, augment: Augment
) -> None:
    student.eval().requires_grad_(False)
    config = Synthesis(prior="procedural", pixel_step=0.01, lambda_ce=0.0, lambda_adv=1.0, augment=augment)
    # Away from 0 and 1, so that nothing is cut off.
    images = 0.1 + 0.8 * procedural.canvases(16, plain.spec.shape, stream(0))
    moved, _ = procedural.ascend(images, plain(images).argmax(1), plain, student, config, compute, stream(1))

    def divergence(seen: Tensor) -> Tensor:
        teacher, answer = plain(seen).log_softmax(1), student(seen).log_softmax(1)
        return (teacher.exp() * (teacher - answer)).sum(1)

    def augmented(seen: Tensor) -> Tensor:
        return procedural.crop_and_flip(seen, augment, stream(1))

    before, after = divergence(augmented(images)), divergence(augmented(moved))
    assert bool((after > before).all())
    apart = (moved - images).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(apart, torch.full_like(apart, 0.01), rtol=1e-3, atol=0)


def test_the_class_term_holds_an_image_in_its_class(
    plain: Classifier, student: Classifier, compute: Compute, stream: Stream
) -> None:
    config = Synthesis(
        prior="procedural", pixel_step=0.01, lambda_ce=1.0, lambda_adv=0.0, augment=Augment(pad=0, flip=False)
    )
    images = 0.1 + 0.8 * procedural.canvases(16, plain.spec.shape, stream(0))
    labels = plain(images).argmax(1)
    moved, _ = procedural.ascend(images, labels, plain, student.eval(), config, compute, stream(1))
    assert bool((losses.class_loss(plain(moved), labels) < losses.class_loss(plain(images), labels)).all())


def test_large_steps_stay_in_range_and_train_nobody(
    plain: Classifier, student: Classifier, compute: Compute, stream: Stream
) -> None:
    before = [p.clone() for p in (*plain.parameters(), *student.parameters())]
    config = Synthesis(prior="procedural", pixel_step=5.0, lambda_ce=0.5, lambda_adv=1.33, g_steps=30)
    images = procedural.canvases(16, plain.spec.shape, stream(0))
    moved, _ = procedural.ascend(images, plain(images).argmax(1), plain, student.eval(), config, compute, stream(1))
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert all(p.grad is None for p in student.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, (*plain.parameters(), *student.parameters()), strict=True))


def test_drawn_images_depend_on_their_streams_only(plain: Classifier, compute: Compute, stream: Stream) -> None:
    config = Synthesis(prior="procedural", batch=8, lambda_ce=0.5, lambda_adv=1.33, g_steps=30)
    images, labels = procedural.draw_procedural(plain, config, compute, stream, 20)
    assert (images.shape, labels.shape) == ((20, 2, 8, 8), (20,))
    more, _ = procedural.draw_procedural(plain, config, compute, stream, 24)
    assert torch.equal(images, more[:20])
    assert not torch.equal(images[:8], images[8:16])
