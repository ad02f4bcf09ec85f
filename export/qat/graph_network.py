"""A quantized ONNX graph as a trainable torch module, so that QAT trains the graph that ships.

Each node is computed by one torch function. A QuantizeLinear becomes fake quantization with a learnt range, at the same
tensors where `with_qdq` put it for the target, and a quantized weight becomes its fake-quantized float weight. Operator
fusion, skip connections and excluded nodes are therefore those of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn

from nayer_edge.errors import UsageError

from ..int8.calibration import Ranges
from ..plain_graph import constants, copy_of, output_channel_axis
from ..targets import QUANTIZABLE_OPS, Target
from .fake_quant import Grid, LearntRange, fake_quantize_weight, least_error_limit
from .torch_operators import OPERATORS, Attributes, unsupported

_PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class _Step:
    """One node, with decoded attributes."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes


@dataclass(frozen=True)
class _Weight:
    """A quantized constant of the graph: the float constant that it is computed from, and how it is rounded."""

    source: str
    axis: int | None
    largest: int
    """highest level; 0 for a bias, whose rounding to 32 bits is negligible"""
    learnt: bool
    """whether its scale is learnt"""


class GraphNetwork(nn.Module):
    """Images (batch, C, H, W) → logits (batch, classes), through the nodes of an ONNX graph.

    Trainable: weights and biases of quantizable operators and BatchNormalizations, and the ranges of activations. A
    BatchNormalization that the exporter could not fold into a convolution keeps its running statistics, because those
    are exported.

    Args:
        model: FP32, prepared; training starts from its constants.
        quantized: `with_qdq` of it, or the same model for a float network.
        ranges: of activations; training starts from them.
        target: decides the grids.
        bits: of activations and weights. At 8 bits the scale of a weight is computed as the quantizer does, largest
            value of the channel / highest level of the target. With fewer bits, which cannot be exported, it is learnt.
        edge_bits: of the first and the last quantizable operator and their inputs.

    Raises:
        UsageError: an operator is not supported (named, with its layer).
    """

    def __init__(
        self,
        model: ModelProto,
        quantized: ModelProto,
        ranges: Ranges,
        target: Target,
        *,
        bits: int = 8,
        edge_bits: int = 8,
    ) -> None:
        super().__init__()
        self._target = target
        self._input, self._output = quantized.graph.input[0].name, quantized.graph.output[0].name
        self._steps = [_step(node) for node in quantized.graph.node]
        _require_supported(self._steps)
        arrays = {name: numpy_helper.to_array(t) for m in (quantized, model) for name, t in constants(m).items()}
        slices, edges = _trainable(model), _edges(self._steps)
        at_edges = {name for step in self._steps if step.name in edges for name in step.inputs}
        self._weights = _weights(
            self._steps, arrays, slices, lambda name: edge_bits if name in at_edges else bits, target.weight_max
        )
        self._place_parameters(_dequantized(self._steps, arrays, self._weights), slices)
        self._place_limits()
        wide = {s.inputs[1] for s in self._steps if s.operator == "DequantizeLinear" and s.outputs[0] in at_edges}
        self._place_ranges(ranges, lambda scale: edge_bits if scale in wide else bits)

    def _place_parameters(self, arrays: Mapping[str, np.ndarray], slices: Mapping[str, int | None]) -> None:
        self._names: dict[str, int] = {}
        self._constants: list[str] = []
        self._shapes: dict[str, Tensor] = {}
        self.parameters_in_units = nn.ParameterList()
        used = {name for step in self._steps if step.operator not in _PAIR for name in step.inputs}
        used |= {weight.source for weight in self._weights.values()}
        for name in sorted(used & set(arrays)):
            value = torch.from_numpy(arrays[name].copy())
            if name in slices:
                unit = _unit(value, slices[name])
                self.register_buffer(f"unit{len(self._names)}", unit)
                self._names[name] = len(self._names)
                self.parameters_in_units.append(nn.Parameter(value / unit))
            elif value.is_floating_point():
                self.register_buffer(f"constant{len(self._constants)}", value)
                self._constants.append(name)
            else:
                # Shapes and axes are read on the CPU.
                self._shapes[name] = value

    def _place_limits(self) -> None:
        self._limits: dict[str, int] = {}
        self.log_limits = nn.ParameterList()
        for constant, weight in self._weights.items():
            if weight.learnt:
                limit = least_error_limit(self.value(weight.source), weight.axis, weight.largest)
                self._limits[constant] = len(self._limits)
                self.log_limits.append(nn.Parameter(limit.clamp(min=1e-12).log()))

    def _place_ranges(self, ranges: Ranges, bits: Callable[[str], int]) -> None:
        self._scales: dict[str, int] = {}
        self._tensors: dict[str, str] = {}
        self.learnt_ranges = nn.ModuleList()
        for step in self._steps:
            if step.operator == "QuantizeLinear" and step.inputs[1] not in self._scales:
                tensor, scale = _owner(step.inputs[1], step.inputs[0], ranges), step.inputs[1]
                grid = Grid(bits(scale), self._target.symmetric)
                self._scales[scale] = len(self._scales)
                self._tensors[scale] = tensor
                self.learnt_ranges.append(LearntRange(*ranges[tensor], grid))

    def value(self, name: str) -> Tensor:
        """Current value of a trainable constant of the graph."""
        index = self._names[name]
        return self.parameters_in_units[index] * self.get_buffer(f"unit{index}")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, C, H, W)."""
        values: dict[str, Any] = {"": None, self._input: images, **self._shapes}
        values |= {name: self.get_buffer(f"constant{index}") for index, name in enumerate(self._constants)}
        values |= {name: self.value(name) for name in self._names}
        for step in self._steps:
            if step.operator == "QuantizeLinear":
                found = self.learnt_ranges[self._scales[step.inputs[1]]](values[step.inputs[0]])
            elif step.operator == "DequantizeLinear":
                source = step.inputs[0] if step.outputs[0] not in values else step.outputs[0]
                found = self._weight(source) if source in self._weights else values[source]
            else:
                found = OPERATORS[step.operator](step.attributes, *(values[name] for name in step.inputs))
            results = found if isinstance(found, tuple) else (found,)
            values.update(zip(step.outputs, results, strict=False))
        return values[self._output]

    def _weight(self, constant: str) -> Tensor:
        weight = self._weights[constant]
        value = self.value(weight.source)
        if not weight.largest:
            return value
        limit = self.log_limits[self._limits[constant]].exp() if constant in self._limits else None
        return fake_quantize_weight(value, weight.axis, weight.largest, limit)

    @torch.no_grad()
    def trained(self, model: ModelProto) -> ModelProto:
        """A copy of the FP32 graph with the trained constants."""
        copy = copy_of(model)
        for tensor in copy.graph.initializer:
            if tensor.name in self._names:
                array = self.value(tensor.name).cpu().contiguous().numpy()
                tensor.CopyFrom(numpy_helper.from_array(array.reshape(tuple(tensor.dims)), tensor.name))
        return copy

    def ranges(self) -> Ranges:
        """Tensor → learnt range."""
        return {
            tensor: self.learnt_ranges[self._scales[scale]].range()  # pyright: ignore[reportCallIssue]
            for scale, tensor in self._tensors.items()
        }

    def range_parameters(self) -> list[nn.Parameter]:
        """Parameters in the logarithmic domain: ranges of activations and, below 8 bits, of weights."""
        return [*self.learnt_ranges.parameters(), *self.log_limits]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Weights and biases, in units of the root mean square of their channel."""
        return list(self.parameters_in_units)


