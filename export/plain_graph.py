"""Queries on an ONNX graph, and the plain form that the quantizer and QAT need (`make_plain`).

ONNX Runtime's quantizer drops Gemm's `beta` (seen in 1.31), and renames a bias that two operators share once for each
of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from .targets import QUANTIZABLE_OPS


def producers(model: ModelProto) -> dict[str, NodeProto]:
    """Tensor → the node that computes it."""
    return {name: node for node in model.graph.node for name in node.output}


def constants(model: ModelProto) -> dict[str, TensorProto]:
    """Name → initializer."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def use_counts(model: ModelProto) -> Counter[str]:
    """Tensor → number of node inputs that read it."""
    return Counter(name for node in model.graph.node for name in node.input)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute; the default if the node does not have it."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def output_channel_axis(node: NodeProto) -> int:
    """Axis of the output channels in the weight of a quantizable operator."""
    gemm = 0 if attribute(node, "transB") else 1
    return {"Conv": 0, "ConvTranspose": 1, "Gemm": gemm, "MatMul": -1}[node.op_type]


def copy_of(model: ModelProto) -> ModelProto:
    """A copy that can be changed without changing the model."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def distinct(names: Iterable[str], taken: Iterable[str] = ()) -> Iterator[str]:
    """The names in turn; a repeated one gets the first number that makes it unique.

    Args:
        taken: names that must not be used.
    """
    names, seen = list(names), set(taken)
    used = seen | set(names)
    for name in names:
        number, own = 2, name
        while own in seen or (own != name and own in used):
            own = f"{name}_{number}"
            number += 1
        seen.add(own)
        used.add(own)
        yield own


def make_plain(model: ModelProto) -> None:
    """Names all nodes, folds Gemm's alpha and beta, and gives every quantizable operator its own bias, with one value
    per output channel; in place.

    The graph computes the same as before.
    """
    nodes = [node for node in model.graph.node if not node.name]
    taken = [node.name for node in model.graph.node if node.name]
    # ONNX functions such as HardSwish are expanded into nodes without a name.
    for node, name in zip(nodes, distinct((f"{n.output[0]}.{n.op_type}" for n in nodes), taken), strict=True):
        node.name = name
    for node in list(model.graph.node):
        if node.op_type == "Gemm":
            _fold_factors(model, node)
    _own_biases(model)


def _fold_factors(model: ModelProto, node: NodeProto) -> None:
    """Multiplies Gemm's alpha into its weight and beta into its bias."""
    for name, place in (("alpha", 1), ("beta", 2)):
        stored = next((a for a in node.attribute if a.name == name), None)
        if stored is None:
            continue
        factor = np.float32(stored.f)
        node.attribute.remove(stored)
        if factor == 1 or len(node.input) <= place or not node.input[place]:
            continue
        of, made = node.input[place], f"{node.name}_{name}"
        constant = constants(model).get(of)
        if constant is not None:
            values = numpy_helper.to_array(constant)
            model.graph.initializer.append(numpy_helper.from_array((values * factor).astype(values.dtype), made))
        else:
            model.graph.initializer.append(numpy_helper.from_array(np.array(factor), f"{made}_factor"))
            scaled = onnx.helper.make_node("Mul", [of, f"{made}_factor"], [made], f"{made}_Mul")
            model.graph.node.insert(list(model.graph.node).index(node), scaled)
        node.input[place] = made


def _own_biases(model: ModelProto) -> None:
    known, uses = constants(model), use_counts(model)
    for node in model.graph.node:
        bias = node.input[2] if node.op_type in QUANTIZABLE_OPS and len(node.input) > 2 else ""
        if bias in known and uses[bias] > 1:
            node.input[2] = f"{node.name}_bias"
            copy = numpy_helper.from_array(numpy_helper.to_array(known[bias]), node.input[2])
            model.graph.initializer.append(copy)
            uses[bias] -= 1
    known = constants(model)
    for node in model.graph.node:
        if node.op_type == "Gemm" and len(node.input) > 2 and {node.input[1], node.input[2]} <= known.keys():
            _widen(model, node, known)


def _widen(model: ModelProto, node: NodeProto, known: Mapping[str, TensorProto]) -> None:
    """Gives a Gemm whose C is one value, or one row, the same values as a vector."""
    bias, channels = numpy_helper.to_array(known[node.input[2]]), known[node.input[1]].dims[output_channel_axis(node)]
    if bias.shape == (channels,) or (bias.size != 1 and bias.shape != (1, channels)):
        return
    node.input[2] = f"{node.name}_row"
    row = np.broadcast_to(bias.reshape(-1), (channels,)).copy()
    model.graph.initializer.append(numpy_helper.from_array(row, node.input[2]))
