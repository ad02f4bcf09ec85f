"""`export --int8 --qat` on a finished run: what it writes, what it keeps, what makes it start again, its old names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.pipelines.deploy import QUANTIZATION, int8_file
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.pipelines.recipes.renamed import RENAMED, RenamedWarning
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.run import StepEvent, run_recipe
from nayer_edge.pipelines.steps import STEPS
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.files import digest_of, sha256_of
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

INT8 = int8_file("cpu")


def recipe(settings: list[str], *more: str) -> Recipe:
    """The tiny recipe with two steps of QAT, if it is asked for."""
    return load_recipe("digits", [*settings, "export.qat_epochs=1", "export.qat_steps=2", *more])


@pytest.fixture
def plain(
    tiny_run: Path,
    tiny_settings: list[str],
    once: Callable[[str, Callable[[Path], object]], Path],
    tmp_path: Path,
) -> Path:
    """The finished run, whose recipe now says how long QAT is, but not to do it."""

    def make(folder: Path) -> None:
        root = shutil.copytree(tiny_run, folder / "digits")
        run_recipe(recipe(tiny_settings), root, last="int8")
        assert sha256_of(root / INT8) == sha256_of(tiny_run / INT8), "without QAT its settings do not change a bit"

    return Path(shutil.copytree(once("qat", make) / "digits", tmp_path / "runs" / "digits"))


def record(root: Path) -> dict[str, Any]:
    return json.loads((root / QUANTIZATION).read_text())["cpu"]


def test_it_is_done_where_it_is_asked_for_and_undone_again(plain: Path, invoke: Callable[..., Any]) -> None:
    before, calibrated = sha256_of(plain / INT8), record(plain)
    assert calibrated["finetune"] is None

    answer = invoke("export", plain, "--int8", "--qat", "--no-engine")
    assert answer.code == 0, answer.err
    found = record(plain)
    tuned = found["finetune"]
    assert (tuned["epochs"], tuned["steps"], len(tuned["loss"])) == (1, 2, 1)
    assert tuned["temperature"] == 4.0, "the recipe's"
    assert tuned["calibrated"] == calibrated["final"]
    assert set(tuned["vs_teacher"]) == {"fp32", "calibrated", "finetuned"}
    assert found["final"] == (tuned["finetuned"] if tuned["chosen"] else tuned["calibrated"])
    assert (sha256_of(plain / INT8) == before) != tuned["chosen"]
    assert RunFolder.open(plain).problems() == []
    assert "cpu QAT gain" in answer.out

    kept = invoke("export", plain, "--int8", "--no-engine")
    assert kept.code == 0
    assert record(plain) == found, "the run's recipe now says so"

    undone = invoke("export", plain, "--int8", "--no-qat", "--no-engine")
    assert undone.code == 0
    assert sha256_of(plain / INT8) == before
    assert record(plain) == calibrated


def test_qat_needs_int8(tiny_run: Path, invoke: Callable[..., Any]) -> None:
    answer = invoke("export", tiny_run, "--qat")
    assert answer.code == 2
    assert "--int8" in answer.err


@pytest.mark.parametrize(
    "setting",
    ["export.qat_epochs=0", "export.qat_steps=0", "export.qat_lr=0", "export.qat_lr=nan"],
)
def test_impossible_schedules_are_refused_before_any_work(
    tmp_path: Path, invoke: Callable[..., Any], setting: str
) -> None:
    answer = invoke("run", "digits", "--out", tmp_path / "run", "--set", "export.qat=true", "--set", setting)
    assert answer.code == 2
    assert setting.partition("=")[0] in answer.err
    assert not (tmp_path / "run").exists()


class Interrupting(Silent):
    """Someone presses Ctrl-C in the middle of QAT."""

    def __init__(self) -> None:
        self.what = ""

    def start(self, what: str, total: int) -> None:
        self.what = what

    def advance(self, count: int = 1) -> None:
        if self.what.startswith("QAT"):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_interrupted_it_ends_with_the_same_bits(plain: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    wanted = recipe(tiny_settings, "export.qat=true", "export.qat_lr=0.02")
    before = sha256_of(plain / INT8)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(wanted, plain, last="int8", progress=Interrupting())
    assert sha256_of(plain / INT8) == before, "nothing that was finished is lost"
    assert RunFolder.open(plain).problems() == []
    run_recipe(wanted, plain, last="int8")
    first = (sha256_of(plain / INT8), (plain / QUANTIZATION).read_bytes())
    run_recipe(recipe(tiny_settings), plain, last="int8")
    run_recipe(wanted, plain, last="int8")
    assert (sha256_of(plain / INT8), (plain / QUANTIZATION).read_bytes()) == first


@pytest.mark.slow
def test_other_settings_of_qat_start_it_again(plain: Path, tiny_settings: list[str]) -> None:
    def int8_step(*more: str) -> StepEvent:
        events: list[StepEvent] = []
        chosen = recipe(tiny_settings, "export.qat=true", *more)
        run_recipe(chosen, plain, last="int8", on_event=events.append)
        return next(event for event in reversed(events) if event.step.name == "int8")

    first = int8_step()
    assert (first.state, int8_step().state) == ("finished", "kept")
    again = int8_step("export.qat_lr=0.02")
    assert again.state == "finished"
    assert again.reason == "export.qat_lr: 0.001 → 0.02"


def with_old_keys(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as the version before wrote them, nested or by dotted key."""
    old = {new: former for former, new in RENAMED.items()}
    return {
        old.get(f"{prefix}{key}", f"{prefix}{key}").removeprefix(prefix): with_old_keys(value, f"{prefix}{key}.")
        if isinstance(value, dict)
        else value
        for key, value in values.items()
    }


