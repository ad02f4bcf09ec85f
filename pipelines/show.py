"""Progress display: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from nayer_edge.runtime.progress import Progress as Listener
from nayer_edge.text import inert

from .run import StepEvent


class _BarOverFigures(Progress):
    """A bar with the latest figures on a separate line, because together they do not fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["figures"]:
                yield Text(f"    {task.fields['figures']}", style="dim", no_wrap=True, overflow="ellipsis")


class Bars:
    """Progress bars with the latest figures, for terminals."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._task = TaskID(0)

    def start(self, what: str, total: int) -> None:
        """Shows a new bar; an indeterminate one if `total` is 0."""
        self.finish()
        self._bars = _BarOverFigures(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=20),
            *([TextColumn("{task.percentage:>3.0f} %")] if total else []),
            TimeElapsedColumn(),
            *([TextColumn("left"), TimeRemainingColumn(compact=True)] if total else []),
            console=self._console,
            transient=True,
        )
        self._bars.start()
        self._task = self._bars.add_task(escape(what), total=total or None, figures="")

    def advance(self, count: int = 1) -> None:
        """Moves the bar."""
        if self._bars is not None:
            self._bars.advance(self._task, count)

    def figures(self, **figures: float | str) -> None:
        """Replaces the figures below the bar."""
        if self._bars is not None:
            self._bars.update(self._task, figures=written(figures))

    def notice(self, text: str) -> None:
        """Prints a permanent line above the bar."""
        self._console.print(_notice(text))

    def finish(self) -> None:
        """Removes the bar."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class Lines:
    """Plain lines for CI servers and files: figures at most every ten seconds; without figures, a line at most once a
    minute."""

    def __init__(self, console: Console, every_seconds: float = 10.0, silent_seconds: float = 60.0) -> None:
        self._console, self._every, self._silent = console, every_seconds, silent_seconds
        self._what, self._total, self._done, self._last = "", 1, 0, 0.0
        self._figures = ""

    def start(self, what: str, total: int) -> None:
        """Starts a task."""
        self._what, self._total, self._done, self._last = what, max(total, 1), 0, time.monotonic()
        self._figures = ""

    def advance(self, count: int = 1) -> None:
        """Advances, and prints a line if nothing was printed for `silent_seconds`."""
        self._done += count
        if time.monotonic() - self._last >= self._silent:
            self._print()

    def figures(self, **figures: float | str) -> None:
        """Updates the figures, and prints a line if the last one is at least `every_seconds` old."""
        self._figures = f"  {written(figures)}"
        if time.monotonic() - self._last >= self._every:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        share = 100 * self._done / self._total
        self._console.print(f"  {self._what} {share:3.0f} %{self._figures}", markup=False, highlight=False)

    def notice(self, text: str) -> None:
        """Prints a line."""
        self._console.print(_notice(text), soft_wrap=True)

    def finish(self) -> None:
        """Nothing to do."""


class Display:
    """Shows runs on a console: as bars on a terminal, elsewhere as lines, and a line for each step.

    Args:
        titles: also name the recipe and its folder first.
    """

    def __init__(self, console: Console, *, titles: bool = True) -> None:
        self.console = console
        self.progress: Listener = Bars(console) if console.is_terminal else Lines(console)
        self._titles = titles

    @contextlib.contextmanager
    def showing(self, recipe: str, root: Path) -> Iterator[None]:
        """A context in which the steps of a recipe run."""
        if self._titles:
            self.console.print(Text(f"{recipe} → {root}", style="bold"))
        self.progress.start("checking recipe and folder", 0)
        try:
            yield
        finally:
            self.progress.finish()

    def show_event(self, event: StepEvent) -> None:
        """Shows what happened to a step."""
        # Steps that report no progress of their own still show that something moves.
        if event.state == "started":
            self.progress.start(event.step.title, 0)
        else:
            self.progress.finish()
        show_event(self.console, event)


def _notice(text: str) -> Text:
    return Text(f"! {inert(text)}", style="yellow")


def written(figures: Mapping[str, object]) -> str:
    """Figures as one line: "epoch 3/12  loss 0.412"."""
    parts = []
    for name, value in figures.items():
        if isinstance(value, float):
            text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        else:
            text = inert(str(value))
        parts.append(f"{inert(name)} {text}")
    return "  ".join(parts)


def show_event(console: Console, event: StepEvent) -> None:
    """Prints one line per step, and its figures on a second line."""
    name = f"{event.step.name:<9}"
    if event.state == "started":
        if console.is_terminal:
            return
        console.print(f"… {name} {event.step.title}", markup=False, highlight=False)
        return
    if event.state == "kept":
        console.print(f"= {name} already finished", style="dim", markup=False, highlight=False)
        return
    console.print(f"✓ {name} {event.seconds:6.1f} s  {event.step.title}", style="green", markup=False, highlight=False)
    if event.numbers:
        facts = written({key: value for key, value in event.numbers.items() if value is not None})
        if console.is_terminal:
            console.print(Padding(Text(facts), (0, 0, 0, 12)), style="dim")
        else:
            # Not wrapped: logs are read by programs, too.
            console.print(f"            {facts}", markup=False, highlight=False, soft_wrap=True)
