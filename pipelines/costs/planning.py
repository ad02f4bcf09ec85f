"""Gives runs their time: plans a recipe for a budget, and makes an existing run longer or shorter."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nayer_edge.config import Augment, Generator, Prior
from nayer_edge.distillation import Epoch, Length
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier, load_teacher, untrained_teacher
from nayer_edge.runtime.compute import choose, seeded
from nayer_edge.storage.files import read_json, write_json
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

from ..recipes.loading import recipe_of
from ..recipes.schema import Export, Recipe
from ..reserved import wanted_images
from ..steps import CHECKPOINT, DECAY_STATE, GIVEN_TIME, PENDING
from . import budget
from .durations import duration, typed
from .fitting import MIB, Device, device_at_hand, fit, generator_channels
from .model_cost import cost_of_network
from .step_costs import time_steps

AFTER = ("onnx", "int8", "engine", "validate", "gate", "report")
"""the steps after the student"""


@dataclass(frozen=True)
class Planned:
    """A run for a budget.

    Attributes:
        sections: recipe sections with the planned numbers.
        words: the plan for people, as (heading, text).
        costs: of the steps, as measured.
    """

    sections: dict[str, dict[str, Any]]
    words: list[tuple[str, str]]
    costs: budget.Costs


@dataclass(frozen=True)
class PlanningCosts:
    """What a run can be planned from: its costs on a device, and the sizes that fit it.

    Attributes:
        costs: of the steps.
        classes: number of classes of the teacher.
        prior: what makes images.
        channels: of the generator.
        bank: number of images that the run takes over from another run, together with its generator; None if it takes
            over nothing.
        image_bytes: of an image in the memory bank.
        bank_mib: limit of the memory bank.
        wanted: number of calibration and hold-out images; see `reserved.wanted_images`.
        reserved: number of rounds that the run with the bank has reserved.
        reasons: why the sizes are smaller than usual, for people.
        image_time: fraction of the time of distillation in which images are made.
    """

    costs: budget.Costs
    classes: int
    prior: Prior
    channels: int
    bank: int | None
    image_bytes: int
    bank_mib: int
    wanted: dict[str, int]
    reserved: int = 0
    reasons: tuple[str, ...] = ()
    image_time: float = budget.IMAGE_TIME

    @classmethod
    def unpacked(cls, values: dict[str, Any]) -> PlanningCosts:
        """Of `dataclasses.asdict`, also after a way through JSON."""
        return cls(**{**values, "costs": budget.Costs(**values["costs"]), "reasons": tuple(values["reasons"])})

    def planned(self, seconds: float) -> Planned:
        """A run for so many seconds.

        Raises:
            TooShortError: they are too few for a useful student.
        """
        made = budget.plan(
            seconds,
            self.costs,
            self.classes,
            bank=self.bank,
            prior=self.prior,
            wanted=self.wanted,
            reserved=self.reserved,
            image_time=self.image_time,
        )
        sections = budget.settings(seconds, made, self.costs, self.bank_mib, self.prior)
        if self.prior != "procedural":
            sections["generator"] = {"channels": self.channels}
        words = [*budget.described(made, self.costs, self.image_bytes), *(("", why) for why in self.reasons)]
        return Planned(sections, words, self.costs)


def measured(
    teacher: Classifier,
    student: Classifier,
    augment: Augment,
    device: Device,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    bank: Started | None = None,
    prior: Prior = "batchnorm",
    export: Export | None = None,
    known: budget.Costs | None = None,
    wanted: dict[str, int] | None = None,
) -> PlanningCosts:
    """Measures the steps of these networks on the device.

    Args:
        bank: what the run takes over from another run, whose images it starts with.
        prior: what makes images.
        export: what follows the student; None: the defaults.
        known: costs of another student of the same teacher on this device. What does not depend on the student is
            taken from it.
        wanted: see `PlanningCosts`.

    Raises:
        UsageError: the networks do not fit each other.
    """
    compute = choose(device.kind, precision)
    spec, classes = teacher.spec, len(teacher.classes)
    costs = cost_of_network(teacher.to("cpu")), cost_of_network(student.to("cpu"))
    sizes, image_bytes = fit(spec, *costs, device, classes), math.prod(spec.shape)
    if bank is None:
        generator = Generator(channels=generator_channels(spec, classes, costs[0], device))
    else:
        # The images that are there must fit, with room for some more.
        least = math.ceil(1.25 * bank.images * image_bytes / MIB)
        generator, sizes = bank.generator, replace(sizes, batch=bank.batch, bank_mib=max(sizes.bank_mib, least))
    found = time_steps(
        teacher, student, generator, augment, compute, sizes.batch, sizes.student_batch, prior, export, known
    )
    if bank is not None and bank.rest is not None:
        # Measured, with the images that had to be drawn.
        found, wanted = replace(found, rest=bank.rest), None
    return PlanningCosts(
        found,
        classes,
        prior,
        channels=generator.channels,
        bank=None if bank is None else bank.images,
        image_bytes=image_bytes,
        bank_mib=sizes.bank_mib,
        wanted=wanted or {},
        reserved=0 if bank is None else bank.reserved // bank.batch,
        reasons=tuple(sizes.reasons.values()),
    )


@dataclass(frozen=True)
class Started:
    """What a run takes over from the run whose images it starts with.

    Attributes:
        batch: images per synthesis round.
        images: in its bank.
        reserved: images reserved for calibration and validation.
        rest: measured seconds of its steps after the student; None if they were not run, or with other settings.
    """

    generator: Generator
    batch: int
    images: int
    reserved: int
    rest: float | None


def with_budget(recipe: Recipe, seconds: float, root: Path | None) -> tuple[Recipe, list[tuple[str, str]]]:
    """The recipe with sizes for a budget, and the plan in words.

    A run in the folder that was planned for the same budget keeps its numbers.

    Args:
        root: the run folder; None if it will be emptied.

    Raises:
        UsageError: the budget is too small, or the folder holds a run with other numbers.
    """
    if root is not None and (root / MANIFEST).is_file():
        former = RunFolder.open(root).manifest.recipe
        if former.get("name") == recipe.name and (former.get("budget") or {}).get("seconds") == seconds:
            keys = budget.planned_keys()
            sections = {"budget": former["budget"]} | {
                name: {key: value for key, value in former[name].items() if f"{name}.{key}" in keys}
                for name in ("generator", "synthesis", "distill")
            }
            return with_sections(recipe, sections), [("time", "as planned when this run started")]
    planned = measured_for(recipe).planned(seconds)
    return with_sections(recipe, planned.sections), [*planned.words, *_replaced(recipe, planned.costs)]


def measured_for(recipe: Recipe, known: budget.Costs | None = None) -> PlanningCosts:
    """Measures the steps of a recipe's networks on its device.

    Args:
        known: see `measured`.

    Raises:
        UsageError: the networks cannot be built, or do not fit each other.
        IntegrityError: the bank's run was altered.
    """
    bank_run = None if recipe.student.bank is None else RunFolder.open(Path(recipe.student.bank))
    with seeded(0):
        if bank_run is not None:
            # Its own copy: a worker of a cluster may not have the file that the recipe names.
            teacher = load_classifier(bank_run.path(bank_run.artifact("teacher").files["teacher"]))
        else:
            teacher = untrained_teacher(recipe.teacher)
            if recipe.teach is None:
                teacher, _ = load_teacher(recipe.teacher, teacher, recipe.synthesis.prior)
        student = build_classifier(recipe.student.model, teacher.spec, teacher.classes, recipe.student.arguments)
    device = device_at_hand(recipe.device)
    bank = None
    if bank_run is not None:
        # Its generator and batch are in the recipe already.
        images = images_in_bank(bank_run) or 0
        other = recipe_of(bank_run.manifest.recipe, bank_run.root)
        alike = (other.export, other.validate_) == (recipe.export, recipe.validate_)
        rest = _measured_rest(bank_run) if alike else None
        held = bank_run.manifest.steps["student"].numbers.get("images put aside")
        reserved = int(held) if isinstance(held, int | float) else 0
        bank = Started(recipe.generator, recipe.synthesis.batch, images, reserved, rest)
    found = measured(
        teacher,
        student,
        recipe.synthesis.augment,
        device,
        recipe.precision,
        bank,
        recipe.synthesis.prior,
        recipe.export,
        known,
        wanted_images(
            recipe.export.calibration_images, recipe.validate_.synthetic_images if recipe.validate_.data is None else 0
        ),
    )
    # More images are for other students, which a run that starts with a bank does not make them for.
    return replace(found, image_time=recipe.image_time if bank is None else min(recipe.image_time, budget.IMAGE_TIME))


def images_in_bank(run: RunFolder) -> int | None:
    """Number of images in the memory bank of a finished run; None if it is not recorded."""
    count = run.manifest.steps["student"].numbers.get("bank images")
    return int(count) if isinstance(count, int | float) else None


def _replaced(recipe: Recipe, costs: budget.Costs) -> list[tuple[str, str]]:
    """The note that the plan replaces the recipe's own sizes, such as the published ones."""
    if recipe.budget is not None or recipe.student.bank is not None:
        return []
    expected = duration(budget.seconds_of(recipe.synthesis, recipe.distill, costs))
    text = f"the recipe's own sizes and schedule are replaced; with them, distillation would take about {expected} here"
    return [("note", f"{text} (run it without --budget)")]


