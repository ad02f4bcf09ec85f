"""The command line. A command parses, calls one function of the pipelines, prints, and exits; heavy modules are
imported inside the commands, so `--help` and `gate` need neither torch nor ONNX Runtime."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nayer_edge import __version__
from nayer_edge.errors import (
    EXIT_FAILED,
    EXIT_INTEGRITY,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    MissingError,
    NayerEdgeError,
    UsageError,
    missing_extra,
)
from nayer_edge.launch import launched
from nayer_edge.text import inert

if TYPE_CHECKING:
    from nayer_edge.artefacts import RunFolder
    from nayer_edge.config import Recipe
    from nayer_edge.progress import Progress

    from .run import StepEvent

EXTRA_OF = {
    "numpy": "cpu",
    "torch": "cpu",
    "torchvision": "cpu",
    "transformers": "cpu",
    "safetensors": "cpu",
    "jaxtyping": "cpu",
    "onnx": "cpu",
    "onnxscript": "cpu",
    "onnxruntime": "cpu",
    "sklearn": "cpu",
    "matplotlib": "cpu",
    "jinja2": "cpu",
    "pyarrow": "cpu",
    "PIL": "cpu",
}
"""top-level module → the extra that installs it"""

app = typer.Typer(
    name="nayer-edge",
    help="Distils a compact INT8 student from an image classifier whose training images are gone, and gates it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
lte_app = typer.Typer(no_args_is_help=True, help="Label-text embeddings: build the cache, look at it.")
app.add_typer(lte_app, name="lte")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Run = Annotated[Path, typer.Argument(help="A run folder, for example runs/digits.", show_default=False)]
RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name, or a .toml file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe; repeatable."),
]
Out = Annotated[Path | None, typer.Option("--out", help="The run folder.", show_default="runs/<recipe>")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: empties the run folder first.")]


def _example(*lines: str) -> str:
    return "[bold]Example[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)  # noqa: T201
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    del version
    if debug:
        os.environ["NAYER_EDGE_DEBUG"] = "1"
    rank, size = launched()
    if size > 1 and context.invoked_subcommand != "distill":
        if rank > 0:
            raise typer.Exit(EXIT_USAGE)
        raise UsageError(
            f"Only `distill` runs as several processes, and torchrun started {size}.",
            fix=f"Type: nayer-edge {context.invoked_subcommand} …   without torchrun",
        )


@app.command(epilog=_example("nayer-edge quickstart"))
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="The run folder.")] = Path("runs/digits"),
    fresh: Fresh = False,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """The whole pipeline on real handwritten digits: teacher, data-free student, INT8, verdict, report."""
    _run(_load_recipe("digits", settings), out, fresh=fresh, as_json=as_json)


@app.command(epilog=_example("nayer-edge run digits --set distill.epochs=20 --out runs/mine"))
def run(
    recipe: RecipeName,
    until: Annotated[str | None, typer.Option("--until", metavar="STEP", help="Stop after this step.")] = None,
    settings: Settings = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Runs a recipe; continues where it stopped."""
    chosen = _load_recipe(recipe, settings)
    _run(chosen, out or _default_out(chosen), last=until, fresh=fresh, as_json=as_json)


@app.command(epilog=_example("nayer-edge teach digits --out runs/teacher"))
def teach(recipe: RecipeName, settings: Settings = None, out: Out = None, as_json: Json = False) -> None:
    """Trains a recipe's teacher on its labelled images (for demonstrations and benchmarks)."""
    chosen = _load_recipe(recipe, settings)
    if chosen.teach is None:
        raise UsageError(
            f"The recipe '{chosen.name}' has no [teach] section: its teacher comes from teacher.weights.",
            fix="Choose a recipe that trains one, for example: nayer-edge teach digits",
        )
    _run(chosen, out or _default_out(chosen), last="teacher", as_json=as_json)


