"""The commands that say whether a run is what it was: verify."""

from __future__ import annotations

import typer
from rich.text import Text

from nayer_edge.errors import EXIT_INTEGRITY
from nayer_edge.text import inert

from .shared import Json, Run, app, example, open_run, print_json, stdout


@app.command(epilog=example("nayer-edge verify runs/digits"))
def verify(run_folder: Run, as_json: Json = False) -> None:
    """Re-hashes every file of the manifest and finds altered, missing and added files."""
    opened = open_run(run_folder)
    altered, added = opened.problems(), [f"{name} is not in the manifest" for name in opened.strangers()]
    problems = altered + added
    if as_json:
        print_json({"run": str(run_folder), "files": len(opened.manifest.files), "problems": problems})
    elif problems:
        for problem in problems:
            stdout().print(Text(f"✗ {inert(problem)}", style="red"))
    else:
        stdout().print(f"✓ {len(opened.manifest.files)} files match the manifest of {run_folder}")
    if problems:
        raise typer.Exit(EXIT_INTEGRITY)
