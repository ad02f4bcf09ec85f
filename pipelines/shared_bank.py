"""A run that starts with another run's images (`--bank`): what it takes over, and whether that fits.

The images are the work of the teacher and the label embeddings, not of the student, so one memory bank serves every
student. A run with `student.bank` takes the teacher, the embeddings, the bank, the reserved images and (unless images
are procedural) the generator and its BatchNorm memory from a finished run, has no warm-up, and goes on making images
with its own student. The files are hard links where the file system has them, else copies; `student/source.json` keeps
their hashes.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.files import digest_of, link_or_copy, read_json, sha256_of, write_json
from nayer_edge.storage.run_folder import MANIFEST, Artifact, RunFolder

from .plan import TAKEN, plan_steps, read_once
from .recipes.loading import recipe_of
from .recipes.schema import Recipe
from .steps import SOURCE, START_FILES, STEPS

SOURCE_SCHEMA = "nayer-edge/source/1"
_NEEDED = ("teacher", "lte", "student")
_OF_TRAINING = ("seed", "device", "precision")
"""settings that decide how a teacher is trained, but do not matter for one that is taken over"""


@dataclass(frozen=True)
class Source:
    """The run that a run started from, as recorded in `student/source.json`.

    Attributes:
        run: its name.
        files: path in its folder → {"kind", "sha256", "bytes"}.
    """

    run: str
    files: dict[str, dict[str, Any]]

    @property
    def digest(self) -> str:
        """Identifies the images and the generator; as `plan.bank_digest`."""
        return digest_of({entry["kind"]: entry["sha256"] for entry in self.files.values() if entry["kind"] in TAKEN})

    @property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of the files."""
        return tuple(entry["sha256"] for entry in self.files.values())


def started(recipe: Recipe) -> tuple[Recipe, list[tuple[str, str]]]:
    """The recipe of a run on another run's bank, with what it takes over, and that in words as (heading, text).

    Raises:
        UsageError, IntegrityError: see `require_fit`.
    """
    source = require_fit(recipe)
    other, distill = recipe_of(source.manifest.recipe, source.root), recipe.distill
    taken = {"batch", "prior", "pixel_step"}
    if other.synthesis.prior != recipe.synthesis.prior:
        # Losses and steps for one prior do not suit another. How many images are made is still the recipe's.
        taken = set(type(other.synthesis).model_fields) - {"rounds", "warmup_rounds", "reserve", "discard_rounds"}
    changes: dict[str, dict[str, Any]] = {
        "lte": other.lte.model_dump(),
        "generator": other.generator.model_dump(),
        "synthesis": {key: getattr(other.synthesis, key) for key in taken},
        "distill": {"epochs": distill.epochs - distill.warmup_epochs, "warmup_epochs": 0},
    }
    if recipe.budget is not None:
        changes["budget"] = {"fill_seconds": 0.0}
    values = recipe.model_dump(by_alias=True)
    for name, section in changes.items():
        values[name] = {**values[name], **section}
    numbers = source.manifest.steps["student"].numbers
    images = f"{numbers.get('bank images', 0):,} images"
    made = "generator" if other.synthesis.has_generator else f"{other.synthesis.prior} prior"
    words = f"{images} of {source.root}, with its teacher, embeddings and {made}; rounds of {other.synthesis.batch}"
    return Recipe.model_validate(values), [("bank", words)]


def require_fit(recipe: Recipe) -> RunFolder:
    """The run that `student.bank` names, if its images suit the recipe's teacher.

    Raises:
        UsageError: it is not a run with a finished student, or its teacher, input or class names differ.
        IntegrityError: it was altered since it was made.
    """
    source = _opened(recipe)
    typed = source.typed
    other = recipe_of(source.manifest.recipe, source.root)
    problems = []
    if other.teacher.input != recipe.teacher.input:
        before, now = (each.teacher.input.model_dump() for each in (other, recipe))
        differing = [f"{key} {before[key]} → {now[key]}" for key in now if before[key] != now[key]]
        problems.append(f"the input differs: {', '.join(differing)}")
    if other.teacher.classes != recipe.teacher.classes:
        problems.append(f"the class names differ: {_class_difference(other.teacher.classes, recipe.teacher.classes)}")
    source.require_intact([name for step in _NEEDED for name in source.artifact(step).files.values()])
    if not problems:
        problems = _teacher_differences(recipe, source)
    if problems:
        raise UsageError(
            f"The images of {source.root} belong to another teacher.",
            why="\n".join(f"  - {problem}" for problem in problems),
            fix="A bank serves every student of one teacher. For this teacher, make one first:\n"
            "  nayer-edge distill RECIPE --out runs/bank\n"
            f"Or take the teacher of {source.root}: nayer-edge distill {typed} --bank {typed} "
            "--set student.model=… --out DIR",
        )
    return source


def required(recipe: Recipe, root: Path) -> bool:
    """Whether a run in this folder still needs the other run: it has not taken over its files yet."""
    return recipe.student.bank is not None and not (root / SOURCE).is_file()


