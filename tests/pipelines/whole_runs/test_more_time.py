"""More and less time for a run: an extension is as good as one long run, and the finished student stays until then."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nayer_edge.distillation import LATER_KEYS, Epoch, Length
from nayer_edge.errors import UsageError
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.pipelines import actions
from nayer_edge.pipelines import distill as distill_step
from nayer_edge.pipelines.costs import early_end, planning
from nayer_edge.pipelines.deploy import SyntheticSource
from nayer_edge.pipelines.plan import plan_steps, read_once
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.pipelines.recipes.schema import Budget, Recipe
from nayer_edge.pipelines.reserved import SHARES
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.pipelines.steps import (
    CHECKPOINT,
    DECAY_STATE,
    FINISH_ANSWER,
    FINISH_REQUEST,
    GIVEN_TIME,
    PENDING,
    STEPS,
)
from nayer_edge.pipelines.validation import validate
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.files import sha256_of, write_bytes
from nayer_edge.storage.run_folder import MANIFEST, RunFolder, lock_folder
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
    """ "Repeat the command to continue": the same time again would make the run longer at every interruption."""

    def asked(seconds: float) -> tuple[Recipe, str]:
        chosen, words = actions.timed(actions.recipe_in(run.root), str(run.root), run.root, actions.Time(more=seconds))
        return chosen, words[0][1]

    first, words = asked(100)
    assert "instead of 5" in words
    with pytest.raises(KeyboardInterrupt):
        run_recipe(first, run.root, last="student", progress=stops_after(40, at_once=True))
    assert run.path(CHECKPOINT).is_file()
    again, words = asked(100)
    assert again.distill == first.distill
    assert "continues the interrupted extension" in words
    assert asked(1000)[0].distill.epochs > first.distill.epochs
    # Before its first epoch was saved, too.
    run.path(CHECKPOINT).unlink()
    assert asked(100)[0].distill == first.distill


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


def test_more_and_finish_by_the_command_line(run: RunFolder, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two epochs more, however many fit into five seconds here: what the planner makes of them is asked above.
    asked: list[float] = []

    def extended(length: Length, seconds: float, *_: object) -> Length:
        asked.append(seconds)
        return Length(length.epochs + 2, length.warmup_epochs, length.decay_epochs)

    monkeypatch.setattr(planning.budget, "extended", extended)
    answer = invoke("run", run.root, "--more", "5s", "--until", "student")
    assert answer.code == 0, answer.err
    assert asked == [5.0]
    assert "7 epochs instead of 5" in answer.out
    trained = RunFolder.open(run.root).manifest.recipe["distill"]
    assert (trained["epochs"], trained["decay_epochs"]) == (7, 1)
    assert len(run.path("metrics.jsonl").read_text().splitlines()) == 7
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
        (("{run}", "--budget", "1h"), "has no time plan", "--more 1h"),
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


# ------------------------------------------------------------------ repeated, refused and interrupted requests


@pytest.fixture
def unfinished(run: RunFolder, stops_after: Callable[..., Silent]) -> RunFolder:
    """A run of twelve epochs, the last three with a falling rate, that was interrupted in its third."""
    run.remove_leftovers(run.forget("student"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(12, 3), run.root, last="student", progress=stops_after(20))
    return RunFolder.open(run.root)


def given(run: RunFolder, **time: float) -> tuple[Recipe, str]:
    """The recipe of a run that is given time, and the length in words."""
    chosen, words = actions.timed(actions.recipe_in(run.root), str(run.root), run.root, actions.Time(**time))
    return chosen, words[0][1]


def test_the_same_time_again_continues_an_unfinished_run(
    unfinished: RunFolder, stops_after: Callable[..., Silent]
) -> None:
    first, words = given(unfinished, more=100)
    assert "instead of 12" in words
    with pytest.raises(KeyboardInterrupt):
        # After one further epoch.
        run_recipe(first, unfinished.root, last="student", progress=stops_after(30))
    assert len((unfinished.root / "metrics.jsonl").read_text().splitlines()) == 4
    again, words = given(unfinished, more=100)
    assert again.distill == first.distill
    assert "continues" in words
    assert given(unfinished, more=1000)[0].distill.epochs > first.distill.epochs


def test_the_same_finish_again_continues_the_decay(unfinished: RunFolder, stops_after: Callable[..., Silent]) -> None:
    first, _ = given(unfinished, finish=300)
    assert (first.distill.epochs, first.distill.decay_epochs) == (5, 2)
    with pytest.raises(KeyboardInterrupt):
        # In the second epoch of the decay.
        run_recipe(first, unfinished.root, last="student", progress=stops_after(26))
    assert len((unfinished.root / "metrics.jsonl").read_text().splitlines()) == 4
    assert given(unfinished, finish=300)[0].distill == first.distill
    with pytest.raises(UsageError, match="decaying already"):
        given(unfinished, finish=200)
    done = run_recipe(first, unfinished.root, last="student")
    assert not done.path(GIVEN_TIME).exists()
    assert done.unexpected_files() == []


@contextlib.contextmanager
def interrupted_when(path: Path) -> Iterator[None]:
    """Presses Ctrl-C as soon as there is such a file."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            if path.is_file():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_after_an_interruption_more_time_is_not_asked_for_again(run: RunFolder, invoke: Invoke) -> None:
    setting = "gate.accuracy.max_drop_vs_teacher=0.08"
    answer = invoke("run", run.root, "--more", "1h", "--set", setting)
    assert answer.code == 2
    assert "--set cannot be used" in answer.err
    assert f"nayer-edge run {run.typed} --more 1h\n" in answer.err
    assert not run.path(PENDING).exists()

    with interrupted_when(run.path(CHECKPOINT)):
        answer = invoke("run", run.root, "--more", "1h", "--until", "student")
    assert answer.code == 130, answer.err
    assert "same command" not in answer.err
    assert f"To continue:            nayer-edge run {run.typed} --until student\n" in answer.err

    # What continues it would lose the setting at the next interruption.
    answer = invoke("run", run.root, "--set", setting)
    assert (answer.code, "--set cannot be used" in answer.err) == (2, True)


