"""What the commands share: the application, their common parameters, and how results are shown."""

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
    help="Distils a compact INT8 student from an image classifier whose training images are gone, and gates it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Run = Annotated[Path, typer.Argument(help="A run folder, for example runs/digits.", show_default=False)]
RecipeName = Annotated[
    str,
    typer.Argument(help="A shipped recipe's name, a .toml file, or a run folder to go on with.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe; repeatable."),
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
    typer.Option("--trust-code", callback=_trust, help="Run the code that a `python:` model names."),
]
"""read by its callback: a command only declares it"""
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: empties the run folder first.")]


def example(*lines: str) -> str:
    """The last lines of a command's help: how it is typed."""
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
    """Runs steps, shows them, and ends with the verdict's exit code where a verdict was reached.

    Args:
        decide: False ends with 0 whatever the verdict, for a command that was not asked for one.
    """
    from ..gate import verdict as gates
    from ..run import run_recipe
    from ..show import show_event

    console, progress = watched(as_json)

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
        print_json({"run": str(root), "steps": steps, "verdict": shown})
    elif verdict is not None:
        console.print()
        console.print(gates.verdict_table(verdict))
        console.print(f"\nReport: {root / 'report.html'}", highlight=False, soft_wrap=True)
    if decide and verdict is not None and verdict.verdict != "pass":
        raise typer.Exit(EXIT_FAILED)


def watched(as_json: bool) -> tuple[Console, Progress]:
    """Where progress is shown: on a terminal as bars, elsewhere as lines; with --json never on standard output."""
    from ..show import Bars, Lines

    console = Console(stderr=True, force_terminal=sys.stderr.isatty()) if as_json else stdout()
    return console, Bars(console) if console.is_terminal else Lines(console)


def load_recipe(name: str, settings: list[str] | None = None) -> Recipe:
    """A shipped recipe, a file's or a run folder's, with overrides."""
    # Imported here: pydantic takes half of what `--help` may take.
    from ..recipes.loading import load_recipe
    from ..recipes.preflight import require_typed

    recipe = load_recipe(name, settings)
    require_typed(recipe, [setting.partition("=")[0].replace(" ", "") for setting in settings or []])
    return recipe


def open_run(root: Path) -> RunFolder:
    """The run folder with its manifest."""
    from nayer_edge.storage.run_folder import RunFolder

    return RunFolder.open(root)


def default_out(name: str, recipe: Recipe) -> Path:
    """Where a recipe runs unless told: that of a run folder in its folder."""
    from ..recipes.loading import run_folder

    return run_folder(name) or Path("runs") / recipe.name


def recipe_in(root: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    from ..recipes.loading import recipe_of

    return recipe_of(open_run(root).manifest.recipe, root)


def percent(fraction: float | None) -> str:
    """0.9911 → "99.11 %"; nothing → ""."""
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def stdout() -> Console:
    """A console on standard output."""
    # Colour codes only where a person looks, whatever a CI server's variables say.
    return Console(force_terminal=sys.stdout.isatty())


def print_json(value: Any) -> None:
    """Prints a result for machines."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))  # noqa: T201
