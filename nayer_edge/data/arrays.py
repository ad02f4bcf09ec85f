"""Labelled images that are stored as plain arrays: npz, and the formats that torchvision's data sets come in.

    npz             `images` (N, H, W[, C]) or (N, C, H, W) uint8 and `labels` (N)
    MNIST idx       t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, with or without .gz (also FashionMNIST, KMNIST)
    CIFAR binary    cifar-10-batches-bin/, cifar-100-binary/: one or two label bytes and 3,072 pixels per image
    STL-10 binary   stl10_binary/: test_X.bin and test_y.bin, columns before rows, labels from 1
    SVHN            test_32x32.mat: X (32, 32, 3, N), y with 10 for the digit 0; read as a whole (80 MB)

All but the last are sequences of records of one size, read front to back: memory holds one batch, compressed or not.
torchvision's CIFAR in Python form is pickled, and nothing is unpickled here: a message says what to take.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.npy import DAMAGED, open_member
from nayer_edge.data.stream import MAX_IMAGES, ImageStream, fitted
from nayer_edge.errors import UsageError, missing_extra

Split = Literal["train", "holdout"]
Opener = Callable[[], contextlib.AbstractContextManager[IO[bytes]]]

IDX_PREFIX: dict[Split, str] = {"holdout": "t10k", "train": "train"}
CIFAR_FILES: dict[str, dict[Split, tuple[str, ...]]] = {
    "cifar-10-batches-bin": {
        "holdout": ("test_batch.bin",),
        "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    },
    "cifar-100-binary": {"holdout": ("test.bin",), "train": ("train.bin",)},
}
CIFAR_LABEL_BYTES = {"cifar-10-batches-bin": 1, "cifar-100-binary": 2}
PICKLED = ("cifar-10-batches-py", "cifar-100-python")
MAX_MAT_BYTES = 2 * 2**30


@dataclass(frozen=True)
class _Records:
    """Images as records of one size.

    Attributes:
        files: each opens one stream at its first record, with the number of records in it.
        lead: bytes before each image (labels).
        shape: of one image as stored.
        axes: transposition of a stored image to channels, rows, columns; a grey image is stored as rows, columns.
        source: the file or folder, for errors.
    """

    files: tuple[tuple[Opener, int], ...]
    lead: int
    shape: tuple[int, ...]
    axes: tuple[int, int, int] | None
    source: Path

    def stream(self, labels: np.ndarray, name: str, spec: InputSpec, fit: Fit) -> ImageStream:
        """Checks shape and count against the model and the labels."""
        plain = (1, *self.shape) if self.axes is None else tuple(self.shape[axis] for axis in self.axes)
        count = sum(records for _, records in self.files)
        if len(labels) != count:
            raise UsageError(
                f"{self.source} holds {count:,} images and {len(labels):,} labels.",
                fix="Write it again with one label per image.",
            )
        require_shape(plain, count, self.source, spec, fit)

        def batches(size: int) -> Iterator[np.ndarray]:
            for images in self._read(size):
                yield images if images.shape[1:] == spec.shape else as_fitted(images, spec, fit)

        return ImageStream(name, labels, batches)

    def _read(self, size: int) -> Iterator[np.ndarray]:
        record = self.lead + math.prod(self.shape)
        try:
            for opened, count in self.files:
                with opened() as stream:
                    for start in range(0, count, size):
                        rows = min(size, count - start)
                        data = _exactly(stream, rows * record)
                        pixels = np.frombuffer(data, np.uint8).reshape(rows, record)[:, self.lead :]
                        images = pixels.reshape(rows, *self.shape)
                        axes = (0, *(1 + axis for axis in self.axes)) if self.axes else None
                        yield np.ascontiguousarray(images[:, None] if axes is None else images.transpose(axes))
        except DAMAGED as error:
            raise UsageError(
                f"{self.source} is damaged.", why=f"{error}", fix="Fetch or write the file again."
            ) from error


def require_shape(shape: tuple[int, ...], count: int, source: object, spec: InputSpec, fit: Fit) -> None:
    """Raises a UsageError where images of this shape (C, H, W) cannot be measured, with how many they are."""
    if shape == spec.shape or (fit != "exact" and shape[0] in (1, 3) and spec.channels in (1, 3) and 0 not in shape):
        return
    raise UsageError(
        f"{source} holds {count:,} images of shape {shape}; the model eats {spec.shape} (channels, height, width).",
        fix="Store them in the model's shape, or have them resized with --fit center-crop or --fit stretch "
        "(grey and colour images only).",
    )


def as_fitted(images: np.ndarray, spec: InputSpec, fit: Fit) -> np.ndarray:
    """Grey or colour images (n, C, H, W) of any size as the model eats them."""
    from PIL import Image

    pictures = (Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)) for image in images)
    return np.stack([fitted(picture, spec, fit) for picture in pictures])


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("it ends before its last image")
    return data


# ------------------------------------------------------------------ npz


def open_npz(path: Path, spec: InputSpec, fit: Fit) -> ImageStream:
    """An .npz with `images` and `labels`.

    Raises:
        UsageError: it is no such file, or does not fit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            stream, labels_header = open_member(archive, "labels")
            with stream:
                if labels_header.item_bytes * MAX_IMAGES < labels_header.data_bytes:
                    raise ValueError(f"it claims more than {MAX_IMAGES:,} labels")
                labels = np.frombuffer(stream.read(), labels_header.dtype)
            stream, header = open_member(archive, "images")
            stream.close()
    except DAMAGED as error:
        raise UsageError(
            f"{path} is not readable as labelled images.",
            why=f"{error}",
            fix="Save it with numpy.savez(path, images=…, labels=…), images as uint8.",
        ) from error
    if header.dtype != "|u1" or len(header.shape) not in (3, 4) or len(labels_header.shape) != 1:
        raise UsageError(
            f"{path} holds images of shape {header.shape[1:]} and type {np.dtype(header.dtype)}, labels of shape "
            f"{labels_header.shape}; the model eats {spec.shape} and uint8.",
            fix="Store images as (N, H, W, C) or (N, C, H, W) of values 0 … 255 as uint8, and labels as (N,).",
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"The labels in {path} are of type {labels.dtype}.",
            fix="Labels are integers from 0 in the order of the class names.",
        )
    if header.fortran:
        raise UsageError(
            f"The images in {path} are stored with the last image first in memory (Fortran order).",
            fix="Save them with numpy.savez(path, images=numpy.ascontiguousarray(images), labels=labels).",
        )
    shape = header.shape[1:]
    last = len(shape) == 3 and shape[0] != spec.channels and (shape[2] == spec.channels or shape[0] not in (1, 3))
    axes = None if len(shape) == 2 else (2, 0, 1) if last else (0, 1, 2)

    @contextlib.contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(path) as archive:
            stream, _ = open_member(archive, "images")
            with stream:
                yield stream

    records = _Records(((opened, header.shape[0]),), 0, shape, axes, path)
    return records.stream(labels.astype(np.int64), path.name, spec, fit)


