"""The gate's statistics: against SciPy and statsmodels, and by exact enumeration."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from nayer_edge.pipelines.gate.statistics import (
    MAX_IMAGES,
    beta_tails,
    binomial_lower,
    binomial_upper,
    drop_lower,
    drop_upper,
    floor_upper,
    holm,
    images_to_decide,
    images_to_decide_rate,
    score_upper,
)


def counts_of(n: int) -> list[int]:
    some = (0, 1, 2, 3, n // 1000, n // 100, n // 10, n // 2, n - 2, n - 1, n)
    return sorted({k for k in some if 0 <= k <= n})


@pytest.mark.parametrize("n", [1, 2, 3, 10, 37, 100, 600, 10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.025, 1e-3, 1e-6, 1e-12])
def test_clopper_pearson_is_scipys(n: int, alpha: float) -> None:
    for k in counts_of(n):
        lower = 0.0 if k == 0 else stats.beta.ppf(alpha, k, n - k + 1)
        upper = 1.0 if k == n else stats.beta.isf(alpha, k + 1, n - k)
        assert binomial_lower(k, n, alpha) == pytest.approx(lower, rel=1e-10, abs=1e-300), k
        assert binomial_upper(k, n, alpha) == pytest.approx(upper, rel=1e-10), k


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 20), (7, 20), (20, 20), (3, 600), (590, 600)])
def test_clopper_pearson_is_binomtests_and_statsmodels(k: int, n: int) -> None:
    # Imported here, so that not every worker does so at its start.
    from statsmodels.stats.proportion import proportion_confint

    exact = stats.binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact")
    assert binomial_upper(k, n, 0.05) == pytest.approx(exact.high, rel=1e-10)
    exact = stats.binomtest(k, n, alternative="greater").proportion_ci(0.95, method="exact")
    assert binomial_lower(k, n, 0.05) == pytest.approx(exact.low, rel=1e-10)
    low, high = proportion_confint(k, n, alpha=0.1, method="beta")
    assert (binomial_lower(k, n, 0.05), binomial_upper(k, n, 0.05)) == pytest.approx((low, high), rel=1e-10)


@settings(max_examples=300, deadline=None)
@example(0.9999999989999999, 318455.5, 1.0)
@given(st.floats(1e-9, 1 - 1e-9), st.floats(0.05, 1e6), st.floats(0.05, 1e6))
def test_incomplete_beta_function(x: float, a: float, b: float) -> None:
    """The smaller tail, too, although the other one is 1 in floating point. Below 1e-200 SciPy loses digits."""
    lower, upper = beta_tails(x, a, b)
    assert lower == pytest.approx(special.betainc(a, b, x), rel=1e-9, abs=1e-200)
    assert upper == pytest.approx(special.betaincc(a, b, x), rel=1e-9, abs=1e-200)


def test_beta_tails_at_the_ends() -> None:
    assert beta_tails(0, 2, 3) == (0.0, 1.0)
    assert beta_tails(1, 2, 3) == (1.0, 0.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_clopper_pearson_mirrors(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    assert binomial_lower(k, n, 0.05) == pytest.approx(1 - binomial_upper(n - k, n, 0.05), abs=1e-12)
    assert binomial_lower(k, n, 0.05) < k / n + 1e-15
    assert binomial_upper(k, n, 0.05) > k / n - 1e-15


@pytest.mark.parametrize(
    "call",
    [
        lambda: binomial_upper(-1, 10, 0.05),
        lambda: binomial_upper(11, 10, 0.05),
        lambda: binomial_lower(1, 0, 0.05),
        lambda: binomial_lower(1, 10, 0.0),
        lambda: binomial_lower(1, 10, 1.0),
        lambda: binomial_lower(math.nan, 10, 0.05),
        lambda: drop_upper(6, 5, 10, 0.05),
        lambda: drop_lower(6, 5, 10, 0.05),
        lambda: images_to_decide(6, 5, 10, 0.01, 0.05),
        lambda: images_to_decide_rate(11, 10, 0.9, 0.05),
    ],
)
def test_impossible_counts_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"not a count|alpha|more than"):
        call()


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 0, 100), (3, 1, 600), (20, 35, 500), (60, 40, 10_000)])
@pytest.mark.parametrize("drop", [0.001, 0.01, 0.08])
def test_score_bound_uses_the_restricted_maximum_likelihood(lost: int, gained: int, n: int, drop: float) -> None:
    """The closed form against a numerical maximum of the trinomial likelihood."""
    from nayer_edge.pipelines.gate.statistics import _restricted_rate

    def cost(rate: float) -> float:
        return -(
            special.xlogy(lost, rate + drop)
            + special.xlogy(gained, rate)
            + special.xlogy(n - lost - gained, 1 - 2 * rate - drop)
        )

    best = optimize.minimize_scalar(cost, bounds=(0, (1 - drop) / 2), method="bounded", options={"xatol": 1e-12})
    assert _restricted_rate(lost, gained, n, drop) == pytest.approx(best.x, abs=1e-6)


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 0, 100), (3, 1, 600), (20, 35, 500), (60, 40, 10_000)])
def test_score_bound_solves_its_equation(lost: int, gained: int, n: int) -> None:
    from nayer_edge.pipelines.gate.statistics import _restricted_rate

    bound = score_upper(lost, gained, n, 0.05)
    rate = _restricted_rate(lost, gained, n, bound)
    z = (lost - gained + 1 - n * bound) / math.sqrt(n * (2 * rate + bound - bound**2))
    assert z == pytest.approx(-stats.norm.isf(0.05), abs=1e-8)


@pytest.mark.parametrize(
    ("n", "alpha"),
    [
        *itertools.product((20, 100, 600, 10_000), (0.1, 0.05, 0.001)),
        *itertools.product((20, 600), (0.2, 1e-5)),
        *(pytest.param(n, alpha, marks=pytest.mark.slow) for n in (100, 10_000) for alpha in (0.2, 1e-5)),
    ],
)
def test_bounds_rise_with_lost_and_fall_with_gained(n: int, alpha: float) -> None:
    grid = sorted({0, 1, 2, 3, 5, 8, n // 50, n // 20, n // 12, n // 8, n // 5, n // 3})
    for bound in (drop_upper, drop_lower, floor_upper, score_upper):
        values = {(lost, gained): bound(lost, gained, n, alpha) for lost, gained in itertools.product(grid, grid)}
        for (lost, gained), value in values.items():
            assert -1 <= value <= 1
            for one, other in itertools.pairwise(grid):
                if lost == one:
                    assert values[other, gained] >= value
                if gained == one:
                    assert values[lost, other] <= value


@pytest.mark.parametrize("n", [20, 100, 600, 10_000])
def test_bounds_enclose_the_observed_drop_and_order_with_alpha(n: int) -> None:
    grid = sorted({0, 1, 2, 5, n // 50, n // 12, n // 4})
    for lost, gained in itertools.product(grid, grid):
        drop = (lost - gained) / n
        uppers = [drop_upper(lost, gained, n, alpha) for alpha in (0.1, 0.05, 0.01, 0.001)]
        lowers = [drop_lower(lost, gained, n, alpha) for alpha in (0.1, 0.05, 0.01, 0.001)]
        assert uppers == sorted(uppers)
        assert lowers == sorted(lowers, reverse=True)
        assert lowers[0] <= drop <= uppers[0]
        assert drop_lower(gained, lost, n, 0.05) == -floor_upper(lost, gained, n, 0.05)


def test_sharp_bound_is_never_above_the_floor() -> None:
    for n, alpha in itertools.product((20, 50, 600, 10_000), (0.1, 0.05, 0.01)):
        grid = sorted({0, 1, 2, 5, n // 50, n // 25, n // 12})
        for lost, gained in itertools.product(grid, grid):
            floor = floor_upper(lost, gained, n, alpha)
            assert drop_upper(lost, gained, n, alpha) <= max(floor, 0) + 1e-12


def test_outside_the_checked_range_the_floor_decides() -> None:
    for lost, gained, n, alpha in [(0, 0, 600, 0.2), (2, 1, 600, 1e-4), (1, 0, 19, 0.05)]:
        assert drop_upper(lost, gained, n, alpha) == floor_upper(lost, gained, n, alpha)
    assert drop_upper(150, 20, 600, 0.05) == floor_upper(150, 20, 600, 0.05)
    assert drop_upper(20, 150, 600, 0.05) == floor_upper(20, 150, 600, 0.05) < 0


def test_half_a_point_needs_598_images_without_a_loss() -> None:
    """(1 − 0.005)ⁿ ≤ 0.05: no valid rule can do with fewer, and ours does not ask for more."""
    assert drop_upper(0, 0, 598, 0.05) <= 0.005 < drop_upper(0, 0, 597, 0.05)
    assert images_to_decide(0, 0, 100, 0.005, 0.05) == 598
    assert math.ceil(math.log(0.05) / math.log1p(-0.005)) == 598


def test_digits_recipe_can_pass() -> None:
    for lost, gained in itertools.product(range(3), range(3)):
        assert drop_upper(lost, gained, 598, 0.05) <= 0.015
    assert drop_upper(14, 4, 598, 0.05) <= 0.04


@cache
def most_lost_that_pass(gained: int, n: int, limit: float, alpha: float) -> int:
    """Largest number of lost images that still passes, −1 for none (the bound rises with lost)."""
    low, high = -1, n - gained + 1
    while high - low > 1:
        middle = (low + high) // 2
        if drop_upper(middle, gained, n, alpha) <= limit:
            low = middle
        else:
            high = middle
    return low


@cache
def fewest_lost_that_fail(gained: int, n: int, limit: float, alpha: float) -> int:
    low, high = -1, n - gained + 1
    while high - low > 1:
        middle = (low + high) // 2
        if drop_lower(middle, gained, n, alpha) > limit:
            high = middle
        else:
            low = middle
    return high


def chances(n: int, gained_rate: float, drop: float, limit: float, alpha: float) -> tuple[float, float]:
    """Exact probabilities of a pass and of a fail: sums over gained of binomial ones; the trinomial, factored."""
    spread = 9 * math.sqrt(n * gained_rate) + 12
    gained = np.arange(max(0, int(n * gained_rate - spread)), min(n, int(n * gained_rate + spread)) + 1)
    most = np.array([most_lost_that_pass(int(g), n, limit, alpha) for g in gained])
    fewest = np.array([fewest_lost_that_fail(int(g), n, limit, alpha) for g in gained])
    assert (most < fewest).all(), "never both"
    rest = min(1.0, (gained_rate + drop) / (1 - gained_rate))
    weights = stats.binom.pmf(gained, n, gained_rate)
    passing = weights * stats.binom.cdf(most, n - gained, rest)
    failing = weights * stats.binom.sf(fewest - 1, n - gained, rest)
    return float(passing.sum()), float(failing.sum())


def chance_of_passing(n: int, gained_rate: float, drop: float, limit: float, alpha: float) -> float:
    return chances(n, gained_rate, drop, limit, alpha)[0]


@pytest.mark.parametrize(
    ("n", "limit", "alpha"),
    [
        *((20, 0.0, 0.05), (20, 0.03, 0.1), (20, 0.2, 0.01)),
        *((50, 0.0, 0.1), (50, 0.0999, 0.1), (50, 0.1, 0.05)),
        *((100, 0.03, 0.05), (100, 0.1, 0.05), (100, 0.11, 0.01)),
        *((598, 0.005, 0.05), (598, 0.04, 0.01), (600, 0.005, 0.001), (600, 0.015, 0.05), (600, 0.015, 0.2)),
        *(pytest.param(10_000, limit, 0.05, marks=pytest.mark.slow) for limit in (0.0003, 0.005)),
    ],
)
def test_false_verdicts_enumerated(n: int, limit: float, alpha: float) -> None:
    """The drop equals the limit: whatever is gained beside it, a pass and a fail are at most alpha likely (exactly)."""
    check_false_verdicts(n, limit, alpha, most=6)


def check_false_verdicts(n: int, limit: float, alpha: float, most: float = 30) -> None:
    """`most`: of many images, how many are gained on average at the largest rate; it decides how long this takes."""
    largest = (1 - limit) / 2
    for rate in [0.0, *np.geomspace(0.05 / n, largest if n <= 100 else most / n, 14)]:
        assert max(chances(n, rate, limit, limit, alpha)) <= alpha * (1 + 1e-9), rate


@pytest.mark.slow
def test_false_verdicts_enumerated_for_every_kind_of_gate() -> None:
    for case in itertools.product([20, 50, 100], [0.0, 0.03, 0.0999, 0.1, 0.11, 0.2], [0.1, 0.05, 0.01]):
        check_false_verdicts(*case)
    for case in itertools.product([598, 600], [0.005, 0.015, 0.04], [0.1, 0.05, 0.01, 0.001]):
        check_false_verdicts(*case)
    for case in ((600, 0.015, 0.2), (10_000, 0.0003, 0.05), (10_000, 0.005, 0.05)):
        check_false_verdicts(*case)


def test_enumeration_is_exact_where_it_can_be_checked() -> None:
    n, gained_rate, drop = 20, 0.07, 0.05
    total = sum(
        stats.multinomial.pmf([lost, gained, n - lost - gained], n, [0.12, gained_rate, 0.81])
        for lost in range(n + 1)
        for gained in range(n + 1 - lost)
        if drop_upper(lost, gained, n, 0.1) <= 0.1
    )
    assert chance_of_passing(n, gained_rate, drop, 0.1, 0.1) == pytest.approx(total, rel=1e-10)


def test_power_where_it_matters() -> None:
    """Exact chances to pass without any true drop, and to fail with a large one, so that a blunter bound is noticed."""
    assert chance_of_passing(600, 0.0, 0.0, 0.015, 0.05) == pytest.approx(1)
    assert chance_of_passing(600, 0.002, 0.0, 0.015, 0.05) > 0.97
    assert chances(600, 0.002, 0.045, 0.015, 0.05)[1] > 0.8
    assert chances(10_000, 0.001, 0.01, 0.005, 0.05)[1] > 0.98


@pytest.mark.slow
def test_power_with_many_images() -> None:
    assert chance_of_passing(10_000, 0.01, 0.0, 0.005, 0.05) > 0.9
    assert chance_of_passing(10_000, 0.01, 0.001, 0.005, 0.05) > 0.7


@pytest.mark.parametrize(
    ("lost", "gained", "n", "limit"),
    [(3, 1, 200, 0.02), (0, 0, 50, 0.015), (30, 10, 300, 0.05), (30, 10, 300, 0.2), (12, 2, 100, 0.05)],
)
def test_images_to_decide_is_the_smallest_number(lost: int, gained: int, n: int, limit: float) -> None:
    images = images_to_decide(lost, gained, n, limit, 0.05)
    assert images is not None

    def decided(m: int) -> bool:
        scaled = lost / n * m, gained / n * m, m, 0.05
        if lost / n < limit + gained / n:
            return drop_upper(*scaled) <= limit
        return drop_lower(*scaled) > limit

    assert decided(images)
    assert not any(decided(m) for m in {*range(1, images, max(1, images // 100)), *range(max(1, images - 20), images)})
    assert all(decided(m) for m in range(images, 3 * images, max(1, images // 20)))


def test_images_to_decide_gives_up() -> None:
    assert images_to_decide(6, 0, 600, 0.01, 0.05) is None, "the observed drop is the limit"
    assert images_to_decide(0, 0, 600, 0.0, 0.05) is None
    assert images_to_decide(5000, 4900, 10_000, 0.010_001, 0.05) is None
    assert images_to_decide(600, 0, 60_000, 0.0101, 0.05) in range(1_000_000, MAX_IMAGES)


@pytest.mark.parametrize(("same", "n", "minimum"), [(98, 100, 0.95), (90, 100, 0.95), (100, 100, 0.99)])
def test_images_to_decide_rate(same: int, n: int, minimum: float) -> None:
    images = images_to_decide_rate(same, n, minimum, 0.05)
    assert images is not None

    def decided(m: int) -> bool:
        if same / n > minimum:
            return binomial_lower(same / n * m, m, 0.05) >= minimum
        return binomial_upper(same / n * m, m, 0.05) < minimum

    assert decided(images)
    assert not decided(images - 1)
    assert images_to_decide_rate(95, 100, 0.95, 0.05) is None


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(1e-6, 0.2), min_size=1, max_size=30))
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    expected, *_ = multipletests(p_values, alpha=0.05, method="holm")
    found = holm(lambda i, level: p_values[i] <= level, len(p_values), 0.05)
    assert found == frozenset(np.flatnonzero(expected).tolist())


def test_holm_of_nothing() -> None:
    assert holm(lambda i, level: True, 0, 0.05) == frozenset()
