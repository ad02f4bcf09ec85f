"""Runs the steps in a run folder: keeps what is finished and unchanged, and runs the rest."""

from __future__ import annotations

import copy
import datetime
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models.names import parse
from nayer_edge.runtime import provenance
from nayer_edge.runtime.progress import Progress, Silent
from nayer_edge.storage.files import digest_of, read_json, write_json
from nayer_edge.storage.run_folder import (
    MANIFEST,
    Artifact,
    RunFolder,
    clear_folder,
    is_vacant,
    lock_folder,
    remove_temporaries,
)

from .plan import Digest, Plan, plan_steps, read_once
from .recipes import preflight
from .recipes.loading import portable
from .recipes.schema import Recipe
from .steps import PENDING, Step, until


@dataclass(frozen=True)
class StepEvent:
    """A change in the state of a step, for the progress display."""

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
    again: Mapping[str, Collection[str]] | None = None,
    progress: Progress | None = None,
    on_event: Callable[[StepEvent], None] = lambda _event: None,
) -> RunFolder:
    """Runs a recipe in a folder, resuming where it stopped.

    Args:
        last: the last step to run; all steps by default.
        fresh: empty the folder first.
        again: steps to run although nothing that they read has changed → files that they must not keep.

    Raises:
        UsageError: the folder belongs to another recipe, or a changed setting would discard finished training.
        IntegrityError: a finished file was altered.
    """
    steps, digest, again = until(last), read_once(), again or {}
    # Report all foreseeable errors before writing anything.
    plans = _checked(recipe, steps, None if fresh else _found(root), digest)
    stale = [plan.step for plan in plans if plan.stale or plan.step.name in again]
    if {"teacher", "lte", "student"} & {step.name for step in stale}:
        _check_bank(recipe, root, fresh)
    preflight.check(recipe, stale, root, fresh)
    if fresh:
        _refuse_to_delete_its_inputs(recipe, root)
    with lock_folder(root):
        if fresh:
            clear_folder(root)
        # Check again, now that no other process can write here.
        run = _found(root)
        plans = _checked(recipe, steps, run, digest)
        values = portable(recipe, root)
        run, before = _take_over(run, values, root, extends=any(plan.extends for plan in plans))
        former, trained = before, set[str]()
        remove_temporaries(root)
        for plan in plans:
            # Restore the values that this step's result was made with, except those that training has taken over.
            own = tuple(key for key in plan.step.settings if key not in trained)
            back = _with_values(former, before, own)
            if _run_step(plan, recipe, run, back, progress or Silent(), on_event, again.get(plan.step.name)):
                # If a later step fails, the recipe still has the values that this one was made with.
                former = _with_values(former, values, plan.step.settings)
                trained |= set(plan.step.settings) if plan.step.trains else set()
            if plan.step.name == "student" and _extension(run) == _length_of(values):
                # Only now does the longer run replace the finished one.
                former = {**former, **_length_of(values)}
                trained |= {"distill"}
                _adopt(run, values)
                _discard_scratch(plan.step, run)
    return run