def aged(root: Path) -> RunFolder:
    """Gives a run the keys of the version before, in its recipe and in the settings of its steps."""
    run = RunFolder.open(root)
    run.manifest.recipe = with_old_keys(run.manifest.recipe)
    for step in STEPS:
        record = run.manifest.steps[step.name]
        files = [name for other in step.inputs for name in run.artifact(other).files.values()]
        inputs = {name: run.manifest.files[name].sha256 for name in files}
        settings = with_old_keys(record.settings)
        digest = digest_of({"step": step.name, "settings": settings, "inputs": inputs})
        run.manifest.steps[step.name] = record.model_copy(update={"settings": settings, "digest": digest})
    run.save()
    text = (root / MANIFEST).read_text()
    assert '"finetune_lr"' in text, "in the recipe, and in the settings of the step `report`"
    assert '"export.finetune_lr"' in text, "in the settings of the step `int8`"
    assert "qat" not in text
    return run


def steps_of(wanted: Recipe, root: Path) -> dict[str, StepEvent]:
    events: list[StepEvent] = []
    run_recipe(wanted, root, on_event=events.append)
    return {event.step.name: event for event in events}


def test_a_run_of_the_version_before_is_unchanged(finished: Path, invoke: Callable[..., Any]) -> None:
    commands = ("gate", "validate", "report", "verify")
    codes = [invoke(command, finished).code for command in commands]
    run = aged(finished)
    wanted = recipe_of(run.manifest.recipe, finished)
    assert {event.state for event in steps_of(wanted, finished).values()} == {"kept"}
    assert RunFolder.open(finished).manifest.recipe["export"]["qat"] is False
    aged(finished)
    answers = [invoke(command, finished) for command in commands]
    assert [answer.code for answer in answers] == codes
    assert not any(answer.err for answer in answers), "nobody is told to change a manifest"


def test_a_change_of_an_old_key_is_seen_under_its_new_name(finished: Path, tiny_settings: list[str]) -> None:
    aged(finished)
    changed = steps_of(load_recipe("digits", [*tiny_settings, "export.qat_lr=0.02"]), finished)
    assert changed["int8"].reason == changed["report"].reason == "export.qat_lr: 0.001 → 0.02"
    assert changed["student"].state == "kept"


def extending(folder: Path, mine: str, base: str = "") -> str:
    """A recipe file with these keys in [export], over a copy of the digits recipe with those."""
    digits = resources.files("nayer_edge.pipelines.recipes").joinpath("digits.toml").read_text()
    (folder / "base.toml").write_text(digits.replace("[export]\n", f"[export]\n{base}\n"))
    (folder / "mine.toml").write_text(f'extends = "base"\n[export]\n{mine}\n')
    return str(folder / "mine.toml")


def test_old_keys_in_a_file_are_read_with_one_warning_each(tmp_path: Path) -> None:
    path = extending(tmp_path, "finetune = true\nfinetune_lr = 0.02", base="finetune_lr = 0.05")
    with pytest.warns(RenamedWarning) as found:
        loaded = load_recipe(path)
    assert (loaded.export.qat, loaded.export.qat_lr) == (True, 0.02)
    assert [str(w.message).split()[0] for w in found] == ["export.finetune", *["export.finetune_lr"] * 2], "two files"
    assert str(found[0].message).endswith("Use export.qat instead.")


def test_a_new_key_overrides_the_old_one_of_the_extended_file(tmp_path: Path) -> None:
    with pytest.warns(RenamedWarning):
        assert load_recipe(extending(tmp_path, "qat = true", base="finetune = false")).export.qat
    with pytest.warns(RenamedWarning):
        assert load_recipe(extending(tmp_path, "finetune = true", base="qat = false")).export.qat


def test_a_key_under_both_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both are set"):
        load_recipe(extending(tmp_path, "finetune = true\nqat = false"))


def test_the_option_under_both_names_is_refused(finished: Path, invoke: Callable[..., Any]) -> None:
    answer = invoke("export", finished, "--int8", "--finetune", "--no-qat")
    assert answer.code == 2
    assert "--finetune is the old name of --qat" in answer.err
    assert "Leave out --finetune" in answer.err


def test_the_key_that_was_typed_wins_whichever_name_was_read(tmp_path: Path, finished: Path) -> None:
    with pytest.warns(RenamedWarning, match=r"^export.finetune is deprecated"):
        assert load_recipe(str(finished), ["export.finetune=true"]).export.qat
    aged(finished)
    assert load_recipe(str(finished), ["export.qat=true"]).export.qat
    with pytest.warns(RenamedWarning):
        assert load_recipe(extending(tmp_path, "finetune = false"), ["export.qat=true"]).export.qat


@pytest.mark.slow
@pytest.mark.filterwarnings("always::FutureWarning")
def test_the_old_option_still_works_and_names_the_new_one(plain: Path, invoke: Callable[..., Any]) -> None:
    answer = invoke("export", plain, "--int8", "--finetune", "--no-engine")
    assert answer.code == 0
    assert answer.err == (
        "Warning: --finetune is deprecated and will be removed in the next release. Use --qat instead.\n"
    )
    assert record(plain)["finetune"] is not None
    assert invoke("export", plain, "--int8", "--no-finetune", "--no-engine").code == 0
    assert record(plain)["finetune"] is None
    assert "finetune" not in invoke("export", "--help").out