# ------------------------------------------------------------------ what torchvision downloads


def open_torchvision(path: Path, split: Split, spec: InputSpec, fit: Fit) -> ImageStream | None:
    """One of torchvision's own formats, at its folder, at its parent (torchvision's `root`) or at its file of images;
    None where there is none.

    Raises:
        UsageError: it is one, and pickled, damaged, or does not fit.
    """
    if path.is_dir():
        folders = (path, *sorted(entry for entry in path.iterdir() if entry.is_dir()))
        # A set may be seen from its folder and from the one above.
        found = dict(known for folder in folders if (known := _known(folder, split, spec, fit)) is not None)
        if len(found) > 1:
            raise UsageError(
                f"{path} holds {len(found)} data sets.", fix="Name the folder of one of them, for example MNIST/raw."
            )
        if not found:
            _refuse_pickled(path)
        return next(iter(found.values()))() if found else None
    if "-images-idx3-ubyte" in path.name:
        return _idx(path, spec, fit)
    if path.name.endswith("_32x32.mat"):
        return _svhn(path, spec, fit)
    _refuse_pickled(path)
    return None


def _known(folder: Path, split: Split, spec: InputSpec, fit: Fit) -> tuple[Path, Callable[[], ImageStream]] | None:
    """Where the data set of this folder lies and how to open it; None where there is none."""
    part = "train" if split == "train" else "test"
    if folder.name in CIFAR_FILES and (folder / CIFAR_FILES[folder.name][split][0]).is_file():
        return folder, lambda: _cifar(folder, split, spec, fit)
    if (folder / f"{part}_X.bin").is_file():
        return folder, lambda: _stl10(folder, part, spec, fit)
    if (mat := folder / f"{part}_32x32.mat").is_file():
        return mat, lambda: _svhn(mat, spec, fit)
    for raw in (folder, folder / "raw"):
        for ending in ("", ".gz"):
            if (images := raw / f"{IDX_PREFIX[split]}-images-idx3-ubyte{ending}").is_file():
                return images, lambda: _idx(images, spec, fit)
    return None


def _refuse_pickled(path: Path) -> None:
    """torchvision's CIFAR10 and CIFAR100 are pickles, which can run code when they are read."""
    folder = path if path.is_dir() else path.parent
    pickled = [name for name in PICKLED if folder.name == name or (folder / name).is_dir()]
    if pickled:
        binary = "cifar-10-binary.tar.gz" if pickled[0] == PICKLED[0] else "cifar-100-binary.tar.gz"
        raise UsageError(
            f"{path} is CIFAR in its Python form, which is pickled, and nayer-edge never unpickles.",
            why="Reading a pickle can run any code that is in it.",
            fix=f"Take the binary version from the data set's page ({binary}), or a parquet file of the same images.",
        )


