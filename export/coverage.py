"""How many convolutions and matrix products really run in INT8, read from the graph that is executed."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from .onnx_file import metadata_of, read_onnx
from .runners import OrtRunner
from .targets import FLOAT_PRODUCTS, PRODUCTS, Product, Target, exclusion, get_target

# What ONNX Runtime's fusions make of a product between Q/DQ pairs.
INT8_KERNELS = {
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "MatMulInteger",
}
FLOAT_NODES = "nayer_edge.float_nodes"


@dataclass(frozen=True)
class Coverage:
    """INT8 coverage of one file.

    Attributes:
        eligible: convolutions and matrix products that the table in targets.py calls eligible.
        int8: those of them that run in INT8.
        fraction: int8 / eligible; 0 where nothing is eligible.
        not_int8: (node, reason) of those that do not.
        excluded: (node, reason) of those that are not eligible.
        verified: read from the graph that the target's own runtime executes; false where only the Q/DQ
            annotation of the file could be read (engines without a GPU) or the runtime ran on another
            processor (ARM seen from x86).
    """

    eligible: int
    int8: int
    fraction: float
    not_int8: list[tuple[str, str]]
    excluded: list[tuple[str, str]]
    verified: bool


def int8_coverage(path: Path, target: str | Target = "cpu") -> Coverage:
    """Counts what runs in INT8.

    Args:
        path: an ONNX file, quantized or not.
        target: whose runtime and whose table of eligible operators.

    Raises:
        IntegrityError: the file is damaged.
    """
    target = get_target(target) if isinstance(target, str) else target
    model = read_onnx(path)
    eligible, excluded = eligible_products(model, target)
    if target.runtime == "onnxruntime":
        runner = OrtRunner(path, target=target, threads=1)
        # A change of layout renames the nodes that it moves: "conv1" becomes "conv1_token_7".
        running = {
            re.sub(r"_token_\d+$", "", n.name) for n in runner.optimised_graph().graph.node if n.op_type in INT8_KERNELS
        }
        on_arm = platform.machine().lower() in ("aarch64", "arm64")
        verified = on_arm == (target.name == "arm")
        missing = "ONNX Runtime did not fuse it: an input or output is not quantized"
    else:
        annotated = _producers(model)
        running = {n.name for n in eligible if _between_qdq(n, annotated)}
        verified = False
        missing = "an input is not quantized"
    left_in_float = set(metadata_of(model).get(FLOAT_NODES, "").split("\n"))
    not_int8 = [
        (n.name, "left in float by the accuracy fall-back" if n.name in left_in_float else missing)
        for n in eligible
        if n.name not in running
    ]
    int8 = len(eligible) - len(not_int8)
    fraction = int8 / len(eligible) if eligible else 0.0
    return Coverage(len(eligible), int8, fraction, not_int8, excluded, verified)


def eligible_products(model: ModelProto, target: Target) -> tuple[list[NodeProto], list[tuple[str, str]]]:
    """The products of a graph that the target's table allows in INT8, and (name, reason) of the others."""
    constants = {t.name: t for t in model.graph.initializer}
    producers = _producers(model)
    eligible, excluded = [], []
    for node in model.graph.node:
        if node.op_type in FLOAT_PRODUCTS:
            product = Product(node.op_type, constant_weight=False)
        elif node.op_type in PRODUCTS:
            product = _product(node, constants, producers)
        else:
            continue
        reason = exclusion(product, target)
        if reason is None:
            eligible.append(node)
        else:
            excluded.append((node.name, f"{reason.name}: {reason.reason}"))
    return eligible, excluded


def _producers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _product(node: NodeProto, constants: dict, producers: dict[str, NodeProto]) -> Product:
    weight = node.input[1]
    while weight in producers and producers[weight].op_type in ("DequantizeLinear", "QuantizeLinear", "Cast"):
        weight = producers[weight].input[0]
    attributes = {a.name: a for a in node.attribute}
    groups = attributes["group"].i if "group" in attributes else 1
    if weight not in constants:
        return Product(node.op_type, constant_weight=False, groups=groups)
    dims = list(constants[weight].dims)
    if node.op_type == "MatMul" and len(dims) != 2:
        return Product(node.op_type, constant_weight=True, matrix=False)
    if node.op_type == "Conv":
        channels_in, channels_out = dims[1], dims[0] // groups
    elif node.op_type == "ConvTranspose":
        channels_in, channels_out = dims[0] // groups, dims[1]
    else:
        transposed = node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].i
        channels_out, channels_in = dims[-2:] if transposed else reversed(dims[-2:])
    return Product(node.op_type, True, groups, channels_in, channels_out)


def _between_qdq(node: NodeProto, producers: dict[str, NodeProto]) -> bool:
    return all(name in producers and producers[name].op_type == "DequantizeLinear" for name in node.input[:2])


def zero_points(model: ModelProto) -> Iterable[tuple[NodeProto, np.ndarray]]:
    """Every Q and DQ node of a graph with its zero point."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            yield node, numpy_helper.to_array(constants[node.input[2]])
