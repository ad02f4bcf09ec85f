"""The planner: what it promises adds up, more time never makes less, and too little is refused with a way on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nayer_edge.config import Distill, Synthesis
from nayer_edge.errors import UsageError
from nayer_edge.pipelines.costs import budget
from nayer_edge.pipelines.costs.budget import Costs, duration, parse_budget, plan

SMALL = Costs(synthesis_step=0.08, adversary=0.03, student_step=0.2, teacher_batch=0.1, rest=60)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("1h", 3600), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172800), (" 8 H ", 28800)],
)
def test_a_budget_is_read(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "0m", "1h 2", "1x", "nan", "inf h", "1e9h", "9999d"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a time budget") as caught:
        parse_budget(text)
    assert "--budget" in caught.value.fix


def test_durations_in_words() -> None:
    assert [duration(seconds) for seconds in (0.2, 50, 700, 5000, 5460, 86400)] == [
        *("1 s", "50 s", "12 min", "83 min", "1 h 31 min", "24 h")
    ]


costs = st.builds(
    Costs,
    synthesis_step=st.floats(1e-3, 5),
    adversary=st.floats(0, 2),
    student_step=st.floats(1e-3, 5),
    teacher_batch=st.floats(1e-3, 5),
    rest=st.floats(1, 300),
)


def recomputed(found: budget.BudgetPlan, cost: Costs) -> float:
    """Seconds of a plan by walking through its epochs, one by one."""
    total, made, asked = cost.rest, 0, 0.0
    for epoch in range(found.epochs):
        warm, decay = epoch < found.warmup_epochs, epoch >= found.epochs - found.decay_epochs
        rounds = found.warmup_rounds if warm else 0 if decay else found.rounds
        total += rounds * found.g_steps * (cost.synthesis_step + (0 if warm else cost.adversary))
        made += rounds
        if not warm:
            total += found.steps * cost.student_step
            asked += found.steps
    views = min(budget.VIEWS * budget.IMAGES_PER_STEP * (1 - budget.RESERVE) / cost.student_batch, 1.0)
    assert made * cost.batch == found.images
    assert asked == found.steps_in_all
    return total + views * asked * cost.teacher_batch


@settings(max_examples=300, deadline=None)
@given(costs, st.floats(300, 1e6), st.sampled_from([2, 10, 100, 1000]))
def test_a_plan_fills_its_budget_and_its_parts_add_up(cost: Costs, seconds: float, classes: int) -> None:
    try:
        found = plan(seconds, cost, classes)
    except UsageError:
        return
    assert found.total == pytest.approx(recomputed(found, cost), rel=1e-6)
    # Whole rounds and steps: at the smallest sizes one step or round an epoch is a large share.
    assert 0.8 * seconds <= found.total <= 1.05 * seconds
    Distill(**{
        "epochs": found.epochs, "warmup_epochs": found.warmup_epochs, "steps": found.steps,
        "schedule": "constant", "decay_epochs": found.decay_epochs,
    })  # fmt: skip
    Synthesis(g_steps=found.g_steps, rounds=found.rounds, warmup_rounds=found.warmup_rounds)


def test_an_hour_is_planned_within_a_tenth() -> None:
    for seconds in (600, 1200, 3600, 3 * 3600, 8 * 3600):
        assert plan(seconds, SMALL, 10).total == pytest.approx(seconds * (1 - budget.MARGIN), rel=0.05)


def test_more_time_makes_more_of_both() -> None:
    plans = [plan(seconds, SMALL, 10) for seconds in (600, 1200, 3600, 14400)]
    assert sorted(found.images for found in plans) == [found.images for found in plans]
    assert sorted(found.steps_in_all for found in plans) == [found.steps_in_all for found in plans]


def test_too_little_says_what_would_do() -> None:
    with pytest.raises(UsageError, match="too small") as caught:
        plan(30, SMALL, 10)
    least = parse_budget(caught.value.fix.rpartition("--budget ")[2])
    assert plan(least, SMALL, 10).steps_in_all >= 0.9 * budget.LEAST_STEPS


def test_the_plan_is_a_recipe() -> None:
    found = plan(3600, SMALL, 10)
    sections = budget.settings(found, SMALL, 3072)
    distill, synthesis = Distill(**sections["distill"]), Synthesis(**sections["synthesis"])
    assert distill.bank_mib * 2**20 >= found.images * 3072
    assert synthesis.reserve == budget.RESERVE
