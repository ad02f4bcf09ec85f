"""Measures latency and throughput of a run's artifacts on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from nayer_edge.errors import UsageError
from nayer_edge.export.benchmark import Timing, benchmark
from nayer_edge.storage.files import read_json
from nayer_edge.storage.run_folder import RunFolder

from ..deploy import ENGINES
from ..recipes.schema import Recipe
from ..runnable import engines, graphs, open_all


def measure(
    run: RunFolder, recipe: Recipe, batches: Sequence[int], runs: int, threads: int | None = None
) -> list[Timing]:
    """Times the graphs made for this machine's CPU and the engines made for its GPU, in alternation.

    Raises:
        UsageError: there is nothing to time, for example because nothing has been exported yet.
        IntegrityError: an artifact was altered.
    """
    held = run.manifest.files
    records = read_json(run.path(ENGINES), "the list of engines") if ENGINES in held else []
    here = [c for c in (*graphs(recipe), *engines(records)) if c.file in held and c.timed]
    if not here:
        raise UsageError(
            f"{run.root} holds no artifact for this machine.", fix=f"Type: nayer-edge export {run.typed} --int8"
        )
    run.require_intact([candidate.file for candidate in here])
    with contextlib.ExitStack() as stack:
        opened, refused = open_all(here, run, stack, threads)
        if not opened:
            raise next(iter(refused.values()))
        return benchmark(opened, recipe.teacher.input.shape, batches=batches, runs=runs)
