"""Runs a sweep: a bank, a first share of the time for every student, and the rest for those that can still pass.

Every student is an ordinary run folder, made by the functions that `run --bank` and `run --more` call, here, on several
GPUs or on a Ray cluster (workers.py). If there is no bank, the run of one student makes it. `sweep.json` is written
after every step. The plan of a share is written before the share starts, so a repeated command continues where the
sweep was interrupted and grants no time twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text

from nayer_edge.config import Student
from nayer_edge.errors import (
    OUT_OF_MEMORY,
    IntegrityError,
    NayerEdgeError,
    TrainingError,
    UsageError,
    resource_error,
)
from nayer_edge.export.runners import as_bytes
from nayer_edge.models.load import load_classifier
from nayer_edge.models.names import MEMORY, located, parse
from nayer_edge.models.user_code import is_trusted
from nayer_edge.runtime import provenance
from nayer_edge.runtime.compute import choose
from nayer_edge.runtime.progress import Progress, Silent
from nayer_edge.storage.run_folder import (
    MANIFEST,
    RunFolder,
    StepRecord,
    is_vacant,
    lock_folder,
    require_unlocked,
)
from nayer_edge.storage.tensors import load_tensors, save_tensors
from nayer_edge.text import inert
from nayer_edge.training.evaluate import logits_of

from .. import actions, shared_bank
from ..costs.budget import IMAGE_TIME, TooShortError, planned_keys
from ..costs.durations import duration
from ..costs.planning import PlanningCosts, images_in_bank, rest_seconds, with_sections
from ..deploy import SyntheticSource
from ..distill import BANK as BANK_FILE
from ..distill import STUDENT, metrics_of
from ..plan import bank_digest, changes_of
from ..recipes.loading import portable, portable_model, recipe_of
from ..recipes.schema import Recipe
from ..recipes.settings import keys_of
from ..steps import CHECKPOINT, SOURCE
from . import on_ray, results
from .candidates import cannot_pass, proposed, require_distinct, student_cost
from .halving import EXCLUDED, Decision, Standing, bank_share, decide, first_round, rounds_for, share
from .page import write_page
from .record import (
    BANK,
    PAGE,
    RECORD,
    Bank,
    Maker,
    Share,
    State,
    StudentRecord,
    Sweep,
    Target,
    now,
    read_sweep,
    write_sweep,
)
from .workers import Here, OnDevices, Result, Task, failure_of, gpus, sections_of

if TYPE_CHECKING:
    from ..show import Display

HOLDOUT = "holdout.safetensors"
"""the images that all students share; no student is trained on them"""
MOST_IMAGES, LEAST_IMAGES = 2000, 400
"""number of those images: all that were reserved while the bank was made, within these limits"""
DEFAULT_SHARE = 0.4
"""of what the students' runs would take alone, if no time is given"""
_PLANNED = ("lte", "generator", "synthesis", "distill")
"""sections of the recipe of which a plan sets some keys"""
_SAME = ("teacher", "teach", *_PLANNED, "export", "validate", "gate", "seed", "device", "precision", "image_time")
"""parts of the recipe that a sweep continues with only if they are the same"""
BANK_COPIES = 4
"""disk space of a run in sizes of the bank that it starts with: its own bank, which has grown, twice"""


def planned(
    recipe: Recipe, bank: Path | None, out: Path, models: Sequence[str], seconds: float | None
) -> tuple[Sweep, Recipe]:
    """A new sweep, before anything is written, and the recipe that its students share.

    Args:
        bank: a finished run whose images the students start with; None: the sweep makes them.
        models: the students; empty: those that are proposed for the teacher.
        seconds: time for the students, and for the bank if there is none.

    Raises:
        UsageError: a student is listed twice, none can be built, or the bank is unfinished or another teacher's.
        IntegrityError: the bank was altered.
    """
    teacher = recipe.teacher
    if bank is not None:
        recipe = actions.on_bank(recipe, bank)
    elif recipe.student.bank is not None:
        bank = Path(recipe.student.bank)
    if bank is not None:
        shared_bank.require_fit(recipe)
    params = results.teacher_params(recipe, bank)
    chosen = _named(models, out) if models else proposed(params, teacher.input, teacher.classes)
    students = [StudentRecord(model=model, folder=folder) for model, folder in _folders(chosen)]
    for each in students:
        _examine(each, recipe, out)
    fit = [each for each in students if each.open]
    if all(each.state in ("refused", "failed") for each in students):
        refused = all(each.state == "refused" for each in students)
        raise UsageError(
            "None of the students can be built.",
            why="\n".join(f"  - {each.model}: {each.reason}" for each in students),
            fix="nayer-edge students lists students for an image size."
            if refused
            else "Correct this, and repeat the command.",
        )
    sweep = Sweep(
        name=recipe.name,
        recipe=portable(recipe, out),
        seconds=seconds,
        rounds=rounds_for(len(fit)),
        students=students,
        teacher_params=params,
        created=now(),
    )
    return sweep, recipe


