"""Latency and throughput, all runners interleaved in one process, so that ratios between them are fair.

A machine's clock, its neighbours and its temperature change within seconds. Runners measured one after the
other each meet another machine; taking turns, they meet the same one. A turn is a few calls, the first of them
untimed: a device runs one model, so its weights are in the cache, and the neighbour's should not be.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nayer_edge.errors import UsageError

from .runners import Runner

_CALLS = 5
"""timed calls per turn"""


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
        ratio: median over turns of (the first runner's median / this one's): above 1 it is faster.
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
    """Times open runners in turns.

    Args:
        runners: label → runner, entered already; the first is the one that ratios refer to.
        input_shape: (C, H, W).
        batches: images per call.
        runs: timed calls per runner and batch size, rounded up to whole turns.
        warmup: untimed calls before them.
        max_seconds: per batch size; after it, measuring stops with the turns there are (at least one).

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
        typical = np.median(seconds, axis=2)
        for column, (label, runner) in enumerate(runners.items()):
            own = seconds[:, column].ravel()
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
                    ratio=float(np.median(typical[:, 0] / typical[:, column])),
                )
            )
    return found


def _interleaved(
    runners: Sequence[Runner], images: np.ndarray, runs: int, warmup: int, max_seconds: float
) -> np.ndarray:
    """Seconds, (turns, runners, calls of a turn). The order alternates: none always follows the same neighbour."""
    for runner in runners:
        for _ in range(warmup):
            runner.infer(images)
    calls = min(runs, _CALLS)
    turns = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + max_seconds
        for number in range(-(-runs // calls)):
            turn = np.zeros((len(runners), calls))
            order = range(len(runners)) if number % 2 == 0 else range(len(runners) - 1, -1, -1)
            for index in order:
                infer = runners[index].infer
                infer(images)
                for call in range(calls):
                    start = time.perf_counter()
                    infer(images)
                    turn[index, call] = time.perf_counter() - start
            turns.append(turn)
            if time.perf_counter() > end:
                break
    finally:
        if collecting:
            gc.enable()
    return np.stack(turns)
