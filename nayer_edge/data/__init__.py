"""Labelled images from files: which formats are read, and how a set too large for memory is streamed."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    """`digits`, which was here before it moved to `datasets`; imported late, since it needs torch."""
    if name == "digits":
        moved = "nayer_edge.data.digits is deprecated and will be removed. Use nayer_edge.data.datasets.digits instead."
        warnings.warn(moved, FutureWarning, stacklevel=2)
        from nayer_edge.data.datasets import digits

        return digits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
