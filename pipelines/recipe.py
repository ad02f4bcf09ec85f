"""Finding a recipe by name or path, and resolving what it leaves open."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nayer_edge.config import Recipe, apply_settings, make_recipe, parse_toml
from nayer_edge.errors import UsageError, nearest

SUFFIX = ".toml"


@dataclass(frozen=True)
class Shipped:
    """A recipe of the package."""

    name: str
    path: Path


def shipped() -> list[Shipped]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("nayer_edge.pipelines.recipes")))
    return [Shipped(path.stem, path) for path in sorted(folder.glob(f"*{SUFFIX}"))]


def load_recipe(name_or_path: str, settings: list[str] | None = None) -> Recipe:
    """Reads a recipe: a shipped one by name, or a TOML file by path.

    Args:
        settings: `--set` items, applied before the check.

    Raises:
        UsageError: there is none of this name, or it does not hold.
    """
    path = _find(name_or_path)
    values = parse_toml(path, "a recipe")
    # The file's name is the recipe's, unless it says otherwise.
    values.setdefault("name", path.stem)
    recipe = make_recipe(apply_settings(values, settings or []), name_or_path)
    return _resolve(recipe, path.parent)


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


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    """Makes the teacher's weights an absolute path; a recipe's relative paths start at its own folder."""
    weights = recipe.teacher.weights
    if weights is None:
        return recipe
    expanded = Path(os.path.expandvars(weights)).expanduser()
    if "$" in str(expanded):
        raise UsageError(
            f"teacher.weights = {weights} names an environment variable that is not set.",
            fix="Set it, for example: export NAYER_EDGE_DATA=/path/to/data",
        )
    absolute = str(expanded if expanded.is_absolute() else (folder / expanded).resolve())
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"weights": absolute})})
