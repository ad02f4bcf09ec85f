"""What every test shares: threads that leave the other core alone, and a run that is made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# The shapes in these modules' signatures are executed, in tests only.
SHAPED = ("losses", "augment", "channel_statistics", "generator", "bank", "synthesis", "evaluate", "views")
install_import_hook([f"nayer_edge.{module}" for module in SHAPED], "beartype.beartype")

# A terminal of 80 columns without colours, whatever the server that runs the tests sets.
os.environ["COLUMNS"] = "80"
os.environ.pop("FORCE_COLOR", None)

TINY = (
    "distill.epochs=3",
    "distill.warmup_epochs=1",
    "distill.steps=4",
    "distill.batch=32",
    "distill.holdout_rounds=1",
    "synthesis.batch=20",
    "synthesis.g_steps=3",
    "synthesis.warmup_rounds=2",
    "teach.epochs=2",
    "export.calibration_images=20",
    "export.calibration_method=minmax",
)
"""the digits recipe, small enough to run in seconds; what it makes is no good"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the cache of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny_settings() -> list[str]:
    """`--set` items that make the digits recipe run in seconds."""
    return list(TINY)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny digits recipe. Read only: copy it before changing anything."""
    from nayer_edge.pipelines.recipe import load_recipe
    from nayer_edge.pipelines.run import run_recipe

    root = tmp_path_factory.mktemp("runs") / "digits"
    run_recipe(load_recipe("digits", list(TINY)), root)
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips GPU tests with the reason where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
