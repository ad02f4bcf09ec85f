"""Checks before any work: every problem at once, and only of the steps that will run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.pipelines.recipes import preflight
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.steps import BANK, STEPS, until


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


def test_the_disk_holds_two_checkpoints_and_the_state_before_the_decay() -> None:
    """Of 16 × 16 pixels and ten classes: an image is 256 bytes, the answers to eight views are 320."""
    chosen = ["distill.views=8"]
    assert preflight.disk_per_image(load_recipe("digits", chosen)) == 2 * (256 + 320)
    constant = [*chosen, "distill.schedule=constant", "distill.decay_epochs=1"]
    assert preflight.disk_per_image(load_recipe("digits", constant)) == 2 * (256 + 320) + 320


def test_the_images_of_a_finished_student_are_no_free_space(tmp_path: Path) -> None:
    """They stay until a longer run is finished. `--fresh` removes them."""
    free = shutil.disk_usage(tmp_path).free
    with (tmp_path / BANK).open("wb") as file:
        file.truncate(4 * free)  # takes no space
    rounds = ["distill.views=0", "synthesis.rounds=1000000000", f"distill.bank_mib={free / 2**20}"]
    large = load_recipe("digits", rounds)
    with pytest.raises(UsageError, match="cannot run here") as caught:
        preflight.check(large, STEPS, tmp_path)
    assert "GiB are free" in caught.value.why
    preflight.check(large, STEPS, tmp_path, True)
