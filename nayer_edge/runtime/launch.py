"""Whether torchrun started this process, and as which of how many. Needs no torch."""

from __future__ import annotations

import os

from nayer_edge.errors import UsageError


def launched() -> tuple[int, int]:
    """Rank and number of processes as torchrun states them in the environment; (0, 1) where it is not torchrun's.

    Raises:
        UsageError: the variables are not numbers that fit each other.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return 0, 1
    texts = os.environ["RANK"], os.environ["WORLD_SIZE"]
    try:
        rank, size = (int(text) for text in texts)
        if not 0 <= rank < size:
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"RANK={texts[0]} and WORLD_SIZE={texts[1]} are not those of a process that torchrun started.",
            fix="Start it with torchrun, or unset both.",
        ) from error
    return rank, size
