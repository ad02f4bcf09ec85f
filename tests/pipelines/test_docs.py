"""The step table in the documents is the one in the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from nayer_edge.pipelines.steps import table

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("document", ["README.md", "docs/ARCHITECTURE.md"])
def test_the_step_table_is_current(document: str) -> None:
    assert table() in (ROOT / document).read_text(encoding="utf-8")
