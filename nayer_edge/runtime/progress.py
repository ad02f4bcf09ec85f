"""What long work tells whoever watches it. The pipelines show it (rich bars or plain lines); the core only reports."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener to one piece of long work."""

    def start(self, what: str, total: int) -> None:
        """Work begins that will take `total` advances."""
        ...

    def advance(self, count: int = 1) -> None:
        """Some of it is done."""
        ...

    def figures(self, **figures: float | str) -> None:
        """The newest figures, for example loss and agreement at the end of an epoch."""
        ...

    def notice(self, text: str) -> None:
        """Something that whoever watches should know now, and read again later."""
        ...

    def finish(self) -> None:
        """It is all done."""
        ...


class Silent:
    """Listens to nothing."""

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
