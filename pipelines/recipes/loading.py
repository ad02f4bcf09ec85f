"""Finds a recipe by name or path, and resolves its paths and the teacher's input."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from nayer_edge.config import LTE, InputSpec, Teacher
from nayer_edge.errors import UsageError, nearest
from nayer_edge.labels.class_names import read_labels
from nayer_edge.models.names import located, parse, published_weights
from nayer_edge.storage.files import expanded, home_folder
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

from .checking import checked, parse_toml
from .renamed import with_current_keys
from .schema import Recipe
from .settings import apply_settings, make_recipe

SUFFIX = ".toml"
BUILT_IN_DATA = ("digits",)
DATA_VARIABLE = "NAYER_EDGE_DATA"
BASE_PREFIX = "_"
"""names of recipes that exist only to be extended"""
MAX_DEPTH = 4
DESCRIBED = ("torchvision", "timm", "hf")
"""model sources whose libraries describe the input that published weights expect"""
_PATHS = (("teacher", "weights"), ("lte", "encoder"), ("teach", "data"), ("student", "bank"), ("validate", "data"))
"""keys that may hold a path"""


@dataclass(frozen=True)
class Shipped:
    """A recipe of the package."""

    name: str
    path: Path


def shipped() -> list[Shipped]:
    """The recipes that ship with the package, sorted by name."""
    folder = Path(str(resources.files("nayer_edge.pipelines.recipes")))
    files = [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}")]
    recipes = [Shipped(path.stem, path) for path in files if not path.name.startswith(BASE_PREFIX)]
    return sorted(recipes, key=lambda recipe: recipe.name)


def load_recipe(name_or_path: str, settings: list[str] | None = None) -> Recipe:
    """Reads a recipe: a shipped one by name, a TOML file by path, or that of a run folder.

    Args:
        settings: `--set` items, applied before validation.

    Raises:
        UsageError: there is no such recipe, or it is invalid.
        IntegrityError: the run folder's manifest is damaged.
    """
    if root := run_folder(name_or_path):
        values, folder = with_current_keys(RunFolder.open(root).manifest.recipe), root.resolve()
    else:
        path = _find(name_or_path)
        values, folder = _extended(path), path.parent
        # The recipe is named after its file, unless it has a name.
        values.setdefault("name", path.stem)
    typed = {setting.partition("=")[0].replace(" ", "") for setting in settings or []}
    if "teacher.weights" in typed:
        values = _without_teach(values)
    if typed & {"teacher.model", "teacher.weights", "teacher.arguments"}:
        # They are those of the recipe's own teacher.
        values = {key: value for key, value in values.items() if key != "measured"}

    def folder_of(key: str) -> Path:
        return Path.cwd() if key in typed else folder

    if root and typed & {"teacher.model", "teacher.weights"}:
        values = _without_the_librarys_input(values)
    changed = _with_labels(apply_settings(values, settings or []), folder_of("teacher.classes"))
    try:
        recipe = make_recipe(changed, name_or_path, settings or [])
    except UsageError:
        # If the file itself is invalid, the error should not blame --set.
        make_recipe(_with_labels(values, folder_of("teacher.classes")), name_or_path)
        raise
    return _resolve(recipe, folder_of)


def _without_the_librarys_input(values: dict[str, Any]) -> dict[str, Any]:
    """A run folder's recipe without the normalisation that a library stated for its teacher, for another teacher."""
    teacher = dict(values["teacher"])
    origin = str(teacher.pop("input_from", ""))
    if origin in ("", "the recipe", "the program"):
        return values
    own = origin.partition("; ")[2]
    written = own.removesuffix(" from the recipe").split(", ")
    kept = {key: value for key, value in teacher["input"].items() if key in written or key not in ("mean", "std")}
    return {**values, "teacher": {**teacher, "input": kept}}


def run_folder(name_or_path: str) -> Path | None:
    """The argument as a run folder; None where it names a recipe."""
    path = expanded(name_or_path)
    is_run = (path / MANIFEST).is_file() and not any(recipe.name == name_or_path for recipe in shipped())
    return path if is_run else None


def _extended(path: Path, depth: int = 0) -> dict[str, Any]:
    """A recipe's values, merged section by section over those of the recipe that it `extends`, whose results
    (`[measured]`) are not taken over.

    Raises:
        UsageError: the other recipe is missing, or they extend each other in a circle.
    """
    values = with_current_keys(parse_toml(path, "a recipe"), warn=True)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UsageError(
            f"{path} extends {base!r}, which is not a name.", fix="Name a recipe file beside it, without .toml."
        )
    if depth == MAX_DEPTH:
        raise UsageError(
            f"{path} extends '{base}' in a circle, or more than {MAX_DEPTH} levels deep.", fix="Extend another recipe."
        )
    other = path.parent / f"{base}{SUFFIX}"
    if not other.is_file():
        raise UsageError(f"{path} extends '{base}', and there is no {other}.", fix="Name a file beside it.")
    below = _extended(other, depth + 1)
    below.pop("measured", None)
    return _merged(_without_teach(below) if _names_weights(values) else below, values)


