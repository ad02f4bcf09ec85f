"""Interleaved timing. What is fast is never asserted, only that it was measured fairly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nayer_edge.errors import UsageError
from nayer_edge.export.benchmark import benchmark
from nayer_edge.export.runners import OrtRunner, TorchRunner
from nayer_edge.export.to_onnx import to_onnx


class Recorder(TorchRunner):
    """A real runner that also writes down when it is called."""

    def __init__(self, label: str, log: list[tuple[str, int]]) -> None:
        super().__init__(nn.Flatten(), threads=1)
        self._label, self._log = label, log

    def infer(self, images: np.ndarray) -> np.ndarray:
        self._log.append((self._label, len(images)))
        return super().infer(images)


def test_runners_take_turns_and_swap_the_first_place() -> None:
    log: list[tuple[str, int]] = []
    with Recorder("a", log) as a, Recorder("b", log) as b:
        timings = benchmark({"a": a, "b": b}, (1, 2, 2), batches=(1, 3), runs=10, warmup=2, max_seconds=60)
    ones = "".join(name for name, n in log if n == 1)
    # Two warm-up calls each; then turns of one untimed and five timed calls, in alternating order.
    assert ones == "aabb" + "a" * 6 + "b" * 6 + "b" * 6 + "a" * 6
    assert len([n for _, n in log if n == 3]) == len(ones)
    found = [(t.runner, t.batch, t.runs) for t in timings]
    assert found == [("a", 1, 10), ("b", 1, 10), ("a", 3, 10), ("b", 3, 10)]


def test_figures_are_consistent(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    to_onnx(model, (3, 8, 8), tmp_path / "m.onnx")
    with TorchRunner(model, threads=1) as first, OrtRunner(tmp_path / "m.onnx", threads=1) as second:
        timings = benchmark({"torch": first, "ort": second}, (3, 8, 8), batches=(2,), runs=20)
    for timing in timings:
        assert 0 < timing.p50 <= timing.p95 <= timing.p99
        assert timing.images_per_s == pytest.approx(2 / timing.p50 * 1000)
        assert timing.threads == 1
    assert timings[0].ratio == 1.0


def test_time_is_bounded_but_one_turn_is_always_made() -> None:
    with TorchRunner(nn.Flatten()) as runner:
        found = benchmark({"a": runner}, (1, 2, 2), runs=10_000, max_seconds=0.0)
    assert found[0].runs == 5


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one runner"):
        benchmark({}, (1, 2, 2))
