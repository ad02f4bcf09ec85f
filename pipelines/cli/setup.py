"""The commands to prepare a run: recipes, students, doctor."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from nayer_edge.text import inert

from ..actions import read_recipe
from .shared import Json, TrustCode, app, example, print_json, stdout, watched


@app.command(epilog=example("nayer-edge recipes"))
def recipes(as_json: Json = False) -> None:
    """Lists the shipped recipes with their measured accuracy."""
    from nayer_edge.models.names import parse

    from ..gate.wording import percent
    from ..recipes.loading import shipped

    found = [read_recipe(entry.name) for entry in shipped()]
    if as_json:
        print_json([recipe.model_dump(mode="json", by_alias=True) for recipe in found])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "teacher → student"):
        table.add_column(heading, no_wrap=True)
    table.add_column("top-1", justify="right", no_wrap=True)
    for recipe in found:
        measured, models = recipe.measured, (recipe.teacher.model, recipe.student.model)
        top1, sd = (percent(rate, missing="") for rate in (measured.student_top1, measured.student_top1_sd))
        table.add_row(
            recipe.name,
            " → ".join(parse(model).name for model in models),
            f"{top1.removesuffix(' %')} ± {sd}" if sd else top1,
        )
    stdout().print(table)
    stdout().print("\nTop-1 accuracy of the student in % (mean ± sd), if measured. Details: --json", style="dim")
    stdout().print("To run one, type: nayer-edge run NAME", style="dim")


@app.command(epilog=example("nayer-edge students --input 3x32x32 --classes 10", "nayer-edge students timm:resnet10t"))
def students(
    models: Annotated[
        list[str] | None, typer.Argument(help="Networks, as in student.model.", show_default="suited to the image size")
    ] = None,
    size: Annotated[str, typer.Option("--input", metavar="CxHxW", help="Channels, height, width.")] = "3x32x32",
    classes: Annotated[int, typer.Option("--classes", help="Number of classes.")] = 10,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Export, quantize and time each (takes seconds).")
    ] = True,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Shows the cost of students: parameters, multiply-accumulates, INT8 size and CPU latency."""
    from nayer_edge.config import InputSpec

    from ..costs import students as costs
    from ..init.parsing import parse_shape
    from ..recipes.checking import checked

    channels, height, width = parse_shape(size, channels=3)
    values = {"channels": channels, "height": height, "width": width}
    spec = checked(InputSpec, values, f"Invalid input specification --input {size}:", "For example: --input 3x224x224")
    chosen = models or costs.students_for(spec)
    progress = watched(as_json).progress
    progress.start("measuring students", len(chosen))
    try:
        found = costs.measure(
            chosen, spec, classes, latency=latency, threads=threads, on_student=lambda _: progress.advance()
        )
    finally:
        progress.finish()
    if as_json:
        print_json([vars(cost) for cost in found])
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("student", overflow="fold")
    for heading in ("params", "MACs", "INT8 size", *(("FP32 ms", "INT8 ms") if latency else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for cost in found:
        times = [f"{value:.2f}" for value in (cost.fp32_ms, cost.int8_ms) if value is not None]
        table.add_row(
            Text(inert(cost.model)),
            _short(cost.params),
            _short(cost.macs),
            ("" if cost.int8_measured else "≈ ") + _short(cost.int8_bytes) + "B",
            *times,
        )
    stdout().print(table)
    if latency:
        note = (
            f"Median latency of ONNX Runtime on this CPU, {threads} thread{'s' * (threads > 1)}, batch 1. INT8 size: "
            "ONNX file for x86, calibrated with noise."
        )
    else:
        note = "INT8 size (≈) is computed from the weights. Omit --no-latency to export, quantize and time each."
    stdout().print("\n" + note, style="dim")


def _short(value: int) -> str:
    """1234567 → "1.23 M"."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} "


@app.command(epilog=example("nayer-edge doctor"))
def doctor(as_json: Json = False) -> None:
    """Reports what this machine can do, what is missing, and how to install it."""
    from ..doctor import examine

    found = examine()
    if as_json:
        print_json([vars(line) for line in found])
        return
    group = found[0].group
    for line in found:
        if line.group != group:
            stdout().print()
            group = line.group
        mark, style = ("✓", "green") if line.ok else ("·", "yellow")
        text = Text(f"{mark} {line.what:<22} ", style=style)
        stdout().print(text.append(inert(line.found), style="default"), soft_wrap=True)
        if line.fix:
            stdout().print(f"  {line.fix}", style="dim", markup=False, highlight=False, soft_wrap=True)
