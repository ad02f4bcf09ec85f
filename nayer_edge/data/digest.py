"""What a data set on disk is, wherever it lies: the digest by which a step notices a change. Standard library."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from nayer_edge.errors import UsageError
from nayer_edge.storage.files import sha256_of


def digest_of_data(path: Path, *, contents: bool = True) -> str:
    """SHA-256 of a file; of a folder, of the names and contents of all files in it.

    Args:
        contents: False takes a file's size in a folder for its contents, for sets that are too large to be read.

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
            fix="Give yourself the right to read it.",
        ) from error
    return digest.hexdigest()


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(name inside the folder, path) of every file below it, in the order of the names; links are followed once."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(Path(place) / name) not in seen]
        files = (Path(place) / name for name in names)
        found += [(file.relative_to(folder).as_posix(), file) for file in files if file.is_file()]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error
