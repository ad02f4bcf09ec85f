"""A sweep: one bank, a share for every student, an answer; interrupted anywhere it goes on where it was."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import nayer_edge as ne
from nayer_edge.config import InputSpec, Student
from nayer_edge.errors import TrainingError, UsageError
from nayer_edge.models.user_code import trusting
from nayer_edge.pipelines import actions, api
from nayer_edge.pipelines.cli.sweeping import sweep_table
from nayer_edge.pipelines.costs.budget import Costs
from nayer_edge.pipelines.costs.planning import PlanningCosts, measured_for, with_sections
from nayer_edge.pipelines.plan import bank_digest
from nayer_edge.pipelines.recipes.loading import load_recipe, portable, recipe_of, without_local_paths
from nayer_edge.pipelines.recipes.policy import Policy
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.recipes.settings import apply_settings
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.pipelines.schemas import load
from nayer_edge.pipelines.shared_bank import read_source
from nayer_edge.pipelines.show import Display
from nayer_edge.pipelines.sweep import candidates, page, results, running, workers
from nayer_edge.pipelines.sweep.order import SweepOrder
from nayer_edge.pipelines.sweep.record import (
    Bank,
    Maker,
    Measured,
    Missed,
    Share,
    StudentRecord,
    Sweep,
    Target,
    read_sweep,
    write_sweep,
)
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.run_folder import LOCK, RunFolder, StepRecord

from .conftest import SETTINGS

Invoke = Callable[..., Any]
NETS = """
from torch import nn

