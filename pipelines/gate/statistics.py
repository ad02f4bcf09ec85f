"""Paired non-inferiority statistics of the gate, in the standard library.

A reference and an artifact classify the same n images. *Lost* are the images that the reference gets right
and the artifact wrong, *gained* the opposite, and

    drop = (lost − gained) / n.

The gate needs one-sided bounds of the true drop that hold unconditionally: whatever the true rates of lost
and gained are, the probability over new images that a bound misses the true drop is at most α.

**Lower bound, and the upper bound's floor.** Clopper–Pearson bounds of the two rates at α/2 each, subtracted
(`floor_upper`, `drop_lower`). By the union bound they hold for every n and α; with typical counts their
real error is about α/2 or less.

**Upper bound** (`drop_upper`; what lets a release pass). For α in [0.001, 0.1] and n ≥ 20 the smaller of

- Clopper–Pearson's upper bound of lost/n at the full α (a drop cannot exceed the rate of lost images), and
- Tango's score bound (Statistics in Medicine 17, 1998, 891–908) with a continuity correction of one image,

as long as it lies in [0, 0.1]. Elsewhere the floor. Each of the two alone is not enough: the first ignores
what was gained; the second lets a drop that equals the limit pass in up to 6.2 % of releases at α = 5 %
(n = 10,000) without the correction, and with it asks for more images than necessary where none is lost.

That the smaller of the two keeps α is not a theorem. It was checked by exact enumeration of the trinomial
distribution (no Monte Carlo): n in {20, 50, 100, 200, 500}, α in {0.1, 0.05, 0.025, 0.01, 0.001}, 40 true
drops from 0 to 0.1 and 26 discordances from none to the largest possible each; and n in {10,000, 100,000}
with 60 drops of 0.05 to 60 images, and of 1, 3 and 10 %. The largest probability of a false pass was
0.9988 α, reached where nothing is gained and the first bound, which is exact, decides. A part of it is
repeated by tests/pipelines/gate/test_statistics.py. A correction of half an image exceeds α where n is small or
nearly all images are discordant, and every variant, including the skewness-corrected one, exceeds it for drops far
above 0.1: hence the whole image and the limits of the range.

**How many images.** If the true drop is D and nothing is ever gained, no image is lost with probability
(1 − D)ⁿ. A rule that passes such a sample at a limit D needs (1 − D)ⁿ ≤ α: for D = 0.005 and α = 0.05,
n ≥ 598. That is a bound on every valid rule, and `drop_upper` attains it. (The floor alone would ask for 736,
and raising its α after having seen that nothing was gained would need a proof of its own.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

MAX_IMAGES = 10_000_000
"""beyond this the number of images that would decide is not computed"""

_CHECKED_ALPHA = (0.001, 0.1)
_CHECKED_DROP = (0.0, 0.1)
_CHECKED_IMAGES = 20
_TINY = 1e-300


def beta_tails(x: float, a: float, b: float) -> tuple[float, float]:
    """(I_x(a, b), 1 − I_x(a, b)): both tails of the beta distribution, the smaller one to full precision.

    Continued fraction of the regularized incomplete beta function (DLMF 8.17.22), modified Lentz's method.

    Args:
        x: in [0, 1].
        a, b: positive, not necessarily whole.
    """
    if x <= 0:
        return 0.0, 1.0
    if x >= 1:
        return 1.0, 0.0
    front = math.exp(_log_front(x, a, b))
    if x < (a + 1) / (a + b + 2):
        lower = min(1.0, front * _fraction(x, a, b) / a)
        return lower, 1 - lower
    upper = min(1.0, front * _fraction(1 - x, b, a) / b)
    return 1 - upper, upper


def _log_front(x: float, a: float, b: float) -> float:
    """ln(xᵃ (1 − x)ᵇ / B(a, b)), arranged so that nothing large cancels (after Loader's binomial density)."""
    # 1 − x is exact from ½ upwards, and the difference loses nothing however unequal a and b are.
    rest = 1 - x
    excess = b * x - a * rest
    return (
        a * _log_of_ratio(x * (a + b) / a, excess / a)
        + b * _log_of_ratio(rest * (a + b) / b, -excess / b)
        + 0.5 * math.log(a / (a + b) * b / (2 * math.pi))
        + _stirling_error(a + b)
        - _stirling_error(a)
        - _stirling_error(b)
    )


def _log_of_ratio(ratio: float, excess: float) -> float:
    """ln(ratio), where excess = ratio − 1: from whichever of the two is known with more digits."""
    return math.log1p(excess) if abs(excess) < 0.5 else math.log(ratio)


def _stirling_error(x: float) -> float:
    """ln Γ(x) − ((x − ½) ln x − x + ½ ln 2π) (DLMF 5.11.1)."""
    if x < 20:
        return math.lgamma(x) - (x - 0.5) * math.log(x) + x - 0.5 * math.log(2 * math.pi)
    square = 1 / (x * x)
    return (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680))) / x


