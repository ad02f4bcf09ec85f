"""More and less time for a run: an extension is as good as one long run, and the finished student stays until then."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nayer_edge.distillation import Length
from nayer_edge.errors import UsageError
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.pipelines import actions
from nayer_edge.pipelines import distill as distill_step
from nayer_edge.pipelines.costs import planning
from nayer_edge.pipelines.deploy import SHARES, SyntheticSource
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.pipelines.recipes.schema import Budget, Recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.pipelines.steps import CHECKPOINT, DECAY_STATE, PENDING
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.files import sha256_of
from nayer_edge.storage.run_folder import RunFolder
from nayer_edge.storage.tensors import load_tensors, save_tensors

Invoke = Callable[..., Any]
SETTINGS = (
    *("device=cpu", "precision=fp32", "teacher.model=nayer:wrn_10_1", "teach.epochs=1"),
    *("synthesis.batch=20", "synthesis.g_steps=2", "synthesis.warmup_rounds=4", "synthesis.rounds=2"),
    *("synthesis.reserve=0.4", "synthesis.g_life=1000"),
    *("distill.warmup_epochs=1", "distill.steps=3", "distill.batch=16", "distill.views=2", "distill.holdout_rounds=1"),
    *("distill.optimizer=muon", "distill.schedule=constant"),
)
STUDENT = "student/student.safetensors"


def recipe(epochs: int, decay: int) -> Recipe:
    return load_recipe("digits", [*SETTINGS, f"distill.epochs={epochs}", f"distill.decay_epochs={decay}"])


@pytest.fixture(scope="module")
def short(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A finished student of five epochs, the last with a falling rate. Read only."""
    return once("five-epochs", lambda folder: run_recipe(recipe(5, 1), folder / "run", last="student")) / "run"


@pytest.fixture(scope="module")
def long(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """One run of eight epochs, the last two with a falling rate. Read only."""
    return once("eight-epochs", lambda folder: run_recipe(recipe(8, 2), folder / "run", last="student")) / "run"


@pytest.fixture
def run(short: Path, tmp_path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(short, tmp_path / "digits")))


def test_an_extended_run_is_one_long_run(run: RunFolder, long: Path) -> None:
    """Bit for bit: it continues from before the decay, with the same random streams."""
    done = run_recipe(recipe(8, 2), run.root, last="student")
    for name in (STUDENT, "bank.safetensors", "reserve.safetensors", "generator/generator.safetensors"):
        assert sha256_of(done.path(name)) == sha256_of(long / name), name
    assert len(done.path("metrics.jsonl").read_text().splitlines()) == 8
    assert done.manifest.recipe["distill"]["epochs"] == 8
    assert (done.problems(), done.unexpected_files()) == ([], [])
    # And once more.
    assert run_recipe(recipe(10, 2), run.root, last="student").manifest.steps["student"].numbers["bank images"] == 220


def test_the_finished_student_stays_until_the_better_one_is_whole(
    run: RunFolder, long: Path, stops_after: Callable[..., Silent]
) -> None:
    before = sha256_of(run.path(STUDENT))
    # Interrupted in its second epoch; the first one is saved.
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(8, 2), run.root, last="student", progress=stops_after(40, at_once=True))
    kept = RunFolder.open(run.root)
    assert kept.path(CHECKPOINT).is_file()
    assert sha256_of(kept.path(STUDENT)) == before
    assert (kept.problems(), kept.manifest.recipe["distill"]["epochs"]) == ([], 5)
    # Other commands use the finished student, and keep what the extension has done.
    run_recipe(recipe_of(kept.manifest.recipe, run.root), run.root, last="onnx")
    assert kept.path(CHECKPOINT).is_file()
    assert sha256_of(kept.path(STUDENT)) == before
    # `run RUN` goes on with the extension.
    chosen, _ = actions.timed(actions.recipe_in(run.root), str(run.root), run.root, actions.Time())
    assert chosen.distill.epochs == 8
    done = run_recipe(chosen, run.root, last="student")
    assert sha256_of(done.path(STUDENT)) == sha256_of(long / STUDENT)
    assert not done.path(PENDING).exists()
    assert not done.path(CHECKPOINT).exists()


def test_the_same_time_again_continues_an_interrupted_extension(
    run: RunFolder, stops_after: Callable[..., Silent]
) -> None:
    """ "Repeat the command to continue": another five seconds would make the run longer at every interruption."""

    def asked(seconds: float) -> tuple[Recipe, str]:
        chosen, words = actions.timed(actions.recipe_in(run.root), str(run.root), run.root, actions.Time(more=seconds))
        return chosen, words[0][1]

    first, words = asked(5)
    assert "instead of 5" in words
    with pytest.raises(KeyboardInterrupt):
        run_recipe(first, run.root, last="student", progress=stops_after(40, at_once=True))
    assert run.path(CHECKPOINT).is_file()
    again, words = asked(5)
    assert again.distill == first.distill
    assert "continues the interrupted extension" in words
    assert asked(50)[0].distill.epochs > first.distill.epochs
    # Before its first epoch was saved, too.
    run.path(CHECKPOINT).unlink()
    assert asked(5)[0].distill == first.distill


