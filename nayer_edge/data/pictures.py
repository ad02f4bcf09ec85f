"""Pictures in PNG, JPEG, WebP …: a folder of class folders, or Hugging Face style parquet with encoded bytes.

All headers are checked before the first picture is decoded, so one error reports every mismatch with its count. Then
pictures are decoded a batch at a time: memory holds one batch, and of parquet one page (1,024 rows as pyarrow writes
it), whatever the size of the set.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.stream import ImageStream, mismatch, resized
from nayer_edge.errors import UsageError, missing_extra

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
ROWS = 64
"""of a parquet file, in memory at once"""


class _Mismatches:
    """Pictures that do not match the model's input: each reason with its count and its first picture."""

    def __init__(self, spec: InputSpec, fit: Fit) -> None:
        self._spec = spec
        self._fit: Fit = fit
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def check(self, file: Any, where: str) -> None:
        """Reads the header of a picture."""
        from PIL import Image

        try:
            with Image.open(file) as picture:
                reason = mismatch(picture.size, picture.mode, self._spec, self._fit)
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


def _unreadable() -> tuple[type[Exception], ...]:
    from PIL import Image, UnidentifiedImageError

    # RuntimeError: Pillow's AVIF decoder.
    return UnidentifiedImageError, OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError


def decode(data: bytes, spec: InputSpec, where: str, fit: Fit = "stretch") -> np.ndarray:
    """Decodes a picture into uint8 of the model's shape, (C, H, W).

    Raises:
        UsageError: it cannot be decoded.
    """
    from PIL import Image

    _require_grey_or_colour(spec, where)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return resized(picture, spec, fit)
    except _unreadable() as error:
        raise UsageError(
            f"{where} is not a readable image.", why=f"{error}", fix="Replace or remove it, then repeat the command."
        ) from error


def _require_grey_or_colour(spec: InputSpec, where: object) -> None:
    if spec.channels not in (1, 3):
        raise UsageError(
            f"{where} holds encoded images, and the model expects {spec.channels} channels.",
            why="Encoded images are decoded to grey (1 channel) or RGB (3 channels).",
            fix="Store the images as an npz of the model's shape.",
        )


def open_folder(path: Path, spec: InputSpec, classes: Sequence[str], fit: Fit) -> ImageStream:
    """A folder with one folder of pictures per class, named after the class, as torchvision's ImageFolder reads it.

    Raises:
        UsageError: folders that are not classes, no pictures, or pictures that do not match the model's input.
    """
    entries = sorted(path.iterdir())
    folders = [entry for entry in entries if entry.is_dir()]
    unknown = [entry.name for entry in folders if entry.name not in classes]
    named = f"like the classes: {', '.join(list(classes)[:5])}, …"
    if not folders:
        raise UsageError(
            f"{path} is empty." if not entries else f"{path} has no class folders.",
            why="A hold-out of pictures is a folder with one folder of pictures per class.",
            fix=f"Name those {named}",
        )
    if unknown:
        raise UsageError(
            f"The class folders in {path} are not the teacher's classes.",
            why=f"Unknown: {', '.join(unknown[:5])}.",
            fix=f"Name them {named}",
        )
    numbers = {label: number for number, label in enumerate(classes)}
    files = [(file, numbers[entry.name]) for entry in folders for file in _pictures(entry)]
    if not files:
        raise UsageError(f"The class folders in {path} hold no images.", fix=f"Known: {', '.join(SUFFIXES)}.")
    _require_grey_or_colour(spec, path)
    mismatches = _Mismatches(spec, fit)
    for file, _ in files:
        mismatches.check(file, str(file.relative_to(path)))
    mismatches.raise_if_any(len(files), path)

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), size):
            yield np.stack([_decode_file(file, spec, fit) for file, _ in files[start : start + size]])

    return ImageStream(path.name, np.array([label for _, label in files], dtype=np.int64), batches)


def _pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders."""
    found = []
    for place, _, names in os.walk(folder):
        found += [Path(place) / name for name in names if Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)


def _decode_file(file: Path, spec: InputSpec, fit: Fit) -> np.ndarray:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} is not a readable image.", why=f"{error}", fix="Replace or remove it.") from error
    return decode(data, spec, str(file), fit)


def open_parquet(paths: Sequence[Path], name: str, spec: InputSpec, fit: Fit) -> ImageStream:
    """Parquet as Hugging Face writes it: a column of encoded images (bytes, or a struct with `bytes`) and one of class
    numbers. Several files are the parts of one set, in the given order.

    Raises:
        UsageError: not parquet, other columns, or pictures that do not match the model's input.
    """
    labels: list[int] = []
    mismatches = _Mismatches(spec, fit)
    for data, label, where in _rows(paths, ROWS):
        if not labels:
            _require_grey_or_colour(spec, paths[0])
        labels.append(label)
        mismatches.check(io.BytesIO(data), where)
    mismatches.raise_if_any(len(labels), name)

    def batches(size: int) -> Iterator[np.ndarray]:
        batch = []
        for data, _, where in _rows(paths, min(size, ROWS)):
            batch.append(decode(data, spec, where, fit))
            if len(batch) == size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    return ImageStream(name, np.array(labels, dtype=np.int64), batches)


def _rows(paths: Sequence[Path], rows: int) -> Iterator[tuple[bytes, int, str]]:
    """(encoded image, class number, place) of every row; reads pages, not whole row groups."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "cpu", "Reading parquet") from error
    for path in paths:
        try:
            with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
                columns = _columns(path, file.schema_arrow)
                number = 0
                for batch in file.iter_batches(rows, columns=list(columns), use_threads=False):
                    for image, label in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                        data = image.get("bytes") if isinstance(image, dict) else image
                        if not isinstance(data, bytes) or type(label) is not int:
                            raise _other_types(path, file.schema_arrow, columns)
                        yield data, label, f"{path.name}, row {number}"
                        number += 1
        except (ArrowException, OSError) as error:
            raise UsageError(
                f"{path} is not readable as parquet.", why=f"{error}", fix="Fetch or write the file again."
            ) from error


def _columns(path: Path, schema: Any) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise UsageError(
            f"{path} lacks a column of images or one of labels.",
            why=f"Its columns: {', '.join(schema.names)}.",
            fix="Name them image (with encoded bytes) and label.",
        )
    return image, label


def _other_types(path: Path, schema: Any, columns: tuple[str, str]) -> UsageError:
    types = ", ".join(f"column {name} is {schema.field(name).type}" for name in columns)
    return UsageError(
        f"{path} does not hold encoded images and class numbers.",
        why=f"{types[0].upper()}{types[1:]}.",
        fix="Images are the bytes of PNG, JPEG or WebP files; labels are numbers in the order of the class names.",
    )
