"""The published JSON Schemas. `python -m nayer_edge.pipelines.schemas` regenerates them (`make schemas`)."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def load(name: str) -> dict[str, Any]:
    """The published schema of `recipe`, `policy`, `references`, `report`, `verdict`, `manifest` or `sweep`."""
    return json.loads(resources.files(__name__).joinpath(f"{name}.schema.json").read_text(encoding="utf-8"))
