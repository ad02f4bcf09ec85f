"""Children of a process that has imported everything: a command runs as in a process of its own, seconds sooner.

Importing torch, ONNX and the exporter takes many times what the smallest run takes. So this process imports them once,
with one thread and without computing anything (no OpenMP or autograd thread exists that a child would miss), and forks
for every command. A child ends with `os._exit`, because destructors of libraries would join threads that only the
parent has. That a child computes what `python -m nayer_edge` computes is one of the tries (`killed`).
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
"""seconds of the processor, or a fifth of those of the clock, after which a child is said to hang"""

HEAVY = (
    *(
        f"nayer_edge.pipelines.{name}"
        for name in ("cli", "distill", "deploy", "validate", "gate.verdict", "report.page", "show")
    ),
    *(
        f"nayer_edge.pipelines.{name}"
        for name in ("bench", "report.charts", "image_grid", "trust.signing", "trust.sbom")
    ),
    *("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnxscript.function_libs.torch_lib.ops"),
    *("onnxruntime.quantization", "networkx", "jinja2"),
    *("sklearn.datasets", "sklearn.model_selection", "PIL.Image", "PIL.ImageFont"),
    *("cyclonedx.output.json", "cyclonedx.validation.json", "packageurl", "model_signing"),
)
"""modules whose imports take most of a command's time"""


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        code: exit code; minus the signal's number where one killed it.
        out, err: what it wrote.
        seconds: how long it ran.
        hung: it was still running after the limit, and was killed.
    """

    code: int
    out: str
    err: str
    seconds: float
    hung: bool

    def wrong(self, *codes: int) -> str:
        """What is wrong with this end where one of these exit codes was due; empty where nothing is."""
        last = (self.err.strip().splitlines() or ["nothing on standard error"])[-1]
        if self.hung:
            return "it hangs"
        if "Traceback" in self.err + self.out:
            return f"a traceback: {(self.err + self.out).strip()[-2000:]}"
        if "does not expect" in self.err:
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
    """The command line in a child.

    Args:
        before: called in the child before the command.
        during: called in the parent with the child's id and its age in seconds, again and again; returns in how many
            seconds it wants to be called next, None for never.
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
    """Any work in a child; its exit code is that of its SystemExit, 70 after another exception."""
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
    """Waits for a child's end; kills it, and returns False, where it hangs.

    A busy machine is no hang: one that works is given so many seconds of the processor, one that waits five times as
    many of the clock.
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
    """A command in a child that nobody waits for yet; its id. `finish` waits."""

    def command() -> None:
        from nayer_edge.pipelines import cli

        before()
        cli.main([str(argument) for argument in arguments])

    return begin(command)


def begin(work: Callable[[], object], *, quiet: bool = True) -> int:
    """Any work in a child that nobody waits for yet; its id.

    Args:
        quiet: nobody reads its output.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        _work(work, null if quiet else 1, null if quiet else 2)
    return child


def finish(child: int) -> int:
    """Waits for a child of `start`; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at(moment: float, number: int) -> Callable[[int, float], float | None]:
    """Sends a signal at a moment of a child's life, in seconds."""

    def during(child: int, age: float) -> float | None:
        if age < moment:
            return moment - age
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
        return None

    return during


def import_what_commands_import() -> None:
    """Imports here what any command may import, without computing anything."""
    for name in HEAVY:
        importlib.import_module(name)


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for the children of a block."""
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
    """Names of this process's threads."""
    return [
        (Path("/proc/self/task") / task / "comm").read_text().strip()
        for task in os.listdir("/proc/self/task")  # noqa: PTH208
    ]
