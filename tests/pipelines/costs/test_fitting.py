"""Sizes that fit the device: batches within the memory, and a generator that costs no more than the teacher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from nayer_edge.config import InputSpec
from nayer_edge.pipelines.costs import fitting
from nayer_edge.pipelines.costs.budget import VIEWS
from nayer_edge.pipelines.costs.fitting import Device, fit, generator_channels, generator_flop
from nayer_edge.pipelines.costs.model_cost import Cost


def test_what_the_generator_costs() -> None:
    """Multiply-accumulates of its layers by hand: noisy linear, linear, three convolutions of 3×3."""
    by_hand = 384 * 1000 + 1000 * 128 * 8 * 8
    by_hand += 9 * (128 * 128 * 16 * 16 + 128 * 64 * 32 * 32 + 64 * 3 * 32 * 32)
    assert generator_flop(InputSpec(), 10, 64) == pytest.approx(2 * by_hand, rel=1e-6)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("pixels", [16, 32, 224])
@pytest.mark.parametrize("gib", [1, 8, 80])
def test_batches_fit_the_memory(kind: Literal["cpu", "cuda"], pixels: int, gib: int) -> None:
    spec = InputSpec(height=pixels, width=pixels)
    teacher = Cost(3e6 * pixels**2, 4e4 * pixels**2 / 16, 10**7)
    student = Cost(3e5 * pixels**2, 4e3 * pixels**2 / 16, 10**6)
    device = Device(kind, "a device", gib * 2**30)
    sizes = fit(spec, teacher, student, device, 10)
    assert 3 * teacher.activation_bytes * sizes.batch <= 0.4 * device.free_bytes or sizes.batch == 8
    each = teacher.activation_bytes + 3 * student.activation_bytes
    assert each * sizes.student_batch <= 0.4 * device.free_bytes or sizes.student_batch == 8
    assert sizes.bank_mib * 2**20 >= sizes.batch * 3 * pixels**2, "a round fits into the bank"
    assert sizes.bank_mib <= max(gib * 2**10 / 4, 4 * sizes.batch * 3 * pixels**2 / 2**20 + 1), "half is left"
    if kind == "cuda" and gib == 80 and pixels == 32:
        assert (sizes.batch, sizes.student_batch, sizes.reasons) == (400, 512, {})
    smaller = fit(spec, teacher, student, Device(kind, "", 2**28), 10)
    assert smaller.batch <= sizes.batch
    assert smaller.student_batch <= sizes.student_batch
    assert ("batch" in smaller.reasons) == (
        smaller.batch < fit(spec, teacher, student, Device(kind, "", 2**45), 10).batch
    )


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize(("pixels", "gib"), [(32, 8), (32, 16), (224, 80)])
def test_a_full_bank_and_its_cached_answers_fit_the_memory(classes: int, pixels: int, gib: int) -> None:
    """Eight views of each image, K float32 logits each, and half as much again while the cache grows. With a thousand
    classes and 32 pixels they are ten times the images."""
    spec, cost, free = InputSpec(height=pixels, width=pixels), Cost(1e6, 1e5, 10**6), gib * 2**30
    sizes = fit(spec, cost, cost, Device("cuda", "", free), classes)
    images = sizes.bank_mib * 2**20 / (3 * pixels**2)
    needed = images * (3 * pixels**2 + 1.5 * VIEWS * classes * 4)
    assert needed <= 0.25 * free + needed / images * (2**20 / (3 * pixels**2)), "up to one MiB of images"
    assert needed >= 0.2 * free


@pytest.mark.parametrize(("classes", "batch"), [(10, 100), (100, 100), (150, 150), (1000, 200)])
def test_a_round_has_an_image_of_every_class(classes: int, batch: int) -> None:
    cost = Cost(1e6, 1e5, 10**6)
    assert fit(InputSpec(), cost, cost, Device("cpu", "", 2**34), classes).batch == batch


def test_memory_that_pytorch_holds_but_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise later measurements of a process see less memory than its runs have."""
    gib = 2**30
    monkeypatch.setattr(fitting, "choose", lambda _kind: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 10 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: gib)
    assert fitting.device_at_hand("cuda").free_bytes == 13 * gib


def test_a_small_teacher_gets_a_small_generator() -> None:
    """So that it is not the generator that takes the time; not on a GPU, where the difference is small."""
    spec, cpu, gpu = InputSpec(), Device("cpu", "", 2**34), Device("cuda", "", 2**34)
    whole = generator_flop(spec, 10, 64)
    small, large = Cost(whole / 4, 1e6, 10**5), Cost(whole * 1.01, 1e6, 10**7)
    assert (generator_channels(spec, 10, small, cpu), generator_channels(spec, 10, small, gpu)) == (32, 64)
    assert generator_channels(spec, 10, large, cpu) == 64