def _fraction(x: float, a: float, b: float) -> float:
    c = 1.0
    d = 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 200_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / _not_zero(1 + even * d)
        c = _not_zero(1 + even / c)
        value *= c * d
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / _not_zero(1 + odd * d)
        c = _not_zero(1 + odd / c)
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            return value
    raise ArithmeticError(f"the incomplete beta function does not converge at x={x}, a={a}, b={b}")


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _beta_quantile(alpha: float, a: float, b: float, *, upper: bool) -> float:
    """The x whose lower (or upper) tail is alpha: Newton's method on the logarithm of the tail, bracketed.

    The tails are log-concave for a, b ≥ 1, so Newton's steps converge from the tail's side; elsewhere the
    bracket takes over.
    """
    low, high = 0.0, 1.0
    mean = a / (a + b)
    spread = math.sqrt(mean * (1 - mean) / (a + b + 1)) * NormalDist().inv_cdf(1 - alpha)
    x = mean + spread if upper else mean - spread
    if not low < x < high:
        x = mean
    for _ in range(400):
        tail = beta_tails(x, a, b)[upper]
        if (tail > alpha) == upper:
            low = x
        else:
            high = x
        step = math.nan
        if tail > 0:
            log_density = _log_front(x, a, b) - math.log(x) - math.log1p(-x)
            log_tail = math.log(tail)
            exponent = log_tail - log_density
            if exponent < 700:
                step = (math.log(alpha) - log_tail) * math.exp(exponent) * (-1 if upper else 1)
        new = x + step
        if not low < new < high:
            new = (low + high) / 2
        if abs(new - x) <= 2e-16 * new or new in (low, high):
            return new
        x = new
    return x


def binomial_lower(count: float, n: float, alpha: float) -> float:
    """One-sided Clopper–Pearson lower bound of a rate, at confidence 1 − alpha.

    Args:
        count: events among n, not necessarily whole (the beta quantile interpolates).
        n: trials, at least 1.
        alpha: in (0, 1).

    Raises:
        ValueError: count is outside [0, n], or alpha outside (0, 1).
    """
    _check(count, n, alpha)
    if count == 0:
        return 0.0
    if count == n:
        return math.exp(math.log(alpha) / n)
    return _beta_quantile(alpha, count, n - count + 1, upper=False)


def binomial_upper(count: float, n: float, alpha: float) -> float:
    """One-sided Clopper–Pearson upper bound of a rate; arguments and errors as in `binomial_lower`."""
    _check(count, n, alpha)
    if count == n:
        return 1.0
    if count == 0:
        return -math.expm1(math.log(alpha) / n)
    return _beta_quantile(alpha, count + 1, n - count, upper=True)


def _check(count: float, n: float, alpha: float) -> None:
    if not (n > 0 and 0 <= count <= n):
        raise ValueError(f"{count} of {n} is not a count")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}, and must lie between 0 and 1")


def _check_pair(lost: float, gained: float, n: float, alpha: float) -> None:
    for count in (lost, gained):
        _check(count, n, alpha)
    # Rates times n may exceed n by rounding.
    if lost + gained > n * (1 + 1e-12):
        raise ValueError(f"{lost} lost and {gained} gained are more than {n} images")


def floor_upper(lost: float, gained: float, n: float, alpha: float) -> float:
    """Upper bound of the drop from two Clopper–Pearson bounds at alpha/2: valid for every n and alpha."""
    _check_pair(lost, gained, n, alpha)
    return binomial_upper(lost, n, alpha / 2) - binomial_lower(gained, n, alpha / 2)


def drop_lower(lost: float, gained: float, n: float, alpha: float) -> float:
    """One-sided lower bound of the drop at confidence 1 − alpha: the mirror image of `floor_upper`."""
    return -floor_upper(gained, lost, n, alpha)


