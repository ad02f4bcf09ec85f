"""What a person sees while work runs."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from nayer_edge.pipelines.run import StepEvent
from nayer_edge.pipelines.show import Bars, Lines, show_event, written
from nayer_edge.pipelines.steps import STEPS


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(
        file=stream, width=80, force_terminal=terminal, color_system="standard" if terminal else None
    ), stream


def event(state: str, **numbers: object) -> StepEvent:
    return StepEvent(STEPS[2], state, "not made yet", 12.34, numbers)  # pyright: ignore[reportArgumentType]


def test_figures() -> None:
    text = written({"epoch": "3/12", "loss": 0.41234, "images/s": 12345.6, "steps": 7})
    assert text == "epoch 3/12  loss 0.412  images/s 12346  steps 7"


def test_figures_are_inert() -> None:
    assert written({"a\x1b[2J": "b\nc"}) == "a\ufffd[2J b\ufffdc"


def test_a_step_off_a_terminal_is_two_whole_lines() -> None:
    shown, stream = console(False)
    show_event(shown, event("started"))
    show_event(shown, event("finished", model="nayer:resnet8", long="x" * 70, agreement=0.987, none=None))
    show_event(shown, event("kept"))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("… student   distils")
    assert re.match(r"✓ student +12\.3 s  distils", lines[1])
    assert lines[2].strip() == f"model nayer:resnet8  long {'x' * 70}  agreement 0.987"
    assert lines[3] == "= student   already finished"
    assert "\x1b" not in stream.getvalue()


def test_a_step_on_a_terminal_fits_it() -> None:
    shown, stream = console(True)
    show_event(shown, event("started"))
    assert stream.getvalue() == "", "the bar says so"
    show_event(shown, event("finished", long="word " * 40))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert max(map(len, plain.splitlines())) <= 80
    assert all(line.startswith(" " * 12) for line in plain.splitlines()[1:]), "the second line is indented too"


def test_bars_show_and_vanish() -> None:
    shown, stream = console(True)
    bars = Bars(shown)
    bars.advance()
    bars.figures(loss=1.0)
    bars.finish()
    bars.start("distil [red]x", 4)
    bars.advance(2)
    bars.figures(epoch="1/2", loss=0.5, text="[bold]y")
    bars.start("next", 0)
    bars.finish()
    bars.finish()
    text = stream.getvalue()
    assert "50 %" in text
    assert "0:00:00" in text
    assert "distil [red]x" in text
    assert "epoch 1/2  loss 0.5  text [bold]y" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is shown again"


def test_a_bar_fits_80_columns() -> None:
    shown, stream = console(True)
    bars = Bars(shown)
    bars.start("distill", 100)
    bars.advance(37)
    bars.figures(epoch="12/120", loss=0.0123, agreement=0.987, **{"images/s": 1234.0})
    bars.finish()
    for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())):
        assert len(line) <= 80
        assert "…" not in line, "nothing is cut off"
    assert "images/s 1234" in stream.getvalue()
    assert " left " in stream.getvalue()


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_lines_are_rare(seconds: float) -> None:
    shown, stream = console(False)
    lines = Lines(shown, every_seconds=seconds)
    lines.start("distill", 10)
    for number in range(3):
        lines.advance()
        lines.figures(epoch=f"{number}/3", loss=0.5)
    lines.finish()
    assert len(stream.getvalue().splitlines()) == (3 if seconds == 0 else 0)
    if seconds == 0:
        assert stream.getvalue().splitlines()[2] == "  distill  30 %  epoch 2/3  loss 0.5"


def test_nothing_to_do_is_no_division_by_zero() -> None:
    shown, stream = console(False)
    lines = Lines(shown, every_seconds=0)
    lines.start("nothing", 0)
    lines.figures(loss=1.0)
    assert "0 %" in stream.getvalue()
