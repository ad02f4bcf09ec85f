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
import errno
import re
from collections.abc import Iterable, Iterator

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


def no_batch_norms(what: str, detail: str = "") -> UsageError:
    """The refusal of a network without BatchNorm; `what` names it, as "The teacher"."""
    return UsageError(
        f"{what} has no BatchNorm layers{detail}.",
        why="NAYER makes images whose activations match the statistics that BatchNorm layers store. "
        "Transformers, ConvNeXt and GroupNorm networks store none, so there is nothing to match.",
        fix="Use a teacher with BatchNorm (ResNet, WideResNet, VGG-BN, MobileNet, EfficientNet, …).",
    )


def missing_extra(module: str, extra: str, purpose: str) -> MissingError:
    """The error for an import that an extra would have satisfied."""
    return MissingError(
        f"{purpose} needs the Python package '{module}', which is not installed.",
        fix=f"Type: pip install 'nayer-edge[{extra}]'   (in a checkout: pip install '.[{extra}]')",
    )


EXTRA_OF = {
    "numpy": "cpu",
    "torch": "cpu",
    "torchvision": "cpu",
    "transformers": "cpu",
    "safetensors": "cpu",
    "jaxtyping": "cpu",
    "onnx": "cpu",
    "onnxscript": "cpu",
    "onnxruntime": "cpu",
    "sklearn": "cpu",
    "matplotlib": "cpu",
    "jinja2": "cpu",
    "pyarrow": "cpu",
    "PIL": "cpu",
}
"""top-level module → the extra that installs it"""


def understood(error: Exception, purpose: str) -> NayerEdgeError | None:
    """An error as one that a person can act on; None where it is none of those that are foreseen.

    Args:
        purpose: what failed, for the message about a missing package: "This command".
    """
    if isinstance(error, NayerEdgeError):
        return hidden_memory_error(error) or error
    if isinstance(error, ModuleNotFoundError):
        top = (error.name or "").partition(".")[0]
        return missing_extra(top, EXTRA_OF[top], purpose) if top in EXTRA_OF else None
    return resource_error(error)


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean …?' with the closest known name, or the empty string.

    >>> nearest("epoch", ["epochs", "batch"])
    " Did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


# PyTorch (CPU and CUDA), its loader, oneDNN (which says no more where a buffer cannot be had), C++, ONNX Runtime.
_NO_MEMORY = re.compile(
    r"not enough memory|out of memory|can't allocate memory|cannot allocate memory|insufficient memory"
    r"|could not (create|execute) a primitive|bad_alloc|failed to allocate memory|unable to allocate",
    re.IGNORECASE,
)


def resource_error(error: BaseException) -> NayerEdgeError | None:
    """What an unforeseen error says about memory or disk, the errors that led to it included; None where nothing."""
    for link in _chain(error):
        if _no_memory(link):
            return _memory_error(link)
        if isinstance(link, OSError) and link.errno in NO_ROOM:
            return UsageError(
                "Cannot write: a disk is full, or may not be written to.",
                why=f"The system says: {link.strerror or link}.",
                fix="Free some space, in the folder for temporary files too (TMPDIR). Then the same command continues.",
            )
    return None


def hidden_memory_error(error: NayerEdgeError) -> MissingError | None:
    """What came of a lack of memory and was taken for another mistake, as a network that "takes no such images"."""
    return next((_memory_error(link) for link in _chain(error) if _no_memory(link)), None)


def _no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(f"{error}") is not None


def _memory_error(error: BaseException) -> MissingError:
    return MissingError(
        "There is not enough memory.",
        why=f"{error}".strip().splitlines()[0] if f"{error}".strip() else "",
        fix="Close other programs, or lower synthesis.batch, distill.batch or distill.bank_mib with --set. "
        "Then the same command continues.",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
