"""WideResNet (Zagoruyko & Komodakis, BMVC 2016, arXiv 1605.07146, Table 1), pre-activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nayer_edge.errors import UsageError
from nayer_edge.models.zoo.initialise import initialise


class Block(nn.Module):
    """BN-ReLU-conv twice; if the width changes, a 1×1 shortcut is applied to the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.convShortcut is None else self.convShortcut(activated))


class Group(nn.Module):
    """The blocks at one resolution."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(Block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-d-k: (B, channels, H, W) → (B, classes).

    Raises:
        UsageError: the depth is not 6n + 4.
    """

    def __init__(self, depth: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise UsageError(
                f"There is no WideResNet of depth {depth} and width {width}.",
                why="The depth must be 6n + 4 (10, 16, 22, 28, 34, 40, …) and the width at least 1.",
            )
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = Group(blocks, 16, 16 * width, stride=1)
        self.block2 = Group(blocks, 16 * width, 32 * width, stride=2)
        self.block3 = Group(blocks, 32 * width, 64 * width, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.adaptive_avg_pool2d(F.relu(self.bn1(x)), 1)
        return self.fc(torch.flatten(x, 1))
