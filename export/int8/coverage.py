"""INT8 coverage: how many convolutions and matrix products run in INT8 in the graph that the runtime executes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import NodeProto

from ..eligible import eligible_nodes, excluded_nodes
from ..onnx_file import read_onnx
from ..plain_graph import producers
from ..runners import OrtRunner
from ..runtimes import describe
from ..targets import Target, get_target, has_module, is_native

# What ONNX Runtime fuses a quantizable operator and the Q/DQ pairs around it into.
INT8_KERNELS = {
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "MatMulInteger",
}


@dataclass(frozen=True)
class Coverage:
    """INT8 coverage of one file.

    Attributes:
        eligible: convolutions and matrix products that the target can run in INT8 (targets.py).
        int8: those of them that run in INT8.
        fraction: int8 / eligible; 0 if nothing is eligible.
        not_int8: (node, reason) of eligible ones that do not run in INT8.
        ineligible: (node, reason) of the others.
        verified: read from the graph that the target's own runtime executes. False if only the Q/DQ nodes in the file
            could be read (engines without a GPU), or if the runtime ran on another kind of processor (an ARM file on
            x86).
    """

    eligible: int
    int8: int
    fraction: float
    not_int8: list[tuple[str, str]]
    ineligible: list[tuple[str, str]]
    verified: bool


def int8_coverage(path: Path, target: str | Target = "cpu") -> Coverage:
    """Counts the operators that run in INT8.

    Args:
        path: an ONNX file, quantized or not.
        target: its runtime and eligibility rules apply.

    Raises:
        IntegrityError: the file is damaged.
        MissingError: the target's runtime is not installed.
    """
    target = get_target(target) if isinstance(target, str) else target
    if has_module(target):
        found = describe(target, path)["coverage"]
        not_int8, ineligible = ([(name, why) for name, why in found.get(key, ())] for key in ("not_int8", "excluded"))
        return Coverage(found["eligible"], found["int8"], found["fraction"], not_int8, ineligible, verified=True)
    model = read_onnx(path)
    eligible, ineligible = eligible_nodes(model, target)
    if target.runtime == "onnxruntime":
        runner = OrtRunner(path, target=target, threads=1)
        # Layout changes rename the nodes that they move: "conv1" becomes "conv1_token_7".
        running = {
            re.sub(r"_token_\d+$", "", n.name) for n in runner.optimised_graph().graph.node if n.op_type in INT8_KERNELS
        }
        # The graph that was read is the one that runs here; on another processor it may be another one.
        verified = is_native(target)
        missing = "ONNX Runtime did not fuse it: an input or output is not quantized"
    else:
        by_output = producers(model)
        running = {n.name for n in eligible if _reads_dequantized(n, by_output)}
        verified = False
        missing = "an input is not quantized"
    excluded = excluded_nodes(model)
    not_int8 = [(n.name, excluded.get(n.name, missing)) for n in eligible if n.name not in running]
    int8 = len(eligible) - len(not_int8)
    fraction = int8 / len(eligible) if eligible else 0.0
    return Coverage(
        eligible=len(eligible),
        int8=int8,
        fraction=fraction,
        not_int8=not_int8,
        ineligible=ineligible,
        verified=verified,
    )


def _reads_dequantized(node: NodeProto, by_output: Mapping[str, NodeProto]) -> bool:
    return all(name in by_output and by_output[name].op_type == "DequantizeLinear" for name in node.input[:2])
