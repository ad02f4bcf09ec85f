"""Labelled images in an .npz, streamed: memory holds one batch, whatever the file's size, compressed or not."""

from __future__ import annotations

import contextlib
import math
import tokenize
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from nayer_edge.config import InputSpec
from nayer_edge.data.arrays import UNREADABLE, StoredImages, in_records
from nayer_edge.data.stream import MAX_IMAGES
from nayer_edge.errors import UsageError


@dataclass(frozen=True)
class _Header:
    """Type and shape of an array; `fortran` means that its first index varies fastest."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def open_npz(path: Path, spec: InputSpec) -> StoredImages:
    """An .npz with `images` (N, H, W[, C]) or (N, C, H, W), uint8, and `labels` (N,), integers.

    Args:
        spec: its channels tell which axis of an image is which.

    Raises:
        UsageError: it is not such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            stream, images = _open_member(archive, "images")
            stream.close()
            stream, numbers = _open_member(archive, "labels")
            with stream:
                if math.prod(numbers.shape) > MAX_IMAGES:
                    raise ValueError(f"it claims more than {MAX_IMAGES:,} labels")
                integers = np.issubdtype(numbers.dtype, np.integer)
                labels = np.frombuffer(stream.read(), numbers.dtype) if integers else None
    except UNREADABLE as error:
        raise UsageError(
            f"{path} is not readable as labelled images.",
            why=f"{error}",
            fix="Save it with numpy.savez(path, images=…, labels=…), images as uint8.",
        ) from error
    if images.dtype != np.uint8 or len(images.shape) not in (3, 4) or len(numbers.shape) != 1:
        raise UsageError(
            f"{path} holds images of shape {images.shape[1:]} and type {images.dtype}, labels of shape "
            f"{numbers.shape}; the model expects {spec.shape} and uint8.",
            fix="Store images as (N, H, W, C) or (N, C, H, W) of values 0 … 255 as uint8, and labels as (N,).",
        )
    if labels is None:
        raise UsageError(
            f"The labels in {path} are of type {numbers.dtype}.",
            fix="Labels are integers from 0 in the order of the class names.",
        )
    if images.fortran:
        raise UsageError(
            f"The images in {path} are stored in Fortran order, so they cannot be read one after the other.",
            fix="Save them with numpy.savez(path, images=numpy.ascontiguousarray(images), labels=labels).",
        )
    shape = images.shape[1:]
    channels_last = (
        len(shape) == 3 and shape[0] != spec.channels and (shape[2] == spec.channels or shape[0] not in (1, 3))
    )
    axes = None if len(shape) == 2 else (2, 0, 1) if channels_last else (0, 1, 2)

    @contextlib.contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(path) as archive:
            stream, _ = _open_member(archive, "images")
            with stream:
                yield stream

    return in_records([(opened, images.shape[0])], labels, path.name, path, shape=shape, axes=axes)


def _open_member(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], _Header]:
    """Opens the array `name` of an .npz at its first byte.

    Raises:
        One of `UNREADABLE`: it is not there, is damaged, or its size is not what its header says.
    """
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError as error:
        raise ValueError(f"there is no array '{name}'") from error
    stream = archive.open(entry)
    try:
        # Headers of version 1 are at most 64 KiB long; numpy writes others only for structured types.
        if npy.read_magic(stream) != (1, 0):
            raise ValueError(f"array '{name}' does not hold plain numbers")
        header = _read_header(stream, name)
        size = math.prod(header.shape) * header.dtype.itemsize
        if any(side < 0 for side in header.shape) or stream.tell() + size != entry.file_size:
            raise ValueError(f"array '{name}' is {entry.file_size} bytes long, and its header says otherwise")
    except BaseException:
        stream.close()
        raise
    return stream, header


def _read_header(stream: IO[bytes], name: str) -> _Header:
    # Beside ValueError, what Python's parser and numpy raise on hostile headers.
    with contextlib.suppress(SyntaxError, tokenize.TokenError, TypeError, LookupError, MemoryError):
        return _Header(*npy.read_array_header_1_0(stream))
    # Not as that error's consequence: the parser's MemoryError is no lack of memory.
    raise ValueError(f"array '{name}' has a damaged header")
