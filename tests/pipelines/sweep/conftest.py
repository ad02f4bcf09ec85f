"""The run whose images the sweeps of these tests start with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.run import run_recipe

SETTINGS = (
    *("device=cpu", "precision=fp32", "teacher.model=nayer:resnet8", "teach.epochs=2"),
    *("student.model=nayer:resnet8_w8", "generator.channels=8", "generator.noisy_dim=32"),
    *("synthesis.batch=20", "synthesis.g_steps=2", "synthesis.warmup_rounds=4", "synthesis.rounds=2"),
    *("synthesis.reserve=0.4", "synthesis.g_life=1000"),
    *("distill.warmup_epochs=1", "distill.epochs=4", "distill.decay_epochs=1", "distill.steps=3", "distill.batch=16"),
    *("distill.views=2", "distill.holdout_rounds=1", "distill.optimizer=muon", "distill.schedule=constant"),
    *("export.calibration_images=20", "export.calibration_method=minmax", "export.sensitivity=false"),
    "export.max_drop=1.0",
)


@pytest.fixture(scope="session")
def source(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A finished run, whose bank the students start with. Read only."""
    recipe = load_recipe("digits", list(SETTINGS))
    return once("sweep-source", lambda folder: run_recipe(recipe, folder / "source", last="student")) / "source"
