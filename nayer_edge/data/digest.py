"""A digest of a data set on disk, by which steps notice that it changed. Standard library only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from nayer_edge.errors import UsageError
from nayer_edge.storage.files import sha256_of


def digest_of_data(path: Path, *, contents: bool = True) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder.

    Args:
        contents: False hashes file sizes instead of contents, for folders that are too large to read.

    Raises:
        UsageError: something in it cannot be read.
    """
    try:
        if path.is_file():
            return sha256_of(path)
        digest = hashlib.sha256()
        for name, file in _files(path):
            what = sha256_of(file) if contents else f"{file.stat().st_size} "
            digest.update(f"{what}  ".encode() + os.fsencode(name) + b"\0")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read.",
            why=f"The system says: {error.strerror or error} ({error.filename}).",
            fix="Give your user permission to read it.",
        ) from error
    return digest.hexdigest()


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(relative name, path) of every file in a folder and its subfolders, sorted by name; links are followed once."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(Path(place) / name) not in seen]
        files = (Path(place) / name for name in names)
        found += [(file.relative_to(folder).as_posix(), file) for file in files if file.is_file()]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error
