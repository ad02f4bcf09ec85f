"""What the documents repeat of the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nayer_edge.config import Policy, Recipe, known_keys
from nayer_edge.pipelines.schemas import reference
from nayer_edge.pipelines.steps import table

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("document", ["README.md", "docs/ARCHITECTURE.md"])
def test_the_step_table_is_current(document: str) -> None:
    assert table() in (ROOT / document).read_text(encoding="utf-8")


PAGE = (ROOT / "docs" / "REFERENCE.md").read_text(encoding="utf-8")


def test_the_reference_is_current() -> None:
    assert reference.page() == PAGE, "type: make schemas"


def test_the_reference_names_every_key_and_says_what_it_is() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    assert all(len(row) == 4 and len(row[3].strip(" |")) > 2 for row in rows)
    for section in re.findall(r"^#+ `\[(.+)\]`$", PAGE, re.MULTILINE):
        assert known_keys(Recipe, tuple(section.split("."))), section
    sections = {section for section in known_keys(Recipe) if known_keys(Recipe, (section,))}
    assert sections == set(re.findall(r"^## `\[(.+)\]`$", PAGE, re.MULTILINE))
    nested = {f"gate.{name}" for name in known_keys(Policy) if known_keys(Policy, (name,))}
    assert nested <= set(re.findall(r"^### `\[(.+)\]`$", PAGE, re.MULTILINE))


def test_the_reference_shows_the_limits_that_hold_without_a_word() -> None:
    policy = Policy()
    limit = policy.accuracy.max_drop_vs_teacher
    assert limit is not None
    assert f"| `max_drop_vs_teacher` | `{limit}` |" in PAGE
    assert f"| `min_coverage` | `{policy.int8.min_coverage}` |" in PAGE
