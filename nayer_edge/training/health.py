"""Detects silent training failures: a collapsed generator, a bank of duplicates, a student with constant output.

The losses stay finite in all three cases. The checks run once per epoch on images and logits that exist anyway. They
depend only on the history of epochs, so that a resumed run behaves like an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nayer_edge.errors import TrainingError
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.training.evaluate import logits_of

SAMPLE = 256
"""number of newest images to inspect, with few classes; costs a fraction of one synthesis step"""
NOTICE_AFTER = 5
"""consecutive bad epochs before a warning; a generator re-initialised after g_life epochs may start with poor images"""
STOP_AFTER = 20
"""stop after this many epochs if all were bad; by then every recipe has re-initialised its generator at least once, or
never will"""
DEAD_AFTER = 3
"""consecutive epochs with constant output after which the student is dead: units with only negative inputs get no
gradient, so it cannot recover"""
CONSTANT = 1e-6
"""logit spread up to which the output is constant; students that have learned anything are a million times above it"""
COPIES = 0.5
"""fraction of distinct images below which a warning is due; healthy generators produce no duplicates"""

ALIKE = 0.25
"""variety below which a warning is due: 0.54 for real digits, 0.89 for NAYER's and 0.85 for procedural images of them;
0.01 to 0.13 for one image per class with noise of 2 to 20 of 255 grey levels (docs/LOG.md)"""
PIXELS_AT_ONCE = 4096
"""of every image, whose variance is computed at a time"""
LEAST_PAIRS = 32
"""images beyond the first of their class that a variety needs"""


class EpochMetrics(Protocol):
    """The metrics of an epoch that `check_health` reads."""

    phase: str
    synthetic_classes: int
    distinct: float
    variety: float | None
    student_spread: float | None


def sample_size(classes: int) -> int:
    """Number of newest images to inspect. Some must share a class, or there is no variety to measure."""
    return max(SAMPLE, classes + LEAST_PAIRS)


def inspect_images(
    teacher: Classifier, images: UInt8[Tensor, "N C H W"], compute: Compute
) -> tuple[Float[Tensor, " K"], Float[Tensor, ""], Float[Tensor, ""]]:
    """Inspects the newest images.

    Returns:
        The fraction that the teacher assigns to each class, the fraction of distinct images, and `variety`, all on the
        device.
    """
    newest = images[-sample_size(len(teacher.classes)) :]
    seen = logits_of(teacher, newest, compute).argmax(dim=1)
    shares = torch.bincount(seen, minlength=len(teacher.classes)).float() / len(newest)
    distinct = torch.unique(newest.flatten(1), dim=0).shape[0]
    return shares, torch.tensor(distinct / len(newest), device=shares.device), variety(newest, seen)


def variety(images: UInt8[Tensor, "N C H W"], classes: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Share of the pixels' variance that lies within classes: 0 if all images of a class are alike, near 1 if an
    image's class says nothing of its pixels. NaN if hardly any two images share a class.

    Agreement on synthetic images does not see a loss of variety: student and teacher agree on the few images there are.
    """
    counts = classes.bincount()
    freedom = len(images) - (counts > 0).sum()
    within = whole = torch.zeros((), device=images.device)
    # In parts: a thousand large images in float32 take gigabytes.
    for part in images.flatten(1).split(PIXELS_AT_ONCE, dim=1):
        pixels = part.float()
        sums = torch.zeros(len(counts), pixels.shape[1], device=pixels.device).index_add_(0, classes, pixels)
        centres = sums / counts.clamp_min(1)[:, None]
        within = within + (pixels - centres[classes]).square().sum()
        whole = whole + pixels.var(dim=0).sum()
    return torch.where(freedom >= LEAST_PAIRS, within / freedom / whole.clamp_min(1e-6), torch.nan)


def logit_spread(logits: Float[Tensor, "N K"]) -> Float[Tensor, ""]:
    """Largest difference between any image's logits and the first image's; 0 for a constant output."""
    return (logits - logits[:1]).abs().max()


def check_health(history: Sequence[EpochMetrics], finished: bool, generated: bool = True) -> str | None:
    """Checks the run after an epoch; returns a warning when a problem first becomes persistent, else None.

    Args:
        history: all epochs so far.
        finished: whether this was the last epoch.
        generated: whether a generator makes the images.

    Raises:
        TrainingError: training has failed for certain.
    """
    trained = [epoch for epoch in history if epoch.student_spread is not None]
    dead = _consecutive(trained, lambda epoch: epoch.student_spread is not None and epoch.student_spread < CONSTANT)
    if dead >= DEAD_AFTER or (finished and dead):
        raise TrainingError(
            f"The student is dead: for {_epochs(dead)} its output has been the same for every synthetic image.",
            why="Its units no longer get gradients, so it cannot recover.",
            fix="Lower distill.lr, or choose another student.",
        )
    one_class = _consecutive(history, lambda epoch: epoch.synthetic_classes == 1)
    copies = _consecutive(history, lambda epoch: epoch.distinct < COPIES)
    alike = _consecutive(history, lambda epoch: epoch.variety is not None and epoch.variety < ALIKE)
    for count, what, fix in (
        (
            one_class,
            "the teacher has predicted one and the same class for every synthetic image"
            + (": the generator has collapsed" if generated else ""),
            "Raise synthesis.lambda_ce or synthesis.g_steps, or lower synthesis.lr. Check that the class names "
            "are in the order of the teacher's outputs."
            if generated
            else "Check the teacher's input specification (mean, std), and raise synthesis.batch.",
        ),
        (
            copies,
            "most synthetic images have been copies of each other: the memory bank is full of duplicates",
            "Raise generator.noisy_dim or synthesis.g_steps, or lower synthesis.lr. Inspect the label embeddings with "
            "nayer-edge lte show RECIPE."
            if generated
            else "Lower synthesis.g_steps or synthesis.pixel_step.",
        ),
    ):
        if count >= STOP_AFTER and count == len(history):
            raise TrainingError(f"For all {_epochs(count)} {what}.", "No student can learn from such images.", fix)
        if count == NOTICE_AFTER:
            return f"For {_epochs(count)} {what}. {fix}"
    if alike == NOTICE_AFTER:
        return (
            f"For {_epochs(alike)} the synthetic images of a class have been nearly alike. The student may agree with "
            "the teacher on all of them and on few real ones. Lower synthesis.lambda_ce or synthesis.g_steps"
            + (", or raise generator.noisy_dim." if generated else ".")
        )
    return None


def _consecutive(history: Sequence[EpochMetrics], holds: Callable[[EpochMetrics], bool]) -> int:
    """The number of consecutive epochs, up to the last one, for which `holds` is true."""
    count = 0
    for epoch in reversed(history):
        if not holds(epoch):
            break
        count += 1
    return count


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' if count > 1 else ''}"
