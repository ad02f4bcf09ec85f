"""Hold-outs that cannot be what they claim, beside weak teachers and small or lopsided hold-outs that can."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from nayer_edge.errors import UsageError
from nayer_edge.pipelines.validation.plausibility import (
    ALPHA,
    CARD_MARGIN,
    ONE_ANSWER,
    doubts,
    repeats,
    require_plausible,
)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"c{number}" for number in range(count))


def answered(labels: np.ndarray, accuracy: float, classes: int, seed: int = 0) -> np.ndarray:
    """A teacher's predictions: right at this rate, otherwise any other class."""
    random = np.random.default_rng(seed)
    wrong = (labels + random.integers(1, classes, len(labels))) % classes
    return np.where(random.random(len(labels)) < accuracy, labels, wrong)


def balanced(n: int, classes: int) -> np.ndarray:
    return np.arange(n) % classes


def signs(answers: np.ndarray, labels: np.ndarray, classes: int, card: float | None = None) -> list[str]:
    """The kinds of doubt."""
    words = {"chance would": "chance", "another order": "order", "its card": "card", "one answer": "one"}
    found = doubts(answers, labels, names(classes), card)
    return [kind for sentence in found for word, kind in words.items() if word in sentence]


# ------------------------------------------------------------------ what can be


@pytest.mark.parametrize(("n", "classes", "accuracy"), [
    (600, 10, 0.99), (600, 10, 0.3), (100, 2, 0.8), (2000, 400, 0.05), (20, 10, 0.9), (3, 10, 1.0), (1, 10, 0.0),
    (5, 10, 0.0),
])  # fmt: skip
def test_good_weak_and_small(n: int, classes: int, accuracy: float) -> None:
    for seed in range(20):
        labels = np.random.default_rng(seed).permutation(balanced(n, classes))
        assert signs(answered(labels, accuracy, classes, seed), labels, classes) == []


def test_one_class_only_is_no_constant_teacher() -> None:
    labels = np.full(200, 3)
    assert signs(labels, labels, 10) == []
    assert signs(answered(labels, 0.6, 10), labels, 10) == []


def test_a_rare_class_that_is_often_missed() -> None:
    """95 % of the images are of class 0; every second image of class 1 is taken for it."""
    labels = np.repeat([0, 1], [950, 50])
    answers = np.where((labels == 1) & (np.arange(1000) % 2 == 0), 1, 0)
    assert signs(answers, labels, 2) == []


def test_a_teacher_that_takes_eights_for_threes_is_no_other_order() -> None:
    labels = balanced(600, 10)
    assert signs(np.where(labels == 8, 3, labels), labels, 10) == []


# ------------------------------------------------------------------ what cannot


def test_labels_that_belong_to_other_images() -> None:
    labels = balanced(600, 10)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert signs(answered(labels, 0.99, 10), shuffled, 10) == ["chance"]


def test_the_chance_of_a_lopsided_hold_out() -> None:
    """Answers as lopsided as the labels are right on 68 % by chance."""
    random = np.random.default_rng(0)
    labels, answers = (random.choice(2, 2000, p=[0.8, 0.2]) for _ in range(2))
    (sentence,) = doubts(answers, labels, names(2), None)
    assert "chance would give 6" in sentence


@pytest.mark.parametrize("order", [
    [1, 0, *range(2, 10)],  # two classes
    [*range(1, 10), 0],  # a shift
    [8, 5, 4, 3, 1, 7, 6, 2, 9, 0],  # several cycles, with a class in its place
])  # fmt: skip
def test_labels_in_another_order(order: list[int]) -> None:
    labels = balanced(600, 10)
    assert "order" in signs(answered(labels, 0.95, 10), np.array(order)[labels], 10)


def test_a_hundred_classes_in_another_order() -> None:
    labels = balanced(1000, 100)
    order = np.random.default_rng(0).permutation(100)
    assert "order" in signs(answered(labels, 0.9, 100), order[labels], 100)


def test_far_below_the_card() -> None:
    """The bound is that of the binomial distribution, checked beside scipy's."""
    n, card = 500, 0.9
    labels = balanced(n, 10)
    for right in range(300, 460):
        answers = np.where(np.arange(n) < right, labels, (labels + 1 + np.arange(n) % 7) % 10)
        upper = binomtest(right, n).proportion_ci(1 - 2 * ALPHA, "exact").high
        assert ("card" in signs(answers, labels, 10, card)) == (upper < card - CARD_MARGIN)


def test_a_constant_teacher() -> None:
    labels = balanced(600, 10)
    assert set(signs(np.full(600, 4), labels, 10)) == {"chance", "one"}


def test_a_nearly_constant_teacher_that_is_better_than_chance() -> None:
    labels = balanced(6000, 10)
    answers = np.where(np.arange(6000) % 33 == 0, labels, 4)
    assert signs(answers, labels, 10) == ["one"]
    assert binom.sf((answers == labels).sum() - 1, 6000, 0.1) < ALPHA
    half = np.where(np.arange(6000) % 8 == 0, labels, 4)
    assert (half[labels != 4] == 4).mean() < ONE_ANSWER
    assert signs(half, labels, 10) == []


def test_the_error_says_what_to_check() -> None:
    require_plausible((), "x")
    with pytest.raises(UsageError) as caught:
        require_plausible(("A reason.", "Another."), "held")
    assert caught.value.why == "A reason.\nAnother."
    for words in ("order of the class names", "normalisation", "RGB or BGR", "--allow-implausible"):
        assert words in caught.value.fix


# ------------------------------------------------------------------ copies


def test_copies_are_counted() -> None:
    prints = np.array([b"a", b"b", b"a", b"c", b"b", b"a"])
    assert vars(repeats(prints, np.array([0, 1, 0, 2, 1, 0]))) == {"copies": 3, "contradictory": 0}
    assert vars(repeats(prints, np.array([0, 1, 0, 2, 3, 0]))) == {"copies": 3, "contradictory": 2}
    assert vars(repeats(prints[:0], np.zeros(0, np.int64))) == {"copies": 0, "contradictory": 0}