def taken_step(name: str, recipe: Recipe, out: RunFolder) -> Artifact | None:
    """The result of the step `teacher` or `lte`, taken over from the other run; None if the recipe's own is to be made.

    Raises:
        UsageError, IntegrityError: see `require_fit`.
    """
    if recipe.student.bank is None:
        return None
    source = _opened(recipe)
    if name == "teacher" and _teacher_changes(recipe, source):
        # Other settings, and `require_fit` found the same weights.
        return None
    made = source.artifact(name)
    source.require_intact(list(made.files.values()))
    out.forget(name)
    for file in made.files.values():
        link_or_copy(source.path(file), out.path(file))
    return made


def take_over(recipe: Recipe, out: RunFolder) -> Source:
    """Puts the files to start from into a run folder, unless they are there or were needed before.

    Raises:
        IntegrityError: they were altered, or the other run was.
        UsageError: see `require_fit`.
    """
    record = out.path(SOURCE)
    if record.is_file():
        found = read_source(out)
        names = {entry["kind"]: entry["sha256"] for entry in found.files.values()}
        for role, name in START_FILES.items():
            path = out.path(name)
            if path.is_file() and sha256_of(path) != names.get(role):
                raise IntegrityError(
                    f"{path} was altered since this run took it over.",
                    fix=f"Start over: nayer-edge run {out.typed} --fresh",
                )
        return found
    source = _opened(recipe)
    files = {}
    for step in _NEEDED:
        for role, name in source.artifact(step).files.items():
            if step != "student" or role in TAKEN:
                source.require_intact([name])
                entry = source.manifest.files[name]
                files[name] = {"kind": role, "sha256": entry.sha256, "bytes": entry.bytes}
                if step == "student":
                    link_or_copy(source.path(name), out.path(START_FILES[role]))
    facts = {
        "schema": SOURCE_SCHEMA,
        "run": source.manifest.recipe.get("name"),
        "manifest_sha256": sha256_of(source.root / MANIFEST),
        "files": files,
    }
    write_json(record, facts)
    return Source(str(facts["run"]), files)


def read_source(run: RunFolder) -> Source:
    """The run that a run started from.

    Raises:
        IntegrityError: its record is damaged.
    """
    path = run.path(SOURCE)
    values = read_json(path, "the record of the run that this one started from")
    try:
        files = {
            name: {"kind": str(e["kind"]), "sha256": str(e["sha256"]), "bytes": int(e["bytes"])}
            for name, e in values["files"].items()
        }
        return Source(str(values["run"]), files)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise IntegrityError(f"{path} is not readable as the record of another run.", why=f"{error}") from error


def _opened(recipe: Recipe) -> RunFolder:
    path = Path(recipe.student.bank or "")
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"student.bank: {path} is not a run folder.",
            fix="Name a run that has a student, for example: --bank runs/digits",
        )
    source = RunFolder.open(path)
    if "student" not in source.manifest.steps:
        raise UsageError(
            f"The run {path} has no finished student, so its memory bank is not complete.",
            fix=f"Finish it first: nayer-edge run {source.typed} --until student",
        )
    return source


def _class_difference(before: tuple[str, ...], now: tuple[str, ...]) -> str:
    if sorted(before) == sorted(now):
        return "their order"
    if len(before) != len(now):
        return f"{len(before)} there, {len(now)} here"
    first = next(place for place, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
    return f"class {first} is '{before[first]}' there and '{now[first]}' here"


def _teacher_changes(recipe: Recipe, source: RunFolder) -> list[str]:
    """How the settings of the step `teacher` differ from the other run's, apart from those of its training."""
    (plan,) = plan_steps(recipe, STEPS[:1], source, read_once())
    return [change for change in plan.changes if change.partition(":")[0] not in _OF_TRAINING]


def _teacher_differences(recipe: Recipe, source: RunFolder) -> list[str]:
    """What makes the teacher another one: its settings, or its weights where they come from elsewhere."""
    changes = _teacher_changes(recipe, source)
    if not changes:
        return []
    if recipe.teach is not None:
        return [f"the teacher differs: {change}" for change in changes]
    from nayer_edge.models.load import load_classifier, load_teacher, untrained_teacher, weights_digest
    from nayer_edge.runtime.compute import seeded

    # The bank's prior is what this teacher has to suit; see `started`.
    prior = recipe_of(source.manifest.recipe, source.root).synthesis.prior
    with seeded(0):
        network, _ = load_teacher(recipe.teacher, untrained_teacher(recipe.teacher), prior)
    there = weights_digest(load_classifier(source.path(source.artifact("teacher").files["teacher"])))
    here = weights_digest(network)
    where = shlex.quote(str(recipe.teacher.weights or recipe.teacher.model))
    return [] if here == there else [f"the weights differ: {where} has {here[:12]}…, the bank's teacher {there[:12]}…"]