def run_sweep(
    recipe: Recipe | None,
    bank: Path | None,
    out: Path,
    models: Sequence[str] = (),
    seconds: float | None = None,
    *,
    ray: str | None = None,
    fresh: bool = False,
    display: Display | None = None,
) -> Sweep:
    """Runs a sweep in a folder, or continues it where it stopped.

    Args:
        recipe: what the students share; None: continue the sweep in `out`.
        bank, models, seconds: see `planned`.
        ray: address of the Ray cluster that trains the students.
        fresh: empty the folder, after everything that can be checked before was checked.

    Returns:
        The finished sweep; its `verdict` is "pass" if a student passes.

    Raises:
        UsageError: the folder holds something else or another sweep, a student is listed twice, the time is too short,
            or the disk is too small; no such cluster, or it cannot do this.
        MissingError: Ray is not installed, or nayer-edge is not installed on the cluster.
        IntegrityError: a run of the sweep was altered.
    """
    with lock_folder(out), contextlib.nullcontext() if ray is None else on_ray.connected(ray) as cluster:
        sweep = None if fresh else begun(recipe, bank, out, models, seconds)
        if sweep is not None:
            recipe = recipe_of(sweep.recipe, out)
        elif recipe is None:
            raise UsageError(f"{out} is not the folder of a sweep: it has no {RECORD}.")
        elif not fresh and not (out / RECORD).is_file() and not is_vacant(out):
            raise UsageError(
                f"{out} is neither empty nor the folder of a sweep.", fix="Choose another folder with --out."
            )
        else:
            # No student has begun yet: everything may still be planned in another way.
            removed = _own_folders(out) if fresh else []
            former = read_sweep(out) if not fresh and (out / RECORD).is_file() else None
            sweep, recipe = planned(recipe, bank, out, models, seconds)
            if fresh:
                _refuse_to_delete_inputs(sweep, recipe, out, removed)
                _clear(out)
            (out / HOLDOUT).unlink(missing_ok=True)
            if former is not None:
                sweep.spent = former.spent
                if recipe.student.bank is None and recipe_of(former.recipe, out).student.bank is None:
                    # The bank that it made.
                    sweep.bank, sweep.maker, sweep.hardware = former.bank, former.maker, former.hardware
            write_sweep(out, sweep)
        work = _Work(sweep, recipe, out, display, cluster)
        work.prepare()
        while work.open and sweep.done < sweep.rounds:
            work.run_round()
        work.finish()
    return sweep


def begun(
    recipe: Recipe | None, bank: Path | None, out: Path, models: Sequence[str], seconds: float | None
) -> Sweep | None:
    """The sweep in a folder that is continued; None if there is none, or if a recipe is given and no student has begun
    except for one that has made the bank.

    Args:
        recipe, bank, models, seconds: what is asked for, as for `run_sweep`.

    Raises:
        UsageError: the sweep is another one.
        IntegrityError: its record is damaged.
    """
    sweep = read_sweep(out) if (out / RECORD).is_file() else None
    if sweep is None:
        return None
    making = sweep.maker is not None and sweep.bank is None and bank_of(sweep, out).is_dir()
    if recipe is not None and not making and not any(each.target for each in sweep.students):
        return None
    _require_same(sweep, recipe, bank, out, models, seconds)
    return sweep


def bank_maker(sweep: Sweep) -> StudentRecord:
    """The student whose run makes the bank: the recipe's own if it takes part, else the largest."""
    own = sweep.recipe.get("student", {})
    for each in sweep.students:
        if each.open and each.model == own.get("model") and not own.get("arguments"):
            return each
    return max((each for each in sweep.students if each.open), key=lambda each: (each.params or 0, each.model))


def image_time_of(sweep: Sweep) -> float:
    """The recipe's fraction of the time for images."""
    return float(sweep.recipe.get("image_time", IMAGE_TIME))


def bank_of(sweep: Sweep, out: Path) -> Path:
    """The run inside the sweep's folder that makes the bank, or made it."""
    return out / (BANK if sweep.maker is None else sweep.maker.folder)


def default_seconds(run: RunFolder, students: int) -> float:
    """Time for the students where none was given: less than half of what their runs would take alone.

    Args:
        run: the one that made the bank.
    """
    # The manifest has the seconds of the last process only, and the student may have been made by several.
    alone = sum(float(line["seconds"]) for line in metrics_of(run.root))
    alone += sum(made.seconds for name, made in run.manifest.steps.items() if name not in ("teacher", "lte", "student"))
    return max(60.0, round(DEFAULT_SHARE * alone * students))


def as_commands(sweep: Sweep, bank: Path | None, out: Path, name: str, settings: Sequence[str] = ()) -> list[str]:
    """The command lines that give every student a share of all the time, for a scheduler to run in parallel.

    Args:
        bank: the run whose images the students start with; None: the first line makes it.
        name: the recipe or run folder, as typed.
        settings: `--set` items, as typed.
    """

    def typed(items: Sequence[str]) -> str:
        return " ".join([shlex.quote(name), *(word for each in items for word in ("--set", shlex.quote(each)))])

    # A run with `--bank` has no warm-up, and the arguments are those of the recipe's own student.
    no_arguments = ["student.arguments={}"] if sweep.recipe.get("student", {}).get("arguments") else []
    shared = [*(each for each in settings if keys_of([each]) != ["distill.warmup_epochs"]), *no_arguments]
    open_ = [each for each in sweep.students if each.open]
    if not open_:
        return []
    lines, seconds = [], sweep.seconds
    trust = " --trust-code" * is_trusted()
    if bank is None and seconds is None:
        bank = out / BANK
        lines.append(f"nayer-edge distill {typed(settings)}{trust} --out {shlex.quote(str(bank))}")
    elif bank is None and seconds is not None:
        # The lines are one round.
        maker, (first, images) = bank_maker(sweep), bank_share(len(open_), 1, image_time_of(sweep))
        bank = out / maker.folder
        own = [f"student.model={maker.located(out)}", *no_arguments, f"image_time={images:.2f}"]
        lines.append(
            f"nayer-edge distill {typed([*settings, *own])} --budget {round(seconds * first)}s{trust} "
            f"--out {shlex.quote(str(bank))}"
        )
        seconds *= 1 - first
        open_.remove(maker)
    elif bank is not None and seconds is None:
        seconds = default_seconds(RunFolder.open(bank), len(open_))
    time = "" if seconds is None else f" --budget {max(1, round(seconds / max(len(open_), 1)))}s"
    return [
        *lines,
        *(
            f"nayer-edge distill {typed(shared)} --bank {shlex.quote(str(bank))}{time}{trust} "
            f"--set student.model={shlex.quote(each.located(out))} --out {shlex.quote(str(out / each.folder))}"
            for each in open_
        ),
    ]


