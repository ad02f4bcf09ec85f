"""ONNX files: validated when read; written without source paths or stack traces, and reproducibly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto, TensorProto

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.files import write_bytes

# The limit of a protobuf message.
MAX_BYTES = 2**31 - 1
# Bits per element; other types are not checked.
_BITS_BY_NAME = {
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT8", "UINT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E5M2"), 8),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
}
_BITS = {number: _BITS_BY_NAME[name] for name, number in TensorProto.DataType.items() if name in _BITS_BY_NAME}


def read_onnx(path: Path, *, external_data: bool = False) -> ModelProto:
    """Reads an ONNX file, weights included.

    Args:
        path: the file.
        external_data: also load weights stored in other files of the same folder.

    Raises:
        IntegrityError: it is missing, not ONNX, truncated, or refers to external data outside its own folder.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise IntegrityError(f"{path} is larger than an ONNX file can be (2 GiB).")
        model = onnx.load_model_from_string(path.read_bytes())
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing.") from error
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read.", why=f"The system says: {error.strerror or error}.") from error
    except DecodeError as error:
        raise IntegrityError(
            f"{path} is not an ONNX file, or is truncated.",
            why=f"{error}",
            fix="Export it again with: nayer-edge export RUN",
        ) from error
    if not model.graph.node or not model.opset_import:
        raise IntegrityError(
            f"{path} is not an ONNX model.",
            why="It has no operators, or does not state its operator set.",
            fix="Export it again with: nayer-edge export RUN",
        )
    _require_inside(model, path)
    if external_data:
        try:
            onnx.load_external_data_for_model(model, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise IntegrityError(f"The external data of {path} cannot be read.", why=f"{error}") from error
    _require_sizes(model, path)
    return model


def _require_sizes(model: ModelProto, path: Path) -> None:
    """Checks that every tensor has as many bytes as its shape needs. Other readers trust the shape."""
    for tensor in _tensors(model):
        bits = _BITS.get(tensor.data_type) if tensor.HasField("raw_data") else None
        if bits is None:
            continue
        if min(tensor.dims, default=1) < 0 or len(tensor.raw_data) != (math.prod(tensor.dims) * bits + 7) // 8:
            raise IntegrityError(
                f"{path} has a weight '{tensor.name}' whose {len(tensor.raw_data):,} bytes do not match its shape.",
                fix="Do not use this file. Get it again from its source.",
            )


def _require_inside(model: ModelProto, path: Path) -> None:
    folder = path.resolve().parent
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        data = folder / location
        if not location or not data.resolve().is_relative_to(folder):
            raise IntegrityError(
                f"{path} stores the weight '{tensor.name}' at '{location}', outside its own folder.",
                why="The export does not write such files, so this one was modified.",
                fix="Do not use this file. Get it again from its source.",
            )
        if not data.is_file():
            raise IntegrityError(
                f"{path} stores the weight '{tensor.name}' in {location}, which is missing.",
                fix="Restore that file, or export again with: nayer-edge export RUN",
            )


def _tensors(model: ModelProto) -> list[TensorProto]:
    """All tensors of a model, in subgraphs and attributes too."""
    found: list[TensorProto] = []
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        found.extend(graph.initializer)
        found.extend(part for s in graph.sparse_initializer for part in (s.values, s.indices))
        for node in graph.node:
            for attribute in node.attribute:
                found.extend([attribute.t] if attribute.HasField("t") else [])
                found.extend(attribute.tensors)
                graphs.extend([attribute.g] if attribute.HasField("g") else [])
                graphs.extend(attribute.graphs)
    return found


def strip(model: ModelProto, *, metadata: Mapping[str, str]) -> None:
    """Removes traces of the tools that made a model and writes our provenance, in place.

    Node metadata and doc strings contain source paths and stack traces, which leak information and change hashes.
    Inferred shapes are recomputed by every reader. Unused operator sets are requirements that the graph does not have.

    Args:
        metadata: becomes the model's metadata.
    """
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    del graph.value_info[:]
    del graph.quantization_annotation[:]
    used = {node.domain for node in graph.node} | {""}
    versions = {entry.domain: entry.version for entry in model.opset_import if entry.domain in used}
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, versions[domain]) for domain in sorted(versions))
    model.producer_name, model.producer_version = "nayer-edge", metadata.get("nayer_edge.version", "")
    model.graph.name = "nayer_edge"
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])


def metadata_of(model: ModelProto) -> dict[str, str]:
    """The model's own metadata: the provenance that `strip` wrote."""
    return {entry.key: entry.value for entry in model.metadata_props}


def opset_of(model: ModelProto) -> int:
    """The version of the standard operator set that the model uses."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def write_onnx(model: ModelProto, path: Path) -> None:
    """Checks a model (onnx.checker, shapes included) and writes it atomically and reproducibly.

    Raises:
        UsageError: it is too large for one file, or the folder cannot be written to.
        IntegrityError: the graph is not valid ONNX, because of a defect in the code that made it.
    """
    try:
        data = model.SerializeToString(deterministic=True)
        if len(data) > MAX_BYTES:
            raise EncodeError
    except (EncodeError, ValueError) as error:
        raise UsageError(
            f"The model is too large for {path}.",
            why="An ONNX file is limited to 2 GiB.",
            fix="Choose a smaller student; `nayer-edge students` lists them.",
        ) from error
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise IntegrityError(f"The graph to be written to {path} is not valid ONNX.", why=f"{error}") from error
    write_bytes(path, data)
