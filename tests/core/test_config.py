"""The sections of a recipe that the core reads: the paper's numbers by default, contradictions refused, immutable."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nayer_edge.config import LTE, Distill, InputSpec, Section, Synthesis, Teacher


def test_the_defaults_are_the_papers_numbers() -> None:
    synthesis, distill = Synthesis(), Distill()
    assert (synthesis.lambda_bn, synthesis.lambda_ce, synthesis.lambda_adv) == (10, 0.5, 1.33)
    assert (synthesis.bn_momentum, synthesis.lr, synthesis.g_life) == (0.9, 4e-3, 10)
    assert (synthesis.rounds, synthesis.warmup_rounds, synthesis.batch) == (2, 10, 400)
    assert (distill.epochs, distill.warmup_epochs, distill.steps) == (120, 20, 400)
    assert (distill.temperature, distill.lr, distill.weight_decay) == (20, 0.2, 1e-4)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (Distill, {"warmup_epochs": 120}, "warmup_epochs (120) must be less than epochs (120)"),
        (Distill, {"lr": float("inf")}, "finite"),
        (Distill, {"lr": "fast"}, "valid number"),
        (Synthesis, {"lambda_bn": float("nan")}, "finite"),
        (Teacher, {"model": "m", "classes": ["a", "b", "a"]}, "more than once: a"),
        (Teacher, {"model": "m", "classes": ["a", " "]}, "must not be empty (number 1)"),
        (Teacher, {"model": "m", "classes": ["a"]}, "at least 2 items"),
        (InputSpec, {"mean": [0.1, 0.2]}, "mean has 2 values for 3 channels"),
        (InputSpec, {"mean": [float("nan")]}, "finite"),
        (InputSpec, {"std": [0.0]}, "greater than 0"),
        (InputSpec, {"height": 3}, "greater than or equal to 4"),
        (LTE, {"prompt": "a photo"}, "must contain {label}"),
        (LTE, {"prompt": "a\n{label}"}, "a prompt must be a single line"),
        (LTE, {"encoders": "onehot"}, "Extra inputs are not permitted"),
    ],
)
def test_invalid_values(section: type[Section], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        section.model_validate(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("mean", "std"), [((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), ((127.5,), (127.5,)), ((0.5,), (127.5,))]
)
def test_normalisation_of_pixels_up_to_255(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="divide them by 255") as caught:
        InputSpec(mean=mean, std=std)
    if len(mean) == 3:
        assert "mean = [0.485, 0.456, 0.406]; std = [0.229, 0.224, 0.225]" in str(caught.value)
    # A teacher that takes pixels as they are stored.
    assert InputSpec(mean=(0.0,), std=(1 / 255,)).std == (1 / 255,)


def test_sections_are_immutable() -> None:
    spec = InputSpec()
    with pytest.raises(ValueError, match="frozen"):
        spec.channels = 1