def test_a_setting_of_an_unfinished_run_is_kept(unfinished: RunFolder) -> None:
    settings = ["gate.accuracy.max_drop_vs_teacher=0.08"]
    asked = actions.read_recipe(str(unfinished.root), settings)
    time = actions.Time(finish=300)
    chosen, _ = actions.timed(asked, str(unfinished.root), unfinished.root, time, settings=settings)
    run_recipe(chosen, unfinished.root, last="lte")
    assert actions.recipe_in(unfinished.root).gate.accuracy.max_drop_vs_teacher == 0.08


@pytest.mark.parametrize("option", ["--more", "--finish", "--budget"])
def test_nothing_is_planned_while_another_process_works(option: str, run: RunFolder, invoke: Invoke) -> None:
    with lock_folder(run.root):
        answer = invoke("run", run.root, option, "5m")
    assert (answer.code, answer.out) == (2, "")
    assert "Another process is working" in answer.err
    assert "Press Ctrl-C there" in answer.err


def test_a_run_from_before_later_keys_is_extended(run: RunFolder) -> None:
    values = json.loads(run.path(MANIFEST).read_text())
    for section in (values["recipe"]["synthesis"], values["steps"]["student"]["settings"]["synthesis"]):
        for key in LATER_KEYS:
            del section[key]
    run.path(MANIFEST).write_text(json.dumps(values))
    former = RunFolder.open(run.root)

    def extends(wanted: Recipe) -> bool:
        plans = plan_steps(wanted, STEPS, former, read_once())
        return next(plan.extends for plan in plans if plan.step.name == "student")

    assert extends(recipe(8, 2))
    other = load_recipe("digits", [*SETTINGS, "distill.epochs=8", "distill.decay_epochs=2", "synthesis.lambda_tv=1.0"])
    assert not extends(other)