def score_upper(lost: float, gained: float, n: float, alpha: float) -> float:
    """Tango's score upper bound of the drop with a continuity correction of one image.

    The smallest D at which (lost − gained + 1 − nD) / √(n (2q̂ + D − D²)) ≤ −z holds, where q̂ is the rate of
    gained images that is most likely if the drop is D, and z the normal quantile of 1 − alpha.
    """
    _check_pair(lost, gained, n, alpha)
    z = NormalDist().inv_cdf(1 - alpha)
    low, high = max(-1.0, (lost - gained) / n), 1.0
    for _ in range(100):
        drop = (low + high) / 2
        if drop in (low, high):
            break
        gained_rate = _restricted_rate(lost, gained, n, drop)
        spread = math.sqrt(max(0.0, n * (2 * gained_rate + drop - drop * drop)))
        if lost - gained + 1 - n * drop <= -z * spread:
            high = drop
        else:
            low = drop
    return high


def _restricted_rate(lost: float, gained: float, n: float, drop: float) -> float:
    """Maximum-likelihood rate of gained images, given that the rate of lost ones is larger by `drop`."""
    b = (2 * n - lost + gained) * drop - lost - gained
    c = -gained * drop * (1 - drop)
    root = math.sqrt(max(0.0, b * b - 8 * n * c))
    rate = (root - b) / (4 * n) if b <= 0 else -2 * c / (root + b)
    return max(rate, -drop, 0.0)


def drop_upper(lost: float, gained: float, n: float, alpha: float) -> float:
    """One-sided upper bound of the drop at confidence 1 − alpha, as the module describes it.

    Args:
        lost, gained: images, not necessarily whole.
        n: images in all.
        alpha: probability of missing the true drop, in (0, 1).

    Returns:
        A fraction in [−1, 1]. It rises with lost and falls with gained.

    Raises:
        ValueError: the counts exceed n, or alpha is outside (0, 1).
    """
    _check_pair(lost, gained, n, alpha)
    if not (_CHECKED_ALPHA[0] - 1e-12 <= alpha <= _CHECKED_ALPHA[1] + 1e-12 and n >= _CHECKED_IMAGES):
        return floor_upper(lost, gained, n, alpha)
    sharp = min(binomial_upper(lost, n, alpha), score_upper(lost, gained, n, alpha))
    if _CHECKED_DROP[0] <= sharp <= _CHECKED_DROP[1]:
        return sharp
    floor = floor_upper(lost, gained, n, alpha)
    return max(sharp, floor if sharp > 0 else min(floor, 0.0))


def images_to_decide(lost: float, gained: float, n: float, limit: float, alpha: float) -> int | None:
    """The smallest number of images that would decide `drop ≤ limit` at the observed rates.

    It would pass (upper bound ≤ limit) if the observed drop is below the limit, and fail (lower bound >
    limit) if it is above. A figure for planning: rates of new images scatter.

    Returns:
        None if the observed drop equals the limit, or more than `MAX_IMAGES` would be needed.
    """
    _check_pair(lost, gained, n, alpha)
    lost_rate, gained_rate = lost / n, gained / n
    if lost - gained < limit * n:

        def decided(images: int) -> bool:
            return drop_upper(lost_rate * images, gained_rate * images, images, alpha) <= limit

    elif lost - gained > limit * n:

        def decided(images: int) -> bool:
            return drop_lower(lost_rate * images, gained_rate * images, images, alpha) > limit

    else:
        return None
    return _first(decided)


def images_to_decide_rate(count: float, n: float, minimum: float, alpha: float) -> int | None:
    """The smallest number of images that would decide `rate ≥ minimum` at the observed rate, or None."""
    _check(count, n, alpha)
    rate = count / n
    if count > minimum * n:
        return _first(lambda images: binomial_lower(rate * images, images, alpha) >= minimum)
    if count < minimum * n:
        return _first(lambda images: binomial_upper(rate * images, images, alpha) < minimum)
    return None


def _first(decided: Callable[[int], bool]) -> int | None:
    """The smallest whole number in [1, MAX_IMAGES] from which `decided` is true: doubling, then halving."""
    high = 1
    while not decided(high):
        if high >= MAX_IMAGES:
            return None
        high = min(2 * high, MAX_IMAGES)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if decided(middle):
            high = middle
        else:
            low = middle
    return high


def holm(rejects: Callable[[int, float], bool], count: int, alpha: float) -> frozenset[int]:
    """Holm's step-down procedure: which of `count` hypotheses are rejected.

    Args:
        rejects: rejects(index, level) tests one hypothesis at a level; what it rejects at a level it must
            also reject at every larger one.
        count: how many hypotheses there are.
        alpha: family-wise error rate.
    """
    fallen: frozenset[int] = frozenset()
    while len(fallen) < count:
        level = alpha / (count - len(fallen))
        now = frozenset(index for index in range(count) if index in fallen or rejects(index, level))
        if now == fallen:
            break
        fallen = now
    return fallen
