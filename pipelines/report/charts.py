"""The page's charts as numbers for its template: lengths and places in percent, shades, points of a line.

Bars, ranges and matrices are HTML tables; only the training curves are drawings, in the units of their SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .similarity import shades, spread

NUMBERED = 12
"""classes up to which the cells of a matrix have room for their numbers"""
NAME = 14
"""characters of a class name that a matrix has room for"""
LONGEST_WHISKER = 2.5
"""of the longest bar's length; a longer whisker is cut, because it would make the bars invisible"""
MOST_TICKS = 6
MARKED = 12
"""points up to which a line shows each of them"""

_LOSSES = (
    ("loss_bn", "BatchNorm statistics (L_bn)"),
    ("loss_ce", "class (L_ce)"),
    ("loss_kd", "student (L_kd)"),
)


@dataclass(frozen=True)
class Bar:
    """One bar of a chart.

    Attributes:
        name: the row's name.
        value: the bar's length, in any unit.
        texts: the numbers beside it.
        end: of a whisker that begins at `value`.
        series: which of the page's three colours, from 1.
    """

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
    return {
        "zero": _percent(-least / scale),
        "rows": [
            {
                "name": name,
                "low": low,
                "high": high,
                "start": _percent((low - least) / scale),
                "length": _percent((high - low) / scale),
            }
            for name, (low, high) in rows
        ],
    }


@dataclass(frozen=True)
class Matrix:
    """A square table of classes.

    Attributes:
        names: of the rows, and of the columns.
        rows: a cell is its kind ("right", "wrong", "close" or ""), its shade from 0 to 1, and its number as text.
        summary: what it shows, in a sentence.
    """

    names: tuple[str, ...]
    rows: list[list[tuple[str, float, str]]]
    summary: str

    @property
    def numbered(self) -> bool:
        """There is room for numbers in the cells."""
        return len(self.names) <= NUMBERED

    @property
    def longest(self) -> int:
        """Characters of the longest name, as far as names are shown."""
        return min(max(len(name) for name in self.names), NAME)


def similarity(cosines: np.ndarray, classes: Sequence[str]) -> Matrix:
    """Cosine similarity of class embeddings: the closer, the fuller.

    Args:
        cosines: (K, K).
        classes: K names.
    """
    strength = shades(cosines)
    rows = [
        [
            ("", 0.0, "") if row == column else ("close", _two(strength[row, column]), _short(cosines[row, column]))
            for column in range(len(classes))
        ]
        for row in range(len(classes))
    ]
    low, high = spread(cosines)
    summary = f"Cosine similarity of {len(classes)} class names, from {low:.2f} (pale) to {high:.2f} (full)."
    return Matrix(tuple(classes), rows, summary)


def confusion(counts: np.ndarray, classes: Sequence[str], of: str) -> Matrix:
    """Answers (columns) by truth (rows); the more of a row's images, the fuller.

    Args:
        counts: (K, K), images.
        classes: K names.
        of: whose answers, for the summary.
    """
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Mistakes are few: the most frequent one gets the full colour.
    worst = max(float(share[~np.eye(len(classes), dtype=bool)].max(initial=0.0)), 1e-9)

    def cell(row: int, column: int) -> tuple[str, float, str]:
        images = int(counts[row, column])
        if images == 0:
            return "", 0.0, ""
        if row == column:
            return "right", _two(share[row, column]), f"{images}"
        return "wrong", _two(share[row, column] / worst), f"{images}"

    side = range(len(classes))
    summary = f"Confusion of {of}: {int(np.trace(counts))} of {int(counts.sum())} images on the diagonal."
    return Matrix(tuple(classes), [[cell(row, column) for column in side] for row in side], summary)


@dataclass(frozen=True)
class Line:
    """One line of a drawing.

    Attributes:
        label: what it shows.
        points: (x, y) each.
        marked: each point is shown.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    marked: bool


@dataclass(frozen=True)
class Curves:
    """Lines over the epochs.

    Attributes:
        across, up: places of the ticks, and their texts.
        summary: what they show, in a sentence.
    """

    width, height = 400, 200
    left, right, top, bottom = 44, 390, 8, 158  # of the plot, inside the drawing

    lines: tuple[Line, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    summary: str


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
    last = ", ".join(f"{label} {points[-1][1]:.3g}" for label, points in series.items())
    values = [value for points in series.values() for _, value in points]
    ticks = _logarithmic_ticks(min(values), max(values))
    return _curves(series, ticks, math.log10, f"Losses over {len(metrics)} epochs; at the end: {last}.")


def agreement(metrics: Sequence[Mapping[str, Any]]) -> Curves | None:
    """Agreement with the teacher on the synthetic hold-out over the epochs, %; None where it was not measured."""
    points = [(line["epoch"], 100 * line["agreement"]) for line in metrics if line.get("phase") == "distill"]
    if not points:
        return None
    values = [value for _, value in points]
    summary = (
        f"Agreement of student and teacher on synthetic hold-out images over the epochs, from {values[0]:.1f} % "
        f"to {values[-1]:.1f} %."
    )
    # At least one point high: a constant line has a scale, too.
    ticks = _ticks(min(*values, max(values) - 1), max(values))
    return _curves({"agreement": points}, ticks, float, summary)


def _curves(series: Mapping[str, Sequence[tuple[float, float]]], up: list[float], scale: Any, summary: str) -> Curves:
    epochs = [epoch for points in series.values() for epoch, _ in points]
    first, last = min(epochs), max(epochs)
    across = [tick for tick in _ticks(first, last, whole=True) if first <= tick <= last]
    low, high = scale(up[0]), scale(up[-1])

    def x(epoch: float) -> float:
        share = (epoch - first) / (last - first) if last > first else 0.5
        return round(Curves.left + (Curves.right - Curves.left) * share, 1)

    def y(value: float) -> float:
        return round(Curves.bottom - (Curves.bottom - Curves.top) * (scale(value) - low) / (high - low), 1)

    lines = tuple(
        Line(label, tuple((x(epoch), y(value)) for epoch, value in points), len(points) <= MARKED)
        for label, points in series.items()
    )
    return Curves(lines, tuple((x(t), f"{t:g}") for t in across), tuple((y(t), f"{t:g}") for t in up), summary)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers that enclose the values."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9) / MOST_TICKS))
    if whole:
        step = max(step, 1.0)
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= MOST_TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 12) for number in range(first, max(last, first + 1) + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, where those are few also 2 and 5 times them; they enclose the values."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if top - bottom <= 2 else (1,)
    every = -(-(top - bottom) // MOST_TICKS) or 1
    ticks = [float(f"{factor}e{power}") for power in range(bottom, top + every, every) for factor in factors]
    start = max((place for place, tick in enumerate(ticks) if tick <= low), default=0)
    end = next((place for place, tick in enumerate(ticks) if tick >= high and place > start), len(ticks) - 1)
    return ticks[start : end + 1]


def _short(cosine: float) -> str:
    """Two decimals without the zero before them, which a small cell has no room for."""
    return f"{cosine:.2f}".replace("0.", ".", 1).replace("-", "−")


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _two(share: float) -> float:
    """Two decimals: nobody sees more, and the page is smaller."""
    return round(float(share), 2)