def commands_left(sweep: Sweep, out: Path) -> tuple[list[str], list[str]]:
    """The command lines that give every student that is left in a begun sweep an equal share of the time that is left,
    and for every student without a line a sentence that says why.

    Raises:
        UsageError: the sweep has no memory bank yet.
    """
    if sweep.bank is None:
        raise UsageError(
            f"The sweep in {out} has no finished memory bank yet.",
            fix=f"Continue it: nayer-edge sweep {shlex.quote(str(out))}",
        )
    left = [each for each in sweep.students if each.open]
    seconds = round(((sweep.seconds or 0.0) - sweep.spent) / max(len(left), 1))
    lines, without = [], []
    for each in left:
        try:
            lines.append(_line_left(sweep, each, out, seconds))
        except UsageError as error:
            without.append(f"No line for {each.model}: {_told(error)}")
    return lines, without


def _line_left(sweep: Sweep, student: StudentRecord, out: Path, seconds: int) -> str:
    """The command line that gives a student of a begun sweep so much time, or the rest of what it has.

    Raises:
        UsageError: the time is too short, or the student's run cannot be given more.
    """
    root = out / student.folder
    if not (root / MANIFEST).is_file():
        # A share that is planned was found to suffice, also if others have used up the time since.
        seconds = max(seconds, 0 if student.target is None else math.ceil(student.target.seconds))
        if seconds < 1:
            raise UsageError(
                "No time is left for it.", fix=f"To train it all the same: {own_run(sweep, student, out, 3600)}"
            )
        return own_run(sweep, student, out, seconds)
    line, trust = f"nayer-edge run {shlex.quote(str(root))}", " --trust-code" * is_trusted()
    finished = "student" in RunFolder.open(root).manifest.steps and not (root / CHECKPOINT).is_file()
    made_bank = sweep.maker is not None and sweep.maker.model == student.model
    unjudged = not student.shares and (student.target is not None or made_bank)
    if student.state == "training" or not finished or unjudged:
        return line + trust
    seconds = max(seconds, 1)
    # This writes only into the folder of an unfinished run.
    actions.timed(actions.recipe_in(root), str(root), root, actions.Time(more=seconds))
    return f"{line} --more {seconds}s{trust}"


def own_run(sweep: Sweep, student: StudentRecord, out: Path, seconds: int) -> str:
    """The command line that starts the run of one student of a begun sweep."""
    recipe = recipe_of(sweep.recipe, out)
    bank = bank_of(sweep, out) if recipe.student.bank is None else Path(recipe.student.bank)
    words = [shlex.quote(str(bank))]
    words += [word for item in _settings_since(bank, recipe) for word in ("--set", shlex.quote(item))]
    trust = " --trust-code" * is_trusted()
    return (
        f"nayer-edge run {' '.join(words)} --bank {words[0]} --budget {seconds}s{trust} "
        f"--set student.model={shlex.quote(student.located(out))} --out {shlex.quote(str(out / student.folder))}"
    )