def small(num_classes, in_chans):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 256, num_classes))
"""
STUDENTS = ("nayer:resnet8_w4", "nayer:resnet8_w6", "nayer:nothing")
TINY = {"distill": {"epochs": 3, "warmup_epochs": 0, "decay_epochs": 1}}


def display(progress: Silent) -> Display:
    """A listener that shows nothing."""
    found = Display(Console(file=io.StringIO()))
    found.progress = progress
    return found


def written(shown: Display) -> str:
    """What a sweep has told this listener."""
    file = shown.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.fixture(scope="module")
def done(
    source: Path,
    once: Callable[[str, Callable[[Path], object]], Path],
    stops_after: Callable[..., Silent],
) -> Path:
    """A finished sweep of two rounds, which was interrupted twice. Read only."""
    made = once("sweep-done", lambda folder: interrupted_twice(source, folder / "sweep", stops_after))
    # Whoever opens a sweep locks it; a copy beside the shared one finds the bank by the same relative path.
    copied = made.with_name(f"sweep-done-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}") / "sweep"
    return copied if copied.exists() else Path(shutil.copytree(made / "sweep", copied))


def interrupted_twice(source: Path, out: Path, stops_after: Callable[..., Silent]) -> None:
    """Makes the sweep of `done`. Its plan is smaller than any that `--budget` makes."""
    plan, recipe = running.planned(actions.recipe_in(source), source, out, STUDENTS, 1000.0)
    assert plan.rounds == 1, "two students that can be built"
    plan.rounds = 2
    for each in plan.students[:2]:
        each.target = Target(round=1, seconds=5, sections=TINY)
    out.mkdir()
    write_sweep(out, plan)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # In the first student's second epoch, after the images to compare on; then in its validation.
    for steps in (45, 200):
        with pytest.raises(KeyboardInterrupt):
            running.run_sweep(None, None, out, display=display(stops_after(steps, at_once=True)))
    plan = read_sweep(out)
    assert plan.students[0].state == "training"
    assert not plan.students[0].shares
    work = running._Work(plan, recipe_of(plan.recipe, out), out, None)
    work.prepare()
    work.run_round()
    # Time for a few epochs more.
    (kept,) = work.open
    plan.seconds = plan.spent + few_epochs(out / kept.folder)
    work.save()
    running.run_sweep(recipe, source, out, STUDENTS)


def few_epochs(root: Path, count: int = 8) -> float:
    """Seconds for some more epochs of a run, and its export and validation."""
    run = RunFolder.open(root)
    rest = sum(run.manifest.steps[name].seconds for name in ("onnx", "int8", "engine", "validate", "gate"))
    return rest + count * max(
        json.loads(line)["seconds"] for line in run.path("metrics.jsonl").read_text().splitlines()
    )


def test_every_student_gets_its_share_once(done: Path) -> None:
    sweep = read_sweep(done)
    small, large, nothing = sweep.students
    assert sweep.done == 2
    assert nothing.state == "refused"
    assert "no network 'nayer:nothing'" in nothing.reason
    assert sorted(len(each.shares) for each in (small, large)) == [1, 2], "half goes on"
    for each in (small, large):
        run = RunFolder.open(done / each.folder)
        assert (run.problems(), run.unexpected_files()) == ([], [])
        assert run.manifest.recipe["student"]["model"] == each.model
        lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
        assert {line["phase"] for line in lines} == {"distill"}, "no filling"
        assert (len(lines) > 3) == (len(each.shares) == 2), "no time twice"
        assert each.state == "stopped"
        assert each.ended
        assert {artifact.name for artifact in each.artifacts} == {"fp32", "int8.cpu"}
    stopped = next(each for each in (small, large) if len(each.shares) == 1)
    assert "rank 2 of 2" in stopped.reason
    kept = next(each for each in (small, large) if len(each.shares) == 2)
    assert stopped.shares[0].agreement.value <= kept.shares[0].agreement.value


def test_its_record_follows_the_schema(done: Path) -> None:
    import jsonschema  # takes a second: not in every worker that collects this file

    values = json.loads((done / "sweep.json").read_text())
    jsonschema.validate(values, load("sweep"))
    assert values["schema"] == "nayer-edge/sweep/1"
    assert values["verdict"] == "fail"
    assert str(done.parents[1]) not in json.dumps([values["recipe"], values["bank"]]), "it can be moved"


def test_a_finished_sweep_is_read_again(done: Path, tmp_path: Path, invoke: Invoke) -> None:
    # Where its bank cannot be found.
    copied = Path(shutil.copytree(done, tmp_path / "some" / "where" / "sweep"))
    before = read_sweep(copied)
    answer = invoke("sweep", copied)
    assert answer.code == 1, answer.err
    assert max(len(line) for line in answer.out.splitlines() if not line.startswith(("Page", "  nayer-edge"))) <= 80
    assert "No student passes." in answer.out
    assert "nayer-edge " in answer.out
    assert read_sweep(copied).spent == before.spent
    # Continued by hand, or judged by another policy: the sweep says what is so now.
    small = copied / before.students[0].folder
    run = RunFolder.open(small)
    run.manifest.recipe["gate"] = {"artifacts": ["int8.cpu"], "accuracy": {}, "parity": {}}
    run.save()
    answer = invoke("sweep", copied, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["answer"] == before.students[0].model
    assert shlex.split(found["command"]) == ["nayer-edge", "export", str(small), "--int8"]
    assert "is the smallest student that passes" in (copied / "sweep.html").read_text()
    passes = found["students"][0]
    assert (passes["state"], passes["reason"]) == ("passes", "the smallest student that passes")


@pytest.mark.slow  # thirty epochs, their export and validation
def test_a_student_that_was_trained_longer_by_hand_goes_on_from_there(done: Path) -> None:
    # Beside the sweep, so that it finds its bank.
    copied = Path(shutil.copytree(done, done.with_name("by_hand")))
    plan = read_sweep(copied)
    kept = next(each for each in plan.students if len(each.shares) == 2)
    kept.shares.pop()
    assert kept.target is not None
    kept.target.sections["distill"]["epochs"] -= 1
    epochs = actions.recipe_in(copied / kept.folder).distill.epochs
    kept.state, plan.done, plan.seconds = "training", 1, plan.spent + few_epochs(copied / kept.folder, 30)
    write_sweep(copied, plan)
    running.run_sweep(None, None, copied)
    after = read_sweep(copied).student(kept.model)
    assert (after.state, after.reason) == ("stopped", "it does not pass, and the time is used up")
    assert len(after.shares) == 2
    assert actions.recipe_in(copied / kept.folder).distill.epochs > epochs


def test_a_student_of_ones_own_is_found_from_any_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    code = tmp_path / "here" / "nets.py"
    code.write_text(NETS)
    out = tmp_path / "here" / "sweep"
    monkeypatch.chdir(tmp_path / "here")
    with trusting():
        plan, recipe = running.planned(actions.recipe_in(source), source, out, ["python:nets.py:small"], 1000.0)
    (student,) = plan.students
    assert (student.model, student.params) == ("python:../nets.py:small", 2570), student.reason
    monkeypatch.chdir(tmp_path / "there")
    assert running._Work(plan, recipe, out, None).recipe_for(student).student.model == f"python:{code}:small"
    (line,) = running.as_commands(plan, source, out, "digits")
    assert f"student.model=python:{code}:small" in line
    (out / student.folder).mkdir(parents=True)
    assert api.Sweep(out, plan, None, trust_code=True).run("python:../here/nets.py:small").path == out / student.folder
    # A record of the version before, which wrote what was typed.
    monkeypatch.chdir(tmp_path / "here")
    assert student.model_copy(update={"model": "python:nets.py:small"}).located(out) == f"python:{code}:small"
    running._require_same(plan, None, None, out, ["python:nets.py:small"], None)
    with pytest.raises(UsageError, match="its students are"):
        running._require_same(plan, None, None, out, ["nayer:resnet8"], None)


def test_an_altered_student_is_found(done: Path, tmp_path: Path, invoke: Invoke) -> None:
    copied = Path(shutil.copytree(done, tmp_path / "sweep"))
    graph = copied / read_sweep(copied).students[0].folder / "export/student.int8.cpu.onnx"
    data = graph.read_bytes()
    graph.unlink()
    graph.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    answer = invoke("sweep", copied)
    assert (answer.code, "was altered" in answer.err) == (4, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--students", "nayer:resnet8,nayer:resnet8"), "Listed twice: nayer:resnet8"),
        (("--students", "nayer:nothing"), "None of the students can be built"),
        (("--students", "nayer:resnet8", "--budget", "soon"), "is not a duration"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], message: str, source: Path, tmp_path: Path, invoke: Invoke) -> None:
    answer = invoke("sweep", source, *words, "--out", tmp_path / "sweep")
    assert (answer.code, message in answer.err) == (2, True), answer.err
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_another_sweep_is_not_continued(done: Path, source: Path, tmp_path: Path, invoke: Invoke) -> None:
    answer = invoke("sweep", source, "--students", "nayer:resnet20", "--out", done)
    assert (answer.code, "holds another sweep" in answer.err) == (2, True), answer.err
    answer = invoke("sweep", source, "--students", ",".join(STUDENTS), "--budget", "9s", "--out", done)
    assert (answer.code, "its time is" in answer.err) == (2, True), answer.err
    answer = invoke("sweep", source, "--set", "distill.mixup=0.3", "--set", "distill.lr=0.1", "--dry-run")
    assert (answer.code, "A sweep sets distill.lr itself" in answer.err) == (2, True), answer.err
    # The embeddings come with the bank.
    answer = invoke("sweep", source, "--set", "lte.prompt=a {label}", "--set", "seed=1", "--dry-run")
    assert (answer.code, "A sweep sets lte.prompt itself" in answer.err) == (2, True), answer.err
    answer = invoke("sweep", done, "--set", "seed=1")
    assert (answer.code, "its original settings" in answer.err) == (2, True), answer.err
    (tmp_path / "notes.txt").write_text("mine")
    answer = invoke("sweep", source, "--students", "nayer:resnet8", "--out", tmp_path)
    assert (answer.code, "neither empty nor" in answer.err) == (2, True), answer.err
    answer = invoke("sweep", source, "--students", "nayer:resnet8", "--out", tmp_path, "--fresh")
    assert answer.code == 2
    assert (tmp_path / "notes.txt").is_file()


def test_other_settings_are_not_ignored(done: Path, source: Path, invoke: Invoke) -> None:
    words = ("--students", ",".join(STUDENTS), "--out", done)
    answer = invoke("sweep", source, *words, "--set", "gate.accuracy.max_drop_vs_teacher=0.5", "--set", "seed=7")
    assert (answer.code, "holds another sweep" in answer.err) == (2, True), answer.err
    assert "gate.accuracy.max_drop_vs_teacher: 0.04 → 0.5" in " ".join(answer.err.split())
    assert "seed: 0 → 7" in answer.err
    answer = invoke("sweep", source, *words, "--set", "distill.temperature=9", "--set", "synthesis.lambda_bn=3")
    assert answer.code == 2
    assert "distill.temperature: 4.0 → 9.0" in answer.err
    assert "synthesis.lambda_bn: " in answer.err


def kept_run(out: Path) -> Path:
    """A file in a run of a finished sweep in this folder."""
    (out / "resnet8").mkdir(parents=True)
    students = [StudentRecord(model="nayer:resnet8", folder="resnet8", target=Target(round=1, seconds=1, sections={}))]
    write_sweep(out, Sweep(name="digits", recipe={}, students=students))
    path = out / "resnet8" / "nets.py"
    path.write_text(NETS)
    return path


@pytest.mark.parametrize(
    ("students", "message"),
    [("nayer:resnet8,nayer:resnet8", "Listed twice"), ("nayer:nothing", "None of the students can be built")],
)
def test_fresh_removes_nothing_before_the_new_sweep_is_checked(
    students: str, message: str, source: Path, tmp_path: Path, invoke: Invoke
) -> None:
    kept = kept_run(tmp_path / "sweep")
    answer = invoke("sweep", source, "--students", students, "--out", tmp_path / "sweep", "--fresh")
    assert (answer.code, message in answer.err) == (2, True), answer.err
    assert kept.is_file()
    assert len(read_sweep(tmp_path / "sweep").students) == 1


def test_fresh_keeps_what_the_new_sweep_reads(source: Path, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "sweep"
    kept, bank = kept_run(out), Path(shutil.copytree(source, out / "bank"))
    words = ("--students", "nayer:resnet8_w4", "--out", out)
    answer = invoke("sweep", bank, *words)
    assert (answer.code, "holds another sweep" in answer.err) == (2, True), answer.err
    assert "--fresh" not in answer.err, "it would remove the bank"
    answer = invoke("sweep", bank, *words, "--fresh")
    assert (answer.code, "student.bank" in answer.err) == (2, True), answer.err
    answer = invoke("sweep", source, "--students", f"python:{kept}:small", "--trust-code", "--out", out, "--fresh")
    assert (answer.code, "nets.py" in answer.err) == (2, True), answer.err
    assert "--fresh would delete what the new sweep reads" in answer.err
    assert kept.is_file()
    assert (bank / "bank.safetensors").is_file()


def test_a_run_without_a_student_has_no_bank(source: Path, tmp_path: Path, invoke: Invoke) -> None:
    root = Path(shutil.copytree(source, tmp_path / "unfinished"))
    run = RunFolder.open(root)
    run.forget("student")
    run.save()
    answer = invoke("sweep", root, "--students", "nayer:resnet8_w4", "--out", tmp_path / "sweep")
    assert (answer.code, "has no finished student" in answer.err) == (2, True), answer.err
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_an_altered_bank_is_refused(source: Path, tmp_path: Path, invoke: Invoke) -> None:
    root = Path(shutil.copytree(source, tmp_path / "altered"))
    bank = root / "bank.safetensors"
    bank.write_bytes(bank.read_bytes()[:-1] + b"?")
    kept = kept_run(tmp_path / "sweep")
    answer = invoke("sweep", root, "--students", "nayer:resnet8_w4", "--out", tmp_path / "sweep", "--fresh")
    assert (answer.code, "was altered" in answer.err) == (4, True), answer.err
    assert kept.is_file()


def test_a_student_that_cannot_be_planned_ends_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others share its time, and the next call tries it again."""
    out = tmp_path / "sweep"
    plan, recipe = running.planned(actions.recipe_in(source), source, out, STUDENTS[:2], 1000.0)
    out.mkdir()
    work = running._Work(plan, recipe, out, None)

    failures = [MemoryError(), ZeroDivisionError("a bug")]

    def failing(recipe: Any, *_: Any) -> Any:
        if recipe.student.model == STUDENTS[0]:
            raise failures.pop(0)
        return measured_for(recipe)

    monkeypatch.setattr(workers, "measured_for", failing)
    work.prepare()
    small, large = plan.students
    assert (small.state, large.state) == ("failed", "waiting")
    assert "memory" in small.reason
    assert large.target is not None
    assert plan.spent > 0, "measuring the students counts"
    assert large.target.seconds == pytest.approx(1000.0 - plan.spent)
    assert running._Work(read_sweep(out), recipe, out, None).sweep.students[0].state == "failed"
    # Failing again ends nothing. The other one has had its first share by the time that there is enough memory.
    plan.rounds, plan.done, plan.spent = 2, 1, 400.0
    running._Work(plan, recipe, out, None).prepare()
    assert (small.state, large.state) == ("failed", "waiting")
    assert "ZeroDivisionError: a bug" in small.reason
    assert "the same command once more" in results.advice(small)
    monkeypatch.setattr(workers, "measured_for", measured_for)
    again = running._Work(plan, recipe, out, None)
    again.prepare()
    assert small.state == "waiting", small.reason
    assert small.target is not None
    assert small.target.round == 2
    assert small.target.seconds == pytest.approx((1000.0 - plan.spent) / 2)


