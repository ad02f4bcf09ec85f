"""From a torch module to one ONNX file that does not depend on where or when it was made."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
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
from .plain_graph import distinct

INPUT = "images"
OUTPUT = "logits"
BATCH = "batch"


@dataclass(frozen=True)
class OnnxInfo:
    """What was written.

    Attributes:
        path: the file.
        opset: version of the operator set, read back from the file.
        ir_version: of the ONNX format.
        input_shape: (channels, height, width); the batch is dynamic.
        input_dtype: "float32" in [0, 1], or "uint8" in 0 … 255.
        classes: number of logits.
        operators: operator → how many.
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
    """Lets a device hand over its uint8 pixels as they are."""

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
    """Exports a classifier through torch.export, with a dynamic batch, in one file.

    Input "images" (batch, C, H, W), output "logits" (batch, classes). The module is copied: it keeps its
    device, type and mode. Nodes are named after their layers, so that exclusions and reports can be read.

    Args:
        model: images (batch, C, H, W) → logits (batch, classes); normalisation inside.
        input_shape: (C, H, W).
        path: the file to write.
        opset: operator set asked for; the one that the exporter used is in the result.
        uint8_input: the graph takes uint8 pixels and divides by 255 itself.
        metadata: provenance to write into the file (class names, input specification, …).

    Raises:
        UsageError: an operator has no ONNX form (named, with its layer), the batch size is fixed by the
            model's code, the output is not (batch, classes), or the folder cannot be written to.
    """
    network = _copy_for_export(model)
    if uint8_input:
        network = _FromBytes(network)
        example = torch.zeros((2, *input_shape), dtype=torch.uint8)
    else:
        example = torch.full((2, *input_shape), 0.5)
    exported = _traced(network, example)
    with _quiet():
        try:
            program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),  # for the name: the trace itself calls it s77
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise _unsupported(error, exported) from error
    assert program is not None  # it is with dynamo=True
    graph = _require_dynamic_batch(program.model_proto)
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


def _copy_for_export(model: nn.Module) -> nn.Module:
    try:
        network = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UsageError("The model cannot be copied, so it cannot be exported.", why=f"{error}") from error
    network = network.cpu().float().eval().requires_grad_(False)
    # Weights kept channels-last would otherwise enter the graph with a transpose.
    return network.to(memory_format=torch.contiguous_format)


def _traced(network: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    shape = tuple(example.shape[1:])
    try:
        with torch.no_grad():
            logits = network(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"The model does not take images of shape {shape}.",
            why=f"{error}",
            fix="Compare the input specification (channels, height, width) with what the model was trained on.",
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[0] != 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(
            "The model does not return logits of shape (batch, classes).",
            why=f"For two images it returned {found}.",
            fix="Wrap it so that forward(images) returns one tensor of logits.",
        )
    with _quiet(), torch.no_grad():
        try:
            return torch.export.export(
                network, (example,), dynamic_shapes=({0: torch.export.Dim(BATCH)},), strict=False
            )
        except Exception as error:
            if "Constraints violated" in str(error) or "specialized" in str(error):
                raise _fixed_batch() from error
            raise UsageError(
                "The model cannot be traced by torch.export.",
                why=str(error).strip().splitlines()[0],
                fix="Python branches that depend on values of the images have to go.",
            ) from error


def _fixed_batch() -> UsageError:
    return UsageError(
        "The model fixes its batch size.",
        why="Its code uses a constant where the number of images should be, so the export has no dynamic batch.",
        fix="Write x.flatten(1) or x.reshape(x.shape[0], -1) in its forward.",
    )


def _require_dynamic_batch(model: ModelProto) -> ModelProto:
    for value in (model.graph.input[0], model.graph.output[0]):
        if value.type.tensor_type.shape.dim[0].dim_param != BATCH:
            raise _fixed_batch()
    return model


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
        fix="Replace that layer by one made of standard operators; `nayer-edge students` lists students that export.",
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
    """The exporter's own advice to its developers is kept from our users."""
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
    """Names every node after the layer that it came from: "layer1.0.conv1", "layer1.0.relu", … ."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for node, name in zip(
        model.graph.node, distinct(_layer_name(node, weights) for node in model.graph.node), strict=True
    ):
        node.name = name


def _layer_name(node: NodeProto, weights: set[str]) -> str:
    # After folding, a convolution carries the scope of its BatchNorm; its weight still says whose it is.
    for name in node.input[1:2]:
        if name in weights and name.endswith(".weight"):
            return _without_wrappers(name).removesuffix(".weight")
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
    names = re.findall(r"'([^']*)'", scopes)
    layer = _without_wrappers(names[-2]) if len(names) > 1 else ""
    return f"{layer}.{node.op_type}" if layer else node.op_type


def _without_wrappers(name: str) -> str:
    """Layer names as the network's author wrote them: without our uint8 and normalisation wrappers."""
    return f"{name}.".removeprefix("model.").removeprefix("backbone.").removesuffix(".")


def _use_global_average_pool(model: ModelProto) -> None:
    """ReduceMean over the two spatial axes → GlobalAveragePool, which runtimes have INT8 kernels for."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
    ranks[INPUT] = 4
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        axes = constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        if (
            axes is None
            or ranks.get(node.input[0]) != 4
            or sorted(int(axis) % 4 for axis in numpy_helper.to_array(axes).ravel()) != [2, 3]
        ):
            nodes.append(node)
            continue
        keep, layer = attributes.get("keepdims", 1), node.name.removesuffix(".ReduceMean")
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
