"""What can go wrong, and the exit code that says so.

    NayerEdgeError            what happened, why, what to type next
    ├── UsageError       2    wrong usage, recipe or input
    ├── MissingError     3    something is not installed, or no such device
    ├── IntegrityError   4    an artefact is corrupt, stale, tampered with or untrusted
    └── TrainingError    1    training itself went wrong (NaN, a constant teacher, a dead student)

Exit codes of the command line: 0 done or gate passed, 1 gate failed or inconclusive (or a
TrainingError), 2, 3 and 4 as above, 130 interrupted (resumable).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_MISSING = 3
EXIT_INTEGRITY = 4
EXIT_INTERRUPTED = 130


class NayerEdgeError(Exception):
    """An error that a person can act on.

    Args:
        what: what happened, one sentence.
        why: the cause as far as it is known.
        fix: what to type or change next.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.fix) if part)


class UsageError(NayerEdgeError):
    """Wrong usage, recipe or input (exit 2)."""

    exit_code = EXIT_USAGE


class MissingError(NayerEdgeError):
    """Something is not installed, or there is no such device (exit 3)."""

    exit_code = EXIT_MISSING


class IntegrityError(NayerEdgeError):
    """An artefact is corrupt, stale, tampered with or untrusted (exit 4)."""

    exit_code = EXIT_INTEGRITY


class TrainingError(NayerEdgeError):
    """Training went wrong: NaN, a constant teacher, a dead student (exit 1)."""


def missing_extra(module: str, extra: str, purpose: str) -> MissingError:
    """The error for an import that an extra would have satisfied."""
    return MissingError(
        f"{purpose} needs the Python package '{module}', which is not installed.",
        fix=f"Type: pip install 'nayer-edge[{extra}]'   (in a checkout: pip install '.[{extra}]')",
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean …?' with the closest known name, or the empty string.

    >>> nearest("epoch", ["epochs", "batch"])
    " Did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
