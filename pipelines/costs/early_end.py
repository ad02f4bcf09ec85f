"""Ends a run early while another process trains it: `--finish` leaves a request in the run folder, and the process that
trains there reads it after its epoch and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nayer_edge.distillation import Epoch, Length
from nayer_edge.errors import NayerEdgeError, UsageError
from nayer_edge.storage.files import read_json, write_json
from nayer_edge.storage.run_folder import RunFolder, is_locked

from ..recipes.schema import Recipe
from ..steps import CHECKPOINT, FINISH_ANSWER, FINISH_REQUEST
from . import planning
from .budget import Pace, finishing

POLL_SECONDS = 0.3
"""between two looks for the answer, which takes up to an epoch"""


def is_training(run: RunFolder) -> bool:
    """Whether another process works in a run folder, and a student in training lies there."""
    return is_locked(run.root) and run.path(CHECKPOINT).is_file()


def request(recipe: Recipe, run: RunFolder, seconds: float, wait: Callable[[float], None] = time.sleep) -> str | None:
    """Asks the process that trains in a run folder to finish within so many seconds, and waits for its answer.

    Returns:
        What it does, in words; None if no process trains there any more.

    Raises:
        UsageError: it cannot finish now, or not in so little time; it continues as before.
    """
    asked, answer = run.path(FINISH_REQUEST), run.path(FINISH_ANSWER)
    content = {"seconds": seconds, "rest_seconds": planning.rest_seconds(recipe, run), "since": time.time()}
    answer.unlink(missing_ok=True)
    try:
        while not answer.is_file():
            if not is_training(run):
                return None
            if not asked.is_file():
                # A process that starts removes requests that it finds.
                write_json(asked, content)
            wait(POLL_SECONDS)
        found = dict(read_json(answer, "an answer of the process that trains"))
    finally:
        asked.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)
    if "words" in found:
        return str(found["words"])
    raise UsageError(*(str(found.get(part, "")) for part in ("what", "why", "fix")))


class Requests:
    """The side of the process that trains."""

    def __init__(self, root: Path) -> None:
        self._asked, self._answer = root / FINISH_REQUEST, root / FINISH_ANSWER
        # Nobody waits for the answer to an old one.
        for path in (self._asked, self._answer):
            path.unlink(missing_ok=True)

    def length(self, history: Sequence[Epoch], length: Length) -> Length | None:
        """The length of the run that a request asks for; None if there is no request, or it cannot be fulfilled.

        Args:
            history: metrics of all finished epochs.
            length: the present one.
        """
        if not self._asked.is_file():
            return None
        found: Length | None = None
        try:
            values = read_json(self._asked, "a request to finish")
            seconds, rest, since = (float(values[key]) for key in ("seconds", "rest_seconds", "since"))
            # It was asked during the last epoch, whatever the clock says.
            waited = min(max(time.time() - since, 0.0), history[-1].seconds)
            pace = _pace(history)
            try:
                found = finishing(length, len(history), max(seconds - waited, 0.0), pace, rest)
            except UsageError:
                # If the time as it was typed is too short, too, the message names that.
                finishing(length, len(history), seconds, pace, rest)
                raise
        except NayerEdgeError as error:
            answer: dict[str, Any] = {"what": error.what, "why": error.why, "fix": error.fix}
        except (KeyError, TypeError, ValueError) as error:
            answer = {"what": "The request to finish is not readable.", "why": f"{type(error).__name__}: {error}"}
        else:
            answer = {"words": f"{found.epochs} epochs instead of {length.epochs}; the learning rate falls in the last "
                      f"{found.decay_epochs}"}  # fmt: skip
        write_json(self._answer, answer)
        self._asked.unlink(missing_ok=True)
        return found


def _pace(history: Sequence[Epoch]) -> Pace:
    try:
        return Pace.of(history)
    except ValueError:
        # `finishing` says so.
        return Pace(1.0, 1.0)
