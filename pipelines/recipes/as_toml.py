"""A resolved recipe as TOML that can be run again elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nayer_edge.models.names import parse

from .loading import portable
from .schema import Recipe

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PATHS = (("teacher", "weights"), ("lte", "encoder"), ("teach", "data"), ("validate", "data"))
"""keys of a recipe that may hold a path"""


def travelling(recipe: Recipe, root: Path) -> tuple[dict[str, Any], list[str]]:
    """A recipe's values for whoever reads a run's page elsewhere, and the names of the files that belong beside it.

    Paths are cut to their last part, unless they start at a variable such as $NAYER_EDGE_DATA: they are of no use on
    another machine, and say more about this one than a page should. A recipe's relative paths start beside the recipe.

    Args:
        root: the run folder.
    """
    values, here, beside = portable(recipe, root), recipe.model_dump(mode="json", by_alias=True), []
    for section, key in _PATHS:
        path = (here.get(section) or {}).get(key)
        if path is not None and last_part(path) != path and not values[section][key].startswith("$"):
            values[section][key] = last_part(path)
            beside.append(last_part(path))
    for section in ("teacher", "student"):
        model = parse(getattr(recipe, section).model)
        values[section]["model"] = model.portable
        beside += [Path(model.name).name] if model.local else []
    return values, list(dict.fromkeys(beside))


def last_part(path: str) -> str:
    """The last part of an absolute path; anything else, such as the name of an encoder, as it is."""
    return PurePosixPath(path).name if PurePosixPath(path).is_absolute() else path


def recipe_toml(values: Mapping[str, Any]) -> str:
    """A recipe's values as TOML that `load_recipe` reads back as they were."""
    return "\n".join(_section((), values)).strip() + "\n"


def _section(place: tuple[str, ...], values: Mapping[str, Any]) -> list[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping) and value is not None}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    if lines and place:
        lines.insert(0, f"[{'.'.join(map(_key, place))}]")
    if lines:
        lines.append("")
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _section((*place, key), value)
    return lines


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: bool | float | str | list[Any]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return f'"{"".join(map(_character, value))}"'
    return f"[{', '.join(map(_value, value))}]"


def _character(character: str) -> str:
    """One character of a TOML basic string; what cannot be seen is written as its number."""
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    number = ord(character)
    if 0xD800 <= number <= 0xDFFF:  # half of a pair: no text in a TOML file holds it
        return "\N{REPLACEMENT CHARACTER}"
    return f"\\u{number:04X}" if number <= 0xFFFF else f"\\U{number:08X}"