class _Work:
    """A sweep at work in its folder."""

    def __init__(
        self, sweep: Sweep, recipe: Recipe, out: Path, display: Display | None, cluster: on_ray.Cluster | None = None
    ) -> None:
        self.sweep, self.recipe, self.out, self.display = sweep, recipe, out, display
        self.cluster = cluster
        self.workers: Here | OnDevices | on_ray.OnRay = Here(display)
        self.progress: Progress = Silent() if display is None else display.progress
        self.errors: list[NayerEdgeError] = []
        """of the students that failed"""
        self.images = torch.empty(0)
        self.answers = torch.empty(0)
        self.makes_bank = recipe.student.bank is None

    @property
    def open(self) -> list[StudentRecord]:
        """The students that may still get time."""
        return [each for each in self.sweep.students if each.open]

    @property
    def left(self) -> float:
        """Seconds that are left for the students."""
        return (self.sweep.seconds or 0.0) - self.sweep.spent

    @property
    def maker(self) -> StudentRecord | None:
        """The student whose run makes the bank; None if another run does."""
        made = self.sweep.maker
        # It may have made it for other students, before the sweep was planned anew.
        return made and next((each for each in self.sweep.students if each.model == made.model), None)

    def in_first_share(self, student: StudentRecord) -> bool:
        """Whether this student has made the bank, and all that is left of its first share is to judge it."""
        made, target = self.sweep.maker, student.target
        if made is None or made.model != student.model or student.shares:
            return False
        return target is None or target.seconds == made.seconds

    def tell(self, text: str) -> None:
        if self.display is not None:
            self.display.console.print(Text(inert(text)), soft_wrap=True)

    def save(self) -> None:
        write_sweep(self.out, self.sweep)

    def root(self, student: StudentRecord) -> Path:
        return self.out / student.folder

    # -------------------------------------------------------------- before the first round

    def prepare(self) -> None:
        """Makes or takes the bank, draws the images that all students share, and sets the time."""
        again = [each for each in self.sweep.students if each.state in ("failed", "refused")]
        for each in again:
            # It may work this time: more memory or space, a package that was installed, code that is trusted.
            each.state, each.reason, each.ended = "training" if each.target else "waiting", "", ""
            if each.params is None:
                _examine(each, self.recipe, self.out)
        if any(each.open for each in again):
            self.sweep.done = min(self.sweep.done, self.sweep.rounds - 1)
        if not self.open or self.sweep.done >= self.sweep.rounds:
            # Nobody needs a bank.
            return
        for each in self.sweep.students:
            if not each.open and not each.shares:
                self.tell(f"{each.model} does not take part: {each.reason}")
        source = self.bank()
        run = RunFolder.open(source)
        self.recipe = actions.on_bank(self.recipe, source)
        self.note_bank(run)
        if self.sweep.seconds is None:
            self.sweep.seconds = default_seconds(run, len(self.open))
            told = duration(self.sweep.seconds)
            self.tell(
                f"No --budget was given: {told} for the students, {DEFAULT_SHARE:.0%} of the time of separate runs."
            )
        self.save()
        _require_space(self.open, source, self.out)
        self.shared_images(run)
        self.workers = self.place(source)
        self.plan_first()
        self.save()

    def note_bank(self, run: RunFolder) -> None:
        """Records the bank. If it is another one than the first student began with, says whom that concerns."""
        held, digest = self.sweep.bank, bank_digest(run.root) or ""
        if held is not None and held.digest == digest:
            return
        began = [each for each in self.sweep.students if (self.root(each) / SOURCE).is_file()]
        if held is None or not began:
            inside = bank_of(self.sweep, self.out).relative_to(self.out) if self.makes_bank else None
            self.sweep.bank = Bank(
                run=str(inside or portable(self.recipe, self.out)["student"]["bank"]),
                name=str(run.manifest.recipe.get("name")),
                digest=digest,
                images=images_in_bank(run),
            )
            self.sweep.hardware = provenance.hardware()
        elif later := [each.model for each in self.open if each not in began and each is not self.maker]:
            held.changed = True
            counts = f"{images_in_bank(run) or 0:,} images instead of {held.images or 0:,}"
            self.tell(
                f"The memory bank {run.root} has changed since the first student began: {', '.join(later)} will start "
                f"with {counts}, unlike the others."
            )

    def place(self, source: Path) -> Here | OnDevices | on_ray.OnRay:
        """Where the students are trained: on the cluster, on several GPUs, or here."""
        recipe = self.recipe
        in_memory = parse(recipe.teacher.model).source == MEMORY
        if self.cluster is not None:
            if in_memory:
                raise UsageError(
                    f"The teacher {recipe.teacher.model} exists only in this process, so Ray's workers cannot load it.",
                    fix="Run without the cluster, or load the teacher from a file.",
                )
            students = sum(each.state not in ("refused", "failed") for each in self.sweep.students)
            found = on_ray.OnRay(self.cluster, self.out, source, recipe.device, students)
            self.tell(found.described)
            return found
        devices = gpus(recipe.device)
        if len(devices) < 2 or in_memory:
            return Here(self.display)
        self.tell(f"One student on each of {len(devices)} GPUs.")
        return OnDevices(devices)

    def bank(self) -> Path:
        """The run whose images the students start with, made if there is none."""
        if self.recipe.student.bank is not None:
            return Path(self.recipe.student.bank)
        root = bank_of(self.sweep, self.out)
        if self.sweep.bank is not None:
            on_ray.recover(root)
            if "student" not in _steps_of(root):
                raise UsageError(
                    f"The run that made this sweep's images, {root}, is gone.",
                    fix="Start over: repeat the command that began the sweep, with --fresh.",
                )
        elif self.sweep.seconds is None:
            # By the recipe's own student, in the recipe's own sizes.
            root = self.out / BANK
            self.make_bank(self.recipe, root)
        else:
            # A former version, or a call without a time, may have made one in another folder.
            while "student" not in _steps_of(root):
                maker = self.choose_maker()
                root = self.root(maker)
                recipe = self.plan_bank(maker)
                try:
                    self.make_bank(recipe, root)
                except Exception as failure:
                    error, traceback = failure_of(failure)
                    # What goes wrong before the student is not its fault, and the last one leaves nobody else.
                    of_student = not isinstance(error, UsageError | IntegrityError) and "lte" in _steps_of(root)
                    if not of_student or len(self.open) == 1:
                        raise
                    self.fail(maker, error, traceback)
                    self.sweep.maker = None
                    shutil.rmtree(root)
                    self.save()
        return root

    def choose_maker(self) -> StudentRecord:
        """The student whose run makes the bank. It is recorded, so that a repeated command goes on with the same."""
        if self.sweep.maker is None:
            maker = bank_maker(self.sweep)
            first, image_time = bank_share(len(self.open), rounds_for(len(self.open)), self.recipe.image_time)
            seconds = max(self.left, 1.0) * first
            self.sweep.maker = Maker(model=maker.model, folder=maker.folder, seconds=seconds, image_time=image_time)
            self.save()
        return self.sweep.student(self.sweep.maker.model)

    def plan_bank(self, maker: StudentRecord) -> Recipe:
        """The recipe of the run that makes the bank."""
        plan = self.sweep.maker
        assert plan is not None
        student = Student(model=maker.located(self.out))
        recipe = self.recipe.model_copy(update={"student": student, "image_time": plan.image_time})
        try:
            chosen, _ = actions.timed(recipe, None, self.root(maker), actions.Time(budget=plan.seconds))
        except TooShortError as error:
            part = plan.seconds / (self.sweep.seconds or plan.seconds)
            # Another time changes it.
            self.sweep.maker = None
            self.save()
            raise UsageError(
                f"{duration(self.sweep.seconds or 0)} is too short for this sweep.",
                why=f"{part:.0%} of the time is for the run that makes the memory bank, with {maker.model}. "
                f"{error.why}",
                fix=f"Use at least: --budget {math.ceil(1.1 * error.least / part / 60)}m",
            ) from error
        return chosen.model_copy(update={"image_time": self.recipe.image_time})

    def make_bank(self, recipe: Recipe, root: Path) -> None:
        """Runs a recipe until its bank is there; the time counts, except that of training a teacher."""
        if "student" in _steps_of(root):
            return
        began, taught = time.monotonic(), _taught(root)
        try:
            actions.make(recipe, root, last="student", display=self.display)
        finally:
            if self.sweep.seconds is not None and {"teacher", "lte"} <= _steps_of(root).keys():
                self.sweep.spent += time.monotonic() - began - (_taught(root) - taught)
                self.save()

    def shared_images(self, run: RunFolder) -> None:
        """Reads or draws the images that all students are compared on, and the teacher's predictions."""
        path = self.out / HOLDOUT
        recipe = recipe_of(run.manifest.recipe, run.root)
        if not path.is_file():
            teacher, lte, student = (run.artifact(name) for name in ("teacher", "lte", "student"))
            source = SyntheticSource.open(teacher, lte, student, recipe, run)
            count = max(min(source.ready("validate"), MOST_IMAGES), LEAST_IMAGES)
            self.progress.start("draw images to compare on", source.steps("validate", count))
            images = source.draw("validate", count, self.progress)
            self.progress.finish()
            answers = torch.from_numpy(source.teacher_logits(images)).argmax(dim=1)
            save_tensors(path, {"images": torch.from_numpy(as_bytes(images)), "answers": answers})
        tensors = load_tensors(path, "the images of a sweep")
        try:
            self.images, self.answers = tensors["images"], tensors["answers"]
        except KeyError as error:
            raise IntegrityError(f"{path} does not hold the images of a sweep.", fix=f"Remove it: rm {path}") from error

    def recipe_for(self, student: StudentRecord) -> Recipe:
        """The recipe of a student, before its sizes are planned."""
        if student is self.maker:
            own = self.recipe.model_copy(update={"student": Student(model=student.located(self.out))})
            return with_sections(own, sections_of(actions.recipe_in(self.root(student))))
        model = Student(model=student.located(self.out), bank=self.recipe.student.bank)
        return self.recipe.model_copy(update={"student": model})

    def plan_first(self) -> None:
        """Plans the first share of every student that has none."""
        self.plan_waiting()
        maker, plan = self.maker, self.sweep.maker
        if maker is not None and plan is not None and maker.open and maker.target is None:
            # Last: until a student has a target, the sweep may be planned in another way.
            sections = sections_of(self.recipe_for(maker))
            maker.target = Target(round=self.sweep.done + 1, seconds=plan.seconds, sections=sections)

    def plan_waiting(self) -> None:
        """Plans the first share of every student whose run has not begun. Before any has begun, the rounds may become
        fewer, so that the shares suffice for a useful student."""
        # A run that was started by hand gets a further share instead.
        waiting = [each for each in self.open if each.target is None and not (self.root(each) / MANIFEST).is_file()]
        if not waiting:
            return
        recipes = {each.model: shared_bank.started(self.recipe_for(each))[0] for each in waiting}
        measured: dict[str, PlanningCosts] = {}
        errors: list[NayerEdgeError] = []
        tasks = {each.model: Task(recipes[each.model], self.root(each), True, is_trusted()) for each in waiting}
        for model, result in self.counted(tasks):
            if result.measured is not None:
                measured[model] = result.measured
            elif result.error is not None:
                # The others share its time.
                self.fail(self.sweep.student(model), result.error, result.traceback)
                errors.append(result.error)
        waiting = [each for each in waiting if each.open]
        has_shares = any(each.shares for each in self.sweep.students)
        if not waiting and not has_shares and not self.open:
            raise errors[0]
        if not waiting:
            return
        number, taken = self.sweep.done + 1, self.taken(self.sweep.done + 1)
        judged = [each for each in self.open if self.in_first_share(each)]
        left = self.left - sum(rest_seconds(self.recipe_for(each), RunFolder.open(self.root(each))) for each in judged)
        others = len(self.without_share(number)) - len(waiting) - len(judged)
        planned_before = self.sweep.done > 0 or len(waiting) + len(judged) < len(self.open)

        def seconds_of(rounds: int, students: int) -> float:
            return max(share(left, rounds - self.sweep.done, others + students, taken), 1.0)

        def needs(model: str, seconds: float) -> float:
            error = lacking(measured[model], seconds)
            return 0.0 if error is None else error.least

        first = first_round(
            [each.model for each in waiting],
            self.sweep.rounds if planned_before else 1,
            self.sweep.rounds,
            seconds_of,
            needs,
            alone=not planned_before and not has_shares,
            apart=len(judged),
        )
        short = {model: lacking(measured[model], seconds) for model, seconds in first.too_short.items()}
        if not first.students and not planned_before and not has_shares:
            found = [error for error in short.values() if error is not None]
            least = max(error.least for error in found) * len(found)
            if self.makes_bank:
                least += (self.sweep.seconds or 0.0) - left
            raise UsageError(
                f"{duration(self.sweep.seconds or 0)} is too short for {len(found)} students.",
                why=found[0].why,
                fix=f"Use at least {duration(least * 1.1)}, or fewer students.",
            )
        self.sweep.rounds = first.rounds
        seconds = seconds_of(first.rounds, len(first.students))
        for each in waiting:
            if (error := short.get(each.model)) is not None:
                told = duration(first.too_short[each.model])
                self.end(each, "stopped", f"its share of {told} is too short: {error.why}")
                self.tell(f"{each.model} is stopped: {each.reason}")
                line = own_run(self.sweep, each, self.out, math.ceil(error.least))
                self.tell(f"To train it by hand, with the shortest time that suffices: {line}")
                continue
            sections = measured[each.model].planned(seconds).sections
            sections = sections_of(with_sections(recipes[each.model], sections))
            each.target = Target(round=number, seconds=seconds, sections=sections)

    # -------------------------------------------------------------- rounds

    def run_round(self) -> None:
        """Gives every student that is left its share of this round, then decides who goes on.

        Raises:
            NayerEdgeError: no student could be trained at all.
        """
        number = self.sweep.done + 1
        taking_part = self.without_share(number)
        left, before = len(taking_part), self.sweep.spent - self.taken(number)
        for group in [[each] for each in taking_part] if self.workers.at_once == 1 else [taking_part]:
            seconds = self.next_share(left, self.sweep.spent - before)
            left -= len(group)
            for each in group:
                # A share that failed is repeated first, unless the student was trained longer by hand since.
                made = each.target is not None and any(share.round == each.target.round for share in each.shares)
                if each.target is None or made or _outgrown(self.root(each), each.target):
                    each.target = self.extended(each, number, seconds)
            self.train([each for each in group if each.open])
        if self.errors and not any(each.shares for each in self.sweep.students):
            # What ends every run is not the students' fault.
            raise self.errors[0]
        self.halve(number)

    def without_share(self, number: int) -> list[StudentRecord]:
        """The students that still have to get their share of a round."""
        return [each for each in self.open if not any(made.round == number for made in each.shares)]

    def taken(self, number: int) -> float:
        """Seconds of the shares of a round."""
        return sum(made.spent for each in self.sweep.students for made in each.shares if made.round == number)

    def next_share(self, waiting: int, taken: float) -> float:
        """Seconds of each of so many students in the present round, in which others took so long."""
        return share(self.left, self.sweep.rounds - self.sweep.done, waiting, taken)

    def extended(self, student: StudentRecord, number: int, seconds: float) -> Target | None:
        """The plan of a further share; None ends the student."""
        root = self.root(student)
        try:
            require_unlocked(root)
            unfinished = "student" not in RunFolder.open(root).manifest.steps
        except NayerEdgeError as error:
            # The next call tries it again.
            self.fail(student, error)
            return student.target
        try:
            chosen, _ = actions.timed(actions.recipe_in(root), str(root), root, actions.Time(more=max(seconds, 1.0)))
        except UsageError as error:
            if unfinished:
                self.fail(student, error)
            else:
                self.end(student, "stopped", f"{error.what} {error.why}".strip())
            return student.target
        except Exception as failure:  # noqa: BLE001  the others go on
            self.fail(student, *failure_of(failure))
            return student.target
        return Target(round=number, seconds=seconds, sections=sections_of(chosen))

    def train(self, students: Sequence[StudentRecord]) -> None:
        """Brings the runs of students to their targets, then measures them."""
        tasks: dict[str, Task] = {}
        for each in students:
            assert each.target is not None
            self.tell(
                f"{each.model}: share {each.target.round} of {self.sweep.rounds}, {duration(each.target.seconds)}"
                f" ({self.root(each)})"
            )
            each.state = "training"
            on_ray.recover(self.root(each))
            recipe = with_sections(self.recipe_for(each), each.target.sections)
            tasks[each.model] = Task(recipe, self.root(each), trust_code=is_trusted(), seconds=each.target.seconds)
        self.save()
        # The first share of this one was to make the bank.
        took = {each.model: 0.0 for each in students if self.in_first_share(each)}
        to_train = {model: task for model, task in tasks.items() if model not in took}
        with contextlib.closing(self.counted(to_train)) as ended:
            for model, result in ended:
                if result.error is not None:
                    self.fail(self.sweep.student(model), result.error, result.traceback)
                    continue
                took[model] = result.seconds
                if self.workers.at_once > 1:
                    self.tell(f"{model}: trained for {duration(result.seconds)}")
        for each in students:
            if each.open:
                self.measure(each, tasks[each.model], took[each.model], judge=each.model not in to_train)

    def counted(self, tasks: dict[str, Task]) -> Generator[tuple[str, Result]]:
        """The results of tasks as they come in; what they take counts, also if they are interrupted."""
        try:
            with contextlib.closing(self.workers.run(tasks)) as running:
                for model, result in running:
                    self.sweep.spent += result.seconds
                    self.save()
                    yield model, result
        finally:
            # After the tasks were told to end: the time in which they saved their work counts, too.
            now = time.monotonic()
            for model, since in self.workers.started.items():
                share_of = tasks[model].seconds if model in tasks else None
                # On a cluster it may have lost its worker, and waited for another one.
                most = share_of if share_of is not None and self.cluster is not None else math.inf
                self.sweep.spent += min(now - since, most)
            self.workers.started.clear()
            self.save()

    def fail(self, student: StudentRecord, error: NayerEdgeError, traceback: str = "") -> None:
        """Ends a student whose run failed; raises the error if a run was altered."""
        _show(traceback)
        if isinstance(error, IntegrityError) and _altered(self.root(student), Path(self.recipe.student.bank or "")):
            raise error
        self.errors.append(error)
        self.end(student, "failed", _told(error))
        self.tell(f"{student.model} failed: {student.reason}")

    def measure(self, student: StudentRecord, task: Task, took: float, *, judge: bool) -> None:
        """Exports and judges a student that reached its target, unless its workers did, and records its share.

        Args:
            judge: also if they usually do.
        """
        target, began = student.target, time.monotonic()
        assert target is not None
        try:
            run = RunFolder.open(task.root)
            if judge or self.workers.last != "gate":
                run = actions.make(task.recipe, task.root, last="gate", display=self.display)
            agreement = self.agreement(run)
            verdict = results.refresh(student, task.root, self.sweep)
        except Exception as failure:  # noqa: BLE001  the others go on
            self.fail(student, *failure_of(failure))
            return
        finally:
            self.sweep.spent += time.monotonic() - began
            self.save()
        assert verdict is not None
        student.shares.append(
            Share(
                round=target.round,
                seconds=target.seconds,
                spent=took + time.monotonic() - began,
                trained_seconds=_trained_seconds(run),
                agreement=agreement,
                verdict=verdict,
                finished=now(),
            )
        )
        student.state = "waiting"
        self.save()

    def agreement(self, run: RunFolder) -> results.Bounds:
        """Agreement of the FP32 student with the teacher on the images that all students share."""
        student = load_classifier(run.path(STUDENT))
        logits = logits_of(student, self.images, choose("cpu", "fp32"))
        same = int((logits.argmax(dim=1) == self.answers).sum())
        return results.bounds(same, len(self.images), self.recipe.gate.accuracy.confidence)

    def halve(self, number: int) -> None:
        """Decides who goes on, and records why the others do not."""
        measured = [each for each in self.sweep.students if each.shares and (each.open or each.state == "passes")]
        decided = decide([_standing(each) for each in measured], self.sweep.rounds - number)
        for each in measured:
            apply(decided[each.model], each)
            if each.state == "stopped":
                self.tell(f"{each.model} is stopped: {each.reason}.")
        # All decisions at once: with some of them only, a repetition would rank the rest anew.
        self.sweep.done = number
        self.save()

    def end(self, student: StudentRecord, state: State, reason: str) -> None:
        student.state, student.reason, student.ended = state, reason, now()
        self.save()

    # -------------------------------------------------------------- the answer

    def finish(self) -> None:
        """Reads what every run measured, also those that were continued by hand, and writes the answer and the page."""
        for each in self.sweep.students:
            root = self.root(each)
            try:
                results.refresh(each, root, self.sweep)
            except IntegrityError:
                if _altered(root):
                    raise
                where = shlex.quote(str(root))
                self.tell(
                    f"{each.model}: its run is unfinished; the table shows its last verdict. To finish it: "
                    f"nayer-edge run {where}"
                )
            except Exception as failure:  # noqa: BLE001  the answer is also for the others
                error, traceback = failure_of(failure)
                _show(traceback)
                self.tell(f"{each.model}: its run cannot be read; the table shows its last verdict. {_told(error)}")
        results.conclude(self.sweep, self.out)
        self.save()
        write_page(self.sweep, self.recipe.gate, self.out / PAGE)


