"""`export --int8 --finetune` on a finished run: what it writes, what it leaves alone, and what makes it start again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nayer_edge.pipelines.deploy import QUANTIZATION, int8_file
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.run import StepEvent, run_recipe
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.files import sha256_of
from nayer_edge.storage.run_folder import RunFolder

INT8 = int8_file("cpu")


def recipe(settings: list[str], *more: str) -> Recipe:
    """The tiny recipe with two steps of fine-tuning, where it is asked for."""
    return load_recipe("digits", [*settings, "export.finetune_epochs=1", "export.finetune_steps=2", *more])


@pytest.fixture
def plain(finished: Path, tiny_settings: list[str]) -> Path:
    """The finished run, whose recipe now says how long to fine-tune, but not to do it."""
    before = sha256_of(finished / INT8)
    run_recipe(recipe(tiny_settings), finished, last="int8")
    assert sha256_of(finished / INT8) == before, "without fine-tuning its settings change not a bit"
    return finished


def record(root: Path) -> dict[str, Any]:
    return json.loads((root / QUANTIZATION).read_text())["cpu"]


def test_it_is_done_where_it_is_asked_for_and_undone_again(plain: Path, invoke: Callable[..., Any]) -> None:
    before, calibrated = sha256_of(plain / INT8), record(plain)
    assert calibrated["finetune"] is None

    answer = invoke("export", plain, "--int8", "--finetune", "--no-engine")
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
    assert "cpu fine-tuning gain" in answer.out

    kept = invoke("export", plain, "--int8", "--no-engine")
    assert kept.code == 0
    assert record(plain) == found, "the run's recipe now says so"

    undone = invoke("export", plain, "--int8", "--no-finetune", "--no-engine")
    assert undone.code == 0
    assert sha256_of(plain / INT8) == before
    assert record(plain) == calibrated


def test_without_int8_there_is_nothing_to_fine_tune(tiny_run: Path, invoke: Callable[..., Any]) -> None:
    answer = invoke("export", tiny_run, "--finetune")
    assert answer.code == 2
    assert "--int8" in answer.err


@pytest.mark.parametrize(
    "setting",
    ["export.finetune_epochs=0", "export.finetune_steps=0", "export.finetune_lr=0", "export.finetune_lr=nan"],
)
def test_impossible_schedules_are_refused_before_any_work(
    tmp_path: Path, invoke: Callable[..., Any], setting: str
) -> None:
    answer = invoke("run", "digits", "--out", tmp_path / "run", "--set", "export.finetune=true", "--set", setting)
    assert answer.code == 2
    assert setting.partition("=")[0] in answer.err
    assert not (tmp_path / "run").exists()


class Interrupting(Silent):
    """Someone presses Ctrl-C in the middle of fine-tuning."""

    def __init__(self) -> None:
        self.what = ""

    def start(self, what: str, total: int) -> None:
        self.what = what

    def advance(self, count: int = 1) -> None:
        if self.what.startswith("fine-tune"):
            raise KeyboardInterrupt


def test_interrupted_it_ends_with_the_same_bits(plain: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    wanted = recipe(tiny_settings, "export.finetune=true", "export.finetune_lr=0.02")
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


def test_other_settings_of_fine_tuning_start_it_again(plain: Path, tiny_settings: list[str]) -> None:
    def int8_step(*more: str) -> StepEvent:
        events: list[StepEvent] = []
        chosen = recipe(tiny_settings, "export.finetune=true", *more)
        run_recipe(chosen, plain, last="int8", on_event=events.append)
        return next(event for event in reversed(events) if event.step.name == "int8")

    first = int8_step()
    assert (first.state, int8_step().state) == ("finished", "kept")
    again = int8_step("export.finetune_lr=0.02")
    assert again.state == "finished"
    assert again.reason == "export.finetune_lr: 0.001 → 0.02"
