"""Synthetic images in rows, one per class: as a file, and as strips for a page."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nayer_edge.storage.files import write_bytes
from nayer_edge.text import inert

COLUMNS = 10
MAX_CLASSES = 20
"""rows; with more classes, evenly chosen ones"""
STRIP_HEIGHT = 48
"""pixels; larger images are made smaller, so that a page stays small"""
ROW_HEIGHT, ROW_WIDTH = 64, 2000
"""pixels of a row of the file: at most, for large images; about, for small ones, which are enlarged up to that"""
INK = "#525c6e"


class Strip(NamedTuple):
    """Images of one class side by side: its number, how many images, and the picture."""

    number: int
    images: int
    png: bytes


def class_strips(images: np.ndarray, labels: Sequence[int] | np.ndarray) -> list[Strip]:
    """A strip of up to ten images for each of up to twenty classes, in the images' own pixels.

    Args:
        images: (n, C, H, W), uint8.
        labels: the class that each was made for.
    """
    return [
        Strip(number, len(chosen), png_of(_strip(chosen, STRIP_HEIGHT))) for number, chosen in _rows(images, labels)
    ]


def write_grid(images: np.ndarray, labels: Sequence[int], classes: Sequence[str], path: Path) -> None:
    """Writes the same rows as one PNG, the class name before each. Equal images give equal bytes.

    Args:
        images: (n, C, H, W), uint8.
        labels: the class that each was made for.
        classes: the names of all classes.
    """
    rows = [
        (plain_name(classes[number], number), _strip(chosen, ROW_HEIGHT)) for number, chosen in _rows(images, labels)
    ]
    widest, gap = max(strip.width for _, strip in rows), 6
    scale = max(1, min(ROW_HEIGHT // rows[0][1].height, ROW_WIDTH // widest))
    height = scale * rows[0][1].height + gap
    font = ImageFont.load_default(13)
    left = round(max(font.getlength(name) for name, _ in rows)) + 3 * gap
    width = scale * widest
    grid = Image.new("RGB", (left + width + gap, len(rows) * height + gap), "white")
    draw = ImageDraw.Draw(grid)
    for row, (name, strip) in enumerate(rows):
        top = gap + row * height
        draw.text((left - gap, top + (height - gap) / 2), name, INK, font, anchor="rm")
        enlarged = strip.resize((scale * strip.width, scale * strip.height), Image.Resampling.NEAREST)
        grid.paste(enlarged.convert("RGB"), (left, top), enlarged.getchannel("A"))
    write_bytes(path, png_of(grid))


def png_of(picture: Image.Image) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def plain_name(label: str, number: int, longest: int = 18) -> str:
    """A class name as Pillow's built-in font can write it, cut to `longest` characters.

    The font has ASCII and some punctuation, but no accented letters: "Käfer" becomes "Kafer", and "猫" "class 7".
    """
    text = inert(label)
    if not _writable(text):
        text = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    return shortened(text, longest) if _writable(text) else f"class {number}"


def _writable(text: str) -> bool:
    """Whether the built-in font has a glyph for every character."""
    if text.isascii():
        return True
    font = ImageFont.load_default(32)

    def drawn(character: str) -> bytes:
        picture = Image.new("L", (64, 64))
        ImageDraw.Draw(picture).text((8, 8), character, fill=255, font=font)
        return picture.tobytes()

    nothing = (drawn("\uffff"), drawn(" "))
    return all(c.isascii() or drawn(c) not in nothing for c in text)


def shortened(text: str, longest: int) -> str:
    """The text, or its beginning and an ellipsis, in at most `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _rows(images: np.ndarray, labels: Sequence[int] | np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The classes that are shown and their first images: all classes that have images, or evenly chosen ones."""
    numbers = np.asarray(labels)
    present = np.unique(numbers).tolist()
    return [
        (number, images[numbers == number][:COLUMNS]) for number in present[:: max(1, -(-len(present) // MAX_CLASSES))]
    ]


def _strip(images: np.ndarray, highest: int) -> Image.Image:
    """Images (n, C, H, W) side by side, a clear gap between."""
    pictures = [_picture(image, highest) for image in images]
    first = pictures[0]
    gap = max(1, first.height // 16)
    strip = Image.new(first.mode, (len(pictures) * (first.width + gap) - gap, first.height))
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * (first.width + gap), 0))
    return strip


def _picture(image: np.ndarray, highest: int) -> Image.Image:
    """One image, (C, H, W), opaque, at most so high; without three or four channels the first, in grey."""
    coloured = len(image) in (3, 4)
    picture = Image.fromarray(image[:3].transpose(1, 2, 0) if coloured else image[0])
    picture = picture.convert("RGBA" if coloured else "LA")
    if picture.height > highest:
        width = max(1, round(picture.width * highest / picture.height))
        picture = picture.resize((width, highest), Image.Resampling.BOX)
    return picture
