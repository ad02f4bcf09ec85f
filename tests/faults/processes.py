"""Runs commands in forked children of a process that has imported everything, which saves seconds per command.

Importing torch, ONNX and the exporter takes many times longer than the smallest run. So this process imports them once,
with one thread and without computing anything (so there are no OpenMP or autograd threads that a child would lack), and
forks for every command. A child ends with `os._exit`, because library destructors would join threads that exist only in
the parent. The kind `killed` checks that a child computes the same as `python -m nayer_edge`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 60.0
"""CPU seconds, or a fifth of the wall-clock seconds, after which a child counts as hanging"""

HEAVY = (
    *(
        f"nayer_edge.pipelines.{name}"
        for name in ("cli", "distill", "deploy", "validation.validate", "gate.verdict", "report.page", "show")
    ),
    *(
        f"nayer_edge.pipelines.{name}"
        for name in ("costs.bench", "report.charts", "image_grid", "trust.signing", "trust.sbom")
    ),
    *("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnxscript.function_libs.torch_lib.ops"),
    *("onnxruntime.quantization", "networkx", "jinja2"),
    *("sklearn.datasets", "sklearn.model_selection", "PIL.Image", "PIL.ImageFont"),
    *("cyclonedx.output.json", "cyclonedx.validation.json", "packageurl", "model_signing"),
)
"""modules whose imports take most of the time of a command"""


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        code: exit code, or minus the number of the signal that killed it.
        out, err: its output.
        seconds: its duration.
        hung: whether it exceeded the limit and was killed.
    """

    code: int
    out: str
    err: str
    seconds: float
    hung: bool

    def wrong(self, *codes: int) -> str:
        """What is wrong with this outcome if one of these exit codes was expected; empty if nothing is."""
        last = (self.err.strip().splitlines() or ["nothing on standard error"])[-1]
        if self.hung:
            return "it hangs"
        if "Traceback" in self.err + self.out:
            return f"a traceback: {(self.err + self.out).strip()[-2000:]}"
        if "Unexpected internal error" in self.err:
            return f"an error that nobody foresaw: {self.err.strip()}"
        if self.code not in codes:
            return f"exit {self.code} instead of {' or '.join(map(str, codes))}: {self.err.strip() or last}"
        return ""


def run(
    *arguments: str | Path,
    timeout: float = TIMEOUT,
    before: Callable[[], object] = lambda: None,
    during: Callable[[int, float], float | None] | None = None,
) -> Outcome:
    """Runs the CLI in a child.

    Args:
        before: called in the child before the command.
        during: called repeatedly in the parent with the child's id and its age in seconds; returns the seconds until
            the next call, or None for no further call.
    """

    def command() -> None:
        from nayer_edge.pipelines import cli

        before()
        cli.main([str(argument) for argument in arguments])

    return fork(command, timeout=timeout, during=during)


def fork(
    work: Callable[[], object],
    *,
    timeout: float = TIMEOUT,
    during: Callable[[int, float], float | None] | None = None,
) -> Outcome:
    """Runs a function in a child, whose exit code is that of its SystemExit, or 70 after another exception."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _work(work, out.fileno(), err.fileno())
        handle = os.pidfd_open(child)
        try:
            hung = not _watch(child, handle, began, timeout, during)
        finally:
            os.close(handle)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return Outcome(os.waitstatus_to_exitcode(status), texts[0], texts[1], time.monotonic() - began, hung)


def _work(work: Callable[[], object], out: int, err: int) -> None:
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - whatever it is, the parent reads it
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


def _watch(
    child: int, handle: int, began: float, timeout: float, during: Callable[[int, float], float | None] | None
) -> bool:
    """Waits for a child to end; kills it and returns False if it hangs.

    On a busy machine a slow child does not count as hanging: the limit is in CPU seconds, or five times as many
    wall-clock seconds for a child that waits.
    """
    pause: float | None = 0.0 if during else None
    while True:
        wait = timeout / 20 if pause is None else min(timeout / 20, pause)
        if select.select([handle], [], [], max(wait, 0))[0]:
            return True
        age = time.monotonic() - began
        if age >= 5 * timeout or (age >= timeout and _processor_seconds(child) >= timeout):
            os.kill(child, signal.SIGKILL)
            return False
        if during is not None and pause is not None:
            pause = during(child, age)


def _processor_seconds(child: int) -> float:
    fields = (Path("/proc") / str(child) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(*arguments: str | Path, before: Callable[[], object] = lambda: None) -> int:
    """Starts a command in a child and returns its id at once; `finish` waits for it."""

    def command() -> None:
        from nayer_edge.pipelines import cli

        before()
        cli.main([str(argument) for argument in arguments])

    return begin(command)


def begin(work: Callable[[], object], *, quiet: bool = True) -> int:
    """Starts a function in a child and returns its id at once.

    Args:
        quiet: discard its output.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        _work(work, null if quiet else 1, null if quiet else 2)
    return child


def finish(child: int) -> int:
    """Waits for a child of `start` and returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at(moment: float, number: int) -> Callable[[int, float], float | None]:
    """Sends a signal when the child has run for the given seconds."""

    def during(child: int, age: float) -> float | None:
        if age < moment:
            return moment - age
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
        return None

    return during


def import_what_commands_import() -> None:
    """Imports the modules that any command may need, without computing anything."""
    for name in HEAVY:
        importlib.import_module(name)


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets environment variables for the children started in a block."""
    kept = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def threads() -> Sequence[str]:
    """Names of the threads of this process."""
    return [
        (Path("/proc/self/task") / task / "comm").read_text().strip()
        for task in os.listdir("/proc/self/task")  # noqa: PTH208
    ]
