"""The commands that measure and decide: validate, gate, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from nayer_edge.errors import EXIT_FAILED, UsageError

from .. import actions
from .shared import Json, Run, TrustCode, app, example, print_json, show_result, stdout, watched


@app.command(epilog=example("nayer-edge validate runs/digits --data digits"))
def validate(
    run_folder: Run,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Labelled hold-out images: class folders, .parquet, .npz, torchvision's formats, or digits."
        ),
    ] = None,
    fit: Annotated[
        Literal["exact", "stretch", "center-crop"] | None,
        typer.Option(
            "--fit", metavar="HOW", help="For images of another size: exact (refuse them), stretch or center-crop."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", metavar="NAME", help="Which split of --data: train, validation, test, or its own name."
        ),
    ] = None,
    allow_implausible: Annotated[
        bool,
        typer.Option("--allow-implausible", help="Measure even if the teacher's predictions do not match."),
    ] = False,
    synthetic: Annotated[
        bool,
        typer.Option("--synthetic", help="Use synthetic images instead, reserved during distillation or drawn now."),
    ] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Compares every artifact with the teacher; writes predictions.npz and report.json."""
    if data is not None and synthetic:
        raise UsageError("--data and --synthetic are mutually exclusive.")
    if split is not None and synthetic:
        raise UsageError("--split and --synthetic are mutually exclusive.")
    before, display = actions.open_run(run_folder).manifest.steps, watched(as_json)
    chosen = data if data is not None or synthetic else ...
    done = actions.validate(
        run_folder, chosen, fit=fit, split=split, allow_implausible=allow_implausible, display=display
    )
    show_result(done, "validate", display, as_json=as_json)
    if not as_json and (gone := before.keys() - done.manifest.steps.keys()):
        text = f"Removed outdated results ({', '.join(sorted(gone))})."
        stdout().print(
            f"{text} Write them again: nayer-edge report {done.typed}", style="dim", markup=False, highlight=False
        )


@app.command(epilog=example("nayer-edge gate runs/digits --policy policy.toml --junit junit.xml --summary summary.md"))
def gate(
    run_folder: Run,
    policy: Annotated[Path | None, typer.Option("--policy", help="A TOML policy file.")] = None,
    references: Annotated[
        Path | None, typer.Option("--references", help="A references.toml with the release to compare with.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json-out", help="Write the verdict as JSON here.")] = None,
    summary: Annotated[Path | None, typer.Option("--summary", help="Append Markdown here.")] = None,
    print_policy: Annotated[bool, typer.Option("--print-policy", help="Print the policy in force and exit.")] = False,
    as_json: Json = False,
) -> None:
    """Gives the verdict on a validated run.

    Exit codes: 0 pass, 1 fail or inconclusive, 2 usage error, 4 tampered or stale, 70 a bug."""
    from ..gate import verdict as gates

    if print_policy:
        chosen = gates.load_policy(actions.open_run(run_folder), policy)
        print(gates.policy_toml(chosen), end="")  # noqa: T201
        return
    verdict = actions.gate(
        run_folder, policy=policy, references=references, junit=junit, json_out=json_out, summary=summary
    )
    if as_json:
        print_json(gates.verdict_json(verdict))
    else:
        stdout().print(gates.verdict_table(verdict, stdout().encoding))
    gates.print_annotations(verdict, sys.stdout if not as_json else sys.stderr)
    if verdict.verdict != "pass":
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog=example("nayer-edge report runs/digits"))
def report(run_folder: Run, trust_code: TrustCode = False, as_json: Json = False) -> None:
    """Writes one self-contained HTML page about the run, re-running outdated steps."""
    display = watched(as_json)
    show_result(actions.report(run_folder, display=display), "report", display, as_json=as_json, decide=False)
