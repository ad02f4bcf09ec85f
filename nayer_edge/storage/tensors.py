"""Tensors in safetensors files, written atomically; nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nayer_edge.errors import IntegrityError
from nayer_edge.storage.files import write_atomic


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically; equal tensors and metadata give equal bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    storages: set[int] = set()
    for name, tensor in plain.items():
        # A module that is registered under two names; the format has no shared tensors.
        storage = tensor.untyped_storage().data_ptr()
        if tensor.numel() and storage in storages:
            plain[name] = tensor.clone()
        storages.add(storage)

    def write(temporary: Path) -> None:
        save_file(plain, temporary, metadata=dict(metadata or {}) or None)
        if metadata and len(metadata) > 1:
            _sort_header(temporary)

    write_atomic(path, write)


def _sort_header(path: Path) -> None:
    """Sorts the metadata, which the library writes in a different order in each process.

    File format: the header's length (8 bytes, little-endian), a JSON header padded with blanks, the tensors.
    """
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def load_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        IntegrityError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise IntegrityError(f"{path} is not readable as {what}.", why=f"{error}") from error
