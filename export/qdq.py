"""Writes Q/DQ into a graph as a target wants it.

ONNX Runtime's quantizer does the rewriting; what it gets wrong for a target is set right here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.onnx_model import ONNXModel

from .calibration import Ranges
from .coverage import eligible_products
from .targets import PRODUCTS, Target, quantized_operators

_TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}


def with_qdq(model: ModelProto, ranges: Ranges, target: Target, *, float_nodes: Collection[str] = ()) -> ModelProto:
    """A copy of an FP32 graph with Q/DQ as the target wants it.

    Args:
        model: FP32, shapes inferred, every node named.
        ranges: of every tensor that may be quantized.
        target: whose rules.
        float_nodes: products to leave in float although they are eligible.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    operators = quantized_operators(target)
    eligible, excluded = eligible_products(copy, target)
    quantized = {node.name for node in eligible} - set(float_nodes)
    residuals = _residual_adds(copy, quantized) if target.residual == "skip" else []
    if target.bias == "int32":
        _keep_biases_of_zero_weights(copy, quantized)
    data: dict[str, TensorData | tuple] = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
    }
    with _no_advice():
        quantizer = QDQQuantizer(
            copy,
            True,  # one weight scale per output channel
            target.weight_max < 127,  # ONNX Runtime's "reduced range" is 7 bits
            _TYPES[target.weights],
            _TYPES[target.activations],
            TensorsData(CalibrationMethod.MinMax, data),
            [],
            sorted(
                {name for name, _ in excluded}
                | set(float_nodes)
                | _stranded(copy, quantized, operators)
                | _clips_away_from_zero(copy)
            ),
            list(operators),
            {
                "ActivationSymmetric": target.symmetric,
                "QuantizeBias": target.bias == "int32",
                "OpTypesToExcludeOutputQuantization": [] if target.outputs else list(operators),
            },
        )
        quantizer.quantize_model()
    result = quantizer.model.model
    if target.outputs:
        _keep_logits_float(result)
        _keep_float(result, float_nodes)
    else:
        _read_raw_elsewhere(result, quantized, residuals)
        _quantize_skips(result, residuals, ranges)
    wrapped = ONNXModel(result)
    wrapped.clean_initializers()
    wrapped.topological_sort()
    return wrapped.model


def _stranded(model: ModelProto, quantized: Collection[str], operators: Collection[str]) -> set[str]:
    """Carriers that no chain of carriers joins to a quantized product: in INT8 they would only lose
    accuracy."""
    carriers = [n for n in model.graph.node if n.op_type in operators and n.op_type not in PRODUCTS]
    joined: set[str] = set()
    for node in model.graph.node:
        if node.name in quantized:
            joined.update((node.input[0], node.output[0]))
    reached = -1
    while reached != len(joined):
        reached = len(joined)
        for node in carriers:
            tensors = (*node.input, *node.output)
            if any(name in joined for name in tensors):
                joined.update(tensors)
    return {node.name for node in carriers if node.output[0] not in joined}


def _clips_away_from_zero(model: ModelProto) -> set[str]:
    """Clips that no saturation can stand for: a quantized range always holds zero, and theirs does not."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = set()
    for node in model.graph.node:
        if node.op_type == "Clip":
            low, high = ([*(constants.get(name) for name in node.input[1:3]), None, None])[:2]
            if (low is not None and low > 0) or (high is not None and high < 0):
                found.add(node.name)
    return found


def _keep_biases_of_zero_weights(model: ModelProto, quantized: Collection[str]) -> None:
    """A channel whose weights are all zero, as pruning leaves it, still has its bias, whose INT32 grid is made of the
    scales of input and weights. ONNX Runtime takes 1 for the scale of zeros, and the bias is rounded away. A weight
    that rounds to zero in any grid lets it take the finest scale in which the bias fits."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.name not in quantized or len(node.input) < 3 or node.input[1] not in constants:
            continue
        tensor = constants[node.input[1]]
        values = numpy_helper.to_array(tensor).copy()
        transposed = node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
        channels = (values.T if transposed else values).reshape(values.shape[1 if transposed else 0], -1)
        zero = ~channels.any(axis=1)
        if zero.any():
            first = (slice(None), 0) if not transposed else (0, slice(None))
            rows = values.reshape(len(values), -1)
            rows[first] = np.where(zero, np.float32(1e-30), rows[first])
            tensor.CopyFrom(numpy_helper.from_array(rows.reshape(values.shape), tensor.name))


def calibrated_tensors(model: ModelProto, target: Target) -> set[str]:
    """Tensors whose range decides how `with_qdq` quantizes: not those that a ReLU clips next, nor the
    logits."""
    operators = quantized_operators(target)
    products = {node.name for node in eligible_products(model, target)[0]}
    found: set[str] = set()
    for node in model.graph.node:
        if node.name in products or (target.outputs and node.op_type in operators):
            found.update(node.input)
            found.update(node.output if target.outputs else ())
        elif node.op_type == "Add":
            found.update(node.input)
    uses: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node.op_type)
    clipped = {name for name, kinds in uses.items() if kinds in (["Relu"], ["Clip"])} if target.outputs else set()
    apart = _clips_away_from_zero(model)
    clipped -= {name for node in model.graph.node if node.name in apart for name in node.input[:1]}
    return found - clipped - {v.name for v in model.graph.output} - {t.name for t in model.graph.initializer}


