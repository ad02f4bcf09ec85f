"""Pictures of synthetic images, one row per class: as one file, and as strips for a page."""

from __future__ import annotations

import io
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nayer_edge.errors import missing_extra
from nayer_edge.storage.files import write_atomic
from nayer_edge.text import inert

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = 10
FONT = "DejaVu Sans"
"""matplotlib's own"""
MAX_CLASSES = 20
"""rows; with more classes, evenly chosen ones"""
STRIP_HEIGHT = 48
"""pixels; larger images are made smaller, so that a page stays small"""


@dataclass(frozen=True)
class Strip:
    """Images of one class, side by side.

    Attributes:
        number: the class.
        images: how many.
        png: the picture.
    """

    number: int
    images: int
    png: bytes


def per_class_picture(images: np.ndarray, labels: Sequence[int], classes: Sequence[str], path: Path) -> None:
    """Writes a PNG with up to ten images of each of up to twenty classes, the class name beside each row.

    Args:
        images: (n, C, H, W), uint8.
        labels: the class that each was made for.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import findfont, get_font
    except ImportError as error:
        raise missing_extra("matplotlib", "cpu", "Drawing pictures") from error
    numbers = np.asarray(labels)
    rows = _rows(numbers)
    # A font of one's own would be another dependency: names that matplotlib's cannot write become numbers.
    writable = get_font(findfont(FONT)).get_charmap()
    figure = Figure(figsize=(8, 0.62 * len(rows) + 0.3), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for row, number in enumerate(rows):
        mine = images[numbers == number][:COLUMNS]
        for column, axis in enumerate(axes[row]):
            axis.set_axis_off()
            if column < len(mine):
                pixels = mine[column].transpose(1, 2, 0)
                grey = pixels.shape[2] not in (3, 4)
                axis.imshow(
                    pixels[:, :, 0] if grey else pixels[:, :, :3],
                    cmap="gray" if grey else None,
                    vmin=0,
                    vmax=255,
                    interpolation="nearest",
                )
            if column == 0:
                # parse_math off: a class name is text, whatever dollars it holds.
                axis.text(
                    -0.15,
                    0.5,
                    _row_name(classes[number], number, writable),
                    transform=axis.transAxes,
                    ha="right",
                    va="center",
                    fontsize=8,
                    color="#555555",
                    family=FONT,
                    parse_math=False,
                )
    figure.subplots_adjust(left=0.16, right=0.99, top=0.98, bottom=0.02, wspace=0.05, hspace=0.08)
    # No creation date or version in the file: equal pictures are equal bytes.
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def class_strips(images: np.ndarray, labels: Sequence[int] | np.ndarray) -> list[Strip]:
    """A strip of up to ten images for each of up to twenty classes, in the images' own pixels, a clear gap between.

    Args:
        images: (n, C, H, W), uint8.
        labels: the class that each was made for.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "cpu", "Drawing pictures") from error
    numbers = np.asarray(labels)
    strips = []
    for number in _rows(numbers):
        mine = images[numbers == number][:COLUMNS]
        pictures = [_picture(image) for image in mine]
        gap = max(1, pictures[0].height // 16)
        strip = Image.new(pictures[0].mode, (len(mine) * (pictures[0].width + gap) - gap, pictures[0].height))
        for place, picture in enumerate(pictures):
            strip.paste(picture, (place * (picture.width + gap), 0))
        buffer = io.BytesIO()
        strip.save(buffer, format="png", optimize=True)
        strips.append(Strip(number, len(mine), buffer.getvalue()))
    return strips


def _picture(image: np.ndarray) -> Image.Image:
    """One image, (C, H, W), opaque, at most so high; without three or four channels the first, in grey."""
    from PIL import Image

    coloured = len(image) in (3, 4)
    picture = Image.fromarray(image[:3].transpose(1, 2, 0) if coloured else image[0])
    picture = picture.convert("RGBA" if coloured else "LA")
    if picture.height > STRIP_HEIGHT:
        width = max(1, round(picture.width * STRIP_HEIGHT / picture.height))
        picture = picture.resize((width, STRIP_HEIGHT), Image.Resampling.BOX)
    return picture


def _rows(numbers: np.ndarray) -> list[int]:
    """The classes that are shown: all that have images, or evenly chosen ones."""
    present = np.unique(numbers).tolist()
    return present[:: max(1, -(-len(present) // MAX_CLASSES))]


def _row_name(label: str, number: int, writable: Container[int]) -> str:
    text = inert(label)
    if not all(ord(character) in writable for character in text):
        return f"class {number}"
    return text if len(text) <= 16 else text[:15] + "…"
