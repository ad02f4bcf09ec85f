"""`--set a.b=c`, and the default of every key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.pipelines.recipes.settings import apply_settings, is_default, make_recipe

GOOD: dict[str, Any] = {
    "name": "mine",
    "teacher": {"model": "nayer:wrn_16_2", "weights": "t.safetensors", "classes": ["a", "b"]},
    "student": {"model": "nayer:resnet8"},
}


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
    """Alone in a file, `[gate.accuracy] confidence = 0.99` says that nothing is limited; --set does not."""
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
