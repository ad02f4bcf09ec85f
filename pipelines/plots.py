"""Plots for the report, as inline SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from typing import Any

from nayer_edge.errors import missing_extra

_SERIES = (("loss_bn", "L_bn"), ("loss_ce", "L_ce"), ("loss_kd", "L_kd"))


def curves(metrics: list[dict[str, Any]]) -> str:
    """Losses (logarithmic) and agreement over the epochs, as SVG text.

    Args:
        metrics: the lines of metrics.jsonl.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "cpu", "Drawing plots") from error
    # Text stays text, and identifiers do not vary: equal runs give equal pages.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nayer-edge", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 2.8))
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2)
        for key, label in _SERIES:
            points = [(line["epoch"], line[key]) for line in metrics if line[key] is not None and line[key] > 0]
            if points:
                left.plot(*zip(*points, strict=True), label=label)
        left.set_yscale("log")
        left.set_xlabel("epoch")
        left.set_title("losses", fontsize=10)
        left.legend(frameon=False, fontsize=8)
        measured = [line for line in metrics if line["phase"] == "distill"]
        right.plot([line["epoch"] for line in measured], [100 * line["agreement"] for line in measured])
        right.set_xlabel("epoch")
        right.set_title("agreement with the teacher, synthetic hold-out, %", fontsize=10)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.patch.set_visible(False)
        figure.patch.set_visible(False)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Black becomes the page's own text colour, in both themes.
    svg = svg.replace("#000000", "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
