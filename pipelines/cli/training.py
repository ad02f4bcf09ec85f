"""The training commands: quickstart, run, teach, distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nayer_edge.errors import UsageError
from nayer_edge.runtime.process import launched

from ..actions import default_out, read_recipe
from .shared import Fresh, Json, Out, RecipeName, Settings, TrustCode, app, example, run_steps


@app.command(epilog=example("nayer-edge quickstart"))
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="The run folder.")] = Path("runs/digits"),
    fresh: Fresh = False,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Runs the whole pipeline on real handwritten digits: teacher, data-free student, INT8, verdict, report."""
    run_steps(read_recipe("digits", settings), out, fresh=fresh, as_json=as_json)


@app.command(epilog=example("nayer-edge run digits --set seed=1 --out runs/mine", "nayer-edge run runs/mine"))
def run(
    recipe: RecipeName,
    until: Annotated[str | None, typer.Option("--until", metavar="STEP", help="Stop after this step.")] = None,
    settings: Settings = None,
    out: Out = None,
    fresh: Fresh = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Runs a recipe, or continues where it stopped. A run folder continues with its own recipe."""
    chosen = read_recipe(recipe, settings)
    run_steps(chosen, out or default_out(recipe, chosen), last=until, fresh=fresh, as_json=as_json)


@app.command(epilog=example("nayer-edge teach digits --out runs/teacher"))
def teach(
    recipe: RecipeName, settings: Settings = None, out: Out = None, trust_code: TrustCode = False, as_json: Json = False
) -> None:
    """Trains a recipe's teacher on its labelled images (for demonstrations and benchmarks)."""
    chosen = read_recipe(recipe, settings)
    if chosen.teach is None:
        raise UsageError(
            f"The recipe '{chosen.name}' has no [teach] section: its teacher comes from teacher.weights.",
            fix="Choose a recipe that trains one, for example: nayer-edge teach digits",
        )
    run_steps(chosen, out or default_out(recipe, chosen), last="teacher", as_json=as_json)


@app.command(epilog=example("nayer-edge distill digits --out runs/digits"))
def distill(
    recipe: RecipeName,
    settings: Settings = None,
    out: Out = None,
    fresh: Fresh = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Distils the student without a data set: teacher and class names in; student, generator and memory bank out.

    On several GPUs or machines: torchrun --nproc-per-node 4 -m nayer_edge distill RECIPE (docs/DISTRIBUTED.md).
    """

    def work() -> None:
        chosen = read_recipe(recipe, settings)
        run_steps(chosen, out or default_out(recipe, chosen), last="student", fresh=fresh, as_json=as_json)

    if launched()[1] == 1:
        work()
        return
    from nayer_edge.runtime.distributed import joined

    with joined() as world:
        if world.first:
            work()
            world.from_first()
        else:
            from ..distill import take_part

            take_part(world)
