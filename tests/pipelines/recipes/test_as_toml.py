"""A recipe as TOML: read back as it was, by the standard library and by us, whatever its texts hold."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nayer_edge.pipelines.recipes.as_toml import recipe_toml, travelling
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.recipes.settings import make_recipe

KEYS = st.text(min_size=1, max_size=8)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(
    st.dictionaries(KEYS.filter(lambda key: key.isprintable()), PLAIN | st.lists(PLAIN, max_size=3), max_size=4),
    lambda inner: st.dictionaries(TEXTS, inner | PLAIN, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(VALUES)
def test_any_values_come_back(values: dict[str, Any]) -> None:
    def filled(value: Any) -> Any:
        """TOML says nothing of a table that is empty below a heading that is not written."""
        if not isinstance(value, dict):
            return value
        kept = {key: filled(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item != {}}

    assert tomllib.loads(recipe_toml(values)) == filled(values)


def test_what_cannot_be_seen_is_written_as_a_number() -> None:
    text = recipe_toml({"a": '\x1b[2J"\\\u202e\n🎱猫\x7f'})
    assert text == 'a = "\\u001B[2J\\"\\\\\\u202E\\u000A🎱猫\\u007F"\n'
    assert tomllib.loads(text)["a"] == '\x1b[2J"\\\u202e\n🎱猫\x7f'


@pytest.mark.parametrize("name", ["digits", "cifar10-w402-w161-e100"])
def test_shipped_recipes_come_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAYER_EDGE_DATA", str(tmp_path / "data"))
    here = load_recipe(name)
    values, beside = travelling(here, tmp_path / "runs" / "x")
    (tmp_path / "again.toml").write_text(recipe_toml(values), encoding="utf-8")
    assert load_recipe(str(tmp_path / "again.toml")) == here
    assert beside == []


def test_paths_are_cut_to_their_last_part(tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "name": "x",
            "teacher": {
                "model": "python:/home/someone/net.py:make",
                "weights": "/home/someone/w.pt",
                "classes": ["a", "b"],
            },
            "student": {"model": "nayer:resnet8"},
            "lte": {"encoder": "/mnt/private/clip.npz"},
            "validate": {"data": "/mnt/private/holdout"},
        },
        "of this test",
    )
    values, beside = travelling(recipe, tmp_path)
    text = recipe_toml(values)
    assert "someone" not in text
    assert "private" not in text
    assert beside == ["w.pt", "clip.npz", "holdout", "net.py"]
    read = tomllib.loads(text)
    assert (read["teacher"]["weights"], read["validate"]["data"]) == ("w.pt", "holdout")
    assert read["teacher"]["model"] == "python:net.py:make"
