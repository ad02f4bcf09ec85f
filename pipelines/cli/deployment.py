"""The commands for deployment: export, calibration-data, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nayer_edge.errors import MissingError, UsageError

from ..recipes.renamed import warn_renamed
from .shared import Json, Run, TrustCode, app, example, open_run, print_json, recipe_in, run_steps, stdout, watched

NOISY = 3.0
"""p95 / median latency above which timings are reported as noisy"""


@app.command(
    epilog=example(
        "nayer-edge export runs/digits --int8 --target cpu,tensorrt-rtx",
        "nayer-edge export runs/digits --int8 --qat",
    )
)
def export(
    run_folder: Run,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize, calibrated with images from the generator.")] = False,
    fp16: Annotated[
        bool | None,
        typer.Option(
            "--fp16/--no-fp16", help="Also write an FP16 graph. Default: as the recipe says.", show_default=False
        ),
    ] = None,
    qat: Annotated[
        bool | None,
        typer.Option(
            "--qat/--no-qat",
            help="With --int8: quantization-aware training on synthetic images; its result is kept if it agrees better "
            "with FP32 than calibration alone. Default: as the recipe says.",
            show_default=False,
        ),
    ] = None,
    finetune: Annotated[bool | None, typer.Option("--finetune/--no-finetune", hidden=True)] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="cpu, arm, tensorrt, tensorrt-rtx; comma-separated or repeated."),
    ] = None,
    engine: Annotated[
        bool | None,
        typer.Option(
            "--engine/--no-engine",
            help="Build engines for the targets that need one. Default: as the recipe says.",
            show_default=False,
        ),
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option("--compute-capability", metavar="SM", help="For TensorRT-RTX: sm75, sm89, sm120, …")
    ] = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Exports ONNX files: FP32, with --int8 a quantized graph per target, and their engines.

    If this machine cannot build an engine, everything else is still exported and the exit code is 3.
    """
    if finetune is not None:
        warn_renamed("--finetune" if finetune else "--no-finetune", "--qat" if finetune else "--no-qat")
        qat = finetune if qat is None else qat
    if qat and not int8:
        raise UsageError("--qat trains the INT8 graph, which is not exported without --int8.", fix="Add --int8.")
    chosen = recipe_in(run_folder)
    asked = {"fp16": fp16, "engines": engine, "qat": qat}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if targets := [name.strip() for item in target or [] for name in item.split(",") if name.strip()]:
        from nayer_edge.export.targets import get_target

        changes["targets"] = tuple(dict.fromkeys(get_target(name).name for name in targets))
    if compute_capability is not None:
        changes["compute_capability"] = compute_capability
    chosen = chosen.model_copy(update={"export": chosen.export.model_copy(update=changes)})
    run_steps(chosen, run_folder, last="engine" if int8 else "onnx", as_json=as_json)
    if not as_json:
        _tell_what_is_not_validated(run_folder)
    if int8:
        _require_engines(run_folder)


def _tell_what_is_not_validated(root: Path) -> None:
    """Names the exported files that the last report does not cover."""
    from ..measurements import REPORT_PATH

    opened = open_run(root)
    files = opened.manifest.files
    measured = files[REPORT_PATH].parents if REPORT_PATH in files else ()
    new = [
        Path(name).name
        for name, record in files.items()
        if name.endswith((".onnx", ".engine")) and record.sha256 not in measured
    ]
    if new:
        text = f"Not validated yet: {', '.join(sorted(new))}. Type: nayer-edge validate {opened.typed}"
        stdout().print(text, style="dim", markup=False, highlight=False)


def _require_engines(root: Path) -> None:
    """Raises MissingError (exit 3) if a requested engine could not be built."""
    from nayer_edge.storage.files import read_json

    opened = open_run(root)
    records = read_json(opened.path(opened.artifact("engine").files["engines"]), "the list of engines")
    missing = [record for record in records if record["status"] == "unavailable"]
    if missing:
        names = ", ".join(record["name"] for record in missing)
        raise MissingError(
            f"Everything was exported except {names}.",
            why="\n".join(dict.fromkeys(record["reason"] for record in missing)),
            fix="Build them on a machine that has it, or export only the ONNX files with --no-engine.",
        )


@app.command(
    "calibration-data",
    epilog=example("nayer-edge calibration-data runs/digits -n 512 --format npz,png --out calibration"),
)
def calibration_data(
    run_folder: Run,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=1_000_000, help="How many images.")] = 512,
    formats: Annotated[str, typer.Option("--format", help="npz, npy, png, polygraphy; comma-separated.")] = "npz",
    out: Annotated[Path, typer.Option("--out", help="The folder to write to.")] = Path("calibration"),
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Draws class-balanced synthetic images from the trained generator, in formats that other quantizers read."""
    from nayer_edge.export.calibration_data import write_calibration_data

    from ..deploy import SyntheticSource

    opened, chosen = open_run(run_folder), recipe_in(run_folder)
    opened.require_intact()
    if out.resolve().is_relative_to(run_folder.resolve()):
        raise UsageError(
            f"{out} is inside the run folder, which holds only files listed in its manifest.",
            fix="Choose another folder.",
        )
    teacher, embeddings, student = (opened.artifact(name) for name in ("teacher", "lte", "student"))
    console, progress = watched(as_json)
    source = SyntheticSource.open(teacher, embeddings, student, chosen, opened)
    rounds = -(-count // chosen.synthesis.batch)
    progress.start("draw calibration images", rounds * chosen.synthesis.g_steps)
    images, labels = source.draw_labelled("calibration", count, progress)
    progress.finish()
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    written = write_calibration_data(images, labels, chosen.teacher.classes, out, wanted)
    if as_json:
        print_json({"images": len(images), "files": {name: str(path) for name, path in written.items()}})
        return
    for name, path in written.items():
        console.print(f"✓ {name:<11} {len(images)} images  {path}", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog=example("nayer-edge bench runs/digits --batch 1,8,64"))
def bench(
    run_folder: Run,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, comma-separated.")] = "1,8,64",
    runs: Annotated[int, typer.Option("--runs", min=5, help="Timed rounds per batch size.")] = 100,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    as_json: Json = False,
) -> None:
    """Latency and throughput of every artefact that this machine can run, measured in turn in one process."""
    from ..bench import measure

    try:
        batches = [int(part) for part in batch.split(",")]
    except ValueError as error:
        raise UsageError(f"'{batch}' is not a list of batch sizes.", fix="For example: --batch 1,8,64") from error
    timings = measure(open_run(run_folder), recipe_in(run_folder), batches, runs, threads)
    if as_json:
        print_json([vars(timing) for timing in timings])
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
    stdout().print(table)
    if noisy := [timing for timing in timings if timing.p95 > NOISY * timing.p50]:
        worst = max(noisy, key=lambda timing: timing.p95 / timing.p50)
        stdout().print(
            f"\nTimings are noisy: the p95 latency of {worst.runner} at batch {worst.batch} is "
            f"{worst.p95 / worst.p50:.0f} times its median. Repeat on an idle machine.",
            style="yellow",
            highlight=False,
        )
