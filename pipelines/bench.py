"""Latency and throughput of a run's artefacts on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from nayer_edge.artefacts import RunFolder
from nayer_edge.config import Recipe
from nayer_edge.errors import UsageError
from nayer_edge.export.benchmark import Timing, benchmark
from nayer_edge.export.runners import OrtRunner
from nayer_edge.export.targets import get_target

from .validate import candidates, native


def measure(
    run: RunFolder, recipe: Recipe, batches: Sequence[int], runs: int, threads: int | None = None
) -> list[Timing]:
    """Times every graph that is made for a device like this one, in turns.

    Raises:
        UsageError: nothing has been exported yet.
        IntegrityError: an artefact was altered.
    """
    here = [c for c in candidates(recipe) if c.file in run.manifest.files and native(get_target(c.target))]
    if not here:
        raise UsageError(
            f"{run.root} holds nothing that this machine runs.", fix=f"Type: nayer-edge export {run.root} --int8"
        )
    run.require_intact([candidate.file for candidate in here])
    with contextlib.ExitStack() as stack:
        runners = {
            candidate.name: stack.enter_context(
                OrtRunner(run.path(candidate.file), threads=threads, target=get_target(candidate.target))
            )
            for candidate in here
        }
        return benchmark(runners, recipe.teacher.input.shape, batches=batches, runs=runs)
