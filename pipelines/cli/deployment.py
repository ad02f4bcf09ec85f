"""The commands for deployment: export, calibration-data, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from nayer_edge.errors import UsageError

from .. import actions
from ..recipes.renamed import warn_renamed
from .shared import Json, Run, TrustCode, app, example, print_json, show_result, stdout, watched

NOISY = 3.0
"""p95 / median latency above which timings are reported as noisy"""


@app.command(
    epilog=example(
        "nayer-edge export runs/digits --int8 --target cpu,tensorrt-rtx",
        "nayer-edge export runs/digits --int8 --target arm --only",
        "nayer-edge export runs/digits --int8 --target openvino,executorch,litert",
        "nayer-edge export runs/digits --int8 --qat",
    )
)
def export(
    run_folder: Run,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also quantize to INT8, calibrated with synthetic images.")
    ] = False,
    fp16: Annotated[
        bool | None,
        typer.Option(
            "--fp16/--no-fp16",
            help="Also write FP16 files: for TensorRT and, with --int8, OpenVINO and LiteRT. Default: as the recipe "
            "says.",
            show_default=False,
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
        typer.Option(
            "--target",
            help="cpu, arm, tensorrt, tensorrt-rtx, openvino, executorch, litert; comma-separated or repeated. Added "
            "to those that the run has. Needs --int8, except for tensorrt and tensorrt-rtx.",
        ),
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="With --target: replace the run's targets, and remove their files.")
    ] = False,
    engine: Annotated[
        bool | None,
        typer.Option(
            "--engine/--no-engine",
            help="Build engines for the targets that need one. Default: as the recipe says.",
            show_default=False,
        ),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option("--compute-capability", metavar="SM", help="With --int8, for TensorRT-RTX: sm75, sm89, sm120, …"),
    ] = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Exports ONNX files: FP32, with --int8 a quantized file per target, and their engines.

    If this machine cannot build an engine, or lacks a target's runtime, everything else is still exported and the exit
    code is 3.
    """
    if finetune is not None:
        old, new = ("--finetune", "--qat") if finetune else ("--no-finetune", "--no-qat")
        if qat is not None:
            raise UsageError(f"{old} is the old name of {new}, and both options are given.", fix=f"Leave out {old}.")
        warn_renamed(old, new)
        qat = finetune
    display = watched(as_json)
    done = actions.export(
        run_folder,
        int8=int8,
        fp16=fp16,
        qat=qat,
        targets=target or (),
        only=only,
        engines=engine,
        compute_capability=compute_capability,
        display=display,
    )
    show_result(done, "engine", display, as_json=as_json)
    if not as_json and (new := actions.not_validated(done)):
        text = f"Not validated yet: {', '.join(new)}. Type: nayer-edge validate {done.typed}"
        stdout().print(text, style="dim", markup=False, highlight=False)
    if int8:
        actions.require_engines(done, target or ())


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
    """Writes class-balanced synthetic images, unused in training, in formats that other quantizers read."""
    from nayer_edge.export.calibration_data import require_formats, write_calibration_data
    from nayer_edge.storage.run_folder import require_outside

    opened = actions.open_run(run_folder)
    require_outside(out, "--out")
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    require_formats(wanted, actions.recipe_in(run_folder).teacher.input.channels)
    display = watched(as_json)
    images, labels = actions.draw(run_folder, count, display=display)
    written = write_calibration_data(images, labels, opened.manifest.recipe["teacher"]["classes"], out, wanted)
    if as_json:
        print_json({"images": len(images), "files": {name: str(path) for name, path in written.items()}})
        return
    for name, path in written.items():
        text = f"✓ {name:<11} {len(images)} images  {path}"
        display.console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command(epilog=example("nayer-edge bench runs/digits --batch 1,8,64"))
def bench(
    run_folder: Run,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, comma-separated.")] = "1,8,64",
    runs: Annotated[int, typer.Option("--runs", min=5, help="Timed rounds per batch size.")] = 100,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    as_json: Json = False,
) -> None:
    """Latency and throughput of every artifact that this machine can run, measured in turn in one process."""
    from ..costs.bench import measure

    try:
        batches = [int(part) for part in batch.split(",")]
    except ValueError as error:
        raise UsageError(f"'{batch}' is not a list of batch sizes.", fix="For example: --batch 1,8,64") from error
    timings, refused = measure(actions.open_run(run_folder), actions.recipe_in(run_folder), batches, runs, threads)
    if as_json:
        print_json([vars(timing) for timing in timings])
        return
    for name, why in refused.items():
        stdout().print(f"{name}: not measured. {why.what}", style="yellow", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("artifact")
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
