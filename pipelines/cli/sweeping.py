"""The command that finds the smallest student that passes: sweep."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nayer_edge.errors import EXIT_FAILED
from nayer_edge.text import inert

from ..sweep.order import SweepOrder
from .shared import Json, Settings, TrustCode, app, example, print_json, stdout, watched

if TYPE_CHECKING:
    from ..sweep.record import StudentRecord, Sweep


@app.command(
    epilog=example(
        "nayer-edge sweep runs/digits --students nayer:resnet8_w4,nayer:resnet8_w8,nayer:resnet8 --budget 5m",
        "nayer-edge sweep runs/digits-sweep",
        "nayer-edge sweep runs/digits --budget 2h --ray auto",
    )
)
def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A finished run, whose memory bank is used; a recipe, to make a bank first; or a sweep to continue.",
            show_default=False,
        ),
    ],
    students: Annotated[
        list[str] | None,
        typer.Option(
            "--students",
            metavar="A,B,C",
            help="Students; comma-separated or repeated.",
            show_default="some that suit the teacher",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Time for all students together, for example 3h.",
            show_default="40 % of the time of separate runs",
        ),
    ] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder of the sweep.", show_default="runs/<recipe>-sweep")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Train on a Ray cluster: auto, HOST:PORT, or local.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, and command lines for a scheduler; write nothing.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over: empty the sweep's folder first. The run whose bank it used is kept."),
    ] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Trains several students from one memory bank, and names the smallest that passes the policy.

    Students that can no longer pass are stopped early. Exit codes as for gate: 0 if a student passes, else 1.
    """
    order = SweepOrder.typed(recipe, students or [], budget, out, settings, fresh=fresh)
    if dry_run:
        _show_plan(order, recipe, settings or [], fresh=fresh, as_json=as_json)
        return
    display = watched(as_json)
    found = order.execute(ray=ray, fresh=fresh, display=display)
    if as_json:
        print_json(found.model_dump(mode="json", by_alias=True))
    else:
        display.console.print()
        display.console.print(sweep_table(found))
        if found.command:
            display.console.print(Text(f"  {inert(found.command)}", style="bold"), soft_wrap=True)
        display.console.print(f"\nPage: {order.out / 'sweep.html'}", highlight=False, soft_wrap=True)
    if found.verdict != "pass":
        raise typer.Exit(EXIT_FAILED)


def _show_plan(order: SweepOrder, name: str, settings: list[str], *, fresh: bool, as_json: bool) -> None:
    from ..sweep.running import as_commands, begun, commands_left, planned

    asked = order.recipe, order.bank, order.out, order.students, order.seconds
    plan = None if fresh else begun(*asked)
    if plan is not None:
        (lines, notes), said = commands_left(plan, order.out), _left(plan)
        how = "The students that are left, each with the rest of its share or an equal part of the time that is left:"
        if not lines:
            how = f"To continue one of them by hand: nayer-edge run {shlex.quote(str(order.out))}/STUDENT --more 1h"
    else:
        assert order.recipe is not None
        plan, shared = planned(order.recipe, order.bank, order.out, order.students, order.seconds)
        bank = None if shared.student.bank is None else Path(shared.student.bank)
        lines, notes, said = as_commands(plan, bank, order.out, name, settings), [], _planned(plan)
        how = "The same students in runs of their own, none stopped early:"
    if as_json:
        print_json({"plan": plan.model_dump(mode="json", by_alias=True), "commands": lines, "notes": notes})
        return
    console = stdout()
    console.print(f"{said}\n", highlight=False)
    console.print(_students(plan, planned_only=True))
    for note in notes:
        console.print(Text.assemble("\n", inert(note)), soft_wrap=True)
    console.print(Text.assemble("\n", inert(how), "\n"), soft_wrap=True)
    for line in lines:
        console.print(Text(inert(line)), soft_wrap=True)


def _planned(plan: Sweep) -> str:
    """A new sweep in a sentence."""
    from ..costs.durations import duration

    time = "40 % of the time that separate runs would take" if plan.seconds is None else duration(plan.seconds)
    # If the shares turn out to be too short, there will be fewer.
    rounds = "1 round" if plan.rounds == 1 else f"up to {plan.rounds} rounds"
    return f"{_counted(plan)}, {time}, {rounds} of successive halving."


def _left(sweep: Sweep) -> str:
    """What is left of a begun sweep, in a sentence."""
    from ..costs.durations import duration

    seconds = (sweep.seconds or 0.0) - sweep.spent
    time = duration(seconds) if seconds >= 1 else "no time"
    return f"{_counted(sweep)} and {time} left, {sweep.done} of {sweep.rounds} rounds done."


def _counted(sweep: Sweep) -> str:
    going = sum(each.open for each in sweep.students)
    return f"{going} student{'s' * (going != 1)}"


def sweep_table(sweep: Sweep) -> Group:
    """The result for a terminal: a table that fits 80 columns, what became of every student, and the answer."""
    sentences = Table.grid(padding=(0, 2, 0, 0))
    for student in sorted(sweep.students, key=lambda each: each.order):
        if text := _became(student):
            sentences.add_row(Text(inert(student.model), style="dim"), Text(inert(text)))
    style = {"pass": "green", "fail": "red", "inconclusive": "yellow"}.get(sweep.verdict or "", "")
    answer = Text(inert(sweep.sentence), style=f"bold {style}")
    note = [] if sweep.kind != "synthetic" else [Text("Measured on synthetic images: agreement with the teacher."), ""]
    return Group(_students(sweep), "", sentences, "", *note, answer)


def _students(sweep: Sweep, *, planned_only: bool = False) -> Table:
    from ..gate.wording import milliseconds, percent, size
    from ..sweep.results import quality

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Student", overflow="fold")
    good = "agreement" if sweep.kind == "synthetic" else "top-1"
    headings = ("params", "INT8 ≈") if planned_only else ("params", "size", "p95 ms", good, "rounds")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for student in sorted(sweep.students, key=lambda each: each.order):
        params = "–" if student.params is None else f"{student.params:,}"
        if planned_only:
            table.add_row(Text(inert(student.model)), params, size(student.int8_bytes), _state(student))
            continue
        artifact = student.shipped
        rate = quality(artifact) if artifact else None
        p95 = artifact.p95_ms if artifact else None
        table.add_row(
            Text(inert(student.model)),
            params,
            size(artifact.size_bytes if artifact else None),
            "–" if p95 is None else milliseconds(p95),
            percent(rate.value if rate else None),
            f"{len(student.shares)}/{sweep.rounds}",
            _state(student),
        )
    return table


def _state(student: StudentRecord) -> Text:
    if student.artifacts and not student.missed:
        return Text("passes", style="green")
    colour = {"refused": "yellow", "failed": "red"}.get(student.state, "dim")
    return Text("" if student.state == "waiting" else student.state, style=colour)


def _became(student: StudentRecord) -> str:
    from ..sweep.results import advice

    parts = [f"{student.reason[:1].upper()}{student.reason[1:].rstrip('.')}."] if student.reason else []
    parts += [missed.detail for missed in student.missed]
    if help_ := advice(student):
        parts.append(f"What would help: {help_}.")
    return " ".join(parts)
