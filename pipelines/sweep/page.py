"""`sweep.html`: one self-contained page about a sweep, in the style of the report.

Its two drawings place every student by what it costs (latency, size) and how good it is, with the limits of the policy
and the Pareto front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nayer_edge import __version__
from nayer_edge.storage.files import write_bytes

from ..gate.judgement import FP32
from ..gate.wording import milliseconds, size
from ..recipes.policy import Policy
from ..report.page import template
from .halving import pareto
from .record import Sweep
from .results import advice, quality

TEMPLATE = "sweep.html.jinja"
_MARGIN = 0.06
"""of a drawing's axes beyond the outermost points"""


class Point(NamedTuple):
    """An artifact in a drawing, in the units of its SVG; `low` and `high` are the ends of its interval."""

    label: str
    series: int
    x: float
    y: float
    low: float
    high: float
    passes: bool
    artifact: str


class Scatter(NamedTuple):
    """Artifacts by cost (across, logarithmic) and quality (up, %), with limits and the Pareto front."""

    points: list[Point]
    front: list[tuple[float, float]]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    limit_x: float | None
    limit_y: float | None
    unit: str
    summary: str
    width: int = 480
    height: int = 300
    left: int = 48  # of the plot, as right, top and bottom
    right: int = 470
    top: int = 10
    bottom: int = 250


class Spot(NamedTuple):
    """An artifact before it is placed: its student, which series, its cost, its quality with bounds, and its name."""

    model: str
    series: int
    cost: float
    value: float
    low: float
    high: float
    passes: bool
    artifact: str


def write_page(sweep: Sweep, policy: Policy, path: Path) -> None:
    """Writes the page.

    Raises:
        MissingError: jinja2 is not installed.
    """
    write_bytes(path, render(sweep, policy).encode())


def render(sweep: Sweep, policy: Policy) -> str:
    """The page as HTML; every text in it is escaped and inert. Equal records give equal pages."""
    lowest = least_quality(sweep, policy)
    latency = scatter(_spots(sweep, "p95_ms"), policy.latency.max_p95_ms, lowest, milliseconds, "ms")
    limit = policy.size.max_bytes
    bytes_ = scatter(_spots(sweep, "size_bytes"), limit and float(limit), lowest, lambda b: size(round(b)), "file size")
    return template(TEMPLATE, "nayer_edge.pipelines.sweep").render(
        sweep=sweep,
        policy=policy,
        drawings=[
            (title, drawing)
            for title, drawing in (
                ("Quality against latency: 95th percentile at batch 1", latency),
                ("Quality against file size", bytes_),
            )
            if drawing is not None
        ],
        quality=quality,
        advice=advice,
        lowest=lowest,
        synthetic=sweep.kind == "synthetic",
        version=__version__,
    )


def least_quality(sweep: Sweep, policy: Policy) -> float | None:
    """The accuracy, or agreement on synthetic images, below which the policy lets no artifact pass; None: no limit."""
    limits = []
    drop = policy.accuracy.max_drop_vs_teacher
    if drop is not None:
        if sweep.kind == "holdout" and sweep.teacher_accuracy is not None:
            limits.append(sweep.teacher_accuracy - drop)
        elif sweep.kind == "synthetic":
            limits.append(1 - drop)
    if sweep.kind == "synthetic" and policy.agreement.min is not None:
        limits.append(policy.agreement.min)
    return max(limits, default=None)


def scatter(
    spots: Sequence[Spot], limit_x: float | None, limit_y: float | None, written: Callable[[float], str], unit: str
) -> Scatter | None:
    """Places artifacts in a drawing; None where there are none.

    Args:
        limit_x, limit_y: limits of the policy, in the units of cost and quality.
        written: cost → text of a tick.
    """
    if not spots:
        return None
    box = Scatter._field_defaults
    costs = [spot.cost for spot in spots] + ([limit_x] if limit_x else [])
    rates = [rate for spot in spots for rate in (spot.low, spot.high)] + ([limit_y] if limit_y is not None else [])
    left, right = math.log10(min(costs)), math.log10(max(costs))
    low, high = min(rates), max(rates)
    wide, tall = (right - left) or 0.1, (high - low) or 0.01
    left, right = left - _MARGIN * wide, right + _MARGIN * wide
    low, high = max(0.0, low - _MARGIN * tall), min(1.0, high + _MARGIN * tall)

    def x(cost: float) -> float:
        return round(box["left"] + (box["right"] - box["left"]) * (math.log10(cost) - left) / (right - left), 1)

    def y(rate: float) -> float:
        return round(box["bottom"] - (box["bottom"] - box["top"]) * (rate - low) / (high - low), 1)

    points = [
        Point(s.model, s.series, x(s.cost), y(s.value), y(s.low), y(s.high), s.passes, s.artifact)
        for s in sorted(spots, key=lambda s: (s.cost, s.model))
    ]
    names = {f"{number}": spot for number, spot in enumerate(spots)}
    front = [names[name] for name in pareto({name: (spot.cost, spot.value) for name, spot in names.items()})]
    ticks = sorted({min(spot.cost for spot in spots), max(spot.cost for spot in spots)})
    rows = [low + (high - low) * part for part in (0.05, 0.5, 0.95)]
    words = "; ".join(f"{s.model} {100 * s.value:.1f} % at {written(s.cost)} {unit}" for s in front)
    return Scatter(
        points,
        [(x(spot.cost), y(spot.value)) for spot in front],
        [(x(tick), written(tick)) for tick in ticks],
        [(y(row), f"{100 * row:.1f}") for row in rows],
        None if not limit_x else x(limit_x),
        None if limit_y is None else y(limit_y),
        unit,
        f"{len(points)} artifacts. On the Pareto front: {words}.",
    )


def _spots(sweep: Sweep, cost: str) -> list[Spot]:
    """FP32 (series 1), and INT8 and what the policy names (series 2), of every student that has been measured."""
    found = []
    for student in sweep.students:
        for artifact in student.artifacts:
            named = artifact.verdict is not None
            rate, paid = quality(artifact), getattr(artifact, cost)
            if not (named or artifact.name == FP32 or artifact.name.startswith("int8")) or rate is None or not paid:
                continue
            series, passes = 1 if artifact.name == FP32 else 2, named and not student.missed
            found.append(
                Spot(student.model, series, float(paid), rate.value, rate.low, rate.high, passes, artifact.name)
            )
    return found
