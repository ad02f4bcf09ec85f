"""The students of a sweep as tasks of a Ray cluster. Ray places them, and starts them again when a worker dies.

Every task declares its CPUs, GPU and memory. A worker that sees the sweep's folder and its bank works in that folder.
Otherwise the files of a run travel through Ray's object store, each content once, and come back when the student is
trained. A task that is started again resumes from the last checkpoint: always in a shared folder, otherwise if it is
again on the same machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from nayer_edge import __version__
from nayer_edge.errors import MissingError, UsageError, missing_extra
from nayer_edge.storage.files import sha256_of, write_bytes, write_json
from nayer_edge.storage.run_folder import LOCK, MANIFEST, RunFolder

from .. import actions, shared_bank
from ..distill import metrics_of
from .workers import Result, Task, failure_of

Cluster: TypeAlias = Any
"""the module `ray`, connected"""
Files: TypeAlias = Mapping[str, Any]
"""path in a folder → its bytes as a uint8 array, or a reference to that in the object store"""

RETRIES = 3
"""how often Ray restarts a task whose worker died"""
LOOK = 60.0
"""seconds between checks of the cluster while no task finishes"""
OWN_MIB = 1024
"""MiB that a worker gets in addition to the peak memory of the run that made the bank"""
MARK = "ray.mark"
"""file in the sweep's folder while the workers are asked whether they see it"""
WORKERS = "ray.workers"
"""file in the sweep's folder: names its folder on the workers, so that a repeated command finds their checkpoints"""
FILES = (MARK, WORKERS)
SAVING = 120.0
"""seconds that interrupted tasks may take to save their work"""
BANK_COPY = "bank-of-the-sweep"
"""folder of the bank's manifest and teacher on a worker that does not see the bank"""


@contextlib.contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """A connection to a Ray cluster; with "local", to one that is started on this machine and ends with it.

    Raises:
        MissingError: Ray is not installed.
        UsageError: there is no such cluster, it runs another version, or Ray cannot write to the home folder.
    """
    # Read when ray is imported.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise missing_extra((error.name or "ray").partition(".")[0], "ray", "--ray") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except Exception as error:
        raise _explained(error, address, ray.__version__) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _explained(error: Exception, address: str, version: str) -> UsageError:
    """Why there is no connection."""
    links, link = [], error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    told = " ".join(" ".join(f"{each}" for each in links).split())
    if any(type(each).__name__ == "AuthenticationError" for each in links):
        return UsageError(
            f"The Ray cluster at {address} requires an authentication token.",
            why="Ray reads it from ~/.ray/auth_token or from the file named by RAY_AUTH_TOKEN_PATH.",
            fix="On the cluster's head: ray get-auth-token. Copy the file, and repeat the command "
            "with RAY_AUTH_MODE=token set.",
        )
    if "mismatch" in told.lower():
        return UsageError(
            f"The Ray cluster at {address} has another version of Ray or Python.",
            why=told,
            fix=f"Both must be the same; Ray is {version} here. Install the cluster's: pip install 'ray==…'",
        )
    # ConnectionError is an OSError, too.
    unwritable = isinstance(error, OSError) and not isinstance(error, ConnectionError)
    named, home = str(getattr(error, "filename", None) or ""), os.environ.get("HOME", "")
    if unwritable and named and not (home and Path(named).is_relative_to(home)):
        return UsageError(
            f"Ray cannot write to {named}.",
            why=told[:400],
            fix="Free some space there, or remove what another user left.",
        )
    if unwritable or "home directory" in told:
        return UsageError(
            f"Ray cannot write to the home folder ({os.environ.get('HOME') or 'HOME is not set'}).",
            why=f"It keeps a token for its clusters there: {told}",
            fix="Set HOME to a folder that can be written: HOME=/tmp/ray-home nayer-edge sweep …",
        )
    return UsageError(
        f"There is no connection to a Ray cluster at {address}.",
        why=told[:400],
        fix="Start one with `ray start --head`, see it with `ray status`, or try it on this machine: --ray local",
    )


@dataclass(frozen=True)
class Node:
    """A machine of the cluster and what it has."""

    id: str
    name: str
    cpus: int
    gpus: int
    memory: float


@dataclass(frozen=True)
class Needs:
    """What a task declares: cores, GPUs, and bytes of memory."""

    cpus: int
    gpus: int
    memory: int

    def met_by(self, node: Node) -> bool:
        """Whether a machine can run such a task."""
        return node.cpus >= self.cpus and node.gpus >= self.gpus and node.memory >= self.memory


