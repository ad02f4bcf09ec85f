"""Which layers suffer from INT8: noise per layer, bias correction, and the order of the return to float.

Every eligible product gets a twin in one FP32 graph, fed with quantized inputs and weights; the difference
between the two, summed inside the graph, gives signal-to-noise ratio and mean error of all layers in a single
streamed pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from .calibration import Ranges
from .coverage import eligible_products
from .parity import Agreement
from .targets import Target

_BATCH = 16


@dataclass(frozen=True)
class LayerError:
    """What quantizing the input and the weight of one layer does to its output.

    Attributes:
        sqnr_db: signal to quantization noise, decibels; infinite where there is no noise.
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
        agreement: of the whole model with FP32 when only this layer runs in INT8; None where not measured.
    """

    node: str
    sqnr_db: float
    agreement: Agreement | None

    def as_record(self) -> dict[str, Any]:
        """For quantization.json."""
        return {
            "node": self.node,
            "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None,
            "alone": None if self.agreement is None else self.agreement.as_record(),
        }


def layer_errors(graph: ModelProto, ranges: Ranges, target: Target, images: np.ndarray) -> dict[str, LayerError]:
    """Noise and mean error of every eligible layer, each seen alone with FP32 inputs.

    Args:
        graph: FP32, prepared (`to_int8.prepared`).
        ranges: of activations.
        target: decides integer types and symmetry.
        images: as the graph takes them, (n, …); streamed.
    """
    nodes, _ = eligible_products(graph, target)
    twins = ModelProto()
    twins.CopyFrom(graph)
    weights = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    for index, node in enumerate(nodes):
        _add_twin(twins, node, f"twin{index}", weights, ranges, target)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(twins.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [f"twin{i}_{kind}" for i in range(len(nodes)) for kind in ("signal", "noise", "mean")]
    source = session.get_inputs()[0].name
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    for start in range(0, len(images), _BATCH):
        batch = np.ascontiguousarray(images[start : start + _BATCH])
        for name, value in zip(names, session.run(names, {source: batch}), strict=True):
            weight = len(batch) / len(images) if name.endswith("mean") else 1.0
            sums[name] = sums[name] + np.asarray(value, np.float64) * weight
    found = {}
    for index, node in enumerate(nodes):
        signal, noise = float(sums[f"twin{index}_signal"]), float(sums[f"twin{index}_noise"])
        ratio = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)
        found[node.name] = LayerError(ratio, np.asarray(sums[f"twin{index}_mean"]).ravel())
    return found


def _add_twin(
    model: ModelProto,
    node: NodeProto,
    name: str,
    weights: Mapping[str, np.ndarray],
    ranges: Ranges,
    target: Target,
) -> None:
    x, w, y = node.input[0], node.input[1], node.output[0]
    scale, zero = activation_scale(*ranges[x], target)
    constants = {
        f"{name}_scale": np.array(scale, np.float32),
        f"{name}_zero": np.array(zero, target.activations),
        f"{name}_weight": rounded_weight(node, weights[w], target),
    }
    channel = 1 if node.op_type in ("Conv", "ConvTranspose") else -1
    rank = weights[w].ndim if channel == 1 else 2
    constants[f"{name}_axes"] = np.array([a for a in range(rank) if a != channel % rank], np.int64)
    twin = NodeProto()
    twin.CopyFrom(node)
    twin.name, twin.input[0], twin.input[1] = name, f"{name}_x", f"{name}_weight"
    twin.output[0] = f"{name}_y"
    parameters = [f"{name}_scale", f"{name}_zero"]
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    model.graph.node.extend(
        [
            make_node("QuantizeLinear", [x, *parameters], [f"{name}_q"]),
            make_node("DequantizeLinear", [f"{name}_q", *parameters], [f"{name}_x"]),
            twin,
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
    """Scale and zero point of an activation range, by the target's rules."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return 1.0, 0
    if target.symmetric:
        return max(-low, high) / 127, 0
    smallest = 0 if target.activations == "uint8" else -128
    scale = (high - low) / 255
    return scale, int(np.clip(smallest - round(low / scale), smallest, smallest + 255))


def rounded_weight(node: NodeProto, weight: np.ndarray, target: Target) -> np.ndarray:
    """A weight after the target's symmetric rounding with one scale per output channel, back in float32."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1}.get(node.op_type, weight.ndim - 1)
    others = tuple(a for a in range(weight.ndim) if a != axis)
    largest = target.weight_max
    scale = np.abs(weight).max(axis=others, keepdims=True) / largest
    scale = np.where(scale > 0, scale, 1.0)
    return (np.clip(np.rint(weight / scale), -largest, largest) * scale).astype(np.float32)


def bias_corrected(graph: ModelProto, errors: Mapping[str, LayerError]) -> ModelProto:
    """A copy whose biases cancel the mean error of quantization, channel by channel.

    Rounding shifts a channel's mean; the shift is measured on the calibration images and added back to the
    bias (Nagel et al., ICCV 2019, §4.2).
    """
    copy = ModelProto()
    copy.CopyFrom(graph)
    tensors = {t.name: t for t in copy.graph.initializer}
    uses: dict[str, int] = {}
    for node in copy.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    for node in copy.graph.node:
        # A MatMul has no bias, and a shared one would correct two layers at once.
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
    """Layers in the order of their return to float: worst agreement alone, then divergence, then SQNR."""

    def key(row: LayerSensitivity) -> tuple[float, float, float]:
        if row.agreement is None:
            return (0.0, 0.0, row.sqnr_db)
        return (row.agreement.top1, -row.agreement.mean_kl, row.sqnr_db)

    return [row.node for row in sorted(rows, key=key)]


def fall_back(
    measure: Callable[[Collection[str]], Agreement], order: Sequence[str], floor: float
) -> tuple[list[str], Agreement, list[dict[str, Any]]]:
    """The fewest layers of `order`, from its start, that must be float for the agreement to reach a floor.

    Doubling until it holds, then bisection: about 2·log₂(layers) measurements in the real runtime. Agreement
        is taken to
    grow with the number of float layers; the answer is one that was measured, so a floor that is met is met.

    Args:
        measure: float layers → agreement of the resulting model with FP32.
        order: most sensitive first.
        floor: least top-1 agreement.

    Returns:
        the layers to leave in float, the agreement measured with them, and every measurement made.
    """
    trail: list[dict[str, Any]] = []

    def at(count: int) -> Agreement:
        found = measure(order[:count])
        trail.append({"float_layers": count, **found.as_record()})
        return found

    low, high, best = -1, 0, at(0)
    while best.top1 < floor and high < len(order):
        low, high = high, min(max(1, 2 * high), len(order))
        best = at(high)
    while best.top1 >= floor and high - low > 1:
        middle = (low + high) // 2
        candidate = at(middle)
        if candidate.top1 >= floor:
            high, best = middle, candidate
        else:
            low = middle
    return list(order[:high]), best, trail
