"""TOML that is read or refused, and problems of a recipe: all at once, with the nearest names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.pipelines.recipes.checking import known_keys, parse_toml
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.recipes.settings import apply_settings, make_recipe

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


def test_missing_parts_are_named() -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe({"teacher": {"classes": ["a", "b"]}}, "x")
    for part in ("'name' is missing", "'teacher.model' is missing", "'student' is missing"):
        assert part in caught.value.why


def test_known_keys_use_the_names_of_files() -> None:
    assert "validate" in known_keys(Recipe)
    assert "validate_" not in known_keys(Recipe)
    assert known_keys(Recipe, ("nowhere",)) == []
    assert known_keys(Recipe, ("seed",)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "not readable as a recipe"),
        (b"a = 1\na = 2", "not readable as a recipe"),
        (b"\xff\xfa", "not readable as a recipe"),
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
