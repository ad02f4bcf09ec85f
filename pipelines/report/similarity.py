"""How close together the labels of a classifier lie: figures for a table, and a heat map."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nayer_edge.errors import UsageError, missing_extra
from nayer_edge.labels import embeddings as lte
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.storage.files import write_atomic
from nayer_edge.text import inert

FORMATS = (".png", ".svg")
FONT = "DejaVu Sans"
"""matplotlib's own"""
NAMED = 60
"""classes up to which every row of the picture has its name; with more, some of them"""
MAX_SIDE = 2000
"""cells of the picture; with more classes, neighbouring ones share a cell, which shows their greatest similarity"""


@dataclass(frozen=True)
class Neighbour:
    """A label, and the one that lies nearest to it."""

    label: str
    nearest: str
    cosine: float


def neighbours(embeddings: LabelEmbeddings) -> list[Neighbour]:
    """Each label with its nearest, in the order of the classes."""
    values, places = lte.nearest_labels(embeddings.embeddings)
    return [
        Neighbour(label, embeddings.labels[place], round(value, 4))
        for label, value, place in zip(embeddings.labels, values.tolist(), places.tolist(), strict=True)
    ]


def summary(embeddings: LabelEmbeddings) -> dict[str, Any]:
    """What there is to know about embeddings, for people and machines."""
    near = neighbours(embeddings)
    return {
        "encoder": embeddings.encoder,
        "revision": embeddings.revision,
        "prompt": embeddings.prompt.split("\n"),
        "synonyms": embeddings.synonyms,
        "classes": len(embeddings.labels),
        "dimensions": embeddings.embeddings.shape[1],
        "mean_cosine": round(lte.mean_cosine(embeddings.embeddings), 4),
        "max_cosine": max(pair.cosine for pair in near),
        "digest": embeddings.digest,
        "labels": [asdict(pair) for pair in near],
    }


def heat_map(embeddings: LabelEmbeddings, path: Path) -> None:
    """Writes the cosine similarity of every pair of classes as a picture, PNG or SVG by the name of the file.

    Raises:
        UsageError: the name ends with something else.
        MissingError: matplotlib is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(
            f"A picture cannot be written as '{path.name}'.", fix="Give --picture a name that ends with .png or .svg."
        )
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "cpu", "Drawing pictures") from error
    similarity = _reduced(lte.cosines(embeddings.embeddings).numpy())
    count = len(embeddings.labels)
    side = 6.4 if count > NAMED else min(max(3.2, 0.22 * count + 2.0), 12.0)
    # Equal embeddings give equal files: no date, no identifiers that vary; in SVG, text stays text.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nayer-edge", "font.family": FONT}):
        figure = Figure(figsize=(side + 1.0, side), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        different = similarity[~np.eye(len(similarity), dtype=bool)] if count <= MAX_SIDE else similarity
        shown = axis.imshow(
            similarity,
            cmap="viridis",
            vmin=float(different.min()),
            vmax=1.0,
            extent=(-0.5, count - 0.5, count - 0.5, -0.5),
            interpolation="nearest",
        )
        _name_classes(axis, embeddings.labels)
        figure.colorbar(shown, ax=axis, shrink=0.8, label="cosine similarity")
        mean = lte.mean_cosine(embeddings.embeddings)
        title = f"{inert(embeddings.encoder)}, {count} classes, mean cosine {mean:.2f}"
        axis.set_title(title, fontsize=9, parse_math=False)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if suffix == ".svg" else {"Software": None}
        write_atomic(path, lambda temporary: figure.savefig(temporary, format=suffix[1:], metadata=metadata))


def _reduced(similarity: np.ndarray) -> np.ndarray:
    """At most MAX_SIDE cells a side; the greatest similarity stands for those that share a cell."""
    step = -(-len(similarity) // MAX_SIDE)
    if step == 1:
        return similarity
    starts = np.arange(0, len(similarity), step)
    return np.maximum.reduceat(np.maximum.reduceat(similarity, starts, axis=0), starts, axis=1)


def _name_classes(axis: Any, labels: tuple[str, ...]) -> None:
    from matplotlib.font_manager import findfont, get_font

    # A font of one's own would be another dependency: names that matplotlib's cannot write become numbers.
    writable = get_font(findfont(FONT)).get_charmap()
    places = range(len(labels)) if len(labels) <= NAMED else np.linspace(0, len(labels) - 1, 25).round().astype(int)
    names = []
    for place in places:
        text = inert(labels[place])
        text = text if all(ord(character) in writable for character in text) else f"class {place}"
        names.append(text if len(text) <= 18 else text[:17] + "…")
    size = 7 if len(places) <= 30 else 5
    axis.set_yticks(list(places), names, fontsize=size, parse_math=False)
    axis.set_xticks(list(places), names, fontsize=size, rotation=90, parse_math=False)
    axis.tick_params(length=0)
