"""Labelled images as a stream of batches, and how a picture is resized to the model's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.left_out import LeftOut
from nayer_edge.labels.matching import MatchedBy

if TYPE_CHECKING:
    from PIL.Image import Image

CROP_SHARE = 0.875
"""fraction of each side that a centre crop keeps: 224 of 256, the usual evaluation of ImageNet classifiers"""

MAX_IMAGES = 10_000_000
"""files that claim more are not read"""

GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
"""Pillow's modes with eight bits per channel; there is no single way to convert the others (I, F, I;16 …) to bytes"""


@dataclass(frozen=True)
class ImageStream:
    """Labelled images that are read on demand, a batch at a time, any number of times.

    Attributes:
        name: what reports call them.
        labels: class numbers in the model's order, (N,), int64; known before any image is decoded.
        batches: batches(size) yields uint8 arrays (at most `size` images, C, H, W) in the order of the labels.
        names: the data set's own class names, if it has any. The labels are then numbers in their order, until
            `open_images` has put them into the model's.
        matched_by: how the labels were assigned to the model's classes; None until `open_images` has done so.
        split: which part of the data set this is, if it says so.
        left_out: files of the data set that are not read.
    """

    name: str
    labels: np.ndarray
    batches: Callable[[int], Iterator[np.ndarray]]
    names: tuple[str, ...] | None = None
    matched_by: MatchedBy | None = None
    split: str | None = None
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def mismatch(size: tuple[int, int], mode: str, spec: InputSpec, fit: Fit) -> str:
    """Why a picture cannot be used without resizing or converting it; the empty string where it can.

    Args:
        size: (width, height).
        mode: Pillow's mode.
    """
    if mode not in GREY_MODES + COLOUR_MODES:
        return f"pixels of type {mode} instead of 8 bits per channel"
    if fit == "exact" and spec.channels == 1 and mode not in GREY_MODES:
        return f"colour ({mode}) instead of grey"
    if fit == "exact" and size != (spec.width, spec.height):
        return f"{size[0]}×{size[1]} instead of {spec.width}×{spec.height} pixels (width × height)"
    return ""


def resized(picture: Image, spec: InputSpec, fit: Fit) -> np.ndarray:
    """A picture as uint8 in the model's shape (C, H, W), where C is 1 or 3. Resizing is bilinear with antialiasing."""
    from PIL import Image

    picture = picture.convert("L" if spec.channels == 1 else "RGB")
    if picture.size != (spec.width, spec.height):
        if fit == "center-crop":
            scale = max(spec.width / picture.width, spec.height / picture.height) / CROP_SHARE
            wide, high = (max(1, round(side * scale)) for side in picture.size)
            picture = picture.resize((wide, high), Image.Resampling.BILINEAR)
            left, top = round((wide - spec.width) / 2), round((high - spec.height) / 2)
            picture = picture.crop((left, top, left + spec.width, top + spec.height))
        else:
            picture = picture.resize((spec.width, spec.height), Image.Resampling.BILINEAR)
    pixels = np.array(picture, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()
