"""The operations on a run, shared by the command line and the Python API.

They take paths and values, print nothing, and raise on errors. Heavy modules are imported inside the functions, because
`gate` needs only the base install.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from nayer_edge.errors import MissingError, UsageError
from nayer_edge.storage.files import expanded

if TYPE_CHECKING:
    import numpy as np

    from nayer_edge.config import Fit
    from nayer_edge.storage.run_folder import RunFolder

    from .gate.judgement import Verdict
    from .recipes.schema import Recipe
    from .show import Display


def read_recipe(name: str, settings: list[str] | None = None, bank: Path | None = None) -> Recipe:
    """Reads a shipped recipe, a recipe file or a run folder's recipe, with overrides ("a.b=c").

    Args:
        bank: another run, whose images the run starts with.

    Raises:
        UsageError: unknown recipe, invalid recipe, or a file named in the overrides does not exist.
        IntegrityError: the run folder's manifest is damaged.
    """
    from .recipes.loading import load_recipe
    from .recipes.preflight import require_typed

    recipe = load_recipe(name, settings)
    require_typed(recipe, [setting.partition("=")[0].replace(" ", "") for setting in settings or []])
    return recipe if bank is None else on_bank(recipe, bank)


def on_bank(recipe: Recipe, bank: Path) -> Recipe:
    """The recipe of a run that starts with the images of another run."""
    return recipe.model_copy(
        update={"student": recipe.student.model_copy(update={"bank": str(expanded(bank).resolve())})}
    )


def open_run(root: Path) -> RunFolder:
    """Opens a run folder and reads its manifest.

    Raises:
        UsageError: not a run folder.
        IntegrityError: its manifest is damaged.
    """
    # Importing pydantic takes half of the time that `--help` may take.
    from nayer_edge.storage.run_folder import RunFolder

    return RunFolder.open(root)


def recipe_in(root: Path) -> Recipe:
    """The resolved recipe of a run folder. Raises: see `open_run`."""
    from .recipes.loading import recipe_of

    return recipe_of(open_run(root).manifest.recipe, root)


def default_out(name: str, recipe: Recipe) -> Path:
    """The default run folder of a recipe; for a run folder's recipe, that folder."""
    from .recipes.loading import run_folder

    return run_folder(name) or Path("runs") / recipe.name


@dataclass(frozen=True)
class Time:
    """The time that a run gets, in seconds; None if not given.

    Attributes:
        budget: for the whole run.
        more: for further training of a run's student.
        finish: until an unfinished run ends.
    """

    budget: float | None = None
    more: float | None = None
    finish: float | None = None

    @classmethod
    def typed(cls, budget: str | None, more: str | None = None, finish: str | None = None) -> Time:
        """Of durations such as "20m".

        Raises:
            UsageError: not a duration, or more than one is given.
        """
        from .costs.durations import parse_duration

        typed = {"--budget": budget, "--more": more, "--finish": finish}
        given = {option: text for option, text in typed.items() if text is not None}
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} cannot be combined.", fix="Use one of them.")
        return cls(**{option[2:]: parse_duration(text, option) for option, text in given.items()})


