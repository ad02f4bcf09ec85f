"""What the tests of exports share: a network of a library, exported once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nayer_edge.config import InputSpec
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
