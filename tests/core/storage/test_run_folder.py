"""The manifest, paths that cannot leave the folder, and the lock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.files import sha256_of, write_bytes
from nayer_edge.storage.run_folder import (
    LOCK,
    MANIFEST,
    Artifact,
    RunFolder,
    clear_folder,
    lock_folder,
    require_outside,
    require_unlocked,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with two finished steps."""
    folder = RunFolder.create(tmp_path / "run", {"name": "r"}, 3, {"torch": "2"}, {"cpu": "x"})
    write_bytes(folder.path("teacher/t.bin"), b"teacher")
    teacher = Artifact("teacher", {"teacher": "teacher/t.bin"}, {"parameters": 3, "top1": 0.5, "none": None})
    folder.record(teacher, digest="0" * 64, settings={"lr": 0.1}, parents=[], seconds=1.23456, finished="now")
    write_bytes(folder.path("student/été.bin"), b"student")
    student = Artifact("student", {"student": "student/été.bin"}, {})
    folder.record(student, digest="1" * 64, settings={}, parents=[teacher], seconds=2, finished="now")
    return folder


# ------------------------------------------------------------------ the manifest


def test_round_trip_of_the_manifest(run: RunFolder) -> None:
    read = RunFolder.open(run.root)
    assert read.manifest == run.manifest
    assert read.manifest.seed == 3
    assert read.manifest.steps["teacher"].seconds == 1.235
    artifact = read.artifact("teacher")
    assert artifact.files == {"teacher": "teacher/t.bin"}
    assert artifact.numbers == {"parameters": 3, "top1": 0.5, "none": None}
    student = read.manifest.files["student/été.bin"]
    assert student.parents == (sha256_of(read.path("teacher/t.bin")),)
    assert student.bytes == 7
    assert json.loads((run.root / MANIFEST).read_text(encoding="utf-8"))["schema"] == "nayer-edge/manifest/1"


def test_a_step_recorded_again_replaces_its_files(run: RunFolder) -> None:
    write_bytes(run.path("teacher/new.bin"), b"new")
    again = Artifact("teacher", {"teacher": "teacher/new.bin"}, {})
    run.record(again, digest="2" * 64, settings={}, parents=[], seconds=1, finished="now")
    assert set(RunFolder.open(run.root).manifest.files) == {"teacher/new.bin", "student/été.bin"}
    run.forget("student")
    assert set(RunFolder.open(run.root).manifest.files) == {"teacher/new.bin"}
    with pytest.raises(UsageError, match="no finished step 'student'"):
        run.artifact("student")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("recipe"),
        lambda manifest: manifest.update(schema="nayer-edge/manifest/2"),
        lambda manifest: manifest.update(extra=1),
        lambda manifest: manifest["files"]["teacher/t.bin"].update(sha256="xyz"),
        lambda manifest: manifest["files"]["teacher/t.bin"].update(bytes=-1),
        lambda manifest: manifest["steps"]["teacher"].pop("digest"),
        lambda manifest: manifest.update(files=[]),
    ],
)
def test_a_damaged_manifest(run: RunFolder, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((run.root / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (run.root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="not a manifest of this version"):
        RunFolder.open(run.root)


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        RunFolder.open(tmp_path)


def test_paths_cannot_leave_the_folder(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (run.root / "link").symlink_to(tmp_path / "outside")
    (run.root / "circle").symlink_to("circle")
    (run.root / "within").symlink_to("teacher")
    for name in (
        "../outside/x",
        "a/../../x",
        "a/..",
        "/etc/passwd",
        "//etc/passwd",
        str(run.root / "teacher/t.bin"),
        "link/x",
        "link",
        "circle/x",
        "a\0b",
        "..\\x",
        "C:\\x",
        "x" * 300,
        "d/" * 2500 + "x",
        "\ud800",
    ):
        with pytest.raises(IntegrityError, match="points outside the run folder"):
            run.path(name)
    for name in ("a", "a/b.txt", "./a", "..a/b..", "~/x", "within/t.bin", "日/é"):
        assert run.path(name).resolve().is_relative_to(run.root.resolve())


def test_a_manifest_with_a_path_outside_is_refused_when_it_is_checked(run: RunFolder) -> None:
    manifest = json.loads((run.root / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"]["../../etc/passwd"] = manifest["files"].pop("teacher/t.bin")
    (run.root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="points outside"):
        RunFolder.open(run.root).problems()


def test_nothing_is_written_into_a_run_folder(run: RunFolder, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run.root / "student")
    for path in (run.root, run.root / "new" / "x.json", link / "x.json", run.root / ".." / "run" / "x.json"):
        with pytest.raises(UsageError, match=r"--out .* lies inside the run folder"):
            require_outside(path, "--out")
    require_outside(tmp_path / "x.json", "--out")
    require_outside(run.root / "x.json", "--out", tmp_path / "another run")


def test_altered_missing_and_unexpected_files_are_found(run: RunFolder, tmp_path: Path) -> None:
    assert run.problems() == []
    assert run.unexpected_files() == []
    run.require_intact()
    run.path("teacher/t.bin").write_bytes(b"Teacher")
    assert run.problems() == ["teacher/t.bin was altered: its SHA-256 differs from the manifest's"]
    assert run.problems(["student/été.bin"]) == []
    run.path("student/été.bin").unlink()
    with pytest.raises(IntegrityError) as caught:
        run.require_intact()
    assert "teacher/t.bin was altered" in caught.value.why
    assert "student/été.bin is missing" in caught.value.why
    (run.root / "teacher" / "new.txt").write_text("x")
    (run.root / ".hidden").write_text("x")
    (run.root / "link").symlink_to(tmp_path)
    with run.locked():
        assert run.unexpected_files() == [".hidden", "link", "teacher/new.txt"]


# ------------------------------------------------------------------ locks and clearing


def test_two_processes_cannot_lock_one_folder(run: RunFolder) -> None:
    script = f"""
from pathlib import Path
from nayer_edge.storage.run_folder import lock_folder
from nayer_edge.errors import UsageError
try:
    with lock_folder(Path({str(run.root)!r})):
        print("got it")
except UsageError as error:
    print(error.what)
"""

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    require_unlocked(run.root)
    with run.locked():
        assert "Another process is working" in other()
        with pytest.raises(UsageError, match="Another process"), lock_folder(run.root):
            pass
        with pytest.raises(UsageError, match="Another process") as caught:
            require_unlocked(run.root)
        assert "repeat this command" in caught.value.fix
    require_unlocked(run.root)
    assert other() == "got it\n"


def test_the_lock_of_a_killed_process_is_free(run: RunFolder) -> None:
    script = f"""
import os, signal
from pathlib import Path
from nayer_edge.storage.run_folder import lock_folder
with lock_folder(Path({str(run.root)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -9
    assert (run.root / LOCK).exists()
    with run.locked():
        pass


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="Cannot write to"), lock_folder(tmp_path / "file"):
        pass


def test_clearing_empties_a_run_and_no_other_folder(run: RunFolder, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (run.root / "link").symlink_to(outside)
    with run.locked():
        clear_folder(run.root)
        assert [path.name for path in run.root.iterdir()] == [LOCK]
    assert (outside / "precious").exists()
    with pytest.raises(UsageError, match="not empty and not a run folder"):
        clear_folder(outside)
    assert (outside / "precious").exists()
    clear_folder(tmp_path / "absent")
    clear_folder(run.root)
