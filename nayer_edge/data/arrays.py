"""Labelled images that a file stores as uint8 values, all of one size."""

from __future__ import annotations

import contextlib
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.stream import ImageStream, resized
from nayer_edge.errors import UsageError

Opener = Callable[[], contextlib.AbstractContextManager[IO[bytes]]]

UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""what reading a damaged file raises, inside a zip archive too (RuntimeError: it is encrypted)"""


@dataclass(frozen=True)
class StoredImages:
    """Labelled images of one size, before they are resized for a model.

    Attributes:
        name: what reports call them.
        source: the file or folder, for errors.
        labels: class numbers, (N,), int64.
        shape: of all images, (N, C, H, W).
        batches: batches(size) yields uint8 arrays (at most `size` images, C, H, W) in the order of the labels.
        names, split: see `ImageStream`.
    """

    name: str
    source: Path
    labels: np.ndarray
    shape: tuple[int, ...]
    batches: Callable[[int], Iterator[np.ndarray]]
    names: tuple[str, ...] | None = None
    split: str | None = None

    def stream(self, spec: InputSpec, fit: Fit) -> ImageStream:
        """Streams them in the model's shape.

        Raises:
            UsageError: images of this shape do not match the model's input, or there is not one label per image.
        """
        count, image = self.shape[0], self.shape[1:]
        if len(self.labels) != count:
            raise UsageError(
                f"{self.source} holds {count:,} images and {len(self.labels):,} labels.",
                fix="Write it again with one label per image.",
            )
        resizable = image[0] in (1, 3) and spec.channels in (1, 3) and 0 not in image
        if image != spec.shape and (fit == "exact" or not resizable):
            raise UsageError(
                f"{self.source} holds {count:,} images of shape {image}; the model expects {spec.shape} "
                "(channels, height, width).",
                fix="Store them in the model's shape, or resize them with --fit center-crop or --fit stretch "
                "(grey and colour images only).",
            )

        def batches(size: int) -> Iterator[np.ndarray]:
            for images in self.batches(size):
                yield images if image == spec.shape else _resized(images, spec, fit)

        return ImageStream(self.name, self.labels, batches, names=self.names, split=self.split)


def _resized(images: np.ndarray, spec: InputSpec, fit: Fit) -> np.ndarray:
    """Grey or colour images (n, C, H, W) in the model's shape."""
    from PIL import Image

    pictures = (Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)) for image in images)
    return np.stack([resized(picture, spec, fit) for picture in pictures])


def in_memory(images: np.ndarray, labels: np.ndarray, source: Path) -> StoredImages:
    """Images (N, C, H, W), uint8, that were read whole."""

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(images), size):
            yield np.ascontiguousarray(images[start : start + size])

    return StoredImages(source.name, source, labels.astype(np.int64), images.shape, batches)


def in_records(
    files: Sequence[tuple[Opener, int]],
    labels: np.ndarray,
    name: str,
    source: Path,
    *,
    shape: tuple[int, ...],
    axes: tuple[int, int, int] | None,
    lead: int = 0,
) -> StoredImages:
    """Images stored one after the other, as records of one size; streamed.

    Args:
        files: each opens one stream at its first record, with the number of records in it.
        shape: of one image as stored.
        axes: transposition of a stored image to channels, rows, columns; None where it is grey (rows, columns).
        lead: bytes before each image, such as labels.
    """
    record = lead + math.prod(shape)

    def batches(size: int) -> Iterator[np.ndarray]:
        try:
            for opened, count in files:
                with opened() as stream:
                    for start in range(0, count, size):
                        rows = min(size, count - start)
                        data = stream.read(rows * record)
                        if len(data) < rows * record:
                            raise EOFError("it ends before its last image")
                        pixels = np.frombuffer(data, np.uint8).reshape(rows, record)[:, lead:]
                        images = pixels.reshape(rows, *shape)
                        order = None if axes is None else (0, *(1 + axis for axis in axes))
                        yield np.ascontiguousarray(images[:, None] if order is None else images.transpose(order))
        except UNREADABLE as error:
            raise UsageError(f"{source} is damaged.", why=f"{error}", fix="Fetch or write the file again.") from error

    image = (1, *shape) if axes is None else tuple(shape[axis] for axis in axes)
    count = sum(records for _, records in files)
    return StoredImages(name, source, labels.astype(np.int64), (count, *image), batches)
