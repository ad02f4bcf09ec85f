"""Library networks adapted to other channels and small images, compared with the originals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.models.adapt import lower_strides, replace_channels
from nayer_edge.models.load import build_classifier

CLASSES = ("a", "b", "c")


def last_grid(network: nn.Module, pixels: int) -> tuple[int, ...]:
    """Size of the last feature map larger than 1×1."""
    grids: list[tuple[int, ...]] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: grids.append(tuple(output.shape[-2:])))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, pixels, pixels))
    for handle in handles:
        handle.remove()
    # Squeeze-and-excitation works on 1×1 maps.
    return next(grid for grid in reversed(grids) if grid != (1, 1))


@pytest.mark.parametrize(
    "model",
    [
        "torchvision:resnet18",
        "torchvision:mobilenet_v2",
        "torchvision:mobilenet_v3_small",
        "torchvision:shufflenet_v2_x1_0",
        "torchvision:efficientnet_b0",
        "timm:mobilenetv3_small_100",
    ],
)
@pytest.mark.parametrize("pixels", [16, 32, 64])
def test_small_images_end_on_a_grid_of_four(model: str, pixels: int) -> None:
    spec = InputSpec(height=pixels, width=pixels)
    with torch.device("meta"):  # shapes alone
        small, library = build_classifier(f"{model}@{pixels}", spec, CLASSES), build_classifier(model, spec, CLASSES)
        assert last_grid(small.backbone, pixels) == (4, 4)
        assert last_grid(library.backbone, 224) == (7, 7), "the library's own network was altered"
    shapes = [{name: tensor.shape for name, tensor in n.backbone.state_dict().items()} for n in (small, library)]
    assert shapes[0] == shapes[1], "the library's weights no longer match"
    assert small.model == f"{model}@{pixels}"
    assert len(small.rebuild["lowered_strides"]) >= {64: 1, 32: 2, 16: 3}[pixels]


def test_the_resnet_of_the_literature() -> None:
    """CIFAR variants of ResNet-18 have a stride-1 stem and no max-pooling (here with the library's kernel size)."""
    spec = InputSpec(height=32, width=32)
    network = build_classifier("torchvision:resnet18@32", spec, CLASSES)
    assert network.rebuild["lowered_strides"] == ["conv1", "maxpool"]
    assert isinstance(network.backbone.get_submodule("maxpool"), nn.Identity)
    stem = network.backbone.get_submodule("conv1")
    assert (stem.kernel_size, stem.stride, stem.padding) == ((7, 7), (1, 1), (3, 3))


def test_branches_change_together() -> None:
    spec = InputSpec(height=16, width=16)
    network = build_classifier("torchvision:resnet18@16", spec, CLASSES)
    assert set(network.rebuild["lowered_strides"][2:]) == {"layer2.0.conv1", "layer2.0.downsample.0"}


def test_tracing_does_not_change_the_network() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert lower_strides(network, 3, 8) == ["0"]
    assert network.training
    assert not network[0]._forward_pre_hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("model", ["torchvision:resnet18@200", "torchvision:squeezenet1_1@64"])
def test_strides_that_need_no_lowering_are_an_error(model: str) -> None:
    with pytest.raises(UsageError, match="cannot be lowered for images of") as caught:
        build_classifier(model, InputSpec(height=224, width=224), CLASSES)
    assert "Remove @" in caught.value.fix
    with pytest.raises(UsageError, match="cannot be lowered") as caught:
        lower_strides(nn.Sequential(nn.Conv2d(3, 4, 3)), 3, 32)
    assert "no strided layers" in caught.value.why


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_other_channels_change_only_the_first_convolution(channels: int) -> None:
    first = nn.Conv2d(3, 8, 3, (2, 1), 2, dilation=2, bias=False)
    network = nn.Sequential(nn.Sequential(first), nn.Conv2d(8, 8, 3))
    second = network[1]
    replace_channels(network, channels)
    stem = network[0][0]
    assert stem.weight.shape == (8, channels, 3, 3)
    assert (stem.stride, stem.padding, stem.dilation, stem.bias) == ((2, 1), (2, 2), (2, 2), None)
    assert network[1] is second
    images = torch.rand(2, channels, 9, 12)
    assert network[0](images).shape[-2:] == first(torch.rand(2, 3, 9, 12)).shape[-2:]
