"""A graph as the quantizer and the fine-tuning can read it; what it computes stays the same.

ONNX Runtime's quantizer drops Gemm's `beta` (seen in 1.31), and gives a bias that two products share another name in
each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from .targets import PRODUCTS


def distinct(names: Iterable[str], taken: Iterable[str] = ()) -> Iterator[str]:
    """The names in turn; where one comes again it gets the first number that makes it nobody else's."""
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
    """Names the nodes without a name, and gives every product factors and a bias of its own."""
    nodes = [node for node in model.graph.node if not node.name]
    taken = [node.name for node in model.graph.node if node.name]
    # Functions such as HardSwish are expanded into nodes without a name.
    for node, name in zip(nodes, distinct((f"{n.output[0]}.{n.op_type}" for n in nodes), taken), strict=True):
        node.name = name
    for node in list(model.graph.node):
        if node.op_type == "Gemm":
            _fold_factors(model, node)
    _own_biases(model)


def _fold_factors(model: ModelProto, node: NodeProto) -> None:
    """Gemm's alpha into its weight, and beta into its bias."""
    for name, place in (("alpha", 1), ("beta", 2)):
        attribute = next((a for a in node.attribute if a.name == name), None)
        if attribute is None:
            continue
        factor = np.float32(attribute.f)
        node.attribute.remove(attribute)
        if factor == 1 or len(node.input) <= place or not node.input[place]:
            continue
        of, made = node.input[place], f"{node.name}_{name}"
        constant = next((t for t in model.graph.initializer if t.name == of), None)
        if constant is not None:
            values = numpy_helper.to_array(constant)
            model.graph.initializer.append(numpy_helper.from_array((values * factor).astype(values.dtype), made))
        else:
            model.graph.initializer.append(numpy_helper.from_array(np.array(factor), f"{made}_factor"))
            scaled = onnx.helper.make_node("Mul", [of, f"{made}_factor"], [made], f"{made}_Mul")
            model.graph.node.insert(list(model.graph.node).index(node), scaled)
        node.input[place] = made


def _own_biases(model: ModelProto) -> None:
    constants = {t.name: t for t in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        bias = node.input[2] if node.op_type in PRODUCTS and len(node.input) > 2 else ""
        if bias in constants and uses[bias] > 1:
            node.input[2] = f"{node.name}_bias"
            copy = numpy_helper.from_array(numpy_helper.to_array(constants[bias]), node.input[2])
            model.graph.initializer.append(copy)
            uses[bias] -= 1
