"""Hashes, atomic writes, and JSON files of bounded size."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nayer_edge.errors import IntegrityError, UsageError

TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
"""names of temporary files of `write_atomic`"""
MAX_JSON_BYTES = 64 * 2**20
MAX_NAME_BYTES = 255


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file is streamed.

    Raises:
        UsageError: permission to read it is denied.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError as error:
        fix = f"Make it readable for your user, or type: sudo chmod a+r {shlex.quote(str(path))}"
        raise UsageError(f"{path} cannot be read: permission denied.", fix=fix) from error


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that starts like this is a Git LFS pointer (https://git-lfs.com/spec/v1) in place of the file."""
    return head.startswith(b"version https://git-lfs.github.com/spec/")


def digest_of(value: object) -> str:
    """SHA-256 of a JSON-serialisable value in canonical form (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)`, fsyncs the result and renames it to `path`, which is thus complete or absent.

    Raises:
        UsageError: the folder is not writable, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UsageError(
            f"Cannot write {path}.",
            why=f"System error: {error.strerror or error}.",
            fix="Choose another folder with --out, or get write permission for this one.",
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        _write(temporary, write)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp creates private files, but artifacts should be readable by others.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        raise UsageError(
            f"Cannot write {path}.",
            why=f"System error: {error.strerror or error}.",
            fix="Free some space and repeat the command; finished steps are kept.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(temporary: Path, write: Callable[[Path], object]) -> None:
    """Calls `write`, and converts a library's own exception for a system error to an OSError."""
    try:
        write(temporary)
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own exception type, with the system error in the text
        match = re.search(r"os error (\d{1,4})", str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1]))) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Writes bytes atomically."""
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically, indented, in UTF-8, without NaN."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str) -> Any:
    """Reads a JSON file of at most 64 MiB.

    Args:
        what: the file's name in error messages ("the manifest").

    Raises:
        IntegrityError: it is missing, too large or not valid JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise IntegrityError(f"{path} is too large for {what} (the limit is {MAX_JSON_BYTES >> 20} MiB).")
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing, so {what} cannot be read.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not readable as {what}.", why=f"{error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
