"""Result files: read before a run, so that it continues where it stopped, and written after every student."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nayer_edge.storage.files import write_json


def kept(path: Path | None) -> dict[str, Any]:
    """What an earlier run of the same script left there; nothing where there was none."""
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


def keep(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes what there is, if anybody asked for it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, figures)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds; null where there are too few for either."""
    return {
        "mean": statistics.mean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }
