"""Tells the splits of a data set apart: by file and folder names, and which one is read."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from nayer_edge.errors import UsageError, nearest

Purpose = Literal["train", "holdout"]
"""what images are read for"""

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""split → the words for it in file names, as in Hugging Face's datasets library (data_files.py)"""
NO_SPLIT = ""
"""stands for files whose names state no split"""

_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})(?:-[0-9a-f]{16})?")
"""one of several files of a split, as Hugging Face names them: train-00000-of-00002-0a1b2c3d4e5f6071"""


def canonical(word: str) -> str:
    """The usual name of a split.

    >>> canonical("val")
    'validation'
    """
    folded = word.strip().lower()
    return next((split for split, words in KEYWORDS.items() if folded in words), folded)


def split_in(name: str) -> str:
    """The split that the name of a file or folder states, without its suffix; `NO_SPLIT` if none, or several.

    >>> split_in("cifar10-test"), split_in("val2017"), split_in("extra-00000-of-00002"), split_in("images")
    ('test', 'validation', 'extra', '')
    """
    shard = _SHARD.fullmatch(name)
    words = re.split(r"[^a-z]+", (shard[1] if shard else name).lower())
    found = [split for split, keywords in KEYWORDS.items() if set(keywords) & set(words)]
    if len(found) == 1:
        return found[0]
    return shard[1].lower() if shard and not found else NO_SPLIT


def missing_shards(names: Collection[str]) -> list[str]:
    """The files that are absent from a set that is stored in several, from the names of those that are there.

    >>> missing_shards(["test-00000-of-00002"])
    ['test-00001-of-00002']
    """
    held: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name):
            held.setdefault((shard[1], shard[3]), set()).add(int(shard[2]))
    return [
        f"{prefix}-{number:05}-of-{total}"
        for (prefix, total), numbers in sorted(held.items())
        for number in range(int(total))
        if number not in numbers
    ]


def choose(found: Collection[str], purpose: Purpose, asked: str | None, source: object) -> str:
    """Which split is read.

    Args:
        found: those of the data set, with `NO_SPLIT` for files that state none; not empty.
        asked: the user's choice, if any. Without one, a hold-out is never guessed among several splits, while
            training takes "train".

    Raises:
        UsageError: there are several and none was chosen, or there is no such split.
    """
    named = sorted(split for split in found if split != NO_SPLIT)
    if asked is not None:
        wanted = canonical(asked)
        if wanted in named:
            return wanted
        if not named:
            raise UsageError(
                f"{source} has no splits, so there is none called '{asked}'.",
                why="No file or folder name in it says train, validation or test.",
                fix="Leave out --split.",
            )
        raise UsageError(
            f"{source} has no split '{asked}'.{nearest(asked, named)}", fix=f"Its splits: {', '.join(named)}."
        )
    if len(found) == 1:
        return next(iter(found))
    if purpose == "train" and "train" in named:
        return "train"
    listed = ", ".join(named) + (", and files that name none" if NO_SPLIT in found else "")
    raise UsageError(
        f"{source} holds several splits: {listed}.",
        why="Images that the teacher was trained on are no hold-out.",
        fix=f"Choose one: --split {'test' if 'test' in named else named[-1]}",
    )
