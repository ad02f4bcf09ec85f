"""The commands for label-text embeddings: `lte build` and `lte show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from nayer_edge.errors import UsageError
from nayer_edge.storage.files import expanded
from nayer_edge.text import inert, printed

from ..actions import read_recipe
from .shared import Json, Settings, app, example, print_json, stdout

if TYPE_CHECKING:
    from nayer_edge.labels.embeddings import LabelEmbeddings

lte_app = typer.Typer(no_args_is_help=True, help="Label-text embeddings: build the cache, show similarities.")
app.add_typer(lte_app, name="lte")

ROWS = 40
"""maximum number of rows of the table; with more labels it shows the most similar ones"""
CELL = 26
"""width of a label in the table, so that it fits into 80 columns"""

RecipeOrNone = Annotated[
    str | None, typer.Argument(help="A shipped recipe's name, or a .toml file.", show_default=False)
]
Labels = Annotated[
    Path | None, typer.Option("--labels", help="Class names: a text, JSON, CSV or YAML file; overrides the recipe's.")
]
Encoder = Annotated[
    str | None,
    typer.Option(
        "--encoder", help="all-MiniLM-L6-v2, a hub id or folder, a .safetensors, .npz or .npy file, onehot, random."
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A template with {label}; repeatable, embeddings are averaged."),
]
Synonyms = Annotated[
    str | None,
    typer.Option("--synonyms", help="Of 'tench, Tinca tinca', use: first, all, or average.", show_default=False),
]
OutFile = Annotated[Path | None, typer.Option("--out", help="Also write the embeddings here (.safetensors).")]
Picture = Annotated[Path | None, typer.Option("--picture", help="Also draw a heat map of similarities (.png, .svg).")]


@lte_app.command(
    "build",
    epilog=example("nayer-edge lte build digits", "nayer-edge lte build --labels names.txt --out names.safetensors"),
)
def lte_build(
    recipe: RecipeOrNone = None,
    labels: Labels = None,
    encoder: Encoder = None,
    prompt: Prompt = None,
    synonyms: Synonyms = None,
    out: OutFile = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Embeds the class names of a recipe or file, and caches the embeddings.

    Later calls read them from the cache, without a language model.
    """
    found = _embeddings(recipe, labels, encoder, prompt, synonyms, settings)
    if out is not None:
        from nayer_edge.labels import embeddings as lte
        from nayer_edge.storage.run_folder import require_outside

        if out.suffix != ".safetensors":
            raise UsageError(
                f"Embeddings cannot be written as '{out.name}'.", fix="Give --out a name that ends with .safetensors."
            )
        require_outside(out, "--out")
        lte.save(found, out)
    _show(found, as_json, None)


@lte_app.command("show", epilog=example("nayer-edge lte show digits", "nayer-edge lte show digits --picture lte.png"))
def lte_show(
    recipe: RecipeOrNone = None,
    labels: Labels = None,
    encoder: Encoder = None,
    prompt: Prompt = None,
    synonyms: Synonyms = None,
    picture: Picture = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Shows label embeddings: encoder, prompt, most similar labels, and optionally a heat map."""
    _show(_embeddings(recipe, labels, encoder, prompt, synonyms, settings), as_json, picture)


def _embeddings(
    recipe: str | None,
    labels: Path | None,
    encoder: str | None,
    prompt: list[str] | None,
    synonyms: str | None,
    settings: list[str] | None,
) -> LabelEmbeddings:
    """The recipe's label embeddings, with the overrides given as options."""
    from nayer_edge.config import LTE
    from nayer_edge.labels import embeddings as lte
    from nayer_edge.labels import precomputed
    from nayer_edge.labels.class_names import read_labels

    from ..recipes.checking import checked

    chosen = None if recipe is None else read_recipe(recipe, settings)
    if chosen is None and settings:
        raise UsageError(
            "--set overrides values of a recipe, but no recipe is given.",
            fix="Type: nayer-edge lte show RECIPE --set A.B=C",
        )
    given = {"encoder": encoder, "prompt": prompt, "synonyms": synonyms}
    if prompt and len(prompt) == 1:
        given["prompt"] = prompt[0]
    values = (LTE() if chosen is None else chosen.lte).model_dump()
    values |= {key: value for key, value in given.items() if value is not None and value != []}
    config = checked(LTE, values, "Invalid options:", "Type: nayer-edge lte show --help")
    names = read_labels(labels) if labels is not None else chosen.teacher.classes if chosen is not None else None
    if names is None and config.precomputed:
        names = precomputed.read(expanded(config.encoder)).labels
    if names is None:
        raise UsageError(
            "Neither a recipe nor a file of class names is given.",
            fix="Type: nayer-edge lte show digits   or: nayer-edge lte show --labels names.txt",
        )
    return lte.build(names, config)


def _show(found: LabelEmbeddings, as_json: bool, picture: Path | None) -> None:
    from nayer_edge.storage.run_folder import require_outside

    from ..report.similarity import heat_map, summary

    if picture is not None:
        require_outside(picture, "--picture")
        heat_map(found, picture)
    facts = summary(found)
    if as_json:
        print_json(facts)
        return
    rows = facts.pop("labels")
    for key, value in facts.items():
        for number, line in enumerate(value if isinstance(value, list) else [value]):
            text = inert(str(line))
            short = f"{text[:16]}…" if key in ("digest", "revision") and len(text) > 20 else text
            stdout().print(f"{key if number == 0 else '':<12} {short}", markup=False, highlight=False)
    if len(rows) > ROWS:
        rows = sorted(rows, key=lambda row: -row["cosine"])[:ROWS]
        stdout().print(f"\nThe {ROWS} labels that are most similar to another:", highlight=False)
    else:
        stdout().print()
    table = Table(box=None, pad_edge=False)
    for heading in ("label", "nearest label"):
        table.add_column(heading, max_width=CELL, no_wrap=True, overflow="ellipsis")
    table.add_column("cosine", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        bar = Text("█" * round(12 * max(0.0, row["cosine"])), style="cyan")
        table.add_row(Text(printed(row["label"])), Text(printed(row["nearest"])), f"{row['cosine']:.3f}", bar)
    stdout().print(table)
    if picture is not None:
        stdout().print(f"\nPicture: {picture}", highlight=False, markup=False, soft_wrap=True)
