"""Values as TOML: the standard library reads them back unchanged, whatever their texts hold."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nayer_edge.pipelines.recipes.as_toml import to_toml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(
    st.dictionaries(TEXTS, PLAIN | st.lists(PLAIN, max_size=3), max_size=4),
    lambda inner: st.dictionaries(TEXTS, inner | PLAIN, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(VALUES)
def test_any_values_come_back(values: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(values)) == values


def test_invisible_characters_are_escaped() -> None:
    value = '\x1b[2J"\\\u202e\t\n🎱猫\x7f\U000e0001'
    text = to_toml({"a": value})
    assert text == r'a = "\u001b[2J\"\\\u202e\u0009\n🎱猫\u007f\U000e0001"' + "\n"
    assert tomllib.loads(text) == {"a": value}
    assert to_toml({"a": "x\ud800", "\u202e": ["\u2066"]}) == 'a = "x\ufffd"\n"\\u202e" = [\n    "\\u2066",\n]\n'


def test_none_is_left_out() -> None:
    assert to_toml({"a": None, "b": {"c": None, "d": 1}}) == "[b]\nd = 1\n"