def test_what_a_machine_lacks_is_tried_again(source: Path, tmp_path: Path) -> None:
    """A student whose code is not trusted: the start says what to do, and once it is done, the student takes part."""
    out, code = tmp_path / "sweep", tmp_path / "nets.py"
    code.write_text(NETS)
    models = [STUDENTS[0], f"python:{code}:small", "nayer:nothing"]
    plan, recipe = running.planned(actions.recipe_in(source), source, out, models, 1000.0)
    other, own, nothing = plan.students
    assert (own.state, nothing.state) == ("failed", "refused")
    assert "repeat the command with --trust-code" in own.reason
    out.mkdir()
    other.state, other.reason = "stopped", "more training cannot help: it is too slow"
    running._Work(plan, recipe, out, None).prepare()
    assert (own.state, own.target) == ("failed", None)
    shown = display(Silent())
    with trusting():
        running._Work(plan, recipe, out, shown).prepare()
    assert (own.state, own.params) == ("waiting", 2570), own.reason
    assert own.target is not None
    assert "nayer:nothing does not take part: The zoo has no network 'nayer:nothing'" in written(shown)
    assert own.model not in written(shown)


def test_the_time_of_one_that_needs_too_much_goes_to_the_others(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    plan, recipe = running.planned(actions.recipe_in(source), source, out, STUDENTS[:2], 100.0)
    plan.rounds = 2
    out.mkdir()

    def measured(chosen: Any, *_: Any) -> PlanningCosts:
        step = 0.01 if chosen.student.model == STUDENTS[0] else 0.7
        return PlanningCosts(Costs(0.001, 0.0, step, 0.0, 1.0, 20, 64), 10, "batchnorm", 8, 100, 256, 64, {})

    monkeypatch.setattr(workers, "measured_for", measured)
    shown = display(Silent())
    running._Work(plan, recipe, out, shown).prepare()
    small, large = plan.students
    assert (small.state, large.state, plan.rounds) == ("waiting", "stopped", 1)
    assert small.target is not None
    assert small.target.seconds == pytest.approx(100.0 - plan.spent)
    assert "its share of 50 s is too short" in large.reason
    (line,) = [line for line in written(shown).splitlines() if line.startswith("To train it by hand")]
    assert f"nayer-edge run {source} --bank {source} --budget " in line


def test_a_bank_that_grew_is_said(source: Path, tmp_path: Path) -> None:
    recipe = actions.on_bank(actions.recipe_in(source), source)
    students = [StudentRecord(model=f"nayer:resnet8_w{n}", folder=f"w{n}") for n in (4, 6)]
    sweep = Sweep(name="x", recipe={}, students=students, bank=Bank(run="../x", name="x", digest="former", images=3))
    shown = display(Silent())
    work = running._Work(sweep, recipe, tmp_path, shown)
    started = tmp_path / "w4" / "student" / "source.json"
    started.parent.mkdir(parents=True)
    started.write_text("{}")
    work.note_bank(RunFolder.open(source))
    assert sweep.bank is not None
    assert (sweep.bank.digest, sweep.bank.changed) == ("former", True)
    assert "nayer:resnet8_w6 will start with" in " ".join(written(shown).split())
    assert "nayer:resnet8_w4 will" not in written(shown)
    # While no student has begun, it is the bank of all of them.
    started.unlink()
    sweep.bank.changed = False
    work.note_bank(RunFolder.open(source))
    assert (sweep.bank.digest, sweep.bank.changed) == (bank_digest(source), False)


def own_bank(out: Path, seconds: float) -> tuple[Sweep, Recipe]:
    """A sweep of two students that makes its own bank."""
    plan, recipe = running.planned(load_recipe("digits", list(SETTINGS)), None, out, STUDENTS[:2], seconds)
    out.mkdir()
    return plan, recipe


def test_the_run_that_makes_the_bank_is_the_first_share_of_its_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was trained is thrown away, and nobody is trained twice."""
    out = tmp_path / "sweep"
    plan, recipe = own_bank(out, 1000.0)
    small, large = plan.students
    # Smaller than any that is planned.
    small.target = Target(round=1, seconds=5, sections=TINY)
    asked: list[tuple[Recipe, float | None]] = []

    def timed(recipe: Recipe, _name: None, _root: Path, time: actions.Time) -> tuple[Recipe, list[Any]]:
        asked.append((recipe, time.budget))
        # With one epoch before the decay, the run never adapts its length.
        planned = {"seconds": time.budget, "fill_seconds": 1, "rest_seconds": 1}
        return with_sections(recipe, {"budget": planned, "distill": {"epochs": 3}}), []

    monkeypatch.setattr(actions, "timed", timed)
    work = running._Work(plan, recipe, out, None)
    work.prepare()
    ((chosen, seconds),) = asked
    assert (chosen.student.model, chosen.image_time, seconds) == (large.model, pytest.approx(0.35 / 0.675), 675.0)
    assert plan.bank is not None
    assert (plan.bank.run, large.target and large.target.seconds) == (large.folder, 675.0)
    assert actions.recipe_in(out / large.folder).image_time == 0.35, "runs that start from it make no more than usual"
    metrics = (out / large.folder / "metrics.jsonl").read_bytes()
    made = plan.spent
    assert made > 0, "making the bank counts"
    assert not large.shares, "it is not judged yet"
    # A repeated command makes it only once.
    again = running._Work(read_sweep(out), recipe, out, None)
    again.prepare()
    assert len(asked) == 1
    again.run_round()
    plan = again.sweep
    small, large = plan.students
    assert [len(each.shares) for each in (small, large)] == [1, 1]
    assert (out / large.folder / "metrics.jsonl").read_bytes() == metrics
    assert large.shares[0].trained_seconds > 0
    assert large.shares[0].spent < plan.spent - made, "its training was counted before"
    assert large.artifacts
    assert not (out / "bank").exists()
    assert not (out / large.folder / "student" / "source.json").exists()
    assert read_source(RunFolder.open(out / small.folder)).digest == bank_digest(out / large.folder)
    # Without the run that made the images, no student can begin.
    shutil.rmtree(out / large.folder)
    with pytest.raises(UsageError, match="is gone"):
        running._Work(plan, recipe, out, None).bank()


def test_the_time_after_the_bank_is_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that they are too short for, which another budget may still change."""
    out = tmp_path / "sweep"
    plan, recipe = own_bank(out, 1000.0)
    small, large = plan.students
    run_recipe(recipe.model_copy(update={"student": Student(model=large.model)}), out / large.folder, last="student")
    plan.maker = Maker(model=large.model, folder=large.folder, seconds=675.0, image_time=0.5)
    monkeypatch.setattr(running, "rest_seconds", lambda *_: 40.0)
    step = 0.01

    def measured(*_: Any) -> PlanningCosts:
        return PlanningCosts(Costs(0.001, 0.0, step, 0.0, 1.0, 20, 64), 10, "batchnorm", 8, 100, 256, 64, {})

    monkeypatch.setattr(workers, "measured_for", measured)
    plan.spent = 700.0
    step = 10.0
    with pytest.raises(UsageError, match="too short for 1 students"):
        running._Work(plan, recipe, out, None).prepare()
    assert not any(each.target for each in read_sweep(out).students)
    assert running.begun(recipe, None, out, STUDENTS[:2], 2000.0) is None, "another budget may be given"
    (line,) = running.commands_left(plan, out)[0][1:]
    assert line == f"nayer-edge run {shlex.quote(str(out / large.folder))}", "it has its share"
    step = 0.01
    running._Work(plan, recipe, out, None).prepare()
    assert small.target is not None
    assert small.target.seconds == pytest.approx(1000.0 - plan.spent - 40.0)
    assert large.target is not None


def test_another_makes_the_bank_if_the_first_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep goes on with the same one after an interruption, and with the next after a failure."""
    out = tmp_path / "sweep"
    plan, recipe = own_bank(out, 1000.0)
    small, large = plan.students
    ends: list[BaseException] = [KeyboardInterrupt(), TrainingError("The student is dead."), UsageError("not now")]
    made: list[str] = []

    def fails(recipe: Recipe, root: Path, **_: Any) -> None:
        run = RunFolder.create(root, portable(recipe, root), 0, {}, {})
        for name in ("teacher", "lte"):
            run.manifest.steps[name] = StepRecord(digest="0" * 64, settings={}, seconds=0.0, finished="")
        run.save()
        made.append(recipe.student.model)
        raise ends.pop(0)

    monkeypatch.setattr(actions, "timed", lambda recipe, *_: (recipe, []))
    monkeypatch.setattr(actions, "make", fails)
    with pytest.raises(KeyboardInterrupt):
        running._Work(plan, recipe, out, None).bank()
    plan = read_sweep(out)
    assert plan.maker is not None
    assert plan.maker.model == large.model
    with pytest.raises(UsageError, match="holds another sweep"):
        running.begun(recipe, None, out, STUDENTS[:2], 2000.0)
    assert running.begun(recipe, None, out, STUDENTS[:2], None) is not None
    with pytest.raises(UsageError, match="not now"):
        running._Work(plan, recipe, out, None).bank()
    assert made == [large.model, large.model, small.model]
    assert [each.state for each in plan.students] == ["waiting", "failed"]
    assert not (out / large.folder).exists(), "the next call gives it a share like the others'"


def test_who_makes_the_bank() -> None:
    """The recipe's own student if it takes part as it is, else the largest."""
    students = [StudentRecord(model=f"s{n}", folder=f"s{n}", params=n) for n in (3, 9, 5)]
    sweep = Sweep(name="x", recipe={"student": {"model": "s5", "arguments": {}}}, students=students)
    assert running.bank_maker(sweep).model == "s5"
    sweep.recipe["student"]["arguments"] = {"width": 4}
    assert running.bank_maker(sweep).model == "s9"
    students[1].state = "stopped"
    assert running.bank_maker(sweep).model == "s5"


def test_every_round_gets_an_equal_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five students, one after another; each takes exactly its share."""
    students = [
        StudentRecord(
            model=f"s{n}", folder=f"s{n}", int8_bytes=n + 1, target=Target(round=1, seconds=66.7, sections={})
        )
        for n in range(5)
    ]
    sweep = Sweep(name="x", recipe={}, seconds=1000.0, rounds=3, students=students)
    write_sweep(tmp_path, sweep)
    work = running._Work(sweep, load_recipe("digits"), tmp_path, None)

    def train(taking_part: list[StudentRecord]) -> None:
        for each in taking_part:
            seconds = each.target.seconds if each.target else 0.0
            sweep.spent += seconds
            each.shares.append(
                Share(
                    round=sweep.done + 1, seconds=seconds, spent=seconds, trained_seconds=1, verdict="fail",
                    finished="", agreement=results.Bounds(value=0.5 + int(each.folder[1:]) / 100, low=0, high=1, n=100),
                )
            )  # fmt: skip

    monkeypatch.setattr(running, "_outgrown", lambda *_: False)
    monkeypatch.setattr(work, "train", train)
    monkeypatch.setattr(
        work, "extended", lambda _student, number, seconds: Target(round=number, seconds=seconds, sections={})
    )
    while work.open:
        work.run_round()
    got = [[made.seconds for each in students for made in each.shares if made.round == n] for n in (1, 2, 3)]
    assert [len(shares) for shares in got] == [5, 3, 2]
    for shares in got:
        assert shares == pytest.approx([1000 / 3 / len(shares)] * len(shares), rel=1e-3)


def test_a_damaged_record_can_be_started_over(done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "sweep"))
    (out / "sweep.json").write_text("{")
    (out / "resnet8_w4.tensorboard").mkdir()
    (out / "mine").mkdir()
    running._clear(out)
    assert [path.name for path in out.iterdir() if path.name != LOCK] == ["mine"]


def test_decisions_after_a_round_are_saved_together(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between two of them, a repetition would rank only those that are left."""
    plan = read_sweep(done)
    for each in plan.students[:2]:
        each.state, each.shares = "waiting", each.shares[:1]
    plan.done, plan.rounds = 0, 2
    saved: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(
        running, "write_sweep", lambda _, sweep: saved.append((sweep.done, [each.state for each in sweep.students[:2]]))
    )
    running._Work(plan, recipe_of(plan.recipe, done), done, None).halve(1)
    assert saved == [(1, ["stopped", "waiting"])] or saved == [(1, ["waiting", "stopped"])]


def test_too_little_time_and_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = actions.recipe_in(source), tmp_path / "sweep"
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _path: usage(1, 1, 1000))
        with pytest.raises(UsageError, match="disk is too small"):
            running.run_sweep(recipe, source, out, STUDENTS[:1], 5.0)
    # Nothing was begun, so another time may be given.
    with pytest.raises(UsageError, match="too short for 1 students") as caught:
        running.run_sweep(recipe, source, out, STUDENTS[:1], 6.0)
    assert "Use at least" in caught.value.fix
    assert not (out / "resnet8_w4").exists()


