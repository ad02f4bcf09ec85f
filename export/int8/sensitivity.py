"""Sensitivity of layers to INT8: noise per layer, bias correction, and the search for mixed precision.

For every eligible node, the FP32 graph gets a copy of it with quantized input and weight. The difference of the two
outputs, summed inside the graph, gives the signal-to-noise ratio and mean error of all layers in one streamed pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from ..eligible import eligible_nodes
from ..parity import Agreement
from ..plain_graph import constants, copy_of, output_channel_axis, use_counts
from ..targets import Target
from .calibration import Ranges, cpu_session

_BATCH = 16


@dataclass(frozen=True)
class LayerError:
    """Error of one layer's output when its input and weight are quantized.

    Attributes:
        sqnr_db: signal-to-quantization-noise ratio, decibels; infinite without noise.
        mean: mean of (float − quantized) per output channel, (channels,).
    """

    sqnr_db: float
    mean: np.ndarray


@dataclass(frozen=True)
class LayerSensitivity:
    """One row of the sensitivity table.

    Attributes:
        node: layer.
        sqnr_db: of its output when its input and weight are quantized.
        agreement: of the whole model with FP32 when only this layer runs in INT8; None if not measured, or if the
            quantizer fails.
    """

    node: str
    sqnr_db: float
    agreement: Agreement | None

    def as_record(self) -> dict[str, Any]:
        """As in quantization.json."""
        return {
            "node": self.node,
            "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None,
            "alone": None if self.agreement is None else self.agreement.as_record(),
        }


def layer_errors(graph: ModelProto, ranges: Ranges, target: Target, images: np.ndarray) -> dict[str, LayerError]:
    """Noise and mean error of every eligible layer, each quantized alone, with FP32 inputs.

    Args:
        graph: FP32, prepared (`to_int8.prepared`).
        ranges: of activations.
        target: decides integer types and symmetry.
        images: in the graph's input type, (n, C, H, W); streamed.

    Returns:
        node → its error.
    """
    nodes, _ = eligible_nodes(graph, target)
    compared = copy_of(graph)
    weights = {name: numpy_helper.to_array(tensor) for name, tensor in constants(graph).items()}
    for index, node in enumerate(nodes):
        _add_quantized_copy(compared, node, f"quantized{index}", weights, ranges, target)
    session = cpu_session(compared.SerializeToString())
    names = [f"quantized{i}_{kind}" for i in range(len(nodes)) for kind in ("signal", "noise", "mean")]
    source = session.get_inputs()[0].name
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    for start in range(0, len(images), _BATCH):
        batch = np.ascontiguousarray(images[start : start + _BATCH])
        for name, value in zip(names, session.run(names, {source: batch}), strict=True):
            weight = len(batch) / len(images) if name.endswith("mean") else 1.0
            sums[name] = sums[name] + np.asarray(value, np.float64) * weight
    found = {}
    for index, node in enumerate(nodes):
        signal, noise = float(sums[f"quantized{index}_signal"]), float(sums[f"quantized{index}_noise"])
        ratio = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)
        found[node.name] = LayerError(ratio, np.asarray(sums[f"quantized{index}_mean"]).ravel())
    return found


def _add_quantized_copy(
    model: ModelProto,
    node: NodeProto,
    name: str,
    weights: Mapping[str, np.ndarray],
    ranges: Ranges,
    target: Target,
) -> None:
    """Adds a node's copy with quantized input and weight, and sums of the two outputs' difference as graph outputs."""
    x, w, y = node.input[0], node.input[1], node.output[0]
    scale, zero = activation_scale(*ranges[x], target)
    added = {
        f"{name}_scale": np.array(scale, np.float32),
        f"{name}_zero": np.array(zero, target.activations),
        f"{name}_weight": rounded_weight(node, weights[w], target),
    }
    channel = 1 if node.op_type in ("Conv", "ConvTranspose") else -1
    rank = weights[w].ndim if channel == 1 else 2
    added[f"{name}_axes"] = np.array([a for a in range(rank) if a != channel % rank], np.int64)
    quantized = NodeProto()
    quantized.CopyFrom(node)
    quantized.name, quantized.input[0], quantized.input[1] = name, f"{name}_x", f"{name}_weight"
    quantized.output[0] = f"{name}_y"
    parameters = [f"{name}_scale", f"{name}_zero"]
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in added.items())
    model.graph.node.extend(
        [
            make_node("QuantizeLinear", [x, *parameters], [f"{name}_q"]),
            make_node("DequantizeLinear", [f"{name}_q", *parameters], [f"{name}_x"]),
            quantized,
            make_node("Sub", [y, f"{name}_y"], [f"{name}_difference"]),
            make_node("ReduceSumSquare", [y], [f"{name}_signal"], keepdims=0),
            make_node("ReduceSumSquare", [f"{name}_difference"], [f"{name}_noise"], keepdims=0),
            make_node("ReduceMean", [f"{name}_difference", f"{name}_axes"], [f"{name}_mean"], keepdims=0),
        ]
    )
    model.graph.output.extend(
        make_tensor_value_info(f"{name}_{kind}", TensorProto.FLOAT, None) for kind in ("signal", "noise", "mean")
    )


def activation_scale(low: float, high: float, target: Target) -> tuple[float, int]:
    """Scale and zero point of an activation with this range, by the target's rules."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return 1.0, 0
    if target.symmetric:
        return max(-low, high) / 127, 0
    smallest = 0 if target.activations == "uint8" else -128
    scale = (high - low) / 255
    return scale, int(np.clip(smallest - round(low / scale), smallest, smallest + 255))