def _step(node: NodeProto) -> _Step:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    decoded = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
    return _Step(node.name, node.op_type, tuple(node.input), tuple(node.output), decoded)


def _require_supported(steps: list[_Step]) -> None:
    for step in steps:
        if step.operator not in _PAIR and (why := unsupported(step.operator, step.attributes)):
            raise UsageError(
                f"QAT does not support {step.operator} (layer '{step.name}').",
                why=why,
                fix="Export this student without --qat.",
            )


def _edges(steps: list[_Step]) -> set[str]:
    """Names of the first and the last quantizable operator."""
    names = [step.name for step in steps if step.operator in QUANTIZABLE_OPS]
    return {names[0], names[-1]} if names else set()


def _weights(
    steps: list[_Step],
    arrays: Mapping[str, np.ndarray],
    trainable: Collection[str],
    bits: Callable[[str], int],
    largest: int,
) -> dict[str, _Weight]:
    """Quantized constants that are computed from trainable ones."""
    found = {}
    for step in steps:
        constant = step.inputs[0]
        if step.operator != "DequantizeLinear" or constant not in arrays:
            continue
        source, width = constant.removesuffix("_quantized"), bits(step.outputs[0])
        if source not in trainable:
            continue
        if arrays[constant].dtype.itemsize > 1:
            found[constant] = _Weight(source, None, 0, False)
        else:
            axis = step.attributes.get("axis", 1) if arrays[step.inputs[1]].ndim else None
            level = largest if width == 8 else 2 ** (width - 1) - 1
            found[constant] = _Weight(source, axis, level, width < 8)
    return found


