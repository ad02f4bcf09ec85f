"""VGG-11 with BatchNorm (Simonyan & Zisserman, ICLR 2015, arXiv 1409.1556, configuration A) and one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nayer_edge.models.zoo.initialise import initialise

# Convolution widths per block; blocks end with 2×2 max-pooling, the last one with global average pooling.
BLOCKS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG(nn.Module):
    """(B, channels, H, W), any size → (B, classes); keys block0…4, classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        inputs = channels
        for number, widths in enumerate(BLOCKS):
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            self.add_module(f"block{number}", nn.Sequential(*layers))
        self.classifier = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(len(BLOCKS)):
            x = getattr(self, f"block{number}")(x)
            x = F.max_pool2d(x, 2, ceil_mode=True) if number < len(BLOCKS) - 1 else F.adaptive_avg_pool2d(x, 1)
        return self.classifier(torch.flatten(x, 1))


def vgg11_bn(channels: int, classes: int) -> VGG:
    """VGG-11-BN."""
    return VGG(channels, classes)
