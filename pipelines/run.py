"""Running the table of steps in a run folder: what is finished and unchanged is kept, the rest is made."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nayer_edge import provenance
from nayer_edge.artefacts import (
    MANIFEST,
    Artifact,
    RunFolder,
    clear_folder,
    digest_of,
    lock_folder,
    sha256_of,
)
from nayer_edge.config import Recipe
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.progress import Progress, Silent

from . import preflight
from .steps import Step, settings_of, until


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
    with lock_folder(root):
        if fresh:
            clear_folder(root)
        finished = RunFolder.open(root).manifest.steps if (root / MANIFEST).is_file() else {}
        preflight.check(recipe, [step for step in steps if step.name not in finished])
        run = _open(recipe, root, steps)
        for step in steps:
            _run_step(step, recipe, run, progress or Silent(), on_event)
    return run


def _open(recipe: Recipe, root: Path, steps: tuple[Step, ...]) -> RunFolder:
    values = recipe.model_dump(mode="json", by_alias=True)
    if not (root / MANIFEST).is_file():
        if any(path.name != ".lock" for path in root.iterdir()):
            raise UsageError(f"{root} is not empty and not a run folder.", fix="Choose another folder with --out.")
        return RunFolder.create(root, values, recipe.seed, provenance.versions(), provenance.hardware())
    run = RunFolder.open(root)
    before = run.manifest.recipe
    if before.get("name") != recipe.name:
        raise UsageError(
            f"{root} belongs to the recipe '{before.get('name')}', not to '{recipe.name}'.",
            fix=f"Choose another folder with --out, or start over in this one: "
            f"nayer-edge run {recipe.name} --out {root} --fresh",
        )
    for step in steps:
        record = run.manifest.steps.get(step.name)
        changed = _changes(record.settings, _settings(step, recipe)) if record else []
        if changed and step.trains:
            raise UsageError(
                f"{root} holds a finished '{step.name}' that was made with other settings.",
                why="Changed since: " + "; ".join(changed) + ".",
                fix="Choose another folder with --out, or discard it with --fresh.",
            )
    run.manifest.recipe = values
    run.manifest.seed = recipe.seed
    run.save()
    return run


def _settings(step: Step, recipe: Recipe) -> dict[str, Any]:
    found = settings_of(step, recipe.model_dump(mode="json", by_alias=True))
    if step.name == "teacher" and recipe.teacher.weights is not None:
        weights = Path(recipe.teacher.weights)
        found["teacher.weights.sha256"] = sha256_of(weights) if weights.is_file() else None
    return found


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """ "key: old → new" for every difference of two nested settings."""
    found = []
    for key in sorted(set(before) | set(now)):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name}: {old} → {new}")
    return found


def _run_step(
    step: Step,
    recipe: Recipe,
    run: RunFolder,
    progress: Progress,
    on_event: Callable[[StepEvent], None],
) -> None:
    inputs = [run.artifact(name) for name in step.inputs]
    settings = _settings(step, recipe)
    input_hashes = {name: run.manifest.files[name].sha256 for artifact in inputs for name in artifact.files.values()}
    digest = digest_of({"step": step.name, "settings": settings, "inputs": input_hashes})
    record = run.manifest.steps.get(step.name)
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
            on_event(StepEvent(step, "kept", "finished before", record.seconds, dict(record.numbers)))
            return
        reason = "; ".join(_changes(record.settings, settings)) or "its inputs changed"
    _require_intact_inputs(run, inputs)
    on_event(StepEvent(step, "started", reason, 0.0, {}))
    run.forget(step.name)
    began = time.perf_counter()
    artifact: Artifact = step.load()(*inputs, config=recipe, out=run, progress=progress)
    seconds = time.perf_counter() - began
    run.record(
        artifact,
        digest=digest,
        settings=settings,
        parents=inputs,
        seconds=seconds,
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    on_event(StepEvent(step, "finished", reason, seconds, dict(artifact.numbers)))


def _require_intact_inputs(run: RunFolder, inputs: list[Artifact]) -> None:
    run.require_intact([name for artifact in inputs for name in artifact.files.values()])
