"""Latency and throughput of several runners, interleaved in one process, so that their ratios are fair.

A machine's clock rate, load and temperature change within seconds, so runners that are measured one after the other
meet different conditions. Here they take turns of a few calls. The first call of a turn is not timed: it loads the
model's weights into the cache, where a device that runs a single model has them.
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
    """Timing of one runner at one batch size.

    Attributes:
        runner: its label.
        batch: images per call.
        threads: processor threads of the runner.
        runs: timed calls.
        p50: median latency of a call, milliseconds.
        p95: 95th percentile, milliseconds.
        p99: 99th percentile, milliseconds.
        images_per_s: batch / median latency.
        ratio: speed-up over its reference: median over turns of (the reference's median latency / this runner's).
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
    references: Mapping[str, str] | None = None,
) -> list[Timing]:
    """Times open runners in turns, on random images (the speed of a network does not depend on them).

    Args:
        runners: label → runner, already entered.
        input_shape: (C, H, W).
        batches: images per call.
        runs: timed calls per runner and batch size, rounded up to whole turns.
        warmup: untimed calls before them.
        max_seconds: per batch size; no new turn starts after it (at least one is measured).
        references: label → label of the runner that its ratio refers to; the first where there is none of that label.

    Returns:
        one entry per runner and batch size, in their order.

    Raises:
        UsageError: no runner, or a number below 1.
    """
    if not runners or runs < 1 or warmup < 0 or any(batch < 1 for batch in batches):
        raise UsageError("A benchmark needs at least one runner, one run and one image per batch.")
    found = []
    for batch in batches:
        images = np.random.default_rng(0).random((batch, *input_shape), dtype=np.float32)
        seconds = _interleaved(list(runners.values()), images, runs, warmup, max_seconds)
        typical = np.median(seconds, axis=2)
        columns = {label: column for column, label in enumerate(runners)}
        for column, (label, runner) in enumerate(runners.items()):
            own = seconds[:, column].ravel()
            reference = columns.get((references or {}).get(label, ""), 0)
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
                    ratio=float(np.median(typical[:, reference] / typical[:, column])),
                )
            )
    return found


def _interleaved(
    runners: Sequence[Runner], images: np.ndarray, runs: int, warmup: int, max_seconds: float
) -> np.ndarray:
    """Seconds, (turns, runners, calls per turn). The order alternates, so that no runner always follows another."""
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
