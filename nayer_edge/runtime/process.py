"""Defers SIGINT and SIGTERM until finished work is saved, and reads torchrun's environment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from nayer_edge.errors import UsageError


class Deferred:
    """Context manager in which the first SIGINT or SIGTERM only sets `asked`, if there is unsaved work.

    If there is none, and at the second signal, the previous handler runs at once. Outside the main thread, the only one
    that receives signals, this does nothing.

    Args:
        unsaved: returns whether finished work would be lost.
    """

    def __init__(self, unsaved: Callable[[], bool]) -> None:
        self._unsaved = unsaved
        self._kept: dict[int, Callable[[int, FrameType | None], object] | int] = {}
        self.asked = 0
        """the deferred signal; 0 if there is none"""

    def __enter__(self) -> Deferred:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                # None: a handler not installed from Python, which cannot be restored.
                if handler is not None and handler != signal.SIG_IGN:
                    self._kept[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, exception: object, *_more: object) -> None:
        self._restore()
        if self.asked and exception is None:
            self.act()

    def act(self) -> None:
        """Runs the previous handler for a deferred signal, if there is one; call it after saving."""
        if self.asked:
            number, self.asked = self.asked, 0
            self._act(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self._unsaved():
            self._act(number, frame)
        else:
            self.asked = number

    def _act(self, number: int, frame: FrameType | None) -> None:
        handler = self._kept[number]
        if callable(handler):
            handler(number, frame)
        else:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)


def launched() -> tuple[int, int]:
    """Rank and number of processes from torchrun's environment variables; (0, 1) without torchrun.

    Raises:
        UsageError: the variables are not consistent numbers.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return 0, 1
    texts = os.environ["RANK"], os.environ["WORLD_SIZE"]
    try:
        rank, size = (int(text) for text in texts)
        if not 0 <= rank < size:
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"RANK={texts[0]} and WORLD_SIZE={texts[1]} are not valid for a torchrun process.",
            fix="Start it with torchrun, or unset both.",
        ) from error
    return rank, size
