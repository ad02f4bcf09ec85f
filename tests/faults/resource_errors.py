"""Full disks, missing write permission, too little memory: clear errors, no lost work, and runs that resume."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from . import processes
from .kit import Kit, Tally, checkpoint_often

NOBODY = 65534
"""an unprivileged user"""


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], bool] | None]:
    """Mounts a tmpfs of the given size on a folder; yields a function to remount it, or None without permission."""
    folder.mkdir(parents=True)
    options = f"size={size}"
    mounted = os.geteuid() == 0 and _call("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield (lambda wanted: _call("mount", "-o", f"remount,{wanted}", str(folder))) if mounted else None
    finally:
        if mounted:
            _call("umount", "-l", str(folder))


def _call(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def full_disk(kit: Kit, tries: int) -> Tally:
    """A disk that fills up at a random time in the run; with more space, the same command resumes."""
    tally, chance = Tally("disk full"), kit.random("disk")
    whole = sum(path.stat().st_size for path in kit.finished.rglob("*") if path.is_file())
    for _ in range(tries):
        size = chance.randrange(8192, int(whole * 1.2))
        folder = kit.room()
        with small_disk(folder, size) as remount:
            root = folder / "run"
            if remount is None:
                # Without permission to mount, use the system's limit on file sizes instead.
                limit = chance.randrange(4096, 200_000)
                outcome = processes.run(*kit.run(root), before=_limited(resource.RLIMIT_FSIZE, limit))
            else:
                outcome = processes.run(*kit.run(root), before=checkpoint_often)
            wrong = _wrong_write(kit, root, outcome)
            if remount is not None:
                remount(f"size={whole * 8}")
            tally.count(wrong or kit.continued(root), f"{size} bytes")
        shutil.rmtree(folder, ignore_errors=True)
    return tally


def file_size_limit(kit: Kit, tries: int) -> Tally:
    """A limit on file sizes, which ends a write in the middle."""
    tally, chance = Tally("limit on file sizes (RLIMIT_FSIZE)"), kit.random("quota")
    for _ in range(tries):
        root, limit = kit.room(), chance.randrange(1024, 320_000)
        outcome = processes.run(*kit.run(root), before=_limited(resource.RLIMIT_FSIZE, limit))
        wrong = _wrong_write(kit, root, outcome)
        tally.count(wrong or kit.continued(root), f"{limit} bytes")
        shutil.rmtree(root, ignore_errors=True)
    return tally


def full_temporary_folder(kit: Kit, tries: int) -> Tally:
    """The temporary folder is full."""
    tally, chance = Tally("no room for temporary files"), kit.random("tmp")
    for _ in range(tries):
        root, folder = kit.copy(), kit.room()
        shutil.rmtree(root / "export")
        _forget(root, "int8", "engine", "validate", "gate", "report", "onnx")
        with small_disk(folder, chance.choice((4096, 16384, 65536))) as remount:
            if remount is None:
                continue
            outcome = processes.run(*kit.run(root), before=lambda folder=folder: _temporary_files_in(folder))
        tally.count(outcome.wrong(2, 0, 1) or kit.damaged(root) or kit.continued(root))
    return tally


def _temporary_files_in(folder: Path) -> None:
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None


def _forget(root: Path, *steps: str) -> None:
    from nayer_edge.storage.run_folder import RunFolder

    run = RunFolder.open(root)
    for step in steps:
        forgotten = run.forget(step)
        run.remove_leftovers(forgotten)


def read_only(kit: Kit, tries: int) -> Tally:
    """A read-only run folder: reading commands work; writing commands report it and change nothing."""
    tally, chance = Tally("read-only folders"), kit.random("read only")
    kit.folder.chmod(0o755)
    for _ in range(tries):
        root = kit.copy()
        before = _state(root)
        command, codes = chance.choice(
            [
                (["verify", root], (0,)),
                (["gate", root], (0, 1)),
                (["sbom", root], (0,)),
                (["run", kit.recipe, "--out", root, "--set", "gate.accuracy.max_drop_vs_fp32=0.5"], (2,)),
                (["run", kit.recipe, "--out", root, "--fresh"], (2,)),
                (["validate", root, "--synthetic"], (2,)),
                (["run", kit.recipe, "--out", root / "below"], (2,)),
            ]
        )
        outcome = processes.run(*command, before=lambda root=root: _without_rights(root))
        wrong = outcome.wrong(*codes)
        if not wrong and _state(root) != before:
            wrong = "the folder was changed"
        tally.count(wrong, " ".join(str(part) for part in command[:1]))
    return tally


def _without_rights(root: Path) -> None:
    """In a child: makes the folder read-only and drops privileges."""
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _state(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def no_memory(kit: Kit, tries: int) -> Tally:
    """A memory limit, from almost nothing to almost enough (RLIMIT_AS); without it, the same command resumes."""
    tally, chance = Tally("no memory for the bank, or for anything"), kit.random("memory")
    for _ in range(tries):
        root, room = kit.room(), chance.choice((4, 16, 48, 96, 160)) * 2**20
        outcome = processes.run(*kit.run(root), before=lambda room=room: _little_memory(room))
        # A native library that does not check its allocations ends the process, like a kill.
        wrong = outcome.wrong(3, 0, 1, -signal.SIGSEGV, -signal.SIGABRT) or kit.damaged(root)
        if not wrong and outcome.code == 3 and "memory" not in outcome.err:
            wrong = f"another reason: {outcome.err}"
        tally.count(wrong or kit.continued(root), f"{room >> 20} MiB more")
        shutil.rmtree(root, ignore_errors=True)
    return tally


def _little_memory(room: int) -> None:
    checkpoint_often()
    limit_memory(room)


def limit_memory(room: int) -> None:
    """In a child: limits the additional address space, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _wrong_write(kit: Kit, root: Path, outcome: processes.Outcome) -> str:
    """What is wrong after a write that may have failed; empty if nothing is."""
    wrong = outcome.wrong(2, 0, 1) or kit.damaged(root)
    if not wrong and outcome.code == 2 and "Cannot write" not in outcome.err:
        wrong = f"another reason: {outcome.err}"
    return wrong


def _limited(kind: int, limit: int) -> Callable[[], None]:
    def arm() -> None:
        checkpoint_often()
        resource.setrlimit(kind, (limit, limit))

    return arm
