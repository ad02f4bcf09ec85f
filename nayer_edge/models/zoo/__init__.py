"""CIFAR networks of the literature, with their usual state-dict keys, for any channels, image size and classes.

wrn_<d>_<k>             WideResNet, pre-activation (Zagoruyko & Komodakis 2016), d = 6n + 4
resnet8/20/32/56        CIFAR ResNet (He et al. 2016, §4.2) with 1×1-convolution shortcuts; resnet8_w4: with 4 channels
                        in the first stage instead of 16
resnet18/34             ResNet with a 3×3 stem, as used throughout the data-free literature
vgg11_bn                VGG-11 with BatchNorm and a single linear layer
mobilenet               MobileNet v1 (Howard et al. 2017), subsampled 8 times instead of 32; mobilenet_w8: with 8
                        channels in the first convolution instead of 32
"""

from __future__ import annotations

import re

from torch import nn

from nayer_edge.errors import UsageError, nearest
from nayer_edge.models.zoo.mobilenet import MobileNet
from nayer_edge.models.zoo.resnet import resnet18, resnet34, small_resnet
from nayer_edge.models.zoo.vgg import vgg11_bn
from nayer_edge.models.zoo.wrn import WideResNet

NAMES = ("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "resnet8", "resnet20", "resnet32", "resnet56",
         "resnet18", "resnet34", "vgg11_bn", "mobilenet")  # fmt: skip


def build(name: str, channels: int, classes: int) -> nn.Module:
    """Builds an untrained network: (B, channels, H, W) normalised images → (B, classes) logits.

    Raises:
        UsageError: there is no such network.
    """
    if match := re.fullmatch(r"wrn_(\d{1,3})_(\d{1,2})", name):
        return WideResNet(int(match[1]), int(match[2]), channels, classes)
    if match := re.fullmatch(r"resnet(8|20|32|56)(?:_w([1-9]\d{0,2}))?", name):
        return small_resnet(int(match[1]), channels, classes, int(match[2] or 16))
    if match := re.fullmatch(r"mobilenet(?:_w([1-9]\d{0,2}))?", name):
        return MobileNet(int(match[1] or 32), channels, classes)
    for factory in (resnet18, resnet34, vgg11_bn):
        if factory.__name__ == name:
            return factory(channels, classes)
    raise UsageError(
        f"The zoo has no network 'nayer:{name}'.{nearest(name, NAMES)}",
        fix=f"It has: {', '.join(NAMES)}; WideResNets of any depth 6n+4 and width as wrn_<depth>_<width>; "
        "narrower ones as resnet8_w<channels> and mobilenet_w<channels>.",
    )
