"""Two processes against one. torchrun's agent starts `worker` of this file, so both see the same code.

Draws for the generator are those of the whole batch, so synthesis must be what one process computes, in another order
of addition. The student's draws are each rank's own, so there only a step on a given batch can be equal.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from nayer_edge import generator as generators
from nayer_edge.batchnorm import SynchronisedBatchNorm, synchronise_batchnorms
from nayer_edge.config import Distill, Synthesis
from nayer_edge.distillation import Distillation, Epoch, distill, resume, save_checkpoint
from nayer_edge.errors import TrainingError, UsageError
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.memory_bank import MemoryBank, to_unit
from nayer_edge.runtime.compute import choose, random_stream
from nayer_edge.runtime.distributed import SINGLE, World, joined, share_problems
from nayer_edge.training.augment import crop_and_flip

RANKS = 2
# Starting two processes, and killing and restarting them, takes half a minute.
two_processes = pytest.mark.slow
TIMES = ("seconds", "synthesis_seconds", "answer_seconds", "images_per_s", "memory_mib")
WHOLE_GROUPS = {"synthesis_batch": 12}
"""two groups of three classes for each rank"""
LONGER = {**WHOLE_GROUPS, "distill_steps": 40, "distill_batch": 24, "distill_holdout_rounds": 4}
ONE_GROUP = {"synthesis_batch": 2}
"""fewer images than classes"""
SMALL_BANK = {**WHOLE_GROUPS, "distill_bank_mib": 40 * 128 / 2**20}
"""room for 40 images, that is for three rounds"""
CACHED = {**SMALL_BANK, "distill_views": 3, "distill_epochs": 5}
ROUNDS = (True, True, False)
"""warm-up or not"""


# ------------------------------------------------------------------ what every process does, alone or not


def synthesised(run: Distillation) -> dict[str, Any]:
    """The first rounds of a run, that of a trained generator last."""
    generators.initialise(run.generator, random_stream(0, "generator"))
    made, noise = [], []
    for number, warm in enumerate(ROUNDS):
        made.append(run._round(random_stream(0, "round", number), warm))
        noise.append(run.generator.noisy.weight.detach().clone())
    state = {name: t.clone() for name, t in run.whole_generator().state_dict().items()}
    return {
        "images": [one.images for one in made],
        "labels": [one.labels for one in made],
        "losses": [one.losses for one in made],
        "memory": [torch.cat(pair) for pair in run.statistics.memory or []],
        "generator": state,
        "noise": noise,
    }


def student_steps(run: Distillation) -> dict[str, Tensor]:
    """Three steps on given batches of which a rank takes its share; the losses' mean beside the student."""
    run.student.train()
    losses = []
    for number in range(3):
        images = torch.rand(12, *run.teacher.spec.shape, generator=random_stream(5, number))
        mine = run.world.share(images)
        with torch.no_grad():
            logits = run.teacher(mine)
        losses.append(run.world.mean(run._student_step(mine, logits)))
    run.student.eval()
    return {"loss": torch.stack(losses), **run.student.state_dict()}


NORMS: dict[str, tuple[Callable[[], nn.modules.batchnorm._BatchNorm], tuple[int, ...]]] = {
    "2d": (lambda: nn.BatchNorm2d(4), (6, 4, 3, 5)),
    "1d": (lambda: nn.BatchNorm1d(4, eps=1e-3), (6, 4)),
    "not affine, cumulative": (lambda: nn.BatchNorm2d(4, momentum=None, affine=False), (6, 4, 2, 2)),
}


