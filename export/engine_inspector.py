"""The types in which a TensorRT or TensorRT-RTX engine computes its layers, from its own inspector."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from nayer_edge.errors import IntegrityError

KINDS = {"int8": {"int8"}, "fp16": {"half", "fp16"}, "fp32": {"float", "fp32"}}
"""precision of an artifact → the inspector's names for it"""


def layers_of(trt: Any, engine: Any) -> dict[str, int]:
    """Type → number of layers of a loaded engine.

    Raises:
        IntegrityError: the inspector's answer is not readable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the names differ between 10.x and 11.x
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return layer_types(text)


def confirms(layers: Mapping[str, int], precision: str) -> bool:
    """Whether at least one layer computes in this precision: fp32, fp16 or int8."""
    return any(layers.get(kind, 0) for kind in KINDS[precision])


def layer_types(inspector_json: str) -> dict[str, int]:
    """Type of each layer's first input → number of layers, from an engine inspector's JSON.

    Raises:
        IntegrityError: it is not that JSON.
    """
    try:
        layers = json.loads(inspector_json)["Layers"]
        found: Counter[str] = Counter()
        for layer in layers:
            for tensor in layer.get("Inputs", [])[:1] if isinstance(layer, dict) else []:
                text = str(tensor.get("Format/Datatype") or tensor.get("Datatype") or "")
                kind = re.search(r"(?i)\b(int8|half|fp16|bf16|float|fp32|int32|uint8|bool)\b", text)
                found[kind.group(1).lower() if kind else "unknown"] += 1
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntegrityError("The output of the engine inspector is not readable.", why=f"{error}") from error
    return dict(sorted(found.items()))
