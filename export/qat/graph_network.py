"""The quantized ONNX graph as a torch module that can be trained: what is fine-tuned is the graph that ships.

Each node of the graph is computed by one torch function. A QuantizeLinear becomes fake quantization with a learnt
range, at the very tensors where `with_qdq` put it for the target; a quantized weight becomes its float weight,
fake-quantized. So operator fusion, skip connections and operators left in float are those of the device without
being described a second time.
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

from ..calibration import Ranges
from ..targets import PRODUCTS, Target
from .fake_quant import Grid, LearntRange, fake_quantize_weight, least_error_limit
from .torch_operators import OPERATORS, Attributes, unsupported

_PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class _Step:
    """One node, its attributes decoded."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes


@dataclass(frozen=True)
class _Weight:
    """Where a quantized constant of the graph gets its values: a float one, and how it is rounded."""

    source: str
    axis: int | None
    largest: int
    """level; 0: a bias, whose rounding to 32 bits is not worth computing"""
    learnt: bool


class GraphNetwork(nn.Module):
    """Images (batch, C, H, W) → logits (batch, classes), through the nodes of an ONNX graph.

    Trainable: weights and biases of every product and BatchNormalization, and the ranges of activations. A
    BatchNormalization that the exporter could not fold into a convolution keeps its running statistics: those of a
    fine-tuning batch would be statistics of another network than the one that is exported.

    Args:
        model: FP32, prepared; its constants are the values to begin with.
        quantized: `with_qdq` of it, or the same model for a float network.
        ranges: of activations, to begin with.
        target: whose grid.
        bits: of activations and weights. At 8 a weight's scale is what the quantizer will compute from it, its
            channel's largest value over the target's highest level; below, where nothing is exported, it is learnt too.
        edge_bits: of the first and the last product and what they read.

    Raises:
        UsageError: an operator that has no form here (named, with its layer).
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
        _require_known(self._steps)
        constants = {t.name: numpy_helper.to_array(t) for m in (quantized, model) for t in m.graph.initializer}
        slices, edges = _slices(model), _edges(self._steps)
        at_edges = {name for step in self._steps if step.name in edges for name in step.inputs}
        self._weights = _weights(
            self._steps, constants, slices, lambda name: edge_bits if name in at_edges else bits, target.weight_max
        )
        self._place_parameters(_dequantized(self._steps, constants, self._weights), slices)
        self._place_limits()
        wide = {s.inputs[1] for s in self._steps if s.operator == "DequantizeLinear" and s.outputs[0] in at_edges}
        self._place_ranges(ranges, lambda scale: edge_bits if scale in wide else bits)

    def _place_parameters(self, constants: Mapping[str, np.ndarray], slices: Mapping[str, int | None]) -> None:
        self._names: dict[str, int] = {}
        self._constants: list[str] = []
        self._shapes: dict[str, Tensor] = {}
        self.parameters_in_units = nn.ParameterList()
        used = {name for step in self._steps if step.operator not in _PAIR for name in step.inputs}
        used |= {weight.source for weight in self._weights.values()}
        for name in sorted(used & set(constants)):
            value = torch.from_numpy(constants[name].copy())
            if name in slices:
                unit = _unit(value, slices[name])
                self.register_buffer(f"unit{len(self._names)}", unit)
                self._names[name] = len(self._names)
                self.parameters_in_units.append(nn.Parameter(value / unit))
            elif value.is_floating_point():
                self.register_buffer(f"constant{len(self._constants)}", value)
                self._constants.append(name)
            else:
                # Shapes and axes stay on the CPU, where they are read.
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
        """A trainable constant of the graph."""
        index = self._names[name]
        return self.parameters_in_units[index] * self.get_buffer(f"unit{index}")

    def forward(self, images: Tensor) -> Tensor:
        """The graph's output for its input."""
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
        """A copy of the FP32 graph with the values of now."""
        copy = ModelProto()
        copy.CopyFrom(model)
        for tensor in copy.graph.initializer:
            if tensor.name in self._names:
                array = self.value(tensor.name).cpu().contiguous().numpy()
                tensor.CopyFrom(numpy_helper.from_array(array.reshape(tuple(tensor.dims)), tensor.name))
        return copy

    def ranges(self) -> Ranges:
        """Tensor → its learnt range."""
        return {
            tensor: self.learnt_ranges[self._scales[scale]].range()  # pyright: ignore[reportCallIssue]
            for scale, tensor in self._tensors.items()
        }

    def range_parameters(self) -> list[nn.Parameter]:
        """What is learnt in the logarithmic domain: ranges of activations, and below 8 bits those of weights."""
        return [*self.learnt_ranges.parameters(), *self.log_limits]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Weights and biases, each in units of its channel's root mean square."""
        return list(self.parameters_in_units)


