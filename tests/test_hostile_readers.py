"""Whatever a file holds, a reader answers with its value or with an error that a person can act on."""

from __future__ import annotations

import json
import string
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nayer_edge.errors import IntegrityError, NayerEdgeError, UsageError
from nayer_edge.labels import embeddings as lte
from nayer_edge.models.load import load_classifier
from nayer_edge.pipelines.recipes.checking import parse_toml
from nayer_edge.pipelines.recipes.policy import Policy, make_policy
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.recipes.settings import apply_settings, make_recipe
from nayer_edge.pipelines.trust.verification import examine
from nayer_edge.storage.run_folder import MANIFEST, RunFolder
from nayer_edge.text import printed

SHARED = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ODD = st.sampled_from(
    [0, -1, 2**63, 1e308, "", "\0", "\u202e", "..", "/etc/passwd", True, None, "x" * 300, 1e-320, "NaN"]
)
VALUES = st.recursive(
    ODD | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside nested values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def answered(reader: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader returns, or the error that it raises."""
    try:
        return reader(*arguments)
    except UsageError as error:
        return error


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


RECIPE = {
    "name": "r",
    "teacher": {"model": "nayer:wrn_16_1", "classes": ["a", "b"], "weights": "w.safetensors"},
    "student": {"model": "nayer:resnet8"},
    "distill": {"epochs": 3, "warmup_epochs": 1},
    "gate": {"artifacts": ["int8.cpu"], "accuracy": {"max_drop_vs_fp32": 0.01}},
}


@SHARED
@given(place=st.sampled_from(places(RECIPE)), new=VALUES)
def test_recipes(place: tuple[Any, ...], new: Any) -> None:
    values = put(RECIPE, place, new)
    if isinstance(values, dict):
        answer = answered(make_recipe, values, "of this test")
        assert isinstance(answer, Recipe) or answer.why


@SHARED
@given(place=st.sampled_from(places(RECIPE["gate"])), new=VALUES)
def test_policies(place: tuple[Any, ...], new: Any) -> None:
    values = put(RECIPE["gate"], place, new)
    if isinstance(values, dict):
        answer = answered(make_policy, values, "of this test")
        assert isinstance(answer, Policy) or answer.why


@SHARED
@given(content=st.binary(max_size=200) | st.text(alphabet=string.printable).map(str.encode))
def test_files_that_should_be_toml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    answer = answered(parse_toml, tmp_path / "r.toml", "a recipe")
    assert isinstance(answer, dict) or "r.toml" in answer.what


@SHARED
@given(setting=st.text(max_size=40) | st.from_regex(r"[a-z.]{1,9}=.{0,9}"))
def test_settings(setting: str) -> None:
    answer = answered(apply_settings, RECIPE, [setting])
    assert isinstance(answer, dict) or setting in answer.what or "--set" in answer.what


MANIFEST_VALUES = {
    "schema": "nayer-edge/manifest/1",
    "recipe": {"name": "r"},
    "seed": 1,
    "versions": {"torch": "2"},
    "hardware": {},
    "steps": {"lte": {"digest": "0" * 64, "settings": {}, "seconds": 1.0, "finished": "now", "numbers": {"n": 1}}},
    "files": {"lte.safetensors": {"kind": "lte", "step": "lte", "sha256": "0" * 64, "bytes": 1, "parents": ["1" * 64]}},
}


@SHARED
@given(place=st.sampled_from(places(MANIFEST_VALUES)), new=VALUES, name=st.none() | st.text(min_size=1, max_size=60))
def test_manifests(tmp_path: Path, place: tuple[Any, ...], new: Any, name: str | None) -> None:
    values = put(MANIFEST_VALUES, place, new)
    if name is not None and isinstance(values, dict) and isinstance(values.get("files"), dict):
        values["files"] = dict.fromkeys([name], *values["files"].values()) if len(values["files"]) == 1 else {}
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    try:
        found = examine(RunFolder.open(tmp_path))
    except IntegrityError:
        return
    named = values["files"]
    assert bool(named) == bool(found.problems), "no file that it names is here"


@SHARED
@given(content=st.binary(max_size=120), length=st.none() | st.integers(0, 2**64 - 1))
def test_embeddings_that_are_none(tmp_path: Path, content: bytes, length: int | None) -> None:
    path = tmp_path / "e.safetensors"
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content)
    with pytest.raises(IntegrityError, match=r"not a file of label-text embeddings|holds"):
        lte.load(path)


CARD = {
    "schema": "nayer-edge/model/1",
    "model": "nayer:resnet8",
    "input": {"channels": 1, "height": 8, "width": 8, "mean": [0.5], "std": [0.5]},
    "classes": ["a", "b"],
    "sha256": "0" * 64,
}


@SHARED
@given(place=st.sampled_from(places(CARD)), new=VALUES)
def test_cards(tmp_path: Path, place: tuple[Any, ...], new: Any) -> None:
    (tmp_path / "n.safetensors").write_bytes(b"")
    (tmp_path / "n.json").write_text(json.dumps(put(CARD, place, new)))
    with pytest.raises(NayerEdgeError):
        load_classifier(tmp_path / "n.safetensors")


@SHARED
@given(text=st.text())
def test_printed_text_acts_nowhere(text: str) -> None:
    shown = printed(text)
    shown.encode()
    assert "::" not in shown
    assert "##[" not in shown
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    assert printed(shown) == shown
