"""The Python package of a TensorRT flavour: `tensorrt` or `tensorrt_rtx`, which share an API."""

from __future__ import annotations

import importlib
import re
from typing import Any

from nayer_edge.errors import MissingError, missing_extra

_EXTRA = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}
_OLDEST = (10, 12)


def import_tensorrt(runtime: str) -> Any:
    """The Python module of a flavour.

    Raises:
        MissingError: it is not installed, or older than strong typing.
    """
    try:
        trt = importlib.import_module(runtime)
    except ImportError as error:
        raise missing_extra(runtime, _EXTRA[runtime], "Building and running engines") from error
    numbers = re.findall(r"\d+", str(getattr(trt, "__version__", "")))[:2]
    if runtime == "tensorrt" and tuple(map(int, numbers)) < _OLDEST:
        raise MissingError(
            f"TensorRT {trt.__version__} is too old.",
            why="Strongly typed networks with explicit Q/DQ need 10.12 or newer.",
            fix="Type: pip install --upgrade 'nayer-edge[gpu]'",
        )
    return trt
