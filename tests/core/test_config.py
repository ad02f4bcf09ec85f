"""Recipes: all problems at once, nearest names, settings from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.pipelines.gate.policy import make_policy
from nayer_edge.pipelines.recipes.checking import known_keys, parse_toml
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.recipes.settings import apply_settings, is_default, make_recipe

GOOD: dict[str, Any] = {
    "name": "mine",
    "teacher": {"model": "nayer:wrn_16_2", "weights": "t.safetensors", "classes": ["a", "b"]},
    "student": {"model": "nayer:resnet8"},
}


def problems(settings: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        make_recipe(apply_settings(GOOD, settings), "mine.toml")
    assert "mine.toml" in caught.value.what
    return caught.value.why


def test_a_good_recipe_has_the_papers_numbers() -> None:
    recipe = make_recipe(GOOD, "mine.toml")
    assert (recipe.synthesis.lambda_bn, recipe.synthesis.lambda_ce, recipe.synthesis.lambda_adv) == (10, 0.5, 1.33)
    assert (recipe.synthesis.bn_momentum, recipe.synthesis.lr, recipe.synthesis.g_life) == (0.9, 4e-3, 10)
    assert (recipe.synthesis.rounds, recipe.synthesis.warmup_rounds, recipe.synthesis.batch) == (2, 10, 400)
    assert (recipe.distill.epochs, recipe.distill.warmup_epochs, recipe.distill.steps) == (120, 20, 400)
    assert (recipe.distill.temperature, recipe.distill.lr, recipe.distill.weight_decay) == (20, 0.2, 1e-4)


def test_round_trip_through_json() -> None:
    recipe = make_recipe(apply_settings(GOOD, ["teacher.classes=['é', '日']", "distill.lr=0.1"]), "mine.toml")
    text = json.dumps(recipe.model_dump(mode="json", by_alias=True), allow_nan=False)
    assert Recipe.model_validate(json.loads(text)) == recipe


def test_all_problems_are_reported_at_once() -> None:
    why = problems(
        ["distill.epoch=3", "synthesis.batch=0", "precision='fp8'", "seed=-1", "name='../x'", "colour='red'"]
    )
    assert len(why.splitlines()) == 6
    for part in ("distill.epoch", "synthesis.batch", "precision", "seed", "name", "colour"):
        assert part in why


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("distill.epoch=3", "distill.epochs"),
        ("synthesis.g_step=3", "synthesis.g_steps"),
        ("sinthesis.lr=3", "synthesis"),
        ("teacher.input.chanels=3", "teacher.input.channels"),
        ("synthesis.augment.pads=3", "synthesis.augment.pad"),
        ("gate.accuracy.max_drop_fp32=0.1", "gate.accuracy.max_drop_vs_fp32"),
        ("validat.data='x'", "validate"),
        ("teach.epoch=4", "teach.epochs"),
    ],
)
def test_unknown_keys_get_the_nearest_name(setting: str, nearest: str) -> None:
    assert f"Did you mean '{nearest}'?" in problems([setting])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill.warmup_epochs=120"], r"warmup_epochs (120) must be less than epochs (120)"),
        (["teacher.classes=['a','b','a']"], "more than once: a"),
        (["teacher.classes=['a',' ']"], "must not be empty (number 1)"),
        (["teacher.classes=['a']"], "at least 2 items"),
        (["teacher.input.mean=[0.1, 0.2]"], "mean has 2 values for 3 channels"),
        (["teacher.input.std=[0.0]"], "greater than 0"),
        (["teacher.input.height=3"], "greater than or equal to 4"),
        (["lte.prompt='a photo'"], "must contain {label}"),
        (["teach.data='digits'"], "either teacher.weights or a [teach] section"),
        (["distill.lr=inf"], "finite"),
        (["synthesis.lambda_bn=nan"], "finite"),
        (["teacher.input.mean=[nan]"], "finite"),
        (["distill.lr='fast'"], "valid number"),
        (["seed=1.5"], "valid integer"),
    ],
)
def test_invalid_values_are_reported(settings: list[str], message: str) -> None:
    assert message in problems(settings)


def test_missing_parts_are_named() -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe({"teacher": {"classes": ["a", "b"]}}, "x")
    for part in ("'name' is missing", "'teacher.model' is missing", "'student' is missing"):
        assert part in caught.value.why


def test_policies_are_checked_like_recipes() -> None:
    assert make_policy({}, "p").artifacts == ("int8.cpu",)
    with pytest.raises(UsageError) as caught:
        make_policy({"accurcy": {}, "int8": {"min_coverage": 2}}, "policy.toml")
    assert "Did you mean 'accuracy'?" in caught.value.why
    assert "int8.min_coverage" in caught.value.why


def test_known_keys_use_the_names_of_files() -> None:
    assert "validate" in known_keys(Recipe)
    assert "validate_" not in known_keys(Recipe)
    assert known_keys(Recipe, ("nowhere",)) == []
    assert known_keys(Recipe, ("seed",)) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("a=1", 1),
        ("a=1.5", 1.5),
        ("a=1e-3", 1e-3),
        ("a=true", True),
        ("a='1'", "1"),
        ("a=cuda", "cuda"),
        ("a=[1, 2]", [1, 2]),
        ("a={ b = 1 }", {"b": 1}),
        ("a=", ""),
        ("a=x=y", "x=y"),
        ("a=/data/été", "/data/été"),
        (" a =1", 1),
    ],
)
def test_settings_are_toml_or_else_text(setting: str, value: object) -> None:
    assert apply_settings({}, [setting]) == {"a": value}


def test_settings_reach_into_sections_and_leave_the_recipe_alone() -> None:
    before = json.dumps(GOOD)
    made = apply_settings(GOOD, ["teacher.input.height=16", "distill.epochs=3", "distill.epochs=4"])
    assert made["teacher"]["input"] == {"height": 16}
    assert made["teacher"]["model"] == "nayer:wrn_16_2"
    assert made["distill"] == {"epochs": 4}
    assert json.dumps(GOOD) == before


def test_a_setting_changes_one_key_and_no_limit_beside_it() -> None:
    """`[gate.accuracy] confidence = 0.99` alone in a file removes the section's default limits; --set does not."""
    before = make_recipe(GOOD, "mine.toml").gate
    settings = ["gate.accuracy.confidence=0.99", "gate.latency.max_p95_ms=3", "gate.parity.max_abs_diff=0.1"]
    after = make_recipe(apply_settings(GOOD, settings), "mine.toml").gate
    assert after.accuracy == before.accuracy.model_copy(update={"confidence": 0.99})
    assert after.accuracy.max_drop_vs_teacher == 0.04
    assert (after.latency.max_p95_ms, after.parity.max_abs_diff) == (3, 0.1)
    assert after.int8 == before.int8
    written = make_recipe({**GOOD, "gate": {"accuracy": {"confidence": 0.99}}}, "mine.toml").gate
    assert written.accuracy.max_drop_vs_teacher is None


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("distill.mixup", 0.0, True),
        ("distill.mixup", 0.5, False),
        ("teacher.input.mean", [0.5], True),
        ("distill.augment", {"pad": 4, "flip": True}, True),
        ("validate.data", None, True),
        ("student.arguments.depth", None, False),
        ("teacher.model", None, False),
        ("teacher.weights.sha256", None, False),
        ("seed", 0, True),
    ],
)
def test_is_default(key: str, value: object, default: bool) -> None:
    assert is_default(key, value) is default


@pytest.mark.parametrize("setting", ["", "a", "=1", "a..b=1", ".=1", "name.x=1"])
def test_settings_of_another_form(setting: str) -> None:
    with pytest.raises(UsageError, match=r"not of the form|is a value, not a section"):
        apply_settings(GOOD, [setting])


def test_sections_are_immutable() -> None:
    spec = InputSpec()
    with pytest.raises(ValueError, match="frozen"):
        spec.channels = 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "not readable as a recipe"),
        (b"a = 1\na = 2", "not readable as a recipe"),
        (b"\xff\xfe", "not readable as a recipe"),
        (b"a = " + b"[" * 5000, "not readable as a recipe"),
        (b"#" * (2**20 + 1), "larger than a recipe can be"),
    ],
)
def test_files_that_are_not_toml(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        parse_toml(path, "a recipe")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no recipe"):
        parse_toml(tmp_path / "absent.toml", "recipe")
    with pytest.raises(UsageError, match="not readable as a recipe"):
        parse_toml(tmp_path, "a recipe")