@app.command(epilog=_example("nayer-edge distill digits --out runs/digits"))
def distill(
    recipe: RecipeName,
    settings: Settings = None,
    out: Out = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Distils the student: teacher and class names in; student, generator and memory bank out. Takes no data set.

    On several GPUs or machines: torchrun --nproc-per-node 4 -m nayer_edge distill RECIPE (docs/DISTRIBUTED.md).
    """

    def work() -> None:
        chosen = _load_recipe(recipe, settings)
        _run(chosen, out or _default_out(chosen), last="student", fresh=fresh, as_json=as_json)

    if launched()[1] == 1:
        work()
        return
    from nayer_edge.distributed import joined

    with joined() as world:
        if world.first:
            work()
            world.from_first()
        else:
            from .distill import take_part

            take_part(world)


@app.command(epilog=_example("nayer-edge export runs/digits --int8 --target cpu,tensorrt-rtx"))
def export(
    run_folder: Run,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize, with images from the generator.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Also write an FP16 graph.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="cpu, arm, tensorrt, tensorrt-rtx; comma-separated or repeated."),
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine/--no-engine", help="Build engines for the targets that have them.")
    ] = True,
    compute_capability: Annotated[
        str | None, typer.Option("--compute-capability", metavar="SM", help="For TensorRT-RTX: sm75, sm89, sm120, …")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes ONNX: FP32, with --int8 one quantized graph per target, and their engines.

    What this machine cannot build is marked, everything else is finished, and the exit code is 3.
    """
    chosen = _recipe_of(run_folder)
    changes: dict[str, Any] = {"fp16": fp16, "engines": engine}
    if targets := [name.strip() for item in target or [] for name in item.split(",") if name.strip()]:
        from nayer_edge.export.targets import get_target

        changes["targets"] = tuple(dict.fromkeys(get_target(name).name for name in targets))
    if compute_capability is not None:
        changes["compute_capability"] = compute_capability
    chosen = chosen.model_copy(update={"export": chosen.export.model_copy(update=changes)})
    _run(chosen, run_folder, last="engine" if int8 else "onnx", as_json=as_json)
    if int8:
        _require_engines(run_folder)


def _require_engines(root: Path) -> None:
    """Ends with exit 3 if an engine that was asked for could not be built."""
    from nayer_edge.artefacts import read_json

    opened = _open(root)
    records = read_json(opened.path(opened.artifact("engine").files["engines"]), "the list of engines")
    missing = [record for record in records if record["status"] == "unavailable"]
    if missing:
        names = ", ".join(record["name"] for record in missing)
        raise MissingError(
            f"Everything was exported but {names}.",
            why="\n".join(dict.fromkeys(record["reason"] for record in missing)),
            fix="Build them where that is installed, or ask for the ONNX files alone with --no-engine.",
        )


@app.command(
    "calibration-data",
    epilog=_example("nayer-edge calibration-data runs/digits -n 512 --format npz,png --out calibration"),
)
def calibration_data(
    run_folder: Run,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=1_000_000, help="How many images.")] = 512,
    formats: Annotated[str, typer.Option("--format", help="npz, npy, png, polygraphy; comma-separated.")] = "npz",
    out: Annotated[Path, typer.Option("--out", help="The folder to write to.")] = Path("calibration"),
    as_json: Json = False,
) -> None:
    """Draws class-balanced synthetic images from the trained generator, for our own and other tools."""
    from nayer_edge.export.calibration_data import write_calibration_data

    from .deploy import SyntheticSource

    opened, chosen = _open(run_folder), _recipe_of(run_folder)
    opened.require_intact()
    if out.resolve().is_relative_to(run_folder.resolve()):
        raise UsageError(
            f"{out} lies inside the run folder, whose files its manifest states.", fix="Choose another folder."
        )
    teacher, embeddings, student = (opened.artifact(name) for name in ("teacher", "lte", "student"))
    console, progress = _watched(as_json)
    source = SyntheticSource.open(teacher, embeddings, student, chosen, opened)
    rounds = -(-count // chosen.synthesis.batch)
    progress.start("draw calibration images", rounds * chosen.synthesis.g_steps)
    images, labels = source.draw_labelled("calibration", count, progress)
    progress.finish()
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    written = write_calibration_data(images, labels, chosen.teacher.classes, out, wanted)
    if as_json:
        _print_json({"images": len(images), "files": {name: str(path) for name, path in written.items()}})
        return
    for name, path in written.items():
        console.print(f"✓ {name:<11} {len(images)} images  {path}", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog=_example("nayer-edge bench runs/digits --batch 1,8,64"))
def bench(
    run_folder: Run,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, comma-separated.")] = "1,8,64",
    runs: Annotated[int, typer.Option("--runs", min=5, help="Timed rounds per batch size.")] = 100,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    as_json: Json = False,
) -> None:
    """Latency and throughput of every artefact that this machine can run, measured in turns in one process."""
    from .bench import measure

    try:
        batches = [int(part) for part in batch.split(",")]
    except ValueError as error:
        raise UsageError(f"'{batch}' is no list of batch sizes.", fix="For example: --batch 1,8,64") from error
    timings = measure(_open(run_folder), _recipe_of(run_folder), batches, runs, threads)
    if as_json:
        _print_json([vars(timing) for timing in timings])
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("artefact")
    for heading in ("batch", "threads", "p50 ms", "p95 ms", "p99 ms", "images/s", "× FP32"):
        table.add_column(heading, justify="right")
    for timing in timings:
        table.add_row(
            timing.runner,
            str(timing.batch),
            str(timing.threads),
            f"{timing.p50:.3f}",
            f"{timing.p95:.3f}",
            f"{timing.p99:.3f}",
            f"{timing.images_per_s:.0f}",
            f"{timing.ratio:.2f}",
        )
    _stdout().print(table)


@app.command(epilog=_example("nayer-edge validate runs/digits --data digits"))
def validate(
    run_folder: Run,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Labelled hold-out: folder of class folders, .parquet, .npz, or digits."),
    ] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Use fresh synthetic images instead.")] = False,
    as_json: Json = False,
) -> None:
    """Runs every artefact beside the teacher; writes predictions.npz and report.json."""
    if data is not None and synthetic:
        raise UsageError("--data and --synthetic exclude each other.")
    chosen = _recipe_of(run_folder)
    if data is not None or synthetic:
        if data is not None and data != "digits":
            data = str(Path(data).expanduser().resolve())
        chosen = chosen.model_copy(update={"validate_": chosen.validate_.model_copy(update={"data": data})})
    _run(chosen, run_folder, last="validate", as_json=as_json)


