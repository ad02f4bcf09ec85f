"""Pictures in PNG, JPEG, WebP …: which ones match the model's input, and how they are decoded.

All headers are checked before the first picture is decoded, so one error reports every mismatch with its count.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections import Counter
from typing import Any

import numpy as np

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.stream import mismatch, resized
from nayer_edge.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


ORIENTATION = 0x0112
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation → what Pillow must do to show the picture upright. From 5 on, width and height are exchanged."""


class Mismatches:
    """Pictures that do not match the model's input: each reason with its count and its first picture.

    Args:
        upright: as `decode` takes it.
    """

    def __init__(self, spec: InputSpec, fit: Fit, *, upright: bool = False) -> None:
        self._upright = upright
        self._spec = spec
        self._fit: Fit = fit
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def check(self, file: Any, where: str) -> None:
        """Reads the header of a picture."""
        from PIL import Image

        try:
            with Image.open(file) as picture:
                width, height = picture.size
                size = (height, width) if self._upright and _orientation(picture) >= 5 else (width, height)
                reason = mismatch(size, picture.mode, self._spec, self._fit)
        except _unreadable():
            reason = "not readable as an image"
        if reason:
            self._counts[reason] += 1
            self._first.setdefault(reason, where)

    def raise_if_any(self, images: int, source: object) -> None:
        """Raises a UsageError if anything was found.

        Args:
            images: how many were checked.
        """
        if not self._counts:
            return
        channels = {1: "grey", 3: "colour"}[self._spec.channels]
        sentences = [
            f"{count} × {reason}, first {self._first[reason]}." for reason, count in self._counts.most_common(5)
        ]
        if len(self._counts) > 5:
            sentences.append(f"And {len(self._counts) - 5} more reasons.")
        raise UsageError(
            f"{self._counts.total()} of the {images} images in {source} do not match the model's input: it expects "
            f"{channels} images of {self._spec.width}×{self._spec.height} pixels (width × height).",
            why="\n".join(sentences),
            fix="Replace or remove them, or have them resized: --fit center-crop, or --fit stretch.",
        )


def _orientation(picture: Any) -> int:
    """The EXIF orientation that a picture's header states; 1, upright, if it states none or its EXIF is damaged."""
    from PIL import Image

    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            # Pillow warns about damaged EXIF.
            warnings.simplefilter("ignore")
            # What stands before the pixels. `picture.getexif` may decode them to look behind.
            exif.load(picture.info.get("exif") or b"")
            found = exif.get(ORIENTATION, 1)
    except (*_unreadable(), struct.error, TypeError, LookupError, ArithmeticError):
        return 1
    return found if found in TURNS else 1


def _unreadable() -> tuple[type[Exception], ...]:
    from PIL import Image, UnidentifiedImageError

    # RuntimeError: Pillow's AVIF decoder.
    return UnidentifiedImageError, OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError


def decode(data: bytes, spec: InputSpec, where: str, fit: Fit = "stretch", *, upright: bool = False) -> np.ndarray:
    """Decodes a picture into uint8 of the model's shape, (C, H, W).

    Args:
        upright: turn it as its EXIF orientation says. Hugging Face's datasets do, torchvision's ImageFolder does not.

    Raises:
        UsageError: it cannot be decoded.
    """
    from PIL import Image

    require_grey_or_colour(spec, where)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            turn = TURNS.get(_orientation(picture)) if upright else None
            return resized(picture.transpose(Image.Transpose[turn]) if turn else picture, spec, fit)
    except _unreadable() as error:
        raise UsageError(
            f"{where} is not a readable image.", why=f"{error}", fix="Replace or remove it, then repeat the command."
        ) from error


def require_grey_or_colour(spec: InputSpec, where: object) -> None:
    """Raises UsageError if pictures cannot be decoded to the model's number of channels."""
    if spec.channels not in (1, 3):
        raise UsageError(
            f"{where} holds encoded images, and the model expects {spec.channels} channels.",
            why="Encoded images are decoded to grey (1 channel) or RGB (3 channels).",
            fix="Store the images as an npz of the model's shape.",
        )