def timed(
    recipe: Recipe,
    name: str | None,
    root: Path,
    time: Time,
    *,
    fresh: bool = False,
    settings: Sequence[str] = (),
) -> tuple[Recipe, list[tuple[str, str]]]:
    """The recipe with the sizes or the length that fit the given time, and the plan in words (heading, text). With
    `student.bank`, it also has what a new run takes over from that run.

    Args:
        name: the recipe as typed: a name, a file, or a run folder to continue; None if it comes from a program.
        root: the run folder.
        fresh: the folder will be emptied first.
        settings: `--set` items that the recipe was read with.

    Raises:
        UsageError: too little time, the run cannot change its length, the other run's bank does not fit, a plan
            replaces what was set, or another process works in the folder.
        IntegrityError: the other run was altered.
    """
    from nayer_edge.storage.run_folder import require_unlocked

    from .recipes.loading import run_folder

    if time != Time():
        require_unlocked(root)
    named = run_folder(name) if name is not None else None
    # The recipe of a run folder may also start another run.
    is_run = named is not None and not fresh and named.resolve() == root.resolve()
    words: list[tuple[str, str]] = []
    asked = recipe
    if not is_run and recipe.student.bank is not None:
        from .shared_bank import started

        recipe, words = started(recipe)
        # The epochs asked for, minus the warm-up that the taken images replace.
        kept = [each for each in settings if each.partition("=")[0].strip() != "distill.epochs"]
        _require_kept(kept, asked, recipe, "--bank")
    if is_run and recipe.distill.schedule == "constant":
        from .costs.planning import continued

        if settings:
            _require_no_extension(open_run(root), time)
        recipe = continued(recipe, root)
    if time.budget is not None:
        from .costs.planning import require_new_plan, with_budget

        if is_run and (recipe.budget is None or recipe.budget.seconds != time.budget):
            require_new_plan(recipe, open_run(root), time.budget)
        recipe, plan = with_budget(recipe, time.budget, None if fresh else root)
        _require_kept(settings, asked, recipe, "--budget")
        return recipe, words + plan
    if time.more is None and time.finish is None:
        return recipe, words
    option = "--more" if time.more is not None else "--finish"
    if not is_run:
        raise UsageError(
            f"{option} continues a run, and '{name}' is not a run folder."
            if named is None
            else f"{option} continues the run in {named}, and cannot be combined with --out or --fresh.",
            fix=f"For example: nayer-edge run runs/{recipe.name} {option} 1h",
        )
    from .costs import planning

    run = open_run(root)
    run.require_intact()
    before = recipe.distill
    if time.more is not None:
        recipe = planning.with_more(recipe, run, time.more)
    elif time.finish is not None:
        recipe = planning.with_finish(recipe, run, time.finish)
    after = recipe.distill
    instead = f"instead of {before.epochs}"
    if before.epochs == after.epochs:
        instead = "in all" + ("; continues the interrupted extension" if time.more is not None else "")
    length = f"{after.epochs} epochs {instead}"
    return recipe, [("length", f"{length}; the learning rate falls in the last {after.decay_epochs}")]


def finished_elsewhere(recipe: Recipe, name: str, root: Path, time: Time, *, changed: bool) -> str | None:
    """Asks the process that trains in a run folder to finish in the given time.

    Args:
        name: the recipe as typed.
        root: the run folder.
        changed: more is asked for than to finish, which that process cannot do.

    Returns:
        What it does, in words; None if there is no such process or nothing to ask of it.

    Raises:
        UsageError: it cannot finish now.
    """
    from .recipes.loading import run_folder

    named = run_folder(name)
    if changed or time.finish is None or named is None or named.resolve() != root.resolve():
        return None
    from .costs import early_end

    run = open_run(root)
    if recipe.distill.schedule != "constant" or not early_end.is_training(run):
        return None
    return early_end.request(recipe, run, time.finish)


def _require_no_extension(run: RunFolder, time: Time) -> None:
    """Raises UsageError if a finished run is being trained further: until that is done, the run folder keeps the recipe
    of its finished student, and other settings would be lost when it is interrupted."""
    from .costs.durations import typed
    from .steps import PENDING

    if "student" not in run.manifest.steps or (time.more is None and not run.path(PENDING).is_file()):
        return
    option = f" --more {typed(time.more)}" if time.more is not None else ""
    raise UsageError(
        "--set cannot be used while a finished run is trained further.",
        why="The run keeps its recipe until the longer training is done. If that is interrupted, the setting is lost.",
        fix=f"First train, then change the setting:\n  nayer-edge run {run.typed}{option}\n"
        f"  nayer-edge run {run.typed} --set …",
    )


