"""Checks a recipe before any work, and reports all problems at once rather than one after hours of training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models import in_memory
from nayer_edge.models.names import MEMORY, parse, published_weights

from ..steps import BANK, CHECKPOINT, DECAY_STATE, NEXT_DECAY_STATE, Step
from .loading import BUILT_IN_DATA
from .schema import Recipe

if TYPE_CHECKING:
    from nayer_edge.models.classifier import Classifier

_OTHER_IMAGES = "Use other images: nayer-edge validate RUN --data …   or synthetic ones: --synthetic"
RUN_THE_TEACHER = {"teacher", "student", "int8", "validate"}
"""steps that run the teacher's network"""


def check(recipe: Recipe, steps: Sequence[Step], root: Path | None = None, fresh: bool = False) -> None:
    """Checks that files exist, models can be built, targets are known, and the images fit on the disk.

    Args:
        steps: those that will run; what only others need is not checked.
        root: the run folder; without it, the disk is not checked.
        fresh: the folder will be emptied first.

    Raises:
        UsageError: with every problem.
    """
    names = {step.name for step in steps}
    if names & RUN_THE_TEACHER:
        require_teacher(recipe)
    problems = []
    if "teacher" in names:
        problems += _path("teacher.weights", recipe.teacher.weights)
        if recipe.student.bank is None:
            problems += _path("teach.data", recipe.teach.data if recipe.teach else None)
        problems += _teacher(recipe)
    if "lte" in names and recipe.student.bank is None:
        problems += _embeddings(recipe)
    if "student" in names:
        problems += _student(recipe)
        if (recipe.student.model, recipe.student.arguments) == (recipe.teacher.model, recipe.teacher.arguments):
            problems.append(f"student.model: the same network as the teacher ({recipe.teacher.model})")
        images = recipe.distill.bank_mib * 2**20 / _pixels(recipe)
        if images < recipe.synthesis.batch:
            problems.append(
                f"distill.bank_mib: {recipe.distill.bank_mib:g} MiB hold {int(images)} images, "
                f"one round makes {recipe.synthesis.batch}"
            )
        problems += _processes(recipe)
        problems += _disk(recipe, root, fresh) if root is not None else []
    if "int8" in names:
        problems += _targets(recipe)
    missing_data = _path("validate.data", recipe.validate_.data) if "validate" in names else []
    problems += missing_data
    if problems:
        raise UsageError(
            f"The recipe '{recipe.name}' cannot run here:",
            why="\n".join(f"  - {problem}" for problem in problems),
            fix=_OTHER_IMAGES
            if problems == missing_data
            else "Fix these lines, or override them with --set. Nothing was started.",
        )


def require_teacher(recipe: Recipe) -> None:
    """Raises UsageError if the teacher is an nn.Module of a Python program other than this one."""
    model = parse(recipe.teacher.model)
    if model.source == MEMORY and not in_memory.is_held(recipe.teacher.model):
        raise in_memory.not_held(model)


def require_typed(recipe: Recipe, keys: Collection[str]) -> None:
    """Checks that files named on the command line exist, even where the steps that read them are finished.

    Args:
        keys: dotted keys of the recipe that were typed.

    Raises:
        UsageError: with every missing file.
    """
    values = {
        "teacher.weights": recipe.teacher.weights,
        "teach.data": recipe.teach.data if recipe.teach else None,
        "validate.data": recipe.validate_.data,
    }
    problems = [problem for key in keys for problem in _path(key, values.get(key))]
    if problems:
        raise UsageError("; ".join(problems) + ".", fix="Correct the path. Nothing was started.")


def _pixels(recipe: Recipe) -> int:
    channels, height, width = recipe.teacher.input.shape
    return channels * height * width


def _path(key: str, value: str | None) -> list[str]:
    if value is None or value in BUILT_IN_DATA or published_weights(value) or Path(value).exists():
        return []
    if value.startswith("$"):
        variable = value[1:].split("/", 1)[0]
        return [f"{key}: {value}, and the environment variable {variable} is not set"]
    return [f"{key}: there is no {value}"]


def _embeddings(recipe: Recipe) -> list[str]:
    from nayer_edge.labels import embeddings as lte

    try:
        lte.check(recipe.teacher.classes, recipe.lte)
    except (UsageError, IntegrityError) as error:
        return ["lte.encoder: " + " ".join(part for part in (error.what, error.why, error.fix) if part)]
    return []