def test_a_dry_run_prints_equal_lines(source: Path, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "sweep"
    words = ("--students", ",".join(STUDENTS), "--budget", "10m", "--set", "seed=1", "--out", out, "--dry-run")
    answer = invoke("sweep", source, *words, "--json")
    assert answer.code == 0, answer.err
    lines = [shlex.split(line) for line in json.loads(answer.out)["commands"]]
    assert [line[line.index("--out") + 1] for line in lines] == [str(out / "resnet8_w4"), str(out / "resnet8_w6")]
    for line in lines:
        assert line[:3] == ["nayer-edge", "distill", str(source)]
        assert line[line.index("--bank") + 1] == str(source)
        assert line[line.index("--budget") + 1] == "300s"
        assert "seed=1" in line
    assert not out.exists()
    answer = invoke("sweep", "digits", *words)
    assert answer.code == 0, answer.err
    # By hand, of 600 s: 35 % for images, and half of the rest for each student.
    first, second = [shlex.split(line) for line in answer.out.splitlines() if line.startswith("nayer-edge")]
    settings = ["--set", "seed=1", "--set", "student.model=nayer:resnet8_w6", "--set", "image_time=0.52"]
    end = ["--budget", "405s", "--out", str(out / "resnet8_w6")]
    assert first == ["nayer-edge", "distill", "digits", *settings, *end], "the largest makes the bank"
    assert second[second.index("--bank") + 1] == str(out / "resnet8_w6")
    assert second[second.index("--budget") + 1] == "195s"
    assert second[-1] == str(out / "resnet8_w4")
    assert "2 students, 10 min, 1 round of successive halving." in answer.out
    answer = invoke("sweep", source, "--students", f"{words[1]},nayer:resnet8_w8", "--out", out, "--dry-run")
    assert "up to 2 rounds of successive halving." in " ".join(answer.out.split()), "shares may be too short for them"


@pytest.mark.parametrize("seconds", [None, 1000.0])
def test_lines_that_run_code_of_ones_own_say_so(seconds: float | None) -> None:
    students = [StudentRecord(model="nayer:resnet8", folder="resnet8")]
    sweep = Sweep(name="digits", recipe={}, seconds=seconds, students=students)
    with trusting():
        lines = running.as_commands(sweep, None, Path("runs/sweep"), "mine.toml")
    assert len(lines) == 1 + (sweep.seconds is None)
    assert all("--trust-code" in shlex.split(line) for line in lines)


def test_a_dry_run_of_a_begun_sweep_goes_on_with_it(done: Path, source: Path, invoke: Invoke) -> None:
    plan = read_sweep(done)
    further, interrupted = plan.students[:2]
    further.state, interrupted.state = "waiting", "training"
    plan.students.append(StudentRecord(model="nayer:resnet8_w12", folder="later"))
    plan.recipe["gate"]["accuracy"]["max_drop_vs_teacher"] = 0.5
    plan.seconds = plan.spent + 300
    commands, without = running.commands_left(plan, done)
    assert without == []
    lines = [shlex.split(line) for line in commands]
    assert lines[0] == ["nayer-edge", "run", str(done / further.folder), "--more", "100s"]
    assert lines[1] == ["nayer-edge", "run", str(done / interrupted.folder)]
    assert lines[2][:5] == ["nayer-edge", "run", str(source), "--set", "gate.accuracy.max_drop_vs_teacher=0.5"]
    assert lines[2][5:9] == ["--bank", str(source), "--budget", "100s"]
    assert lines[2][-2:] == ["--out", str(done / "later")]
    # Nothing is left of this one, asked for in either way.
    for words in ((done,), (source, "--students", ",".join(STUDENTS), "--out", done)):
        answer = invoke("sweep", *words, "--dry-run")
        assert answer.code == 0, answer.err
        assert "2 of 2 rounds done" in answer.out
        assert f"nayer-edge run {done}/STUDENT --more 1h" in answer.out
        assert "distill" not in answer.out


def test_no_line_gives_a_student_too_little_time(done: Path, tmp_path: Path, invoke: Invoke) -> None:
    """Rounds are left, but no time."""
    # Beside the sweep, so that it finds its bank.
    out = Path(shutil.copytree(done, done.with_name(f"{done.name}-{tmp_path.name}")))
    plan = read_sweep(out)
    further, interrupted = plan.students[:2]
    further.state, interrupted.state = "waiting", "training"
    planned = Target(round=1, seconds=39.5, sections=TINY)
    plan.students.append(StudentRecord(model="nayer:resnet8_w12", folder="planned", target=planned))
    plan.students.append(StudentRecord(model="nayer:resnet8_w10", folder="unplanned"))
    plan.done, plan.seconds = 1, plan.spent
    write_sweep(out, plan)
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    answer = invoke("sweep", out, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    rest, own = (shlex.split(line) for line in found["commands"])
    assert rest == ["nayer-edge", "run", str(out / interrupted.folder)], "the rest of its share"
    assert own[own.index("--budget") + 1] == "40s", "its share is planned"
    short, none = found["notes"]
    assert short.startswith(f"No line for {further.model}: 1 s is too short to improve this run."), short
    assert "Use at least: --more" in short
    assert none.startswith("No line for nayer:resnet8_w10: No time is left for it. To train it all the same: ")
    # What has no line is what the product would refuse.
    assert invoke("run", out / further.folder, "--more", "1s").code == 2
    answer = invoke("sweep", out, "--dry-run")
    assert "4 students and no time left, 1 of 2 rounds done." in answer.out
    assert short in answer.out
    assert "--more 1s" not in answer.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == files, "a dry run writes nothing"


@pytest.mark.parametrize("prior", ["batchnorm", "generator"])
def test_the_line_of_a_students_own_run_is_accepted(prior: str, done: Path, tmp_path: Path, invoke: Invoke) -> None:
    """The sweep's recipe differs from that of the bank's run, also in what `--bank` and `--budget` set."""
    plan = read_sweep(done)
    plan.recipe["gate"]["accuracy"]["max_drop_vs_teacher"] = 0.5
    plan.recipe["lte"]["prompt"] = "a picture of a {label}"
    plan.recipe["generator"]["noisy_dim"] = 64
    plan.recipe["synthesis"] |= {"prior": prior, "pixel_step": 0.2, "lambda_ce": 0.7, "rounds": 9}
    later = StudentRecord(model="nayer:resnet8_w12", folder="later")
    line = shlex.split(running.own_run(plan, later, done, 600))
    settings = [line[at + 1] for at, word in enumerate(line) if word == "--set"]
    # Losses for one prior do not suit the bank's.
    kept = ["synthesis.lambda_ce=0.7"] if prior == "batchnorm" else []
    assert settings == [*kept, "gate.accuracy.max_drop_vs_teacher=0.5", "student.model=nayer:resnet8_w12"]
    line[line.index("--out") + 1] = str(tmp_path / "later")
    answer = invoke(*line[1:], "--until", "teacher")
    assert answer.code == 0, answer.err
    assert actions.recipe_in(tmp_path / "later").gate.accuracy.max_drop_vs_teacher == 0.5


def test_a_sweep_of_a_former_version_goes_on(done: Path, source: Path) -> None:
    """Its record lacks what recipes have since."""
    plan = read_sweep(done)
    del plan.recipe["image_time"]
    running._require_same(plan, actions.recipe_in(source), source, done, STUDENTS, None)


def test_settings_are_written_as_they_are_read() -> None:
    """JSON would write this character as two halves, which TOML does not know."""
    (item,) = running._differing({"validate": {"data": None}}, {"validate": {"data": "/data/😀"}})
    assert apply_settings({}, [item]) == {"validate": {"data": "/data/😀"}}


def test_lines_for_students_leave_out_the_warm_up(tmp_path: Path, invoke: Invoke) -> None:
    """Only the run that makes the bank has one; `--bank` refuses the setting."""
    words = ("--students", ",".join(STUDENTS), "--set", "distill.warmup_epochs=2", "--set", "seed=1")
    answer = invoke("sweep", "digits", *words, "--out", tmp_path / "sweep", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    bank, *students = json.loads(answer.out)["commands"]
    assert "--set distill.warmup_epochs=2 --set seed=1" in bank
    assert len(students) == 2
    assert all("warmup" not in line and "--set seed=1" in line for line in students)


def test_a_run_that_was_begun_by_hand_is_not_planned_anew(tmp_path: Path) -> None:
    sweep = Sweep(name="digits", recipe={}, seconds=100.0, students=[StudentRecord(model="nayer:x", folder="x")])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "manifest.json").write_text("{}")
    running._Work(sweep, load_recipe("digits"), tmp_path, None).plan_first()
    assert sweep.students[0].target is None


def test_a_recipe_names_its_students_and_time(tmp_path: Path) -> None:
    order = SweepOrder.typed("digits-sweep", (), None)
    assert order.recipe is not None
    assert order.recipe.sweep is not None
    assert order.students == order.recipe.sweep.students
    assert len(order.students) == 5
    assert order.seconds == 300.0
    order = SweepOrder.typed("digits-sweep", STUDENTS, "10m")
    assert (order.students, order.seconds) == (STUDENTS, 600.0)
    order = SweepOrder.typed("digits", (), None)
    assert (order.students, order.seconds) == ((), None)
    # Files are those of the recipe's folder, whatever the current one.
    recipe = tmp_path / "own.toml"
    shipped = Path(running.__file__).parents[1] / "recipes" / "digits-sweep.toml"
    text, replaced = re.subn(
        r"students = \[.*?\]", 'students = ["python:nets.py:small"]', shipped.read_text(), flags=re.S
    )
    assert replaced == 1
    recipe.write_text(text)
    shutil.copy(shipped.with_name("digits.toml"), tmp_path)
    order = SweepOrder.typed(str(recipe), (), None)
    assert order.recipe is not None
    assert order.students == (f"python:{tmp_path / 'nets.py'}:small",)
    # Records and pages do not say where that is.
    values = portable(order.recipe, tmp_path / "sweep")
    assert values["sweep"]["students"] == ["python:../nets.py:small"]
    again = recipe_of(values, tmp_path / "sweep").sweep
    assert again is not None
    assert again.students == order.students
    values, beside = without_local_paths(order.recipe, tmp_path / "sweep")
    assert values["sweep"]["students"] == ["python:nets.py:small"]
    assert "nets.py" in beside


def test_from_python(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ne.sweep(done)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("HOME", str(done.parent))
        assert ne.sweep("~/sweep").record == found.record
    assert (found.record.verdict, found.best) == ("fail", None)
    assert found.run("nayer:resnet8_w4").path == done / "resnet8_w4"
    with pytest.raises(UsageError, match="no run of"):
        found.run("nayer:nothing")


# ------------------------------------------------------------------ candidates


def test_proposals_are_spread_over_the_sizes() -> None:
    sizes = {f"s{size}": size for size in (5_000, 5_500, 6_000, 20_000, 21_000, 80_000, 300_000)}
    chosen = candidates.spread(sizes)
    assert chosen == ["s5000", "s6000", "s21000", "s80000", "s300000"]
    assert candidates.spread({"b": 2, "a": 1}) == ["a", "b"]


@pytest.mark.slow
def test_proposals_suit_the_teacher() -> None:
    spec = InputSpec(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))
    found = candidates.proposed(272_474, spec, ["a", "b", "c"])
    assert 3 <= len(found) <= candidates.FEW
    costs = [candidates.student_cost(model, spec, ["a", "b", "c"], Policy()) for model in found]
    params = [cost.params for cost in costs]
    assert params == sorted(params)
    assert 2_000 <= params[0] <= 6_000
    assert params[-1] <= 272_474 / 3
    with pytest.raises(UsageError, match="No student is proposed"):
        candidates.proposed(3_000, spec, ["a", "b", "c"])


def test_only_a_clear_excess_stops_a_student_before_training() -> None:
    policy = Policy.model_validate({"latency": {"max_p95_ms": 1.0}, "size": {"max_bytes": 1000}})

    def excess(p95: float, size: int) -> str:
        cost = candidates.StudentCost("a", 1, 1, size, True, 1.0, 1.0, 1, 9.0, p95)
        return candidates.cannot_pass(cost, policy)

    assert excess(1.2, 1040) == ""
    assert "1.3 ms" in excess(1.3, 10)
    assert "1,100 bytes" in excess(0.5, 1100)


# ------------------------------------------------------------------ the answer


def rate(value: float, n: int = 600) -> results.Bounds:
    return results.bounds(round(value * n), n, 0.95)


def student(name: str, size: int, accuracy: float, *, missed: str = "", shares: tuple[float, ...] = ()) -> Any:
    """A student with INT8 accuracy, a check that it misses, and agreement after shares of a minute each."""
    limit = {
        **{"accuracy_drop_vs_teacher": 0.04, "accuracy_drop_vs_fp32": 0.01, "per_class_drop": 0.05, "runtime": None},
        **{"size": 1000.0, "latency_p95": 1.0, "speedup_vs_fp32": 1.5, "int8_coverage": 1.0, "parity": 1e-3},
    }
    observed = {
        **{"accuracy_drop_vs_teacher": 0.99 - accuracy, "accuracy_drop_vs_fp32": 0.03, "per_class_drop": 0.2},
        **{"size": float(size), "latency_p95": 1.1, "speedup_vs_fp32": 1.1, "int8_coverage": 0.8, "parity": 0.01},
        "runtime": None,
    }
    misses = [
        Missed(check=missed, artifact="int8.cpu", observed=observed[missed], bound=None, limit=limit[missed],
               verdict="fail", detail=f"{name} misses {missed}.")
    ] if missed else []  # fmt: skip
    return StudentRecord(
        model=name, folder=name, state="stopped", reason="the time is over", params=size, int8_bytes=size,
        shares=[
            Share(round=n, seconds=60, spent=60, trained_seconds=60.0 * n, agreement=rate(agreed), verdict="fail",
                  finished="")
            for n, agreed in enumerate(shares, 1)
        ],
        artifacts=[
            Measured(name="fp32", accuracy=rate(accuracy), p95_ms=2.0, size_bytes=4 * size),
            Measured(name="int8.cpu", accuracy=rate(accuracy), p95_ms=0.5, size_bytes=size,
                     verdict="fail" if missed else "pass"),
        ],
        missed=misses,
    )  # fmt: skip


def concluded(*students: Any, out: Path = Path("runs/sweep")) -> Sweep:
    recipe = load_recipe("digits").model_dump(mode="json", by_alias=True)
    sweep = Sweep(name="digits", recipe=recipe, students=list(students), seconds=300, rounds=2, done=2, kind="holdout",
                  images="600 labelled images: digits", teacher_accuracy=0.99,
                  bank=Bank(run="../digits", name="digits", digest="0", images=2000))  # fmt: skip
    results.conclude(sweep, out)
    return sweep


def test_the_smallest_that_passes_is_the_answer() -> None:
    short = student("tiny", 500, 0.9, missed="accuracy_drop_vs_teacher")
    sweep = concluded(student("large", 3000, 0.99), short, student("small", 1000, 0.98))
    assert (sweep.verdict, sweep.answer) == ("pass", "small")
    assert sweep.command == "nayer-edge export runs/sweep/small --int8"
    assert "1,000 parameters, int8.cpu 1.0 kB, 0.500 ms, 98.00 % accuracy" in sweep.sentence


@pytest.mark.parametrize(
    ("found", "way", "command"),
    [
        (student("a", 500, 0.94, missed="accuracy_drop_vs_teacher", shares=(0.9,)), None, "--more"),
        (student("a", 500, 0.94, missed="accuracy_drop_vs_teacher", shares=(0.9, 0.93)), "time", "--more"),
        (student("a", 500, 0.90, missed="accuracy_drop_vs_teacher", shares=(0.9, 0.901)), "larger", "students"),
        (student("a", 1500, 0.99, missed="size"), "limit", "--print-policy"),
        (student("a", 500, 0.97, missed="accuracy_drop_vs_fp32"), "quantization", "--qat"),
        (student("a", 500, 0.97, missed="per_class_drop"), "quantization", "--qat"),
        (student("a", 500, 0.97, missed="int8_coverage"), "quantization", "--qat"),
        (student("a", 500, 0.97, missed="speedup_vs_fp32"), "limit", "--print-policy"),
        (student("a", 500, 0.97, missed="parity"), "limit", "--print-policy"),
        (student("a", 500, 0.97, missed="runtime"), None, "nayer-edge report"),
    ],
)
def test_none_passes(found: Any, way: str | None, command: str) -> None:
    sweep = concluded(found)
    assert (sweep.verdict, sweep.answer, sweep.students[0].way) == ("fail", None, way)
    assert found.missed[0].detail in sweep.sentence
    assert command in sweep.command
    assert results.advice(found)
    table = io.StringIO()
    Console(file=table, width=80).print(sweep_table(sweep))
    assert found.missed[0].detail in " ".join(table.getvalue().split())


def test_advice_says_which_way() -> None:
    def advised(*checks: str, shares: tuple[float, ...] = ()) -> str:
        found = student("a", 500, 0.94, shares=shares)
        found.missed = [student("a", 500, 0.94, missed=check).missed[0] for check in checks]
        concluded(found)
        return results.advice(found)

    assert "one short share does not tell" in advised("accuracy_drop_vs_teacher", shares=(0.9,))
    assert "lower export.max_drop" in advised("accuracy_drop_vs_fp32")
    assert "higher export.max_drop" in advised("int8_coverage")
    assert "max_drop" not in advised("int8_coverage", "per_class_drop"), "it would help one and harm the other"
    assert "a smaller student" in advised("latency_p95", "speedup_vs_fp32")
    assert "another student" in advised("speedup_vs_fp32"), "INT8 speeds up larger ones more"


@pytest.mark.parametrize(
    ("agreements", "last", "way"),
    [
        ([0.3, 0.5, 0.60, 0.60, 0.61, 0.62, 0.63, 0.63], 0.9, "time"),
        ([0.3, 0.5, 0.62, 0.62, 0.62, 0.62, 0.62, 0.62], 0.9, "larger"),
        # Single epochs vary.
        ([0.3, 0.5, 0.60, 0.64, 0.61, 0.62, 0.60, 0.64], 0.9, "larger"),
        # Of the images that all students share it misses 10 %, of its own as many, or twice as many.
        ([0.3, 0.5, 0.600, 0.600, 0.605, 0.605, 0.609, 0.609], 0.9, "time"),
        ([0.3, 0.5, 0.600, 0.600, 0.605, 0.605, 0.609, 0.609], 0.8, "larger"),
        # Too few epochs, or its own images are too easy.
        ([0.3, 0.5, 0.6, 0.6, 0.7, 0.7, 0.7], 0.9, None),
        ([0.3, 0.5, 0.60, 0.60, 0.61, 0.62, 0.63, 0.63], 1.0, None),
    ],
)
def test_the_epochs_of_a_single_share_tell_which_way(
    agreements: list[float], last: float, way: str | None, tmp_path: Path
) -> None:
    found = student("a", 500, 0.94, missed="accuracy_drop_vs_teacher", shares=(0.9,))
    lines = [{"phase": "distill", "loss_ce": 0.5, "seconds": 5.0, "agreement": value} for value in agreements]
    lines += [{"phase": "distill", "loss_ce": None, "seconds": 3.0, "agreement": value} for value in (0.7, last)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert concluded(found, out=tmp_path).students[0].way == way
    # Two shares tell more: they are compared on the same images.
    found.shares = student("a", 500, 0.94, shares=(0.9, 0.901)).shares
    assert concluded(found, out=tmp_path).students[0].way == "larger"


def test_the_smallest_is_decided_by_the_files() -> None:
    """Before they are exported, both are expected to have as many bytes."""
    first, second = (student(name, size, 0.98, shares=(0.9,)) for name, size in (("a", 106_018), ("b", 100_354)))
    first.int8_bytes = second.int8_bytes = 95_186
    assert concluded(first, second).answer == "b"
    assert running._standing(second).size == 100_354
    assert StudentRecord(model="c", folder="c", int8_bytes=95_186).size == 95_186


def test_int8_is_what_is_shipped_although_the_policy_names_fp32_too() -> None:
    found = student("a", 500, 0.98)
    fp32, int8 = found.artifacts
    fp32.verdict = "pass"
    found.artifacts.append(int8.model_copy(update={"name": "int8.arm", "verdict": None, "size_bytes": 600}))
    assert found.shipped is int8
    spots = page._spots(concluded(found), "size_bytes")
    assert [(spot.artifact, spot.series, spot.passes) for spot in spots] == [
        ("fp32", 1, True),
        ("int8.cpu", 2, True),
        ("int8.arm", 2, False),
    ]
    int8.verdict = None
    assert found.shipped is fp32, "a policy of FP32 only"


def test_reasons_follow_what_was_done_by_hand() -> None:
    """A stopped student was given more time, and a larger one that passed is judged by another policy."""
    small, large = student("small", 500, 0.98), student("large", 900, 0.9, missed="accuracy_drop_vs_teacher")
    small.reason = "it does not pass, and the time is used up"
    large.state, large.reason = "passes", "the smallest student that passes"
    huge, poor = student("huge", 1500, 0.99), student("poor", 1600, 0.9, missed="size")
    poor.reason = "the smaller large passes"
    refused = StudentRecord(model="none", folder="none", state="refused", reason="there is no such network")
    sweep = concluded(small, large, huge, poor, refused)
    assert sweep.answer == "small"
    assert [(each.state, each.reason) for each in sweep.students] == [
        ("passes", "the smallest student that passes"),
        ("stopped", "it does not pass"),
        ("stopped", "the smaller small passes"),
        ("stopped", "it does not pass"),
        ("refused", "there is no such network"),
    ]
    kept = student("kept", 500, 0.9, missed="accuracy_drop_vs_teacher")
    assert concluded(kept).students[0].reason == "the time is over"


def test_a_run_that_cannot_be_read_does_not_keep_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a bug")

    sweep = concluded(student("a", 500, 0.98))
    shown = display(Silent())
    monkeypatch.setattr(results, "refresh", broken)
    running._Work(sweep, load_recipe("digits"), tmp_path, shown).finish()
    assert read_sweep(tmp_path).answer == "a"
    assert "a: its run cannot be read" in written(shown)


def test_far_from_its_teacher_counts_more_than_a_loss_in_int8() -> None:
    """A weak student often has both, and INT8 alone is not what it lacks."""
    weak = student("a", 500, 0.90, missed="accuracy_drop_vs_teacher", shares=(0.9, 0.901))
    weak.missed += student("a", 500, 0.90, missed="accuracy_drop_vs_fp32").missed
    assert concluded(weak).students[0].way == "larger"


def test_every_student_over_a_limit_before_training() -> None:
    excluded = [
        StudentRecord(model=name, folder=name, state="stopped", int8_bytes=size,
                      reason=f"more training cannot help: its int8.cpu has {size} bytes, the limit is 10")
        for name, size in (("b", 900), ("a", 400))
    ]  # fmt: skip
    sweep = concluded(*excluded)
    assert (sweep.verdict, [each.way for each in sweep.students]) == ("fail", ["limit", "limit"])
    assert "a, the smallest: more training cannot help: its int8.cpu has 400 bytes" in sweep.sentence
    assert "nayer-edge students" in sweep.command


def test_a_latency_near_its_limit_does_not_exclude_a_student() -> None:
    assert results.limit_missed(student("a", 500, 0.99, missed="latency_p95")) == ""
    assert results.limit_missed(student("a", 1500, 0.99, missed="size")) == "a misses size"


def test_the_page_draws_students_limits_and_the_front() -> None:
    policy = Policy.model_validate({"size": {"max_bytes": 2000}})
    sweep = concluded(
        student("tiny<b>", 500, 0.90, missed="accuracy_drop_vs_teacher"),
        student("small", 1000, 0.98),
        student("poor", 1500, 0.95, missed="size"),
    )
    html = page.render(sweep, policy)
    assert html == page.render(sweep, policy), "equal records give equal pages"
    assert "tiny&lt;b&gt;" in html
    assert "had changed" not in html
    assert sweep.bank is not None
    changed = sweep.model_copy(update={"bank": sweep.bank.model_copy(update={"changed": True})})
    assert "except for those that began after this bank had changed" in page.render(changed, policy)
    assert "<b>" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count('class="limit"') == 3, "accuracy in both drawings, size in one"
    spots = page._spots(sweep, "size_bytes")
    drawing = page.scatter(spots, 2000.0, 0.95, str, "bytes")
    assert drawing is not None
    assert drawing.limit_x is not None
    assert drawing.limit_y is not None
    by_cost = sorted(drawing.points, key=lambda point: point.x)
    assert [point.label for point in by_cost if point.series == 2] == ["tiny<b>", "small", "poor"]
    assert all(point.high <= point.y <= point.low for point in drawing.points), "up is better"
    assert [point.passes for point in by_cost if point.series == 2] == [False, True, False]
    inside = [at for point in drawing.points for at in (point.low, point.high)]
    assert drawing.top <= min(inside)
    assert max(inside) <= drawing.bottom
    front = {(point.x, point.y) for point in by_cost if point.series == 2 and point.label != "poor"}
    assert set(drawing.front) == front
    assert page.scatter([], None, None, str, "ms") is None


@pytest.mark.timeout(2400)
@pytest.mark.slow
def test_digits_from_the_bank_of_a_run(tmp_path: Path, invoke: Invoke) -> None:
    """With no other flag than students and time, it names a student that passes, whose artifact gates."""
    import jsonschema  # takes a second: not in every worker that collects this file

    root = tmp_path / "digits"
    run_recipe(load_recipe("digits"), root)
    models = "nayer:resnet8_w4,nayer:resnet8_w8,nayer:resnet8"
    answer = invoke("sweep", root, "--students", models, "--budget", "4m", "--out", tmp_path / "sweep", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    jsonschema.validate(found, load("sweep"))
    best = next(each for each in found["students"] if each["model"] == found["answer"])
    assert invoke("gate", tmp_path / "sweep" / best["folder"]).code == 0

    def size(student: dict[str, Any]) -> int:
        return next(made["size_bytes"] for made in student["artifacts"] if made["name"] == "int8.cpu")

    smaller = [each for each in found["students"] if each["artifacts"] and size(each) < size(best)]
    assert all(each["missed"] for each in smaller)
