"""Shared by the commands: the application, common parameters, and output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from nayer_edge.errors import EXIT_FAILED
from nayer_edge.text import inert

from .. import actions

if TYPE_CHECKING:
    from nayer_edge.storage.run_folder import RunFolder

    from ..recipes.schema import Recipe
    from ..show import Display

app = typer.Typer(
    name="nayer-edge",
    help="Distils a compact INT8 student from an image classifier without its training images, and gates releases.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Run = Annotated[Path, typer.Argument(help="A run folder, for example runs/digits.", show_default=False)]
RecipeName = Annotated[
    str,
    typer.Argument(help="A shipped recipe's name, a .toml file, or a run folder to continue.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a recipe value; repeatable."),
]
Out = Annotated[Path | None, typer.Option("--out", help="The run folder.", show_default="runs/<recipe>")]


def _trust(context: typer.Context, trust: bool) -> bool:
    if trust:
        from nayer_edge.models.user_code import trusting

        # Until this command ends.
        context.with_resource(trusting())
    return trust


TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", callback=_trust, help="Allow running the code of a `python:` model."),
]
"""handled by its callback; a command only declares it"""
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: empty the run folder first.")]


def example(*lines: str) -> str:
    """The examples at the end of a command's help."""
    return "[bold]Example[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)


def run_steps(
    recipe: Recipe, root: Path, *, last: str | None = None, fresh: bool = False, as_json: bool = False
) -> None:
    """Runs steps, shows their progress, and exits with the code of the verdict if there is one.

    Raises:
        MissingError: the files of the runtimes are among the steps, and not all could be built; everything else is done
            (see `actions.require_runtimes`).
    """
    display = watched(as_json)
    run = actions.make(recipe, root, last=last, fresh=fresh, display=display)
    show_result(run, last, display, as_json=as_json)
    actions.require_complete(run, last)


def show_lines(lines: list[tuple[str, str]], *, as_json: bool = False) -> None:
    """Shows lines with a heading each; nothing with --json."""
    if as_json:
        return
    for head, text in lines:
        stdout().print(Text(f"{head:<12}", style="dim").append(inert(text), style="default"), soft_wrap=True)


def show_result(
    run: RunFolder, last: str | None, display: Display, *, as_json: bool = False, decide: bool = True
) -> None:
    """Shows the result of steps, and exits with the code of the verdict if there is one.

    Args:
        last: the last step to run; None for all.
        decide: if False, exit with 0 whatever the verdict, for commands that are not about the verdict.
    """
    from ..gate import verdict as gates

    verdict = gates.run_gate(run.root) if last in (None, "gate", "report") else None
    if as_json:
        steps = {name: record.model_dump(mode="json") for name, record in run.manifest.steps.items()}
        shown = None if verdict is None else gates.verdict_json(verdict)
        print_json({"run": str(run.root), "steps": steps, "verdict": shown})
    elif verdict is not None:
        display.console.print()
        display.console.print(gates.verdict_table(verdict, display.console.encoding))
        display.console.print(f"\nReport: {run.root / 'report.html'}", highlight=False, soft_wrap=True)
    if decide and verdict is not None and verdict.verdict != "pass":
        raise typer.Exit(EXIT_FAILED)


def watched(as_json: bool) -> Display:
    """The progress display: bars on a terminal, lines elsewhere; with --json never on standard output."""
    from ..show import Display

    console = Console(stderr=True, force_terminal=sys.stderr.isatty()) if as_json else stdout()
    return Display(console, titles=not as_json)


def stdout() -> Console:
    """A console on standard output."""
    # Colours only on a terminal, whatever the environment variables of a CI server request.
    return Console(force_terminal=sys.stdout.isatty())


def print_json(value: Any) -> None:
    """Prints a result as JSON."""
    # Escapes where the encoding lacks characters: they are read back as what they were.
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode, allow_nan=False))  # noqa: T201
