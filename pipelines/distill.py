"""The steps of the method: teacher → label-text embeddings → student. The student step uses no data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nayer_edge import generator as generators
from nayer_edge import train_teacher as teaching
from nayer_edge.batchnorm import raise_bn_momentum
from nayer_edge.data import datasets as data
from nayer_edge.distillation import Before, Distillation, Epoch, Length, Settings, Start, distill
from nayer_edge.errors import IntegrityError, TrainingError
from nayer_edge.generator import Generator
from nayer_edge.labels import embeddings as embeddings_of_labels
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.models.load import build_classifier, load_classifier, load_teacher, save_classifier, untrained_teacher
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime import distributed
from nayer_edge.runtime.compute import random_stream, seeded
from nayer_edge.runtime.distributed import World
from nayer_edge.runtime.progress import Progress, Silent
from nayer_edge.storage.files import write_bytes
from nayer_edge.storage.run_folder import Artifact, RunFolder

from . import shared_bank
from .costs.budget import Drawing, adapted
from .costs.durations import duration
from .costs.early_end import Requests
from .image_grid import write_grid
from .recipes.schema import Recipe
from .steps import (
    BANK,
    CHECKPOINT,
    DECAY_STATE,
    NEXT_DECAY_STATE,
    NEXT_METRICS,
    SOURCE,
    START_FILES,
    TEACHER_CHECKPOINT,
)
from .tracking import TensorBoard

TEACHER = "teacher/teacher.safetensors"
STUDENT = "student/student.safetensors"
GENERATOR = "generator/generator.safetensors"
EMBEDDINGS = "lte.safetensors"
RESERVE = "reserve.safetensors"
METRICS = "metrics.jsonl"
PICTURE = "generator/synthetic.png"


def metrics_of(root: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one entry per epoch.

    Raises:
        IntegrityError: they cannot be read.
    """
    path = root / METRICS
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is not readable as metrics.", why=f"{error}") from error


def make_teacher(*, config: Recipe, out: RunFolder, progress: Progress) -> Artifact:
    """Trains the teacher on labelled images, or loads the weights named in the recipe; with `student.bank`, takes that
    run's teacher."""
    if taken := shared_bank.taken_step("teacher", config, out):
        return taken
    compute = computing.choose(config.device, config.precision)
    random = random_stream(config.seed, "teacher")
    with seeded(random.initial_seed()):
        teacher = untrained_teacher(config.teacher)
    facts: dict[str, object] = {}
    if config.teach is not None:
        images = data.load(config.teach.data, "train", config.teacher.input, config.teacher.classes)
        raise_bn_momentum(teacher)
        checkpoint = out.path(TEACHER_CHECKPOINT)
        teaching.teach(teacher, images, config.teach, compute, config.seed, progress, checkpoint)
        facts = {
            "trained_on": images.name,
            "images": len(images),
            # Without the path of the images: the card ships with the teacher.
            "teach": config.teach.model_dump(mode="json", exclude={"data"}),
        }
    else:
        teacher, facts = load_teacher(config.teacher, teacher, config.synthesis.prior)
    if config.teacher.input_from:
        facts["input_from"] = config.teacher.input_from
    out.forget("teacher")
    save_classifier(teacher, out.path(TEACHER), facts)
    return Artifact(
        "teacher",
        {"teacher": TEACHER, "teacher card": card_of(TEACHER)},
        {
            "model": teacher.model,
            "parameters": teacher.parameter_count,
            **{name: str(facts[name]) for name in ("source", "key", "input_from") if name in facts},
        },
    )


def make_lte(*, config: Recipe, out: RunFolder, progress: Progress) -> Artifact:
    """Embeds the class names, or reads their embeddings from the package or the user's cache; with `student.bank`,
    takes that run's embeddings."""
    del progress
    if taken := shared_bank.taken_step("lte", config, out):
        return taken
    found = embeddings_of_labels.build(config.teacher.classes, config.lte)
    embeddings_of_labels.save(found, out.path(EMBEDDINGS))
    classes, dimensions = found.embeddings.shape
    return Artifact(
        "lte",
        {"lte": EMBEDDINGS},
        {
            "encoder": found.encoder,
            "classes": classes,
            "dimensions": dimensions,
            "mean cosine": round(embeddings_of_labels.mean_cosine(found.embeddings), 3),
        },
    )