def test_a_student_of_several_processes_is_not_extended(run: RunFolder, invoke: Invoke) -> None:
    """Its images are those of all processes, and the rest of its state is in parts."""
    path = run.path(DECAY_STATE)
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {})["facts"])
    save_tensors(path, load_tensors(path, "a state"), {"facts": json.dumps({**facts, "ranks": 2})})
    entry = run.manifest.files[DECAY_STATE]
    run.manifest.files[DECAY_STATE] = entry.model_copy(update={"sha256": sha256_of(path), "bytes": path.stat().st_size})
    run.save()
    answer = invoke("run", run.root, "--more", "5s")
    assert answer.code == 2
    assert "was made by 2 processes" in answer.err
    assert f"--bank {run.typed}" in " ".join(answer.err.split())
    with pytest.raises(UsageError, match="only by a single process"):
        run_recipe(recipe(8, 2), run.root, last="student")
    assert run.problems() == []


def test_killed_after_the_student_is_recorded(run: RunFolder) -> None:
    """The manifest has the longer run's student and the shorter run's recipe: the next command mends that."""
    run_recipe(recipe(8, 2), run.root, last="student")
    done = RunFolder.open(run.root)
    done.path(PENDING).write_text(json.dumps({name: done.manifest.recipe[name] for name in ("distill", "budget")}))
    done.manifest.recipe["distill"]["epochs"], done.manifest.recipe["distill"]["decay_epochs"] = 5, 1
    done.save()
    chosen, _ = actions.timed(actions.recipe_in(run.root), str(run.root), run.root, actions.Time())
    before = sha256_of(done.path(STUDENT))
    done = run_recipe(chosen, run.root, last="student")
    assert sha256_of(done.path(STUDENT)) == before
    assert done.manifest.recipe["distill"]["epochs"] == 8
    assert not done.path(PENDING).exists()


def test_a_run_is_not_made_shorter(run: RunFolder) -> None:
    with pytest.raises(UsageError, match="made with other settings"):
        run_recipe(recipe(4, 1), run.root, last="student")
    with pytest.raises(UsageError, match="made with other settings"):
        run_recipe(load_recipe("digits", [*SETTINGS, "distill.epochs=9", "distill.decay_epochs=1", "seed=1"]), run.root)


def test_more_and_finish_by_the_command_line(run: RunFolder, invoke: Invoke) -> None:
    answer = invoke("run", run.root, "--more", "5s", "--until", "student")
    assert answer.code == 0, answer.err
    assert "epochs instead of 5" in answer.out
    trained = RunFolder.open(run.root).manifest.recipe["distill"]
    assert trained["epochs"] - trained["decay_epochs"] > 4
    answer = invoke("run", run.root, "--finish", "5m")
    assert (answer.code, "student is finished" in answer.err) == (2, True)


@pytest.mark.slow
def test_more_time_for_a_run_that_was_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    """A slow machine made five epochs of the thousand that were planned. What counts is what was trained, not what the
    recipe asks for; and the budget is that of the longer run, not the old one and a little more."""
    planned = Budget(seconds=3600, fill_seconds=0, rest_seconds=1)
    monkeypatch.setattr(
        distill_step, "adapted", lambda _history, length, *_: Length(5, 1, 1) if length.epochs == 1000 else None
    )
    root = tmp_path / "digits"
    done = run_recipe(recipe(1000, 300).model_copy(update={"budget": planned}), root, last="student")
    numbers = done.manifest.steps["student"].numbers
    assert (numbers["epochs"], numbers["decay epochs"]) == (5, 1)
    before = sha256_of(root / STUDENT)
    answer = invoke("run", root, "--more", "2s", "--until", "student")
    assert answer.code == 0, answer.err
    done = RunFolder.open(root)
    assert sha256_of(root / STUDENT) != before
    longer = done.manifest.recipe
    assert 5 < longer["distill"]["epochs"] < 1000
    assert len(done.path("metrics.jsonl").read_text().splitlines()) == longer["distill"]["epochs"]
    assert longer["budget"]["seconds"] < 600
    # The length that the recipe asked for is no change to the planner, but one to the run.
    monkeypatch.setattr(planning.budget, "extended", lambda *_: Length(1000, 1, 300))
    asked = recipe(1000, 300).model_copy(update={"budget": planned})
    assert planning.with_more(asked, done, 60.0).distill.epochs == 1001


