"""The work on a student as a task, and where tasks run: here, one after the other, or in parallel on several GPUs.
`on_ray.py` has a third place, a Ray cluster.

In other processes, a student is only planned and trained. Its export, validation and verdict are made by the process of
the sweep, one student at a time: latencies then come from one machine that does nothing else, and hold-out images stay
on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from nayer_edge.errors import (
    IntegrityError,
    MissingError,
    NayerEdgeError,
    TrainingError,
    UsageError,
    understood,
    unexpected,
)
from nayer_edge.models import user_code
from nayer_edge.storage.files import write_json

from .. import actions
from ..costs.budget import Costs
from ..costs.planning import PlanningCosts, measured_for
from ..recipes.schema import Recipe

if TYPE_CHECKING:
    from ..show import Display

SECTIONS = ("lte", "generator", "synthesis", "distill", "budget")
"""parts of a recipe that a plan fills in"""
POLL = 0.1
"""seconds between checks of running processes"""
_ERRORS = {kind.__name__: kind for kind in (UsageError, MissingError, IntegrityError, TrainingError)}


@dataclass(frozen=True)
class Task:
    """Work on one student.

    Attributes:
        recipe: of its run, with absolute paths.
        root: its run folder.
        measure: measure the steps of the run, and write nothing; False: train the student as the recipe says.
        trust_code: whether `python:` models may run.
        seconds: of the share that the work belongs to; None if it belongs to none.
    """

    recipe: Recipe
    root: Path
    measure: bool = False
    trust_code: bool = False
    seconds: float | None = None

    def do(self, last: str = "student", display: Display | None = None, known: Costs | None = None) -> Result:
        """Does the work in this process.

        Args:
            last: the last step of the run.
            known: costs of another student here; what does not depend on the student is not measured again.
        """
        began = time.monotonic()
        measured, error, trace = None, None, ""
        try:
            with user_code.trusting(self.trust_code):
                if self.measure:
                    measured = measured_for(self.recipe, known)
                else:
                    actions.make(self.recipe, self.root, last=last, display=display)
        except Exception as failure:  # noqa: BLE001  one student must not end the others
            error, trace = failure_of(failure)
        return Result(time.monotonic() - began, measured, error, trace)

    def packed(self) -> dict[str, Any]:
        """As JSON can hold it."""
        recipe = self.recipe.model_dump(mode="json", by_alias=True)
        return {
            "recipe": recipe,
            "root": str(self.root.absolute()),
            "measure": self.measure,
            "trust_code": self.trust_code,
            "seconds": self.seconds,
        }

    @classmethod
    def unpacked(cls, values: Mapping[str, Any]) -> Task:
        """Of `packed`."""
        recipe = Recipe.model_validate(values["recipe"])
        return cls(recipe, Path(values["root"]), values["measure"], values["trust_code"], values["seconds"])


@dataclass(frozen=True)
class Result:
    """What became of a task.

    Attributes:
        seconds: that it took.
        measured: what the run can be planned from, if that was asked for.
        error: why it failed.
        traceback: where, if the error is unexpected.
    """

    seconds: float
    measured: PlanningCosts | None = None
    error: NayerEdgeError | None = None
    traceback: str = ""

    def packed(self) -> dict[str, Any]:
        """As JSON can hold it."""
        error = self.error
        told = error and {"kind": type(error).__name__, "words": [error.what, error.why, error.fix]}
        return {
            "seconds": self.seconds,
            "measured": self.measured and asdict(self.measured),
            "error": told,
            "traceback": self.traceback,
        }

    @classmethod
    def unpacked(cls, values: Mapping[str, Any]) -> Result:
        """Of `packed`."""
        told, measured = values["error"], values["measured"]
        error = None if told is None else _ERRORS.get(told["kind"], NayerEdgeError)(*told["words"])
        return cls(
            values["seconds"], PlanningCosts.unpacked(measured) if measured else None, error, values["traceback"]
        )


def failure_of(error: Exception) -> tuple[NayerEdgeError, str]:
    """The error of one student as one that can be told, and its traceback if it is unexpected."""
    if (told := understood(error, "This student")) is not None:
        return told, ""
    return unexpected(error), "".join(traceback.format_exception(error))


def sections_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The parts of a recipe that a plan fills in."""
    values = recipe.model_dump(mode="json", by_alias=True)
    return {name: values[name] for name in SECTIONS if values[name] is not None}


