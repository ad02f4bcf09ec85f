"""Runtimes besides ONNX Runtime and TensorRT: one module each, imported only when a target asks for it.

A module has a runner (a context manager, see runners.py) and `describe`, which reads back what its runtime makes of a
file. One whose files are not ONNX has `build`, too, which makes them from a PyTorch network.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

from nayer_edge.errors import missing_extra

from ..runners import Runner
from ..targets import Target

RUNNERS = {"openvino": "OpenVinoRunner", "executorch": "ExecuTorchRunner", "litert": "LiteRtRunner"}
"""runtime, and name of its module → its runner"""


def module_of(target: Target) -> Any:
    """The module of a target's runtime."""
    return importlib.import_module(f"{__name__}.{target.runtime}")


def require(target: Target) -> str:
    """The installed version of a target's runtime.

    Raises:
        MissingError: a package that the target needs is not installed; the message has the line that installs it.
    """
    for package in target.packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise missing_extra(package, target.name, f"Target '{target.name}'") from error
    return metadata.version(target.packages[0])


def open_runner(target: Target, path: Path, threads: int | None = None) -> Runner:
    """A runner for a file of the target, not yet entered.

    Args:
        threads: by default all that the process may use.

    Raises:
        MissingError: a package that the target needs is not installed.
    """
    require(target)
    return getattr(module_of(target), RUNNERS[target.runtime])(path, threads=threads)


def describe(target: Target, path: Path) -> dict[str, Any]:
    """What the target's runtime makes of a file, as JSON.

    Returns:
        `batch` ("any", or the number of images that it takes at a time), `inputs` and `outputs` (name, dtype, shape,
        scale, zero_point), `int8` and `float` (kind of operator → count and layers), `coverage` (eligible, int8,
        fraction, not_int8), and what else the runtime tells.

    Raises:
        MissingError: the runtime is not installed.
        UsageError: it lacks an operator of the file.
        IntegrityError: the file is damaged, or this version of the runtime does not load it.
    """
    require(target)
    return module_of(target).describe(path)