def _require_kept(settings: Sequence[str], asked: Recipe, planned: Recipe, option: str) -> None:
    """Raises UsageError if a plan replaces what was set."""
    from .recipes.settings import replaced_keys

    if keys := replaced_keys(settings, asked, planned):
        these = "this key" if len(keys) == 1 else "these keys"
        raise UsageError(
            f"{option} sets {these} itself, so --set has no effect: {', '.join(keys)}.",
            fix=f"Leave out --set for {these}, or leave out {option}.",
        )


def make(
    recipe: Recipe,
    root: Path,
    *,
    last: str | None = None,
    fresh: bool = False,
    again: Mapping[str, Collection[str]] | None = None,
    display: Display | None = None,
) -> RunFolder:
    """Runs a recipe in a folder, or continues it where it stopped; shows progress if a display is given.

    Args:
        last: the last step to run; default: all steps.
        fresh: empty the folder first.
        again: steps to run although nothing that they read has changed → files that they must not keep.

    Raises:
        NayerEdgeError: see `nayer_edge.pipelines.run.run_recipe`.
    """
    from .run import run_recipe

    if display is None:
        return run_recipe(recipe, root, last=last, fresh=fresh, again=again)
    with display.showing(recipe.name, root):
        return run_recipe(
            recipe,
            root,
            last=last,
            fresh=fresh,
            again=again,
            progress=display.progress,
            on_event=display.show_event,
        )


