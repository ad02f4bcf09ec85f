"""Measures latency and throughput of a run's artifacts on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from nayer_edge.errors import NayerEdgeError, UsageError
from nayer_edge.export.benchmark import Timing, benchmark
from nayer_edge.storage.run_folder import RunFolder

from ..recipes.schema import Recipe
from ..validation.runnable import candidates, open_all


def measure(
    run: RunFolder, recipe: Recipe, batches: Sequence[int], runs: int, threads: int | None = None
) -> tuple[list[Timing], dict[str, NayerEdgeError]]:
    """Times the graphs made for this machine's CPU, in every runtime, and the engines made for its GPU, in alternation.

    Returns:
        The timings, and the error for each artifact that cannot be opened here.

    Raises:
        UsageError: there is nothing to time, for example because nothing has been exported yet.
        IntegrityError: an artifact was altered.
    """
    here = [c for c in candidates(recipe, run) if c.file in run.manifest.files and c.timed]
    if not here:
        raise UsageError(
            f"{run.root} holds no artifact for this machine.", fix=f"Type: nayer-edge export {run.typed} --int8"
        )
    run.require_intact([candidate.file for candidate in here])
    with contextlib.ExitStack() as stack:
        opened, refused = open_all(here, run, stack, threads)
        if not opened:
            raise next(iter(refused.values()))
        references = {candidate.name: candidate.reference for candidate in here}
        shape = recipe.teacher.input.shape
        return benchmark(opened, shape, batches=batches, runs=runs, references=references), refused