@pytest.mark.slow
def test_an_interrupted_run_ends_early(tmp_path: Path, invoke: Invoke, stops_after: Callable[..., Silent]) -> None:
    root = tmp_path / "digits"
    # Other tests leave the handler of the command line, which `invoke` puts back.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(1000, 200), root, last="student", progress=stops_after(60))
    epochs = len((root / "metrics.jsonl").read_text().splitlines())
    answer = invoke("run", root, "--finish", "30s", "--until", "student")
    assert answer.code == 0, answer.err
    done = RunFolder.open(root)
    lines = [json.loads(line) for line in done.path("metrics.jsonl").read_text().splitlines()]
    assert len(lines) == done.manifest.recipe["distill"]["epochs"] < 1000
    decaying = [line for line in lines if line["phase"] == "distill" and line["loss_bn"] is None]
    assert len(lines) <= epochs + len(decaying)
    rates = [line["lr"] for line in decaying]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * lines[2]["lr"]


@pytest.mark.parametrize(
    ("words", "message", "fix"),
    [
        (("digits", "--more", "1h"), "is not a run folder", "nayer-edge run runs/digits --more 1h"),
        (("{run}", "--more", "soon"), "'soon' is not a duration", "--more 20m"),
        (("{run}", "--more", "1h", "--finish", "5m"), "cannot be combined", "Use one of them"),
        (("{run}", "--budget", "1h"), "already has a time plan", "--more 1h"),
        (("{run}", "--more", "0.001s"), "too short", "Use at least: --more 1m"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], message: str, fix: str, short: Path, invoke: Invoke) -> None:
    before = sha256_of(short / "manifest.json")
    answer = invoke("run", *(word.format(run=short) for word in words))
    assert answer.code == 2
    assert message in answer.err
    assert fix in answer.err
    assert sha256_of(short / "manifest.json") == before


def test_a_cosine_run_cannot_be_extended(finished: Path, invoke: Invoke) -> None:
    answer = invoke("run", finished, "--more", "1h")
    assert answer.code == 2
    assert "cosine" in answer.err
    assert "--budget" in answer.err


def test_a_run_of_an_earlier_version_has_no_state(run: RunFolder) -> None:
    files = run.manifest.files
    run.path(DECAY_STATE).unlink()
    run.manifest.files = {name: record for name, record in files.items() if name != DECAY_STATE}
    run.save()
    with pytest.raises(UsageError, match="no state to continue from"):
        planning.with_more(actions.recipe_in(run.root), run, 60.0)


# ------------------------------------------------------------------ reserved images


def test_images_put_aside_serve_one_purpose_each(short: Path) -> None:
    run = RunFolder.open(short)
    kept = MemoryBank.load(run.path("reserve.safetensors"), torch.device("cpu"))
    # Four tenths of the ten rounds that the five epochs made.
    assert len(kept) == 80
    bank = MemoryBank.load(run.path("bank.safetensors"), torch.device("cpu"))
    assert len(bank) == 120
    trained_on = {image.tobytes() for image in bank.images.numpy()}
    assert not trained_on & {image.tobytes() for image in kept.images.numpy()}

    parts = [run.artifact(name) for name in ("teacher", "lte", "student")]
    source = SyntheticSource.open(*parts, actions.recipe_in(short), run)
    drawn = {purpose: source.draw_labelled(purpose, 20 * len(rounds), Silent()) for purpose, rounds in SHARES.items()}
    every = np.concatenate([images for images, _ in drawn.values()])
    assert len(np.unique(every.reshape(len(every), -1), axis=0)) == len(every), "no image has two purposes"
    assert {(image * 255).round().astype(np.uint8).tobytes() for image in every} == {
        image.tobytes() for image in kept.images.numpy()
    }
    for images, labels in drawn.values():
        assert len(images) == len(labels)
        assert set(np.bincount(labels, minlength=10)) == {len(labels) // 10}, "balanced"


def test_only_what_is_lacking_is_drawn_anew(short: Path) -> None:
    run = RunFolder.open(short)
    source = SyntheticSource.open(
        *(run.artifact(name) for name in ("teacher", "lte", "student")), actions.recipe_in(short), run
    )
    steps = source.config.synthesis.g_steps
    assert [source.steps("validate", count) for count in (1, 40, 41, 60, 61)] == [0, 0, steps, steps, 2 * steps]
    few, more = (source.draw("validate", count, Silent()) for count in (40, 50))
    assert np.array_equal(few, more[:40])
    assert not np.array_equal(source.draw("calibration", 50, Silent())[40:], more[40:])
