"""When a sweep stops a student, and how it divides the time: pure functions, standard library only.

Successive halving (Jamieson & Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
AISTATS 2016, Alg. 1; Li et al., "A system for massively parallel hyperparameter tuning", MLSys 2020, Alg. 1): ⌈log₂ n⌉
rounds get equal parts of the time, every student left gets an equal share of a round, and after it the better half goes
on. The resource is time, the score is the agreement with the teacher on images that are the same for all students.

A sweep does not look for the best student but for the smallest that passes, so two rules come before the halving: a
student that no training can make pass is stopped, and so is one that is larger than a student that passes already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Literal

ETA = 2
"""one in this many students continues after a round (η)"""
FAR = 2.0
"""more time is suggested if at most this many doublings of the time would be enough"""
PART = 2
"""epochs in a quarter of a share, from which on the share tells how agreement grew; single epochs vary"""

MOST_IMAGE_TIME = 0.75
"""largest fraction of the time of the run that makes the bank in which it makes images; the rest trains its student"""

Action = Literal["continue", "stop", "pass"]

SMALLEST, SMALLER = "the smallest student that passes", "the smaller {} passes"
EXCLUDED = "more training cannot help: "
"""reasons of decisions, or how they begin"""


@dataclass(frozen=True)
class Standing:
    """Where a student stands after a round.

    Attributes:
        name: the student.
        size: what the sweep minimises: bytes of the artifact.
        agreement: with the teacher, in [0, 1], on the images that all students share.
        passes: its artifacts meet the policy.
        excluded: the limit that it misses however long it is trained; empty if there is none.
    """

    name: str
    size: float
    agreement: float
    passes: bool = False
    excluded: str = ""


@dataclass(frozen=True)
class Decision:
    """What becomes of a student, and why, in words."""

    action: Action
    reason: str


@dataclass(frozen=True)
class FirstRound:
    """Who takes part in the first round.

    Attributes:
        students: those that get a share.
        too_short: those that do not → seconds of the share that was too short for them.
        rounds: number of rounds of the sweep.
    """

    students: list[str]
    too_short: dict[str, float]
    rounds: int


def rounds_for(students: int) -> int:
    """Rounds of successive halving: ⌈log₂ n⌉, at least one."""
    return max(1, (students - 1).bit_length())


def bank_share(students: int, rounds: int, image_time: float) -> tuple[float, float]:
    """The time of the run that makes the bank, which is also the first share of its student.

    Of all the time, images get as much as in a run of one student. Of the rest, the student gets what it would get if
    rounds and students had equal parts.

    Args:
        image_time: fraction of the time for images.

    Returns:
        Fraction of the sweep's time for that run, and fraction of that run's time for images.
    """
    found = image_time + (1 - image_time) / (students * rounds)
    return found, min(image_time / found, MOST_IMAGE_TIME)


def share(left: float, rounds_left: int, students: int, taken: float = 0.0) -> float:
    """Seconds of each student that still has to get its share of a round. Rounds get equal parts of the time.

    Args:
        left: seconds for this round and the later ones.
        rounds_left: including this one.
        students: those without a share of this round.
        taken: seconds that other students took in this round.
    """
    of_round = (left + taken) / max(rounds_left, 1) - taken
    return max(of_round, 0.0) / max(students, 1)


def first_round(
    students: Sequence[str],
    fewest: int,
    most: int,
    seconds_of: Callable[[int, int], float],
    needs: Callable[[str, float], float],
    *,
    alone: bool = True,
    apart: int = 0,
) -> FirstRound:
    """Who takes part in the first round, and in how many rounds the time is divided.

    A student whose share would be too short even with the fewest rounds does not take part: otherwise it would cost the
    others their halving, and its share would go to nobody. Those that need the most time are left out first.

    Args:
        fewest, most: limits of the number of rounds; if they differ, it is at most that of successive halving.
        seconds_of: (rounds, students) → seconds of each student.
        needs: (student, seconds) → the seconds that it needs if these are too few, else 0.
        alone: no student has a share yet. If the time is too short for each of them, it is the user who decides.
        apart: number of further students that take part in any case.
    """
    left, too_short = list(students), dict[str, float]()
    while left:
        seconds = seconds_of(fewest, len(left))
        needed = {name: least for name in left if (least := needs(name, seconds)) > 0}
        if not needed:
            break
        if alone and len(needed) == len(students):
            return FirstRound([], dict.fromkeys(students, seconds), fewest)
        last = max(needed, key=lambda name: (needed[name], name))
        too_short[last] = seconds
        left.remove(last)
    for rounds in range(min(most, rounds_for(len(left) + apart)), fewest, -1):
        seconds = seconds_of(rounds, len(left))
        if all(needs(name, seconds) <= 0 for name in left):
            return FirstRound(left, too_short, rounds)
    return FirstRound(left, too_short, fewest)


def decide(standings: Sequence[Standing], rounds_left: int) -> dict[str, Decision]:
    """Who goes on after a round.

    Args:
        standings: the students that took part in the round, with any that passed before.
        rounds_left: rounds after this one; with none, nobody goes on.

    Returns:
        A decision for every student. "pass" is the smallest that passes; there is at most one.
    """
    found: dict[str, Decision] = {}
    passing = min((each for each in standings if each.passes), key=lambda each: (each.size, each.name), default=None)
    for each in standings:
        if each is passing:
            found[each.name] = Decision("pass", SMALLEST)
        elif each.excluded:
            found[each.name] = Decision("stop", EXCLUDED + each.excluded)
        elif passing is not None and (each.passes or each.size >= passing.size):
            found[each.name] = Decision("stop", SMALLER.format(passing.name))
    open_ = sorted(
        (each for each in standings if each.name not in found), key=lambda each: (-each.agreement, each.size, each.name)
    )
    if rounds_left <= 0:
        return found | {each.name: Decision("stop", "it does not pass, and the time is used up") for each in open_}
    kept = math.ceil(len(open_) / ETA)
    for place, each in enumerate(open_, 1):
        stands = f"{100 * each.agreement:.1f} % agreement, rank {place} of {len(open_)}"
        action: Action = "continue" if place <= kept else "stop"
        found[each.name] = Decision(
            action, stands if action == "continue" else f"{stands}; the best {kept} continue{'s' * (kept == 1)}"
        )
    return found


def growth(epochs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """How agreement grew within a share, for `way_on`: means over the second and the last quarter of the epochs.

    Args:
        epochs: (seconds, agreement) of each, before the learning rate falls.

    Returns:
        (seconds of training until then, agreement); empty if the epochs are too few to tell.
    """
    part = len(epochs) // 4
    if part < PART:
        return []
    ends = list(accumulate(seconds for seconds, _ in epochs))
    quarters = slice(part, 2 * part), slice(-part, None)
    return [(fmean(ends[each]), fmean(agreement for _, agreement in epochs[each])) for each in quarters]


def way_on(points: Sequence[tuple[float, float]], needed: float) -> Literal["time", "larger"] | None:
    """Whether more time or a larger student would help a student that falls short.

    Assumes that each doubling of its time gains as much as the last, which is optimistic: accuracy curves flatten.

    Args:
        points: (seconds of training in all, agreement), in order: after each share, or of `growth`.
        needed: by how much its agreement has to grow.

    Returns:
        "time" if `FAR` doublings would do; None if there are not two points, which it takes to tell.
    """
    if len(points) < 2:
        return None
    (before, low), (after, high) = points[-2:]
    doublings = math.log2(after / before) if after > before > 0 else 0.0
    gain = (high - low) / doublings if doublings else 0.0
    return "time" if gain > 0 and needed <= FAR * gain else "larger"


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other point beats: (cost, quality), a smaller cost and a larger quality being better. In the
    order of cost."""
    front: list[str] = []
    best = -math.inf
    for name, (_, quality) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1], item[0])):
        if quality > best:
            front.append(name)
            best = quality
    return front
