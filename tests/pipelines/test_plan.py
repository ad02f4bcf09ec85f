"""What a run asks of its steps: worked out before anything is written, and again under the folder's lock."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path

import numpy as np
import pytest

from nayer_edge.data import digest as data_digest
from nayer_edge.errors import UsageError
from nayer_edge.pipelines.plan import Plan, plan_steps, read_once
from nayer_edge.pipelines.recipes import preflight
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.recipes.settings import apply_settings
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.pipelines.steps import NAMES, STEPS
from nayer_edge.storage.files import sha256_of
from nayer_edge.storage.run_folder import MANIFEST, RunFolder


def recipe_with(run: RunFolder, *settings: str) -> Recipe:
    return recipe_of(apply_settings(run.manifest.recipe, list(settings)), run.root)


def plans_of(run: RunFolder, *settings: str) -> dict[str, Plan]:
    return {plan.step.name: plan for plan in plan_steps(recipe_with(run, *settings), STEPS, run, read_once())}


def test_a_finished_run_asks_for_nothing(tiny_run: Path) -> None:
    run = RunFolder.open(tiny_run)
    plans = plans_of(run)
    assert tuple(plans) == NAMES
    for name, plan in plans.items():
        assert not plan.stale
        assert plan.record == run.manifest.steps[name]
        assert plan.settings == plan.record.settings


def test_a_new_folder_asks_for_everything(tiny_run: Path) -> None:
    run = RunFolder.open(tiny_run)
    plans = plan_steps(recipe_with(run), STEPS, None, read_once())
    assert all(plan.stale and plan.record is None and not plan.changes for plan in plans)
    assert [plan.settings for plan in plans] == [run.manifest.steps[name].settings for name in NAMES]


def test_a_change_is_one_of_every_step_that_reads_it(tiny_run: Path) -> None:
    plans = plans_of(RunFolder.open(tiny_run), "export.max_drop=0.5")
    stale = {name: plan.changes for name, plan in plans.items() if plan.stale}
    assert stale.keys() == {"int8", "report"}
    assert all(changes[0].endswith("→ 0.5") for changes in stale.values())
    assert plans["int8"].settings["export.max_drop"] == 0.5


def test_a_file_is_read_once(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and page read the teacher's weights, validation and page the hold-out, and all is planned twice."""
    read: collections.Counter[str] = collections.Counter()

    def counted(path: Path) -> str:
        read[path.name] += 1
        return sha256_of(path)

    monkeypatch.setattr(data_digest, "sha256_of", counted)
    shutil.copy(tiny_run / "teacher" / "teacher.safetensors", tmp_path / "w.safetensors")
    images = np.random.default_rng(0).integers(0, 255, (30, 16, 16, 1), np.uint8)
    np.savez(tmp_path / "held.npz", images=images, labels=np.arange(30) % 10)
    (tmp_path / "mine.toml").write_text("""
[teacher]
model = "nayer:wrn_10_1"
weights = "w.safetensors"
classes = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
input = { channels = 1, height = 16, width = 16 }
[student]
model = "nayer:resnet8"
[validate]
data = "held.npz"
""")
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    run_recipe(recipe, tmp_path / "run", last="lte")
    assert read == {"w.safetensors": 1}, "what only later steps read is not looked at"
    run = RunFolder.open(tmp_path / "run")
    read.clear()
    digest = read_once()
    for _ in range(2):
        plans = plan_steps(recipe, STEPS, run, digest)
    assert read == {"w.safetensors": 1, "held.npz": 1}
    for name, readers in (("teacher.weights", {"teacher", "report"}), ("validate.data", {"validate", "report"})):
        assert {plan.step.name for plan in plans if f"{name}.sha256" in plan.settings} == readers


def test_what_another_process_finished_meanwhile_is_not_discarded(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look at the folder and its lock."""
    root, check = tmp_path / "run", preflight.check

    def meanwhile(*arguments: object) -> None:
        check(*arguments)
        shutil.copytree(tiny_run, root)

    monkeypatch.setattr(preflight, "check", meanwhile)
    with pytest.raises(UsageError, match="finished step 'student' that was made with other settings"):
        run_recipe(recipe_with(RunFolder.open(tiny_run), "distill.epochs=4"), root)
    assert (root / MANIFEST).read_bytes() == (tiny_run / MANIFEST).read_bytes()