@app.command(epilog=_example("nayer-edge gate runs/digits --policy policy.toml --junit junit.xml --summary summary.md"))
def gate(
    run_folder: Run,
    policy: Annotated[Path | None, typer.Option("--policy", help="A policy in TOML.")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json-out", help="Write the verdict as JSON here.")] = None,
    summary: Annotated[Path | None, typer.Option("--summary", help="Append Markdown here.")] = None,
    print_policy: Annotated[bool, typer.Option("--print-policy", help="Print the policy in force, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Gives the verdict on a validated run: exit 0 pass, 1 fail or inconclusive, 2 usage, 4 tampered or stale."""
    from nayer_edge.artefacts import write_json

    from . import gate as gates

    if print_policy:
        print(gates.policy_toml(gates.load_policy(_open(run_folder), policy)), end="")  # noqa: T201
        return
    verdict = gates.run_gate(run_folder, policy)
    if junit is not None:
        gates.write_junit(verdict, junit)
    if json_out is not None:
        write_json(json_out, gates.verdict_json(verdict))
    if summary is not None:
        gates.append_summary(verdict, summary)
    if as_json:
        _print_json(gates.verdict_json(verdict))
    else:
        _stdout().print(gates.verdict_table(verdict))
    gates.print_annotations(verdict, sys.stdout if not as_json else sys.stderr)
    if verdict.verdict != "pass":
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog=_example("nayer-edge report runs/digits"))
def report(run_folder: Run, as_json: Json = False) -> None:
    """Writes one self-contained HTML page about the run, making stale steps anew."""
    from .gate import load_report

    opened = _open(run_folder)
    opened.require_intact()
    load_report(opened)
    _run(_recipe_of(run_folder), run_folder, last="report", as_json=as_json, decide=False)


@app.command(epilog=_example("nayer-edge verify runs/digits"))
def verify(run_folder: Run, as_json: Json = False) -> None:
    """Re-hashes every file of the manifest and finds altered, missing and added files."""
    opened = _open(run_folder)
    altered, added = opened.problems(), [f"{name} is not in the manifest" for name in opened.strangers()]
    problems = altered + added
    if as_json:
        _print_json({"run": str(run_folder), "files": len(opened.manifest.files), "problems": problems})
    elif problems:
        for problem in problems:
            _stdout().print(Text(f"✗ {inert(problem)}", style="red"))
    else:
        _stdout().print(f"✓ {len(opened.manifest.files)} files match the manifest of {run_folder}")
    if problems:
        raise typer.Exit(EXIT_INTEGRITY)


@app.command(epilog=_example("nayer-edge recipes"))
def recipes(as_json: Json = False) -> None:
    """Lists the shipped recipes with the figures that they were measured with."""
    from .recipe import shipped

    found = [_load_recipe(entry.name) for entry in shipped()]
    if as_json:
        _print_json([recipe.model_dump(mode="json", by_alias=True) for recipe in found])
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for heading in ("teacher", "student"):
        table.add_column(heading, overflow="fold")
    for heading in ("top-1", "± sd", "seconds"):
        table.add_column(heading, justify="right")
    for recipe in found:
        measured = recipe.measured
        table.add_row(
            recipe.name,
            recipe.teacher.model,
            recipe.student.model,
            _percent(measured.student_top1),
            _percent(measured.student_top1_sd),
            "" if measured.seconds is None else f"{measured.seconds:.0f}",
        )
    _stdout().print(table)
    _stdout().print("\nRun one with: nayer-edge run NAME", style="dim")


@app.command(epilog=_example("nayer-edge doctor"))
def doctor(as_json: Json = False) -> None:
    """Says what this machine can do, what is missing, and the line that installs it."""
    from .doctor import examine

    found = examine()
    if as_json:
        _print_json([vars(line) for line in found])
        return
    for line in found:
        mark, style = ("✓", "green") if line.ok else ("·", "yellow")
        text = Text(f"{mark} {line.what:<22} ", style=style)
        _stdout().print(text.append(line.found, style="default"), soft_wrap=True)
        if line.fix:
            _stdout().print(f"  {line.fix}", style="dim", markup=False, highlight=False, soft_wrap=True)


@lte_app.command("build", epilog=_example("nayer-edge lte build digits", "nayer-edge lte build my.toml"))
def lte_build(recipe: RecipeName, settings: Settings = None, as_json: Json = False) -> None:
    """Builds a recipe's embeddings into the cache; a second call reads them from there."""
    _show_lte(recipe, settings, as_json)


@lte_app.command("show", epilog=_example("nayer-edge lte show digits"))
def lte_show(recipe: RecipeName, settings: Settings = None, as_json: Json = False) -> None:
    """Shows a recipe's label embeddings: encoder, prompt, and each label's nearest neighbour."""
    _show_lte(recipe, settings, as_json)


def _show_lte(name: str, settings: list[str] | None, as_json: bool) -> None:
    import torch

    from nayer_edge import lte

    recipe = _load_recipe(name, settings)
    found = lte.build(recipe.teacher.classes, recipe.lte)
    unit = torch.nn.functional.normalize(found.embeddings, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-1)
    nearest = similarity.max(dim=1)
    rows = [
        {"label": label, "nearest": found.labels[int(index)], "cosine": round(float(value), 4)}
        for label, value, index in zip(found.labels, nearest.values, nearest.indices, strict=True)
    ]
    facts = {
        "encoder": found.encoder,
        "prompt": found.prompt,
        "classes": len(found.labels),
        "dimensions": found.embeddings.shape[1],
        "mean_cosine": round(lte.mean_cosine(found.embeddings), 4),
        "digest": found.digest,
    }
    if as_json:
        _print_json({**facts, "labels": rows})
        return
    for key, value in facts.items():
        _stdout().print(f"{key:<12} {inert(str(value))}", markup=False, highlight=False)
    table = Table("label", "nearest label", "cosine", box=None, pad_edge=False)
    for row in rows:
        table.add_row(Text(inert(str(row["label"]))), Text(inert(str(row["nearest"]))), f"{row['cosine']:.3f}")
    _stdout().print(table)


def _run(
    recipe: Recipe,
    root: Path,
    *,
    last: str | None = None,
    fresh: bool = False,
    as_json: bool = False,
    decide: bool = True,
) -> None:
    """Runs steps, shows them, and ends with the verdict's exit code where a verdict was reached.

    Args:
        decide: False ends with 0 whatever the verdict, for a command that was not asked for one.
    """
    from . import gate as gates
    from .run import run_recipe
    from .show import show_event

    console, progress = _watched(as_json)

    def watch(event: StepEvent) -> None:
        # Steps that report no progress of their own still show that something moves.
        if event.state == "started":
            progress.start(event.step.title, 0)
        else:
            progress.finish()
        show_event(console, event)

    if not as_json:
        console.print(Text(f"{recipe.name} → {root}", style="bold"))
    progress.start("looks at recipe and folder", 0)
    try:
        done = run_recipe(
            recipe,
            root,
            last=last,
            fresh=fresh,
            progress=progress,
            on_event=watch,
        )
    finally:
        progress.finish()
    reached = last is None or last in ("gate", "report")
    verdict = gates.run_gate(root) if reached else None
    if as_json:
        steps = {name: record.model_dump(mode="json") for name, record in done.manifest.steps.items()}
        shown = None if verdict is None else gates.verdict_json(verdict)
        _print_json({"run": str(root), "steps": steps, "verdict": shown})
    elif verdict is not None:
        console.print()
        console.print(gates.verdict_table(verdict))
        console.print(f"\nReport: {root / 'report.html'}", highlight=False, soft_wrap=True)
    if decide and verdict is not None and verdict.verdict != "pass":
        raise typer.Exit(EXIT_FAILED)


def _watched(as_json: bool) -> tuple[Console, Progress]:
    """Where progress is shown: on a terminal as bars, elsewhere as lines; with --json never on standard output."""
    from .show import Bars, Lines

    console = Console(stderr=True, force_terminal=sys.stderr.isatty()) if as_json else _stdout()
    return console, Bars(console) if console.is_terminal else Lines(console)


def _load_recipe(name: str, settings: list[str] | None = None) -> Recipe:
    # Imported here: pydantic takes half of what `--help` may take.
    from .recipe import load_recipe

    return load_recipe(name, settings)


def _open(root: Path) -> RunFolder:
    from nayer_edge.artefacts import RunFolder

    return RunFolder.open(root)


def _default_out(recipe: Recipe) -> Path:
    return Path("runs") / recipe.name


def _recipe_of(root: Path) -> Recipe:
    from .recipe import recipe_of

    return recipe_of(_open(root).manifest.recipe)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def _stdout() -> Console:
    # Colour codes only where a person looks, whatever a CI server's variables say.
    return Console(force_terminal=sys.stdout.isatty())


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))  # noqa: T201


def _fail(error: NayerEdgeError) -> NoReturn:
    """Says what is wrong and ends with the error's exit code; called while an exception is handled."""
    if os.environ.get("NAYER_EDGE_DEBUG"):
        traceback.print_exc()
    console = Console(stderr=True, force_terminal=sys.stderr.isatty(), soft_wrap=True)
    if _helps():
        # The first rank says everything; were a reason its own, it stands here.
        print(f"Rank {os.environ['RANK']}: {inert(error.what)} {inert(error.why)}".rstrip(), file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    lines = [[inert(line) for line in part.splitlines()] for part in (error.what, error.why, error.fix)]
    what, why, fix = lines
    console.print(Text("Error: ", style="bold red").append("\n".join(what), style="default"))
    if why:
        console.print(Text("\n".join(why)))
    if fix:
        console.print(Text("\n".join(fix), style="bold"))
    sys.exit(error.exit_code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits with the codes of `nayer_edge.errors`."""
    if not sys.stdout.isatty():
        # Typer colours its help on CI servers; DESIGN wants plain text there.
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app(args=arguments, prog_name="nayer-edge", standalone_mode=True)
    except NayerEdgeError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        _fail(missing_extra(top, EXTRA_OF[top], "This command") if top in EXTRA_OF else _unexpected(error))
    except (Interrupted, KeyboardInterrupt):
        _interrupted()
    except MemoryError:
        _fail(
            MissingError("There is not enough memory.", fix="Lower synthesis.batch, distill.batch or distill.bank_mib.")
        )
    except Exception as error:  # noqa: BLE001  tracebacks are for those who ask for them
        _fail(_unexpected(error))
    sys.exit(EXIT_OK)


def _unexpected(error: Exception) -> NayerEdgeError:
    return NayerEdgeError(
        "Something happened that nayer-edge does not expect.",
        why=f"{type(error).__name__}: {error}",
        fix="Repeat with `nayer-edge --debug …` to see where, and please report it.",
    )


def _helps() -> bool:
    """This is a process of torchrun's, and not the one that prints."""
    return "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0"


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not KeyboardInterrupt, which the command-line library would answer with exit code 1."""


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise Interrupted


def _interrupted() -> NoReturn:
    if not _helps():
        print("\nInterrupted. What was finished is kept; the same command continues.", file=sys.stderr)  # noqa: T201
    sys.exit(EXIT_INTERRUPTED)
