"""Numbers that lie: a generator that makes one class, a bank of copies, a student that says the same of everything.

Each of them runs on with finite losses for hours. The signs are read once per epoch, from images and logits that are
there anyway, and judged from the epochs' history, so that a continued run judges as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nayer_edge.errors import TrainingError
from nayer_edge.evaluate import logits_of
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute

SAMPLE = 256
"""newest images that are looked at: a fraction of one synthesis step's work"""
NOTICE_AFTER = 5
"""epochs in a row; every g_life epochs the generator is created anew, and its first images may well be poor"""
STOP_AFTER = 20
"""epochs, all there were: by then every recipe has re-created its generator, or will not"""
DEAD_AFTER = 3
"""student epochs in a row: units whose inputs are all negative get no gradient, so the student stays dead"""
CONSTANT = 1e-6
"""largest difference of logits that is one answer; students that were trained at all differ by a million times that"""
COPIES = 0.5
"""fraction of distinct images below which a bank is called one of copies; healthy generators make none"""


class Signs(Protocol):
    """What an epoch's metrics say of its health."""

    phase: str
    synthetic_classes: int
    distinct: float
    student_spread: float | None


def look_at_images(
    teacher: Classifier, images: UInt8[Tensor, "N C H W"], compute: Compute
) -> tuple[Float[Tensor, " K"], Float[Tensor, ""]]:
    """How often the teacher sees each class in the newest images (fractions), and how many of them are no copies of
    another (a fraction); both stay on the device."""
    newest = images[-SAMPLE:]
    seen = logits_of(teacher, newest, compute).argmax(dim=1)
    shares = torch.bincount(seen, minlength=len(teacher.classes)).float() / len(newest)
    distinct = torch.unique(newest.flatten(1), dim=0).shape[0]
    return shares, torch.tensor(distinct / len(newest), device=shares.device)


def spread(logits: Float[Tensor, "N K"]) -> Float[Tensor, ""]:
    """Largest difference between the logits of two images; 0 for a network that says the same of every image."""
    return (logits - logits[:1]).abs().max()


def judge(history: Sequence[Signs], finished: bool) -> str | None:
    """What is to be said after an epoch, once, where something begins to look wrong.

    Args:
        history: all epochs so far.
        finished: there are no more to come.

    Raises:
        TrainingError: the run is certainly worthless.
    """
    trained = [epoch for epoch in history if epoch.student_spread is not None]
    dead = _in_a_row(trained, lambda epoch: epoch.student_spread is not None and epoch.student_spread < CONSTANT)
    if dead >= DEAD_AFTER or (finished and dead):
        raise TrainingError(
            f"The student is dead: for {_epochs(dead)} it has given every synthetic image the same answer.",
            why="Its units get no gradient any more, so it would stay so.",
            fix="Lower distill.lr, or choose another student.",
        )
    one_class = _in_a_row(history, lambda epoch: epoch.synthetic_classes == 1)
    copies = _in_a_row(history, lambda epoch: epoch.distinct < COPIES)
    for count, what, fix in (
        (
            one_class,
            "the teacher sees one and the same class in every synthetic image: the generator has collapsed",
            "Raise synthesis.lambda_ce or synthesis.g_steps, or lower synthesis.lr; and check that the class names "
            "are in the order of the teacher's outputs.",
        ),
        (
            copies,
            "most synthetic images are copies of each other: the memory bank holds duplicates",
            "Raise generator.noisy_dim or synthesis.g_steps, or lower synthesis.lr; and look at the label embeddings: "
            "nayer-edge lte show RECIPE.",
        ),
    ):
        if count >= STOP_AFTER and count == len(history):
            raise TrainingError(f"For {_epochs(count)}, all there were, {what}.", "No student can learn from it.", fix)
        if count == NOTICE_AFTER:
            return f"For {_epochs(count)} {what}. {fix}"
    return None


def _in_a_row(history: Sequence[Signs], holds: Callable[[Signs], bool]) -> int:
    """How many of the last epochs it holds for without a break."""
    count = 0
    for epoch in reversed(history):
        if not holds(epoch):
            break
        count += 1
    return count


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' if count > 1 else ''}"
