"""Latency and throughput, all runners interleaved in one process, so that ratios between them are fair.

A machine's clock, its neighbours and its temperature change within seconds. Runners measured one after the
other each meet another machine; taking turns, they meet the same one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nayer_edge.errors import UsageError

from .runners import Runner


@dataclass(frozen=True)
class Timing:
    """One runner at one batch size.

    Attributes:
        runner: its label.
        batch: images per call.
        threads: processor threads that the runner computes with.
        runs: timed calls.
        p50: median latency of a call, milliseconds.
        p95: 95th percentile, milliseconds.
        p99: 99th percentile, milliseconds.
        images_per_s: batch / median latency.
        ratio: median over rounds of (the first runner's latency / this one's): above 1 it is faster.
    """

    runner: str
    batch: int
    threads: int
    runs: int
    p50: float
    p95: float
    p99: float
    images_per_s: float
    ratio: float


def benchmark(
    runners: Mapping[str, Runner],
    input_shape: tuple[int, int, int],
    *,
    batches: Sequence[int] = (1,),
    runs: int = 100,
    warmup: int = 10,
    max_seconds: float = 60.0,
) -> list[Timing]:
    """Times open runners in turns: one call each, round after round.

    Args:
        runners: label → runner, entered already; the first is the one that ratios refer to.
        input_shape: (C, H, W).
        batches: images per call.
        runs: timed rounds per batch size.
        warmup: untimed rounds before them.
        max_seconds: per batch size; after it, measuring stops with the rounds there are (at least 5).

    Returns:
        one entry per runner and batch size, in their order. Images are random: a network's speed does not
        depend on them.

    Raises:
        UsageError: no runner, or a number below 1.
    """
    if not runners or runs < 1 or warmup < 0 or any(batch < 1 for batch in batches):
        raise UsageError("A benchmark needs at least one runner, one run and a batch of one image.")
    found = []
    for batch in batches:
        images = np.random.default_rng(0).random((batch, *input_shape), dtype=np.float32)
        seconds = _interleaved(list(runners.values()), images, runs, warmup, max_seconds)
        first = seconds[:, 0]
        for column, (label, runner) in enumerate(runners.items()):
            own = seconds[:, column]
            p50, p95, p99 = np.percentile(own, [50, 95, 99]) * 1000
            found.append(
                Timing(
                    runner=label,
                    batch=batch,
                    threads=runner.threads,
                    runs=len(own),
                    p50=float(p50),
                    p95=float(p95),
                    p99=float(p99),
                    images_per_s=float(batch / p50 * 1000),
                    ratio=float(np.median(first / own)),
                )
            )
    return found


def _interleaved(
    runners: Sequence[Runner], images: np.ndarray, runs: int, warmup: int, max_seconds: float
) -> np.ndarray:
    """Seconds, (rounds, runners). The order alternates, so that none always follows the same neighbour."""
    for _ in range(warmup):
        for runner in runners:
            runner.infer(images)
    rows = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + max_seconds
        for number in range(runs):
            row = [0.0] * len(runners)
            order = range(len(runners)) if number % 2 == 0 else range(len(runners) - 1, -1, -1)
            for index in order:
                start = time.perf_counter()
                runners[index].infer(images)
                row[index] = time.perf_counter() - start
            rows.append(row)
            if time.perf_counter() > end and number >= 4:
                break
    finally:
        if collecting:
            gc.enable()
    return np.array(rows)
