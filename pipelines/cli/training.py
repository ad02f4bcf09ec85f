"""The training commands: quickstart, run, teach, distill."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nayer_edge.errors import UsageError
from nayer_edge.runtime.process import launched

from ..actions import Time, default_out, finished_elsewhere, open_run, read_recipe, timed
from .shared import Fresh, Json, Out, RecipeName, Settings, TrustCode, app, example, run_steps, show_lines

if TYPE_CHECKING:
    from ..recipes.schema import Recipe

STOP_AFTER = "Stop after this step: teacher, lte, student, onnx, int8, engine, validate, gate or report."
"""the names of the table of steps, whose module takes too long to import for `--help`"""

Budget = Annotated[
    str | None,
    typer.Option("--budget", metavar="TIME", help="Plan the run for this much time on this machine, for example 1h."),
]
More = Annotated[
    str | None,
    typer.Option("--more", metavar="TIME", help="Continue training a run's student for this much time."),
]
Finish = Annotated[
    str | None,
    typer.Option("--finish", metavar="TIME", help="Finish an interrupted run, or one in progress, within this time."),
]


Bank = Annotated[
    Path | None,
    typer.Option("--bank", metavar="RUN", help="Start with the images of this run, which has the same teacher."),
]


@app.command(epilog=example("nayer-edge quickstart"))
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="The run folder.")] = Path("runs/digits"),
    fresh: Fresh = False,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Runs the whole pipeline on real handwritten digits: teacher, data-free student, INT8, verdict, report."""
    run_steps(read_recipe("digits", settings), out, fresh=fresh, as_json=as_json)


@app.command(
    epilog=example(
        "nayer-edge run digits --set seed=1 --out runs/mine",
        "nayer-edge run runs/mine",
        "nayer-edge run mine.toml --budget 20m",
        "nayer-edge run runs/mine --more 1h",
    )
)
def run(
    recipe: RecipeName,
    until: Annotated[str | None, typer.Option("--until", metavar="STEP", help=STOP_AFTER)] = None,
    settings: Settings = None,
    out: Out = None,
    budget: Budget = None,
    more: More = None,
    finish: Finish = None,
    bank: Bank = None,
    fresh: Fresh = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Runs a recipe, or continues where it stopped. A run folder continues with its own recipe."""
    _run(recipe, settings, out, Time.typed(budget, more, finish), bank, last=until, fresh=fresh, as_json=as_json)


def _run(
    name: str,
    settings: list[str] | None,
    out: Path | None,
    time: Time,
    bank: Path | None,
    *,
    last: str | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Runs a recipe for the given time, and shows its plan first."""
    recipe = read_recipe(name, settings, bank)
    root = out or default_out(name, recipe)
    changed = bool(settings or fresh or last)
    if (words := finished_elsewhere(recipe, name, root, time, changed=changed)) is not None:
        show_lines([("finishing", f"{words}; the training process then continues with the export")], as_json=as_json)
        return
    recipe, words = timed(recipe, name, root, time, fresh=fresh, settings=settings or ())
    show_lines(words, as_json=as_json)
    with _ways_on(recipe, root, time, last):
        run_steps(recipe, root, last=last, fresh=fresh, as_json=as_json)


@contextlib.contextmanager
def _ways_on(recipe: Recipe, root: Path, time: Time, last: str | None) -> Iterator[None]:
    """Notes on an interruption how the run can be continued or ended early, for `cli.main` to print."""
    try:
        yield
    except BaseException as end:
        if not isinstance(end, Exception) and launched()[1] == 1:
            for way in _ways(recipe, root, time, last):
                end.add_note(way)
        raise


def _ways(recipe: Recipe, root: Path, time: Time, last: str | None) -> list[str]:
    """One line for each way; empty if the same command is the only one."""
    from nayer_edge.models.user_code import is_trusted

    from ..steps import CHECKPOINT

    trust = " --trust-code" if is_trusted() else ""
    command = f"nayer-edge run {shlex.quote(str(root))}{trust}"
    ways = [f"To continue:            {command}{f' --until {last}' if last else ''}"]
    if recipe.distill.schedule == "constant" and (root / CHECKPOINT).is_file():
        from ..costs.planning import can_change_length

        if can_change_length(recipe, open_run(root)):
            ways += [
                f"To end it early:        {command} --finish 5m",
                f"To give it more time:   {command} --more 1h",
            ]
        return ways
    # The same command would give the time once more.
    return ways if time.more is not None or time.finish is not None else []


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


@app.command(
    epilog=example(
        "nayer-edge distill digits --out runs/digits",
        "nayer-edge distill digits --bank runs/digits --set student.model=nayer:wrn_16_1 --out runs/wrn",
    )
)
def distill(
    recipe: RecipeName,
    settings: Settings = None,
    out: Out = None,
    budget: Budget = None,
    bank: Bank = None,
    fresh: Fresh = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Distils the student without a data set, from the teacher and its class names.

    On several GPUs or machines: torchrun --nproc-per-node 4 -m nayer_edge distill RECIPE (docs/DISTRIBUTED.md).
    """

    def work() -> None:
        _run(recipe, settings, out, Time.typed(budget), bank, last="student", fresh=fresh, as_json=as_json)

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
