"""Compares the outputs that two artifacts gave for the same images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nayer_edge.errors import UsageError


@dataclass(frozen=True)
class Agreement:
    """Agreement of an artifact's predictions with those of a reference.

    Attributes:
        n: number of images.
        top1: fraction of images with the same class; an image with a NaN or infinite logit never agrees.
        mean_kl: mean KL(reference ‖ artifact) of softmax outputs, nats; infinite if a logit is not finite.
        lost: images that the reference classifies correctly and the artifact does not; None without labels.
        gained: the reverse; None without labels.
    """

    n: int
    top1: float
    mean_kl: float
    lost: int | None = None
    gained: int | None = None

    @property
    def drop(self) -> float:
        """Paired drop in accuracy, (lost − gained) / n, as the gate judges it.

        Without labels, every disagreement counts as lost.
        """
        if self.lost is None or self.gained is None:
            return 1 - self.top1
        return (self.lost - self.gained) / self.n

    def as_record(self) -> dict[str, Any]:
        """As JSON, which has no infinity."""
        counts = {} if self.lost is None else {"lost": self.lost, "gained": self.gained}
        return {
            "n": self.n,
            "top1": self.top1,
            "mean_kl": self.mean_kl if np.isfinite(self.mean_kl) else None,
            **counts,
        }


@dataclass(frozen=True)
class Parity:
    """Comparison of two sets of logits on the same inputs.

    Attributes:
        n: number of inputs.
        max_abs_diff: largest absolute difference over finite pairs.
        agreement: fraction of inputs with the same top-1 class.
        not_finite: number of inputs for which at least one of the two has a NaN or infinite logit.
        worst_input: index of the input with the largest difference, or of the first that is not finite.
        verdict: "match", "differs" (more than the tolerance) or "not finite", whatever the tolerance.
    """

    n: int
    max_abs_diff: float
    agreement: float
    not_finite: int
    worst_input: int
    verdict: str


def _paired(reference: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    reference, other = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    if reference.shape != other.shape or reference.ndim != 2 or len(reference) == 0:
        raise UsageError(
            f"Logits of shapes {reference.shape} and {other.shape} cannot be compared.",
            why="Both must be (n, classes), with the same n of at least 1 and the same classes.",
        )
    return reference, other


def compare(reference: np.ndarray, other: np.ndarray, *, tolerance: float) -> Parity:
    """Compares logits (n, classes) with a reference.

    NaN is a failure of its own kind, which no tolerance or average can hide.

    Args:
        reference: logits (n, classes).
        other: logits of the same shape.
        tolerance: largest absolute difference that still matches.

    Raises:
        UsageError: the shapes differ or there is nothing to compare.
    """
    reference, other = _paired(reference, other)
    finite = np.asarray(np.isfinite(reference).all(1) & np.isfinite(other).all(1))
    with np.errstate(invalid="ignore"):
        difference = np.where(finite[:, None], np.abs(reference - other), 0.0).max(axis=1)
    same = finite & (reference.argmax(1) == other.argmax(1))
    broken = int((~finite).sum())
    worst = int(np.argmin(finite)) if broken else int(difference.argmax())
    largest = float(difference.max())
    verdict = "not finite" if broken else "match" if largest <= tolerance else "differs"
    return Parity(len(reference), largest, float(same.mean()), broken, worst, verdict)


def agreement(reference: np.ndarray, other: np.ndarray, labels: np.ndarray | None = None) -> Agreement:
    """Top-1 agreement and mean KL divergence of logits (n, classes), and with labels (n,) what was lost and gained.

    Raises:
        UsageError: the shapes differ or there is nothing to compare.
    """
    reference, other = _paired(reference, other)
    finite = np.asarray(np.isfinite(reference).all(1) & np.isfinite(other).all(1))
    same = finite & (reference.argmax(1) == other.argmax(1))
    lost = gained = None
    if labels is not None:
        before, after = (np.isfinite(x).all(1) & (x.argmax(1) == labels) for x in (reference, other))
        lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    if not finite.all():
        return Agreement(len(reference), float(same.mean()), float("inf"), lost, gained)
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
    return Agreement(len(reference), float(same.mean()), float(max(kl.mean(), 0.0)), lost, gained)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def edge_cases(input_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Images that reveal wrong exports, by name; each (1, C, H, W), float32 in [0, 1].

    A white image reveals errors in padding; stripes, single channels and a bright corner reveal errors in the layout;
    extremes reveal saturation.
    """
    channels, height, width = input_shape
    y, x = np.mgrid[:height, :width]
    planes = {
        "zeros": np.zeros((height, width)),
        "ones": np.ones((height, width)),
        "half": np.full((height, width), 0.5),
        "checkerboard": (x + y) % 2,
        "rows": y % 2,
        "columns": x % 2,
        "gradient": (x + y) / max(height + width - 2, 1),
        "corner": (x + y == 0),
    }
    cases = {
        name: np.broadcast_to(plane, (1, channels, height, width)).astype(np.float32) for name, plane in planes.items()
    }
    for channel in range(min(channels, 4)):
        image = np.zeros((1, channels, height, width), np.float32)
        image[:, channel] = 1
        cases[f"channel {channel} only"] = image
    cases["noise"] = np.random.default_rng(0).random((1, channels, height, width), np.float32)
    return cases
