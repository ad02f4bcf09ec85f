"""The recipe as a whole: written as JSON and read again, and invalid values with their keys."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.recipes.settings import apply_settings, make_recipe

GOOD: dict[str, Any] = {
    "name": "mine",
    "teacher": {"model": "nayer:wrn_16_2", "weights": "t.safetensors", "classes": ["a", "b"]},
    "student": {"model": "nayer:resnet8"},
}


def test_round_trip_through_json() -> None:
    recipe = make_recipe(apply_settings(GOOD, ["teacher.classes=['é', '日']", "distill.lr=0.1"]), "mine.toml")
    text = json.dumps(recipe.model_dump(mode="json", by_alias=True), allow_nan=False)
    assert Recipe.model_validate(json.loads(text)) == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teach.data='digits'"], "either teacher.weights or a [teach] section"),
        (["distill.warmup_epochs=120"], "distill: warmup_epochs (120) must be less than epochs (120)"),
        (["teacher.input.mean=[0.1, 0.2]"], "teacher.input: mean has 2 values for 3 channels"),
        (["export.opset=17"], "export.opset: Input should be greater than or equal to 18"),
        (["gate.artifacts=[]"], "gate.artifacts: "),
        (["name='../x'"], "name: "),
        (["seed=1.5"], "valid integer"),
    ],
)
def test_invalid_recipes(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe(apply_settings(GOOD, settings), "mine.toml")
    assert message in caught.value.why


@pytest.mark.parametrize("model", ["hf:microsoft/resnet-18", "python:net.py:make"])
def test_models_that_bring_their_weights_need_no_others(model: str) -> None:
    values = {**GOOD, "teacher": {"model": model, "classes": ["a", "b"]}}
    assert make_recipe(values, "mine.toml").teacher.weights is None
