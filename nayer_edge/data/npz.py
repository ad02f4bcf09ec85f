"""Labelled images in an .npz, streamed: memory holds one batch, whatever the file's size, compressed or not."""

from __future__ import annotations

import contextlib
import math
import re
import tokenize
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from nayer_edge.config import InputSpec
from nayer_edge.data.arrays import UNREADABLE, StoredImages, in_records
from nayer_edge.data.splits import KEYWORDS, NO_SPLIT, Purpose, canonical, choose
from nayer_edge.data.stream import MAX_IMAGES
from nayer_edge.errors import UsageError

ROLES = {
    "images": ("images", "image", "imgs", "img", "x", "data", "arr_0"),
    "labels": ("labels", "label", "y", "targets", "target", "arr_1"),
    "names": ("class_names", "label_names", "target_names", "class_labels", "categories", "classes", "names"),
}
"""what an array holds → its names, with or without a split before or behind them: x_test, train_labels"""
MAX_LABEL_BYTES = 2**30
SHOW = "Save it with numpy.savez(path, images=…, labels=…), images as uint8."


@dataclass(frozen=True)
class _Header:
    """Type and shape of an array; `fortran` means that its first index varies fastest."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def open_npz(
    path: Path, spec: InputSpec, classes: Sequence[str], purpose: Purpose = "holdout", asked: str | None = None
) -> StoredImages:
    """An .npz with images (N, H, W[, C]) or (N, C, H, W), uint8, and labels.

    The arrays are called `images` and `labels`, or as in `ROLES`, with a split if there are several (x_test, y_test).
    Labels are numbers (N,) or (N, 1), one-hot rows (N, classes), or class names.

    Args:
        spec: its channels tell which axis of an image is which.
        classes: the model's class names.
        purpose, asked: see `splits.choose`.

    Raises:
        UsageError: it is not such a file, or has several splits and none was chosen.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = _arrays(archive)
            split = choose(arrays.keys() or {NO_SPLIT}, purpose, asked, path)
            member = arrays.get(split, {})
            name = _member(archive, member, "images")
            stream, images = _open_member(archive, name)
            stream.close()
            labels = _read_small(archive, _member(archive, member, "labels"))
            own = member.get("names") or arrays.get(NO_SPLIT, {}).get("names")
            names = _texts(_read_small(archive, own)) if own else None
        numbers, names = _numbers(labels, names, len(classes), path)
    except UNREADABLE as error:
        raise UsageError(f"{path} is not readable as labelled images.", why=f"{error}", fix=SHOW) from error
    if images.dtype != np.uint8 or len(images.shape) not in (3, 4):
        raise UsageError(
            f"{path} holds images of shape {images.shape[1:]} and type {images.dtype}; the model expects "
            f"{spec.shape} and uint8.",
            fix="Store images as (N, H, W, C) or (N, C, H, W) of values 0 … 255 as uint8.",
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
            stream, _ = _open_member(archive, name)
            with stream:
                yield stream

    found = in_records([(opened, images.shape[0])], numbers, path.name, path, shape=shape, axes=axes)
    return replace(found, names=names, split=split or None)


def _arrays(archive: zipfile.ZipFile) -> dict[str, dict[str, str]]:
    """Split → role → name, of the arrays that hold images, labels or class names.

    Raises:
        ValueError: two arrays have the same role in the same split.
    """
    found: dict[str, dict[str, str]] = {}
    for entry in archive.namelist():
        name = entry.removesuffix(".npy")
        words = re.split(r"[_\W]+", name.lower())
        splits = {canonical(word) for word in words} & KEYWORDS.keys()
        rest = "_".join(word for word in words if canonical(word) not in KEYWORDS)
        role = next((role for role, known in ROLES.items() if rest in known), None)
        if not entry.endswith(".npy") or role is None or len(splits) > 1:
            continue
        of_split = found.setdefault(next(iter(splits), NO_SPLIT), {})
        if role in of_split:
            raise ValueError(f"the arrays '{of_split[role]}' and '{name}' could both be the {role}")
        of_split[role] = name
    if len(found) > 1 and found.get(NO_SPLIT, {}).keys() == {"names"}:
        return {split: {**found[NO_SPLIT], **held} for split, held in found.items() if split != NO_SPLIT}
    return found


def _member(archive: zipfile.ZipFile, member: Mapping[str, str], role: str) -> str:
    if role not in member:
        held = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:8]) or "nothing"
        raise ValueError(f"there is no array '{role}' among {held}")
    return member[role]