@contextmanager
def _no_advice() -> Iterator[None]:
    """The quantizer logs to the root logger about tensors that we leave alone on purpose."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class ResidualAdd:
    """An Add whose one input comes straight from a quantized convolution, and which of its inputs is the
    skip."""

    name: str
    skip: int


def _residual_adds(model: ModelProto, quantized: Collection[str]) -> list[ResidualAdd]:
    """Finds residual adds. Of two convolutions the deeper one is the main branch, which TensorRT fuses
    with the Add."""
    producers = {name: node for node in model.graph.node for name in node.output}
    consumers: dict[str, int] = {}
    depth: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers[name] = consumers.get(name, 0) + 1
        for name in node.output:
            depth[name] = 1 + max((depth.get(i, 0) for i in node.input), default=0)
    constants = {t.name for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "Add" or any(name in constants for name in node.input):
            continue
        fusable = [
            i
            for i, name in enumerate(node.input)
            if name in producers and producers[name].name in quantized and consumers[name] == 1
        ]
        if fusable:
            main = max(fusable, key=lambda i, node=node: (depth[node.input[i]], -i))
            found.append(ResidualAdd(node.name, 1 - main))
    return found


def _keep_logits_float(model: ModelProto) -> None:
    """Takes the Q/DQ pair off the graph's outputs: logits in 256 levels would tie classes for nothing."""
    producers = {name: node for node in model.graph.node for name in node.output}
    uses: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    for output in model.graph.output:
        dq = producers[output.name]
        if dq.op_type != "DequantizeLinear":
            continue
        q = producers[dq.input[0]]
        source = producers.get(q.input[0])
        if source is None or uses[q.input[0]] > 1 or uses[dq.input[0]] > 1:
            continue
        raw = q.input[0]
        source.output[:] = [output.name if name == raw else name for name in source.output]
        model.graph.node.remove(q)
        model.graph.node.remove(dq)


def _keep_float(model: ModelProto, names: Collection[str]) -> None:
    """Puts a Clip without bounds, which changes nothing, between a float product and the DequantizeLinear before it.

    ONNX Runtime (WeightBiasQuantization; seen in 1.31) quantizes the weights of any product that stands directly
    between DQ and Q, so that a layer that fell back to float would run in INT8 all the same. Its optimiser takes an
    Identity out, but not this.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in list(model.graph.node):
        source = producers.get(node.input[0]) if node.name in names else None
        if source is not None and source.op_type == "DequantizeLinear":
            read = f"{node.name}_input"
            model.graph.node.append(onnx.helper.make_node("Clip", [node.input[0]], [read], f"{node.name}_stays_float"))
            node.input[0] = read


def _pairs(model: ModelProto) -> dict[str, str]:
    """Output of each activation's DequantizeLinear → the tensor that was quantized."""
    producers = {name: node for node in model.graph.node for name in node.output}
    pairs = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in producers:
            pairs[node.output[0]] = producers[node.input[0]].input[0]
    return pairs


def _read_raw_elsewhere(model: ModelProto, quantized: Collection[str], residuals: list[ResidualAdd]) -> None:
    """Only products and skip inputs read quantized values; everything else reads the tensor itself."""
    pairs = _pairs(model)
    skips = {r.name: r.skip for r in residuals}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.name in quantized:
            continue
        for i, name in enumerate(node.input):
            if name in pairs and skips.get(node.name) != i:
                node.input[i] = pairs[name]


def _quantize_skips(model: ModelProto, residuals: list[ResidualAdd], ranges: Ranges) -> None:
    """Q/DQ on the skip input of every residual Add that has none yet."""
    pairs = _pairs(model)
    nodes: Mapping[str, NodeProto] = {node.name: node for node in model.graph.node}
    made: set[str] = set()
    for residual in residuals:
        node = nodes[residual.name]
        tensor = node.input[residual.skip]
        if tensor in pairs or tensor not in ranges:
            continue
        if tensor in made:
            node.input[residual.skip] = f"{tensor}_skip"
            continue
        made.add(tensor)
        largest = max(abs(end) for end in ranges[tensor])
        scale = np.float32(largest / 127 if largest > 0 else 1.0)
        base = f"{tensor}_skip"
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(np.array(scale), f"{base}_scale"),
                numpy_helper.from_array(np.array(0, np.int8), f"{base}_zero_point"),
            ]
        )
        parameters = [f"{base}_scale", f"{base}_zero_point"]
        model.graph.node.extend(
            [
                onnx.helper.make_node(
                    "QuantizeLinear", [tensor, *parameters], [f"{base}_quantized"], f"{base}_QuantizeLinear"
                ),
                onnx.helper.make_node(
                    "DequantizeLinear", [f"{base}_quantized", *parameters], [base], f"{base}_DequantizeLinear"
                ),
            ]
        )
        node.input[residual.skip] = base
