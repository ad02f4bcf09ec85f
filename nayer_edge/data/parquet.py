"""Parquet with encoded pictures, as Hugging Face's datasets library writes it.

Memory holds one batch and one page of a file (1,024 rows as pyarrow writes it), whatever the size of the set.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.left_out import HIDDEN, LeftOutFiles, files_below, is_hidden
from nayer_edge.data.pictures import SUFFIXES, Mismatches, decode, require_grey_or_colour
from nayer_edge.data.splits import NO_SPLIT, Purpose, canonical, choose, missing_shards, split_in
from nayer_edge.data.stream import ImageStream
from nayer_edge.errors import UsageError, missing_extra

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
SPLIT_COLUMN = "split"
ROWS = 64
"""in memory at once"""


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in a folder, or else in its subfolders unless there are pictures; empty if there are none."""
    if direct := sorted(file for file in folder.glob("*.parquet") if not is_hidden(file.name)):
        return direct
    found = []
    for file in files_below(folder, LeftOutFiles(folder)):
        if file.suffix.lower() in SUFFIXES:
            return []
        if file.suffix == ".parquet":
            found.append(file)
    return sorted(found)


def open_parquet(
    paths: Sequence[Path], root: Path, spec: InputSpec, fit: Fit, purpose: Purpose = "holdout", asked: str | None = None
) -> ImageStream:
    """Opens parquet with a column of encoded images (bytes, or a struct with `bytes`) and one of labels.

    Labels are numbers, whose names the ClassLabel metadata of the datasets library states, or the names themselves.
    Splits are told apart by file name, folder name or a column `split`.

    Args:
        paths: the files; several are the parts of one set, in this order.
        root: the file or folder that the user named.
        purpose, asked: see `splits.choose`.

    Raises:
        UsageError: not parquet, other columns, several splits and no choice, parts that are missing, or pictures that
            do not match the model's input.
    """
    left_out = LeftOutFiles(root if root.is_dir() else root.parent)
    for path in root.glob(".*.parquet") if root.is_dir() else ():
        left_out.add(HIDDEN, path)
    chosen, kept = list(paths), None
    if in_rows := _splits_in_column(paths):
        split = choose(in_rows, purpose, asked, root)
        kept = split if len(in_rows) > 1 else None
    else:
        split = choose({_split_of(path, root) for path in paths}, purpose, asked, root)
        chosen = [path for path in paths if _split_of(path, root) == split]
        for path in paths:
            if path not in chosen:
                left_out.add("in another split", path)
    if root.is_dir():
        _require_one_whole_set(chosen, root)
    names = _class_names(chosen)
    found: list[int | str] = []
    mismatches = Mismatches(spec, fit, upright=True)
    for data, label, where in _rows(chosen, ROWS, kept):
        if not found:
            require_grey_or_colour(spec, chosen[0])
        found.append(label)
        mismatches.check(io.BytesIO(data), where)
    mismatches.raise_if_any(len(found), root)
    labels, names = _numbered(found, names, root)

    def batches(size: int) -> Iterator[np.ndarray]:
        batch = []
        for data, _, where in _rows(chosen, min(size, ROWS), kept):
            batch.append(decode(data, spec, where, fit, upright=True))
            if len(batch) == size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    name = root.name if root.is_dir() else f"{root.parent.name}/{root.name}"
    return ImageStream(name, labels, batches, names=names, split=split or None, left_out=left_out.found())


def _split_of(path: Path, root: Path) -> str:
    """The split that the name of a file states, or else that of a folder between it and the root."""
    folders = path.relative_to(root).parts[-2::-1] if root.is_dir() else ()
    return next((split for name in (path.stem, *folders) if (split := split_in(name)) != NO_SPLIT), NO_SPLIT)


