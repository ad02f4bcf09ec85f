"""`--set a.b=c`, and what a key is by default."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Sequence
from typing import Any

from pydantic import (
    BaseModel,
    TypeAdapter,
)

from nayer_edge.errors import UsageError

from .checking import checked, field_of, section_of
from .renamed import current_key
from .schema import Recipe


def is_default(key: str, value: Any) -> bool:
    """Whether a key of a recipe ("distill.mixup") has the value, as JSON, that it has where nobody wrote it."""
    field = _field_at(key.split("."))
    if field is None or field.is_required():
        return False
    return value == _as_json(field.get_default(call_default_factory=True))


def _as_json(value: Any) -> Any:
    """As it stands in a manifest: tuples become lists, sections tables."""
    return TypeAdapter(Any).dump_python(value, mode="json", by_alias=True)


def _field_at(parts: Sequence[str]) -> Any:
    """The field of a recipe that a dotted key names; None where there is none."""
    model: Any = Recipe
    field = None
    for part in parts:
        field = field_of(model, part)
        model = section_of(field)
    return field


def make_recipe(values: dict[str, Any], source: str, settings: Sequence[str] = ()) -> Recipe:
    """Checks a recipe; all its problems are reported at once.

    Args:
        settings: `--set` items that are part of the values already, for the message.

    Raises:
        UsageError: it does not hold.
    """
    if settings:
        typed = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
        return checked(Recipe, values, f"The recipe {source} does not hold with {typed}:", "Mend what --set says.")
    fix = "Mend these lines. `nayer-edge recipes` shows recipes that work."
    return checked(Recipe, values, f"The recipe {source} does not hold:", fix)


def apply_settings(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Applies `--set a.b=c` to a recipe's values; c is read as TOML, or as a string where it is not TOML.

    One key changes: a section that the recipe did not write keeps the rest of what it is by default, limits of the gate
    above all. (One that it writes says all by itself.)

    Raises:
        UsageError: an item is not of this form.
    """
    values = _copied(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise UsageError(f"'{setting}' is not of the form a.b=c.", fix="For example: --set distill.epochs=40")
        parts = current_key(".".join(parts)).split(".")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        place = values
        for depth, part in enumerate(parts[:-1], start=1):
            # What a run folder left out stands there as null.
            if place.get(part) is None:
                place[part] = _set_by_default(parts[:depth])
            place = place[part]
            if not isinstance(place, dict):
                raise UsageError(f"'{part}' in --set {setting} is a value, not a section.")
        place[parts[-1]] = value
    return values


def _set_by_default(parts: list[str]) -> dict[str, Any]:
    """What a recipe without this section has there, as far as the section by itself would not."""
    field = _field_at(parts)
    default = field.get_default(call_default_factory=True) if field and not field.is_required() else None
    if not isinstance(default, BaseModel):
        return {}
    kind = type(default)
    values = _as_json(default)
    own = {
        field.alias or name: field.get_default(call_default_factory=True) for name, field in kind.model_fields.items()
    }
    return {key: value for key, value in values.items() if value != _as_json(own[key])}


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value