def _with_values(recipe: dict[str, Any], values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The recipe with the values of these dotted keys. A recipe of an earlier version may lack some of them."""
    changed = copy.deepcopy(recipe)
    for key in keys:
        section, _, name = key.partition(".")
        if name and isinstance(changed.get(section), dict):
            place, given = changed[section], values.get(section) or {}
        else:
            place, given, name = changed, values, section
        if name in given:
            place[name] = given[name]
        else:
            place.pop(name, None)
    return changed


def _check_bank(recipe: Recipe, root: Path, fresh: bool) -> None:
    """Checks the run whose bank this one starts with, as long as it is needed."""
    from . import shared_bank

    if recipe.student.bank is None or not (fresh or shared_bank.required(recipe, root)):
        return
    if Path(recipe.student.bank).resolve() == root.resolve():
        raise UsageError("A run cannot start with its own memory bank.", fix="Choose another folder with --out.")
    shared_bank.require_fit(recipe)


def _refuse_to_delete_its_inputs(recipe: Recipe, root: Path) -> None:
    """Raises UsageError if the folder that is to be emptied holds files that the new run starts from."""
    named = {
        "teacher.weights": recipe.teacher.weights,
        "teacher.model": parse(recipe.teacher.model).name,
        "student.model": parse(recipe.student.model).name,
        "student.bank": recipe.student.bank,
        "lte.encoder": recipe.lte.encoder,
        "teach.data": recipe.teach.data if recipe.teach else None,
        "validate.data": recipe.validate_.data,
    }
    inside = [
        key
        for key, value in named.items()
        if value and Path(value).is_absolute() and Path(value).resolve().is_relative_to(root.resolve())
    ]
    if inside:
        raise UsageError(
            f"--fresh would delete files that the recipe reads: {', '.join(inside)}.",
            why=f"They are in {root}.",
            fix="Copy them to another folder first, or choose another folder with --out.",
        )


def _found(root: Path) -> RunFolder | None:
    """The run in the folder; None if the folder is empty or does not exist.

    Raises:
        UsageError: the folder holds something else.
    """
    if (root / MANIFEST).is_file():
        return RunFolder.open(root)
    if root.is_dir() and not is_vacant(root):
        raise UsageError(f"{root} is neither empty nor a run folder.", fix="Choose another folder with --out.")
    return None


def _checked(recipe: Recipe, steps: tuple[Step, ...], run: RunFolder | None, digest: Digest) -> tuple[Plan, ...]:
    """The plans; raises UsageError if they would discard training, or if the folder belongs to another recipe."""
    if run is not None and (name := run.manifest.recipe.get("name")) != recipe.name:
        raise UsageError(
            f"{run.root} belongs to the recipe '{name}', not to '{recipe.name}'.",
            fix="Choose another folder with --out, or start over in this one: repeat the command with --fresh.",
        )
    plans = plan_steps(recipe, steps, run, digest)
    for plan in plans:
        if run is not None and plan.changes and not plan.extends:
            _refuse_to_discard(plan, run)
    return plans


def _refuse_to_discard(plan: Plan, run: RunFolder) -> None:
    why = "Changed since: " + "; ".join(plan.changes) + "."
    if plan.record is None:
        raise UsageError(
            f"{run.root} holds an unfinished step '{plan.step.name}' that was started with other settings.",
            why=why,
            fix=f"To continue with its original settings, type: nayer-edge run {run.typed}\n"
            "Otherwise choose another folder with --out, or start over with --fresh.",
        )
    if plan.step.trains:
        raise UsageError(
            f"{run.root} holds a finished step '{plan.step.name}' that was made with other settings.",
            why=why,
            fix="Choose another folder with --out, or start over with --fresh.",
        )


def _take_over(
    run: RunFolder | None, values: dict[str, Any], root: Path, *, extends: bool
) -> tuple[RunFolder, dict[str, Any]]:
    """The run with the recipe's values, created if there is none, and the values that it had before.

    Args:
        extends: the student is being improved. The manifest keeps the recipe of the finished student until it is
            replaced; the new length is kept in a file, so that an interrupted extension can be continued.
    """
    if run is None:
        return RunFolder.create(root, values, values["seed"], provenance.versions(), provenance.hardware()), values
    former = run.manifest.recipe
    if extends:
        write_json(root / PENDING, _length_of(values))
    else:
        _adopt(run, values)
    return run, former


def _length_of(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("distill", "budget")}


def _extension(run: RunFolder) -> object:
    """The length of an unfinished extension of the student; None if there is none."""
    path = run.path(PENDING)
    return read_json(path, "the length of an extension") if path.is_file() else None


def _adopt(run: RunFolder, values: dict[str, Any]) -> None:
    run.manifest.recipe = values
    run.manifest.seed = values["seed"]
    run.save()


def _run_step(
    plan: Plan,
    recipe: Recipe,
    run: RunFolder,
    former: dict[str, Any],
    progress: Progress,
    on_event: Callable[[StepEvent], None],
    again: Collection[str] | None,
) -> bool:
    """Runs a step unless its result is kept; whether it ran.

    Args:
        again: run it in any case, without these files of its former result.
        former: the recipe to go back to if the step fails before it changed a file.
    """
    step = plan.step
    inputs = [run.artifact(name) for name in step.inputs]
    # Not the plan's record: an earlier step that ran again may have removed this step's result.
    record = run.manifest.steps.get(step.name)
    input_hashes = {name: run.manifest.files[name].sha256 for artifact in inputs for name in artifact.files.values()}
    digest = digest_of({"step": step.name, "settings": plan.settings, "inputs": input_hashes})
    reason = "not made yet"
    if record is not None:
        names = [name for name, entry in run.manifest.files.items() if entry.step == step.name]
        if altered := run.problems(names):
            raise IntegrityError(
                f"{run.root} was changed since it was made.",
                why="; ".join(altered) + ".",
                fix="Restore the file, or start over with --fresh.",
            )
        if record.digest == digest and again is None:
            # The files of an extension that is not asked for now are kept for later.
            if _extension(run) is None:
                _discard_scratch(step, run)
            on_event(StepEvent(step, "kept", "already finished", record.seconds, dict(record.numbers)))
            return False
        reason = "; ".join(plan.changes) or ("tried again" if record.digest == digest else "its inputs changed")
    run.require_intact(list(input_hashes))
    on_event(StepEvent(step, "started", reason, 0.0, {}))
    # A step that trains forgets its former result itself, when the new one is complete.
    before = run.remember(step.name) if step.trains else run.forget(step.name, again or ())
    began = time.perf_counter()
    try:
        artifact: Artifact = step.load()(*inputs, config=recipe, out=run, progress=progress)
    except BaseException:
        # If the step failed before it changed a file, its previous result is kept.
        if run.restore(before):
            _adopt(run, former)
        raise
    # The duration must not be negative, even if the clock misbehaves.
    seconds = max(time.perf_counter() - began, 0.0)
    run.record(
        artifact,
        digest=digest,
        settings=plan.settings,
        parents=inputs,
        seconds=seconds,
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=provenance.versions(),
        hardware=provenance.hardware(),
    )
    removed = run.remove_leftovers(before)
    for name in step.retires:
        if name in run.manifest.steps:
            run.remove_leftovers(run.forget(name))
    if not plan.extends:
        _discard_scratch(step, run)
    told = {"removed": ", ".join(removed)} if removed else {}
    on_event(StepEvent(step, "finished", reason, seconds, {**artifact.numbers, **told}))
    return True


def _discard_scratch(step: Step, run: RunFolder) -> None:
    """Removes the files that were only needed to resume. Call it after the manifest lists the step's files: until then
    an interruption would lose the step's work."""
    for name in step.scratch:
        run.path(name).unlink(missing_ok=True)
