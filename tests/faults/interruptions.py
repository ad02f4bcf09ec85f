"""The process is killed, interrupted, or the clock jumps: finished work is kept, and the result is the same."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.run_folder import RunFolder, lock_folder

from . import processes
from .kit import Kit, Tally, checkpoint_often

if TYPE_CHECKING:
    from torch import Tensor

    from nayer_edge.labels.embeddings import LabelEmbeddings


def killed(kit: Kit, tries: int) -> Tally:
    """SIGKILL at uniformly random times; the resumed run ends with the same bytes."""
    tally, chance = Tally("SIGKILL at a random moment of a run"), kit.random("killed")
    steps: list[str] = []
    for _ in range(tries):
        root, moment = kit.room(), chance.uniform(0, kit.seconds)
        processes.run(*kit.run(root, whole=True), before=checkpoint_often, during=processes.at(moment, signal.SIGKILL))
        wrong = kit.damaged(root)
        steps.append(_reached(root))
        tally.count(wrong or kit.continued(root, whole=True), f"killed after {moment:.3f} s in {steps[-1]}")
        shutil.rmtree(root, ignore_errors=True)
    tally.note = f"seed {kit.seed}; in " + ", ".join(sorted(set(steps)))
    return tally


def killed_again_and_again(kit: Kit, tries: int) -> Tally:
    """A run that is killed again each time it is resumed, for the given number of kills."""
    tally, chance, root = Tally("SIGKILL again and again, one run"), kit.random("again"), kit.room()
    for number in range(tries):
        moment = chance.uniform(0, kit.seconds / 2)
        outcome = processes.run(*kit.run(root), before=checkpoint_often, during=processes.at(moment, signal.SIGKILL))
        if outcome.code != -signal.SIGKILL:
            # It has finished; the remaining kills go to a new run.
            tally.count(outcome.wrong(0, 1) or kit.differs(root), f"kill {number + 1}")
            root = kit.room()
        else:
            tally.count(kit.damaged(root), f"kill {number + 1}")
    tally.count(kit.continued(root), "after the last kill")
    return tally


def killed_while_writing(kit: Kit, tries: int) -> Tally:
    """SIGKILL during a write: before the bytes, between two of them, before and after the rename."""
    tally, chance = Tally("SIGKILL inside a write"), kit.random("writing")
    for _ in range(tries):
        root, number, place = kit.room(), chance.randrange(1, 30), chance.choice(("fsync", "replace", "replaced"))
        processes.run(*kit.run(root), before=_die_in_write(number, place))
        tally.count(kit.damaged(root) or kit.continued(root), f"write {number}, {place}")
        shutil.rmtree(root, ignore_errors=True)
    return tally


def _die_in_write(number: int, place: str) -> Callable[[], None]:
    """Makes the process kill itself in its n-th atomic write."""

    def arm() -> None:
        checkpoint_often()
        left = [number]
        fsync, replace = os.fsync, Path.replace

        def die(where: str) -> None:
            if where == place:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def syncing(file: int) -> None:
            die("fsync")
            fsync(file)

        def replacing(self: Path, target: Path) -> Path:
            die("replace")
            done = replace(self, target)
            die("replaced")
            return done

        os.fsync, Path.replace = syncing, replacing

    return arm


def asked_to_end(kit: Kit, tries: int) -> Tally:
    """SIGINT and SIGTERM at random times: exit 130, finished epochs in the checkpoint, and the same final bytes."""
    tally, chance = Tally("SIGINT or SIGTERM at a random moment"), kit.random("asked")
    for index in range(tries):
        root, number = kit.room(), (signal.SIGINT, signal.SIGTERM)[index % 2]
        # Not before the CLI is ready to handle it.
        moment = chance.uniform(0.1, 0.9) * kit.seconds
        outcome = processes.run(*kit.run(root), during=processes.at(moment, number))
        # The run may end before the signal arrives.
        wrong = outcome.wrong(130, 0, 1) or kit.damaged(root) or _unsaved(root)
        if outcome.code == 130 and "Interrupted" not in outcome.err:
            wrong = wrong or "nothing is said"
        tally.count(wrong or kit.continued(root), f"{number.name} after {moment:.3f} s")
        shutil.rmtree(root, ignore_errors=True)
    return tally


def _unsaved(root: Path) -> str:
    """Epochs that are in metrics.jsonl but not in the checkpoint."""
    metrics, checkpoint = root / "metrics.jsonl", root / "student" / "checkpoint.safetensors"
    if not metrics.is_file() or "student" in RunFolder.open(root).manifest.steps:
        return ""
    from nayer_edge.models.load import load_tensors

    lines = len(metrics.read_text().splitlines())
    if not checkpoint.is_file():
        return f"{lines} finished epochs and no checkpoint"
    load_tensors(checkpoint, "a checkpoint")
    from safetensors import safe_open

    with safe_open(checkpoint, framework="pt") as file:
        facts = (file.metadata() or {}).get("facts", "")
    return "" if f'"epoch": {lines},' in facts else f"{lines} finished epochs, and the checkpoint holds other ones"


def clock_jumps(kit: Kit, tries: int) -> Tally:
    """All of Python's clocks jump by up to a year, forwards or backwards, at every reading."""
    tally, chance = Tally("clocks that jump"), kit.random("clock")
    for _ in range(tries):
        root, seed = kit.room(), chance.randrange(2**32)
        outcome = processes.run(*kit.run(root), before=_jumping(seed))
        tally.count(outcome.wrong(0, 1) or kit.differs(root), f"seed {seed}")
        shutil.rmtree(root, ignore_errors=True)
    return tally


