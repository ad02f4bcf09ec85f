"""FP16 graphs for GPU targets: what trtexec's former --fp16 did in the builder, done in the graph.

Nodes whose values do not fit into FP16 stay in FP32. Real images may give larger values than the images used here, so
tensors must fit into half of FP16's range.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from nayer_edge.storage.files import sha256_of

from .int8.calibration import largest_values
from .onnx_file import metadata_of, read_onnx, strip, write_onnx
from .plain_graph import attribute, constants, copy_of, distinct, producers

LARGEST = float(np.finfo(np.float16).max)
MARGIN = 2.0
"""smallest allowed ratio of FP16's largest value to a tensor's largest value on the images seen"""
SMALLEST = 2.0**-16
"""FP16 holds numbers below this with less than 8 bits"""
FP32_NODES = "nayer_edge.fp32_nodes"
"""metadata key of an FP16 or INT8 file: "node: reason" for every node that stays in FP32, one a line"""
# A smaller scale would be a subnormal number in FP16 and lose precision.
_SMALLEST_SCALE = 2.0**-20
# Operators, and their inputs, whose result scales with a constant. A tiny addend is harmless.
_FACTORS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1), "Mul": (0, 1), "Div": (0, 1)}


def to_fp16(fp32_path: Path, path: Path, images: np.ndarray | None = None) -> str:
    """Writes an FP16 copy of an FP32 file; inputs and outputs stay float32.

    Args:
        images: (n, C, H, W), float32 in [0, 1]; they show which activations do not fit into FP16. Without them, only
            weights are checked.

    Returns:
        SHA-256 of the file. `fp32_nodes` reads from it what stays in FP32.

    Raises:
        IntegrityError: the FP32 file is damaged.
    """
    model = read_onnx(fp32_path, external_data=True)
    metadata = metadata_of(model)
    unnamed = [node for node in model.graph.node if not node.name]
    taken = [node.name for node in model.graph.node if node.name]
    for node, name in zip(unnamed, distinct((f"{n.output[0]}.{n.op_type}" for n in unnamed), taken), strict=True):
        node.name = name
    kept = beyond_fp16(model, {} if images is None else largest_values(model, images))
    half = converted(model, kept)
    strip(half, metadata={**metadata, "nayer_edge.precision": "fp16", **fp32_metadata(kept)})
    write_onnx(half, path)
    return sha256_of(path)


def beyond_fp16(model: ModelProto, largest: Mapping[str, float]) -> dict[str, str]:
    """Nodes that must stay in FP32, and why: they read or write a tensor that FP16 cannot hold.

    Args:
        model: FP32, every node named.
        largest: tensor → its largest absolute value (`calibration.largest_values`).
    """
    weights = {
        name: float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
        for name, tensor in constants(model).items()
        if tensor.data_type == TensorProto.FLOAT
    }
    outside = {name: why for name, value in largest.items() if (why := _outside(value, LARGEST / MARGIN))}
    found = {}
    for node in model.graph.node:
        reasons = [f"'{name}' {outside[name]}" for name in (*node.output, *node.input) if name in outside]
        for place, name in enumerate(node.input):
            why = _outside(weights.get(name, 0.0), LARGEST)
            if why and (weights[name] > LARGEST or place in _FACTORS.get(node.op_type, ())):
                reasons.append(f"'{name}' {why}")
        if reasons:
            found[node.name] = reasons[0]
    return found


def _outside(value: float, most: float) -> str:
    """Why FP16 does not hold a tensor with this largest absolute value; empty if it does."""
    if value > most:
        return f"has values up to {value:.3g}; FP16 ends at {LARGEST:g}"
    if 0 < value < SMALLEST:
        return f"has no value above {value:.3g}; FP16 has less than 8 bits there"
    return ""


def fp32_metadata(kept: Mapping[str, str]) -> dict[str, str]:
    """The metadata entry that says what stays in FP32; none if nothing does."""
    return {FP32_NODES: "\n".join(f"{name}: {why}" for name, why in kept.items())} if kept else {}


def fp32_nodes(path: Path) -> dict[str, str]:
    """Node → why it stays in FP32, from the metadata of an FP16 or INT8 file."""
    lines = metadata_of(read_onnx(path)).get(FP32_NODES, "").splitlines()
    return dict(line.split(": ", 1) for line in lines)


def converted(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """A copy in FP16, Q/DQ scales included; inputs and outputs stay float32.

    Args:
        kept: names of nodes that stay in FP32. A tensor between two of them is never rounded to FP16.
    """
    copy = copy_of(model)
    _fit_scales(copy)
    half = convert_float_to_float16(
        copy, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST, node_block_list=list(kept)
    )
    if kept:
        _cast_once(half)
    wrapped = ONNXModel(half)
    wrapped.topological_sort()
    return wrapped.model


def _cast_once(model: ModelProto) -> None:
    """Corrects the casts around nodes in FP32, in place.

    The converter casts what such a node writes to FP16 and, for the next such node, back: too late for a value beyond
    FP16. It also adds the cast before them once for each reader of a tensor (seen in 1.31).
    """
    graph, seen = model.graph, set()
    for node in list(graph.node):
        if node.op_type == "Cast" and node.output[0] in seen:
            graph.node.remove(node)
        seen.update(node.output)
    by_output = producers(model)
    outputs = {value.name for value in graph.output}
    for node in list(graph.node):
        down = by_output.get(node.input[0]) if _is_inserted(node, "_cast_to_fp32_node", "graph_output_cast") else None
        if down is None or not _is_inserted(down, "_cast_to_fp16_node", "graph_input_cast"):
            continue
        float32, name = down.input[0], node.output[0]
        graph.node.remove(node)
        if name in outputs:  # an output keeps its name
            by_output[float32].output[:] = [name if made == float32 else made for made in by_output[float32].output]
            float32, name = name, float32
        for reader in graph.node:
            reader.input[:] = [float32 if read == name else read for read in reader.input]
    read = {name for node in graph.node for name in node.input} | outputs
    for node in list(graph.node):
        if _is_inserted(node, "_cast_to_fp16_node", "graph_input_cast") and node.output[0] not in read:
            graph.node.remove(node)


def _is_inserted(node: NodeProto, ending: str, beginning: str) -> bool:
    """Whether the converter added this cast, by its name."""
    return node.op_type == "Cast" and (node.name.endswith(ending) or node.name.startswith(beginning))


def _fit_scales(model: ModelProto) -> None:
    """Rounds Q/DQ scales to FP16 and fits the INT8 weights to the rounded scales."""
    tensors = constants(model)
    fitted: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[1] in fitted:
            continue
        fitted.add(node.input[1])
        tensor = tensors[node.input[1]]
        scale = numpy_helper.to_array(tensor)
        rounded = np.maximum(scale, _SMALLEST_SCALE).astype(np.float16).astype(np.float32)
        if node.input[0] in tensors:
            weight = tensors[node.input[0]]
            axis = attribute(node, "axis", 1)
            shape = [1] * len(weight.dims)
            if scale.size > 1:
                shape[axis] = -1
            ratio = (scale / rounded).reshape(shape) if scale.ndim else scale / rounded
            values = numpy_helper.to_array(weight)
            values = np.clip(np.rint(values * ratio), -127, 127).astype(values.dtype)
            weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
