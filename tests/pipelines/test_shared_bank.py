"""A run on another run's bank: no filling, the same teacher, whole lineage, and as resumable as any other run."""

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

import nayer_edge as ne
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.pipelines import actions, shared_bank
from nayer_edge.pipelines.costs import budget, planning
from nayer_edge.pipelines.costs.fitting import Device
from nayer_edge.pipelines.plan import plan_steps, read_once
from nayer_edge.pipelines.recipes.loading import load_recipe, portable
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.pipelines.steps import CHECKPOINT, SOURCE, START_FILES, STEPS
from nayer_edge.pipelines.trust.sbom import make_sbom
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.files import sha256_of
from nayer_edge.storage.run_folder import RunFolder

Invoke = Callable[..., Any]
Once = Callable[[str, Callable[[Path], object]], Path]
SETTINGS = (
    *("device=cpu", "precision=fp32", "teacher.model=nayer:resnet8", "teach.epochs=1"),
    *("student.model=nayer:resnet8_w8", "generator.channels=8", "generator.noisy_dim=32"),
    *("synthesis.batch=20", "synthesis.g_steps=2", "synthesis.warmup_rounds=4", "synthesis.rounds=2"),
    *("synthesis.reserve=0.4", "synthesis.g_life=1000"),
    *("distill.warmup_epochs=1", "distill.epochs=4", "distill.decay_epochs=1", "distill.steps=3", "distill.batch=16"),
    *("distill.views=2", "distill.holdout_rounds=1", "distill.optimizer=muon", "distill.schedule=constant"),
)
STUDENT = "student/student.safetensors"


@pytest.fixture(scope="module")
def source(once: Once) -> Path:
    """A finished run, whose bank others start with. Read only."""
    chosen = load_recipe("digits", list(SETTINGS))
    return once("bank-source", lambda folder: run_recipe(chosen, folder / "source", last="student")) / "source"


def recipe(bank: Path, *more: str) -> Recipe:
    """Of another student on this bank, as the command line plans it."""
    settings = [*SETTINGS, "student.model=nayer:resnet8_w4", *more]
    if any(setting.startswith("teacher.weights") for setting in more):
        settings.remove("teach.epochs=1")
    chosen = actions.read_recipe("digits", settings, bank)
    return actions.timed(chosen, "digits", bank.parent / "nowhere", actions.Time())[0]