def apply(decision: Decision, student: StudentRecord) -> None:
    """Records what becomes of a student after a round."""
    states: dict[str, State] = {"continue": "waiting", "pass": "passes", "stop": "stopped"}
    student.state, student.reason = states[decision.action], decision.reason
    if decision.action != "continue":
        student.ended = now()


def _folders(models: Sequence[str]) -> list[tuple[str, str]]:
    """A folder for every student, from its name."""
    found: dict[str, str] = {}
    for model in models:
        plain = re.sub(r"[^A-Za-z0-9]+", "_", model.rpartition(":")[2] or model).strip("_") or "student"
        name, number = plain, 2
        while name in (*found.values(), BANK):
            name, number = f"{plain}_{number}", number + 1
        found[model] = name
    return list(found.items())


def _named(models: Sequence[str], out: Path) -> list[str]:
    """The students as the record names them: files and folders relative to the sweep's folder, because the sweep may
    be continued from another current folder.

    Raises:
        UsageError: one is listed twice, or is not the name of a model.
    """
    return require_distinct(portable_model(located(model.strip(), Path.cwd()), out) for model in models)


def _examine(student: StudentRecord, recipe: Recipe, out: Path) -> None:
    """Fills in what a student costs, or why it does not take part."""
    teacher, model = recipe.teacher, student.located(out)
    if model == teacher.model and not teacher.arguments:
        student.state, student.reason = "refused", "it is the teacher's own network"
        return
    try:
        cost = student_cost(model, teacher.input, teacher.classes, recipe.gate)
        if cannot_pass(cost, recipe.gate):
            # One latency may be a disturbance.
            cost = student_cost(model, teacher.input, teacher.classes, recipe.gate)
    except Exception as failure:  # noqa: BLE001  the others go on
        error, traceback = failure_of(failure)
        _show(traceback)
        curable = resource_error(failure) is not None or not isinstance(error, UsageError)
        student.state, student.reason = "failed" if curable else "refused", _told(error)
        return
    student.params, student.macs, student.int8_bytes = cost.params, cost.macs, cost.int8_bytes
    if reason := cannot_pass(cost, recipe.gate):
        student.state, student.reason, student.ended = "stopped", EXCLUDED + reason, now()


