"""The report's plots. Each takes numbers and returns inline SVG (svg.py); names from outside are cut and escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .svg import BAD, GOOD, LINE, SERIES, SOFT, WIDTH, Drawing, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COUNTED = 12
"""classes up to which a confusion matrix has room for its counts"""
_WIDE = 20
"""classes from which a matrix needs more than a phone's width; the page lets it scroll there"""
_ROW = 0.24
"""inches between horizontal bars"""

_LOSSES = (
    ("loss_bn", "BatchNorm statistics (L_bn)"),
    ("loss_ce", "class (L_ce)"),
    ("loss_kd", "student (L_kd)"),
)
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Bar:
    """One horizontal bar.

    Attributes:
        name: what stands before it.
        value: its length.
        label: what stands behind it.
        end: of a whisker from `value`, or None.
        series: which of the page's four colours.
    """

    name: str
    value: float
    label: str
    end: float | None = None
    series: int = 0


def losses(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The losses over the epochs, on a logarithmic axis; "" where none is positive.

    Args:
        metrics: the lines of metrics.jsonl.
    """
    series = {}
    for key, label in _LOSSES:
        points = [(line["epoch"], line[key]) for line in metrics if line.get(key) is not None and line[key] > 0]
        if points:
            series[label] = points
    if not series:
        return ""
    with drawing(2.5) as draw:
        axis = draw.figure.subplots()
        for number, (label, points) in enumerate(series.items()):
            axis.plot(*zip(*points, strict=True), _DASHES[number], color=SERIES[number], label=label, **_marks(points))
        axis.set_yscale("log")
        # Plain numbers: the usual exponents are formulas, which SVG text cannot show.
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda _value, _: "")
        axis.set_xlabel("epoch")
        axis.locator_params(axis="x", integer=True)
        axis.grid(visible=True, axis="y")
        draw.figure.legend(loc="outside upper left", fontsize=8, handlelength=2.4, borderpad=0)
        last = ", ".join(f"{label} {points[-1][1]:.3g}" for label, points in series.items())
        return draw.svg(f"Losses over {len(metrics)} epochs; at the end: {last}.")


def agreement(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Agreement with the teacher on the synthetic hold-out over the epochs, %; "" where none was measured."""
    points = [(line["epoch"], 100 * line["agreement"]) for line in metrics if line.get("phase") == "distill"]
    if not points:
        return ""
    with drawing(2.5) as draw:
        axis = draw.figure.subplots()
        axis.plot(*zip(*points, strict=True), color=SERIES[0], **_marks(points))
        axis.set_xlabel("epoch")
        axis.set_ylabel("% of synthetic images")
        axis.locator_params(axis="x", integer=True)
        axis.grid(visible=True, axis="y")
        return draw.svg(
            f"Agreement of student and teacher on synthetic hold-out images over the epochs, from {points[0][1]:.1f} % "
            f"to {points[-1][1]:.1f} %."
        )


def bars(rows: Sequence[Bar], alternative: str) -> str:
    """Horizontal bars from zero, the value written behind each; at least one."""
    with drawing(0.15 + _ROW * len(rows)) as draw:
        axis = draw.figure.subplots()
        reach = max([*(row.value for row in rows), *(row.end or 0 for row in rows)]) or 1.0
        # One long whisker must not make the bars invisible: it is cut, and its end stands in the writing.
        reach = min(reach, 2.5 * max(row.value for row in rows) or reach)
        for place, row in enumerate(rows):
            axis.barh(place, row.value, height=0.62, color=SERIES[row.series])
            end = min(row.end or row.value, reach)
            if row.end is not None:
                axis.plot([row.value, end], [place, place], color=SOFT, linewidth=1.2)
                axis.plot([end], [place], "|" if end == row.end else ">", color=SOFT, markersize=5)
            axis.text(end + 0.03 * reach, place, draw.text(row.label, 28), va="center")
        # Room for the writing behind the longest bar.
        axis.set_xlim(0, reach * (1 + 0.035 * max((len(row.label) for row in rows), default=0)))
        _named_rows(draw, axis, [row.name for row in rows], 24)
        axis.xaxis.set_visible(False)
        axis.spines.bottom.set_visible(False)
        return draw.svg(f"{alternative}: {', '.join(f'{row.name} {row.label}' for row in rows)}.")


def intervals(names: Sequence[str], ranges: Sequence[tuple[float, float]], alternative: str) -> str:
    """One horizontal line from low to high per name, and where zero is."""
    with drawing(0.5 + 0.17 * len(names)) as draw:
        axis = draw.figure.subplots()
        for place, (low, high) in enumerate(ranges):
            axis.plot([low, high], [place, place], color=SERIES[0], linewidth=4, solid_capstyle="butt")
        axis.axvline(0, color=SOFT, linewidth=0.8)
        axis.grid(visible=True, axis="x")
        axis.set_xlabel("activation")
        _named_rows(draw, axis, names, 24, size=7.5)
        return draw.svg(alternative)


def similarity(values: np.ndarray, classes: Sequence[str]) -> str:
    """Cosine similarity of class embeddings, the stronger the colour the closer.

    Args:
        values: (K, K), cosines.
        classes: K names.
    """
    side = len(classes)
    others = values[~np.eye(side, dtype=bool)]
    low, high = float(others.min()), float(others.max())
    strength = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    np.fill_diagonal(strength, 0.0)
    with _matrix(side) as draw:
        axis = draw.figure.subplots()
        _cells(axis, 0.05 + 0.9 * strength, SERIES[0])
        _diagonal(axis, side)
        _named_matrix(draw, axis, classes)
        return draw.svg(
            f"Cosine similarity of the embeddings of {side} class names, from {low:.2f} (pale) to {high:.2f} (full)."
        )


def confusion(counts: np.ndarray, classes: Sequence[str], what: str, truth: str) -> str:
    """Answers (columns) by truth (rows): right ones on the diagonal, wrong ones in the colour of a failure.

    Args:
        counts: (K, K), images.
        classes: K names.
        what: whose answers, for the alternative text.
        truth: what the rows are, for example "label".
    """
    side = len(classes)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = np.eye(side, dtype=bool)
    wrong = np.where(right, 0.0, share)
    worst = max(float(wrong.max()), 1e-9)
    with _matrix(side) as draw:
        axis = draw.figure.subplots()
        _cells(axis, np.where(right, 0.1 + 0.35 * share, 0.0), GOOD)
        _cells(axis, np.where(wrong > 0, 0.2 + 0.35 * wrong / worst, 0.0), BAD)
        if side <= COUNTED:
            for row, column in zip(*np.nonzero(counts), strict=True):
                axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8)
        _named_matrix(draw, axis, classes)
        axis.set_xlabel("answer")
        axis.set_ylabel(truth)
        total, hits = int(counts.sum()), int(np.trace(counts))
        return draw.svg(f"Confusion matrix of {what}: {hits} of {total} images on the diagonal.")


