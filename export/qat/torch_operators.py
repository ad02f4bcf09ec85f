"""ONNX operators as differentiable torch functions of their attributes and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Attributes = Mapping[str, Any]

PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
"""ONNX → torch"""


def unsupported(operator: str, attributes: Attributes) -> str:
    """Why a node is not supported; empty if it is."""
    if operator not in OPERATORS:
        return f"Supported are {', '.join(sorted(OPERATORS))}."
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        return f"It pads with auto_pad={attributes['auto_pad']}."
    if operator == "Pad" and attributes.get("mode", "constant") not in PAD_MODES:
        return f"It pads with mode '{attributes['mode']}'."
    pads = list(attributes.get("pads", ()))
    if operator in ("AveragePool", "ConvTranspose") and pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        return "Its padding is asymmetric."
    return ""


def _padding(attributes: Attributes, rank: int) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis."""
    pads = attributes.get("pads") or [0] * 2 * rank
    return list(pads[:rank]), list(pads[rank:])


def _padded(x: Tensor, attributes: Attributes, value: float) -> tuple[Tensor, list[int]]:
    """x after asymmetric padding, and the symmetric padding that is left to the operator itself."""
    before, after = _padding(attributes, x.ndim - 2)
    if before == after:
        return x, before
    pairs = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return F.pad(x, pairs, value=value), [0] * len(before)


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, padding = _padded(x, a, 0.0)
    function = {3: F.conv1d, 4: F.conv2d}[x.ndim]
    ones = [1] * (x.ndim - 2)
    return function(x, weight, bias, a.get("strides", ones), padding, a.get("dilations", ones), a.get("group", 1))


def _conv_transpose(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    before, _ = _padding(a, 2)
    extra, stride, dilation = a.get("output_padding", [0, 0]), a.get("strides", [1, 1]), a.get("dilations", [1, 1])
    return F.conv_transpose2d(x, weight, bias, stride, before, extra, a.get("group", 1), dilation)


def _gemm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = x.T if a.get("transA") else x
    product = a.get("alpha", 1.0) * (x @ (weight.T if a.get("transB") else weight))
    return product if bias is None else product + a.get("beta", 1.0) * bias


def _batch_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, eps=a.get("epsilon", 1e-5))


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    x, padding = _padded(x, a, float("-inf"))
    return F.max_pool2d(
        x, a["kernel_shape"], a.get("strides", 1), padding, a.get("dilations", 1), bool(a.get("ceil_mode", 0))
    )


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    counted = bool(a.get("count_include_pad", 0))
    return F.avg_pool2d(
        x, a["kernel_shape"], a.get("strides", 1), _padding(a, 2)[0], bool(a.get("ceil_mode", 0)), counted
    )


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    kept = [x.shape[i] if n == 0 and not a.get("allowzero") else n for i, n in enumerate(shape.tolist())]
    return x.reshape(kept)


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    parts = sizes.tolist() if sizes is not None else -(-x.shape[axis] // a["num_outputs"])
    return tuple(torch.split(x, parts, dim=axis))


def _slice(
    a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    del a
    index = [slice(None)] * x.ndim
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        axis = i if axes is None else int(axes[i])
        step = 1 if steps is None else int(steps[i])
        if step < 0:
            # torch has no negative steps, so the elements are selected by index.
            places = range(x.shape[axis])[slice(start, end if end >= -x.shape[axis] else None, step)]
            x = x.index_select(axis, torch.tensor(list(places), device=x.device))
        else:
            index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _pad(a: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    ends = pads.tolist()
    chosen = range(x.ndim) if axes is None else [axis % x.ndim for axis in axes.tolist()]
    pairs = {axis: (ends[i], ends[i + len(ends) // 2]) for i, axis in enumerate(chosen)}
    flat = [side for axis in reversed(range(x.ndim)) for side in pairs.get(axis, (0, 0))]
    while flat[-2:] == [0, 0]:
        # torch reflects only the last axes; the axes before them have no padding.
        del flat[-2:]
    mode = PAD_MODES[a.get("mode", "constant")]
    return F.pad(x, flat, mode=mode, value=0.0 if value is None or mode != "constant" else float(value))


def _reduce_mean(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.mean(dim=None if axes is None else axes.tolist(), keepdim=bool(a.get("keepdims", 1)))


def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    del a
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[a.get("axis", -1) :], scale, bias, a.get("epsilon", 1e-5))


def _clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    del a
    return x if low is None and high is None else x.clamp(low, high)


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Add": lambda _, x, y: x + y,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda a, *parts: torch.cat(parts, dim=a["axis"]),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": lambda _, x, y: x / y,
    "Flatten": lambda a, x: x.reshape(math.prod(x.shape[: a.get("axis", 1)]), -1),
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, x: x.mean(dim=list(range(2, x.ndim)), keepdim=True),
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda _, x: F.hardswish(x),
    "Identity": lambda _, x: x,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "MatMul": lambda _, x, y: x @ y,
    "MaxPool": _max_pool,
    "Mul": lambda _, x, y: x * y,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": lambda _, x: F.relu(x),
    "Reshape": _reshape,
    "Sigmoid": lambda _, x: torch.sigmoid(x),
    "Slice": _slice,
    "Softmax": lambda a, x: F.softmax(x, dim=a.get("axis", -1)),
    "Split": _split,
    "Squeeze": lambda _, x, axes: x.squeeze(axes.tolist()),
    "Sub": lambda _, x, y: x - y,
    "Tanh": lambda _, x: torch.tanh(x),
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
}
"""ONNX operator → torch function of its attributes and inputs"""
