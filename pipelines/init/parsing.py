"""What a person says of a checkpoint, on the command line or when asked, read. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

from nayer_edge.errors import UsageError
from nayer_edge.labels.class_names import read_labels

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_COLOURS = 4
"""a last size of at most so many, behind a larger first one, is the number of channels, not a width"""


def parse_shape(text: str, channels: int) -> tuple[int, int, int]:
    """ "3x224x224", "224x224x3", "224x224" or "224" → (channels, height, width).

    Args:
        channels: where the text says nothing of them.

    Raises:
        UsageError: it is none of these.
    """
    parts = re.split(r"[x×,]", text.strip().lower().replace(" ", ""))
    if not 1 <= len(parts) <= 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"'{text}' is no image size.", fix="For example: --input 3x224x224")
    sizes = [int(part) for part in parts]
    if len(sizes) == 1:
        sizes *= 2
    if len(sizes) == 2:
        return channels, sizes[0], sizes[1]
    first, second, last = sizes
    return (last, first, second) if last <= MOST_COLOURS < first else (first, second, last)


def parse_values(text: str, flag: str) -> tuple[float, ...]:
    """ "0.485,0.456,0.406" → its numbers.

    Raises:
        UsageError: they are none.
    """
    try:
        return tuple(float(part) for part in re.split(r"[,\s]+", text.strip().strip("[]()")))
    except ValueError as error:
        raise UsageError(f"'{text}' are no numbers.", fix=f"For example: {flag} 0.485,0.456,0.406") from error


def named_after(path: Path) -> str:
    """A recipe's name from that of the checkpoint."""
    stem = path.name if path.is_dir() else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64] or "mine"


def checked_name(name: str) -> str:
    """A recipe's name that holds.

    Raises:
        UsageError: it does not.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot name a recipe.", fix="Take letters, digits, dots, dashes and underscores, at most 64."
        )
    return name


def require_files(checkpoint: Path, labels: Path | None) -> None:
    """Looks at the files that were named before anything takes time.

    Raises:
        UsageError: one is not there, or the class names do not hold.
    """
    for path, what, fix in (
        (checkpoint, "checkpoint", "Mend the path of your teacher's weights."),
        (labels, "file of class names", "Mend the path: --labels PATH"),
    ):
        if path is not None and not path.exists():
            raise UsageError(f"There is no {what} at {path}.", fix=fix)
    if labels is not None:
        read_labels(labels)