@pytest.fixture(scope="module")
def whole(source: Path, once: Once) -> Path:
    """An uninterrupted run of six epochs on the source's bank. Read only."""
    chosen = recipe(source, "distill.epochs=7", "distill.decay_epochs=2")
    return once("bank-whole", lambda folder: run_recipe(chosen, folder / "whole", last="student")) / "whole"


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of the steps are not measured."""

    def costs(*arguments: Any) -> budget.Costs:
        batch, student_batch = arguments[5:7]
        return budget.Costs(0.08, 0.03, 0.2, 0.1, 60, batch, student_batch)

    monkeypatch.setattr(planning, "time_steps", costs)


def test_it_starts_with_the_other_runs_images(source: Path, whole: Path) -> None:
    run, first = RunFolder.open(whole), RunFolder.open(source)
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["distill"] * 6, "no filling"
    cpu = torch.device("cpu")
    for name in ("bank.safetensors", "reserve.safetensors"):
        before, now = MemoryBank.load(first.path(name), cpu), MemoryBank.load(run.path(name), cpu)
        assert torch.equal(now.images[: len(before)], before.images), name
        assert len(now) > len(before), "and makes images as any run does"
    for name in ("teacher/teacher.safetensors", "lte.safetensors"):
        assert run.path(name).samefile(first.path(name)), "a link, not a copy"
    assert (run.problems(), run.unexpected_files()) == ([], [])
    assert not any(run.path(name).exists() for name in START_FILES.values())


def test_its_lineage_is_recorded(source: Path, whole: Path) -> None:
    run, first = RunFolder.open(whole), RunFolder.open(source)
    taken = {name: first.manifest.files[name].sha256 for name in ("bank.safetensors", "reserve.safetensors")}
    facts = json.loads(run.path(SOURCE).read_text())
    assert {name: facts["files"][name]["sha256"] for name in taken} == taken
    assert facts["manifest_sha256"] == sha256_of(source / "manifest.json")
    assert set(taken.values()) <= set(run.manifest.files[STUDENT].parents)
    bom = json.loads(make_sbom(run))
    parts = {part["name"]: part for part in bom["components"]}
    assert parts["digits: bank.safetensors"]["hashes"][0]["content"] == taken["bank.safetensors"]
    made_from = {each["ref"]: each.get("dependsOn", []) for each in bom["dependencies"]}
    assert parts["digits: bank.safetensors"]["bom-ref"] in made_from[parts[STUDENT]["bom-ref"]]


@pytest.mark.parametrize("at_once", [pytest.param(False, marks=pytest.mark.slow), True])
def test_interrupted_it_ends_with_the_same_bits(
    at_once: bool, source: Path, whole: Path, tmp_path: Path, stops_after: Callable[..., Silent]
) -> None:
    root, copied = tmp_path / "run", Path(shutil.copytree(source, tmp_path / "source"))
    chosen = recipe(copied, "distill.epochs=7", "distill.decay_epochs=2")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        # At once: before the first checkpoint. Otherwise after the second epoch.
        run_recipe(chosen, root, last="student", progress=stops_after(3 if at_once else 10, at_once=at_once))
    assert (root / CHECKPOINT).is_file() != at_once
    # What it started with is its own now.
    shutil.rmtree(copied)
    elsewhere = recipe(source, "distill.epochs=7", "distill.decay_epochs=2")
    plans = plan_steps(elsewhere, STEPS, RunFolder.open(root), read_once())
    assert not any(plan.changes for plan in plans), "the same images at another place"
    done = run_recipe(actions.timed(actions.recipe_in(root), str(root), root, actions.Time())[0], root, last="student")
    for name in (STUDENT, "bank.safetensors", "reserve.safetensors", "generator/generator.safetensors"):
        assert sha256_of(done.path(name)) == sha256_of(whole / name), name


@pytest.mark.slow
def test_more_time_is_one_long_run(source: Path, whole: Path, tmp_path: Path, invoke: Invoke) -> None:
    root, copied = tmp_path / "run", Path(shutil.copytree(source, tmp_path / "source"))
    run_recipe(recipe(copied, "distill.epochs=5"), root, last="student")
    shutil.rmtree(copied)
    longer = recipe(source, "distill.epochs=7", "distill.decay_epochs=2", "distill.warmup_epochs=1")
    done = run_recipe(longer, root, last="student")
    assert sha256_of(done.path(STUDENT)) == sha256_of(whole / STUDENT)
    assert SOURCE in done.manifest.files
    assert set(json.loads(done.path(SOURCE).read_text())["files"]) >= {"bank.safetensors"}
    assert planning.with_more(actions.recipe_in(root), done, 36_000.0).distill.epochs > 7
    answer = invoke("run", root, "--finish", "5m")
    assert (answer.code, "student is finished" in answer.err) == (2, True)


def test_an_interrupted_run_ends_early(
    source: Path, tmp_path: Path, invoke: Invoke, stops_after: Callable[..., Silent]
) -> None:
    root = tmp_path / "run"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(
            recipe(source, "distill.epochs=1000", "distill.decay_epochs=200"), root, last="student",
            progress=stops_after(20),
        )  # fmt: skip
    answer = invoke("run", root, "--finish", "30s", "--until", "student")
    assert answer.code == 0, answer.err
    assert len((root / "metrics.jsonl").read_text().splitlines()) < 999


@pytest.mark.slow
def test_the_other_run_may_go_on(source: Path, tmp_path: Path) -> None:
    """Its bank grows; the runs that started with it stay what they are."""
    grown, root = Path(shutil.copytree(source, tmp_path / "source")), tmp_path / "run"
    run_recipe(recipe(grown), root, last="student")
    before = sha256_of(root / STUDENT)
    run_recipe(load_recipe("digits", [*SETTINGS, "distill.epochs=6"]), grown, last="student")
    assert shared_bank.read_source(RunFolder.open(root)).digest
    run_recipe(actions.recipe_in(root), root, last="student")
    assert sha256_of(root / STUDENT) == before
    # Another bank makes another run, wherever it lies.
    with pytest.raises(UsageError, match="made with other settings"):
        run_recipe(recipe(Path(shutil.copytree(grown, tmp_path / "moved"))), root, last="student")
    run_recipe(recipe(source), root, last="student")
    assert sha256_of(root / STUDENT) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("teach.epochs=2",), "teach.epochs: 1 → 2"),
        (('teacher.classes=["a","b","c","d","e","f","g","h","i","j"]',), "class 0 is 'zero' there and 'a' here"),
        (("teacher.input.height=20",), "height 16 → 20"),
        (("teacher.model=nayer:resnet20",), "teacher.model"),
    ],
)
def test_another_teacher_is_refused(
    settings: tuple[str, ...], message: str, source: Path, tmp_path: Path, invoke: Invoke
) -> None:
    words = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    answer = invoke("distill", "digits", "--bank", source, *words, "--out", tmp_path / "run")
    assert answer.code == 2, answer.err
    assert message in answer.err
    assert "nayer-edge distill" in answer.err, "it says what to type"
    assert not (tmp_path / "run").exists()


def test_weights_are_compared_not_names(source: Path, tmp_path: Path) -> None:
    """The bank's own weights under another name are the same teacher; other weights are not."""
    weights = Path(shutil.copy(source / "teacher/teacher.safetensors", tmp_path / "mine.safetensors"))
    mine = recipe(source, f"teacher.weights={weights}")
    run = run_recipe(mine, tmp_path / "run", last="student")
    assert run.manifest.steps["student"].numbers["started from"] == "digits"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors[next(iter(tensors))] += 1
    save_file(tensors, weights)
    with pytest.raises(UsageError, match="another teacher") as caught:
        recipe(source, f"teacher.weights={weights}")
    assert "the weights differ" in caught.value.why


