"""Exports a torch module to one ONNX file, whose bytes do not depend on where or when it was made."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from torch import nn

from nayer_edge import __version__
from nayer_edge.errors import NayerEdgeError, UsageError
from nayer_edge.storage.files import sha256_of

from .onnx_file import opset_of, strip, write_onnx
from .plain_graph import attribute, constants, distinct
from .trace import copy_for_export, fixed_batch, traced

INPUT = "images"
OUTPUT = "logits"
BATCH = "batch"


@dataclass(frozen=True)
class OnnxInfo:
    """Description of an exported file.

    Attributes:
        path: the file.
        opset: version of the operator set, read back from the file.
        ir_version: of the ONNX format.
        input_shape: (channels, height, width); the batch is dynamic.
        input_dtype: "float32" in [0, 1], or "uint8" in 0 … 255.
        classes: number of logits.
        operators: operator type → number of nodes.
        size_bytes: of the file.
        sha256: of the file.
    """

    path: Path
    opset: int
    ir_version: int
    input_shape: tuple[int, int, int]
    input_dtype: str
    classes: int
    operators: Mapping[str, int]
    size_bytes: int
    sha256: str


class _FromBytes(nn.Module):
    """Takes uint8 pixels, as cameras deliver them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.to(torch.float32) / 255)


def to_onnx(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    path: Path,
    *,
    opset: int = 20,
    uint8_input: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> OnnxInfo:
    """Exports a classifier through torch.export, with a dynamic batch, to one file.

    Input "images" (batch, C, H, W), output "logits" (batch, classes). The module itself is not changed: a copy is
    exported. Nodes are named after their layers, for readable exclusions and reports.

    Args:
        model: images (batch, C, H, W) → logits (batch, classes); includes normalisation.
        input_shape: (C, H, W).
        path: the file to write.
        opset: requested operator set; the result has the one that the exporter used.
        uint8_input: the graph takes uint8 pixels and divides by 255 itself.
        metadata: provenance to write into the file (class names, input specification, …).

    Raises:
        UsageError: an operator has no ONNX form (named, with its layer), the model's code fixes the batch size, the
            output is not (batch, classes), or the folder cannot be written to.
    """
    network = copy_for_export(model, input_shape)
    if uint8_input:
        network = _FromBytes(network)
        example = torch.zeros((2, *input_shape), dtype=torch.uint8)
    else:
        example = torch.full((2, *input_shape), 0.5)
    with _quiet():
        exported = traced(network, example, BATCH)
        try:
            program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),  # sets the name; the trace calls it s77
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise _unsupported(error, exported) from error
    assert program is not None  # true with dynamo=True
    graph = program.model_proto
    _require_dynamic_batch(graph)
    _name_after_layers(graph)
    _use_global_average_pool(graph)
    strip(graph, metadata={**(metadata or {}), "nayer_edge.version": __version__})
    write_onnx(graph, path)
    return OnnxInfo(
        path=path,
        opset=opset_of(graph),
        ir_version=graph.ir_version,
        input_shape=input_shape,
        input_dtype="uint8" if uint8_input else "float32",
        classes=graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value,
        operators=dict(sorted(Counter(node.op_type for node in graph.graph.node).items())),
        size_bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )


def _require_dynamic_batch(model: ModelProto) -> None:
    for value in (model.graph.input[0], model.graph.output[0]):
        if value.type.tensor_type.shape.dim[0].dim_param != BATCH:
            raise fixed_batch()


def _unsupported(error: Exception, exported: torch.export.ExportedProgram) -> NayerEdgeError:
    """Names the operator and the layer of a failed conversion."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(texts)
    operator = re.search(r"op='([\w.:]+)'", text)
    node = re.search(r"translating node %(\w+)", text)
    layer = _layer_of(node.group(1), exported) if node else ""
    where = f" (layer '{layer}')" if layer else ""
    return UsageError(
        f"The operator {operator.group(1) if operator else 'used by the model'} has no ONNX form{where}.",
        why=(texts[-1].strip().splitlines() or ["The exporter gave no reason."])[0],
        fix="Replace that layer with standard operators; `nayer-edge students` lists students that can be exported.",
    )


def _layer_of(node_name: str, exported: torch.export.ExportedProgram) -> str:
    programs = [exported]
    with contextlib.suppress(Exception), _quiet():
        programs.append(exported.run_decompositions())
    for program in programs:
        for node in program.graph.nodes:
            if node.name == node_name and (stack := node.meta.get("nn_module_stack")):
                return str(list(stack.values())[-1][0])
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides messages of the exporter that are meant for its developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(torch|onnxscript|onnx_ir|copyreg)\b")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_after_layers(model: ModelProto) -> None:
    """Names every node after its layer: "layer1.0.conv1", "layer1.0.relu", … ."""
    weights = constants(model)
    names = distinct(_layer_name(node, weights) for node in model.graph.node)
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name


def _layer_name(node: NodeProto, weights: Collection[str]) -> str:
    # A convolution with a folded BatchNorm has the BatchNorm's scope; its weight has the right name.
    for name in node.input[1:2]:
        if name in weights and name.endswith(".weight"):
            return _without_wrappers(name).removesuffix(".weight")
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
    names = re.findall(r"'([^']*)'", scopes)
    layer = _without_wrappers(names[-2]) if len(names) > 1 else ""
    return f"{layer}.{node.op_type}" if layer else node.op_type


def _without_wrappers(name: str) -> str:
    """The layer name in the network's own code, without our uint8 and normalisation wrappers."""
    return f"{name}.".removeprefix("model.").removeprefix("backbone.").removesuffix(".")


def _use_global_average_pool(model: ModelProto) -> None:
    """Replaces ReduceMean over both spatial axes with GlobalAveragePool, for which runtimes have INT8 kernels."""
    known = constants(model)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
    ranks[INPUT] = 4
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        axes = known.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        if (
            axes is None
            or ranks.get(node.input[0]) != 4
            or sorted(int(axis) % 4 for axis in numpy_helper.to_array(axes).ravel()) != [2, 3]
        ):
            nodes.append(node)
            continue
        keep, layer = attribute(node, "keepdims", 1), node.name.removesuffix(".ReduceMean")
        pooled = node.output[0] if keep else f"{node.output[0]}_pooled"
        nodes.append(
            onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=f"{layer}.GlobalAveragePool")
        )
        if not keep:
            nodes.append(onnx.helper.make_node("Flatten", [pooled], [node.output[0]], name=f"{layer}.Flatten", axis=1))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
