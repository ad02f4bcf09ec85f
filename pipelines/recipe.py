"""Finding a recipe by name or path, and resolving what it leaves open."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nayer_edge.config import Recipe, apply_settings, make_recipe, parse_toml
from nayer_edge.errors import UsageError, nearest

SUFFIX = ".toml"
BUILT_IN_DATA = ("digits",)
BASE_PREFIX = "_"
"""recipes that others extend, and that are not runs of their own"""
MAX_DEPTH = 4


@dataclass(frozen=True)
class Shipped:
    """A recipe of the package."""

    name: str
    path: Path


def shipped() -> list[Shipped]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("nayer_edge.pipelines.recipes")))
    files = sorted(folder.glob(f"*{SUFFIX}"))
    return [Shipped(path.stem, path) for path in files if not path.name.startswith(BASE_PREFIX)]


def load_recipe(name_or_path: str, settings: list[str] | None = None) -> Recipe:
    """Reads a recipe: a shipped one by name, or a TOML file by path.

    Args:
        settings: `--set` items, applied before the check.

    Raises:
        UsageError: there is none of this name, or it does not hold.
    """
    path = _find(name_or_path)
    values = _extended(path)
    # The file's name is the recipe's, unless it says otherwise.
    values.setdefault("name", path.stem)
    typed = {setting.partition("=")[0].replace(" ", "") for setting in settings or []}
    if "teacher.weights" in typed:
        values = _without_teach(values)
    recipe = make_recipe(apply_settings(values, settings or []), name_or_path)
    return _resolve(recipe, lambda key: Path.cwd() if key in typed else path.parent)


def _extended(path: Path, depth: int = 0) -> dict[str, Any]:
    """A recipe's values over those of the recipe that it `extends`, section by section.

    Raises:
        UsageError: the other recipe is missing, or they extend each other in a circle.
    """
    values = parse_toml(path, "a recipe")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or depth == MAX_DEPTH:
        raise UsageError(
            f"{path} extends {base!r}, which is no recipe or a circle.", fix="Name a file beside it, without .toml."
        )
    other = path.parent / f"{base}{SUFFIX}"
    if not other.is_file():
        raise UsageError(f"{path} extends '{base}', and there is no {other}.", fix="Name a file beside it.")
    below = _extended(other, depth + 1)
    return _merged(_without_teach(below) if _names_weights(values) else below, values)


def _names_weights(values: dict[str, Any]) -> bool:
    teacher = values.get("teacher")
    return isinstance(teacher, dict) and "weights" in teacher


def _without_teach(values: dict[str, Any]) -> dict[str, Any]:
    """Who names weights over a recipe that trains its teacher wants that one not trained."""
    return {key: value for key, value in values.items() if key != "teach"}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def recipe_of(values: dict[str, Any]) -> Recipe:
    """The recipe that a manifest holds, already resolved."""
    return make_recipe(values, "in the manifest")


def _find(name_or_path: str) -> Path:
    known = {recipe.name: recipe.path for recipe in shipped()}
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.suffix == SUFFIX and path.is_file():
        return path
    if path.suffix == SUFFIX:
        raise UsageError(f"There is no recipe file {path}.", fix="Type: nayer-edge recipes")
    raise UsageError(
        f"There is no recipe '{name_or_path}'.{nearest(name_or_path, known)}",
        fix="Type: nayer-edge recipes   to list them, or give the path of a .toml file.",
    )


def _resolve(recipe: Recipe, folder_of: Callable[[str], Path]) -> Recipe:
    """Makes the recipe's paths absolute; relative ones start at the recipe's own folder, those of `--set` where it
    was typed."""
    updates: dict[str, Any] = {}
    if recipe.teacher.weights is not None:
        weights = _absolute(recipe.teacher.weights, folder_of("teacher.weights"))
        updates["teacher"] = recipe.teacher.model_copy(update={"weights": weights})
    if recipe.teach is not None:
        data = _absolute(recipe.teach.data, folder_of("teach.data"))
        updates["teach"] = recipe.teach.model_copy(update={"data": data})
    if recipe.validate_.data is not None:
        data = _absolute(recipe.validate_.data, folder_of("validate.data"))
        updates["validate_"] = recipe.validate_.model_copy(update={"data": data})
    return recipe.model_copy(update=updates)


def _absolute(value: str, folder: Path) -> str:
    if value in BUILT_IN_DATA:
        return value
    expanded = os.path.expandvars(value)
    if expanded == value and value.startswith("$"):
        return value
    path = Path(expanded).expanduser()
    return str(path if path.is_absolute() else (folder / path).resolve())
