"""Adapts library networks, designed for 224-pixel RGB images, to other channel counts and image sizes."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from nayer_edge.errors import UsageError

TRACE_PIXELS = 224
"""design size of library networks, at which all of their strides can be observed"""
LAST_GRID = 4
"""minimum side of the last feature map after lowering strides; 224-pixel networks end at 7"""


def replace_channels(network: nn.Module, channels: int) -> None:
    """Replaces the first convolution by one with another number of input channels (library models have three)."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            options: dict[str, Any] = {
                "stride": module.stride,
                "padding": module.padding,
                "dilation": module.dilation,
                "bias": module.bias is not None,
            }
            stem = nn.Conv2d(channels, module.out_channels, module.kernel_size, **options)  # pyright: ignore[reportArgumentType]
            _replace(network, name, stem)
            return


def lower_strides(network: nn.Module, channels: int, pixels: int) -> list[str]:
    """Sets a network's first strides to 1, so that the last feature map of a `pixels`-sized image is at least 4×4.

    A network of total stride 32 reduces a 32-pixel image to one position. With its first two strides set to 1, as in
    the literature's CIFAR variants, the last feature map is 4×4. All layers at one resolution change together, so that
    parallel branches keep equal sizes. Kernels and weight shapes do not change; strided pooling layers become the
    identity.

    Returns:
        Names of the changed layers.

    Raises:
        UsageError: the network has no strided layers, or its strides are low enough already.
    """
    levels = _strided_levels(network, channels)
    strides = [max(_stride(module) for _, module in level) for level in levels]
    changed: list[str] = []
    for number, level in enumerate(levels):
        if math.ceil(pixels / math.prod(strides[number:])) >= LAST_GRID:
            break
        for name, module in level:
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
            else:
                _replace(network, name, nn.Identity())
            changed.append(name)
    if not changed:
        raise UsageError(
            f"Its strides cannot be lowered for images of {pixels} pixels.",
            why=f"Its total stride is only {math.prod(strides)}." if strides else "It has no strided layers.",
            fix=f"Remove @{pixels} from the model's name.",
        )
    return changed


def _strided_levels(network: nn.Module, channels: int) -> list[list[tuple[str, nn.Module]]]:
    """Strided convolutions and pooling layers grouped by input resolution, the finest first."""
    traced = copy.deepcopy(network).to("meta").eval()
    seen: dict[int, list[str]] = {}
    handles = []

    def watch(name: str) -> Any:
        def gather(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(min(inputs[0].shape[-2:]), []).append(name)

        return gather

    for name, module in traced.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and _stride(module) > 1:
            handles.append(module.register_forward_pre_hook(watch(name)))
    with torch.no_grad():
        traced(torch.zeros(1, channels, TRACE_PIXELS, TRACE_PIXELS, device="meta"))
    return [[(name, network.get_submodule(name)) for name in seen[size]] for size in sorted(seen, reverse=True)]


def _stride(module: nn.Module) -> int:
    stride: Any = module.stride
    return stride if isinstance(stride, int) else max(stride)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)
