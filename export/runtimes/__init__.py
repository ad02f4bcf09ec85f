"""Runtimes besides ONNX Runtime and TensorRT: one module each, imported only when a target asks for it.

A module has a runner, and `describe`, which reads from a file what its runtime makes of it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..runners import Runner


def module_of(runtime: str) -> Any:
    """The module of a runtime: `require`, `open_runner`, `describe`."""
    return importlib.import_module(f"{__name__}.{runtime}")


def require(runtime: str) -> str:
    """The version of a runtime's package.

    Raises:
        MissingError: it is not installed; the message has the line that installs it.
    """
    return module_of(runtime).require()


def open_runner(runtime: str, path: Path, threads: int | None = None) -> Runner:
    """A runner, not yet entered.

    Args:
        threads: by default all that the process may use.
    """
    return module_of(runtime).open_runner(path, threads=threads)


def describe(runtime: str, path: Path) -> dict[str, Any]:
    """What the runtime makes of a file, as JSON: its interface, and the layers that run in INT8 and in float.

    Raises:
        MissingError: the runtime is not installed.
        IntegrityError: it does not load the file.
    """
    return module_of(runtime).describe(path)