def make_student(teacher: Artifact, lte: Artifact, *, config: Recipe, out: RunFolder, progress: Progress) -> Artifact:
    """Distils the student; saves checkpoints, and resumes from the last one.

    The files of a finished student that is being improved are replaced after the last epoch.
    """
    world = distributed.current()
    extends = "student" in out.manifest.steps
    files = {"teacher": out.path(teacher.files["teacher"]), "lte": out.path(lte.files["lte"])}
    names = {"checkpoint": CHECKPOINT, "state": DECAY_STATE, "bank": BANK, "reserve": RESERVE}
    source = shared_bank.take_over(config, out) if config.student.bank else None
    if source is not None:
        names["source"] = SOURCE
        names |= {f"first {role}": name for role, name in START_FILES.items() if out.path(name).is_file()}
    files |= {role: out.path(name) for role, name in names.items()} | {"root": out.root}
    metrics = out.path(NEXT_METRICS if extends else METRICS)
    lines: list[str] = []
    board = TensorBoard(out.root) if config.tracking == "tensorboard" else None

    def log(epoch: Epoch) -> None:
        if board is not None:
            board.log(epoch)
        lines.append(json.dumps({key: _rounded(value) for key, value in vars(epoch).items()}))
        write_bytes(metrics, ("\n".join(lines) + "\n").encode())

    # The other ranks receive this in `take_part`.
    paths = {role: str(path.resolve()) for role, path in files.items()}
    world.from_first({"recipe": config.model_dump(mode="json", by_alias=True), "files": paths})
    run, generator, bank, reserve = _distil(config, files, progress, log, source and source.digest)
    if board is not None:
        board.close()
    student = run.result()
    facts = {"distilled_from": run.teacher.model, "select": config.distill.select}
    out.forget("student")
    save_classifier(student, out.path(STUDENT), facts)
    made = {"bank": BANK}
    if generator is not None:
        generators.save(generator, run.statistics and run.statistics.memory, out.path(GENERATOR))
        made |= {"generator": GENERATOR, "generator card": card_of(GENERATOR)}
    bank.save(out.path(BANK))
    if len(reserve):
        reserve.save(out.path(RESERVE))
        made["images put aside"] = RESERVE
    if (state := out.path(NEXT_DECAY_STATE)).is_file():
        state.replace(out.path(DECAY_STATE))
    if out.path(DECAY_STATE).is_file():
        made["state before decay"] = DECAY_STATE
    if source is not None:
        made["source run"] = SOURCE
    if extends:
        metrics.replace(out.path(METRICS))
    length = run.settings.distill
    images, labels = bank.newest(config.synthesis.batch * config.synthesis.rounds)
    write_grid(images.cpu().numpy(), labels.tolist(), student.classes, out.path(PICTURE))
    return Artifact(
        "student",
        {
            "student": STUDENT,
            "student card": card_of(STUDENT),
            **made,
            "metrics": METRICS,
            "picture": PICTURE,
        },
        {
            "model": student.model,
            "parameters": student.parameter_count,
            "synthetic agreement": round(run.shipped_agreement, 4),
            "bank images": len(bank),
            **({"images put aside": len(reserve)} if len(reserve) else {}),
            **(
                {"epochs": length.epochs, "decay epochs": length.decay_epochs} if Length.of(length) != run.asked else {}
            ),
            **({"processes": world.size} if world.size > 1 else {}),
            **({"started from": source.run} if source else {}),
        },
        source.hashes if source else (),
    )


def take_part(world: World) -> None:
    """Runs on every rank except the first: waits for the student step of rank 0, and does its share of the work."""
    while True:
        try:
            task = world.from_first()
        except TrainingError as error:
            # Rank 0 ended before the student step, and has printed the reason.
            raise SystemExit(error.exit_code) from error
        if task is None:
            return
        files = {role: Path(path) for role, path in task["files"].items()}
        _distil(Recipe.model_validate(task["recipe"]), files, Silent(), lambda _epoch: None)


def _distil(
    config: Recipe,
    files: Mapping[str, Path],
    progress: Progress,
    on_epoch: Callable[[Epoch], None],
    start_digest: str | None = None,
) -> tuple[Distillation, Generator | None, MemoryBank, MemoryBank]:
    """The part of the student step that runs on every rank. Returns the finished run and, on rank 0, the generator
    (None if images are procedural), the memory bank and the reserved images of all ranks.

    Args:
        start_digest: identifies the files of another run that this one starts from.
    """
    run = open_distillation(config, files["teacher"], files["lte"], start_digest)
    # A run on another run's bank may have reserved images although its own recipe reserves none.
    reserve = files["reserve"] if files["reserve"].is_file() else None
    start = None
    if "first bank" in files and ("first generator" in files or not config.synthesis.has_generator):
        start = Start(files["first bank"], files.get("first generator"), files.get("first images put aside"))
    # Only a constant schedule can be continued from before its decay.
    before = Before(files["state"], files["bank"], reserve) if config.distill.schedule == "constant" else None

    # The learning rate of another schedule cannot fall early.
    requests = Requests(files["root"]) if before is not None and distributed.current().first else None
    since: int | None = None

    def adapt(history: Sequence[Epoch], length: Length) -> Length | None:
        nonlocal since
        since = len(history) - 1 if since is None else since
        if requests is not None and (shorter := requests.length(history, length)) is not None:
            progress.notice(f"Finishing as requested by --finish: {shorter.epochs} epochs instead of {length.epochs}.")
            return shorter
        if config.budget is None:
            return None
        of = config.distill
        drawing = Drawing(of.views, of.steps * of.batch) if of.views else None
        found = adapted(history, length, config.budget, drawing, since)
        if found is not None:
            progress.notice(
                f"{'Slower' if found.epochs < length.epochs else 'Faster'} than planned: {found.epochs} epochs instead "
                f"of {length.epochs}, to keep the budget of {duration(config.budget.seconds)}."
            )
        return found

    distill(run, files["checkpoint"], before, start, progress=progress, on_epoch=on_epoch, adapt=adapt)
    return run, run.whole_generator(), run.whole_bank(), run.whole_reserve()


def open_distillation(config: Recipe, teacher: Path, lte: Path, start_digest: str | None = None) -> Distillation:
    """Sets up the distillation of a recipe from the files of a saved teacher and its label embeddings.

    Args:
        start_digest: identifies the files of another run that it starts from.
    """
    compute = computing.choose(config.device, config.precision)
    network = load_classifier(teacher)
    embeddings = embeddings_of_labels.load(lte)
    with seeded(random_stream(config.seed, "student").initial_seed()):
        student = build_classifier(config.student.model, network.spec, network.classes, config.student.arguments)
    raise_bn_momentum(student)
    settings = Settings(config.generator, config.synthesis, config.distill, config.seed, start_digest)
    return Distillation(network, embeddings, student, settings, compute, distributed.current())


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def card_of(weights: str) -> str:
    """The path of the card beside a weights file."""
    return weights.removesuffix(".safetensors") + ".json"
