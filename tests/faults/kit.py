"""Shared by all kinds of faults: a run of three seconds, its finished result, and the count of tries."""

from __future__ import annotations

import functools
import gc
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nayer_edge.pipelines.steps import NAMES
from nayer_edge.storage.run_folder import RunFolder

from . import processes

LAST = "int8"
"""the last step that makes a shipped artifact"""

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """
description = "the smallest run that has every step; what it makes is no good, and always the same"

[teacher]
model = "nayer:wrn_10_1"
classes = ["zero", "one", "two"]
input = {{ channels = 1, height = 8, width = 8 }}

[teach]
data = "{folder}/train.npz"
epochs = 3
batch = 64
augment = {{ pad = 1, flip = false }}

[lte]
encoder = "onehot"

[student]
model = "nayer:resnet8"

[generator]
noisy_dim = 32
channels = 8

[synthesis]
batch = 12
g_steps = 3
rounds = 1
warmup_rounds = 2
augment = {{ pad = 1, flip = false }}

[distill]
epochs = 6
warmup_epochs = 2
steps = 6
batch = 32
views = 4
bank_mib = 1
holdout_rounds = 1
augment = {{ pad = 1, flip = false }}

[export]
calibration_images = 12
calibration_method = "minmax"
max_drop = 1.0

[validate]
data = "{folder}/holdout.npz"
"""

SAME = (
    "teacher/teacher.safetensors",
    "student/student.safetensors",
    "generator/generator.safetensors",
    "bank.safetensors",
    "export/student.fp32.onnx",
    "export/student.int8.cpu.onnx",
    "export/quantization.json",
)
"""files of a run that must have the same bytes, whatever happened during the run"""


@dataclass
class Tally:
    """Counts the tries of a kind of fault, and the losses.

    A loss is lost finished work, an accepted altered file, executed code, a file written outside the folder, a hang,
    unbounded memory, or a traceback.
    """

    kind: str
    tries: int = 0
    losses: list[str] = field(default_factory=list)
    note: str = ""
    name: str = ""
    """name of the kind on the command line"""

    def count(self, wrong: str, what: str = "") -> None:
        """Counts a try; `wrong` describes the loss, and is empty if there is none."""
        self.tries += 1
        if wrong:
            self.losses.append(f"{what}: {wrong}" if what else wrong)


class Kit:
    """A recipe, its finished run without faults, and a folder for copies.

    Args:
        folder: an empty folder, which the caller removes.
        seed: seed of all random choices; each kind has its own stream.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(RECIPE.format(folder=folder), encoding="utf-8")
        self.seconds = 0.0
        """duration of the uninterrupted run"""
        _write_digits(folder)
        self.finished = folder / "finished"
        self.kind = "kit"
        """the current kind; kinds that run at the same time have separate folders"""
        self._rooms = 0

    def random(self, kind: str) -> random.Random:
        """The random generator of a kind."""
        return random.Random(f"{self.seed}/{kind}")

    def room(self) -> Path:
        """A path that does not exist yet."""
        self._rooms += 1
        return self.folder / f"{self.kind}{self._rooms}"

    def copy(self) -> Path:
        """A copy of the finished run, to alter."""
        return Path(shutil.copytree(self.finished, self.room() / "run", symlinks=True))

    def run(self, root: Path, whole: bool = False) -> list[str | Path]:
        """The command that starts or resumes the run, up to the shipped artifacts or to the report."""
        return ["run", self.recipe, "--out", root, *([] if whole else ["--until", LAST])]

    def prepare(self, own_process: bool) -> None:
        """Makes the finished run, and imports the modules that commands need.

        Args:
            own_process: make the finished run in a separate process, as a user does, and check that a forked child
                makes the same bytes; else make it in a forked child.

        Raises:
            RuntimeError: the uninterrupted run fails, so faults cannot be assessed.
        """
        command = [sys.executable, "-c", CHECKPOINT_OFTEN, *map(str, self.run(self.finished, whole=True))]
        own = (
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if own_process
            else None
        )
        processes.import_what_commands_import()
        _warm()
        gc.collect()
        # Otherwise the first garbage collection in each child would touch, and so copy, every page of this process.
        gc.freeze()
        if own is not None:
            _, errors = own.communicate(timeout=1800)
            if own.returncode not in (0, 1):
                raise RuntimeError(f"The uninterrupted run ended with exit {own.returncode}: {errors}")
        root = self.room() if own_process else self.finished
        timed = processes.run(*self.run(root, whole=True), before=checkpoint_often)
        if wrong := timed.wrong(0, 1) or self.differs(root, whole=True):
            raise RuntimeError(f"The uninterrupted run in a child: {wrong}")
        self.seconds = timed.seconds

    def differs(self, root: Path, whole: bool = False) -> str:
        """How a run differs from the finished one or from its manifest; empty if it does not."""
        try:
            run, wanted = RunFolder.open(root), RunFolder.open(self.finished)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is lost
            return f"the manifest is lost: {error}"
        if tuple(run.manifest.steps) != (NAMES if whole else NAMES[: NAMES.index(LAST) + 1]):
            return f"only the steps {', '.join(run.manifest.steps)} are finished"
        if found := [*run.problems(), *(f"{name} is left over" for name in run.unexpected_files())]:
            return "; ".join(found)
        other = [n for n in SAME if run.manifest.files[n].sha256 != wanted.manifest.files[n].sha256]
        return f"other bytes in {', '.join(other)}" if other else ""

    def damaged(self, root: Path) -> str:
        """What is wrong with the finished part of an unfinished run: no file in its manifest may be lost."""
        if not (root / "manifest.json").exists():
            return ""
        try:
            return "; ".join(RunFolder.open(root).problems())
        except Exception as error:  # noqa: BLE001
            return f"the manifest is lost: {error}"

    def continued(self, root: Path, whole: bool = False) -> str:
        """Resumes a run to its end; returns what is wrong with that or with the result."""
        outcome = processes.run(*self.run(root, whole), before=checkpoint_often)
        return outcome.wrong(0, 1) or self.differs(root, whole)


CHECKPOINT_OFTEN = """
import functools, sys
from nayer_edge.pipelines import distill
distill.distill = functools.partial(distill.distill, checkpoint_seconds=0)
from nayer_edge.pipelines.cli import main
main(sys.argv[1:])
"""
"""the CLI with a checkpoint after every epoch (long runs write one per minute)"""


def checkpoint_often() -> None:
    """The same in a forked child."""
    import functools

    from nayer_edge.pipelines import distill

    distill.distill = functools.partial(distill.distill, checkpoint_seconds=0)


def _write_digits(folder: Path) -> None:
    """The zeros, ones and twos of scikit-learn's digits, in 8×8 pixels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.asarray(labels) < 3
    pixels = (np.asarray(images)[chosen].reshape(-1, 8, 8) / 16 * 255).round().astype(np.uint8)
    numbers = np.asarray(labels)[chosen].astype(np.int64)
    np.savez(folder / "train.npz", images=pixels[:300], labels=numbers[:300])
    np.savez(folder / "holdout.npz", images=pixels[300:420], labels=numbers[300:420])


def _warm() -> None:
    """What every export would read anew; nothing here starts a thread."""
    from torch.onnx._internal.exporter import _registration

    registry = _registration.ONNXRegistry
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
    registry.from_torchlib(opset_version=20)


def files_of(root: Path) -> Iterator[Path]:
    """Every file below a folder."""
    return (path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink())
