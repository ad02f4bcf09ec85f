"""Reproducible random streams, device and precision."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from scipy import stats
from torch import nn

from nayer_edge.runtime.compute import Compute, choose, random_stream, seeded


def test_streams_are_stable() -> None:
    """Streams depend only on their names: these numbers must never change, or old runs could not be reproduced."""
    assert random_stream(0, "round", 3, 1).initial_seed() == 5280138524801733947
    assert random_stream(7, "student", 0).initial_seed() == 4461715525183163624
    drawn = torch.randint(0, 1000, (5,), generator=random_stream(0, "round", 3, 1))
    assert drawn.tolist() == [58, 354, 178, 81, 924]


def test_streams_of_different_purposes_are_independent() -> None:
    names = [(0, "round", 1, 11), (0, "round", 11, 1), (0, "round", 1, 1), (1, "round", 1, 11), (0, "student", 1, 11)]
    drawn = torch.stack([torch.randn(4000, generator=random_stream(*name)) for name in names])
    correlations = torch.corrcoef(drawn) - torch.eye(len(names))
    assert float(correlations.abs().max()) < 4 / 4000**0.5
    for row in drawn:
        assert stats.kstest(row.numpy(), "norm").pvalue > 0.01


def test_streams_do_not_affect_each_other() -> None:
    one, other = random_stream(0, "a"), random_stream(0, "b")
    torch.rand(100, generator=one)
    assert torch.equal(torch.rand(5, generator=other), torch.rand(5, generator=random_stream(0, "b")))


def test_seeded_restores_the_global_stream() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with seeded(9):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), wanted)
    with seeded(9):
        assert torch.equal(torch.rand(3), inside)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision(precision: str) -> None:
    compute = choose("cpu", precision)  # pyright: ignore[reportArgumentType]
    assert compute.device == torch.device("cpu")
    assert compute.bf16 is (precision == "bf16")
    with compute.autocast():
        product = torch.rand(4, 4) @ torch.rand(4, 4)
    assert product.dtype == (torch.bfloat16 if compute.bf16 else torch.float32)
    assert ("bf16 autocast" in compute.reason) is compute.bf16


def test_auto_precision_follows_the_processor() -> None:
    compute = choose("cpu", "auto")
    assert compute.bf16 is ("without" not in compute.reason)


def test_models_are_placed_channels_last() -> None:
    placed = choose("cpu").place(torch.nn.Conv2d(3, 8, 3))
    assert placed.get_parameter("weight").is_contiguous(memory_format=torch.channels_last)


def test_narrow_networks_train_without_corrupting_memory() -> None:
    """oneDNN aborts the process on processors without AVX-512 if the 1×1 convolution of a narrow shortcut is trained in
    channels-last format; in a child process, so that it could not end the tests."""
    script = """
import torch
from nayer_edge.config import InputSpec
from nayer_edge.models.load import build_classifier
from nayer_edge.runtime.compute import choose

torch.set_num_threads(1)
network = choose("cpu").place(build_classifier("nayer:resnet8_w4", InputSpec(height=16, width=16), list("abc")))
for order in [torch.contiguous_format, torch.channels_last] * 3:
    network.train()(torch.rand(16, 3, 16, 16).to(memory_format=order)).sum().backward()
junk = [torch.randn(count) for count in range(1, 4000, 7)]
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_wide_networks_are_channels_last() -> None:
    network = choose("cpu").place(nn.Sequential(nn.Conv2d(8, 4, 3), nn.Conv2d(8, 16, 1, 2)))
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in network)


def test_depthwise_layers_that_bf16_slows_down_stay_in_float32() -> None:
    """To the last bit, also inside autocast; all others are in bf16, and the weights keep their names."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(8, 16, 1, stride=2),
    ]
    network, images = nn.Sequential(*layers), torch.randn(2, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    names = list(network.state_dict())
    compute = Compute(torch.device("cpu"), bf16=True, reason="")
    placed = copy.deepcopy(compute.place(network))
    assert list(placed.state_dict()) == names
    expected = [layer(images) for layer in copy.deepcopy(network)]
    with compute.autocast():
        found = [layer(images.to(torch.bfloat16).float()) for layer in placed]
    exact = [layer(images.to(torch.bfloat16).float()) for layer in placed]
    assert [made.dtype == torch.float32 for made in found] == [True, True, False, False, False]
    for inside, outside, whole in zip(found[:2], exact[:2], expected[:2], strict=True):
        assert torch.equal(inside, outside)
        torch.testing.assert_close(inside, whole, rtol=0.05, atol=0.05)
    usual = Compute(torch.device("cpu"), bf16=False, reason="").place(nn.Conv2d(8, 8, 3, stride=2, groups=8))
    assert type(usual) is nn.Conv2d
