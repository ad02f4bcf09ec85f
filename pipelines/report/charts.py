"""The page's charts as numbers for charts.html.jinja: lengths and places in percent, shades, points of a line.

Bars, ranges and matrices are HTML tables; only the training curves are drawings, in the units of their SVG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .similarity import shades, spread

LONGEST_WHISKER = 2.5
"""of the longest bar's length; a longer whisker is cut, because it would make the bars invisible"""

_LOSSES = (
    ("loss_bn", "BatchNorm statistics (L_bn)"),
    ("loss_ce", "class (L_ce)"),
    ("loss_kd", "student (L_kd)"),
)


class Bar(NamedTuple):
    """A row: its name, the bar's length in any unit, the numbers beside it, where a whisker ends, and the colour."""

    name: str
    value: float
    texts: tuple[str, ...]
    end: float | None = None
    series: int = 1


def bars(rows: Sequence[Bar]) -> list[dict[str, Any]]:
    """Lengths in percent of the longest row; a whisker that is cut is marked as such."""
    longest = max((row.value for row in rows), default=0.0)
    reach = max([longest, *(row.end for row in rows if row.end is not None)]) or 1.0
    reach = min(reach, LONGEST_WHISKER * longest or reach)
    return [
        {
            "name": row.name,
            "texts": row.texts,
            "series": row.series,
            "length": _percent(max(row.value, 0.0) / reach),
            "whisker": None if row.end is None else _percent((min(row.end, reach) - row.value) / reach),
            "cut": row.end is not None and row.end > reach,
        }
        for row in rows
    ]


def ranges(rows: Sequence[tuple[str, tuple[float, float]]]) -> dict[str, Any]:
    """Intervals on one scale, which includes zero: where each begins, how long it is, and where zero is, in percent."""
    least = min([0.0, *(low for _, (low, _) in rows)])
    scale = (max([0.0, *(high for _, (_, high) in rows)]) - least) or 1.0

    def placed(name: str, low: float, high: float) -> dict[str, Any]:
        start, length = _percent((low - least) / scale), _percent((high - low) / scale)
        return {"name": name, "low": low, "high": high, "start": start, "length": length}

    return {"zero": _percent(-least / scale), "rows": [placed(name, low, high) for name, (low, high) in rows]}


class Matrix(NamedTuple):
    """A square table of classes; a cell is (kind, shade from 0 to 1, number), its kind "right", "wrong" or "close"."""

    names: Sequence[str]
    rows: list[list[tuple[str, float, str] | None]]
    summary: str


def similarity(cosines: np.ndarray, classes: Sequence[str]) -> Matrix:
    """Cosine similarity of class embeddings (K, K): the closer two classes, the stronger the colour."""
    strength, side = shades(cosines), range(len(classes))

    def cell(row: int, column: int) -> tuple[str, float, str] | None:
        # A small cell has no room for the zero before the decimals.
        number = f"{cosines[row, column]:.2f}".replace("0.", ".", 1).replace("-", "−")
        return None if row == column else ("close", round(float(strength[row, column]), 2), number)

    low, high = spread(cosines)
    summary = f"Cosine similarity of {len(classes)} class names, from {low:.2f} (pale) to {high:.2f} (full)."
    return Matrix(classes, [[cell(row, column) for column in side] for row in side], summary)


def confusion(counts: np.ndarray, classes: Sequence[str], of: str) -> Matrix:
    """Answers (columns) by truth (rows); the larger the share of its row, the stronger the colour.

    Args:
        counts: (K, K), images.
        classes: K names.
        of: whose answers, for the summary.
    """
    share, side = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), range(len(classes))
    # Mistakes are few: the most frequent one gets the full colour.
    worst = share.max(where=~np.eye(len(classes), dtype=bool), initial=1e-9)

    def cell(row: int, column: int) -> tuple[str, float, str] | None:
        kind, most = ("right", 1.0) if row == column else ("wrong", worst)
        images = int(counts[row, column])
        return (kind, round(float(share[row, column] / most), 2), f"{images}") if images else None

    summary = f"Confusion of {of}: {int(np.trace(counts))} of {int(counts.sum())} images on the diagonal."
    return Matrix(classes, [[cell(row, column) for column in side] for row in side], summary)