def _require_same(
    sweep: Sweep, recipe: Recipe | None, bank: Path | None, out: Path, models: Sequence[str], seconds: float | None
) -> None:
    """Raises UsageError if the folder's sweep is not the one that is asked for."""
    differing = []
    if recipe is not None and recipe.name != sweep.name:
        differing.append(f"the recipe is '{sweep.name}', not '{recipe.name}'")
    if recipe is not None:
        # A sweep plans some keys itself, except for a bank that is made without a time.
        plans = seconds is not None or bank is not None or recipe.student.bank is not None
        without = planned_keys() if plans else ()
        differing += changes_of(_shared(sweep.recipe, without), _shared(portable(recipe, out), without))
    asked_for = {located(model, Path.cwd()) for model in require_distinct(models)} if models else set()
    if models and asked_for != {each.located(out) for each in sweep.students}:
        differing.append(f"its students are {', '.join(each.model for each in sweep.students)}")
    if seconds is not None and sweep.seconds is not None and seconds != sweep.seconds:
        differing.append(f"its time is {duration(sweep.seconds)}")
    if bank is not None and sweep.bank is not None and bank_digest(bank) != sweep.bank.digest:
        held = recipe_of(sweep.recipe, out).student.bank
        # A bank that has grown since is still the sweep's.
        if held is None or Path(held).resolve() != bank.resolve():
            differing.append(f"its bank is {sweep.bank.run}")
    if differing:
        # The sweep's own bank, or one of its runs.
        inside = bank is not None and bank.resolve().is_relative_to(out.resolve())
        raise UsageError(
            f"{out} holds another sweep.",
            why="; ".join(differing) + ".",
            fix=f"To continue it: nayer-edge sweep {shlex.quote(str(out))}\n"
            f"Otherwise choose another folder with --out{'' if inside else ', or start over with --fresh'}.",
        )


