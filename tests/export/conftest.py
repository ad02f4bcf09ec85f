"""What the tests of exports share: a network of a library, exported once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.export.runtimes import litert
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.models.load import build_classifier


@pytest.fixture(scope="session")
def mobilenet() -> nn.Module:
    """A MobileNetV3-small with random weights for images of 3×32×32, whose logits differ between images."""
    torch.manual_seed(0)
    model = build_classifier(
        "torchvision:mobilenet_v3_small", InputSpec(height=32, width=32), [str(i) for i in range(10)]
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
            if isinstance(module, nn.Linear):
                module.weight *= 10
        # The images of test_other_tools.py: this network's logits differ clearly only between images that it has seen.
        model.train()(torch.from_numpy(np.random.default_rng(0).random((64, 3, 32, 32), np.float32)))
    return model.eval()


@pytest.fixture(scope="session")
def mobilenet_onnx(mobilenet: nn.Module, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Its FP32 file."""
    return once("mobilenet", lambda folder: to_onnx(mobilenet, (3, 32, 32), folder / "m.onnx")) / "m.onnx"


Convert = Callable[[nn.Module, tuple[int, int, int]], bytes]


@pytest.fixture(scope="session")
def convert_once(once: Callable[[str, Callable[[Path], object]], Path]) -> Convert:
    """LiteRT's conversion, which takes most of a build: made once of each network, whatever the precision."""
    convert: Convert = litert._converted  # pyright: ignore[reportAssignmentType]

    def converted(network: nn.Module, shape: tuple[int, int, int]) -> bytes:
        kinds = [f"{type(module).__module__}.{type(module).__qualname__}" for module in network.modules()]
        key = hashlib.sha256(f"{shape} {network!r} {kinds}".encode())
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            key.update(tensor.detach().numpy().tobytes())
        folder = once(
            f"litert-{key.hexdigest()[:20]}",
            lambda folder: (folder / "converted").write_bytes(convert(network, shape)),
        )
        return (folder / "converted").read_bytes()

    return converted


@pytest.fixture
def litert_converts_once(convert_once: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of LiteRT files in this test use `convert_once`."""
    monkeypatch.setattr(litert, "_converted", convert_once)


def patterns(n: int, shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of ten noisy patterns, float32 in [0, 1], and their labels."""
    channels, height, width = shape
    base = torch.rand(10, channels, 4, 4, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = nn.functional.interpolate(base[labels], size=(height, width))
    noisy = images + 0.15 * torch.randn(n, *shape, generator=generator)
    return noisy.clamp(0, 1).numpy(), labels.numpy()


def small_student(shape: tuple[int, int, int]) -> nn.Module:
    """A ResNet-8 with random convolutions that tells the ten patterns apart: BatchNorm and head fit their features."""
    torch.manual_seed(0)
    spec = InputSpec(channels=shape[0], height=shape[1], width=shape[2], mean=[0.45] * shape[0], std=[0.25] * shape[0])
    model = build_classifier("nayer:resnet8", spec, [str(i) for i in range(10)])
    images, labels = patterns(256, shape, seed=0)
    seen: list[torch.Tensor] = []
    head = model.backbone.fc
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(torch.from_numpy(images))
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model.eval()(torch.from_numpy(images))
        hook.remove()
        # The nearest class mean as a linear layer.
        means = torch.stack([seen[0][torch.from_numpy(labels) == label].mean(0) for label in range(10)])
        centre = means.mean(0)
        head.weight.copy_(10 * (means - centre))
        head.bias.copy_(-5 * (means**2 - centre**2).sum(1))
    return model


@pytest.fixture(scope="session")
def make_student() -> Callable[[tuple[int, int, int]], nn.Module]:
    """(C, H, W) → `small_student`."""
    return functools.cache(small_student)


@pytest.fixture(scope="session")
def draw_patterns() -> Callable[..., np.ndarray]:
    """(n, shape, seed) → images of `patterns`."""
    return lambda n, shape, seed: patterns(n, shape, seed)[0]
