"""What the tests of the pipelines share: a copy of the finished run, and three ways to call the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from nayer_edge.pipelines.cli import main
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "transformers", "tensorrt", "sklearn", "PIL", "scipy")

BLOCKER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""

# Each command writes into files of its own, under the numbers of the standard streams, and finds the same environment.
EACH = """
import json, os, sys, tempfile
from nayer_edge.__main__ import main

kept, environment, answers = (os.dup(1), os.dup(2)), dict(os.environ), []
for arguments in json.loads(sys.argv[1]):
    sys.argv, code = ["nayer-edge", *arguments], None
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        said = [file.seek(0) or file.read().decode() for file in (out, err)]
    answers.append([code, *said, sorted({name.partition(".")[0] for name in sys.modules})])
    os.environ.clear()
    os.environ.update(environment)
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str
    packages: frozenset[str] = frozenset()
    """what its process had imported by then, where that is known"""


class StopsAfter(Silent):
    """A listener that interrupts after so many steps: as Ctrl-C does, or at once as a second one does."""

    def __init__(self, steps: int, *, at_once: bool = False) -> None:
        self.left, self.at_once = steps, at_once

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left < 0 and self.at_once:
            raise KeyboardInterrupt
        if self.left < 0 <= self.left + count:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="session")
def stops_after() -> type[StopsAfter]:
    """The listener `StopsAfter(steps, at_once=False)`."""
    return StopsAfter


@pytest.fixture(scope="session")
def example() -> Callable[[str], str]:
    """The Python example in a section of docs/DEPLOYING.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "DEPLOYING.md").read_text(encoding="utf-8")

    def of(section: str) -> str:
        (part,) = re.findall(rf"^## {section}\n(.+?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        (code,) = re.findall(r"```python\n(.+?)```", part, re.DOTALL)
        return code

    return of


@pytest.fixture
def finished(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be altered."""
    return Path(shutil.copytree(tiny_run, tmp_path / "runs" / "digits"))


@pytest.fixture
def begun(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run as it was before its student: the teacher and the label embeddings."""
    root = tmp_path / "a run"
    root.mkdir()
    shutil.copytree(tiny_run / "teacher", root / "teacher")
    for name in ("lte.safetensors", MANIFEST):
        shutil.copy(tiny_run / name, root / name)
    run = RunFolder.open(root)
    for step in list(run.manifest.steps)[2:]:
        run.forget(step)
    return root


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Answer]]:
    """Calls the command line in this process."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name in ("NAYER_EDGE_DEBUG", "_TYPER_FORCE_DISABLE_TERMINAL"):
        monkeypatch.setenv(name, "")

    def call(*arguments: str | Path) -> Answer:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        code = ended.value.code
        return Answer(code if isinstance(code, int) else 1, captured.out, captured.err)

    yield call
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def spawn() -> Callable[..., Answer]:
    """Calls the command line in a process of its own."""

    def call(*arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Answer:
        done = subprocess.run(
            [sys.executable, "-m", "nayer_edge", *map(str, arguments)],
            env={**os.environ, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def spawn_each() -> Callable[..., list[Answer]]:
    """Calls several commands, one after the other, in one process of their own: starting it takes longer than they do.

    `before` is Python code that runs first; `under` is what starts the process instead of this one.
    """

    def call(
        *commands: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        before: str = "",
        under: Sequence[str] = (),
    ) -> list[Answer]:
        told = json.dumps([list(map(str, command)) for command in commands])
        done = subprocess.run(
            [*under, sys.executable, "-c", before + EACH, told],
            env={**os.environ, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        answers = [Answer(code, out, err, frozenset(names)) for code, out, err, names in json.loads(done.stdout)]
        assert len(answers) == len(commands)
        return answers

    return call


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An environment in whose Python processes the named modules cannot be imported."""

    def make(*blocked: str) -> dict[str, str]:
        folder = tmp_path / "blocker"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked or HEAVY))
        return {"PYTHONPATH": str(folder)}

    return make
