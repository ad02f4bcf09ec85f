"""CIFAR ResNets (He et al., CVPR 2016, arXiv 1512.03385): the small ones of §4.2 and ResNet-18/34 with a 3×3 stem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nayer_edge.models.zoo.initialise import initialise


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, whose module name differs between codebases."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self._shortcut = shortcut
        projection = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.add_module(shortcut, projection)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + getattr(self, self._shortcut)(x))


class ResNet(nn.Module):
    """(B, channels, H, W) → (B, classes).

    Args:
        widths: channels of each stage; the first keeps the resolution, each later one halves it.
        blocks: basic blocks of each stage.
        shortcut, head: names of these modules in the state dict.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        channels: int,
        classes: int,
        shortcut: str,
        head: str,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self._stages = [f"layer{number}" for number in range(1, len(widths) + 1)]
        self._head = head
        inputs = widths[0]
        for number, (stage, width, depth) in enumerate(zip(self._stages, widths, blocks, strict=True)):
            layers = []
            for index in range(depth):
                stride = 2 if index == 0 and number > 0 else 1
                layers.append(BasicBlock(inputs, width, stride, shortcut))
                inputs = width
            self.add_module(stage, nn.Sequential(*layers))
        self.add_module(head, nn.Linear(inputs, classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self._stages:
            x = getattr(self, stage)(x)
        return getattr(self, self._head)(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def small_resnet(depth: int, channels: int, classes: int, width: int = 16) -> ResNet:
    """ResNet-(6n + 2), widths w, 2w, 4w with w = 16 as published; keys conv1, bn1, layer1…3, downsample, fc."""
    n = (depth - 2) // 6
    return ResNet((width, 2 * width, 4 * width), (n, n, n), channels, classes, shortcut="downsample", head="fc")


def resnet18(channels: int, classes: int) -> ResNet:
    """ResNet-18, 3×3 stem, no max-pooling; keys conv1, bn1, layer1…4, shortcut, linear."""
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), channels, classes, shortcut="shortcut", head="linear")


def resnet34(channels: int, classes: int) -> ResNet:
    """ResNet-34, 3×3 stem, no max-pooling; keys conv1, bn1, layer1…4, shortcut, linear."""
    return ResNet((64, 128, 256, 512), (3, 4, 6, 3), channels, classes, shortcut="shortcut", head="linear")
