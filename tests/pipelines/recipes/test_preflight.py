"""Checks before any work: every problem at once, and only of the steps that will run."""

from __future__ import annotations

from pathlib import Path

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.pipelines.recipes import preflight
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.steps import STEPS, until


def test_preflight_names_every_problem_before_any_work() -> None:
    recipe = load_recipe(
        "digits",
        [
            "teacher.model=nayer:wrn_16_3x",
            "student.model=nayer:resnet9000",
            "teach.data=/nowhere/train",
            "validate.data=/nowhere/held.npz",
            "export.targets=['cpu', 'toaster', 'tensorrt']",
            "export.opset=18",
            "distill.bank_mib=0.001",
        ],
    )
    with pytest.raises(UsageError) as caught:
        preflight.check(recipe, STEPS)
    keys = ("teacher.model", "student.model", "teach.data", "validate.data", "export.targets", "distill.bank_mib")
    for key in (*keys, "export.opset"):
        assert f"- {key}: " in caught.value.why
    assert caught.value.why.count("export.opset") == 1, "the processor's graph has no FP16"
    assert "Nothing was started" in caught.value.fix


def test_a_disk_too_small_for_the_images(tmp_path: Path) -> None:
    """No disk holds a billion rounds; the folder need not exist yet."""
    huge = ["synthesis.rounds=1000000000", "distill.bank_mib=1e15"]
    with pytest.raises(UsageError) as caught:
        preflight.check(load_recipe("digits", huge), STEPS, tmp_path / "runs" / "new")
    assert "GiB are free" in caught.value.why
    preflight.check(load_recipe("digits", huge[:1]), STEPS, tmp_path)  # the bank's limit bounds what is written


def test_preflight_looks_only_at_what_will_run() -> None:
    recipe = load_recipe("digits", ["validate.data=/nowhere/held.npz", "export.targets=['toaster']"])
    preflight.check(recipe, until("student"))


def test_a_student_that_is_its_teacher() -> None:
    with pytest.raises(UsageError, match="same network"):
        preflight.check(load_recipe("digits", ["student.model=nayer:wrn_16_2"]), STEPS)
