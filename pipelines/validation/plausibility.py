"""Whether a hold-out can be what it claims to be, judged by the teacher's predictions; and images that occur twice.

Paired drops cannot see labels that belong to other images: teacher, student and artifact are then wrong together. Four
signs of it, each by exact one-sided binomial bounds (Clopper & Pearson 1934) at `ALPHA`:

- **Near chance.** Answers that have nothing to do with the labels are right at the rate Σ p(c) q(c), where p are the
  shares of the labels and q those of the answers (the expected agreement of Cohen's kappa, 1960); if all labels are the
  same, at the rate 1/classes. A teacher is near chance if its accuracy cannot be distinguished from that rate and lies
  below the midpoint between that rate and 1.
- **Another order.** On one half of the images, each label's most frequent answer is looked up; labels that exchange
  places by it (cat → dog, dog → cat) are renamed. If the new names are right more often than the old ones on the other
  half, by the exact McNemar test, the labels stand in another order than the teacher's classes. This also finds orders
  in which some classes have the right place.
- **Far below the card.** More than `CARD_MARGIN` below the accuracy that the teacher's card states.
- **Nearly one answer.** More than `ONE_ANSWER` of the images of all other classes get one and the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nayer_edge.errors import UsageError

from ..gate.statistics import binomial_lower, binomial_upper

ALPHA = 0.001
"""how often, at most, each check may stop a hold-out that is right"""
CARD_MARGIN = 0.15
"""a faithfully repeated test set cost ImageNet's classifiers 11 to 14 points and CIFAR-10's 3 to 15 (Recht et al. 2019,
arXiv 1902.10811); more is not explained by other images of the same kind"""
ONE_ANSWER = 0.9


@dataclass(frozen=True)
class Repeats:
    """Exact copies among the images.

    Attributes:
        copies: images whose pixels equal those of an earlier one.
        contradictory: images that have a copy with another label.
    """

    copies: int
    contradictory: int


NO_REPEATS = Repeats(0, 0)


def repeats(digests: np.ndarray, labels: np.ndarray) -> Repeats:
    """Counts exact copies.

    Args:
        digests: of each image's pixels, (n,), any type that sorts.
        labels: (n,).
    """
    _, group = np.unique(digests, return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    lowest, highest = np.full(groups, np.iinfo(np.int64).max), np.full(groups, -1)
    np.minimum.at(lowest, group, labels)
    np.maximum.at(highest, group, labels)
    return Repeats(len(group) - groups, int((lowest != highest)[group].sum()))


def doubts(answers: np.ndarray, labels: np.ndarray, classes: Sequence[str], card: float | None) -> tuple[str, ...]:
    """The signs that labels and images do not belong together, one sentence each; empty if there are none.

    Args:
        answers: the teacher's top-1 class of each image, (n,).
        labels: class numbers, (n,).
        card: the teacher's top-1 accuracy according to its card, as a fraction; None if it states none.
    """
    found = (
        _near_chance(answers, labels, len(classes)),
        _another_order(answers, labels, classes),
        _below_card(answers, labels, card),
        _one_answer(answers, labels, classes),
    )
    return tuple(sentence for sentence in found if sentence)


def require_plausible(found: Sequence[str], name: str) -> None:
    """Raises UsageError if there are doubts about the images called `name`."""
    if found:
        raise UsageError(
            f"The teacher's predictions do not match the labels of {name}.",
            why="\n".join(found),
            fix="Check the order of the class names (teacher.classes against the labels), the normalisation "
            "(teacher.input), and the order of the channels (RGB or BGR). If the hold-out is right, add "
            "--allow-implausible.",
        )


def _near_chance(answers: np.ndarray, labels: np.ndarray, classes: int) -> str:
    n, right = len(labels), int((answers == labels).sum())
    shares = [np.bincount(numbers, minlength=classes) / n for numbers in (labels, answers)]
    # One label alone agrees with the answers at the rate at which they name it, right or wrong.
    chance = min(1.0, float(shares[0] @ shares[1])) if len(np.unique(labels)) > 1 else 1 / classes
    if binomial_lower(right, n, ALPHA) > chance or binomial_upper(right, n, ALPHA) >= (1 + chance) / 2:
        return ""
    return f"The teacher is right on {right:,} of {n:,} images ({right / n:.1%}); chance would give {chance:.1%}."


def _another_order(answers: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    half = _every_second(labels)
    renamed = labels.copy()
    for learned, judged in ((half, ~half), (~half, half)):
        renamed[judged] = _renaming(answers[learned], labels[learned], len(classes))[labels[judged]]
    better = int(((answers == renamed) & (answers != labels)).sum())
    worse = int(((answers != renamed) & (answers == labels)).sum())
    if not better or binomial_lower(better, better + worse, ALPHA) <= 0.5:
        return ""
    whole = _renaming(answers, labels, len(classes))
    changed = [number for number in np.unique(labels) if whole[number] != number]
    shown = ", ".join(f"'{classes[int(number)]}' → '{classes[int(whole[number])]}'" for number in changed[:3])
    return (
        "The labels seem to be in another order: the teacher would be right on "
        f"{(answers == renamed).mean():.1%} instead of {(answers == labels).mean():.1%} if {len(changed)} classes were "
        f"renamed ({shown}{', …' if len(changed) > 3 else ''})."
    )


def _every_second(labels: np.ndarray) -> np.ndarray:
    """Half of the images of each label, so that both halves have the same labels whatever their order; (n,), bool."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[::2]] = True
    return chosen


def _renaming(answers: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Label → its most frequent answer, where this exchanges labels among themselves; else the label itself."""
    renamed = np.arange(classes)
    usual = {int(label): int(np.bincount(answers[labels == label]).argmax()) for label in np.unique(labels)}
    for label in usual:
        # Only cycles count: a teacher that predicts three for both threes and eights has not reordered the classes.
        step, place = 0, label
        while step < len(usual) and (place := usual.get(place, -1)) not in (label, -1):
            step += 1
        if place == label:
            renamed[label] = usual[label]
    return renamed


def _below_card(answers: np.ndarray, labels: np.ndarray, card: float | None) -> str:
    n, right = len(labels), int((answers == labels).sum())
    if card is None or binomial_upper(right, n, ALPHA) >= card - CARD_MARGIN:
        return ""
    return f"The teacher is right on {right / n:.1%} of {n:,} images; its card says {card:.1%}."


def _one_answer(answers: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    usual = int(np.bincount(answers).argmax())
    others = labels != usual
    n, same = int(others.sum()), int((answers[others] == usual).sum())
    if n == 0 or binomial_lower(same, n, ALPHA) <= ONE_ANSWER:
        return ""
    return f"The teacher gives one answer, '{classes[usual]}', on {same:,} of the {n:,} images of other classes."