def _dequantized(
    steps: list[_Step], arrays: Mapping[str, np.ndarray], weights: Mapping[str, _Weight]
) -> dict[str, np.ndarray]:
    """All constants, and the float values of those that are quantized but not trained, by the name of their
    DequantizeLinear's output."""
    found = dict(arrays)
    for step in steps:
        constant = step.inputs[0]
        if step.operator == "DequantizeLinear" and constant in arrays and constant not in weights:
            levels, scale, zero = (arrays[name] for name in step.inputs)
            shape = [1] * levels.ndim if scale.ndim else []
            if scale.ndim:
                shape[step.attributes.get("axis", 1)] = -1
            scale, zero = scale.reshape(shape), zero.astype(np.float32).reshape(shape)
            found[step.outputs[0]] = (levels.astype(np.float32) - zero) * scale
    return found


def _trainable(model: ModelProto) -> dict[str, int | None]:
    """Trainable constants, and the axis of their output channels (None: a single unit)."""
    known = constants(model)
    found: dict[str, int | None] = {}
    for node in model.graph.node:
        if node.op_type in QUANTIZABLE_OPS:
            places = {1: output_channel_axis(node), 2: None}
        elif node.op_type == "BatchNormalization":
            places = {1: None, 2: None}
        else:
            continue
        for place, axis in places.items():
            name = node.input[place] if place < len(node.input) else ""
            if name in known and known[name].data_type == TensorProto.FLOAT:
                found[name] = axis
    return found


def _unit(value: Tensor, axis: int | None) -> Tensor:
    """Root mean square of each slice along `axis`: that of the whole tensor for an all-zero slice, and 1 for an
    all-zero tensor."""
    overall = value.square().mean().sqrt()
    overall = overall if overall > 0 else torch.ones(())
    if axis is None:
        return overall
    others = [a for a in range(value.ndim) if a != axis % value.ndim]
    unit = value.square().mean(dim=others, keepdim=True).sqrt() if others else value.abs()
    return torch.where(unit > 0, unit, overall)


def _owner(scale: str, tensor: str, ranges: Ranges) -> str:
    """The tensor whose range gave a scale. Operators that only move bytes share the scale of their input."""
    for suffix in ("_scale", "_skip_scale"):
        if scale.endswith(suffix) and scale.removesuffix(suffix) in ranges:
            return scale.removesuffix(suffix)
    return tensor