def normalised(name: str, world: World) -> dict[str, Tensor]:
    """Two passes through a BatchNorm, forward and backward, and an evaluated third."""
    build, shape = NORMS[name]
    model = nn.Sequential(build())
    if model[0].affine:
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.1]))
            model[0].bias.copy_(torch.tensor([0.3, 0.0, -1.0, 0.5]))
    synchronise_batchnorms(model, world)
    assert isinstance(model[0], SynchronisedBatchNorm) == (world.size > 1)
    found: dict[str, Tensor] = {}
    for number in range(2):
        # Means far from zero, and other ones in the other half: a rank's own statistics would be quite wrong.
        random = random_stream(7, number)
        whole = torch.randn(shape, generator=random) + 3 * torch.arange(6).view(-1, *[1] * (len(shape) - 1))
        weights = torch.randn(shape, generator=random)
        x = world.share(whole).clone().requires_grad_()
        y = model(x)
        loss = ((y * world.share(weights)) ** 2).sum() / whole[0].numel() / len(x)
        model.zero_grad()
        loss.backward()
        world.average_gradients(model.parameters())
        assert x.grad is not None
        # The loss is a mean over ranks, so each rank's gradient is the whole one's times their number.
        found |= {f"y{number}": y.detach(), f"dx{number}": x.grad / world.size, f"loss{number}": world.mean(loss)}
        found |= {f"d{key}{number}": p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    found |= dict(model.state_dict())
    found["evaluated"] = model.eval()(x).detach()
    return found


def line_of(epoch: Epoch) -> dict[str, Any]:
    return {n: v for n, v in vars(epoch).items() if n not in TIMES}


# ------------------------------------------------------------------ the worker


@functools.cache
def small() -> ModuleType:
    """conftest.py beside this file, by its path: the worker is no pytest."""
    specification = importlib.util.spec_from_file_location(
        "nayer_edge_small", Path(__file__).parents[1] / "conftest.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def begin(world: World = SINGLE, **changes: Any) -> Distillation:
    """What the fixture `start` of conftest.py begins, in a world of any size."""
    conftest = small()
    embeddings = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    settings = conftest.Settings(conftest.GENERATOR, conftest.SYNTHESIS, conftest.DISTILL, seed=0)
    student = conftest.smooth(seed=10, width=4, scale=4)
    if not world.first:
        # Whatever a rank begins with, it continues with rank 0's.
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1)
    return Distillation(
        conftest.smooth(seed=1, width=8, scale=4).requires_grad_(False),
        LabelEmbeddings(embeddings, "test", "1", "a {label}", conftest.CLASSES),
        student,
        conftest.changed(settings, **changes),
        choose("cpu", "fp32"),
        world,
    )


def finished(run: Distillation) -> dict[str, Any]:
    """A run from where it is to its end."""
    distill(run)
    tensors, facts = run.state()
    return {
        "state": tensors,
        "history": [line_of(Epoch(**line)) for line in facts["history"]],
        "student": run.student.state_dict(),
        "bank": run.bank.tensors(),
        "whole": run.whole_bank().tensors(),
    }


def averaged(world: World) -> list[Tensor | None]:
    """Gradients rank + 1 of a parameter that all have, of one of this rank's own, and none of a third."""
    parameters = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    for parameter in parameters[:2]:
        parameter.grad = torch.full((2, 3), world.rank + 1.0)
    world.average_gradients(parameters, own=parameters[1:2])
    return [parameter.grad for parameter in parameters]


def work_all(world: World, out: Path) -> dict[str, Any]:
    saved = begin(world, **WHOLE_GROUPS)
    saved.run_epoch()
    save_checkpoint(saved, out / "two.safetensors")
    another_number = None
    try:
        resume(begin(world, **WHOLE_GROUPS), out / "one.safetensors")
    except UsageError as error:
        another_number = str(error)
    mismatch = None
    try:
        world.require_same(world.rank, "their rank")
    except UsageError as error:
        mismatch = str(error)
    return {
        "rounds": synthesised(begin(world, **WHOLE_GROUPS)),
        "rounds of one group": synthesised(begin(world, **ONE_GROUP)),
        "steps": student_steps(begin(world, **WHOLE_GROUPS)),
        "norms": {name: normalised(name, world) for name in NORMS},
        "run": finished(begin(world, **LONGER)),
        "cached": finished(begin(world, **CACHED)),
        "gradients": averaged(world),
        "another number": another_number,
        "mismatch": mismatch,
        "said": world.from_first({"what": "é", "rank": world.rank}),
    }


def work_killed(world: World, out: Path, life: int) -> dict[str, Any]:
    """A run that dies in its fourth epoch, everywhere; in the second life it continues."""

    def kill_all(epoch: Epoch) -> None:
        if life == 0 and epoch.epoch == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    run = begin(world, **CACHED)
    distill(run, out / "checkpoint.safetensors", checkpoint_seconds=0, on_epoch=kill_all)
    return finished(run)


def work_failing(world: World, out: Path) -> None:
    """Rank 1 goes wrong in the middle of a round; rank 0 waits for it."""
    steps = 0

    def fail() -> None:
        nonlocal steps
        steps += 1
        if world.rank == 1 and steps == 5:
            (out / "failed").touch()
            raise ValueError("rank 1 went wrong")

    try:
        begin(world, **WHOLE_GROUPS).run_epoch(fail)
    except TrainingError as error:
        (out / "lost").write_text(str(error))
        raise


def work_command(out: Path, command: list[str]) -> None:
    """The command line, in a world of its own: a store does not serve two. Writes what it prints."""
    from nayer_edge.pipelines.cli import main

    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "command"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(command)
    (out / f"said{os.environ['RANK']}").write_text(printed.getvalue())
    os.environ["TORCHELASTIC_RESTART_COUNT"] = life
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def worker(out: Path, command: list[str]) -> None:
    """One start for all tests, because starting takes longer than they do."""
    # The agent's handler, which a fork inherits, would wait for the end of a collective.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        work(out, command)
    except BaseException:
        traceback.print_exc()
        raise


def work(out: Path, command: list[str]) -> None:
    torch.set_num_threads(1)
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if life == 0:
        work_command(out, command)
    with joined() as world:
        if life == 0:
            torch.save(work_all(world, out), out / f"all{world.rank}.pt")
        torch.save(work_killed(world, out, life), out / f"life{life}.{world.rank}.pt")
        work_failing(world, out)
        torch.save({}, out / f"never{world.rank}.pt")


if __name__ == "__main__":
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # As `torchrun --standalone --max-restarts=1`, whose workers would import torch four times: these are forked.
    small()
    importlib.import_module("nayer_edge.pipelines.distill")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="two",
        max_restarts=1,
        start_method="fork",
    )
    elastic_launch(config, worker)(Path(sys.argv[1]), sys.argv[2:])
    sys.exit()