def _teacher(recipe: Recipe) -> list[str]:
    from nayer_edge.models.load import untrained_teacher

    return _model("teacher.model", lambda: untrained_teacher(recipe.teacher), recipe.synthesis.prior)


def _student(recipe: Recipe) -> list[str]:
    from nayer_edge.models.load import build_classifier

    student, teacher = recipe.student, recipe.teacher
    return _model(
        "student.model", lambda: build_classifier(student.model, teacher.input, teacher.classes, student.arguments)
    )


def _model(key: str, build: Callable[[], Classifier], prior: str = "") -> list[str]:
    """Why a network cannot be built, cannot take the images, or, with a prior, cannot teach without data."""
    import torch

    from nayer_edge.models.load import check_forward
    from nayer_edge.models.prior import require_prior

    def tried() -> None:
        network = build()
        if prior:
            require_prior(network, f"The teacher {network.model}", prior)
        check_forward(network)

    try:
        # The meta device allocates no weights.
        with torch.device("meta"):
            tried()
    except (UsageError, RuntimeError):
        # Some networks need real weights to be built; a real problem occurs again.
        try:
            tried()
        except UsageError as error:
            return [f"{key}: " + " ".join(part for part in (error.what, error.why, error.fix) if part)]
    return []


def _processes(recipe: Recipe) -> list[str]:
    """Why the images are too few, or several processes cannot share the work."""
    import torch

    from nayer_edge.distillation import discard_problem
    from nayer_edge.runtime.distributed import current, share_problems

    size = current().size
    problems = share_problems(recipe.synthesis, recipe.distill, len(recipe.teacher.classes), size)
    if recipe.student.bank is None and (problem := discard_problem(recipe.synthesis, recipe.distill)):
        problems.append(problem)
    if size > 1 and recipe.student.bank is not None:
        problems.append(f"student.bank: another run's bank cannot be divided between {size} processes")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if size > 1 and recipe.device != "cpu" and 0 < gpus < here:
        problems.append(f"device: {here} processes and {gpus} GPUs on this machine; each process needs its own")
    return problems


def _disk(recipe: Recipe, root: Path, fresh: bool) -> list[str]:
    """Why the images do not fit on the disk."""
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    disk = shutil.disk_usage(existing)
    if not disk.total:
        # No file system for files, such as /proc: writing says what is wrong.
        return []
    # What a finished student consists of stays until a longer run is finished.
    replaced = (CHECKPOINT, NEXT_DECAY_STATE, *((BANK, DECAY_STATE) if fresh else ()))
    free = disk.free + sum(path.stat().st_size for name in replaced if (path := root / name).is_file())
    images = images_of(recipe)
    if recipe.student.bank and (taken := Path(recipe.student.bank) / BANK).is_file():
        images += taken.stat().st_size // _pixels(recipe)
    needed = images * disk_per_image(recipe)
    if needed <= free:
        return []
    return [
        f"{root}: a memory bank of {images:,} images needs {needed / 2**30:,.1f} GiB with its checkpoints, "
        f"and {free / 2**30:,.1f} GiB are free; choose another folder with --out, or lower distill.bank_mib"
    ]


def disk_per_image(recipe: Recipe) -> int:
    """Largest number of bytes on the disk per image in a run's memory bank: the last checkpoint stays until the next is
    whole, and beside them lies the state before the decay, with the cached views but without the images."""
    views = recipe.distill.views * len(recipe.teacher.classes) * 4
    return 2 * (_pixels(recipe) + views) + (views if recipe.distill.schedule == "constant" else 0)


def images_of(recipe: Recipe) -> int:
    """Largest number of images in the memory bank of a run."""
    synthesis, distill = recipe.synthesis, recipe.distill
    trained = distill.epochs - distill.warmup_epochs - distill.decay_epochs
    rounds = distill.warmup_epochs * synthesis.warmup_rounds + trained * synthesis.rounds
    return min(rounds * synthesis.batch, int(distill.bank_mib * 2**20) // _pixels(recipe))


def _targets(recipe: Recipe) -> list[str]:
    from nayer_edge.export.targets import FP16_SCALES, get_target

    problems = []
    for name in recipe.export.targets:
        try:
            target = get_target(name)
        except UsageError as error:
            problems.append(f"export.targets: {error.what}")
            continue
        if target.rest == "float16" and recipe.export.opset < FP16_SCALES:
            problems.append(
                f"export.opset: {recipe.export.opset}, but '{name}' needs Q/DQ scales in FP16, which require "
                f"opset {FP16_SCALES} or newer"
            )
    return problems