def _shared(recipe: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """What students of a sweep must have in common, of a recipe's values.

    Args:
        without: dotted keys that are left out.
    """
    # A former version wrote fewer.
    found = {name: recipe[name] for name in _SAME if name in recipe}
    for name in _PLANNED:
        section = recipe.get(name) or {}
        found[name] = {key: value for key, value in section.items() if f"{name}.{key}" not in without}
    return found


def _settings_since(bank: Path, recipe: Recipe) -> list[str]:
    """The `--set` items that give the recipe of a bank's run the values that a sweep's students share, without those
    that `--bank` and `--budget` set."""
    own = actions.recipe_in(bank)
    shared, _ = shared_bank.started(actions.on_bank(recipe, bank))
    before, now = (_shared(each.model_dump(mode="json", by_alias=True), planned_keys()) for each in (own, shared))
    # They are those of the bank's own student.
    return [*_differing(before, now), *(["student.arguments={}"] if own.student.arguments else [])]


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Items "a.b=c" for every value that differs. TOML has no null, so a value that is null now is left out."""
    found = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _differing(old, value, f"{prefix}{key}.")
        elif value != old and value is not None:
            # TOML has no escapes for halves of characters.
            found.append(f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}")
    return found


def _require_space(students: Sequence[StudentRecord], source: Path, out: Path) -> None:
    """Raises UsageError if the disk has no room for the runs."""
    run = RunFolder.open(source)
    bank = run.manifest.files[BANK_FILE].bytes
    linked = 0
    if source.stat().st_dev != out.stat().st_dev:
        linked = sum(run.manifest.files[name].bytes for name in run.artifact("teacher").files.values()) + 2 * bank
    need = sum(BANK_COPIES * bank + 40 * (each.params or 0) + linked for each in students if not each.shares)
    free = shutil.disk_usage(out).free
    if need > free:
        raise UsageError(
            f"The disk is too small for {len(students)} students.",
            why=f"Together, their runs need about {need / 1e9:.2g} GB, and {out} has {free / 1e9:.2g} GB free.",
            fix="Free some space, choose another folder with --out, or name fewer students.",
        )


def _own_folders(out: Path) -> list[Path]:
    """The folders of a sweep that `--fresh` removes.

    Raises:
        UsageError: the folder holds something else.
    """
    if not (out / RECORD).is_file():
        if is_vacant(out):
            return []
        raise UsageError(
            f"{out} is not empty and not the folder of a sweep, so --fresh will not empty it.",
            fix="Choose another folder with --out, or empty this one yourself.",
        )
    try:
        runs = [*(each.folder for each in read_sweep(out).students), BANK]
    except IntegrityError:
        runs = [path.parent.name for path in out.glob(f"*/{MANIFEST}")]
    names = [f"{run}{kind}" for run in runs for kind in ("", ".new", ".former", ".tensorboard")]
    folders = [out / name for name in names if Path(name).name == name]
    return [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]


def _refuse_to_delete_inputs(sweep: Sweep, recipe: Recipe, out: Path, removed: Sequence[Path]) -> None:
    """Raises UsageError if what the new sweep reads lies in folders that are to be removed."""
    named = {
        "student.bank": recipe.student.bank,
        "teacher.weights": recipe.teacher.weights,
        "teacher.model": parse(recipe.teacher.model).path,
        "lte.encoder": recipe.lte.encoder,
        "teach.data": recipe.teach.data if recipe.teach else None,
        "validate.data": recipe.validate_.data,
        **{each.model: parse(each.located(out)).path for each in sweep.students},
    }
    # Names of encoders and data sets are no absolute paths.
    paths = {name: Path(path).resolve() for name, path in named.items() if path and Path(path).is_absolute()}
    inside = [
        f"{name} ({path})"
        for name, path in paths.items()
        if any(path.is_relative_to(folder.resolve()) for folder in removed)
    ]
    if inside:
        raise UsageError(
            "--fresh would delete what the new sweep reads.",
            why=f"Part of the sweep in {out}: {', '.join(inside)}.",
            fix="Choose another folder with --out, or copy it to another folder first.",
        )


def _clear(out: Path) -> None:
    """Empties the folder of a sweep."""
    for folder in _own_folders(out):
        shutil.rmtree(folder)
    # The record goes last: until then an interruption leaves the folder recognisable.
    for name in (HOLDOUT, PAGE, *on_ray.FILES, RECORD):
        (out / name).unlink(missing_ok=True)


def _steps_of(root: Path) -> Mapping[str, StepRecord]:
    """The finished steps of a run; none if it has not begun."""
    return RunFolder.open(root).manifest.steps if (root / MANIFEST).is_file() else {}


def _taught(root: Path) -> float:
    """Seconds of the steps before the student; 0 where they were not run."""
    steps = _steps_of(root)
    return sum(steps[name].seconds for name in ("teacher", "lte") if name in steps)


def _altered(*roots: Path) -> bool:
    """Whether a run was changed since it was made."""
    try:
        return any(RunFolder.open(root).problems() for root in roots if (root / MANIFEST).exists())
    except IntegrityError:
        return True


def _standing(student: StudentRecord) -> Standing:
    last = student.shares[-1]
    return Standing(
        student.model,
        student.size,
        last.agreement.value,
        # Trained longer by hand, it may pass although its last share did not.
        last.verdict == "pass" or student.state == "passes",
        results.limit_missed(student),
    )


def lacking(costs: PlanningCosts, seconds: float) -> TooShortError | None:
    """The error if these are too few seconds for a useful student; None if they suffice."""
    try:
        costs.planned(seconds)
    except TooShortError as error:
        return error
    return None


def _told(error: NayerEdgeError) -> str:
    """What happened, why, and what to do next, in one line."""
    # What to do about these is said for runs whose sizes are set by hand.
    by_hand = isinstance(error, TrainingError) or error.what == OUT_OF_MEMORY
    parts = (error.what, error.why, "" if by_hand else error.fix)
    # A sentence that another one follows ends with its full stop.
    ended = [
        part if part.rstrip().endswith((".", "!", "?", ":")) else f"{part.rstrip()}." for part in parts[:2] if part
    ]
    return " ".join(" ".join([*ended, parts[2]]).split())


def _show(traceback: str) -> None:
    """Prints where an unexpected error happened, with --debug."""
    if traceback and os.environ.get("NAYER_EDGE_DEBUG"):
        print(traceback, file=sys.stderr)  # noqa: T201


def _outgrown(root: Path, target: Target) -> bool:
    """Whether a student's run is finished, and longer than a share would make it or planned by hand."""
    if not (root / MANIFEST).is_file() or "student" not in RunFolder.open(root).manifest.steps:
        return False
    own, of = actions.recipe_in(root), target.sections
    # Begun by hand with another time, it has other sizes than a first share would have; a further one sets no sizes.
    same_sizes = all(
        value == getattr(section, key)
        for section, values, key in (
            (own.distill, of["distill"], "steps"),
            (own.synthesis, of.get("synthesis", {}), "rounds"),
        )
        if (value := values.get(key)) is not None
    )
    return own.distill.epochs > of["distill"]["epochs"] or not same_sizes


def _trained_seconds(run: RunFolder) -> float:
    return sum(float(line["seconds"]) for line in metrics_of(run.root) if line["phase"] == "distill")