def _file_opener(path: Path, start: int = 0) -> Opener:
    @contextlib.contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            stream.read(start)
            yield stream  # pyright: ignore[reportReturnType]

    return opened


def _idx(images: Path, spec: InputSpec, fit: Fit) -> ImageStream:
    """Two files: a magic word that says type and dimensions, the sizes as big-endian int32, the bytes."""
    labels = images.with_name(images.name.replace("-images-idx3-", "-labels-idx1-"))
    sizes = _idx_sizes(images, 3)
    with _damage_named(labels), _file_opener(labels)() as stream:
        (count,) = _idx_header(stream, 1)
        numbers = np.frombuffer(_exactly(stream, count), np.uint8).astype(np.int64)
    records = _Records(((_file_opener(images, 16), sizes[0]),), 0, sizes[1:], None, images)
    return records.stream(numbers, images.name.removesuffix(".gz"), spec, fit)


def _idx_sizes(path: Path, dimensions: int) -> tuple[int, ...]:
    with _damage_named(path), _file_opener(path)() as stream:
        return _idx_header(stream, dimensions)


def _idx_header(stream: IO[bytes], dimensions: int) -> tuple[int, ...]:
    if _exactly(stream, 4) != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"it is no idx file of bytes in {dimensions} dimensions")
    sizes = tuple(int.from_bytes(_exactly(stream, 4), "big") for _ in range(dimensions))
    if sizes[0] > MAX_IMAGES:
        raise ValueError(f"it claims {sizes[0]:,} images")
    return sizes


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise UsageError(f"{path} is not readable.", why=f"{error}", fix="Fetch the file again.") from error


def _raw_count(path: Path, record: int) -> int:
    with _damage_named(path):
        size = path.stat().st_size
        if size == 0 or size % record:
            raise ValueError(f"{size:,} bytes are no whole number of records of {record:,}")
        return size // record


def _cifar(folder: Path, split: Split, spec: InputSpec, fit: Fit) -> ImageStream:
    lead = CIFAR_LABEL_BYTES[folder.name]
    paths = [folder / name for name in CIFAR_FILES[folder.name][split]]
    files, labels = [], []
    for path in paths:
        count = _raw_count(path, lead + 3072)
        files.append((_file_opener(path), count))
        # CIFAR-100 gives the coarse class first, then the fine one.
        column = np.memmap(path, np.uint8, mode="r").reshape(count, lead + 3072)[:, lead - 1]
        labels.append(column.astype(np.int64))
    records = _Records(tuple(files), lead, (3, 32, 32), (0, 1, 2), folder)
    return records.stream(np.concatenate(labels), f"{folder.name} ({split})", spec, fit)


def _stl10(folder: Path, part: str, spec: InputSpec, fit: Fit) -> ImageStream:
    images, labels = folder / f"{part}_X.bin", folder / f"{part}_y.bin"
    count = _raw_count(images, 3 * 96 * 96)
    with _damage_named(labels):
        numbers = np.fromfile(labels, np.uint8).astype(np.int64) - 1
    records = _Records(((_file_opener(images), count),), 0, (3, 96, 96), (0, 2, 1), folder)
    return records.stream(numbers, f"stl10 ({part})", spec, fit)


def _svhn(path: Path, spec: InputSpec, fit: Fit) -> ImageStream:
    try:
        from scipy.io import loadmat, whosmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise missing_extra("scipy", "cpu", "Reading SVHN's .mat files") from error
    try:
        shapes: dict[str, tuple[int, ...]] = {name: shape for name, shape, _ in whosmat(path)}
        if math.prod(shapes["X"]) > MAX_MAT_BYTES:
            raise ValueError(f"X claims the shape {shapes['X']}")
        held: dict[str, Any] = loadmat(path, variable_names=["X", "y"])
        pixels, numbers = held["X"], held["y"].ravel()
        whole = np.issubdtype(numbers.dtype, np.integer)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != len(numbers) or not whole:
            raise ValueError(
                f"X is {pixels.dtype} of shape {pixels.shape}, y has {len(numbers)} labels of type {numbers.dtype}"
            )
        # MATLAB counts from 1, and SVHN writes the digit 0 as 10.
        labels = np.where(numbers == 10, 0, numbers).astype(np.int64)
    # scipy raises what it meets on damaged files, KeyError and TypeError included.
    except (*DAMAGED, MatReadError, KeyError, TypeError, IndexError, MemoryError) as error:
        raise UsageError(
            f"{path} is not readable as SVHN's format 2.", why=f"{error}", fix="Fetch the file again."
        ) from error
    images = pixels.transpose(3, 2, 0, 1)
    require_shape(images.shape[1:], len(images), path, spec, fit)

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(images), size):
            part = np.ascontiguousarray(images[start : start + size])
            yield part if part.shape[1:] == spec.shape else as_fitted(part, spec, fit)

    return ImageStream(path.name, labels, batches)
