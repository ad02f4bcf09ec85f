"""How similar the labels of a classifier are to one another: figures for a table, and a map of every pair."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nayer_edge.errors import UsageError
from nayer_edge.labels import embeddings as lte
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.storage.files import write_bytes
from nayer_edge.text import inert

from ..image_grid import plain_name, png_of, shortened

FORMATS = (".png", ".svg")
NAMED = 60
"""classes up to which every row of the map has its name; with more, some of them"""
MAX_SIDE = 1280
"""cells of the map; with more classes, neighbouring ones share a cell, which shows their greatest similarity"""
LONGEST = 18
"""characters of a name"""
_FULL = np.array([43, 95, 199])
"""the colour of the closest pair; the least similar is white"""
_INK = "#1a2030"
_TEXT, _LINE, _GAP = 11, 16, 6
"""pixels: height of a letter, height of a line, and space around the map"""


def neighbours(embeddings: LabelEmbeddings) -> list[dict[str, Any]]:
    """Each label with the one most similar to it, in the order of the classes."""
    values, places = lte.nearest_labels(embeddings.embeddings)
    return [
        {"label": label, "nearest": embeddings.labels[place], "cosine": round(value, 4)}
        for label, value, place in zip(embeddings.labels, values.tolist(), places.tolist(), strict=True)
    ]


def summary(embeddings: LabelEmbeddings) -> dict[str, Any]:
    """What `lte show` prints."""
    near = neighbours(embeddings)
    return {
        "encoder": embeddings.encoder,
        "revision": embeddings.revision,
        "prompt": embeddings.prompt.split("\n"),
        "synonyms": embeddings.synonyms,
        "classes": len(embeddings.labels),
        "dimensions": embeddings.embeddings.shape[1],
        "mean_cosine": round(lte.mean_cosine(embeddings.embeddings), 4),
        "max_cosine": max(pair["cosine"] for pair in near),
        "digest": embeddings.digest,
        "labels": near,
    }


def spread(cosines: np.ndarray) -> tuple[float, float]:
    """The least and the greatest similarity of two different classes.

    Args:
        cosines: (K, K).
    """
    others = ~np.eye(len(cosines), dtype=bool)
    return float(cosines.min(where=others, initial=1)), float(cosines.max(where=others, initial=-1))


def shades(cosines: np.ndarray) -> np.ndarray:
    """How full the colour of each pair of classes is: 0 for the least similar and on the diagonal, 1 for the closest.

    Args:
        cosines: (K, K).
    """
    low, high = spread(cosines)
    shade = np.clip((cosines - low) / max(high - low, 1e-9), 0, 1)
    np.fill_diagonal(shade, 0)
    return shade


def heat_map(embeddings: LabelEmbeddings, path: Path) -> None:
    """Writes the cosine similarity of every pair of classes as a picture, PNG or SVG by the name of the file.

    Raises:
        UsageError: the name ends with something else.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"A picture cannot be written as '{path.name}'.", fix="Give --picture a name that ends with .png or .svg."
        )
    labels, count = embeddings.labels, len(embeddings.labels)
    cosines = lte.cosines(embeddings.embeddings).numpy()
    cells = 1 - _reduced(shades(cosines))[..., None]
    pixels = Image.fromarray((_FULL + (255 - _FULL) * cells).round().astype(np.uint8))
    side = 640 if count > NAMED else max(320, 20 * count)
    low, high = spread(cosines)
    title = [
        f"{inert(embeddings.encoder)}, {count} classes",
        f"cosine similarity: {low:.2f} (white) to {high:.2f} (blue), mean {lte.mean_cosine(embeddings.embeddings):.2f}",
    ]
    svg = path.suffix.lower() == ".svg"
    shown = range(count) if count <= NAMED else np.linspace(0, count - 1, 25).round().astype(int).tolist()
    names = [
        (shortened(inert(labels[n]), LONGEST) if svg else plain_name(labels[n], n, LONGEST), (n + 0.5) * side / count)
        for n in shown
    ]
    write_bytes(path, _svg(pixels, side, title, names) if svg else _png(pixels, side, title, names))


def _reduced(values: np.ndarray) -> np.ndarray:
    """At most MAX_SIDE cells a side; the greatest value stands for those that share a cell."""
    step = -(-len(values) // MAX_SIDE)
    if step == 1:
        return values
    starts = np.arange(0, len(values), step)
    return np.maximum.reduceat(np.maximum.reduceat(values, starts, axis=0), starts, axis=1)


def _edges(names: list[tuple[str, float]]) -> tuple[int, int]:
    """Left and upper edge of the map: the names stand before it (and, as long, below it), the title above it."""
    widest = max(sum(7 if letter.isascii() else _TEXT for letter in name) for name, _ in names)
    return widest + 2 * _GAP, 2 * _LINE + 2 * _GAP


def _png(pixels: Image.Image, side: int, title: list[str], names: list[tuple[str, float]]) -> bytes:
    """The map as a picture, twice as fine as the SVG."""
    fine = 2
    left, top, side, gap = *(fine * edge for edge in _edges(names)), fine * side, fine * _GAP
    font = ImageFont.load_default(fine * _TEXT)
    upright = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90)
    picture = Image.new("RGB", (left + side + gap, top + side + left), "white")
    picture.paste(pixels.resize((side, side), Image.Resampling.NEAREST), (left, top))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, left + side, top + side), outline=_INK)
    for row, text in enumerate(title):
        draw.text((gap, gap + fine * row * _LINE), text.encode("ascii", "replace").decode(), _INK, font)
    for name, place in names:
        draw.text((left - gap, top + fine * place), name, _INK, font, anchor="rm")
        draw.text((left + fine * (place - _TEXT / 2), top + side + gap), name, _INK, upright)
    return png_of(picture)


def _svg(pixels: Image.Image, side: int, title: list[str], names: list[tuple[str, float]]) -> bytes:
    """The map as SVG: an embedded PNG with one pixel for each cell, and the names as text."""
    left, top = _edges(names)
    box = f'x="{left}" y="{top}" width="{side}" height="{side}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + side + _GAP} {top + side + left}" '
        f'font-family="sans-serif" font-size="{_TEXT}" fill="{_INK}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<image {box} style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{base64.b64encode(png_of(pixels)).decode()}"/>',
        f'<rect {box} fill="none" stroke="{_INK}"/>',
        *(f'<text x="{_GAP}" y="{_LINE * (row + 1)}">{html.escape(text)}</text>' for row, text in enumerate(title)),
    ]
    for name, place in names:
        text = html.escape(name)
        # Four pixels: the middle of a letter above its base line.
        down, across = f"{top + place + 4:.1f}", f"{left + place + 4:.1f}"
        lines += [
            f'<text x="{left - _GAP}" y="{down}" text-anchor="end">{text}</text>',
            f'<text transform="translate({across} {top + side + _GAP}) rotate(-90)" text-anchor="end">{text}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""]).encode()