def with_sections(recipe: Recipe, sections: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe with other values in some sections."""
    values = recipe.model_dump(by_alias=True)
    for name, changes in sections.items():
        values[name] = {**(values[name] or {}), **changes}
    return Recipe.model_validate(values)


def with_more(recipe: Recipe, run: RunFolder, seconds: float) -> Recipe:
    """The recipe of a run that gets so much more time.

    If it was interrupted, the same time once more continues it.

    Raises:
        UsageError: the run cannot be continued, or the time is too short.
    """
    if _was_given(recipe, run, "--more", seconds) or _was_asked(run, seconds):
        return continued(recipe, run.root)
    state = _state_of(recipe, run)
    if state.decaying:
        raise UsageError(
            "This run's learning rate is decaying, and it will be finished soon.",
            fix=f"Let it finish, then give it more time:\n  nayer-edge run {run.typed}\n"
            f"  nayer-edge run {run.typed} --more {typed(seconds)}",
        )
    longer = _with_length(recipe, _longer(recipe, state, seconds), state)
    _remember(longer, run, "--more", seconds)
    return longer


def _longer(recipe: Recipe, state: _State, seconds: float) -> Length:
    length = budget.extended(state.length, seconds, state.pace, state.rest, state.finished)
    if length == Length.of(recipe.distill):
        # The run was shortened while it ran; the same length once more would be no change, and nothing would be done.
        length = replace(length, epochs=length.epochs + 1)
    return length


def _was_asked(run: RunFolder, seconds: float) -> bool:
    """Whether an unfinished extension of this run is the one that so many seconds make."""
    if not (run.path(PENDING).is_file() and run.path(DECAY_STATE).is_file()):
        return False
    finished = recipe_of(run.manifest.recipe, run.root)
    state = _state_of(finished, run, finished=True)
    return _longer(finished, state, seconds) == Length.of(continued(finished, run.root).distill)


def with_finish(recipe: Recipe, run: RunFolder, seconds: float) -> Recipe:
    """The recipe of an interrupted run that decays its learning rate and ends within so many seconds.

    If it was interrupted again, the same time once more continues it.

    Raises:
        UsageError: the run is finished, has not begun to train its student, or the time is too short.
    """
    if _was_given(recipe, run, "--finish", seconds):
        return continued(recipe, run.root)
    state = _state_of(recipe, run)
    if state.finished:
        raise UsageError(
            "This run's student is finished.",
            fix=f"To continue with export and validation: nayer-edge run {run.typed}\n"
            f"To improve it: nayer-edge run {run.typed} --more 1h",
        )
    length = budget.finishing(state.length, state.done, seconds, state.pace, state.rest)
    shorter = with_sections(recipe, {"distill": vars(length)})
    _remember(shorter, run, "--finish", seconds)
    return shorter


def _remember(recipe: Recipe, run: RunFolder, option: str, seconds: float) -> None:
    """Records the last `--more` or `--finish` of an unfinished student beside its checkpoint, so that a command that is
    repeated after an interruption does not count twice. For a finished student, `_was_asked` finds out."""
    if run.path(CHECKPOINT).is_file():
        with run.locked():
            write_json(run.path(GIVEN_TIME), _given(recipe, option, seconds))


def _was_given(recipe: Recipe, run: RunFolder, option: str, seconds: float) -> bool:
    """Whether an unfinished student has its present length because of the same option and time."""
    path = run.path(GIVEN_TIME)
    if not (path.is_file() and run.path(CHECKPOINT).is_file()):
        return False
    return read_json(path, "the time given to a run") == _given(continued(recipe, run.root), option, seconds)


def _given(recipe: Recipe, option: str, seconds: float) -> dict[str, Any]:
    return {"option": option, "seconds": seconds, "length": vars(Length.of(recipe.distill))}


def require_new_plan(recipe: Recipe, run: RunFolder, seconds: float) -> None:
    """Checks that a run folder may still be planned for another budget: before its student is begun.

    Raises:
        UsageError: the student is begun or finished; the message says what can be done instead.
    """
    finished = "student" in run.manifest.steps
    if not finished and not run.path(CHECKPOINT).is_file():
        return
    if recipe.distill.schedule == "constant":
        fix = f"To give it more time: nayer-edge run {run.typed} --more 1h"
        if not finished:
            fix += f"\nTo end it early: nayer-edge run {run.typed} --finish 5m"
    elif finished:
        fix = f"Start a run with its images: {_on_its_images(run, typed(seconds))}"
    else:
        fix = f"Start over: nayer-edge run {run.typed} --fresh --budget {typed(seconds)}"
    raise UsageError(
        f"{run.root} has no time plan, and its student is already {'trained' if finished else 'in training'}."
        if recipe.budget is None
        else f"{run.root} already has a time plan.",
        why="It has the sizes that its recipe states." if recipe.budget is None else "",
        fix=fix,
    )


def _on_its_images(run: RunFolder, budget: str = "1h") -> str:
    """The command that starts a run with the images of a finished one."""
    return f"nayer-edge run {run.typed} --bank {run.typed} --budget {budget} --out DIR"


def can_change_length(recipe: Recipe, run: RunFolder) -> bool:
    """Whether an interrupted run can be given more or less time now: not while it only makes images, and not while its
    learning rate decays."""
    try:
        return not _state_of(recipe, run).decaying
    except (UsageError, IntegrityError):
        return False


def continued(recipe: Recipe, root: Path) -> Recipe:
    """The recipe of a run folder, with the length of an extension that was interrupted."""
    path = root / PENDING
    if not path.is_file():
        return recipe
    values = read_json(path, "the length of an extension")
    return with_sections(recipe, {name: section for name, section in values.items() if section is not None})


def _with_length(recipe: Recipe, length: Length, state: _State) -> Recipe:
    """The recipe of this length. Its budget is what a run of this length takes in all: what was spent in an earlier
    decay and export is not part of it, because the run goes on from before them."""
    sections: dict[str, dict[str, Any]] = {"distill": vars(length)}
    if recipe.budget is not None:
        training = length.epochs - length.decay_epochs - state.done
        takes = state.elapsed + training * state.pace.train + length.decay_epochs * state.pace.decay + state.rest
        sections["budget"] = {"seconds": round(takes / (1 - budget.MARGIN), 1), "rest_seconds": round(state.rest, 1)}
    return with_sections(recipe, sections)


@dataclass(frozen=True)
class _State:
    """Where a run stands: finished epochs and their seconds, its present length, and what its epochs cost."""

    done: int
    elapsed: float
    length: Length
    pace: budget.Pace
    rest: float
    finished: bool

    @property
    def decaying(self) -> bool:
        return not self.finished and self.done > self.length.epochs - self.length.decay_epochs


def _state_of(recipe: Recipe, run: RunFolder, *, finished: bool = False) -> _State:
    """Reads the facts of the newest saved state of a run.

    Args:
        finished: of its finished student, whether or not it is being extended.
    """
    if recipe.distill.schedule != "constant":
        raise UsageError(
            "This run cannot change its length.",
            why="Its learning rate follows a cosine over the whole run, as published; it ends at the last epoch.",
            fix=f"Start a run that can, with its images: {_on_its_images(run)}"
            if "student" in run.manifest.steps
            else f"Start a run that can: nayer-edge run {run.typed} --budget 1h --out DIR",
        )
    interrupted = not finished and run.path(CHECKPOINT).is_file()
    path = run.path(CHECKPOINT if interrupted else DECAY_STATE)
    if not path.is_file() and "student" in run.manifest.steps:
        raise UsageError(
            f"{run.root} has no state to continue from.",
            why="Its student was made by an earlier version of nayer-edge.",
            fix=f"Start a run with its images, which need not be made again:\n  {_on_its_images(run)}",
        )
    if not path.is_file():
        raise UsageError(
            f"{run.root} has no state to continue from.",
            why="It has not trained its student yet.",
            fix=f"Type: nayer-edge run {run.typed}",
        )
    facts = _facts(path)
    if not interrupted and (ranks := facts.get("ranks", 1)) != 1:
        raise UsageError(
            f"{run.root} was made by {ranks} processes, so its finished student cannot be trained further.",
            fix=f"Start a run with its images: {_on_its_images(run)}",
        )
    try:
        history, length = [Epoch(**line) for line in facts["history"]], Length(**facts["length"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} is not a saved state of this version of nayer-edge.",
            why=f"{type(error).__name__}: {error}",
            fix=f"Start a run with its images: {_on_its_images(run)}",
        ) from error
    try:
        pace = budget.Pace.of(history)
    except ValueError:
        raise UsageError(
            "This run has not begun to train its student.",
            why="So far it has only made images.",
            fix=f"Continue it: nayer-edge run {run.typed}",
        ) from None
    elapsed = sum(epoch.seconds for epoch in history)
    return _State(len(history), elapsed, length, pace, rest_seconds(recipe, run), finished=not interrupted)


def rest_seconds(recipe: Recipe, run: RunFolder) -> float:
    """Seconds of the steps after the student: measured, else planned; 0 if neither is known."""
    if (measured := _measured_rest(run)) is not None:
        return measured
    return recipe.budget.rest_seconds if recipe.budget else 0.0


def _measured_rest(run: RunFolder) -> float | None:
    """Seconds of the steps after the student; None if they have not been run."""
    steps = run.manifest.steps
    return sum(steps[name].seconds for name in AFTER if name in steps) if "validate" in steps else None


def _facts(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["facts"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise IntegrityError(f"{path} is not a saved state of a distillation.", why=f"{error}.") from error
