"""The step table: one source for order, resume, `--until` and the documents."""

from __future__ import annotations

import inspect

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.recipes.settings import make_recipe
from nayer_edge.pipelines.steps import NAMES, STEPS, Step, settings_of, table, until


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_a_step_is_a_function_of_its_inputs(step: Step) -> None:
    parameters = inspect.signature(step.load()).parameters
    assert tuple(parameters) == (*step.inputs, "config", "out", "progress")
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ("config", "out", "progress"))


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_inputs_come_earlier(step: Step) -> None:
    assert set(step.inputs) <= set(NAMES[: NAMES.index(step.name)])
    assert len(set(step.inputs)) == len(step.inputs)


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_settings_are_keys_of_the_recipe(step: Step) -> None:
    recipe = load_recipe("digits").model_dump(mode="json", by_alias=True)
    for key in step.settings:
        section, _, name = key.partition(".")
        assert section in recipe, key
        assert not name or name in recipe[section], key


def test_names_differ() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_every_setting_that_changes_a_result_is_read_by_a_step() -> None:
    """What no step lists would be changed without anything being made anew. The page only shows what it reads."""
    recipe = load_recipe("digits").model_dump(mode="json", by_alias=True)
    read = {key.split(".")[0] for step in STEPS if step.name != "report" for key in step.settings}
    # The budget says how the sizes were planned; the sizes themselves are read. A sweep makes other runs.
    assert set(recipe) - read == {"name", "description", "measured", "budget", "image_time", "tracking", "sweep"}


def test_the_page_shows_the_whole_recipe_and_every_step() -> None:
    report = STEPS[NAMES.index("report")]
    assert set(report.settings) == set(load_recipe("digits").model_dump(mode="json", by_alias=True)) - {"sweep"}
    assert report.inputs == NAMES[:-1]


def test_a_step_that_draws_images_reads_what_they_depend_on() -> None:
    for step in STEPS:
        if {"teacher", "lte", "student"} <= set(step.inputs):
            assert {"synthesis", "seed", "device", "precision"} <= set(step.settings), step.name


def test_until() -> None:
    assert until(None) == STEPS
    assert until("lte") == STEPS[:2]
    with pytest.raises(UsageError, match=r"Did you mean 'student'\?"):
        until("studnet")


def test_the_table_names_every_step() -> None:
    rows = table().splitlines()
    assert len(rows) == 2 + len(STEPS)
    assert all(row.count("|") == 5 for row in rows)
    for step, row in zip(STEPS, rows[2:], strict=True):
        assert row.startswith(f"| `{step.name}` | {step.title} |")


def test_settings_follow_nested_keys() -> None:
    recipe = make_recipe(
        {
            "name": "x",
            "teacher": {"model": "nayer:resnet20", "weights": "t.safetensors", "classes": ["a", "b"]},
            "student": {"model": "nayer:resnet8"},
        },
        "of this test",
    )
    lte = STEPS[NAMES.index("lte")]
    values = recipe.model_dump(mode="json", by_alias=True)
    assert settings_of(lte, values)["teacher.classes"] == ["a", "b"]
