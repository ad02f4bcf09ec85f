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

if TYPE_CHECKING:
    from nayer_edge.runtime.progress import Progress
    from nayer_edge.storage.run_folder import RunFolder

    from ..recipes.schema import Recipe
    from ..run import StepEvent

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
    recipe: Recipe,
    root: Path,
    *,
    last: str | None = None,
    fresh: bool = False,
    as_json: bool = False,
    decide: bool = True,
) -> None:
    """Runs steps, shows their progress, and exits with the code of the verdict if there is one.

    Args:
        decide: if False, exit with 0 whatever the verdict, for commands that are not about the verdict.
    """
    from ..gate import verdict as gates
    from ..run import run_recipe
    from ..show import show_event

    console, progress = watched(as_json)

    def watch(event: StepEvent) -> None:
        # Show activity even for steps that report no progress of their own.
        if event.state == "started":
            progress.start(event.step.title, 0)
        else:
            progress.finish()
        show_event(console, event)

    if not as_json:
        console.print(Text(f"{recipe.name} → {root}", style="bold"))
    progress.start("checking recipe and run folder", 0)
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
        print_json({"run": str(root), "steps": steps, "verdict": shown})
    elif verdict is not None:
        console.print()
        console.print(gates.verdict_table(verdict))
        console.print(f"\nReport: {root / 'report.html'}", highlight=False, soft_wrap=True)
    if decide and verdict is not None and verdict.verdict != "pass":
        raise typer.Exit(EXIT_FAILED)


def watched(as_json: bool) -> tuple[Console, Progress]:
    """Console and progress display: bars on a terminal, lines elsewhere; with --json never on standard output."""
    from ..show import Bars, Lines

    console = Console(stderr=True, force_terminal=sys.stderr.isatty()) if as_json else stdout()
    return console, Bars(console) if console.is_terminal else Lines(console)


def load_recipe(name: str, settings: list[str] | None = None) -> Recipe:
    """Loads a shipped recipe, a recipe file, or the recipe of a run folder, with overrides."""
    # Imported here to keep `--help` fast: pydantic alone would take half of its time limit.
    from ..recipes.loading import load_recipe
    from ..recipes.preflight import require_typed

    recipe = load_recipe(name, settings)
    require_typed(recipe, [setting.partition("=")[0].replace(" ", "") for setting in settings or []])
    return recipe


def open_run(root: Path) -> RunFolder:
    """Opens a run folder."""
    from nayer_edge.storage.run_folder import RunFolder

    return RunFolder.open(root)


def default_out(name: str, recipe: Recipe) -> Path:
    """The default run folder: the given one if `name` is a run folder, otherwise `runs/<recipe>`."""
    from ..recipes.loading import run_folder

    return run_folder(name) or Path("runs") / recipe.name


def recipe_in(root: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    from ..recipes.loading import recipe_of

    return recipe_of(open_run(root).manifest.recipe, root)


def percent(fraction: float | None) -> str:
    """0.9911 → "99.11 %"; None → ""."""
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def stdout() -> Console:
    """A console on standard output."""
    # Colours only on a terminal, whatever the environment variables of a CI server request.
    return Console(force_terminal=sys.stdout.isatty())


def print_json(value: Any) -> None:
    """Prints a result as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))  # noqa: T201
