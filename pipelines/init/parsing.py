"""Parses what the user states about a checkpoint, as options or answers. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

from nayer_edge.errors import UsageError
from nayer_edge.labels.class_names import read_labels

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_COLOURS = 4
"""a last number up to this, after a larger first one, is taken as channels (HxWxC), not as a width"""


def parse_shape(text: str, channels: int) -> tuple[int, int, int]:
    """ "3x224x224", "224x224x3", "224x224" or "224" → (channels, height, width).

    Args:
        channels: default if the text states none.

    Raises:
        UsageError: the text has none of these forms.
    """
    sizes = _whole_numbers(text)
    if not 1 <= len(sizes) <= 3:
        raise UsageError(f"'{text}' is not an image size.", fix="For example: --input 3x224x224")
    if len(sizes) == 1:
        sizes *= 2
    if len(sizes) == 2:
        return channels, sizes[0], sizes[1]
    first, second, last = sizes
    return (last, first, second) if last <= MOST_COLOURS < first else (first, second, last)


def parse_size(text: str, flag: str) -> tuple[int, int]:
    """ "224x224" or "224" → (height, width).

    Raises:
        UsageError: the text has neither form.
    """
    sizes = _whole_numbers(text)
    if not 1 <= len(sizes) <= 2:
        raise UsageError(f"'{text}' is not a height and a width.", fix=f"For example: {flag} 224x224")
    return sizes[0], sizes[-1]


def _whole_numbers(text: str) -> list[int]:
    """The numbers of a text such as "3x224x224"; empty if it is none."""
    parts = re.split(r"[x×,]", text.strip().lower().replace(" ", ""))
    return [int(part) for part in parts] if all(part.isascii() and part.isdigit() for part in parts) else []


def parse_values(text: str, flag: str) -> tuple[float, ...]:
    """ "0.485,0.456,0.406" → numbers.

    Raises:
        UsageError: the text is not a list of numbers.
    """
    try:
        return tuple(float(part) for part in re.split(r"[,\s]+", text.strip().strip("[]()")))
    except ValueError as error:
        raise UsageError(f"'{text}' is not a list of numbers.", fix=f"For example: {flag} 0.485,0.456,0.406") from error


def named_after(path: Path) -> str:
    """A recipe name derived from the name of the checkpoint."""
    return plain_name(path.name if path.is_dir() else path.stem)


def plain_name(text: str) -> str:
    """The text as a recipe name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:64] or "mine"


def checked_name(name: str) -> str:
    """Returns a valid recipe name unchanged.

    Raises:
        UsageError: the name is invalid.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' is not a valid recipe name.",
            fix="Use at most 64 letters, digits, dots, dashes and underscores, starting with a letter or digit.",
        )
    return name


def require_files(checkpoint: Path, labels: Path | None) -> None:
    """Checks that the given files exist before anything slow starts.

    Raises:
        UsageError: a file does not exist, or the class names are invalid.
    """
    for path, what, fix in (
        (checkpoint, "checkpoint", "Correct the path of the checkpoint."),
        (labels, "file of class names", "Correct the path: --labels PATH"),
    ):
        if path is not None and not path.exists():
            raise UsageError(f"There is no {what} at {path}.", fix=fix)
    if labels is not None:
        read_labels(labels)
