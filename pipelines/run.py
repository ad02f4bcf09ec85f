"""Running the table of steps in a run folder: what is finished and unchanged is kept, the rest is made."""

from __future__ import annotations

import datetime
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nayer_edge.data.digest import digest_of_data
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.labels.class_names import labels_beside
from nayer_edge.models.names import parse, published_weights
from nayer_edge.runtime import provenance
from nayer_edge.runtime.progress import Progress, Silent
from nayer_edge.storage.files import digest_of
from nayer_edge.storage.run_folder import (
    MANIFEST,
    Artifact,
    RunFolder,
    StepRecord,
    clear_folder,
    is_vacant,
    lock_folder,
    remove_temporaries,
)

from .recipes import preflight
from .recipes.loading import BUILT_IN_DATA, portable, recipe_of
from .recipes.renamed import with_current_keys
from .recipes.schema import Recipe
from .recipes.settings import is_default
from .steps import STEPS, Step, settings_of, until

NAMED_FILES = {"teacher.weights": True, "teach.data": False, "validate.data": True}
"""keys of the recipe that name files of the user's, and whether every byte of a folder counts (training images may be
too many to be read each time)"""


@dataclass(frozen=True)
class StepEvent:
    """What happened to one step, for the display."""

    step: Step
    state: Literal["kept", "started", "finished"]
    reason: str
    seconds: float
    numbers: dict[str, Any]


def run_recipe(
    recipe: Recipe,
    root: Path,
    *,
    last: str | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    on_event: Callable[[StepEvent], None] = lambda _event: None,
) -> RunFolder:
    """Runs a recipe in a folder, continuing where it stopped.

    Args:
        last: the last step to run; all of them by default.
        fresh: empties the folder first.

    Raises:
        UsageError: the folder belongs to another recipe, or a changed setting would discard finished training.
        IntegrityError: a finished file was altered.
    """
    steps = until(last)
    _refuse(recipe, root, steps, fresh)
    with lock_folder(root):
        if fresh:
            clear_folder(root)
        run, former = _open(recipe, root, steps)
        remove_temporaries(root)
        for step in steps:
            _run_step(step, recipe, run, former, progress or Silent(), on_event)
    return run


def _refuse(recipe: Recipe, root: Path, steps: tuple[Step, ...], fresh: bool) -> None:
    """Everything that can be known to be wrong before anything is written."""
    finished: dict[str, StepRecord] = {}
    if (root / MANIFEST).is_file() and not fresh:
        run = RunFolder.open(root)
        _refuse_another(recipe, run, steps)
        finished = run.manifest.steps
    elif not is_vacant(root) and root.is_dir() and not fresh:
        raise UsageError(f"{root} is not empty and not a run folder.", fix="Choose another folder with --out.")
    preflight.check(recipe, [step for step in steps if _to_make(step, recipe, finished.get(step.name))])


def _open(recipe: Recipe, root: Path, steps: tuple[Step, ...]) -> tuple[RunFolder, dict[str, Any]]:
    """The run with this recipe, and the recipe that it had before."""
    values = portable(recipe, root)
    if not (root / MANIFEST).is_file():
        return RunFolder.create(root, values, recipe.seed, provenance.versions(), provenance.hardware()), values
    run = RunFolder.open(root)
    # Once more, now that nobody else can write here.
    _refuse_another(recipe, run, steps)
    former = run.manifest.recipe
    _adopt(run, values)
    return run, former


def _adopt(run: RunFolder, values: dict[str, Any]) -> None:
    run.manifest.recipe = values
    run.manifest.seed = values["seed"]
    run.save()


def _refuse_another(recipe: Recipe, run: RunFolder, steps: tuple[Step, ...]) -> None:
    before, root = run.manifest.recipe, run.root
    if before.get("name") != recipe.name:
        raise UsageError(
            f"{root} belongs to the recipe '{before.get('name')}', not to '{recipe.name}'.",
            fix=f"Choose another folder with --out, or start over in this one: "
            f"nayer-edge run {recipe.name} --out {shlex.quote(str(root))} --fresh",
        )
    for step in steps:
        record = run.manifest.steps.get(step.name)
        changed = _changes(record.settings, _settings(step, recipe, record)) if record else []
        if changed and step.trains:
            raise UsageError(
                f"{root} holds a finished '{step.name}' that was made with other settings.",
                why="Changed since: " + "; ".join(changed) + ".",
                fix="Choose another folder with --out, or discard it with --fresh.",
            )
        if record is None and (changed := _changes_since_begun(step, recipe, run)):
            raise UsageError(
                f"{root} holds an unfinished '{step.name}' that was begun with other settings.",
                why="Changed since: " + "; ".join(changed) + ".",
                fix=f"To go on with those that it has, type: nayer-edge run {run.typed}\n"
                "Otherwise choose another folder with --out, or discard it with --fresh.",
            )