def _names_weights(values: dict[str, Any]) -> bool:
    teacher = values.get("teacher")
    return isinstance(teacher, dict) and "weights" in teacher


def _without_teach(values: dict[str, Any]) -> dict[str, Any]:
    """Drops [teach]: weights given on top of a recipe replace the training of its teacher."""
    return {key: value for key, value in values.items() if key != "teach"}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _with_labels(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Replaces a file of class names by the names."""
    teacher = values.get("teacher")
    if not isinstance(teacher, dict) or not isinstance(teacher.get("classes"), str):
        return values
    path = Path(_absolute(teacher["classes"], folder))
    return {**values, "teacher": {**teacher, "classes": list(read_labels(path))}}


IN_MANIFEST = "in the manifest"
"""origin of a recipe that nobody can be asked to correct"""


def recipe_of(values: dict[str, Any], root: Path, source: str = IN_MANIFEST) -> Recipe:
    """The recipe in the manifest of a run folder, or given by a program.

    Args:
        root: start of relative paths.
        source: origin of the recipe, for errors. From anywhere but a manifest, old names of keys are warned of.

    Raises:
        UsageError: it is invalid.
    """
    return _resolve(
        make_recipe(with_current_keys(values, warn=source != IN_MANIFEST), source), lambda _key: root.resolve()
    )


def portable(recipe: Recipe, root: Path) -> dict[str, Any]:
    """A recipe's values for the manifest of a run folder, which others may get to see: paths are relative to
    $NAYER_EDGE_DATA, to the run folder or to the home folder, so that none reveals whose home it is."""
    values, root = recipe.model_dump(mode="json", by_alias=True), root.resolve()
    if Path(encoder := values["lte"]["encoder"]).is_absolute():
        values["lte"]["encoder"] = _in_store(encoder) or _near(encoder, root)
    for section, key in (("teacher", "weights"), ("teach", "data"), ("student", "bank"), ("validate", "data")):
        value = (values[section] or {}).get(key)
        if value is not None and value not in BUILT_IN_DATA and published_weights(value) is None:
            values[section][key] = _in_store(value) or _near(value, root)
    for section in ("teacher", "student"):
        values[section]["model"] = portable_model(values[section]["model"], root)
    if values["sweep"] is not None:
        values["sweep"]["students"] = [portable_model(model, root) for model in values["sweep"]["students"]]
    return values


def portable_model(name: str, root: Path) -> str:
    """A model's name for a file in a folder: the path of a local file or folder as in `portable`."""
    if not (model := parse(name)).local:
        return name
    return f"{model.source}:{_near(model.name, root.resolve())}" + (f":{model.factory}" if model.factory else "")


def _in_store(value: str) -> str | None:
    store = os.environ.get(DATA_VARIABLE)
    if not store or not Path(value).is_relative_to(store):
        return None
    return f"${DATA_VARIABLE}/{Path(value).relative_to(store).as_posix()}"


def _near(value: str, root: Path) -> str:
    path, home = Path(value), home_folder()
    if not path.is_absolute():
        return value
    if home is None:
        inside = os.path.commonpath([path, root]) != root.anchor
        return Path(os.path.relpath(path, root)).as_posix() if inside else value
    at_home = path.is_relative_to(home)
    if at_home == root.is_relative_to(home) and os.path.commonpath([path, root]) != root.anchor:
        return Path(os.path.relpath(path, root)).as_posix()
    return f"~/{path.relative_to(home).as_posix()}" if at_home else value


def without_local_paths(recipe: Recipe, root: Path) -> tuple[dict[str, Any], list[str]]:
    """A recipe's values for the page of a run, and the names of the files to put beside that recipe.

    Paths are cut to their last part, unless they start with a variable such as $NAYER_EDGE_DATA: they are useless on
    another machine and reveal too much about this one. Relative paths start at the recipe's folder.

    Args:
        root: the run folder.
    """
    values, here, beside = portable(recipe, root), recipe.model_dump(mode="json", by_alias=True), []
    if values["export"]["max_drop"] is None:
        # TOML has no null, and no drop exceeds 1.
        values["export"]["max_drop"] = 1.0
    for section, key in _PATHS:
        path = (here.get(section) or {}).get(key)
        if path is not None and last_part(path) != path and not values[section][key].startswith("$"):
            values[section][key] = last_part(path)
            beside.append(last_part(path))
    for section in ("teacher", "student"):
        model = parse(getattr(recipe, section).model)
        values[section]["model"] = model.portable
        beside += [Path(model.name).name] if model.local else []
    if recipe.sweep is not None:
        students = [parse(model) for model in recipe.sweep.students]
        values["sweep"]["students"] = [model.portable for model in students]
        beside += [Path(model.name).name for model in students if model.local]
    return values, list(dict.fromkeys(beside))


def last_part(path: str) -> str:
    """The last part of an absolute path; anything else, such as the name of an encoder, unchanged."""
    return PurePosixPath(path).name if PurePosixPath(path).is_absolute() else path


def _find(name_or_path: str) -> Path:
    known = {recipe.name: recipe.path for recipe in shipped()}
    if name_or_path in known:
        return known[name_or_path]
    path = expanded(name_or_path)
    if path.suffix == SUFFIX and path.is_file():
        return path
    if path.suffix == SUFFIX:
        raise UsageError(f"There is no recipe file {path}.", fix="Type: nayer-edge recipes")
    raise UsageError(
        f"There is no recipe '{name_or_path}'.{nearest(name_or_path, known)}",
        fix="Type: nayer-edge recipes   to list them, or give the path of a .toml file or of a run folder.",
    )


def _resolve(recipe: Recipe, folder_of: Callable[[str], Path]) -> Recipe:
    """Makes the recipe's paths absolute; relative ones start at the recipe's folder, those of `--set` at the current
    one. Completes the teacher's input from its library."""
    updates: dict[str, Any] = {}
    teacher = resolved_teacher(recipe.teacher, folder_of)
    updates["teacher"] = with_input(teacher, trains=recipe.teach is not None)
    student = located(recipe.student.model, folder_of("student.model"))
    bank = recipe.student.bank and _absolute(recipe.student.bank, folder_of("student.bank"))
    updates["student"] = recipe.student.model_copy(update={"model": student, "bank": bank})
    if recipe.sweep is not None:
        students = tuple(located(model, folder_of("sweep.students")) for model in recipe.sweep.students)
        updates["sweep"] = recipe.sweep.model_copy(update={"students": students})
    if recipe.teach is not None:
        data = _absolute(recipe.teach.data, folder_of("teach.data"))
        updates["teach"] = recipe.teach.model_copy(update={"data": data})
    encoder = _encoder(recipe.lte, folder_of("lte.encoder"))
    updates["lte"] = recipe.lte.model_copy(update={"encoder": encoder})
    if recipe.validate_.data is not None:
        data = _absolute(recipe.validate_.data, folder_of("validate.data"))
        updates["validate_"] = recipe.validate_.model_copy(update={"data": data})
    return recipe.model_copy(update=updates)


def resolved_teacher(teacher: Teacher, folder_of: Callable[[str], Path]) -> Teacher:
    """The teacher with absolute paths.

    Args:
        folder_of: dotted key of the recipe → where its relative path starts.
    """
    updates: dict[str, Any] = {"model": located(teacher.model, folder_of("teacher.model"))}
    if teacher.weights is not None and published_weights(teacher.weights) is None:
        updates["weights"] = _absolute(teacher.weights, folder_of("teacher.weights"))
    return teacher.model_copy(update=updates)


def with_input(teacher: Teacher, *, trains: bool = False) -> Teacher:
    """The teacher with its complete input: keys of the recipe first, the others from the library's description of the
    weights. Networks that the recipe trains, of our zoo or of user code have no description.

    Raises:
        UsageError: neither states the normalisation.
        MissingError: the library is not installed, or its hub cannot be reached.
    """
    written = teacher.input.model_fields_set
    if teacher.input_from and written >= set(InputSpec.model_fields):
        # The recipe of a manifest is resolved already.
        return teacher
    source = teacher.model.partition(":")[0]
    if trains or source not in DESCRIBED or written >= set(InputSpec.model_fields):
        return teacher.model_copy(update={"input_from": "the recipe" if written else ""})
    from nayer_edge.models import published

    found, origin = published.input_of(teacher.model, teacher.weights)
    if not found and not written >= {"mean", "std"}:
        raise UsageError(
            f"No normalisation (mean and std) is known for the teacher {teacher.model}.",
            why="The recipe does not state it in [teacher.input], and the library does not describe these weights.",
            fix="Add to [teacher], for example:\ninput = { channels = 3, height = 224, width = 224, "
            "mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }",
        )
    own = {key: getattr(teacher.input, key) for key in written}
    fix = f"Keys that [teacher.input] omits come from {origin}."
    spec = checked(InputSpec, {**found, **own}, "Invalid input of the teacher:", fix)
    taken = set(found) - written
    if not taken:
        origin = "the recipe"
    elif written:
        origin += "; " + ", ".join(key for key in InputSpec.model_fields if key in written) + " from the recipe"
    return teacher.model_copy(update={"input": spec, "input_from": origin})


def _encoder(lte: LTE, folder: Path) -> str:
    """The encoder as an absolute path where it is a file or folder; a name or hub id unchanged."""
    name = lte.encoder
    is_path = lte.precomputed or name.startswith((".", "/", "~", "$")) or (folder / name).is_dir()
    return _absolute(name, folder) if is_path else name


def _absolute(value: str, folder: Path) -> str:
    if value in BUILT_IN_DATA:
        return value
    whole = os.path.expandvars(value)
    if whole == value and value.startswith("$"):
        return value
    path = expanded(whole)
    return str(path if path.is_absolute() else (folder / path).resolve())
