"""WordNet ids ("n01440764") and their names, from timm's tables, which are read only if ids occur."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nayer_edge.errors import missing_extra

_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Synset:
    """A WordNet noun: its comma-separated names, and its definition."""

    names: str
    definition: str


def is_id(name: str) -> bool:
    """Whether a name is a WordNet id."""
    return _ID.fullmatch(name) is not None


def synsets(ids: Iterable[str], purpose: str) -> dict[str, Synset | None]:
    """The synset of each id; None where timm's tables (21,844 ids of ImageNet's releases) have none.

    Args:
        purpose: for the error where timm is not installed: "Translating the 3 WordNet ids in labels.txt".

    Raises:
        MissingError: timm is not installed.
    """
    table = _table(purpose)
    found: dict[str, Synset | None] = {}
    for number in ids:
        try:
            names, _, definition = table.label_name_to_description(number, detailed=True).partition(": ")
            found[number] = Synset(names, definition)
        except KeyError:
            found[number] = None
    return found


def imagenet_ids(purpose: str) -> list[str]:
    """The ids of ImageNet's 1,000 classes, in the usual order.

    Raises:
        MissingError: timm is not installed.
    """
    return list(_table(purpose).label_names())


def _table(purpose: str) -> Any:
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError as error:
        raise missing_extra("timm", "timm", purpose) from error
    return ImageNetInfo()