def test_an_altered_run_is_refused(source: Path, tmp_path: Path, invoke: Invoke) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "source"))
    bank = copied / "bank.safetensors"
    data = bytearray(bank.read_bytes())
    data[-1] ^= 1
    bank.write_bytes(data)
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    answer = invoke("distill", "digits", "--bank", copied, *words, "--out", tmp_path / "run")
    assert answer.code == 4, answer.err
    assert "bank.safetensors was altered" in answer.err


def test_what_was_taken_over_is_checked_again(source: Path, tmp_path: Path, stops_after: Callable[..., Silent]) -> None:
    root = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(source), root, last="student", progress=stops_after(0, at_once=True))
    taken = root / START_FILES["bank"]
    data = bytearray(taken.read_bytes())
    data[-1] ^= 1
    taken.unlink()  # a link: the other run must not change
    taken.write_bytes(data)
    with pytest.raises(IntegrityError, match="was altered since"):
        run_recipe(recipe(source), root, last="student")


@pytest.mark.parametrize(
    ("place", "message", "fix"),
    [
        ("nothing", "is not a run folder", "--bank runs/digits"),
        ("unfinished", "no finished student", "nayer-edge run"),
    ],
)
def test_what_is_no_bank(place: str, message: str, fix: str, source: Path, tmp_path: Path, invoke: Invoke) -> None:
    if place == "unfinished":
        copied = RunFolder.open(Path(shutil.copytree(source, tmp_path / place)))
        del copied.manifest.steps["student"]
        copied.save()
    answer = invoke("distill", "digits", "--bank", tmp_path / place, "--out", tmp_path / "run")
    assert (answer.code, message in answer.err) == (2, True), answer.err
    assert fix in answer.err


def test_a_budget_plans_no_fill() -> None:
    costs = budget.Costs(synthesis_step=0.08, adversary=0.03, student_step=0.2, teacher_batch=0.1, rest=60)
    made, usual = budget.plan(3600, costs, 10, bank=1000), budget.plan(3600, costs, 10)
    assert (made.warmup_epochs, made.seconds["fill"]) == (0, 0)
    assert made.total == pytest.approx(usual.total, rel=0.05)
    assert made.steps_in_all > usual.steps_in_all
    sections = budget.settings(3600, made, costs, 64)
    planned = planning.with_sections(load_recipe("digits"), {"distill": sections["distill"]})
    assert planned.distill.warmup_epochs == 0
    assert "of images" not in budget.described(made, costs, 256)[0][1]


@pytest.mark.parametrize("bank", [500, 5000, 50_000])
@pytest.mark.parametrize("seconds", [60, 3600])
def test_a_budget_plans_the_answers_to_a_new_bank(bank: int, seconds: float) -> None:
    """The planned time against a simulation: every view that is drawn for the first time costs an answer."""
    costs = budget.Costs(synthesis_step=0.08, adversary=0.03, student_step=0.06, teacher_batch=0.1, rest=5)
    made = budget.plan(seconds, costs, 10, bank=bank)
    random, seen, answers, images = np.random.default_rng(0), set[int](), 0.0, bank
    student_epochs = made.epochs
    for epoch in range(student_epochs):
        if epoch < student_epochs - made.decay_epochs:
            images += round(made.rounds * costs.batch * (1 - budget.RESERVE))
        before = len(seen)
        seen.update(random.integers(0, images * budget.VIEWS, made.steps * costs.student_batch).tolist())
        answers += (len(seen) - before) * costs.teacher_batch / costs.student_batch
    rounds = (student_epochs - made.decay_epochs) * made.rounds * made.g_steps
    took = rounds * (costs.synthesis_step + costs.adversary) + made.steps_in_all * costs.student_step + answers
    assert took + costs.rest == pytest.approx(seconds * (1 - budget.MARGIN), rel=0.08)


