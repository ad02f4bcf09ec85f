"""Progress reports of long tasks: the core reports them, the pipelines display them (rich bars or plain lines)."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a long task."""

    def start(self, what: str, total: int) -> None:
        """A task of `total` steps starts."""
        ...

    def advance(self, count: int = 1) -> None:
        """`count` steps are done."""
        ...

    def figures(self, **figures: float | str) -> None:
        """The latest figures, for example loss and agreement at the end of an epoch."""
        ...

    def notice(self, text: str) -> None:
        """A message that the user should see now and be able to read again later."""
        ...

    def finish(self) -> None:
        """The task is done."""
        ...


class Silent:
    """Ignores all progress reports."""

    def start(self, what: str, total: int) -> None:
        """Ignored."""

    def advance(self, count: int = 1) -> None:
        """Ignored."""

    def figures(self, **figures: float | str) -> None:
        """Ignored."""

    def notice(self, text: str) -> None:
        """Ignored."""

    def finish(self) -> None:
        """Ignored."""