def test_a_budget_for_a_run_without_one_leads_somewhere(
    unfinished: RunFolder, finished: Path, begun: Path, invoke: Invoke
) -> None:
    answer = invoke("run", unfinished.root, "--budget", "10m")
    assert answer.code == 2
    assert "has no time plan" in answer.err
    assert f"nayer-edge run {unfinished.typed} --finish 5m" in answer.err
    # The others follow a cosine.
    answer = invoke("run", finished, "--budget", "10m")
    assert answer.code == 2
    assert f"nayer-edge run {finished} --bank {finished} --budget 10m --out DIR" in " ".join(answer.err.split())
    assert "--more" not in answer.err
    answer = invoke("run", finished, "--more", "1h")
    assert f"nayer-edge run {finished} --bank {finished} --budget 1h --out DIR" in " ".join(answer.err.split())
    cosine = RunFolder.open(begun)
    planning.require_new_plan(actions.recipe_in(begun), cosine, 600.0)  # its student is not begun
    write_bytes(cosine.path(CHECKPOINT), b"")
    with pytest.raises(UsageError) as caught:
        planning.require_new_plan(actions.recipe_in(begun), cosine, 600.0)
    assert f"{cosine.typed} --fresh --budget 10m" in caught.value.fix


def test_reserved_and_drawn_images_are_both_named(short: Path) -> None:
    run = RunFolder.open(short)
    inputs = (run.artifact(name) for name in ("teacher", "lte", "student"))
    asked = planning.with_sections(actions.recipe_in(short), {"validate": {"data": None, "synthetic_images": 50}})
    images = validate._images(*inputs, config=asked, out=run, progress=Silent())
    assert images.stream.name == "40 reserved during distillation, 10 drawn from the trained generator"


# ------------------------------------------------------------------ finishing a run that another process is training


class AsksAfter(Silent):
    """Asks from another thread, after so many epochs, that the run that reports here finish."""

    def __init__(self, root: Path, seconds: float, epochs: int) -> None:
        self.root, self.seconds, self.epochs = root, seconds, epochs
        self.answer: str | UsageError | None = None
        self.thread = threading.Thread(target=self.ask)

    def ask(self) -> None:
        time = actions.Time(finish=self.seconds)
        try:
            chosen = actions.recipe_in(self.root)
            self.answer = actions.finished_elsewhere(chosen, str(self.root), self.root, time, changed=False)
        except UsageError as error:
            self.answer = error

    def figures(self, **figures: object) -> None:
        epoch = int(str(figures["epoch"]).partition("/")[0])
        if epoch > self.epochs:
            # The answer is removed with the other files of an unfinished student.
            self.thread.join()
        elif epoch == self.epochs:
            self.thread.start()
            while self.thread.is_alive() and not (self.root / FINISH_REQUEST).is_file():
                sleep(0.01)


def test_finish_ends_a_run_that_another_process_trains(tmp_path: Path) -> None:
    """As a run of that length from the start: bit for bit."""
    root = tmp_path / "run"
    asker = AsksAfter(root, seconds=600, epochs=4)
    done = run_recipe(recipe(12, 3), root, last="student", progress=asker)
    asker.thread.join()
    assert asker.answer == "7 epochs instead of 12; the learning rate falls in the last 3"
    assert done.manifest.steps["student"].numbers["epochs"] == 7
    assert (done.problems(), done.unexpected_files()) == ([], [])
    same = run_recipe(recipe(7, 3), tmp_path / "same", last="student")
    for name in (STUDENT, "bank.safetensors"):
        assert sha256_of(done.path(name)) == sha256_of(same.path(name)), name


