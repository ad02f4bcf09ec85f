"""Inserts QuantizeLinear and DequantizeLinear (Q/DQ) into a graph, by the rules of a target.

ONNX Runtime's quantizer does the rewriting; what it gets wrong for a target is corrected here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.onnx_model import ONNXModel

from ..eligible import eligible_nodes
from ..plain_graph import constants, copy_of, distinct, output_channel_axis, producers, use_counts
from ..targets import QUANTIZABLE_OPS, Target, quantized_operators
from .calibration import Ranges

_NARROWEST = 256 * float(np.finfo(np.float32).tiny)
"""a narrower range has no scale in float32"""
_AFTER_LOGITS = {
    *("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast"),
    *("Add", "Sub", "Mul", "Div", "Softmax", "LogSoftmax"),
}
"""operators between the classes' values and the graph's output, with at most one input that is no constant"""
_TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}


def with_qdq(
    model: ModelProto, ranges: Ranges, target: Target, *, nodes_to_exclude: Collection[str] = ()
) -> ModelProto:
    """A copy of an FP32 graph with Q/DQ inserted for a target.

    Args:
        model: FP32, shapes inferred, every node named.
        ranges: of every tensor that may be quantized.
        target: its rules apply.
        nodes_to_exclude: eligible nodes that stay in float, and residual Adds whose skip input does.
    """
    copy = copy_of(model)
    operators = quantized_operators(target)
    eligible, ineligible = eligible_nodes(copy, target)
    quantized = {node.name for node in eligible} - set(nodes_to_exclude)
    skips = _skip_inputs(copy, quantized) if target.residual == "skip" else {}
    skips = {name: place for name, place in skips.items() if name not in nodes_to_exclude}
    _untie(copy, quantized)
    if target.bias == "int32":
        _keep_biases_of_zero_weights(copy, quantized)
    ranges = with_dead_tensors(copy, ranges)
    data: dict[str, TensorData | tuple] = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
    }
    with _quiet():
        quantizer = QDQQuantizer(
            copy,
            True,  # one weight scale per output channel
            target.weight_max < 127,  # ONNX Runtime's "reduced range" is 7 bits
            _TYPES[target.weights],
            _TYPES[target.activations],
            TensorsData(CalibrationMethod.MinMax, data),
            [],
            sorted(
                {name for name, _ in ineligible}
                | set(nodes_to_exclude)
                | _isolated(copy, quantized, operators)
                | _clips_without_zero(copy)
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
        _dequantize_outputs(result)
        # ONNX Runtime would quantize the weights of those that the target lacks a kernel for, too.
        _keep_float(result, {*nodes_to_exclude, *(name for name, _ in ineligible)})
    else:
        _bypass_qdq(result, quantized, skips)
        _quantize_skips(result, skips, ranges)
    wrapped = ONNXModel(result)
    wrapped.clean_initializers()
    wrapped.topological_sort()
    return wrapped.model


def with_dead_tensors(model: ModelProto, ranges: Ranges) -> Ranges:
    """The ranges, with a range for tensors that are 0 on every calibration image, such as a ReLU that never fires.

    For a range of zero width, ONNX Runtime's quantizer takes scale 1 and zero point 0. It has then already removed the
    ReLU, whose zero point must be the lowest integer for saturation to replace it: in signed integers, negative values
    would pass (microsoft/onnxruntime#9425, #11660). The range becomes that of the Clip that computes the tensor, if
    it has bounds, and [0, 1] otherwise.
    """
    by_output, known = producers(model), constants(model)
    found = dict(ranges)
    for name, (low, high) in ranges.items():
        if max(high, 0.0) - min(low, 0.0) >= _NARROWEST:
            continue
        found[name] = (0.0, 1.0)
        if name in by_output and by_output[name].op_type == "Clip":
            least, most = _clip_bounds(by_output[name], known)
            low = -1.0 if least is None else min(least, 0.0)
            high = 1.0 if most is None else max(most, 0.0)
            if low < high:
                found[name] = (low, high)
    return found


def _clip_bounds(node: NodeProto, known: Mapping[str, TensorProto]) -> tuple[float | None, float | None]:
    """Lower and upper bound of a Clip; None for a bound that it lacks or that is infinite or no constant."""
    values = [numpy_helper.to_array(known[name]).item() if name in known else None for name in node.input[1:3]]
    low, high = [*values, None, None][:2]
    largest = float(np.finfo(np.float32).max)
    finite = [value if value is not None and abs(value) < largest else None for value in (low, high)]
    return finite[0], finite[1]


def _untie(model: ModelProto, quantized: Collection[str]) -> None:
    """Gives every node that stays in float its own copy of a constant that a quantized node reads, too: ONNX Runtime's
    quantizer replaces a weight for all its readers."""
    known = constants(model)
    shared = {name for node in model.graph.node if node.name in quantized for name in node.input if name in known}
    readers = [(node, i) for node in model.graph.node if node.name not in quantized for i in range(len(node.input))]
    readers = [(node, i) for node, i in readers if node.input[i] in shared]
    names = distinct((f"{node.input[i]}_of_{node.name}" for node, i in readers), known)
    for (node, i), name in zip(readers, names, strict=True):
        own = model.graph.initializer.add()
        own.CopyFrom(known[node.input[i]])
        own.name = node.input[i] = name


def _isolated(model: ModelProto, quantized: Collection[str], operators: Collection[str]) -> set[str]:
    """Pass-through nodes that no chain of such nodes connects to a quantized operator. In INT8 they would only lose
    accuracy."""
    pass_through = [n for n in model.graph.node if n.op_type in operators and n.op_type not in QUANTIZABLE_OPS]
    # Constants connect nothing, though several nodes may read one.
    known = constants(model)
    connected: set[str] = set()
    for node in model.graph.node:
        if node.name in quantized:
            connected.update((node.input[0], node.output[0]))
    before = -1
    while before != len(connected):
        before = len(connected)
        for node in pass_through:
            tensors = [name for name in (*node.input, *node.output) if name and name not in known]
            if any(name in connected for name in tensors):
                connected.update(tensors)
    return {node.name for node in pass_through if node.output[0] not in connected}


def _clips_without_zero(model: ModelProto) -> set[str]:
    """Clips whose range does not contain zero. A quantized range always does, so saturation cannot replace them."""
    known = constants(model)
    found = set()
    for node in model.graph.node:
        if node.op_type == "Clip":
            low, high = _clip_bounds(node, known)
            if (low is not None and low > 0) or (high is not None and high < 0):
                found.add(node.name)
    return found


def _keep_biases_of_zero_weights(model: ModelProto, quantized: Collection[str]) -> None:
    """Keeps the biases of channels whose weights are all zero, for example after pruning.

    The INT32 scale of a bias is input scale × weight scale. ONNX Runtime uses 1 as the scale of an all-zero channel,
    and the bias is rounded away. With one tiny weight, which rounds to zero anyway, it chooses the finest scale that
    holds the bias.
    """
    known = constants(model)
    for node in model.graph.node:
        if node.name not in quantized or len(node.input) < 3 or node.input[1] not in known:
            continue
        tensor = known[node.input[1]]
        values = numpy_helper.to_array(tensor).copy()
        channels = np.moveaxis(values, output_channel_axis(node), 0)  # a view
        zero = ~channels.any(axis=tuple(range(1, values.ndim)))
        if zero.any():
            channels[(zero, *[0] * (values.ndim - 1))] = np.float32(1e-30)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def calibrated_tensors(model: ModelProto, target: Target) -> set[str]:
    """Tensors whose range matters to `with_qdq`: all that may be quantized except inputs of a ReLU and the logits."""
    operators = quantized_operators(target)
    eligible = {node.name for node in eligible_nodes(model, target)[0]}
    found: set[str] = set()
    for node in model.graph.node:
        if node.name in eligible or (target.outputs and node.op_type in operators):
            found.update(node.input)
            found.update(node.output if target.outputs else ())
        elif node.op_type == "Add":
            found.update(node.input)
    uses: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node.op_type)
    clipped = {name for name, kinds in uses.items() if kinds in (["Relu"], ["Clip"])} if target.outputs else set()
    without_zero = _clips_without_zero(model)
    clipped -= {node.input[0] for node in model.graph.node if node.name in without_zero}
    return found - clipped - {v.name for v in model.graph.output} - set(constants(model))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the quantizer logs, to the root logger, about tensors that are excluded on purpose."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _skip_inputs(model: ModelProto, quantized: Collection[str]) -> dict[str, int]:
    """Residual Adds, one input of which is the output of a quantized convolution, and the index of their skip input.

    Of two convolutions the deeper one is the main branch, which TensorRT fuses with the Add.
    """
    by_output, uses, known = producers(model), use_counts(model), constants(model)
    depth: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.output:
            depth[name] = 1 + max((depth.get(i, 0) for i in node.input), default=0)
    found = {}
    for node in model.graph.node:
        if node.op_type != "Add" or any(name in known for name in node.input):
            continue
        fusable = [
            i
            for i, name in enumerate(node.input)
            if name in by_output and by_output[name].name in quantized and uses[name] == 1
        ]
        if fusable:
            main = max(fusable, key=lambda i, node=node: (depth[node.input[i]], -i))
            found[node.name] = 1 - main
    return found


def _dequantize_outputs(model: ModelProto) -> None:
    """Removes the Q/DQ pairs between the last operator that computes in INT8 and the graph's outputs: with 256 levels,
    logits of different classes would be equal."""
    for output in model.graph.output:
        name = output.name
        while (node := producers(model).get(name)) is not None:
            if node.op_type == "DequantizeLinear":
                if not _remove_pair(model, node):
                    break
            elif node.op_type in _AFTER_LOGITS and (before := _only_input(model, node)) is not None:
                name = before
            else:
                break


def _only_input(model: ModelProto, node: NodeProto) -> str | None:
    """The input of a node that is computed, if there is only one and no other node reads it."""
    by_output = producers(model)
    computed = [name for name in node.input if name in by_output and by_output[name].op_type != "Constant"]
    return computed[0] if len(computed) == 1 and use_counts(model)[computed[0]] == 1 else None


def _remove_pair(model: ModelProto, dq: NodeProto) -> bool:
    """Connects what a Q/DQ pair separates; False if other nodes read it, or a convolution needs it for its kernel."""
    by_output, uses = producers(model), use_counts(model)
    q = by_output.get(dq.input[0])
    source = by_output.get(q.input[0]) if q is not None and q.op_type == "QuantizeLinear" else None
    if q is None or source is None or uses[q.input[0]] > 1 or uses[dq.input[0]] > 1:
        return False
    is_output = dq.output[0] in {output.name for output in model.graph.output}
    if not is_output and source.op_type in ("Conv", "ConvTranspose"):
        return False
    raw, wanted = q.input[0], dq.output[0]
    source.output[:] = [wanted if name == raw else name for name in source.output]
    model.graph.node.remove(q)
    model.graph.node.remove(dq)
    return True


def _keep_float(model: ModelProto, names: Collection[str]) -> None:
    """Puts a Clip without bounds, which changes nothing, between an excluded node and the DequantizeLinear before it.

    ONNX Runtime (WeightBiasQuantization; seen in 1.31) quantizes the weights of any convolution or matrix product
    directly between DQ and Q, so an excluded layer would run in INT8 all the same. Its optimiser removes an Identity,
    but not this.
    """
    by_output = producers(model)
    for node in list(model.graph.node):
        source = by_output.get(node.input[0]) if node.name in names else None
        if source is not None and source.op_type == "DequantizeLinear":
            read = f"{node.name}_input"
            model.graph.node.append(onnx.helper.make_node("Clip", [node.input[0]], [read], f"{node.name}_stays_float"))
            node.input[0] = read


def _pairs(model: ModelProto) -> dict[str, str]:
    """Output of each activation's DequantizeLinear → the tensor that was quantized."""
    by_output = producers(model)
    return {
        node.output[0]: by_output[node.input[0]].input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in by_output
    }


def _bypass_qdq(model: ModelProto, quantized: Collection[str], skips: Mapping[str, int]) -> None:
    """Connects everything but quantized operators and skip inputs to the float tensors, past Q/DQ."""
    pairs = _pairs(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.name in quantized:
            continue
        for i, name in enumerate(node.input):
            if name in pairs and skips.get(node.name) != i:
                node.input[i] = pairs[name]


def _quantize_skips(model: ModelProto, skips: Mapping[str, int], ranges: Ranges) -> None:
    """Q/DQ on the skip input of every residual Add that has none yet."""
    pairs = _pairs(model)
    made: set[str] = set()
    for node in [node for node in model.graph.node if node.name in skips]:
        tensor = node.input[skips[node.name]]
        if tensor in pairs or tensor not in ranges:
            continue
        base = f"{tensor}_skip"
        node.input[skips[node.name]] = base
        if tensor in made:
            continue
        made.add(tensor)
        largest = max(abs(end) for end in ranges[tensor])
        scale = np.float32(largest / 127 if largest > 0 else 1.0)
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
