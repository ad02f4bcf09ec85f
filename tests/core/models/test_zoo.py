"""Parameter counts of the literature, from a formula over the layers, and the usual state-dict keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nayer_edge.config import InputSpec
from nayer_edge.data.datasets import load
from nayer_edge.errors import UsageError
from nayer_edge.memory_bank import to_unit
from nayer_edge.models import zoo
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.state_dicts import load_weights, read_state_dict
from nayer_edge.runtime.compute import choose


def conv(inputs: int, outputs: int, size: int = 3) -> int:
    return inputs * outputs * size * size


def norm(channels: int) -> int:
    return 2 * channels


def wrn(depth: int, width: int, channels: int = 3, classes: int = 10) -> int:
    """Zagoruyko & Komodakis 2016, Table 1: (d − 4)/6 pre-activation blocks of two convolutions per stage."""
    count, inputs = conv(channels, 16), 16
    for outputs in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            count += norm(inputs) + conv(inputs, outputs) + norm(outputs) + conv(outputs, outputs)
            count += conv(inputs, outputs, 1) if inputs != outputs else 0
            inputs = outputs
    return count + norm(inputs) + inputs * classes + classes


def resnet(widths: tuple[int, ...], blocks: tuple[int, ...], channels: int = 3, classes: int = 10) -> int:
    """He et al. 2016: basic blocks; where the width changes, a 1×1 convolution with BatchNorm as shortcut."""
    count, inputs = conv(channels, widths[0]) + norm(widths[0]), widths[0]
    for outputs, depth in zip(widths, blocks, strict=True):
        for _ in range(depth):
            count += conv(inputs, outputs) + norm(outputs) + conv(outputs, outputs) + norm(outputs)
            count += conv(inputs, outputs, 1) + norm(outputs) if inputs != outputs else 0
            inputs = outputs
    return count + inputs * classes + classes


def vgg11(channels: int = 3, classes: int = 10) -> int:
    """Simonyan & Zisserman 2015, configuration A, convolutions with bias and BatchNorm; one linear layer."""
    count, inputs = 0, channels
    for outputs in (64, 128, 256, 256, 512, 512, 512, 512):
        count += conv(inputs, outputs) + outputs + norm(outputs)
        inputs = outputs
    return count + inputs * classes + classes


def mobilenet(width: int, channels: int = 3, classes: int = 10) -> int:
    """Howard et al. 2017, Table 1: a 3×3 convolution per channel and a 1×1 convolution in each block."""
    count, inputs = conv(channels, width) + norm(width), width
    for outputs in (2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32):
        count += conv(1, inputs) + norm(inputs) + conv(inputs, outputs * width, 1) + norm(outputs * width)
        inputs = outputs * width
    return count + inputs * classes + classes


def parameters(name: str, channels: int = 3, classes: int = 10) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in zoo.build(name, channels, classes).parameters())


# Parameter counts of the data-free literature's models for CIFAR-10 (rounded in its tables: WRN-40-2 2.2M,
# WRN-16-2 0.7M, WRN-40-1 0.6M, WRN-16-1 0.2M, ResNet-34 21.3M, ResNet-18 11.2M; He et al. 2016, Table 6:
# ResNet-20 0.27M, ResNet-56 0.85M).
COUNTS = {
    "wrn_16_1": (175_066, wrn(16, 1)),
    "wrn_16_2": (691_674, wrn(16, 2)),
    "wrn_40_1": (563_930, wrn(40, 1)),
    "wrn_40_2": (2_243_546, wrn(40, 2)),
    "resnet20": (272_474, resnet((16, 32, 64), (3, 3, 3))),
    "resnet56": (855_770, resnet((16, 32, 64), (9, 9, 9))),
    "resnet18": (11_173_962, resnet((64, 128, 256, 512), (2, 2, 2, 2))),
    "resnet34": (21_282_122, resnet((64, 128, 256, 512), (3, 4, 6, 3))),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_literature(name: str) -> None:
    published, counted = COUNTS[name]
    assert parameters(name) == counted == published


@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (4, 100), (13, 1000)])
def test_parameter_counts_with_other_channels_and_classes(channels: int, classes: int) -> None:
    assert parameters("wrn_16_1", channels, classes) == wrn(16, 1, channels, classes)
    assert parameters("wrn_10_3", channels, classes) == wrn(10, 3, channels, classes)
    for depth in (8, 20, 32):
        blocks = ((depth - 2) // 6,) * 3
        assert parameters(f"resnet{depth}", channels, classes) == resnet((16, 32, 64), blocks, channels, classes)
        assert parameters(f"resnet{depth}_w4", channels, classes) == resnet((4, 8, 16), blocks, channels, classes)
    assert parameters("vgg11_bn", channels, classes) == vgg11(channels, classes)
    assert parameters("mobilenet_w4", channels, classes) == mobilenet(4, channels, classes)


@pytest.mark.parametrize(("name", "millions"), [("mobilenet", 4.2), ("mobilenet_w24", 2.6), ("mobilenet_w16", 1.3)])
def test_mobilenets_have_the_size_of_the_paper(name: str, millions: float) -> None:
    """Width multipliers 1, 0.75 and 0.5, for 1000 classes."""
    assert round(parameters(name, classes=1000) / 1e6, 1) == millions


def test_mobilenet_has_the_weights_of_timms() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs, ours = timm.create_model("mobilenetv1_100"), zoo.build("mobilenet", 3, 1000)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


def batchnorm_keys(prefix: str) -> Iterator[str]:
    for suffix in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        yield f"{prefix}.{suffix}"


def test_wrn_40_2_has_the_literatures_keys() -> None:
    wanted = {"conv1.weight", "fc.weight", "fc.bias", *batchnorm_keys("bn1")}
    for block in (1, 2, 3):
        for index in range(6):
            layer = f"block{block}.layer.{index}"
            wanted |= {*batchnorm_keys(f"{layer}.bn1"), *batchnorm_keys(f"{layer}.bn2")}
            wanted |= {f"{layer}.conv1.weight", f"{layer}.conv2.weight"}
            if index == 0:
                wanted.add(f"{layer}.convShortcut.weight")
    assert set(zoo.build("wrn_40_2", 3, 10).state_dict()) == wanted


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("resnet20", r"(conv1|bn1|fc|layer[123]\.[012]\.(conv[12]|bn[12]|downsample\.[01]))\.\w+"),
        ("resnet18", r"(conv1|bn1|linear|layer[1234]\.[01]\.(conv[12]|bn[12]|shortcut\.[01]))\.\w+"),
        ("vgg11_bn", r"(block[01234]\.\d|classifier)\.\w+"),
        ("mobilenet_w8", r"(conv1|bn1|fc|blocks\.(1?[012]|[3-9])\.(depthwise|pointwise|bn[12]))\.\w+"),
    ],
)
def test_keys_of_the_others(name: str, pattern: str) -> None:
    keys = zoo.build(name, 3, 10).state_dict()
    assert [key for key in keys if not re.fullmatch(pattern, key)] == []


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_name_builds_and_runs(name: str) -> None:
    network = zoo.build(name, 2, 5).eval()
    with torch.no_grad():
        for height, width in ((4, 4), (17, 9)):
            answers = network(torch.rand(2, 2, height, width))
            assert answers.shape == (2, 5)
            assert bool(torch.isfinite(answers).all())


def test_resolutions_are_halved_where_the_papers_say() -> None:
    seen: dict[str, tuple[int, ...]] = {}
    for name, parts in (
        ("wrn_16_1", ("block1", "block2", "block3")),
        ("resnet18", ("layer1", "layer2", "layer4")),
        ("mobilenet_w4", ("blocks.2", "blocks.4", "blocks.10", "blocks.12")),
    ):
        network = zoo.build(name, 3, 10).eval()
        for part in parts:
            network.get_submodule(part).register_forward_hook(
                lambda _module, _inputs, output, key=f"{name} {part}": seen.__setitem__(key, tuple(output.shape[1:]))
            )
        with torch.no_grad():
            network(torch.rand(1, 3, 32, 32))
    assert seen == {
        "wrn_16_1 block1": (16, 32, 32),
        "wrn_16_1 block2": (32, 16, 16),
        "wrn_16_1 block3": (64, 8, 8),
        "resnet18 layer1": (64, 32, 32),
        "resnet18 layer2": (128, 16, 16),
        "resnet18 layer4": (512, 4, 4),
        "mobilenet_w4 blocks.2": (16, 32, 32),
        "mobilenet_w4 blocks.4": (32, 16, 16),
        "mobilenet_w4 blocks.10": (64, 8, 8),
        "mobilenet_w4 blocks.12": (128, 4, 4),
    }


@pytest.mark.parametrize("name", ["wrn_41_2", "wrn_4_1", "wrn_16_0"])
def test_a_depth_that_no_wide_resnet_has(name: str) -> None:
    with pytest.raises(UsageError, match="no WideResNet"):
        zoo.build(name, 3, 10)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'resnet18'") as caught:
        zoo.build("resnet-18", 3, 10)
    assert "wrn_40_2" in caught.value.fix


DATA = os.environ.get("NAYER_EDGE_DATA")


@pytest.mark.skipif(not DATA, reason="NAYER_EDGE_DATA does not point at the CIFAR-10 teacher and images")
def test_the_cifar10_teacher_of_the_benchmarks() -> None:
    folder = Path(str(DATA))
    card = json.loads((folder / "teachers/wrn40_2_cifar10.json").read_text())
    facts = {name: value for name, value in card["input"].items() if name != "range"}
    spec, classes = InputSpec.model_validate(facts), card["classes"]
    classifier = Classifier(zoo.build("wrn_40_2", 3, 10), "nayer:wrn_40_2", spec, classes)
    assert classifier.parameter_count == card["parameters"] == COUNTS["wrn_40_2"][0]
    weights = folder / "teachers/wrn40_2_cifar10.safetensors"
    load_weights(classifier, read_state_dict(weights), weights)
    images = load(str(folder / "cifar10/test.parquet"), "holdout", spec, classes)
    assert len(images) == 10_000
    compute = choose("cpu")
    compute.place(classifier.eval())
    right = 0
    with torch.inference_mode():
        for start in range(0, 1000, 250):
            with compute.autocast():
                answers = classifier(to_unit(images.images[start : start + 250]))
            right += int((answers.argmax(1) == images.labels[start : start + 250]).sum())
    # 92.15 % of all 10,000 (according to its card, confirmed with this code); of the first 1,000 it gets 921 right in
    # float32 and 922 in bfloat16, and another processor's rounding may turn a few.
    assert card["test_top1"] == 0.9215
    assert abs(right - 921.5) <= 3
