"""Error types and their exit codes.

    NayerEdgeError            what happened, why, and how to fix it
    ├── UsageError       2    wrong usage, recipe or input
    ├── MissingError     3    something is not installed, or no such device
    ├── IntegrityError   4    an artifact is corrupt, stale, tampered with or untrusted
    └── TrainingError    5    training failed (NaN, a constant teacher, a dead student)

Exit codes of the command line: 0 done or gate passed; 1 gate failed or inconclusive, or no student of a sweep passes;
2 to 5 as above;
70 an unexpected internal error (EX_SOFTWARE of sysexits.h), 130 interrupted (resumable).
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
EXIT_TRAINING = 5
EXIT_UNEXPECTED = 70
EXIT_INTERRUPTED = 130


class NayerEdgeError(Exception):
    """An error that the user can act on.

    Args:
        what: what happened, in one sentence.
        why: the cause, as far as it is known.
        fix: what to run or change next.
    """

    exit_code = EXIT_UNEXPECTED

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
    """An artifact is corrupt, stale, tampered with or untrusted (exit 4)."""

    exit_code = EXIT_INTEGRITY


class TrainingError(NayerEdgeError):
    """Training failed: NaN, a constant teacher, a dead student (exit 5)."""

    exit_code = EXIT_TRAINING


def no_batch_norms(what: str, detail: str = "") -> UsageError:
    """The error for a network without BatchNorm, which `what` names ("The teacher")."""
    return UsageError(
        f"{what} has no BatchNorm layers{detail}.",
        why="NAYER synthesises images whose activations match the statistics stored in BatchNorm layers. "
        "Transformers, ConvNeXt and GroupNorm networks store none, nor do networks whose BatchNorms were folded into "
        "convolutions, so there is nothing to match.",
        fix="Make images without these statistics: --set synthesis.prior=generator   (measured results: "
        "docs/BENCHMARKS.md)\n"
        "Or use a teacher with BatchNorm (ResNet, WideResNet, VGG-BN, MobileNet, EfficientNet, …).",
    )


WRONG_ARGUMENT = (TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError, ArithmeticError)
"""what libraries raise while they build or run a network with arguments that it cannot use"""


def on_meta(error: Exception) -> bool:
    """Whether the reason is that a network was built on PyTorch's meta device, without values."""
    return isinstance(error, RuntimeError) and "meta" in str(error)


def missing_extra(module: str, extra: str, purpose: str) -> MissingError:
    """The error for a missing package that an extra installs."""
    return MissingError(
        f"{purpose} needs the Python package '{module}', which is not installed.",
        fix=f"Type: pip install '.[{extra}]'   (in the checkout of nayer-edge)",
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
    "jinja2": "cpu",
    "pyarrow": "cpu",
    "yaml": "cpu",
    "PIL": "cpu",
    "openvino": "openvino",
    "executorch": "executorch",
    "torchao": "executorch",
    "ai_edge_litert": "litert",
    "ai_edge_quantizer": "litert",
    "litert_torch": "litert",
    "ray": "ray",
}
"""top-level module → the extra that installs it"""


def understood(error: Exception, purpose: str) -> NayerEdgeError | None:
    """Converts an error into one that the user can act on; None if it is of no expected kind.

    Args:
        purpose: what failed, for the message about a missing package: "This command".
    """
    if isinstance(error, NayerEdgeError):
        return hidden_memory_error(error) or error
    if isinstance(error, ModuleNotFoundError):
        top = (error.name or "").partition(".")[0]
        return missing_extra(top, EXTRA_OF[top], purpose) if top in EXTRA_OF else None
    return resource_error(error)


def unexpected(error: Exception) -> NayerEdgeError:
    """The error for an exception of no expected kind."""
    # An error without a class of its own has the exit code 70.
    return NayerEdgeError(
        "Unexpected internal error.",
        why=f"{type(error).__name__}: {error}",
        fix="Repeat the command with `nayer-edge --debug …` for a traceback, and please report it.",
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if it has none."""
    return (f"{error}".strip() or type(error).__name__).splitlines()[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean …?' with the closest known name, or the empty string.

    >>> nearest("epoch", ["epochs", "batch"])
    " Did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
OUT_OF_MEMORY = "Out of memory."


# Messages of PyTorch (CPU and CUDA), its file loader, oneDNN (failed allocations say no more than this), C++ and ONNX
# Runtime.
_NO_MEMORY = re.compile(
    r"not enough memory|out of memory|can't allocate memory|cannot allocate memory|insufficient memory"
    r"|could not (create|execute) a primitive|bad_alloc|failed to allocate memory|unable to allocate",
    re.IGNORECASE,
)


def resource_error(error: BaseException) -> NayerEdgeError | None:
    """The out-of-memory or disk error behind an unexpected error or its causes; None if there is none."""
    for link in _chain(error):
        if _no_memory(link):
            return _memory_error(link)
        if isinstance(link, OSError) and link.errno in NO_ROOM:
            return UsageError(
                "Cannot write: the disk is full or read-only.",
                why=f"System error: {link.strerror or link}.",
                fix="Free some space, also in the temporary folder (TMPDIR), and repeat the command: it resumes.",
            )
    return None


def hidden_memory_error(error: NayerEdgeError) -> MissingError | None:
    """The out-of-memory error hidden behind another error, such as "cannot take images of …"; None if there is none."""
    return next((_memory_error(link) for link in _chain(error) if _no_memory(link)), None)


def _no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(f"{error}") is not None


def _memory_error(error: BaseException) -> MissingError:
    return MissingError(
        OUT_OF_MEMORY,
        why=f"{error}".strip().splitlines()[0] if f"{error}".strip() else "",
        fix="Close other programs and repeat the command: it resumes. If that is not enough, start over with smaller "
        "sizes: --fresh, and lower synthesis.batch, distill.batch or distill.bank_mib with --set (not with --budget, "
        "which sets them).",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then its causes."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
