"""Labelled images in the files of torchvision's data sets.

    MNIST           t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (also FashionMNIST, KMNIST)
    SVHN            test_32x32.mat
    CIFAR binary    cifar-10-batches-bin/, cifar-100-binary/: one or two label bytes and 3,072 pixels per image
    STL-10 binary   stl10_binary/: test_X.bin (columns before rows) and test_y.bin (labels from 1)

torchvision reads MNIST and SVHN. It cannot do the others for us: it unpickles CIFAR, and hashes all 100,000 unlabelled
images of STL-10 before it opens the 8,000 of its test set. Nothing is unpickled here; for pickled CIFAR the error names
the files to use instead.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from nayer_edge.data.arrays import StoredImages, in_memory, in_records
from nayer_edge.data.splits import NO_SPLIT, Purpose, canonical, choose, split_in
from nayer_edge.data.stream import MAX_IMAGES
from nayer_edge.errors import UsageError, missing_extra

SPLITS = ("test", "train", "extra")
"""`extra` is SVHN's alone"""
IDX_PREFIX = {"test": "t10k", "train": "train"}
IDX_IMAGES = "-images-idx3-ubyte"
SVHN_FILE = "_32x32.mat"
CIFAR_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "cifar-10-batches-bin": {
        "test": ("test_batch.bin",),
        "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    },
    "cifar-100-binary": {"test": ("test.bin",), "train": ("train.bin",)},
}
CIFAR_NAMES = {"cifar-10-batches-bin": "batches.meta.txt", "cifar-100-binary": "fine_label_names.txt"}
"""the data set's own class names, if they were unpacked, too"""
CIFAR_LABEL_BYTES = {"cifar-10-batches-bin": 1, "cifar-100-binary": 2}
PICKLED = {
    "cifar-10-batches-py": "cifar-10-binary.tar.gz",
    "cifar-100-python": "cifar-100-binary.tar.gz",
}
"""pickled CIFAR → the archive of the same images in binary form"""
MAX_IDX_BYTES = 2 * 2**30
"""of a file that is read whole"""


def open_torchvision(path: Path, purpose: Purpose = "holdout", asked: str | None = None) -> StoredImages | None:
    """One of the formats of torchvision's data sets, at its folder, at its parent (torchvision's `root`) or at its file
    of images; None where there is none.

    These sets were published with a test part, which is the hold-out unless `asked` names another.

    Raises:
        UsageError: it is one, and is pickled or damaged, or has no such split.
    """
    if path.is_dir():
        folders = (path, *sorted(entry for entry in path.iterdir() if entry.is_dir()))
        usual = "train" if purpose == "train" else "test"
        split = usual if asked is None else canonical(asked)
        # A set may be given as its own folder or as the parent folder.
        found = {held: dict(at for folder in folders if (at := _known(folder, held)) is not None) for held in SPLITS}
        if asked is not None and any(found.values()):
            choose([held for held in SPLITS if found[held]], purpose, asked, path)
        known = found.get(split, {})
        if len(known) > 1:
            raise UsageError(
                f"{path} holds {len(known)} data sets.", fix="Name the folder of one of them, for example MNIST/raw."
            )
        if not known:
            _refuse_pickled(path)
        return replace(next(iter(known.values()))(), split=split) if known else None
    if IDX_IMAGES in path.name or path.name.endswith(SVHN_FILE):
        name = path.name.removesuffix(SVHN_FILE).partition(IDX_IMAGES)[0]
        # EMNIST and QMNIST put their names before it.
        # Two names that state a split only here: MNIST's test part, and SVHN's third one.
        split = split_in(name) or {IDX_PREFIX["test"]: "test", "extra": "extra"}.get(name, NO_SPLIT)
        if asked is not None:
            choose([split], purpose, asked, path)
        return replace(_idx(path) if IDX_IMAGES in path.name else _svhn(path), split=split or None)
    _refuse_pickled(path)
    return None


def _known(folder: Path, split: str) -> tuple[Path, Callable[[], StoredImages]] | None:
    """Where the data set of this folder lies and how to open it; None where there is none."""
    cifar = CIFAR_FILES.get(folder.name, {}).get(split)
    if cifar and (folder / cifar[0]).is_file():
        return folder, lambda: _cifar(folder, split)
    if (folder / f"{split}_X.bin").is_file():
        return folder, lambda: _stl10(folder, split)
    if (mat := folder / f"{split}{SVHN_FILE}").is_file():
        return mat, lambda: _svhn(mat)
    for raw in (folder, folder / "raw"):
        for ending in ("", ".gz"):
            if (images := raw / f"{IDX_PREFIX.get(split, split)}{IDX_IMAGES}{ending}").is_file():
                return images, lambda: _idx(images)
    return None


