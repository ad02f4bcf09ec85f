"""Sizes that fit the device: batches within the memory, and a generator that costs no more than the teacher."""

from __future__ import annotations

from typing import Literal

import pytest

from nayer_edge.config import InputSpec
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
    sizes = fit(spec, teacher, student, device)
    assert 3 * teacher.activation_bytes * sizes.batch <= 0.4 * device.free_bytes or sizes.batch == 8
    each = teacher.activation_bytes + 3 * student.activation_bytes
    assert each * sizes.student_batch <= 0.4 * device.free_bytes or sizes.student_batch == 8
    assert sizes.bank_mib * 2**20 >= sizes.batch * 3 * pixels**2, "a round fits into the bank"
    assert sizes.bank_mib <= max(gib * 2**10 / 4, 4 * sizes.batch * 3 * pixels**2 / 2**20 + 1), "half is left"
    if kind == "cuda" and gib == 80 and pixels == 32:
        assert (sizes.batch, sizes.student_batch, sizes.reasons) == (400, 512, {})
    smaller = fit(spec, teacher, student, Device(kind, "", 2**28))
    assert smaller.batch <= sizes.batch
    assert smaller.student_batch <= sizes.student_batch
    assert ("batch" in smaller.reasons) == (smaller.batch < fit(spec, teacher, student, Device(kind, "", 2**45)).batch)


def test_a_small_teacher_gets_a_small_generator() -> None:
    """So that it is not the generator that takes the time; not on a GPU, where the difference is small."""
    spec, cpu, gpu = InputSpec(), Device("cpu", "", 2**34), Device("cuda", "", 2**34)
    whole = generator_flop(spec, 10, 64)
    small, large = Cost(whole / 4, 1e6, 10**5), Cost(whole * 1.01, 1e6, 10**7)
    assert (generator_channels(spec, 10, small, cpu), generator_channels(spec, 10, small, gpu)) == (32, 64)
    assert generator_channels(spec, 10, large, cpu) == 64
