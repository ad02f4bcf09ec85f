"""The convolutions and matrix products of a graph that a target can run in INT8, and those that were excluded."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto, NodeProto, TensorProto

from .onnx_file import metadata_of
from .plain_graph import attribute, constants, output_channel_axis, producers
from .targets import FLOAT_ONLY_OPS, QUANTIZABLE_OPS, QuantizableOp, Target, why_ineligible

EXCLUDED_NODES = "nayer_edge.float_nodes"
"""metadata key of an INT8 file: the nodes that were excluded from quantization, one a line"""


def excluded_nodes(model: ModelProto) -> dict[str, str]:
    """Nodes of an INT8 file that were excluded from quantization → why they are not in INT8."""
    names = metadata_of(model).get(EXCLUDED_NODES, "").split("\n")
    return dict.fromkeys(names, "excluded from quantization (mixed precision)")


def eligible_nodes(model: ModelProto, target: Target) -> tuple[list[NodeProto], list[tuple[str, str]]]:
    """Splits a graph's multiply-accumulate operators: nodes that the target can run in INT8, and (name, reason) of the
    others."""
    known, by_output = constants(model), producers(model)
    eligible, ineligible = [], []
    for node in model.graph.node:
        if node.op_type in FLOAT_ONLY_OPS:
            op = QuantizableOp(node.op_type, constant_weight=False)
        elif node.op_type in QUANTIZABLE_OPS:
            op = _quantizable_op(node, known, by_output)
        else:
            continue
        rule = why_ineligible(op, target)
        if rule is None:
            eligible.append(node)
        else:
            ineligible.append((node.name, f"{rule.name}: {rule.reason}"))
    return eligible, ineligible


def _quantizable_op(
    node: NodeProto, known: Mapping[str, TensorProto], by_output: Mapping[str, NodeProto]
) -> QuantizableOp:
    weight = node.input[1]
    while weight in by_output and by_output[weight].op_type in ("DequantizeLinear", "QuantizeLinear", "Cast"):
        weight = by_output[weight].input[0]
    groups = attribute(node, "group", 1)
    if weight not in known:
        return QuantizableOp(node.op_type, constant_weight=False, groups=groups)
    dims = list(known[weight].dims)
    if node.op_type == "MatMul" and len(dims) != 2:
        return QuantizableOp(node.op_type, constant_weight=True, matrix=False)
    axis = output_channel_axis(node) % 2
    channels_in, channels_out = dims[1 - axis], dims[axis]
    # ONNX shapes: Conv (out, in / groups, …), ConvTranspose (in, out / groups, …).
    if node.op_type == "Conv":
        channels_out //= groups
    elif node.op_type == "ConvTranspose":
        channels_in //= groups
    return QuantizableOp(node.op_type, True, groups, channels_in, channels_out)
