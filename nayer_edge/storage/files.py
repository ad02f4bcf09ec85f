"""Hashes, atomic writes, and JSON files of bounded size."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nayer_edge.errors import IntegrityError, UsageError

TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
"""names of temporary files of `write_atomic`"""
# UTF-32's mark in little-endian order starts with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
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


def home_folder() -> Path | None:
    """The user's home folder; None where neither HOME nor the password file names one, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def expanded(path: str | Path) -> Path:
    """A path with a leading ~ or ~user replaced.

    Raises:
        UsageError: that home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"The home folder in {path} is unknown.",
            why="HOME is not set, or there is no such user.",
            fix="Write the whole path, or set HOME.",
        ) from error


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that starts like this is a Git LFS pointer (https://git-lfs.com/spec/v1) in place of the file."""
    return head.startswith(b"version https://git-lfs.github.com/spec/")


def unix_digest(path: Path) -> str:
    """SHA-256 of a text file with Unix line ends. Git may have converted them on checkout (core.autocrlf); in JSON they
    mean nothing."""
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def decoded(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 if it starts with a byte order mark, which is removed. Windows' editors and
    PowerShell write such files.

    Raises:
        UnicodeDecodeError: it is none of these.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data.decode(encoding)
    return data.decode("utf-8")


def digest_of(value: object) -> str:
    """SHA-256 of a JSON-serialisable value in canonical form (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)`, fsyncs the result and renames it to `path`, which is thus complete or absent.

    Raises:
        UsageError: the folder is not writable, the disk is full, or `write` could not read one of its own inputs.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UsageError(
            f"Cannot write {path}.",
            why=f"System error: {error.strerror or error}.",
            fix=writable_fix(path.parent, error),
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
        why = f"System error: {error.strerror or error}."
        if (source := _other_file(error, temporary, path)) is not None:
            raise UsageError(f"Cannot read {source}, so {path} is not written.", why=why, fix="") from error
        raise UsageError(f"Cannot write {path}.", why=why, fix=writable_fix(path.parent, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def writable_fix(folder: Path, error: OSError) -> str:
    """What to do where `folder` cannot be written to."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free some space and repeat the command; finished steps are kept."
    typed = shlex.quote(str(folder))
    return (
        f"Get write permission for {typed}, or work on a copy where you may write: cp -r {typed} COPY   "
        "(commands that make a new run or file take --out instead)."
    )


def _other_file(error: OSError, *own: Path) -> str | None:
    """The file that a system error names, if it is none of these; an error of a write itself names no file."""
    named = error.filename
    if not isinstance(named, str | os.PathLike) or error.filename2 is not None:
        return None
    place = Path(named)
    return None if {place, *place.parents} & set(own) or place == own[0].parent else str(named)


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


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link where the file system has them, else a copy.

    Both stay complete: files of a run are replaced, never written in place.

    Raises:
        UsageError: the folder is not writable, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError:
        # On another file system, or one without hard links.
        write_atomic(target, lambda temporary: shutil.copyfile(source, temporary))


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
