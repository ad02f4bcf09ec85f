"""What can be done with a run, for the command line and for Python alike: each function is one command's work.

They take paths and values, print nothing of their own, and say what is wrong by raising. Heavy modules are imported
inside: `gate` needs the base install only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from nayer_edge.errors import MissingError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from nayer_edge.config import Fit
    from nayer_edge.storage.run_folder import RunFolder

    from .gate.judgement import Verdict
    from .recipes.schema import Recipe
    from .show import Display


def read_recipe(name: str, settings: list[str] | None = None) -> Recipe:
    """A shipped recipe, a file's or a run folder's, with overrides ("a.b=c").

    Raises:
        UsageError: there is none of this name, it does not hold, or a file that the overrides name is not there.
        IntegrityError: the run folder's manifest is damaged.
    """
    from .recipes.loading import load_recipe
    from .recipes.preflight import require_typed

    recipe = load_recipe(name, settings)
    require_typed(recipe, [setting.partition("=")[0].replace(" ", "") for setting in settings or []])
    return recipe


def open_run(root: Path) -> RunFolder:
    """The run folder with its manifest.

    Raises:
        UsageError: there is no run here.
        IntegrityError: its manifest is damaged.
    """
    # pydantic takes half of what `--help` may take.
    from nayer_edge.storage.run_folder import RunFolder

    return RunFolder.open(root)


def recipe_in(root: Path) -> Recipe:
    """The resolved recipe of a run folder; raises as `open_run`."""
    from .recipes.loading import recipe_of

    return recipe_of(open_run(root).manifest.recipe, root)


def default_out(name: str, recipe: Recipe) -> Path:
    """Where a recipe runs unless told: that of a run folder in its folder."""
    from .recipes.loading import run_folder

    return run_folder(name) or Path("runs") / recipe.name


def make(
    recipe: Recipe, root: Path, *, last: str | None = None, fresh: bool = False, display: Display | None = None
) -> RunFolder:
    """Runs a recipe in a folder, continuing where it stopped; shows it where there is a display.

    Args:
        last: the last step to run; all of them by default.
        fresh: empties the folder first.

    Raises:
        NayerEdgeError: see `nayer_edge.pipelines.run.run_recipe`.
    """
    from .run import run_recipe

    if display is None:
        return run_recipe(recipe, root, last=last, fresh=fresh)
    with display.showing(recipe.name, root):
        return run_recipe(recipe, root, last=last, fresh=fresh, progress=display.progress, on_event=display.show_event)


def export(
    root: Path,
    *,
    int8: bool = False,
    fp16: bool | None = None,
    qat: bool | None = None,
    targets: Iterable[str] = (),
    engines: bool | None = None,
    compute_capability: str | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> RunFolder:
    """Writes ONNX: FP32, with `int8` one quantized graph per target, and their engines.

    What is None or empty is as the run's recipe says. An engine that cannot be built here is marked, and the rest is
    finished; `require_engines` then says so.

    Args:
        settings: further keys of the recipe's [export].

    Raises:
        UsageError: there is no such target, or the settings do not hold.
        NayerEdgeError: see `make`.
    """
    from .recipes.checking import checked
    from .recipes.renamed import with_current_keys
    from .recipes.schema import Export

    if qat and not int8:
        raise UsageError("--qat trains the INT8 graph, which is not exported without --int8.", fix="Add --int8.")
    recipe = recipe_in(root)
    asked = {"fp16": fp16, "engines": engines, "qat": qat, "compute_capability": compute_capability}
    changes = {
        **with_current_keys(dict(settings or {}), warn=True, prefix="export."),
        **{key: value for key, value in asked.items() if value is not None},
    }
    if names := [name.strip() for item in targets for name in item.split(",") if name.strip()]:
        from nayer_edge.export.targets import get_target

        changes["targets"] = tuple(dict.fromkeys(get_target(name).name for name in names))
    values = {**recipe.export.model_dump(), **changes}
    section = checked(Export, values, "These settings of the export do not hold:", "Mend them; nothing was started.")
    recipe = recipe.model_copy(update={"export": section})
    return make(recipe, root, last="engine" if int8 else "onnx", display=display)


def not_validated(run: RunFolder) -> list[str]:
    """Names of the exported files that the last report does not speak of."""
    from .measurements import REPORT_PATH

    files = run.manifest.files
    measured = files[REPORT_PATH].parents if REPORT_PATH in files else ()
    return sorted(
        Path(name).name
        for name, record in files.items()
        if name.endswith((".onnx", ".engine")) and record.sha256 not in measured
    )


def require_engines(run: RunFolder) -> None:
    """Raises MissingError if an engine that was asked for could not be built here."""
    from nayer_edge.storage.files import read_json

    records = read_json(run.path(run.artifact("engine").files["engines"]), "the list of engines")
    if missing := [record for record in records if record["status"] == "unavailable"]:
        names = ", ".join(record["name"] for record in missing)
        raise MissingError(
            f"Everything was exported but {names}.",
            why="\n".join(dict.fromkeys(record["reason"] for record in missing)),
            fix="Build them where that is installed, or ask for the ONNX files alone with --no-engine.",
        )


def validate(
    root: Path,
    data: str | EllipsisType | None = ...,
    *,
    fit: Fit | None = None,
    display: Display | None = None,
) -> RunFolder:
    """Runs every artefact beside the teacher; writes predictions.npz and report.json.

    Args:
        data: labelled hold-out images, or None for fresh synthetic ones; as the run's recipe says by default.
        fit: what is done with pictures of another size.

    Raises:
        UsageError: there are no such images, or they do not fit the model.
        NayerEdgeError: see `make`.
    """
    from .recipes.loading import BUILT_IN_DATA
    from .recipes.preflight import require_typed

    recipe = recipe_in(root)
    changes: dict[str, Any] = {} if fit is None else {"fit": fit}
    if data is None or data in BUILT_IN_DATA:
        changes["data"] = data
    elif isinstance(data, str):
        changes["data"] = str(Path(data).expanduser().resolve())
    recipe = recipe.model_copy(update={"validate_": recipe.validate_.model_copy(update=changes)})
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
    """Gives the verdict on a validated run, and writes it where told.

    Args:
        policy: a policy in TOML; the one of the run's recipe by default.
        limits: keys of the policy that are to be others than there; see `nayer_edge.pipelines.gate.policy.limited`.
        references: a `references.toml` that names the release to compare with.
        junit, json_out, summary: files to write; Markdown is added to the last.

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
    """Writes the page about a validated run, making stale steps anew.

    Raises:
        UsageError: it has not been validated.
        IntegrityError: a file differs from the manifest, or the report from the files.
        NayerEdgeError: see `make`.
    """
    from .gate.verdict import load_report

    run = open_run(root)
    run.require_intact()
    load_report(run)
    return make(recipe_in(root), root, last="report", display=display)


def draw(root: Path, count: int, *, display: Display | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Class-balanced synthetic images from a run's trained generator.

    Returns:
        Images (count, C, H, W), float32 in [0, 1], exactly representable as uint8; and the class that each was made
        for, (count,), int64. Equal runs give equal images.

    Raises:
        UsageError: there is no finished student.
        IntegrityError: a file differs from the manifest.
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
    rounds = -(-count // recipe.synthesis.batch)
    progress.start("draw calibration images", rounds * recipe.synthesis.g_steps)
    try:
        return source.draw_labelled("calibration", count, progress)
    finally:
        progress.finish()
