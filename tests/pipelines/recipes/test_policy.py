"""Policies and references: checked like a recipe, all problems at once."""

from __future__ import annotations

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.pipelines.recipes.policy import make_policy, make_references


def test_policies_are_checked_like_recipes() -> None:
    assert make_policy({}, "p").artifacts == ("int8.cpu",)
    with pytest.raises(UsageError) as caught:
        make_policy({"accurcy": {}, "int8": {"min_coverage": 2}}, "policy.toml")
    assert "Did you mean 'accuracy'?" in caught.value.why
    assert "int8.min_coverage" in caught.value.why


def test_references_are_checked_like_recipes() -> None:
    assert make_references({"baseline": {"run": "runs/last"}}, "references.toml").baseline.sha256 is None
    with pytest.raises(UsageError) as caught:
        make_references({"baseline": {"runn": "x", "sha256": "abc"}}, "references.toml")
    assert "references.toml" in caught.value.what
    assert "Did you mean 'baseline.run'?" in caught.value.why
    assert "baseline.sha256" in caught.value.why