def _jumping(seed: int) -> Callable[[], None]:
    def arm() -> None:
        import random

        chance = random.Random(seed)
        for name in ("time", "monotonic", "perf_counter"):
            real = getattr(time, name)
            setattr(time, name, lambda real=real: real() + chance.uniform(-3e7, 3e7))

    return arm


def two_at_once(kit: Kit, tries: int) -> Tally:
    """Several processes start the same run at once; the lock file of a killed process is ignored."""
    tally, chance = Tally("processes in one run folder at once"), kit.random("lock")
    for _ in range(tries):
        root = kit.copy()
        (root / ".lock").write_bytes(b"left by a process that was killed")
        with lock_folder(root):
            refused = processes.run(*kit.run(root))
        wrong = refused.wrong(2)
        if not wrong and "Another process is working" not in refused.err:
            wrong = f"refused for another reason: {refused.err}"
        # Unlocked again. Of several processes that start at once, only one works at a time.
        shutil.rmtree(root / "gate")
        children = [processes.start(*kit.run(root, whole=True)) for _ in range(chance.randrange(2, 4))]
        codes = [processes.finish(child) for child in children]
        if not wrong and not set(codes) <= {0, 1, 2, 4}:
            wrong = f"exits {codes}"
        try:
            with lock_folder(root):
                pass
        except UsageError as error:
            wrong = wrong or f"{error}"
        tally.count(wrong)
    return tally


def one_cache(kit: Kit, tries: int) -> Tally:
    """Processes build the same embeddings at once, one of them is killed; the cache file is missing, present or
    damaged."""
    from nayer_edge.labels import embeddings as lte

    tally, chance = Tally("processes in one LTE cache at once"), kit.random("cache")
    cache = kit.room()
    with processes.environment(XDG_CACHE_HOME=str(cache)):
        wanted = _build().embeddings
        (path,) = lte.cache_folder().glob("*.safetensors")

        def work() -> None:
            assert bool((_build().embeddings == wanted).all()), "other numbers"

        for _ in range(tries):
            state = chance.choice(("missing", "damaged", "whole"))
            if state == "missing":
                path.unlink()
            elif state == "damaged":
                path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
            children = [processes.begin(work) for _ in range(3)]
            time.sleep(chance.uniform(0, 0.1))
            os.kill(children[0], signal.SIGKILL)
            codes = [processes.finish(child) for child in children]
            wrong = "" if codes[1:] == [0, 0] else f"exits {codes}"
            try:
                lte.load(path)
            except IntegrityError as error:
                wrong = wrong or f"{error}"
            tally.count(wrong, state)
    return tally


def _build() -> LabelEmbeddings:
    """Embeddings of labels that are not shipped, by a slow stand-in for a language model."""
    import torch

    from nayer_edge.config import LTE
    from nayer_edge.labels import embeddings as lte
    from nayer_edge.labels import text_encoders

    def encode(texts: Sequence[str]) -> Tensor:
        time.sleep(0.03)
        stream = torch.Generator().manual_seed(len(texts))
        return torch.randn(len(texts), 384, generator=stream)

    kept = text_encoders.find
    text_encoders.find = lambda name: text_encoders.TextEncoder(name, "1", encode)
    try:
        return lte.build([f"label {number}" for number in range(64)], LTE(encoder="of-this-test"))
    finally:
        text_encoders.find = kept


def _reached(root: Path) -> str:
    """The step that a killed run was in."""
    from nayer_edge.pipelines.steps import NAMES

    if not (root / "manifest.json").is_file():
        return "the start"
    done = RunFolder.open(root).manifest.steps
    return next((name for name in NAMES if name not in done), "the end")
