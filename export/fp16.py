"""FP16 graphs for GPU targets: what trtexec's former --fp16 did in the builder, done in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from nayer_edge.errors import UsageError
from nayer_edge.storage.files import sha256_of

from .onnx_file import metadata_of, read_onnx, strip, write_onnx
from .plain_graph import attribute, constants, copy_of

LARGEST = float(np.finfo(np.float16).max)
# A smaller scale would be a subnormal number in FP16 and lose precision.
_SMALLEST_SCALE = 2.0**-20


def to_fp16(fp32_path: Path, path: Path) -> str:
    """Writes an FP16 copy of an FP32 file; inputs and outputs stay float32.

    Returns:
        SHA-256 of the file.

    Raises:
        UsageError: a weight is too large for FP16.
        IntegrityError: the FP32 file is damaged.
    """
    model = read_onnx(fp32_path, external_data=True)
    metadata = metadata_of(model)
    half = converted(model)
    strip(half, metadata={**metadata, "nayer_edge.precision": "fp16"})
    write_onnx(half, path)
    return sha256_of(path)


def converted(model: ModelProto) -> ModelProto:
    """A copy in FP16, Q/DQ scales included; inputs and outputs stay float32.

    Raises:
        UsageError: a weight is too large for FP16.
    """
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
        if largest > LARGEST:
            raise UsageError(
                f"The weight '{tensor.name}' has values up to {largest:g}; FP16 ends at {LARGEST:g}.",
                fix="Use the FP32 file for this target.",
            )
    copy = copy_of(model)
    _fit_scales(copy)
    half = convert_float_to_float16(copy, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST)
    wrapped = ONNXModel(half)
    wrapped.topological_sort()
    return wrapped.model


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