class Here:
    """Tasks one after the other, in this process; a run is also exported and judged."""

    last: ClassVar[Literal["gate"]] = "gate"
    at_once: ClassVar[Literal[1]] = 1

    def __init__(self, display: Display | None) -> None:
        self._display = display
        self.started: dict[str, float] = {}
        """task → when it started, on the monotonic clock; of tasks without a result"""

    def run(self, tasks: Mapping[str, Task]) -> Generator[tuple[str, Result]]:
        """The results of tasks by name, as they come in."""
        known = None
        for name, task in tasks.items():
            self.started[name] = time.monotonic()
            result = task.do(self.last, self._display, known)
            del self.started[name]
            known = result.measured.costs if result.measured else known
            yield name, result


class OnDevices:
    """Tasks in parallel, each in a process of its own that sees one GPU.

    Args:
        devices: as in CUDA_VISIBLE_DEVICES, one for every process that may run at a time.
    """

    last: ClassVar[Literal["student"]] = "student"

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = list(devices)
        self.started: dict[str, float] = {}
        """as of `Here`"""

    @property
    def at_once(self) -> int:
        """Number of tasks that run at a time."""
        return len(self._devices)

    def run(self, tasks: Mapping[str, Task]) -> Generator[tuple[str, Result]]:
        """The results of tasks by name, as they come in. If it is not read to the end, the processes are told to save
        their work and end."""
        waiting, free = list(tasks.items()), list(self._devices)
        running: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as ending:
            ending.callback(_end, running)
            while waiting or running:
                while waiting and free:
                    name, task = waiting.pop(0)
                    device = free.pop(0)
                    self.started[name] = time.monotonic()
                    running[name] = _started(task, device, Path(scratch), name), device
                ended = [name for name, (process, _) in running.items() if process.poll() is not None]
                for name in ended:
                    process, device = running.pop(name)
                    free.append(device)
                    yield name, _read(process, Path(scratch), name, time.monotonic() - self.started.pop(name))
                if not ended:
                    time.sleep(POLL)


def gpus(device: Literal["auto", "cpu", "cuda"]) -> list[str]:
    """The GPUs that processes of a recipe with this device may use, as in CUDA_VISIBLE_DEVICES."""
    count = 0 if device == "cpu" else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in visible.split(",")][:count] if visible else [str(n) for n in range(count)]


def _file(scratch: Path, name: str, kind: str) -> Path:
    return scratch / f"{hashlib.sha256(name.encode()).hexdigest()}.{kind}"


def _started(task: Task, device: str, scratch: Path, name: str) -> subprocess.Popen[bytes]:
    order, log = _file(scratch, name, "task"), _file(scratch, name, "log")
    write_json(order, task.packed())
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "nayer_edge.pipelines.sweep.workers", order, _file(scratch, name, "result")],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C reaches it once, through `_end`: at a second signal it would lose an epoch.
            start_new_session=True,
        )


def _read(process: subprocess.Popen[bytes], scratch: Path, name: str, seconds: float) -> Result:
    """The result of a process that ended after so many seconds."""
    answer = _file(scratch, name, "result")
    if answer.is_file():
        return Result.unpacked(json.loads(answer.read_text(encoding="utf-8")))
    log = _file(scratch, name, "log").read_text(encoding="utf-8", errors="replace").strip()
    code = process.returncode
    return Result(
        seconds,
        error=MissingError(
            f"The process of {name} was ended by signal {-code}."
            if code < 0
            else f"The process of {name} ended with code {code}.",
            why=log.splitlines()[-1] if log else "",
            fix="It may have run out of memory. Repeat the command to resume.",
        ),
    )


def _end(running: Mapping[str, tuple[subprocess.Popen[bytes], str]]) -> None:
    processes = [process for process, _ in running.values()]
    for process in processes:
        process.send_signal(signal.SIGINT)
    try:
        for process in processes:
            process.wait()
    finally:
        # A second Ctrl-C.
        for process in processes:
            process.kill()


def main(order: str, answer: str) -> None:
    """Does the task in one file and writes its result to another."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    result = Task.unpacked(json.loads(Path(order).read_text(encoding="utf-8"))).do()
    write_json(Path(answer), result.packed())


if __name__ == "__main__":
    main(*sys.argv[1:])