def test_a_budget_by_the_command_line(source: Path, tmp_path: Path, invoke: Invoke) -> None:
    """From the run's own recipe; its generator and rounds are kept."""
    words = ("--bank", source, "--budget", "10h", "--until", "lte", "--out", tmp_path / "run")
    answer = invoke("run", source, *words)
    assert answer.code == 0, answer.err
    done = RunFolder.open(tmp_path / "run").manifest.recipe
    assert (done["distill"]["warmup_epochs"], done["budget"]["fill_seconds"]) == (0, 0)
    assert (done["synthesis"]["batch"], done["generator"]["channels"]) == (20, 8)


def test_a_budget_keeps_the_banks_rounds(source: Path) -> None:
    """A generator makes rounds of the size that it was made for, also if they have fewer images than classes."""
    usual = recipe(source)
    found = planning.measured_for(planning.with_sections(usual, {"synthesis": {"batch": 6}}))
    assert found.costs.batch == 6
    assert found.planned(36_000.0).sections["synthesis"]["batch"] == 6


@pytest.mark.usefixtures("untimed")
def test_a_small_limit_never_drops_the_banks_images(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts all images of the bank."""
    monkeypatch.setattr(planning, "images_in_bank", lambda _run: 100_000)
    monkeypatch.setattr(planning, "device_at_hand", lambda _kind: Device("cpu", "", 2**20))
    assert planning.measured_for(recipe(source)).bank_mib * 2**20 >= 1.25 * 100_000 * 16 * 16


@pytest.mark.usefixtures("untimed")
def test_another_export_than_the_banks_run_takes_another_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_measured_rest", lambda _run: 1234.0)
    usual = recipe(source)
    assert planning.measured_for(usual).costs.rest == 1234.0
    trained = planning.with_sections(usual, {"export": {"qat": True}})
    assert planning.measured_for(trained).costs.rest != 1234.0


def test_the_same_budget_again_keeps_the_plan_and_nothing_else(tmp_path: Path) -> None:
    constant = ["distill.schedule=constant", "distill.decay_epochs=2", "distill.optimizer=muon"]
    usual = load_recipe("digits", [*constant, "distill.steps=7", "distill.temperature=7.0"])
    planned = planning.with_sections(usual, {"budget": {"seconds": 60.0, "fill_seconds": 1.0, "rest_seconds": 1.0}})
    RunFolder.create(tmp_path / "run", portable(planned, tmp_path / "run"), 0, {}, {})
    same, words = planning.with_budget(usual, 60.0, tmp_path / "run")
    assert same == planned, words
    warmer = load_recipe("digits", [*constant, "distill.temperature=9.0"])
    again, _ = planning.with_budget(warmer, 60.0, tmp_path / "run")
    assert (again.distill.steps, again.distill.temperature) == (7, 9.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--budget", "10h", "--set", "distill.lr=0.05", "--set", "export.max_drop=0.5"),
            "--budget sets this key itself, so --set has no effect: distill.lr.",
        ),
        (
            ("--set", "synthesis.batch=10", "--set", "distill.epochs=9"),
            "--bank sets this key itself, so --set has no effect: synthesis.batch.",
        ),
    ],
)
def test_a_setting_that_a_plan_replaces_is_refused(
    words: tuple[str, ...], message: str, source: Path, tmp_path: Path, invoke: Invoke
) -> None:
    answer = invoke("run", source, "--bank", source, *words, "--out", tmp_path / "run")
    assert (answer.code, message in " ".join(answer.err.split())) == (2, True), answer.err
    assert not (tmp_path / "run").exists()


def test_from_python(source: Path, tmp_path: Path) -> None:
    teacher = ne.load_teacher(
        source / "teacher/teacher.safetensors",
        model="nayer:resnet8",
        classes=load_recipe("digits").teacher.classes,
        input=ne.InputSpec(channels=1, height=16, width=16, mean=0.5, std=0.5),
    )
    settings = {
        "distill": {"epochs": 1, "warmup_epochs": 0, "steps": 3, "batch": 16, "holdout_rounds": 1},
        "synthesis": {"rounds": 1, "g_steps": 2},
        "device": "cpu",
    }
    run = ne.distill(teacher, "nayer:resnet8_w4", tmp_path / "run", bank=ne.open(source), **settings)
    assert run.recipe.student.bank == str(source.resolve())
    assert RunFolder.open(run.path).manifest.steps["student"].numbers["started from"] == "digits"