def _step(node: NodeProto) -> _Step:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    decoded = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
    return _Step(node.name, node.op_type, tuple(node.input), tuple(node.output), decoded)


def _require_known(steps: list[_Step]) -> None:
    for step in steps:
        if step.operator not in _PAIR and (why := unsupported(step.operator, step.attributes)):
            raise UsageError(
                f"Fine-tuning has no differentiable form of {step.operator} (layer '{step.name}').",
                why=why,
                fix="Export this student without --finetune.",
            )


def _edges(steps: list[_Step]) -> set[str]:
    """Names of the first and the last product."""
    products = [step.name for step in steps if step.operator in PRODUCTS]
    return {products[0], products[-1]} if products else set()


def _weights(
    steps: list[_Step],
    constants: Mapping[str, np.ndarray],
    trainable: Collection[str],
    bits: Callable[[str], int],
    largest: int,
) -> dict[str, _Weight]:
    """Quantized constants and the trainable ones that they stand for."""
    found = {}
    for step in steps:
        constant = step.inputs[0]
        if step.operator != "DequantizeLinear" or constant not in constants:
            continue
        source, width = constant.removesuffix("_quantized"), bits(step.outputs[0])
        if source not in trainable:
            continue
        if constants[constant].dtype.itemsize > 1:
            found[constant] = _Weight(source, None, 0, False)
        else:
            axis = step.attributes.get("axis", 1) if constants[step.inputs[1]].ndim else None
            level = largest if width == 8 else 2 ** (width - 1) - 1
            found[constant] = _Weight(source, axis, level, width < 8)
    return found


def _dequantized(
    steps: list[_Step], constants: Mapping[str, np.ndarray], weights: Mapping[str, _Weight]
) -> dict[str, np.ndarray]:
    """All constants, those that stay quantized also in floats, under the name of what dequantizes them."""
    found = dict(constants)
    for step in steps:
        constant = step.inputs[0]
        if step.operator == "DequantizeLinear" and constant in constants and constant not in weights:
            scale, zero = constants[step.inputs[1]], constants[step.inputs[2]]
            shape = [1] * constants[constant].ndim
            if scale.ndim:
                shape[step.attributes.get("axis", 1)] = -1
            levels = constants[constant].astype(np.float32) - zero.astype(np.float32).reshape(
                shape if scale.ndim else ()
            )
            found[step.outputs[0]] = levels * scale.reshape(shape if scale.ndim else ())
    return found


def _slices(model: ModelProto) -> dict[str, int | None]:
    """Trainable constants, and the axis along which their output channels lie (None: one unit for all)."""
    kinds = {t.name: t for t in model.graph.initializer}
    found: dict[str, int | None] = {}
    for node in model.graph.node:
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        if node.op_type in PRODUCTS:
            axes = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1}
            places = {1: axes.get(node.op_type, -1), 2: None}
        elif node.op_type == "BatchNormalization":
            places = {1: None, 2: None}
        else:
            continue
        for place, axis in places.items():
            name = node.input[place] if place < len(node.input) else ""
            if name in kinds and kinds[name].data_type == TensorProto.FLOAT:
                found[name] = axis
    return found


def _unit(value: Tensor, axis: int | None) -> Tensor:
    """Root mean square of each slice; of all where a slice is zero, and 1 where all is."""
    overall = value.square().mean().sqrt()
    overall = overall if overall > 0 else torch.ones(())
    if axis is None:
        return overall
    others = [a for a in range(value.ndim) if a != axis % value.ndim]
    unit = value.square().mean(dim=others, keepdim=True).sqrt() if others else value.abs()
    return torch.where(unit > 0, unit, overall)


def _owner(scale: str, tensor: str, ranges: Ranges) -> str:
    """The tensor from whose range a scale was computed: operators that move bytes share the scale of their input."""
    for suffix in ("_scale", "_skip_scale"):
        if scale.endswith(suffix) and scale.removesuffix(suffix) in ranges:
            return scale.removesuffix(suffix)
    return tensor
