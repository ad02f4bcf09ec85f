"""Validates a recipe, applies `--set a.b=c`, and knows the default of every key."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter

from nayer_edge.config import OF_PRIOR, Prior, Synthesis
from nayer_edge.errors import UsageError

from .checking import checked, field_of, section_of
from .renamed import current_key
from .schema import Recipe

PRIORS = get_args(Prior)


def is_default(key: str, value: Any) -> bool:
    """Whether a value, as JSON, is the default of a recipe's key such as "distill.mixup"."""
    field = _field_at(key.split("."))
    if field is None or field.is_required():
        return False
    return value == _as_json(field.get_default(call_default_factory=True))


def _as_json(value: Any) -> Any:
    """As in a manifest: tuples become lists, sections become tables."""
    return TypeAdapter(Any).dump_python(value, mode="json", by_alias=True)


def _field_at(parts: Sequence[str]) -> Any:
    """The field of a dotted key; None where there is none."""
    model: Any = Recipe
    field = None
    for part in parts:
        field = field_of(model, part)
        model = section_of(field)
    return field


def make_recipe(values: dict[str, Any], source: str, settings: Sequence[str] = ()) -> Recipe:
    """Validates a recipe; all its problems are reported at once.

    Args:
        source: what the error calls it.
        settings: `--set` items already applied to the values, for the error.

    Raises:
        UsageError: it is invalid.
    """
    if settings:
        typed = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
        return checked(Recipe, values, f"Invalid recipe {source} after {typed}:", "Fix the --set values.")
    fix = "Fix these lines. `nayer-edge recipes` lists recipes that work."
    return checked(Recipe, values, f"Invalid recipe {source}:", fix)


def apply_settings(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Applies `--set a.b=c` to a recipe's values; c is parsed as TOML, or taken as text where it is not TOML.

    Only this key changes: a section that the recipe omits keeps its other defaults, above all the limits of the gate.
    (A section that the recipe writes has no defaults but its model's.)

    Raises:
        UsageError: an item is not of this form.
    """
    values = _copied(values)
    items = [(*_parsed(setting), setting) for setting in settings]
    for parts, value, _ in items:
        if parts == ["synthesis", "prior"]:
            _forget_defaults_of_prior(values, value)
    for parts, value, setting in items:
        set_value(values, parts, value, f"--set {setting}")
    return values


def keys_of(settings: Sequence[str]) -> list[str]:
    """The keys among `--set` items.

    Raises:
        UsageError: an item is not of this form.
    """
    return list(dict.fromkeys(".".join(_parsed(setting)[0]) for setting in settings))


def replaced_keys(settings: Sequence[str], before: Recipe, after: Recipe) -> list[str]:
    """The keys among `--set` items whose values differ between two recipes."""
    values = [recipe.model_dump(mode="json", by_alias=True) for recipe in (before, after)]
    return [key for key in keys_of(settings) if _at(values[0], key) != _at(values[1], key)]


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _parsed(setting: str) -> tuple[list[str], Any]:
    """The parts of the key, and the value."""
    key, equals, text = setting.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise UsageError(f"'{setting}' is not of the form a.b=c.", fix="For example: --set distill.epochs=40")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return current_key(".".join(parts)).split("."), value


def _forget_defaults_of_prior(values: dict[str, Any], prior: Any) -> None:
    """Removes what is only a default of the prior in use: a run folder's recipe states every key, and the defaults of
    another prior are different ones."""
    section = values.get("synthesis")
    if not isinstance(section, dict) or (old := section.get("prior", "batchnorm")) == prior or old not in PRIORS:
        return
    defaults = Synthesis(prior=old).model_dump(include={key for keys in OF_PRIOR.values() for key in keys})
    for key, value in defaults.items():
        if section.get(key) == value:
            del section[key]


def set_value(values: dict[str, Any], parts: list[str], value: Any, source: str) -> None:
    """Changes one key of a recipe's values in place; see `apply_settings`.

    Args:
        parts: of the dotted key.
        source: who says so, for the message.

    Raises:
        UsageError: the key lies inside of a value.
    """
    place = values
    for depth, part in enumerate(parts[:-1], start=1):
        # A run folder stores omitted sections as null.
        if place.get(part) is None:
            place[part] = _set_by_default(parts[:depth])
        place = place[part]
        if not isinstance(place, dict):
            raise UsageError(f"'{part}' in {source} is a value, not a section.")
    place[parts[-1]] = value


def _set_by_default(parts: list[str]) -> dict[str, Any]:
    """The values of a section that the recipe's default sets differently from the section's own defaults."""
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
