"""The commands that come before a run: recipes, doctor, lte."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from nayer_edge.text import inert

from .shared import Json, RecipeName, Settings, app, example, load_recipe, percent, print_json, stdout

lte_app = typer.Typer(no_args_is_help=True, help="Label-text embeddings: build the cache, look at it.")
app.add_typer(lte_app, name="lte")


@app.command(epilog=example("nayer-edge recipes"))
def recipes(as_json: Json = False) -> None:
    """Lists the shipped recipes with the figures that they were measured with."""
    from ..recipe import shipped

    found = [load_recipe(entry.name) for entry in shipped()]
    if as_json:
        print_json([recipe.model_dump(mode="json", by_alias=True) for recipe in found])
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for heading in ("teacher", "student"):
        table.add_column(heading, overflow="fold")
    for heading in ("top-1", "± sd", "seconds"):
        table.add_column(heading, justify="right")
    for recipe in found:
        measured = recipe.measured
        table.add_row(
            recipe.name,
            recipe.teacher.model,
            recipe.student.model,
            percent(measured.student_top1),
            percent(measured.student_top1_sd),
            "" if measured.seconds is None else f"{measured.seconds:.0f}",
        )
    stdout().print(table)
    stdout().print("\nRun one with: nayer-edge run NAME", style="dim")


@app.command(epilog=example("nayer-edge doctor"))
def doctor(as_json: Json = False) -> None:
    """Says what this machine can do, what is missing, and the line that installs it."""
    from ..doctor import examine

    found = examine()
    if as_json:
        print_json([vars(line) for line in found])
        return
    for line in found:
        mark, style = ("✓", "green") if line.ok else ("·", "yellow")
        text = Text(f"{mark} {line.what:<22} ", style=style)
        stdout().print(text.append(line.found, style="default"), soft_wrap=True)
        if line.fix:
            stdout().print(f"  {line.fix}", style="dim", markup=False, highlight=False, soft_wrap=True)


@lte_app.command("build", epilog=example("nayer-edge lte build digits", "nayer-edge lte build my.toml"))
def lte_build(recipe: RecipeName, settings: Settings = None, as_json: Json = False) -> None:
    """Builds a recipe's embeddings into the cache; a second call reads them from there."""
    _show_lte(recipe, settings, as_json)


@lte_app.command("show", epilog=example("nayer-edge lte show digits"))
def lte_show(recipe: RecipeName, settings: Settings = None, as_json: Json = False) -> None:
    """Shows a recipe's label embeddings: encoder, prompt, and each label's nearest neighbour."""
    _show_lte(recipe, settings, as_json)


def _show_lte(name: str, settings: list[str] | None, as_json: bool) -> None:
    import torch

    from nayer_edge import lte

    recipe = load_recipe(name, settings)
    found = lte.build(recipe.teacher.classes, recipe.lte)
    unit = torch.nn.functional.normalize(found.embeddings, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-1)
    nearest = similarity.max(dim=1)
    rows = [
        {"label": label, "nearest": found.labels[int(index)], "cosine": round(float(value), 4)}
        for label, value, index in zip(found.labels, nearest.values, nearest.indices, strict=True)
    ]
    facts = {
        "encoder": found.encoder,
        "prompt": found.prompt,
        "classes": len(found.labels),
        "dimensions": found.embeddings.shape[1],
        "mean_cosine": round(lte.mean_cosine(found.embeddings), 4),
        "digest": found.digest,
    }
    if as_json:
        print_json({**facts, "labels": rows})
        return
    for key, value in facts.items():
        stdout().print(f"{key:<12} {inert(str(value))}", markup=False, highlight=False)
    table = Table("label", "nearest label", "cosine", box=None, pad_edge=False)
    for row in rows:
        table.add_row(Text(inert(str(row["label"]))), Text(inert(str(row["nearest"]))), f"{row['cosine']:.3f}")
    stdout().print(table)