def rounded_weight(node: NodeProto, weight: np.ndarray, target: Target) -> np.ndarray:
    """A weight quantized by the target's rules (symmetric, one scale per output channel) and back to float32."""
    axis = output_channel_axis(node) % weight.ndim
    others = tuple(a for a in range(weight.ndim) if a != axis)
    largest = target.weight_max
    scale = np.abs(weight).max(axis=others, keepdims=True) / largest
    scale = np.where(scale > 0, scale, 1.0)
    return (np.clip(np.rint(weight / scale), -largest, largest) * scale).astype(np.float32)


def bias_corrected(graph: ModelProto, errors: Mapping[str, LayerError]) -> ModelProto:
    """A copy of the graph whose biases cancel the mean error of quantization, channel by channel.

    Rounding shifts the mean of a channel. The shift, measured on the calibration images, is added back to the bias
    (Nagel et al., ICCV 2019, §4.2).
    """
    copy = copy_of(graph)
    tensors, uses = constants(copy), use_counts(copy)
    for node in copy.graph.node:
        # A MatMul has no bias. Correcting a shared bias would change two layers at once.
        if node.name not in errors or node.op_type == "MatMul":
            continue
        mean = errors[node.name].mean.astype(np.float32)
        if len(node.input) > 2 and node.input[2]:
            old = tensors.get(node.input[2])
            if old is None or uses[node.input[2]] > 1 or list(old.dims) != [len(mean)]:
                continue
            old.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(old) + mean, old.name))
        elif len(node.input) == 2:
            name = f"{node.name}.corrected_bias"
            copy.graph.initializer.append(numpy_helper.from_array(mean, name))
            node.input.append(name)
    onnx.checker.check_model(copy)
    return copy


def most_sensitive_first(rows: Sequence[LayerSensitivity]) -> list[str]:
    """Layers by sensitivity: lowest agreement alone first, then highest divergence, then lowest SQNR; those without a
    measurement before all others."""

    def key(row: LayerSensitivity) -> tuple[float, float, float]:
        if row.agreement is None:
            return (0.0, 0.0, row.sqnr_db)
        return (row.agreement.top1, -row.agreement.mean_kl, row.sqnr_db)

    return [row.node for row in sorted(rows, key=key)]


def search_mixed_precision(
    measure: Callable[[Collection[str]], Agreement | None], order: Sequence[str], max_drop: float
) -> tuple[list[str], Agreement, list[dict[str, Any]]]:
    """The shortest prefix of `order` that must be excluded from quantization to keep the drop within a limit.

    The number of excluded layers doubles until the limit holds, then bisection: about 2·log₂(layers) measurements in
    the real runtime. The drop is assumed to shrink with the number of excluded layers; the result itself was measured,
    so it holds the limit even if the assumption is wrong.

    Args:
        measure: excluded layers → agreement of the resulting model with FP32; None if the quantizer fails. With no
            layer excluded, it must not fail.
        order: most sensitive first.
        max_drop: largest acceptable drop (`Agreement.drop`), a fraction.

    Returns:
        the layers to exclude (if the limit is out of reach, as many as could be), the agreement measured with them, and
        every measurement, as in quantization.json.
    """
    trail: list[dict[str, Any]] = []
    measured: dict[int, Agreement] = {}

    def holds(count: int) -> bool:
        found = measure(order[:count])
        trail.append({"float_layers": count, **({"failed": True} if found is None else found.as_record())})
        if found is None:
            return False
        measured[count] = found
        return found.drop <= max_drop

    low, high = -1, 0
    reached = holds(0)
    while not reached and high < len(order):
        low, high = high, min(max(1, 2 * high), len(order))
        reached = holds(high)
    while reached and high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    chosen = high if reached else max(measured)
    return list(order[:chosen]), measured[chosen], trail
