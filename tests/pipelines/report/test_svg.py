"""Plots as SVG: the page's colours, any text, equal bytes, and bars as long as their numbers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from nayer_edge.pipelines.report import plots
from nayer_edge.pipelines.report.plots import Bar
from nayer_edge.pipelines.report.svg import drawing, shortened

SVG = "{http://www.w3.org/2000/svg}"
TEXTS = [
    "猫",
    "🎱",
    "$x_2$",
    "$\\frac{",
    "\x1b[2J",
    "a\nb",
    "%s",
    "x" * 1000,
    "",
    "שש",
    "zwölf",
    "a\u0301" * 40,
    "<b>&",
    "Zq0000n",
]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    """Warnings are errors here, so a character that matplotlib's font lacks must not reach it."""
    svg = plots.bars([Bar(text, 1.0, "one"), Bar("other", 2.0, "two")], "Bars")
    shown = texts(svg)
    harmless = re.sub("[\x00-\x1f]", "\ufffd", text)
    assert (shortened(harmless, 24) in shown) or text == ""
    assert "other" in shown
    assert "\x1b" not in svg


@pytest.mark.parametrize(
    ("text", "shown"), [("abcdef", "abc…"), ("abcd", "abcd"), ("猫猫猫", "猫…"), ("a\u0301" * 4, "a\u0301" * 4)]
)
def test_texts_are_cut_by_their_width(text: str, shown: str) -> None:
    assert shortened(text, 4) == shown


def test_equal_plots_are_equal_bytes_and_different_ones_share_no_name() -> None:
    one = [plots.bars([Bar("a", value, "1")], "Bars") for value in (1.0, 1.0, 2.0)]
    assert one[0] == one[1]
    metrics = [{"epoch": n, "phase": "distill", "agreement": 0.1 * n, "loss_bn": n, "loss_kd": None} for n in (1, 2, 3)]
    names = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (plots.losses(metrics), plots.agreement(metrics))]
    assert all(names)
    assert not names[0] & names[1]


def test_every_colour_is_the_page_s() -> None:
    counts = np.array([[5, 1], [0, 4]])
    for svg in (
        plots.bars([Bar("a", 1.0, "1", end=2.0, series=number) for number in range(4)], "Bars"),
        plots.similarity(np.array([[1.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 1.0]]), ["a", "b", "c"]),
        plots.confusion(counts, ["a", "b"], "x", "label"),
        plots.intervals(["t"], [(-1.0, 2.0)], "Ranges"),
    ):
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
        assert "var(--" in svg
        assert "<style" not in svg, "it would be the whole page's"
        assert "font-family" not in svg


def lengths(svg: str) -> list[float]:
    """Widths of the bars, in the order drawn."""
    found = []
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        if "series" in path.get("style", "") and "clip-path" in path.attrib:
            xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path.get("d", ""))]
            found.append(max(xs) - min(xs))
    return found


def test_bars_are_as_long_as_their_numbers() -> None:
    shown = lengths(plots.bars([Bar("a", 1.0, "1"), Bar("b", 3.0, "3"), Bar("c", 0.0, "0")], "Bars"))
    assert shown[1] == pytest.approx(3 * shown[0], abs=0.1)
    assert shown[2] == pytest.approx(0, abs=0.02)


def test_a_long_whisker_leaves_room_for_the_bars() -> None:
    rows = [Bar("a", 1.0, "1, p95 500", end=500.0), Bar("b", 2.0, "2", end=2.1)]
    width = float(ET.fromstring(plots.bars(rows, "Bars")).get("viewBox", "").split()[2])
    assert lengths(plots.bars(rows, "Bars"))[1] > width / 6


def test_a_confusion_matrix_shows_its_counts_where_they_fit() -> None:
    counts = np.diag([7, 8, 9]) + np.array([[0, 3, 0], [0, 0, 0], [0, 0, 0]])
    svg = plots.confusion(counts, ["a", "b", "c"], "student", "label")
    assert sorted(text for text in texts(svg) if text.isdigit()) == ["3", "7", "8", "9"]
    assert len(re.findall(r"fill: var\(--good\)", svg)) == 3
    assert len(re.findall(r"fill: var\(--fail\)", svg)) == 1
    assert "24 of 27 images on the diagonal" in svg
    many = plots.confusion(np.eye(13, dtype=int), [f"c{n}" for n in range(13)], "student", "label")
    assert not [text for text in texts(many) if text.isdigit()]


def test_the_closest_classes_are_the_fullest() -> None:
    cosines = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.5], [0.1, 0.5, 1.0]])
    svg = plots.similarity(cosines, ["a", "b", "c"])
    opacity = [float(value) for value in re.findall(r"fill-opacity: ([\d.]+)", svg)]
    assert len(opacity) == 9
    assert opacity[1] == opacity[3] == max(opacity)
    assert opacity[2] == opacity[6] == min(opacity)


def test_nothing_to_draw_is_nothing() -> None:
    assert plots.losses([]) == plots.agreement([]) == ""
    assert plots.agreement([{"epoch": 1, "phase": "warmup", "agreement": 0.0}]) == ""


def test_a_drawing_has_an_alternative_and_no_fixed_size() -> None:
    with drawing(1.0) as draw:
        svg = draw.svg('a "b" <c>')
    root = ET.fromstring(svg)
    assert root.get("aria-label") == 'a "b" <c>'
    assert root.get("role") == "img"
    assert root.get("width") is root.get("height") is None