def needs_of(
    nodes: Sequence[Node], students: int, memory: int, device: Literal["auto", "cpu", "cuda"]
) -> tuple[Needs, int]:
    """What each student declares, and how many fit at a time: one per GPU if there are GPUs, else as many as there are
    students, with equal parts of the cores.

    Args:
        memory: bytes of each.

    Raises:
        UsageError: no machine of the cluster can train a student.
    """
    gpus = int(device == "cuda" or (device == "auto" and any(node.gpus for node in nodes)))
    least = Needs(1, gpus, memory)
    suited = [node for node in nodes if least.met_by(node)]
    if not suited:
        have = "; ".join(f"{n.name}: {n.cpus} cores, {n.gpus} GPUs, {n.memory / 2**30:.1f} GiB" for n in nodes)
        raise UsageError(
            "No machine of the Ray cluster can train a student.",
            why=f"It needs a core, {'a GPU, ' if gpus else ''}and {memory / 2**30:.1f} GiB of memory. {have}.",
            fix="Add such a machine, or train here, without --ray.",
        )
    if gpus:
        cpus = max(1, min(node.cpus // node.gpus for node in suited))
        return replace(least, cpus=cpus), sum(min(node.gpus, node.cpus // cpus) for node in suited)
    cpus = max(1, min(sum(node.cpus for node in suited) // max(students, 1), max(node.cpus for node in suited)))
    return replace(least, cpus=cpus), sum(min(node.cpus // cpus, int(node.memory // memory)) for node in suited)


class OnRay:
    """Tasks on the workers of a cluster.

    Args:
        out: the folder of the sweep.
        bank: the run whose images the students start with.
        device: of the recipe.
        students: number of students in the first round.

    Raises:
        UsageError: no machine can run a task, or one has another version of nayer-edge.
        MissingError: a machine lacks nayer-edge.
    """

    last: ClassVar[Literal["student"]] = "student"

    def __init__(
        self, ray: Cluster, out: Path, bank: Path, device: Literal["auto", "cpu", "cuda"], students: int
    ) -> None:
        self._ray, self._out, self._bank = ray, out, bank
        nodes = _nodes(ray)
        self.needs, fitting = needs_of(nodes, students, memory_of(bank), device)
        # At least two: a task may run on a worker that does not share this machine's files.
        self.at_once = max(fitting, 2)
        self._look, self._work = _functions(ray)
        self.started: dict[str, float] = {}
        """as of `Here`, without the time in the cluster's queue"""
        self._held: dict[str, Any] = {}
        self._token = _token(out)
        self.shared = self._examine([node for node in nodes if self.needs.met_by(node)])
        gpu = ", 1 GPU" if self.needs.gpus else ""
        files = "in this folder" if self.shared else "with their files sent through the object store"
        self.described = (
            f"Ray: up to {fitting} students at a time, each with {self.needs.cpus} cores{gpu} and "
            f"{self.needs.memory / 2**30:.1f} GiB, {files}."
        )

    def _examine(self, nodes: Sequence[Node]) -> bool:
        """Whether all machines see the sweep's folder and the bank; raises if one cannot work."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

        token = self._out / MARK
        write_bytes(token, self._token.encode())
        places = [str(token.resolve()), str((self._bank / MANIFEST).resolve())]
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            asked[node] = self._look.options(num_cpus=0, scheduling_strategy=there).remote(places)
        try:
            answers = {node: self._ray.get(answer) for node, answer in asked.items()}
        except self._ray.exceptions.RayError as error:
            raise UsageError(
                "A machine of the Ray cluster does not answer.",
                why=" ".join(f"{error}".split())[:400],
                fix="See `ray status`.",
            ) from error
        finally:
            token.unlink(missing_ok=True)
        for node, answer in answers.items():
            _require_installed(node, answer)
        here = [self._token, sha256_of(self._bank / MANIFEST)]
        return all(answer["seen"] == here for answer in answers.values())

    def run(self, tasks: Mapping[str, Task]) -> Generator[tuple[str, Result]]:
        """The results of tasks by name, as they come in. If it is not read to the end, the tasks are told to save their
        work and end."""
        running: dict[Any, str] = {}
        # The files of students change from round to round, and those of the bank are sent again.
        self._held.clear()
        try:
            for name, task in tasks.items():
                try:
                    running[self._start(task)] = name
                except Exception as failure:  # noqa: BLE001  the others go on
                    told, traceback = failure_of(failure)
                    yield name, Result(0.0, error=told, traceback=traceback)
            while running:
                ready, _ = self._ray.wait(list(running), num_returns=1, timeout=LOOK)
                for answers in ready:
                    name, now = running[answers], time.monotonic()
                    result = self._result(next(answers), name, tasks[name], now - self.started.get(name, now))
                    if result is None:
                        self.started[name] = now
                        continue
                    del running[answers]
                    self.started.pop(name, None)
                    yield name, result
                if not ready and not any(self.needs.met_by(node) for node in _nodes(self._ray)):
                    raise UsageError(
                        "The Ray cluster has no machine left that can train a student.",
                        fix="Add one, or continue here: repeat the command without --ray.",
                    )
        finally:
            for answers in running:
                self._ray.cancel(answers)
            if running:
                # They save their work, and a repeated command must not meet a run that is still locked.
                self._ray.wait([each.completed() for each in running], num_returns=len(running), timeout=SAVING)

    def _start(self, task: Task) -> Any:
        needs = self.needs
        work = self._work.options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory, max_retries=RETRIES, retry_exceptions=False
        )
        if self.shared:
            return work.remote(task.packed(), None, "")
        return work.remote(task.packed(), self._sent(task), self._token)

    def _sent(self, task: Task) -> dict[str, Any]:
        """The files of a task as references into the object store."""
        bank = RunFolder.open(self._bank)
        teacher = bank.artifact("teacher").files.values()
        found = {f"{BANK_COPY}/{name}": bank.path(name) for name in (MANIFEST, *teacher)}
        if not task.measure:
            # After this the run needs nothing of the bank but its manifest.
            run = actions.make(task.recipe, task.root, last="lte")
            if task.recipe.student.bank is not None and "student" not in run.manifest.steps:
                shared_bank.take_over(task.recipe, run)
            found |= {f"run/{name}": path for name, path in _files_in(task.root).items()}
        return {name: self._put(path) for name, path in found.items()}

    def _put(self, path: Path) -> Any:
        digest = sha256_of(path)
        if digest not in self._held:
            self._held[digest] = self._ray.put(np.fromfile(path, dtype=np.uint8))
        return self._held[digest]

    def _result(self, answer: Any, name: str, task: Task, seconds: float) -> Result | None:
        """What an answer of a task says; None if it says that the task begins."""
        try:
            if (found := self._ray.get(answer)) is None:
                return None
            values, files = found
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            told, traceback = failure_of(cause if isinstance(cause, Exception) else error)
            return Result(seconds, error=told, traceback=traceback)
        except self._ray.exceptions.RayError as error:
            return Result(
                seconds,
                error=MissingError(
                    f"The worker of {name} died {RETRIES + 1} times.",
                    why=" ".join(f"{error}".split())[:400],
                    fix="It may have run out of memory. Repeat the command to resume.",
                ),
            )
        if files is not None:
            _replace(task.root, files)
        return timed_here(Result.unpacked(values), task, seconds)


def timed_here(result: Result, task: Task, seconds: float) -> Result:
    """A worker's result with the seconds since its task began. The worker knows only those of its own attempt, not of
    those that ended with another worker; but its task may have waited between them, so no more than its share counts.

    Args:
        seconds: since the first attempt began, as seen by the process of the sweep.
    """
    return replace(result, seconds=max(result.seconds, min(seconds, task.seconds or 0.0)))


def memory_of(bank: Path) -> int:
    """Bytes that the training of a student may need: what the run that made the bank needed, and `OWN_MIB`."""
    return round((max(float(line["memory_mib"]) for line in metrics_of(bank)) + OWN_MIB) * 2**20)


def do_with_files(values: Mapping[str, Any], files: Files, token: str, get: Any) -> tuple[dict[str, Any], Files | None]:
    """Does a task on a worker that does not see the sweep's folder.

    Args:
        files: see `OnRay._sent`.
        token: of the sweep, so that a task that is started again finds its folder.
        get: reads a reference.

    Returns:
        The packed result, and the files of the run if it was trained.
    """
    task = Task.unpacked(values)
    base = Path(tempfile.gettempdir()) / f"nayer-edge-{token}" / task.root.name
    base.parent.mkdir(mode=0o700, exist_ok=True)
    begun = base / "begun.json"
    if not begun.is_file() or json.loads(begun.read_text(encoding="utf-8")) != dict(values):
        shutil.rmtree(base, ignore_errors=True)
        for name, reference in files.items():
            path = base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, get(reference).tobytes())
        write_json(begun, dict(values))
    # The run that made the bank needs none.
    recipe = task.recipe if task.recipe.student.bank is None else actions.on_bank(task.recipe, base / BANK_COPY)
    result = replace(task, recipe=recipe, root=base / "run").do()
    made = None
    if not task.measure and result.error is None:
        made = {name: np.fromfile(path, dtype=np.uint8) for name, path in _files_in(base / "run").items()}
    if result.error is None:
        shutil.rmtree(base, ignore_errors=True)
        with contextlib.suppress(OSError):
            # The last student's.
            base.parent.rmdir()
    return result.packed(), made


def _functions(ray: Cluster) -> tuple[Any, Any]:
    """What runs on the workers: whether they can work, and the work, which says with a first answer that it begins. As
    nested functions they travel by value, so that the first one runs where nayer-edge is not installed."""

    def look(places: list[str]) -> dict[str, Any]:
        import hashlib
        import importlib.util
        import pathlib

        try:
            import nayer_edge

            version = nayer_edge.__version__
        except ImportError:
            return {"version": None, "torch": False, "seen": []}
        seen = []
        for place in places:
            path = pathlib.Path(place)
            held = path.read_bytes() if path.is_file() else b""
            seen.append(hashlib.sha256(held).hexdigest() if path.suffix == ".json" else held.decode())
        return {"version": version, "torch": importlib.util.find_spec("torch") is not None, "seen": seen}

    def work(values: dict[str, Any], files: dict[str, Any] | None, token: str) -> Iterator[Any]:
        yield None
        import ray  # pyright: ignore[reportMissingImports]

        from .on_ray import do_with_files
        from .workers import Task

        if files is None:
            yield Task.unpacked(values).do().packed(), None
        else:
            yield do_with_files(values, files, token, ray.get)

    return ray.remote(look), ray.remote(work)


def _nodes(ray: Cluster) -> list[Node]:
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            counts = int(has.get("CPU", 0)), int(has.get("GPU", 0)), float(has.get("memory", 0))
            found.append(Node(node["NodeID"], name, *counts))
    return found


def _require_installed(node: Node, answer: Mapping[str, Any]) -> None:
    install = "Install the same version in the environment of Ray's workers: pip install '.[cpu,ray]'"
    if answer["version"] is None or not answer["torch"]:
        what = "nayer-edge" if answer["version"] is None else "PyTorch"
        raise MissingError(f"{what} is not installed on {node.name}, a machine of the Ray cluster.", fix=install)
    if answer["version"] != __version__:
        raise UsageError(
            f"{node.name}, a machine of the Ray cluster, has another version of nayer-edge.",
            why=f"It has {answer['version']}, and this is {__version__}.",
            fix=install,
        )


def _files_in(root: Path) -> dict[str, Path]:
    """The files of a run folder by their path in it."""
    return {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def _replace(root: Path, files: Files) -> None:
    """Replaces a run folder by the files that came back, all or none of them."""
    new, former = _beside(root, "new"), _beside(root, "former")
    shutil.rmtree(new, ignore_errors=True)
    for name, content in files.items():
        path = new / name
        if not path.resolve().is_relative_to(new.resolve()):
            raise UsageError(f"A worker sent a file outside of its run: {shlex.quote(name)}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.tobytes())
    root.rename(former)
    new.rename(root)
    shutil.rmtree(former)


def recover(root: Path) -> None:
    """Ends a replacement that was interrupted between its two renames: by then the new files are complete."""
    new, former = _beside(root, "new"), _beside(root, "former")
    if not former.is_dir():
        return
    if not root.exists():
        (new if new.is_dir() else former).rename(root)
    shutil.rmtree(former, ignore_errors=True)


def _token(out: Path) -> str:
    """The sweep's token, random and kept in its folder."""
    path = out / WORKERS
    held = path.read_text(encoding="ascii", errors="replace") if path.is_file() else ""
    if not re.fullmatch(r"[0-9a-f]{32}", held):
        held = secrets.token_hex(16)
        write_bytes(path, held.encode())
    return held


def _beside(root: Path, kind: str) -> Path:
    return root.with_name(f"{root.name}.{kind}")