def _marks(points: Sequence[object]) -> dict[str, Any]:
    """A line of few points shows them."""
    return {"marker": "o", "markersize": 3} if len(points) <= 12 else {}


def _matrix(side: int) -> Any:
    width = WIDTH if side <= _WIDE else 2 * WIDTH
    return drawing(width * 0.98, width=width)


def _cells(axis: Axes, opacity: np.ndarray, colour: str) -> None:
    """Squares of one colour, each with its opacity; none where it is zero."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    rows, columns = np.nonzero(opacity)
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    squares = np.stack([columns, rows], axis=1)[:, None, :] + corners
    # Steps of a twentieth: nobody sees more, and the file is smaller.
    shades = [(*to_rgba(colour)[:3], round(float(opacity[r, c]) * 20) / 20) for r, c in zip(rows, columns, strict=True)]
    axis.add_collection(PolyCollection(list(squares), facecolors=shades, edgecolors="none"))


def _diagonal(axis: Axes, side: int) -> None:
    axis.plot([-0.5, side - 0.5], [-0.5, side - 0.5], color=LINE, linewidth=0.8)


def _named_matrix(draw: Drawing, axis: Axes, classes: Sequence[str]) -> None:
    side = len(classes)
    size, longest = (8.5, 14) if side <= COUNTED else (7, 14) if side <= _WIDE else (7.5, 22)
    names = [draw.text(name, longest) for name in classes]
    axis.set_xticks(range(side), names, rotation=90, rotation_mode="anchor", ha="right", va="center")
    axis.set_yticks(range(side), names)
    axis.tick_params(length=0, labelsize=size)
    axis.set_xlim(-0.5, side - 0.5)
    axis.set_ylim(side - 0.5, -0.5)
    axis.set_aspect("equal")
    axis.spines[["left", "bottom"]].set_visible(False)


def _named_rows(draw: Drawing, axis: Axes, names: Sequence[str], longest: int, size: float = 8.5) -> None:
    axis.set_yticks(range(len(names)), [draw.text(name, longest) for name in names])
    axis.tick_params(axis="y", length=0, labelsize=size)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.spines.left.set_visible(False)