def _require_one_whole_set(paths: Sequence[Path], root: Path) -> None:
    """Raises UsageError if the files belong to several sets, or if some of a set are absent."""
    places = sorted({path.parent for path in paths})
    if len(places) > 1:
        listed = ", ".join(str(place.relative_to(root)) for place in places[:5])
        raise UsageError(
            f"{root} holds parquet files in {len(places)} folders: {listed}.",
            why="They may be different data sets, or configurations of one.",
            fix="Name one of these folders.",
        )
    if absent := missing_shards([path.stem for path in paths]):
        raise UsageError(
            f"{root} lacks {len(absent)} of the files of its data set, for example {absent[0]}.parquet.",
            why="The file names give the total number of files.",
            fix="Fetch the others, or name one file to use it alone.",
        )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """A ParquetFile; damage is an error that names the file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "cpu", "Reading parquet") from error
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            yield file
    except (ArrowException, OSError) as error:
        raise UsageError(
            f"{path} is not readable as parquet.", why=f"{error}", fix="Fetch or write the file again."
        ) from error


def _splits_in_column(paths: Sequence[Path]) -> set[str]:
    """The values of the column `split`; empty if a file has no such column of text."""
    found: set[str] = set()
    for path in paths:
        with _reading(path) as file:
            schema = file.schema_arrow
            if SPLIT_COLUMN not in schema.names or not _is_text(schema.field(SPLIT_COLUMN).type):
                return set()
            for batch in file.iter_batches(2**16, columns=[SPLIT_COLUMN], use_threads=False):
                found |= {canonical(value or "") for value in batch.column(0).unique().to_pylist()}
    return found


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _class_names(paths: Sequence[Path]) -> tuple[str, ...] | None:
    """The names in the metadata of the datasets library (feature ClassLabel); None if there are none.

    Raises:
        UsageError: two files have different ones.
    """
    found: dict[tuple[str, ...] | None, Path] = {}
    for path in paths:
        with _reading(path) as file:
            schema = file.schema_arrow
            found.setdefault(_names_in(schema.metadata or {}, _columns(path, schema)[1]), path)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise UsageError(
            f"{one} and {other.name} state different class names.",
            why="The same number would mean different classes.",
            fix="Write them again with the same ClassLabel feature.",
        )
    return next(iter(found), None)


def _names_in(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _numbered(
    labels: Sequence[int | str], names: tuple[str, ...] | None, root: Path
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels as numbers, and their names if there are any."""
    if labels and all(isinstance(label, str) for label in labels):
        names = tuple(sorted({str(label) for label in labels}))
        number_of = {name: number for number, name in enumerate(names)}
        return np.array([number_of[str(label)] for label in labels], dtype=np.int64), names
    if any(isinstance(label, str) for label in labels):
        raise UsageError(f"{root} has labels that are names and others that are numbers.", fix="Use one kind.")
    try:
        return np.array(labels, dtype=np.int64), names
    except OverflowError as error:
        raise UsageError(f"{root} has labels of more than 64 bits.", fix="Number the classes from 0.") from error


def _rows(paths: Sequence[Path], rows: int, kept: str | None) -> Iterator[tuple[bytes, int | str, str]]:
    """(encoded image, label, place) of every row; reads pages, not whole row groups.

    Args:
        kept: only the rows of this split.
    """
    for path in paths:
        with _reading(path) as file:
            columns = _columns(path, file.schema_arrow)
            wanted = [*columns, *([SPLIT_COLUMN] if kept else [])]
            number = 0
            for batch in file.iter_batches(rows, columns=wanted, use_threads=False):
                for image, label, *splits in zip(*(batch.column(name).to_pylist() for name in wanted), strict=True):
                    place, number = number, number + 1
                    if splits and canonical(splits[0] or "") != kept:
                        continue
                    data = image.get("bytes") if isinstance(image, dict) else image
                    if not isinstance(data, bytes) or type(label) not in (int, str):
                        raise _other_types(path, file.schema_arrow, columns)
                    yield data, label, f"{path.name}, row {place}"


def _columns(path: Path, schema: Any) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise UsageError(
            f"{path} lacks a column of images or one of labels.",
            why=f"Its columns: {', '.join(schema.names)}.",
            fix="Name the columns `image` (encoded bytes) and `label`.",
        )
    for name in (image, label):
        if schema.names.count(name) > 1:
            raise UsageError(f"{path} has several columns named '{name}'.", fix="Rename all but one of them.")
    return image, label


def _other_types(path: Path, schema: Any, columns: tuple[str, str]) -> UsageError:
    types = ", ".join(f"column {name} is {schema.field(name).type}" for name in columns)
    return UsageError(
        f"{path} does not hold encoded images and class numbers or names.",
        why=f"{types[0].upper()}{types[1:]}.",
        fix="Images are the bytes of PNG, JPEG or WebP files; labels are numbers in the order of the class names.",
    )
