"""Precomputed label-text embeddings from safetensors, npz and npy files, with rows matched by class name."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nayer_edge.errors import IntegrityError, UsageError, nearest
from nayer_edge.labels.class_names import as_words, labels_beside, read_labels, synonyms_of
from nayer_edge.storage.files import sha256_of

MAX_BYTES = 4 * 2**30
_BRACKETS = re.compile(r"\([^()]*\)")
_TENSOR_NAMES = ("embeddings", "text_features", "features")
_LABEL_NAMES = ("labels", "classes", "class_names", "names")


@dataclass(frozen=True)
class Precomputed:
    """The content of an embedding file.

    Attributes:
        values: (K, D), float32.
        labels: the K class names; None if the file has none (its rows are then in the recipe's order).
        facts: the file's metadata (encoder, prompt, source, …); empty for npy and npz.
        sha256: of the file.
    """

    values: Float[Tensor, "K D"]
    labels: tuple[str, ...] | None
    facts: dict[str, str]
    sha256: str

    def rows_for(self, names: Sequence[str], path: Path) -> Float[Tensor, "K D"]:
        """The rows of the given classes, by name if the file has names, else in file order.

        Raises:
            UsageError: the number of rows differs from the number of classes, or a class has no row.
        """
        if self.labels is not None:
            return self.values[rows_by_name(names, self.labels, path)]
        if len(self.values) != len(names):
            raise UsageError(
                f"{path} has {len(self.values)} embeddings for {len(names)} classes.",
                why="It has no class names, so its rows must be in the order of the classes.",
                fix=f"Write its class names, one per line, into {path.with_suffix('.labels.txt').name} beside it.",
            )
        return self.values


def read(path: Path) -> Precomputed:
    """Reads an embedding file.

    The tensor is named `embeddings`, or is the only matrix in the file. Labels come from the safetensors metadata (a
    JSON list, or one per line), an npz array `labels`, or a file beside it (clip.npy → clip.labels.txt, .json or .csv).

    Raises:
        UsageError: no such file, several matrices and none named `embeddings`, or invalid labels.
        IntegrityError: it is damaged, or contains Python objects or non-finite values.
    """
    if not path.is_file():
        raise UsageError(f"There is no embedding file at {path}.", fix="Correct lte.encoder in the recipe.")
    facts: dict[str, str] = {}
    labels: tuple[str, ...] | None = None
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                facts = dict(file.metadata() or {})
                name = _matrix(path, {key: len(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
                values = file.get_tensor(name)
        else:
            arrays = _arrays(path)
            values = torch.from_numpy(_matrix_of(path, arrays).astype(np.float32))
            labels = _labels_among(arrays)
    except (OSError, SafetensorError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise IntegrityError(
            f"{path} is not readable as an embedding file.",
            why=f"{error}".splitlines()[0] if str(error) else type(error).__name__,
        ) from error
    if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
        raise IntegrityError(f"{path} has invalid embeddings (type {values.dtype}, or NaN or infinite values).")
    if labels is None and facts:
        labels = next((_labels_in(facts[key]) for key in _LABEL_NAMES if key in facts), None)
    if labels is None and (beside := labels_beside(path)):
        labels = read_labels(beside)
    if labels is not None and len(labels) != len(values):
        raise IntegrityError(f"{path} has embeddings of shape {tuple(values.shape)} for {len(labels)} labels.")
    return Precomputed(values.float().contiguous(), labels, facts, sha256_of(path))


def rows_by_name(names: Sequence[str], labels: Sequence[str], path: Path) -> list[int]:
    """The row index of each class: matched by exact name, else as words ignoring case, else by a synonym.

    If names and labels correspond one to one in order ("tench" and "tench, Tinca tinca"), the order decides; so both of
    ImageNet's classes named "crane" get their own rows.

    Raises:
        UsageError: a class has no row, or several.
    """
    wanted, held = [_forms(name) for name in names], [_forms(label) for label in labels]
    if len(names) == len(labels) and all(set(one) & set(other) for one, other in zip(wanted, held, strict=True)):
        exact = {label: row for row, label in enumerate(labels)}
        if len(exact) == len(labels) and set(exact) == set(names):
            return [exact[name] for name in names]
        return list(range(len(names)))
    places: list[dict[str, list[int]]] = [{}, {}, {}]
    for row, (label, forms) in enumerate(zip(labels, held, strict=True)):
        for level, keys in enumerate(((label,), forms[:1], forms)):
            for key in dict.fromkeys(keys):
                places[level].setdefault(key, []).append(row)
    found: list[int] = []
    absent: list[str] = []
    for name, forms in zip(names, wanted, strict=True):
        levels = ((name,), forms[:1], forms)
        rows = next((hit for at, keys in zip(places, levels, strict=True) for key in keys if (hit := at.get(key))), [])
        if len(rows) > 1:
            raise UsageError(
                f"{path} has {len(rows)} embeddings for the class '{name}' (rows {', '.join(map(str, rows[:4]))}).",
                fix="Make the file's labels distinct, or give the classes in the file's order.",
            )
        found += rows
        absent += [] if rows else [name]
    if absent:
        raise UsageError(
            f"{path} has no embedding for {len(absent)} of {len(names)} classes: {', '.join(absent[:4])}."
            f"{nearest(absent[0], labels)}",
            why=f"Its classes are {', '.join(labels[:4])}, …",
            fix="Give a file made for these class names, or name an encoder.",
        )
    return found


def _forms(name: str) -> tuple[str, ...]:
    """The whole name and its synonyms, each with and without text in brackets; as words, case-folded."""
    names = (as_words(name), *synonyms_of(name))
    bare = (as_words(_BRACKETS.sub("", form)) for form in names)
    return tuple(dict.fromkeys(form.casefold() for form in (*names, *bare) if form))


def _labels_in(text: str) -> tuple[str, ...] | None:
    """Labels in a metadata string: a JSON list, or one per line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text.rstrip("\n").split("\n")
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise IntegrityError("The labels in the file's metadata are not a list of names.")
    return tuple(value)


def _matrix(path: Path, dimensions: dict[str, int]) -> str:
    matrices = [name for name, count in dimensions.items() if count == 2]
    name = next((name for name in _TENSOR_NAMES if name in matrices), None)
    if name is None and len(matrices) == 1:
        name = matrices[0]
    if name is None:
        raise UsageError(
            f"{path} contains {len(matrices)} matrices, none of them named 'embeddings'.",
            why=f"It contains {', '.join(list(dimensions)[:6]) or 'nothing'}.",
            fix="Save one matrix, (classes, dimensions), under the name 'embeddings'.",
        )
    return name


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if path.suffix.lower() == ".npy":
        return {"embeddings": np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))}
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_BYTES >> 30} GiB")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _matrix_of(path: Path, arrays: dict[str, Any]) -> np.ndarray:
    found = arrays[_matrix(path, {name: array.ndim for name, array in arrays.items()})]
    if found.dtype.kind != "f":
        raise ValueError(f"its embeddings are of type {found.dtype}, not floating-point")
    return found


def _labels_among(arrays: dict[str, np.ndarray]) -> tuple[str, ...] | None:
    for name in _LABEL_NAMES:
        if name in arrays and arrays[name].ndim == 1 and arrays[name].dtype.kind in "US":
            return tuple(
                entry.decode("utf-8") if isinstance(entry, bytes) else str(entry) for entry in arrays[name].tolist()
            )
    return None
