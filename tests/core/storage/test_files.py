"""Writes that are complete or absent, JSON of a bounded size, and digests."""

from __future__ import annotations

import codecs
import errno
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.files import (
    decoded,
    digest_of,
    expanded,
    home_folder,
    read_json,
    sha256_of,
    writable_fix,
    write_atomic,
    write_bytes,
    write_json,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_bytes(path, b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]  # noqa: PTH208 - hidden files too

    def full(_temporary: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="Cannot write") as caught:
        write_atomic(path, full)
    assert "No space left" in caught.value.why
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]  # noqa: PTH208


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_bytes(path, b"old")
    script = f"""
import os, signal
from pathlib import Path
from nayer_edge.storage.files import write_atomic
def write(temporary):
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomic(Path({str(path)!r}), write)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"


def test_written_files_are_readable_by_others_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    before = os.umask(0o022)
    try:
        write_bytes(path, b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="Cannot write"):
        write_bytes(tmp_path / "file" / "inside.txt", b"x")


def test_a_read_error_inside_a_write_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot read .*absent") as caught:
        write_atomic(tmp_path / "a.txt", lambda temporary: shutil.copyfile(tmp_path / "absent", temporary))
    assert "No such file" in caught.value.why
    assert "space" not in str(caught.value)
    with pytest.raises(UsageError, match="Cannot read"):
        write_atomic(tmp_path / "a.txt", lambda temporary: temporary.write_bytes(tmp_path.joinpath("b/c").read_bytes()))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"Cannot read .*folder") as caught:
        write_atomic(tmp_path / "a.txt", lambda _temporary: (tmp_path / "folder").read_bytes())
    assert "directory" in caught.value.why
    with pytest.raises(UsageError, match="Cannot write"):
        write_atomic(tmp_path / "a.txt", lambda temporary: (temporary / "inside").write_bytes(b""))


def test_advice_for_a_folder_that_is_read_only(tmp_path: Path) -> None:
    """It is a command that works, whatever the folder is called."""
    folder = tmp_path / "a run's folder"
    fix = writable_fix(folder, OSError(errno.EROFS, os.strerror(errno.EROFS)))
    assert f"cp -r {shlex.quote(str(folder))} COPY" in fix
    assert "Free some space" in writable_fix(folder, OSError(errno.ENOSPC, "x"))
    assert "Free some space" not in fix


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    assert decoded("é = 1".encode(encoding)) == "é = 1"
    assert decoded(codecs.BOM_UTF16_BE + "é".encode("utf-16-be")) == "é"
    (tmp_path / "a.json").write_bytes('{"é": 1}'.encode(encoding))
    assert read_json(tmp_path / "a.json", "a thing") == {"é": 1}


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert home_folder() is None
    assert expanded("/a/b") == Path("/a/b")
    assert expanded("a/~b") == Path("a/~b")
    with pytest.raises(UsageError, match="home folder in ~/a is unknown"):
        expanded("~/a")
    monkeypatch.setenv("HOME", "/home/x")
    assert expanded("~/a") == Path("/home/x/a")


@pytest.mark.parametrize("value", [float("nan"), {"a": [float("inf")]}])
def test_json_without_nan(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of(value)
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    "content", [b"NaN", b'{"a": Infinity}', b"-Infinity", b"{", b"", b"\xff", b"[" * 100_000, b"1 2"]
)
def test_json_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(IntegrityError, match="not readable as a thing"):
        read_json(tmp_path / "a.json", "a thing")


def test_json_that_is_missing_or_a_folder_or_huge(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is missing, so a thing cannot be read"):
        read_json(tmp_path / "a.json", "a thing")
    with pytest.raises(IntegrityError, match="not readable as a thing"):
        read_json(tmp_path, "a thing")
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(IntegrityError, match="too large for a thing"):
        read_json(tmp_path / "big.json", "a thing")


def test_round_trip_of_json_and_digests(tmp_path: Path) -> None:
    value = {"é": [1, 2.5, None, True], "a": {"z": "日"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "a thing") == value
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