def _refuse_pickled(path: Path) -> None:
    """torchvision's CIFAR10 and CIFAR100 are pickles, which can run code when they are read."""
    folder = path if path.is_dir() else path.parent
    for name, archive in PICKLED.items():
        if folder.name == name or (folder / name).is_dir():
            raise UsageError(
                f"{path} is the Python version of CIFAR, which is pickled, and nayer-edge never unpickles.",
                why="Reading a pickle can run any code that is in it.",
                fix=f"Use the binary version from the data set's page ({archive}), or parquet with the same images.",
            )


def _idx(images: Path) -> StoredImages:
    """MNIST's two files, by torchvision's reader."""
    try:
        from torchvision.datasets.mnist import read_image_file, read_label_file
    except ImportError as error:
        raise missing_extra("torchvision", "cpu", "Reading MNIST's files") from error
    labels = images.with_name(images.name.replace("-images-idx3-", "-labels-idx1-"))
    if images.suffix == ".gz":
        raise UsageError(
            f"{images} is compressed.", fix=f"Type: gunzip -k {shlex.quote(str(images))} {shlex.quote(str(labels))}"
        )
    found = []
    for path, read in ((images, read_image_file), (labels, read_label_file)):
        try:
            if path.stat().st_size > MAX_IDX_BYTES:
                raise ValueError(f"it is larger than {MAX_IDX_BYTES >> 30} GiB")
            found.append(read(str(path)).numpy())
        # torchvision asserts what it expects of the header.
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, AssertionError) as error:
            raise UsageError(
                f"{path} is not readable as idx.", why=f"{error!r}", fix="Fetch the file again."
            ) from error
    pixels, numbers = found
    return in_memory(pixels[:, None], numbers, images)


def _svhn(path: Path) -> StoredImages:
    """SVHN's format 2, by torchvision, which compares the file's MD5 with the published one before it reads it."""
    part = path.name.removesuffix(SVHN_FILE)
    try:
        from torchvision.datasets import SVHN

        held = SVHN(str(path.parent), split=part)
    except ImportError as error:
        raise missing_extra(error.name or "scipy", "cpu", "Reading SVHN's .mat files") from error
    # ValueError: there is no such split.
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{path} is not a file of SVHN's format 2, or is damaged.",
            why=f"torchvision says: {error}.",
            fix="Fetch train_32x32.mat, test_32x32.mat or extra_32x32.mat again.",
        ) from error
    return in_memory(held.data, held.labels, path)


def _cifar(folder: Path, split: str) -> StoredImages:
    lead = CIFAR_LABEL_BYTES[folder.name]
    files, labels = [], []
    for path in (folder / name for name in CIFAR_FILES[folder.name][split]):
        count = _record_count(path, lead + 3072)
        files.append((lambda path=path: path.open("rb"), count))
        # CIFAR-100 gives the coarse class first, then the fine one.
        column = np.memmap(path, np.uint8, mode="r").reshape(count, lead + 3072)[:, lead - 1]
        labels.append(np.array(column))
    name = f"{folder.name} ({split})"
    found = in_records(files, np.concatenate(labels), name, folder, shape=(3, 32, 32), axes=(0, 1, 2), lead=lead)
    return replace(found, names=_names(folder / CIFAR_NAMES[folder.name]))


def _stl10(folder: Path, part: str) -> StoredImages:
    images, labels = folder / f"{part}_X.bin", folder / f"{part}_y.bin"
    count = _record_count(images, 3 * 96 * 96)
    with _damage_named(labels):
        numbers = np.fromfile(labels, np.uint8, MAX_IMAGES).astype(np.int64) - 1
    files = [(lambda: images.open("rb"), count)]
    found = in_records(files, numbers, f"stl10 ({part})", folder, shape=(3, 96, 96), axes=(0, 2, 1))
    return replace(found, names=_names(folder / "class_names.txt"))


def _names(path: Path) -> tuple[str, ...] | None:
    """The class names in a text file that belongs to a data set, one per line; None if there is no such file."""
    if not path.is_file():
        return None
    with _damage_named(path):
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _record_count(path: Path, record: int) -> int:
    """How many records of so many bytes a file holds.

    Raises:
        UsageError: it is missing, empty or ends within a record.
    """
    with _damage_named(path):
        size = path.stat().st_size
        if size == 0 or size % record:
            raise ValueError(f"{size:,} bytes are not a whole number of records of {record:,}")
        return size // record


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable.", why=f"{error}", fix="Fetch the file again.") from error