def _read_small(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of labels or names, read whole.

    Raises:
        One of `UNREADABLE`: it is damaged, too large, or of Python objects.
    """
    stream, header = _open_member(archive, name)
    with stream:
        rows = header.shape[0] if header.shape else 1
        if rows > MAX_IMAGES or math.prod(header.shape) * header.dtype.itemsize > MAX_LABEL_BYTES:
            raise ValueError(f"it claims more than {MAX_IMAGES:,} labels, or very long ones")
        if header.dtype.kind not in "iufbUS":
            raise ValueError(f"its {name} are of type {header.dtype}")
        values = np.frombuffer(stream.read(), header.dtype)
        return values.reshape(header.shape, order="F" if header.fortran else "C")


def _texts(values: np.ndarray) -> tuple[str, ...]:
    if values.ndim != 1 or values.dtype.kind not in "US":
        raise ValueError("its class names are not a list of texts")
    return tuple(value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist())


def _numbers(
    labels: np.ndarray, names: tuple[str, ...] | None, classes: int, path: Path
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels as class numbers (N,), and their names if the file has any.

    Raises:
        UsageError: they are neither numbers, one-hot rows, nor names.
    """
    shape = labels.shape
    if labels.ndim == 2 and 1 in shape:
        labels = labels.reshape(-1)
    if labels.ndim == 1 and labels.dtype.kind in "US":
        texts = _texts(labels)
        if names and all(text.isdecimal() for text in texts):
            # Numbers that were saved as text: the names beside them are the classes'.
            return np.array([int(text) for text in texts], dtype=np.int64), names
        own = tuple(sorted(set(texts)))
        number_of = {name: number for number, name in enumerate(own)}
        return np.array([number_of[text] for text in texts], dtype=np.int64), own
    if labels.ndim == 2 and labels.dtype.kind in "iufb":
        width = len(names) if names else classes
        if shape[1] != width:
            raise UsageError(
                f"{path} holds labels of shape {shape}, which are not one-hot rows of the {width} classes.",
                fix="Store labels as (N,), one class number for each image.",
            )
        rows = ((labels == 0) | (labels == 1)).all(axis=1) & (labels.sum(axis=1) == 1)
        if not rows.all():
            raise UsageError(
                f"{path} holds labels of shape {shape}, and {int((~rows).sum())} of {len(rows)} rows are not one-hot.",
                why=f"The first is row {int(np.argmin(rows))}. Soft labels and images of several classes "
                "do not give one true class.",
                fix="Store labels as (N,), one class number for each image.",
            )
        return labels.argmax(axis=1), names
    if labels.ndim != 1:
        raise UsageError(
            f"{path} holds labels of shape {shape}; the model expects one class number for each image.",
            fix="Store labels as (N,), (N, 1) or one-hot rows.",
        )
    if labels.dtype.kind == "f" and not (np.isfinite(labels).all() and (labels == np.round(labels)).all()):
        raise UsageError(
            f"The labels in {path} are of type {labels.dtype}, not integers.",
            fix="Labels are integers from 0 in the order of the class names.",
        )
    if len(labels) and np.abs(labels.astype(np.float64)).max() >= 2**53:
        raise UsageError(f"The labels in {path} are not valid class numbers.", fix="Number the classes from 0.")
    return labels.astype(np.int64), names


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
        if header.dtype.hasobject:
            raise ValueError(
                f"array '{name}' holds Python objects, which are never read; save plain values, "
                f"for example {name}=numpy.array({name}.tolist())"
            )
        size = math.prod(header.shape) * header.dtype.itemsize
        if any(side < 0 for side in header.shape) or stream.tell() + size != entry.file_size:
            raise ValueError(f"array '{name}' is {entry.file_size} bytes long, and its header says otherwise")
    except BaseException:
        stream.close()
        raise
    return stream, header


def _read_header(stream: IO[bytes], name: str) -> _Header:
    # Besides ValueError, what Python's parser and numpy raise on hostile headers.
    with contextlib.suppress(SyntaxError, tokenize.TokenError, TypeError, LookupError, MemoryError):
        return _Header(*npy.read_array_header_1_0(stream))
    # Raised without that error as its cause: a MemoryError from the parser does not mean that memory ran out.
    raise ValueError(f"array '{name}' has a damaged header")
