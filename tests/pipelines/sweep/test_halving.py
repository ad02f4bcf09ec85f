"""The stop rule: half of those that can still pass go on, and nobody is trained who cannot be the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nayer_edge.pipelines.sweep.halving import (
    FirstRound,
    Standing,
    bank_share,
    decide,
    first_round,
    growth,
    pareto,
    rounds_for,
    share,
    way_on,
)

standings = st.lists(
    st.builds(
        Standing,
        name=st.uuids().map(str),
        size=st.integers(1, 50).map(float),
        agreement=st.floats(0, 1),
        passes=st.booleans(),
        excluded=st.sampled_from(["", "", "size"]),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda each: each.name,
)


def names(standings: list[Standing], rounds_left: int, action: str) -> list[str]:
    decided = decide(standings, rounds_left)
    return [each.name for each in standings if decided[each.name].action == action]


def test_the_better_half_goes_on() -> None:
    five = [Standing(name, 10, agreement) for name, agreement in zip("abcde", (0.5, 0.9, 0.7, 0.8, 0.6), strict=True)]
    assert names(five, 2, "continue") == ["b", "c", "d"]
    assert names(five, 0, "continue") == []
    assert "rank 4 of 5; the best 3 continue" in decide(five, 1)["e"].reason


def test_of_equals_the_smaller_goes_on() -> None:
    assert names([Standing("large", 20, 0.9), Standing("small", 10, 0.9)], 1, "continue") == ["small"]


def test_only_smaller_ones_go_on_beside_one_that_passes() -> None:
    mixed = [
        Standing("tiny", 1, 0.6),
        Standing("small", 2, 0.7),
        Standing("middle", 3, 0.9, passes=True),
        Standing("large", 4, 0.99, passes=True),
        Standing("huge", 5, 0.98),
    ]
    assert names(mixed, 1, "pass") == ["middle"]
    assert names(mixed, 1, "continue") == ["small"]
    assert decide(mixed, 1)["huge"].reason == "the smaller middle passes"


def test_what_no_training_can_help_is_stopped_whatever_its_rank() -> None:
    found = decide([Standing("best", 9, 0.99, excluded="size 9 B, limit 5 B"), Standing("other", 3, 0.5)], 1)
    assert (found["best"].action, found["other"].action) == ("stop", "continue")
    assert "limit 5 B" in found["best"].reason


@given(standings, st.integers(0, 4))
def test_every_student_gets_one_decision(found: list[Standing], rounds_left: int) -> None:
    decided = decide(found, rounds_left)
    assert decided.keys() == {each.name for each in found}
    passing = [each for each in found if each.passes]
    answers = names(found, rounds_left, "pass")
    assert len(answers) == bool(passing)
    for each in found:
        action = decided[each.name].action
        if answers:
            answer = next(other for other in found if other.name == answers[0])
            assert each.size >= answer.size or not each.passes, "no smaller one passes"
            assert action != "continue" or each.size < answer.size
        if action == "continue":
            assert rounds_left
            assert not each.excluded
    open_ = [e for e in found if not e.passes and not e.excluded and not (answers and e.size >= answer.size)]
    going = names(found, rounds_left, "continue")
    assert len(going) == (math.ceil(len(open_) / 2) if rounds_left else 0)
    worst = min((e.agreement for e in found if e.name in going), default=0.0)
    assert all(e.agreement <= worst for e in open_ if e.name not in going) or not going


@given(st.integers(1, 100))
def test_the_halving_ends_with_one(count: int) -> None:
    """⌈log₂ n⌉ rounds, as in the papers, and shares that add up to the time."""
    left, spent, rounds = [Standing(f"{i}", 1, i / count) for i in range(count)], 0.0, rounds_for(count)
    for number in range(rounds):
        spent += len(left) * share(1000.0 - spent, rounds - number, len(left))
        going = names(left, 1, "continue")
        left = [each for each in left if each.name in going]
    assert len(left) == 1
    assert math.isclose(spent, 1000.0)


@given(st.integers(1, 40))
def test_students_of_a_round_get_equal_shares_one_after_another(count: int) -> None:
    """Each takes exactly its share, before that of the next one is computed."""
    left, rounds, going = 1000.0, rounds_for(count), count
    for number in range(rounds):
        taken, shares = 0.0, []
        for waiting in range(going, 0, -1):
            shares.append(share(left, rounds - number, waiting, taken))
            left, taken = left - shares[-1], taken + shares[-1]
        assert np.allclose(shares, 1000.0 / rounds / going)
        going = math.ceil(going / 2)


def test_images_of_all_students_take_as_much_as_those_of_one() -> None:
    """By walking through the shares of one student alone, of two and of five."""
    for students in (1, 2, 5):
        first, images = bank_share(students, 1, 0.35)
        others = [(1 - first) / (students - 1)] * (students - 1) if students > 1 else []
        assert first * images == pytest.approx(0.35)
        assert [first * (1 - images), *others] == pytest.approx([0.65 / students] * students)
    first, images = bank_share(5, 3, 0.35)
    assert (first, images) == (pytest.approx(0.35 + 0.65 / 15), 0.75), "its own student is trained, too"


def test_no_time_is_no_share() -> None:
    assert share(-5.0, 2, 3, 20.0) == 0.0
    assert share(-5.0, 2, 3) == 0.0


def first(needs: dict[str, float], time: float, most: int, alone: bool = True) -> FirstRound:
    """The first round of students that each need so many seconds."""
    return first_round(
        list(needs),
        1,
        most,
        lambda rounds, students: time / rounds / students,
        lambda name, seconds: needs[name] if seconds < needs[name] else 0.0,
        alone=alone,
    )


def test_late_students_that_fit_one_less_take_part() -> None:
    """Of three that need 60 s each and 130 s, two fit. If nobody has a share yet, the user decides."""
    found = first({"b": 60.0, "c": 61.0, "d": 62.0}, 130.0, 1, alone=False)
    assert found == FirstRound(["b", "c"], {"d": pytest.approx(130 / 3)}, 1)
    assert first({"b": 60.0, "c": 61.0, "d": 62.0}, 130.0, 1).students == []


def test_one_that_needs_too_much_costs_the_others_neither_rounds_nor_time() -> None:
    found = first(dict.fromkeys("abcd", 60.0) | {"e": 300.0}, 1000.0, 3)
    assert found == FirstRound(["a", "b", "c", "d"], {"e": 200.0}, rounds_for(4))
    assert first({"small": 30.0, "large": 100.0}, 100.0, 1) == FirstRound(["small"], {"large": 50.0}, 1)
    # Without the one that needs most, the share of the next one suffices.
    found = first({"a": 50.0, "b": 50.0, "c": 210.0, "d": 400.0}, 800.0, 2)
    assert found == FirstRound(["a", "b", "c"], {"d": 200.0}, 1)


def test_as_many_rounds_as_all_can_use() -> None:
    four = dict.fromkeys("abcd", 100.0)
    assert first(four, 1000.0, 2).rounds == 2
    assert first(four, 700.0, 2).rounds == 1
    assert first(four, 700.0, 2).students == ["a", "b", "c", "d"]


def test_too_little_time_for_all_is_not_decided_here() -> None:
    assert first({"a": 60.0, "b": 70.0}, 100.0, 1) == FirstRound([], {"a": 50.0, "b": 50.0}, 1)
    assert first({}, 100.0, 1).students == []


def test_who_has_a_share_already_counts_for_the_rounds() -> None:
    """Of three, one of which has made the bank, half goes on."""
    two = first_round(["a", "b"], 1, 2, lambda *_: 50.0, lambda *_: 0.0, apart=1)
    assert (two.students, two.rounds) == (["a", "b"], rounds_for(3))
    assert first_round(["a", "b"], 1, 2, lambda *_: 50.0, lambda *_: 0.0).rounds == 1


def test_more_time_or_a_larger_student() -> None:
    assert way_on([(60, 0.8)], 0.1) is None, "one share does not tell"
    # 0.05 for a doubling: two more give 0.1.
    assert way_on([(60, 0.80), (120, 0.85)], 0.09) == "time"
    assert way_on([(60, 0.80), (120, 0.85)], 0.11) == "larger"
    assert way_on([(60, 0.80), (120, 0.80)], 0.01) == "larger"
    assert way_on([(60, 0.50), (120, 0.80), (240, 0.81)], 0.1) == "larger", "the last doubling counts"


def test_a_share_shows_how_agreement_grew() -> None:
    epochs = [(10.0, 0.1), (10.0, 0.2), (10.0, 0.5), (10.0, 0.7), (20.0, 0.7), (20.0, 0.8), (20.0, 0.8), (20.0, 0.9)]
    assert growth(epochs) == [(35.0, pytest.approx(0.6)), (110.0, pytest.approx(0.85))]
    assert growth(epochs[1:]) == growth([]) == [], "too few to tell"


def test_the_pareto_front() -> None:
    points = {"a": (1, 0.5), "b": (2, 0.9), "c": (3, 0.8), "d": (4, 0.95), "e": (2, 0.7)}
    assert pareto(points) == ["a", "b", "d"]
    assert pareto({}) == []