class Curves(NamedTuple):
    """Lines over epochs or time: label and points of each, ticks as places and texts, and all of it in a sentence."""

    lines: list[tuple[str, list[tuple[float, float]]]]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    summary: str
    unit: str = "epoch"
    width: int = 400
    height: int = 200
    left: int = 44  # of the plot, as right, top and bottom
    right: int = 390
    top: int = 8
    bottom: int = 158


def losses(metrics: Sequence[Mapping[str, Any]]) -> Curves | None:
    """The losses over the epochs on a logarithmic axis; None where none has a place there.

    Args:
        metrics: the lines of metrics.jsonl.
    """
    series = {
        label: [(line["epoch"], line[key]) for line in metrics if 0 < (line.get(key) or 0) < math.inf]
        for key, label in _LOSSES
    }
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    powers = [math.log10(value) for points in series.values() for _, value in points]
    bottom = math.floor(min(powers))
    decades = max(math.ceil(max(powers)) - bottom, 1)
    step = math.ceil(decades / 5)
    ticks = [float(f"1e{bottom + step * number}") for number in range(math.ceil(decades / step) + 1)]
    last = ", ".join(f"{label} {points[-1][1]:.3g}" for label, points in series.items())
    return _curves(series, ticks, math.log10, f"Losses over {len(metrics)} epochs; at the end: {last}.")


def agreement(metrics: Sequence[Mapping[str, Any]]) -> Curves | None:
    """Agreement with the teacher on the synthetic hold-out over time, %; None where it was not measured."""
    seconds, points = 0.0, []
    for line in metrics:
        seconds += line.get("seconds", 0.0)
        if line.get("phase") == "distill":
            points.append((seconds, 100 * line["agreement"]))
    if not points:
        return None
    unit, per = next((time for time in _TIMES if seconds >= 2 * time[1]), _TIMES[-1])
    points = [(round(time / per, 3), value) for time, value in points]
    values = [value for _, value in points]
    high = max(math.ceil(max(values)), 1)
    low = min(math.floor(min(values)), high - 1)
    summary = (
        f"Agreement of student and teacher on synthetic hold-out images over {seconds / per:.3g} {unit} of "
        f"distillation, from {values[0]:.1f} % to {values[-1]:.1f} %."
    )
    return _curves({"agreement": points}, [low, (low + high) / 2, high], float, summary, unit)


_TIMES = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
"""units of the time axis in seconds, longest first; the first that the run took twice is used"""


def _curves(
    series: Mapping[str, list[tuple[float, float]]],
    up: list[float],
    scale: Callable[[float], float],
    summary: str,
    unit: str = "epoch",
) -> Curves:
    epochs = [epoch for points in series.values() for epoch, _ in points]
    first, last = min(epochs), max(epochs)
    middle = (first + last) // 2 if unit == "epoch" else (first + last) / 2
    low, high = scale(up[0]), scale(up[-1])
    box = Curves._field_defaults

    def x(epoch: float) -> float:
        return round(box["left"] + (box["right"] - box["left"]) * (epoch - first) / (last - first or 1), 1)

    def y(value: float) -> float:
        return round(box["bottom"] - (box["bottom"] - box["top"]) * (scale(value) - low) / (high - low), 1)

    return Curves(
        [(label, [(x(epoch), y(value)) for epoch, value in points]) for label, points in series.items()],
        [(x(epoch), f"{epoch:.3g}" if unit != "epoch" else f"{epoch}") for epoch in sorted({first, middle, last})],
        [(y(tick), f"{tick:g}") for tick in up],
        summary,
        unit,
    )


def _percent(share: float) -> float:
    return round(100 * share, 2)
