"""The operations on a run, shared by the command line and the Python API: one function per command.

They take paths and values, print nothing, and raise on errors. Heavy modules are imported inside the functions, because
`gate` needs only the base install.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def read_recipe(name: str, settings: list[str] | None = None) -> Recipe:
    """Reads a shipped recipe, a recipe file or a run folder's recipe, with overrides ("a.b=c").

    Raises:
        UsageError: unknown recipe, invalid recipe, or a file named in the overrides does not exist.
        IntegrityError: the run folder's manifest is damaged.
    """
    from .recipes.loading import load_recipe
    from .recipes.preflight import require_typed

    recipe = load_recipe(name, settings)
    require_typed(recipe, [setting.partition("=")[0].replace(" ", "") for setting in settings or []])
    return recipe


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


def make(
    recipe: Recipe, root: Path, *, last: str | None = None, fresh: bool = False, display: Display | None = None
) -> RunFolder:
    """Runs a recipe in a folder, or continues it where it stopped; shows progress if a display is given.

    Args:
        last: the last step to run; default: all steps.
        fresh: empty the folder first.

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
    """Exports FP32 ONNX and, with `int8`, one quantized graph per target and the targets' engines.

    Arguments that are None or empty default to the run's recipe. An engine that cannot be built on this machine is
    recorded as unavailable and the export continues; `require_engines` then raises.

    Args:
        settings: further keys of the recipe's [export].

    Raises:
        UsageError: unknown target or invalid settings.
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
    section = checked(Export, values, "Invalid export settings:", "Correct them; nothing was started.")
    recipe = recipe.model_copy(update={"export": section})
    return make(recipe, root, last="engine" if int8 else "onnx", display=display)


def not_validated(run: RunFolder) -> list[str]:
    """Names of the exported files that the last report does not cover."""
    from .measurements import REPORT_PATH

    files = run.manifest.files
    measured = files[REPORT_PATH].parents if REPORT_PATH in files else ()
    return sorted(
        Path(name).name
        for name, record in files.items()
        if name.endswith((".onnx", ".engine")) and record.sha256 not in measured
    )


def require_engines(run: RunFolder) -> None:
    """Raises MissingError if a requested engine could not be built on this machine."""
    from nayer_edge.storage.files import read_json

    records = read_json(run.path(run.artifact("engine").files["engines"]), "the list of engines")
    if missing := [record for record in records if record["status"] == "unavailable"]:
        names = ", ".join(record["name"] for record in missing)
        raise MissingError(
            f"Everything was exported except {names}.",
            why="\n".join(dict.fromkeys(record["reason"] for record in missing)),
            fix="Build them where that is installed, or export only the ONNX files with --no-engine.",
        )


def validate(
    root: Path,
    data: str | EllipsisType | None = ...,
    *,
    fit: Fit | None = None,
    display: Display | None = None,
) -> RunFolder:
    """Compares every artifact with the teacher; writes predictions.npz and report.json.

    Args:
        data: labelled hold-out images, or None for fresh synthetic ones; default: the run's recipe.
        fit: how images of another size are handled.

    Raises:
        UsageError: the images do not exist or do not match the model.
        NayerEdgeError: see `make`.
    """
    from .recipes.loading import BUILT_IN_DATA
    from .recipes.preflight import require_typed

    recipe = recipe_in(root)
    changes: dict[str, Any] = {} if fit is None else {"fit": fit}
    if data is None or data in BUILT_IN_DATA:
        changes["data"] = data
    elif isinstance(data, str):
        changes["data"] = str(expanded(data).resolve())
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
    """Gives the verdict on a validated run, and writes it to the given files.

    Args:
        policy: a TOML policy file; default: the policy in the run's recipe.
        limits: overrides of the policy; see `nayer_edge.pipelines.gate.policy.limited`.
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
    rounds = -(-count // recipe.synthesis.batch)
    progress.start("draw calibration images", rounds * recipe.synthesis.g_steps)
    try:
        return source.draw_labelled("calibration", count, progress)
    finally:
        progress.finish()
