"""Comparison of saved outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nayer_edge.errors import UsageError
from nayer_edge.export.parity import agreement, compare, edge_cases

REFERENCE = np.array([[1.0, 2.0, 0.0], [3.0, 1.0, 2.0], [0.0, 0.5, 1.0]])


def test_identical_outputs_match() -> None:
    found = compare(REFERENCE, REFERENCE, tolerance=0.0)
    assert (found.verdict, found.max_abs_diff, found.agreement) == ("match", 0.0, 1.0)


def test_the_largest_difference_and_its_input_are_found() -> None:
    other = REFERENCE.copy()
    other[1, 2] += 0.25
    found = compare(REFERENCE, other, tolerance=0.1)
    assert found.verdict == "differs"
    assert found.max_abs_diff == pytest.approx(0.25)
    assert found.worst_input == 1
    assert found.agreement == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_their_own_failure(bad: float) -> None:
    other = REFERENCE.copy()
    other[2, 0] = bad
    found = compare(REFERENCE, other, tolerance=1e9)
    assert found.verdict == "not finite"
    assert (found.not_finite, found.worst_input) == (1, 2)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.max_abs_diff == 0.0
    assert math.isinf(agreement(REFERENCE, other).mean_kl)
    assert agreement(REFERENCE, other).as_record()["mean_kl"] is None


def test_agreement_and_divergence_are_those_of_softmax() -> None:
    other = REFERENCE[:, ::-1]
    found = agreement(REFERENCE, other)
    p = np.exp(REFERENCE) / np.exp(REFERENCE).sum(1, keepdims=True)
    q = p[:, ::-1]
    assert found.top1 == pytest.approx(1 / 3)
    assert found.mean_kl == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert agreement(REFERENCE, REFERENCE + 100).mean_kl == pytest.approx(0, abs=1e-12)


def test_with_labels_the_drop_is_the_gates() -> None:
    """Four images, in turn: both right, lost, gained, and both wrong in different ways."""
    labels = np.array([0, 0, 0, 0])
    reference = np.eye(3)[[0, 0, 1, 1]]
    other = np.eye(3)[[0, 1, 0, 2]]
    found = agreement(reference, other, labels)
    assert (found.lost, found.gained, found.drop) == (1, 1, 0.0)
    assert found.as_record() | {"mean_kl": None} == {"n": 4, "top1": 0.25, "mean_kl": None, "lost": 1, "gained": 1}
    assert agreement(reference, other).drop == 0.75  # without labels, every other answer counts as lost


def test_an_image_without_finite_logits_is_lost() -> None:
    other = np.eye(3)[[0, 0]]
    other[1, 2] = math.nan
    found = agreement(np.eye(3)[[0, 0]], other, np.array([0, 0]))
    assert (found.lost, found.gained) == (1, 0)


@pytest.mark.parametrize("other", [REFERENCE[:2], REFERENCE[:, :2], REFERENCE[0], np.zeros((0, 3))])
def test_what_does_not_pair_is_refused(other: np.ndarray) -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        compare(REFERENCE, other, tolerance=1.0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 5), (12, 4, 4)])
def test_edge_cases_cover_the_extremes_in_range(shape: tuple[int, int, int]) -> None:
    cases = edge_cases(shape)
    assert {"zeros", "ones", "checkerboard", "corner"} <= set(cases)
    for image in cases.values():
        assert image.shape == (1, *shape)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1
    assert cases["zeros"].max() == 0
    assert cases["ones"].min() == 1
