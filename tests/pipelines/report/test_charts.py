"""Charts: lengths and places follow the numbers, shades follow the counts, ticks are round and enclose the lines."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nayer_edge.pipelines.report import charts
from nayer_edge.pipelines.report.charts import Bar


def test_bars_are_as_long_as_their_numbers() -> None:
    rows = charts.bars([Bar("a", 1.0, ("1",)), Bar("b", 3.0, ("3",)), Bar("c", 0.0, ("0",)), Bar("d", -2.0, ("−2",))])
    assert [row["length"] for row in rows] == [33.33, 100.0, 0.0, 0.0]
    assert charts.bars([Bar("a", 0.0, ("0",))])[0]["length"] == 0
    assert charts.bars([]) == []


def test_a_whisker_begins_at_its_bar() -> None:
    rows = charts.bars([Bar("a", 1.0, ("1", "2"), end=2.0), Bar("b", 1.5, ("1.5",))])
    assert [(row["length"], row["whisker"], row["cut"]) for row in rows] == [(50.0, 50.0, False), (75.0, None, False)]


def test_a_long_whisker_is_cut_and_leaves_room_for_the_bars() -> None:
    long, short = charts.bars([Bar("a", 1.0, ("1",), end=500.0), Bar("b", 2.0, ("2",), end=2.1)])
    assert (long["length"], long["whisker"], long["cut"]) == (20.0, 80.0, True)
    assert (short["length"], short["whisker"], short["cut"]) == (40.0, 2.0, False)


def test_ranges_share_a_scale_with_zero() -> None:
    found = charts.ranges([("a", (-1.0, 3.0)), ("b", (0.0, 2.0)), ("c", (1.0, 1.0))])
    assert found["zero"] == 25.0
    assert [(row["start"], row["length"]) for row in found["rows"]] == [(0.0, 100.0), (25.0, 50.0), (50.0, 0.0)]
    assert charts.ranges([("a", (2.0, 4.0))])["rows"][0]["start"] == 50.0, "zero is on the scale"
    assert charts.ranges([("a", (0.0, 0.0))])["rows"][0]["length"] == 0


def test_a_confusion_matrix_tells_right_from_wrong() -> None:
    counts = np.diag([8, 8, 10]) + np.array([[0, 2, 0], [0, 0, 1], [0, 0, 0]])
    matrix = charts.confusion(counts, ["a", "b", "c"], "student on hold-out images")
    assert matrix.rows[0] == [("right", 0.8, "8"), ("wrong", 1.0, "2"), None]
    assert matrix.rows[1][2] == ("wrong", 0.56, "1"), "1 of 9 beside the worst, 2 of 10"
    assert matrix.summary == "Confusion of student on hold-out images: 26 of 29 images on the diagonal."
    empty = charts.confusion(np.zeros((2, 2), int), ["a", "b"], "x")
    assert empty.rows == [[None] * 2] * 2


def test_the_closest_classes_are_the_fullest() -> None:
    cosines = np.array([[1.0, 0.9, -0.1], [0.9, 1.0, 0.4], [-0.1, 0.4, 1.0]])
    matrix = charts.similarity(cosines, ["a", "b", "c"])
    assert matrix.rows[0] == [None, ("close", 1.0, ".90"), ("close", 0.0, "−.10")]
    assert matrix.rows[1][2] == ("close", 0.5, ".40")
    assert "from -0.10 (pale) to 0.90 (full)" in matrix.summary
    assert cosines[0, 0] == 1.0, "the numbers of the caller stay"
    equal = charts.similarity(np.ones((2, 2)), ["a", "b"])
    assert equal.rows[0][1] == ("close", 0.0, "1.00")


def epochs(**values: list[float | None]) -> list[dict[str, object]]:
    count = len(next(iter(values.values())))
    return [
        {"epoch": n + 1, "phase": "distill", "seconds": 1.0, **{key: found[n] for key, found in values.items()}}
        for n in range(count)
    ]


def test_losses_are_drawn_on_a_logarithmic_scale() -> None:
    found = charts.losses(epochs(loss_bn=[100.0, 10.0, 1.0], loss_ce=[0.0, 10.0, None], loss_kd=[None, None, math.inf]))
    assert found is not None
    (_, batchnorm), (_, cross_entropy) = found.lines
    assert [x for x, _ in batchnorm] == [found.left, (found.left + found.right) / 2, found.right]
    assert [y for _, y in batchnorm] == [found.top, (found.top + found.bottom) / 2, found.bottom]
    assert [text for _, text in found.up] == ["1", "10", "100"]
    assert cross_entropy == [batchnorm[1]], "neither zero, null nor infinity has a place on it"
    assert "BatchNorm statistics (L_bn) 1" in found.summary


def test_agreement_is_drawn_where_it_was_measured() -> None:
    metrics = [{"epoch": 1, "phase": "warmup", "agreement": 0.0}, *epochs(agreement=[0.5, 0.75, 1.0])[1:]]
    for line, seconds in zip(metrics, (100, 50, 90), strict=True):
        line["seconds"] = seconds
    found = charts.agreement(metrics)
    assert found is not None
    assert found.unit == "minutes"
    assert [text for _, text in found.across] == ["2.5", "3.25", "4"]
    assert [text for _, text in found.up] == ["75", "87.5", "100"]
    assert "from 75.0 % to 100.0 %" in found.summary
    assert charts.agreement(metrics[:1]) is charts.agreement([]) is charts.losses([]) is None


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20))
def test_lines_stay_inside_and_ticks_are_few(values: list[float]) -> None:
    for found in (
        charts.losses(epochs(loss_bn=list(values))),
        charts.agreement(epochs(agreement=[min(value, 1.0) for value in values])),
    ):
        assert found is not None
        for x, y in found.lines[0][1]:
            assert found.left <= x <= found.right
            assert found.top <= y <= found.bottom
        for ticks in (found.across, found.up):
            assert len({place for place, _ in ticks}) == len({text for _, text in ticks}) == len(ticks) <= 6
        assert len(found.up) >= 2
        assert (found.up[0][0], found.up[-1][0]) == (found.bottom, found.top)