@pytest.mark.parametrize(
    ("seconds", "epochs", "message"),
    [
        (1e-6, 4, "too short"),
        pytest.param(600, 5, "decaying already", marks=pytest.mark.slow),
        pytest.param(600, 2, "not begun to train its student", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_cannot_finish_now_goes_on(tmp_path: Path, seconds: float, epochs: int, message: str) -> None:
    asker = AsksAfter(tmp_path / "run", seconds, epochs)
    length = ("distill.epochs=6", "distill.warmup_epochs=2", "distill.decay_epochs=2")
    done = run_recipe(load_recipe("digits", [*SETTINGS, *length]), tmp_path / "run", last="student", progress=asker)
    asker.thread.join()
    assert isinstance(asker.answer, UsageError)
    assert message in str(asker.answer)
    assert asker.answer.fix
    assert len(done.path("metrics.jsonl").read_text().splitlines()) == 6
    assert done.unexpected_files() == []


def test_a_request_that_nobody_answers_is_withdrawn(unfinished: RunFolder) -> None:
    """The other process ended, so that this one finishes the run; or the person who asked did not wait."""

    def interrupted(_seconds: float) -> None:
        assert unfinished.path(FINISH_REQUEST).is_file()
        raise KeyboardInterrupt

    chosen = actions.recipe_in(unfinished.root)
    with contextlib.ExitStack() as held:
        held.enter_context(lock_folder(unfinished.root))
        assert early_end.request(chosen, unfinished, 300, wait=lambda _seconds: held.close()) is None
    assert not unfinished.path(FINISH_REQUEST).exists()
    with lock_folder(unfinished.root), pytest.raises(KeyboardInterrupt):
        early_end.request(chosen, unfinished, 300, wait=interrupted)
    assert not unfinished.path(FINISH_REQUEST).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"seconds": "soon"}', '{"seconds": 60, "rest_seconds": 0, "since": 0}'])
def test_an_old_request_is_not_fulfilled(content: str, unfinished: RunFolder) -> None:
    write_bytes(unfinished.path(FINISH_REQUEST), content.encode())
    done = run_recipe(recipe(12, 3), unfinished.root, last="student")
    assert len(done.path("metrics.jsonl").read_text().splitlines()) == 12
    assert done.unexpected_files() == []


def test_an_unreadable_request_is_answered(unfinished: RunFolder) -> None:
    history = [Epoch(**json.loads(line)) for line in unfinished.path("metrics.jsonl").read_text().splitlines()]
    requests = early_end.Requests(unfinished.root)
    assert requests.length(history, Length(12, 1, 3)) is None
    for content in ("", "[]", '{"seconds": "soon", "rest_seconds": 0, "since": 0}'):
        write_bytes(unfinished.path(FINISH_REQUEST), content.encode())
        assert requests.length(history, Length(12, 1, 3)) is None
        assert "what" in json.loads(unfinished.path(FINISH_ANSWER).read_text())
        assert not unfinished.path(FINISH_REQUEST).exists()


def test_a_refusal_names_the_time_that_was_typed(unfinished: RunFolder) -> None:
    history = [Epoch(**json.loads(line)) for line in unfinished.path("metrics.jsonl").read_text().splitlines()]
    history[-1] = replace(history[-1], seconds=5.0)
    requests = early_end.Requests(unfinished.root)
    write_bytes(unfinished.path(FINISH_REQUEST), b'{"seconds": 7, "rest_seconds": 10, "since": 0}')
    assert requests.length(history, Length(12, 1, 3)) is None
    assert json.loads(unfinished.path(FINISH_ANSWER).read_text())["what"].startswith("7 s is too short")


@pytest.mark.parametrize(
    ("answer", "code", "shown"),
    [
        ({"words": "7 epochs instead of 12"}, 0, "7 epochs instead of 12"),
        ({"what": "It is too short.", "why": "", "fix": "Use more."}, 2, "It is too short."),
    ],
)
def test_what_the_command_line_says_of_the_answer(
    answer: dict[str, str], code: int, shown: str, unfinished: RunFolder, invoke: Invoke
) -> None:
    def reply() -> None:
        while not unfinished.path(FINISH_REQUEST).is_file():
            sleep(0.01)
        assert json.loads(unfinished.path(FINISH_REQUEST).read_text())["seconds"] == 300
        write_bytes(unfinished.path(FINISH_ANSWER), json.dumps(answer).encode())

    other = threading.Thread(target=reply, daemon=True)
    other.start()
    with lock_folder(unfinished.root):
        found = invoke("run", unfinished.root, "--finish", "5m")
    other.join()
    assert found.code == code
    assert shown in (found.err if code else found.out)
    assert [unfinished.path(name).exists() for name in (FINISH_REQUEST, FINISH_ANSWER)] == [False, False]