def export(
    root: Path,
    *,
    int8: bool = False,
    fp16: bool | None = None,
    qat: bool | None = None,
    targets: Iterable[str] = (),
    only: bool = False,
    engines: bool | None = None,
    compute_capability: str | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> RunFolder:
    """Exports FP32 ONNX and, with `int8`, one quantized graph per target, the targets' engines, and the files of other
    runtimes.

    Targets are added to those of the run, whose files stay as they are, except those of a named target that another
    version of its runtime has built (ExecuTorch, LiteRT). Arguments that are None or empty default to the
    run's recipe. What cannot be built on this machine is recorded as unavailable and the export continues;
    `require_engines` then raises. The next export tries it again.

    Args:
        only: the targets replace those of the run, whose files are removed.
        settings: further keys of the recipe's [export].

    Raises:
        UsageError: unknown target or invalid settings.
        NayerEdgeError: see `make`.
    """
    from nayer_edge.export.targets import get_target

    from .recipes.checking import checked
    from .recipes.renamed import with_current_keys
    from .recipes.schema import Export
    from .validation.runnable import not_graphs

    if qat and not int8:
        raise UsageError("--qat trains the INT8 graph, which is not exported without --int8.", fix="Add --int8.")
    if compute_capability and not int8:
        raise UsageError("--compute-capability is for engines, which are not built without --int8.", fix="Add --int8.")
    recipe = recipe_in(root)
    asked = {"fp16": fp16, "engines": engines, "qat": qat, "compute_capability": compute_capability}
    changes = {
        **with_current_keys(dict(settings or {}), warn=True, prefix="export."),
        **{key: value for key, value in asked.items() if value is not None},
    }
    if names := targets_in(targets):
        if not int8 and not any(get_target(name).engine for name in names):
            raise UsageError(
                f"Without --int8, nothing is exported for {', '.join(names)}.",
                why="The FP32 and FP16 ONNX files are the same for every target.",
                fix="Add --int8.",
            )
        before = () if only else recipe.export.targets
        changes["targets"] = tuple(dict.fromkeys([*before, *(get_target(name).name for name in names)]))
    elif only:
        raise UsageError(
            "--only removes the targets that are not listed, but none is listed.", fix="List them with --target."
        )
    values = {**recipe.export.model_dump(), **changes}
    section = checked(Export, values, "Invalid export settings:", "Correct them; nothing was started.")
    recipe = recipe.model_copy(update={"export": section})
    named = {get_target(name).name for name in names}
    again: dict[str, set[str]] = {}
    for record in not_graphs(open_run(root)):
        step = "engine" if record["file"].endswith(".engine") else "int8"
        if record["target"] not in section.targets:
            continue
        if record["status"] == "unavailable":
            again.setdefault(step, set())
        elif record["target"] in named and _is_of_another_version(record):
            again.setdefault(step, set()).add(record["file"])
    return make(recipe, root, last="engine" if int8 else "onnx", again=again, display=display)


def _is_of_another_version(record: Mapping[str, Any]) -> bool:
    """Whether another version of a runtime than the installed one has built a file in the runtime's own format."""
    from nayer_edge.export.runtimes import require
    from nayer_edge.export.targets import TARGETS, has_module

    target = TARGETS[record["target"]]
    if not has_module(target) or not record["file"].endswith(target.suffix) or target.suffix == ".onnx":
        return False
    try:
        return record["version"] != require(target)
    except MissingError:
        return False


def targets_in(items: Iterable[str]) -> list[str]:
    """The targets named by `--target`: repeated, separated by commas, or both."""
    return [name.strip() for item in items for name in item.split(",") if name.strip()]


def not_validated(run: RunFolder) -> list[str]:
    """Names of the exported files that the last report does not cover."""
    from nayer_edge.export.targets import FILE_SUFFIXES

    from .measurements import REPORT_PATH

    files = run.manifest.files
    measured = files[REPORT_PATH].parents if REPORT_PATH in files else ()
    return sorted(
        Path(name).name
        for name, record in files.items()
        if name.endswith(FILE_SUFFIXES) and record.sha256 not in measured
    )


def unavailable(run: RunFolder) -> list[dict[str, Any]]:
    """The entries of engines.json and runtimes.json for files that could not be built."""
    from .validation.runnable import not_graphs

    return [record for record in not_graphs(run) if record["status"] == "unavailable"]


def require_runtimes(run: RunFolder) -> None:
    """Raises MissingError if a file of another runtime than ONNX Runtime and TensorRT could not be built, for lack of a
    package or because the runtime cannot take the student.

    Engines are left out: a recipe with a GPU target is often run on a machine without that GPU.
    """
    named = [each["target"] for each in unavailable(run) if not each["file"].endswith(".engine")]
    if named:
        require_engines(run, named)


def require_complete(run: RunFolder, last: str | None) -> None:
    """`require_runtimes`, if the files of the runtimes are among the steps up to `last`."""
    from .steps import until

    if any(step.name == "int8" for step in until(last)):
        require_runtimes(run)


def require_engines(run: RunFolder, targets: Iterable[str] = ()) -> None:
    """Raises MissingError if a requested engine, or a file of another runtime, could not be built on this machine.

    Args:
        targets: those that were asked for this time; empty: all of the run.
    """
    asked = targets_in(targets)
    missing = [each for each in unavailable(run) if not asked or each["target"] in asked]
    if missing:
        names = ", ".join(record["name"] for record in missing)
        engines = all(record["file"].endswith(".engine") for record in missing)
        raise MissingError(
            f"Everything was exported except {names}.",
            why="\n".join(dict.fromkeys(record["reason"] for record in missing)),
            fix="Build them on a machine with the required GPU and packages, or export only ONNX files (--no-engine)."
            if engines
            else f"Then type: nayer-edge export {run.typed} --int8   (files that were exported are kept)",
        )


def validate(
    root: Path,
    data: str | EllipsisType | None = ...,
    *,
    fit: Fit | None = None,
    split: str | None = None,
    allow_implausible: bool = False,
    display: Display | None = None,
) -> RunFolder:
    """Compares every artifact with the teacher; writes predictions.npz and report.json.

    Args:
        data: labelled hold-out images, or None for synthetic ones; default: the run's recipe.
        fit: how images of another size are handled.
        split: which part of the hold-out, if it has several.
        allow_implausible: measure although the teacher's predictions do not match the labels.

    Raises:
        UsageError: the images do not exist or do not match the model, or their labels do not match the
            teacher's predictions.
        NayerEdgeError: see `make`.
    """
    from .recipes.checking import checked
    from .recipes.loading import BUILT_IN_DATA
    from .recipes.preflight import require_typed
    from .recipes.schema import Validate

    recipe = recipe_in(root)
    # A choice made for other images does not hold for new ones.
    changes: dict[str, Any] = {} if data is ... else {"split": None, "allow_implausible": False}
    asked = {"fit": fit, "split": split, "allow_implausible": allow_implausible or None}
    changes |= {key: value for key, value in asked.items() if value is not None}
    if data is None or data in BUILT_IN_DATA:
        changes["data"] = data
    elif isinstance(data, str):
        changes["data"] = str(expanded(data).resolve())
    before = recipe.validate_.data
    if before is not None and changes.get("data", before) != before:
        changes.setdefault("fit", "exact")
    values = {**recipe.validate_.model_dump(), **changes}
    section = checked(Validate, values, "Invalid validation settings:", "Correct them; nothing was started.")
    recipe = recipe.model_copy(update={"validate_": section})
    if isinstance(data, str):
        require_typed(recipe, ["validate.data"])
    return make(recipe, root, last="validate", display=display)


def gate(
    root: Path,
    *,
    policy: Path | None = None,
    limits: Mapping[str, Any] | None = None,
    references: Path | None = None,
    junit: Path | None = None,
    json_out: Path | None = None,
    summary: Path | None = None,
) -> Verdict:
    """Gives the verdict on a validated run, and writes it to the given files.

    Args:
        policy: a TOML policy file; default: the policy in the run's recipe.
        limits: overrides of the policy; see `nayer_edge.pipelines.recipes.policy.limited`.
        references: a `references.toml` file with the release to compare with.
        junit, json_out, summary: files to write; Markdown is appended to `summary`.

    Raises:
        UsageError, IntegrityError: see `nayer_edge.pipelines.gate.verdict.run_gate`.
    """
    from nayer_edge.storage.files import write_json

    from .gate import verdict as gates

    outputs = {"--junit": junit, "--json-out": json_out, "--summary": summary}
    gates.require_outputs(root, outputs, [policy, references])
    verdict = gates.run_gate(root, policy, references, limits)
    if junit is not None:
        gates.write_junit(verdict, junit)
    if json_out is not None:
        write_json(json_out, gates.verdict_json(verdict))
    if summary is not None:
        gates.append_summary(verdict, summary)
    return verdict


def report(root: Path, *, display: Display | None = None) -> RunFolder:
    """Writes the HTML report of a validated run, re-running outdated steps.

    Raises:
        UsageError: the run has not been validated.
        IntegrityError: a file does not match the manifest, or the report does not match the files.
        NayerEdgeError: see `make`.
    """
    from .gate.verdict import load_report

    run = open_run(root)
    run.require_intact()
    load_report(run)
    return make(recipe_in(root), root, last="report", display=display)


def draw(root: Path, count: int, *, display: Display | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draws class-balanced synthetic images from a run's trained generator.

    Returns:
        Images (count, C, H, W), float32 in [0, 1], exactly representable as uint8; and the class that each was
        generated for, (count,), int64. Identical runs give identical images.

    Raises:
        UsageError: there is no finished student.
        IntegrityError: a file does not match the manifest.
    """
    from nayer_edge.runtime.progress import Silent

    from .deploy import SyntheticSource
    from .recipes.preflight import require_teacher

    run, recipe = open_run(root), recipe_in(root)
    run.require_intact()
    require_teacher(recipe)
    progress = Silent() if display is None else display.progress
    teacher, embeddings, student = (run.artifact(name) for name in ("teacher", "lte", "student"))
    source = SyntheticSource.open(teacher, embeddings, student, recipe, run)
    progress.start("draw calibration images", source.steps("calibration", count))
    try:
        return source.draw_labelled("calibration", count, progress)
    finally:
        progress.finish()