# ------------------------------------------------------------------ starting it


def started(*arguments: str | Path, cwd: Path | None = None, within: float = 600.0) -> subprocess.CompletedProcess[str]:
    """A Python program that starts two Gloo processes on this machine; neither outlives `within` seconds."""
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.terminate()  # and with it its workers
        out, err = process.communicate()
        pytest.fail(f"the processes hang:\n{out}\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@dataclass(frozen=True)
class Launch:
    """What two processes left: the folder, and what torchrun said."""

    folder: Path
    said: subprocess.CompletedProcess[str]

    def results(self, what: str) -> list[dict[str, Any]]:
        """What each rank found, rank 0 first."""
        return [torch.load(self.folder / f"{what}{rank}.pt", weights_only=True) for rank in range(RANKS)]


def without_student(finished: Path, root: Path) -> Path:
    """A copy of a finished run up to its label embeddings."""
    from nayer_edge.storage.run_folder import RunFolder

    shutil.copytree(finished, root)
    run = RunFolder.open(root)
    for step in list(run.manifest.steps)[2:]:
        run.remove_leftovers(run.forget(step))
    return root


def distill_command(root: Path, tiny_settings: Sequence[str]) -> list[str]:
    """`distill` of a short run, whose teacher and warm-up are those of `tiny_run`."""
    settings = [*tiny_settings, "distill.epochs=2", "distill.steps=3"]
    return ["distill", "digits", *(w for text in settings for w in ("--set", text)), "--out", str(root), "--json"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, tiny_settings: Sequence[str]) -> Launch:
    out = tmp_path_factory.mktemp("two")
    root = without_student(tiny_run, out / "command")
    alone = begin(**WHOLE_GROUPS)
    alone.run_epoch()
    save_checkpoint(alone, out / "one.safetensors")
    said = started(__file__, out, *distill_command(root, tiny_settings))
    assert (out / "failed").is_file(), f"it went wrong before it was meant to:\n{said.stderr}"
    return Launch(out, said)


@pytest.fixture(scope="module")
def two(launch: Launch) -> list[dict[str, Any]]:
    """What each of two processes found, rank 0 first."""
    return launch.results("all")


def joined_rounds(parts: list[Tensor], share: int) -> Tensor:
    """Shares of rounds, rank by rank, in the order of one process."""
    return torch.cat([part.view(-1, share, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)


# ------------------------------------------------------------------ synthesis


@two_processes
@pytest.mark.parametrize(("name", "changes"), [("rounds", WHOLE_GROUPS), ("rounds of one group", ONE_GROUP)])
def test_rounds_are_those_of_one_process(two: list[dict[str, Any]], name: str, changes: dict[str, Any]) -> None:
    one, (first, second) = synthesised(begin(**changes)), [found[name] for found in two]
    for number in range(len(ROUNDS)):
        torch.testing.assert_close(first["losses"][number], one["losses"][number], rtol=1e-5, atol=1e-6)
        assert torch.equal(first["losses"][number], second["losses"][number])
        labels = torch.cat((first["labels"][number], second["labels"][number]))
        assert torch.equal(labels, one["labels"][number])
        images = torch.cat((first["images"][number], second["images"][number]))
        apart = (images.int() - one["images"][number].int()).abs()
        assert int(apart.max()) <= 1
        assert float((apart > 0).float().mean()) < 0.01
    for found, wanted in zip(first["memory"], one["memory"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(first["memory"], second["memory"], strict=True))
    for key, wanted in one["generator"].items():
        # The bias of a convolution before a BatchNorm has no effect: its gradient is a rounding error, of which Adam
        # makes a whole step, and the running mean follows it.
        if key not in ("body.2.bias", "body.6.bias", "body.3.running_mean", "body.7.running_mean"):
            torch.testing.assert_close(first["generator"][key], wanted, rtol=1e-4, atol=1e-5)


@two_processes
def test_each_rank_has_its_own_noise(two: list[dict[str, Any]]) -> None:
    for mine, other in zip(two[0]["rounds"]["noise"], two[1]["rounds"]["noise"], strict=True):
        assert mine.shape == (2, 6, 10)
        assert float((mine - other).abs().mean()) > 0.1
    for mine, other in zip(two[0]["rounds of one group"]["noise"], two[1]["rounds of one group"]["noise"], strict=True):
        assert torch.equal(mine, other), "the one group is everyone's"


@two_processes
@pytest.mark.parametrize("name", list(NORMS))
def test_synchronised_batchnorm_is_batchnorm_of_the_whole_batch(two: list[dict[str, Any]], name: str) -> None:
    one, parts = normalised(name, SINGLE), [found["norms"][name] for found in two]
    assert sorted(parts[0]) == sorted(one)
    for key, wanted in one.items():
        of_images = key[:-1] in ("y", "dx") or key == "evaluated"
        found = torch.cat([part[key] for part in parts]) if of_images else parts[0][key]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------ student


@two_processes
def test_gradients_are_those_of_the_mean_loss(two: list[dict[str, Any]]) -> None:
    """Adam does not see a factor, so no round would show that a rank's own gradients lack it."""
    for rank, found in enumerate(two):
        common, own, none = found["gradients"]
        assert torch.equal(common, torch.full((2, 3), 1.5))
        assert torch.equal(own, torch.full((2, 3), (rank + 1) / 2))
        assert none is None


@two_processes
def test_student_steps_on_a_given_batch_are_those_of_one_process(two: list[dict[str, Any]]) -> None:
    one = student_steps(begin(**WHOLE_GROUPS))
    for key, wanted in one.items():
        torch.testing.assert_close(two[0]["steps"][key], wanted, rtol=1e-5, atol=1e-5, msg=lambda t, k=key: f"{k}: {t}")
        assert torch.equal(two[0]["steps"][key], two[1]["steps"][key]), key


def drawing_like_two(run: Distillation, images: Tensor) -> Distillation:
    """One process that draws for the student what two ranks draw: each from its part of the bank, by its own stream.

    From the bank of the two, because one pixel that another rounding puts on the next level is 1e-4 of the student's
    loss after 40 steps.
    """
    streams: list[torch.Generator] = []
    named = run._stream

    def stream(*purpose: str | int) -> torch.Generator:
        if purpose[0] == "student":
            streams[:] = [named(*purpose, "rank", rank) for rank in range(RANKS)]
        return named(*purpose)

    def draw(_random: torch.Generator) -> tuple[Tensor, Tensor]:
        config, drawn = run.settings.distill, []
        rounds = images[: len(run.bank)].view(-1, RANKS, 6, *run.bank.shape)
        for rank, own in enumerate(streams):
            part = rounds[:, rank].flatten(0, 1)
            places = torch.randint(0, len(part), (config.batch // RANKS,), generator=own)
            drawn.append(to_unit(crop_and_flip(part[places], config.augment, own)))
        batch = torch.cat(drawn)
        with torch.no_grad():
            return batch, run.teacher(batch)

    run._stream, run._draw = stream, draw
    return run


def _close(value: float | None) -> Any:
    return value if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)


@two_processes
def test_a_run_is_that_of_one_process_which_draws_the_same(two: list[dict[str, Any]]) -> None:
    run = drawing_like_two(begin(**LONGER), two[0]["run"]["whole"]["images"])
    distill(run)
    history = two[0]["run"]["history"]
    assert history == two[1]["run"]["history"], "every rank has the same figures"
    assert len(history) == len(run.history) == 4
    for found, wanted in zip(history, run.history, strict=True):
        for name in ("loss_bn", "loss_ce", "loss_adv", "loss_kd"):
            assert found[name] == _close(getattr(wanted, name)), name
        assert found["agreement"] == pytest.approx(wanted.agreement, abs=1 / 48 + 1e-6)
        assert (found["lr"], found["bank_images"]) == (wanted.lr, wanted.bank_images)
    for name, wanted in run.student.state_dict().items():
        torch.testing.assert_close(two[0]["run"]["student"][name], wanted, rtol=1e-4, atol=1e-5)


@two_processes
def test_own_draws_change_the_student_as_another_stream_does(two: list[dict[str, Any]]) -> None:
    """Without that, synthesis is equal until the first trained student takes part, and the student's loss differs by
    less than 30 %; eight streams in one process gave 0.130 to 0.148 in epoch 3 and 0.078 to 0.106 in epoch 4."""
    run = begin(**LONGER)
    distill(run)
    for found, wanted in zip(two[0]["run"]["history"], run.history, strict=True):
        rel = 1e-5 if wanted.epoch <= 3 else 0.05
        assert found["loss_bn"] == pytest.approx(wanted.loss_bn, rel=rel)
        assert found["loss_ce"] == pytest.approx(wanted.loss_ce, rel=rel)
        if wanted.loss_kd is None:
            assert found["agreement"] == pytest.approx(wanted.agreement)
        else:
            assert found["loss_kd"] == pytest.approx(wanted.loss_kd, rel=0.3)
            assert found["loss_kd"] != pytest.approx(wanted.loss_kd, rel=1e-3), "each rank draws its own images"


@two_processes
def test_both_ranks_end_with_the_same_student(two: list[dict[str, Any]]) -> None:
    for name in ("run", "cached"):
        mine, other = (found[name]["student"] for found in two)
        assert all(torch.equal(mine[key], other[key]) for key in mine), "parameters and running statistics"


# ------------------------------------------------------------------ bank


@two_processes
def test_the_bank_is_divided_without_loss_or_duplicates(two: list[dict[str, Any]]) -> None:
    parts = [found["run"]["bank"] for found in two]
    assert [len(part["images"]) for part in parts] == [60, 60], "ten rounds of twelve images"
    whole = two[0]["run"]["whole"]
    assert torch.equal(whole["images"], joined_rounds([part["images"] for part in parts], share=6))
    assert torch.equal(whole["labels"], torch.arange(120) % 3)
    assert int(whole["added"]) == 120
    assert len(torch.unique(whole["images"].flatten(1), dim=0)) == 120
    run = begin(**WHOLE_GROUPS)
    for _ in range(2):
        run.run_epoch()
    apart = (whole["images"][:72].int() - run.bank.images.int()).abs()
    assert int(apart.max()) <= 1, "warm-up is that of one process, in its order"


@two_processes
def test_a_full_bank_keeps_the_newest_whole_rounds(two: list[dict[str, Any]]) -> None:
    parts = [found["cached"]["bank"] for found in two]
    assert [len(part["images"]) for part in parts] == [18, 18]
    assert [int(part["added"]) for part in parts] == [72, 72]
    whole = two[0]["cached"]["whole"]
    assert int(whole["added"]) == 144
    bank = MemoryBank.of(whole, torch.device("cpu"), "test")
    images, labels = bank.newest(36)
    locals_ = [MemoryBank.of(part, torch.device("cpu"), "test").newest(18)[0] for part in parts]
    assert torch.equal(images, joined_rounds(locals_, share=6))
    assert torch.equal(labels, torch.arange(36) % 3)


# ------------------------------------------------------------------ checkpoints


@two_processes
def test_killed_together_and_started_again_they_end_with_the_same_bits(
    two: list[dict[str, Any]], launch: Launch
) -> None:
    """torchrun's own restart: both processes die by SIGKILL in the fourth epoch and begin again."""
    assert not list(launch.folder.glob("life0*")), "the first life ended before"
    for found, wanted in zip(launch.results("life1."), (found["cached"] for found in two), strict=True):
        assert found["history"] == wanted["history"]
        assert sorted(found["state"]) == sorted(wanted["state"])
        for name, tensor in wanted["state"].items():
            assert torch.equal(found["state"][name], tensor), name


@two_processes
def test_another_number_of_processes_does_not_continue(two: list[dict[str, Any]], launch: Launch) -> None:
    """Neither two what one began nor one what two began, and the checkpoint stays."""
    for found in two:
        assert "started with 1 process and cannot be continued with 2 processes" in found["another number"]
        assert "with the same number: nayer-edge distill" in found["another number"]
    path = launch.folder / "two.safetensors"
    before = path.read_bytes()
    with pytest.raises(UsageError, match="started with 2 processes and cannot be continued with 1 process") as refused:
        distill(begin(**WHOLE_GROUPS), path)
    assert refused.value.exit_code == 2
    assert "torchrun --nproc-per-node=2 -m nayer_edge distill" in refused.value.fix
    assert "--fresh" in refused.value.fix
    assert path.read_bytes() == before
    assert not resume(begin(**SMALL_BANK), path), "one of another run is none at all"


# ------------------------------------------------------------------ what goes wrong


@two_processes
def test_an_error_on_one_rank_ends_both(launch: Launch) -> None:
    assert launch.said.returncode != 0
    assert "rank 1 went wrong" in launch.said.stderr
    assert not list(launch.folder.glob("never*"))
    lost = launch.folder / "lost"
    # torchrun may have ended rank 0 before it noticed.
    assert not lost.exists() or "lost its connection to the other processes" in lost.read_text()


@two_processes
def test_differences_between_ranks_are_named_on_all(two: list[dict[str, Any]]) -> None:
    assert all("rank 1 does not match rank 0" in found["mismatch"] for found in two)
    assert all(found["said"] == {"what": "é", "rank": 0} for found in two)


@pytest.mark.parametrize(
    ("images", "classes", "batch", "size", "said"),
    [
        (400, 10, 512, 8, []),
        (400, 10, 512, 1, []),
        (401, 10, 511, 1, []),
        (400, 100, 512, 8, ["synthesis.batch: 400", "800 are"]),
        (400, 10, 512, 3, ["synthesis.batch: 400", "390, 420 are", "distill.batch: 512", "510, 513 are"]),
        (200, 1000, 512, 8, []),
        (100, 1000, 512, 8, ["synthesis.batch: 100", "96, 104 are"]),
    ],
)
def test_batches_that_cannot_be_divided(images: int, classes: int, batch: int, size: int, said: list[str]) -> None:
    problems = "\n".join(share_problems(Synthesis(batch=images), Distill(batch=batch), classes, size))
    assert bool(problems) == bool(said)
    assert all(part in problems for part in said)


def test_an_uneven_batch_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="between 2 processes") as caught:
        begin(World(0, 2), synthesis_batch=8)
    assert "6, 12 are" in caught.value.why


@pytest.mark.parametrize("command", [["run", "digits"], ["teach", "digits"], ["recipes"], ["quickstart"]])
def test_other_commands_under_torchrun_are_refused(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from nayer_edge.pipelines.cli import app

    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    refused = CliRunner().invoke(app, command).exception
    assert isinstance(refused, UsageError)
    assert "Only `distill`" in refused.what
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(app, command).exit_code == 2


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("2", "2"), ("-1", "2")])
def test_an_environment_that_is_not_torchruns(rank: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": size, "LOCAL_RANK": "0", "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun"), joined():
        pass


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with joined() as world:
        assert world is SINGLE
    model = nn.Sequential(nn.BatchNorm2d(3))
    synchronise_batchnorms(model, SINGLE)
    assert type(model[0]) is nn.BatchNorm2d
    values = torch.rand(4)
    assert SINGLE.mean(values) is values
    assert SINGLE.share(values) is values
    assert SINGLE.gather(values)[0] is values


# ------------------------------------------------------------------ the command


def check_folder(root: Path, one: Path) -> None:
    """`root` holds what one process writes."""
    from nayer_edge.generator import load
    from nayer_edge.models.load import load_classifier
    from nayer_edge.storage.run_folder import RunFolder

    files = RunFolder.open(one).manifest.files
    wanted = {name for name, record in files.items() if record.step in ("teacher", "lte", "student")}
    names = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert names == {*wanted, "manifest.json", ".lock"}, "only rank 0 writes, and what one process writes"
    run = RunFolder.open(root)
    assert run.problems() == []
    assert run.manifest.steps["student"].numbers["processes"] == 2
    load_classifier(root / "student/student.safetensors")
    generator, _memory = load(root / "generator/generator.safetensors")
    assert generator.noisy.weight.shape[0] == 2, "whole, for one process to draw from"
    lines = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (root, one)]
    assert lines[0][0]["loss_bn"] == pytest.approx(lines[1][0]["loss_bn"], rel=0.01)


@two_processes
def test_the_command_makes_the_run_folder_of_one_process(launch: Launch, tiny_run: Path) -> None:
    said = [(launch.folder / f"said{rank}").read_text() for rank in range(RANKS)]
    assert json.loads(said[0])["steps"]["student"]["numbers"]["processes"] == 2, said
    assert said[1] == "", "one process prints"
    check_folder(launch.folder / "command", tiny_run)
    bank = MemoryBank.load(launch.folder / "command" / "bank.safetensors", torch.device("cpu"))
    assert len(bank) == 60


@pytest.mark.slow  # five processes import torch
def test_torchrun_starts_the_command(tiny_run: Path, tiny_settings: Sequence[str], tmp_path: Path) -> None:
    root = without_student(tiny_run, tmp_path / "run")
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    done = started(*torchrun, "-m", "nayer_edge", *distill_command(root, tiny_settings), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"]["student"]["numbers"]["processes"] == 2, "one process prints"
    check_folder(root, tiny_run)
