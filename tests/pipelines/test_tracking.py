"""TensorBoard's files hold what metrics.jsonl holds, and lie outside the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.storage.run_folder import RunFolder


@pytest.mark.slow
def test_the_board_shows_the_metrics(begun: Path, tiny_settings: list[str]) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tracking'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_recipe(load_recipe("digits", [*tiny_settings, "tracking=tensorboard"]), begun, last="student")
    board = EventAccumulator(str(begun.with_name("a run.tensorboard"))).Reload()
    lines = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]
    shown = {point.step: point.value for point in board.Scalars("loss_bn")}
    assert shown == pytest.approx({line["epoch"]: line["loss_bn"] for line in lines}, rel=1e-4)
    assert len(board.Scalars("loss_kd")) == sum(line["loss_kd"] is not None for line in lines) > 0
    assert RunFolder.open(begun).unexpected_files() == []
    # Another run in its place leaves nothing of it on the board.
    again = load_recipe("digits", [*tiny_settings, "tracking=tensorboard", "seed=1"])
    run_recipe(again, begun, last="student", fresh=True)
    board = EventAccumulator(str(begun.with_name("a run.tensorboard"))).Reload()
    assert len(board.Scalars("loss_bn")) == len(lines)
    assert {point.step: point.value for point in board.Scalars("loss_bn")} != shown