def _changes_since_begun(step: Step, recipe: Recipe, run: RunFolder) -> list[str]:
    """What would make the checkpoint of an interrupted step worthless; nothing where it has none."""
    if not any(run.path(name).is_file() for name in step.scratch):
        return []
    before = recipe_of(run.manifest.recipe, run.root)
    decisive = [part for part in STEPS if part.name in (*step.inputs, step.name)]
    changed = [
        change for part in decisive for change in _changes(_settings(part, before, None), _settings(part, recipe, None))
    ]
    return list(dict.fromkeys(changed))


def _to_make(step: Step, recipe: Recipe, record: StepRecord | None) -> bool:
    return record is None or bool(_changes(record.settings, _settings(step, recipe, record)))


def _settings(step: Step, recipe: Recipe, record: StepRecord | None) -> dict[str, Any]:
    """The recipe's values that a step reads. Files count by what is in them, not by where they lie; where they are not
    at hand, as on another machine, those that a finished step was made from."""
    found = settings_of(step, recipe.model_dump(mode="json", by_alias=True))

    def count(name: str, path: Path | None, contents: bool = True) -> None:
        before = record.settings.get(f"{name}.sha256") if record else None
        found[f"{name}.sha256"] = digest_of_data(path, contents=contents) if path and path.exists() else before

    for name, contents in NAMED_FILES.items():
        section, _, key = name.partition(".")
        value = (found.get(section) or {}).get(key)
        if value is not None and value not in BUILT_IN_DATA and published_weights(value) is None:
            del found[section][key]
            count(name, Path(value), contents)
    encoder = Path(str((found.get("lte") or {}).get("encoder") or ""))
    if encoder.is_absolute():
        del found["lte"]["encoder"]
        count("lte.encoder", encoder)
        if names := labels_beside(encoder):
            count("lte.labels", names)
    for section in ("teacher", "student"):
        if section in found and (model := parse(found[section]["model"])).local:
            found[section]["model"] = model.portable
            count(f"{section}.model", model.path)
    return found


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """ "key: old → new" for every difference of two nested settings. A key that came into recipes after a step was made
    is none where it has its default, and neither is a new name for a key."""
    found, before = [], with_current_keys(before, prefix=prefix)
    for key in sorted(set(before) | set(now)):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, f"{name}.")
        elif old != new and (key in before or not is_default(name, new)):
            found.append(f"{name}: {old} → {new}")
    return found


def _run_step(
    step: Step,
    recipe: Recipe,
    run: RunFolder,
    former: dict[str, Any],
    progress: Progress,
    on_event: Callable[[StepEvent], None],
) -> None:
    inputs = [run.artifact(name) for name in step.inputs]
    record = run.manifest.steps.get(step.name)
    settings = _settings(step, recipe, record)
    if record is not None and not _changes(record.settings, settings):
        settings = record.settings
    input_hashes = {name: run.manifest.files[name].sha256 for artifact in inputs for name in artifact.files.values()}
    digest = digest_of({"step": step.name, "settings": settings, "inputs": input_hashes})
    reason = "not made yet"
    if record is not None:
        names = [name for name, entry in run.manifest.files.items() if entry.step == step.name]
        if altered := run.problems(names):
            raise IntegrityError(
                f"{run.root} was changed since it was made.",
                why="; ".join(altered) + ".",
                fix="Restore the file, or start over with --fresh.",
            )
        if record.digest == digest:
            _discard_scratch(step, run)
            on_event(StepEvent(step, "kept", "finished before", record.seconds, dict(record.numbers)))
            return
        reason = "; ".join(_changes(record.settings, settings)) or "its inputs changed"
    _require_intact_inputs(run, inputs)
    on_event(StepEvent(step, "started", reason, 0.0, {}))
    before = run.forget(step.name)
    began = time.perf_counter()
    try:
        artifact: Artifact = step.load()(*inputs, config=recipe, out=run, progress=progress)
    except BaseException:
        # A step that ends before it has changed a file loses nothing that was finished.
        if run.restore(before):
            _adopt(run, former)
        raise
    # A clock may be set back, and must not lose what was made.
    seconds = max(time.perf_counter() - began, 0.0)
    run.record(
        artifact,
        digest=digest,
        settings=settings,
        parents=inputs,
        seconds=seconds,
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=provenance.versions(),
        hardware=provenance.hardware(),
    )
    run.remove_leftovers(before)
    for name in step.retires:
        if name in run.manifest.steps:
            run.remove_leftovers(run.forget(name))
    _discard_scratch(step, run)
    on_event(StepEvent(step, "finished", reason, seconds, dict(artifact.numbers)))


def _discard_scratch(step: Step, run: RunFolder) -> None:
    """Not before the manifest names what the step made: until then a kill would lose it."""
    for name in step.scratch:
        run.path(name).unlink(missing_ok=True)


def _require_intact_inputs(run: RunFolder, inputs: list[Artifact]) -> None:
    run.require_intact([name for artifact in inputs for name in artifact.files.values()])
