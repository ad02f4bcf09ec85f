"""No memory, no room on a disk: every library says it in words of its own; here they become the product's errors."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from nayer_edge.errors import MissingError, NayerEdgeError, UsageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# PyTorch (CPU and CUDA), its loader, oneDNN (which says no more where a buffer cannot be had), C++, ONNX Runtime.
_NO_MEMORY = re.compile(
    r"not enough memory|out of memory|can't allocate memory|cannot allocate memory|insufficient memory"
    r"|could not (create|execute) a primitive|bad_alloc|failed to allocate memory|unable to allocate",
    re.IGNORECASE,
)


def scarce(error: BaseException) -> NayerEdgeError | None:
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


def memory_behind(error: NayerEdgeError) -> MissingError | None:
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
