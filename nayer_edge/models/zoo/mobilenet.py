"""MobileNet v1 (Howard et al. 2017, arXiv 1704.04861, Table 1) for small images: depthwise separable convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nayer_edge.models.zoo.initialise import initialise

BLOCKS = ((2, 1), (4, 1), (4, 1), (8, 2), (8, 1), (16, 2), *((16, 1),) * 5, (32, 2), (32, 1))
"""(channels as a multiple of the first convolution's, stride) of each block"""


class SeparableConv(nn.Module):
    """A 3×3 convolution of each channel, then a 1×1 convolution across them, each with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x))))))


class MobileNet(nn.Module):
    """(B, channels, H, W), any size → (B, classes); keys conv1, bn1, blocks.0…12, fc.

    The first two of the paper's five strides are 1, so the last feature map has an eighth of the image's side instead
    of a thirty-second.

    Args:
        width: channels of the first convolution, 32 in the paper.
    """

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential()
        inputs = width
        for factor, stride in BLOCKS:
            self.blocks.append(SeparableConv(inputs, factor * width, stride))
            inputs = factor * width
        self.fc = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
