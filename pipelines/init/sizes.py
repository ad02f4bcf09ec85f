"""Chooses batch sizes, rounds, epochs and memory bank for this machine, and gives the reasons."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch

from nayer_edge.config import Generator as GeneratorConfig
from nayer_edge.config import InputSpec
from nayer_edge.errors import NayerEdgeError
from nayer_edge.generator import Generator
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import choose as choose_compute

from ..costs.model_cost import Cost, cost_of, flop_of
from ..doctor import memory_gib

Effort = Literal["trial", "normal"]

CPU_SECONDS = 3600.0
"""target duration of a run on a CPU"""
CPU_EPOCHS = (10, 40)
"""minimum and maximum number of epochs on a CPU"""
LEAST_CHANNELS = 32
"""lower limit when the generator is made narrower than the paper's"""
LARGE = 64
"""longer side in pixels above which the ImageNet settings are used"""
BACKWARD = 3
"""cost and memory of a training step in forward passes (the backward pass counts as two)"""
SHARE = 0.4
"""fraction of the free memory that activations may use"""
MEASURED_FLOP = 2e10
"""floating-point operations of one pass when measuring speed"""
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """The device that the run will use.

    Attributes:
        kind: cpu or cuda.
        name: for the comment in the recipe.
        free_bytes: free memory.
        flop_per_s: floating-point operations per second, measured with the teacher.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    free_bytes: float
    flop_per_s: float = 1e11


@dataclass(frozen=True)
class Sizes:
    """The numbers of a recipe that depend on device, image size and networks.

    Attributes:
        generator_channels: None for the paper's value.
        seconds: estimated duration of the run on a CPU; None on a GPU.
        reasons: reason for each number, by its name.
    """

    batch: int
    g_steps: int
    rounds: int
    warmup_rounds: int
    epochs: int
    warmup_epochs: int
    steps: int
    student_batch: int
    lr: float
    pad: int
    bank_mib: int
    holdout_rounds: int
    calibration_images: int
    synthetic_images: int
    reasons: dict[str, str]
    generator_channels: int | None = None
    seconds: float | None = None


def device_at_hand(kind: Literal["auto", "cpu", "cuda"] = "auto") -> Device:
    """The device that a run would use, with its free memory.

    Raises:
        MissingError: CUDA was requested but is not available.
    """
    chosen = choose_compute(kind)
    if chosen.device.type == "cuda":
        return Device("cuda", torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0])
    return Device("cpu", chosen.reason.partition(",")[0], (memory_gib()[1] or 4.0) * 2**30)


def generator_flop(spec: InputSpec, classes: int, channels: int) -> float:
    """Floating-point operations of the generator per image (with MiniLM's embedding length)."""
    dimensions, batch = 384, 2 * classes
    with torch.device("meta"):
        config = GeneratorConfig(channels=channels)
        network = Generator(dimensions, classes, batch, spec.shape, config)
        embeddings = torch.zeros(batch, dimensions)
    return flop_of(network.train(), embeddings) / batch


def speed_of(teacher: Classifier, cost: Cost, seconds: float = 1.0) -> float:
    """Measures floating-point operations per second: the teacher's forward pass, and backward to the images."""
    compute = choose_compute("cpu")
    network = compute.place(teacher).eval().requires_grad_(False)
    batch = int(min(max(MEASURED_FLOP / (BACKWARD * cost.flop), 2), 64))
    images = torch.rand(batch, *teacher.spec.shape)
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        began = time.perf_counter()
        with compute.autocast():
            logits = network(images.requires_grad_())
        logits.float().logsumexp(dim=1).sum().backward()
        times.append(time.perf_counter() - began)
    # The first pass warms up.
    return batch * BACKWARD * cost.flop / statistics.median(times[1:])


def choose(spec: InputSpec, classes: int, teacher: Cost, student: Cost, device: Device, effort: Effort) -> Sizes:
    """Sizes for a run: the paper's on a GPU, as far as memory allows; smaller ones on a CPU."""
    if effort == "trial":
        return _trial(spec, classes)
    large = max(spec.height, spec.width) > LARGE
    gpu = device.kind == "cuda"
    if gpu:
        values = {"batch": 200 if large else 400, "g_steps": 60 if large else 30, "rounds": 4 if large else 2}
        values |= {"warmup_rounds": 20 if large else 10, "epochs": 120, "warmup_epochs": 20}
        values |= {"steps": 1000 if large else 400, "student_batch": 256 if large else 512}
        lr, why = 0.1 if large else 0.2, "as in the paper's repository"
    else:
        values = {"batch": 32 if large else 100, "g_steps": 30, "rounds": 1, "warmup_rounds": 4}
        values |= {"epochs": 0, "warmup_epochs": 0, "steps": 60, "student_batch": 64 if large else 128}
        lr, why = 0.1, "smaller than the paper's, for a CPU; raise these numbers first if you have time"
    reasons = {"batch": why}
    values["batch"] = _fitting(values["batch"], BACKWARD * teacher.activation_bytes, device, "batch", reasons)
    both = teacher.activation_bytes + BACKWARD * student.activation_bytes
    values["student_batch"] = _fitting(values["student_batch"], both, device, "student_batch", reasons)
    channels = GeneratorConfig().channels
    while not gpu and channels > LEAST_CHANNELS and generator_flop(spec, classes, channels) > teacher.flop:
        channels //= 2
        reasons["generator"] = "narrower than the paper's, which would need more operations than the teacher"
    synthesis_flop = values["g_steps"] * values["batch"] * BACKWARD
    warm_round = synthesis_flop * (teacher.flop + generator_flop(spec, classes, channels))
    step_flop = values["student_batch"] * (teacher.flop + BACKWARD * student.flop)
    later_epoch = values["rounds"] * (warm_round + synthesis_flop * student.flop) + values["steps"] * step_flop

    def warm_of(epochs: int) -> int:
        return values["warmup_epochs"] if gpu else max(2, epochs // 5)

    def total_of(epochs: int) -> float:
        warm = warm_of(epochs)
        return warm * values["warmup_rounds"] * warm_round + (epochs - warm) * later_epoch

    if not gpu:
        (least, most), budget = CPU_EPOCHS, CPU_SECONDS * device.flop_per_s
        affordable = [number for number in range(least, most + 1) if total_of(number) <= budget]
        values["epochs"] = max(affordable, default=least)
        values["warmup_epochs"] = warm_of(values["epochs"])
    warm, epochs = values["warmup_epochs"], values["epochs"]
    total = total_of(epochs)
    seconds = None if gpu else total / device.flop_per_s
    reasons["epochs"] = f"with these numbers the run takes about {total:.0e} floating-point operations"
    if seconds is not None:
        speed = f"the {device.flop_per_s / 1e9:.0f} GFLOP/s measured with the teacher on this machine"
        reasons["epochs"] += f", {duration(seconds)} at {speed}"
    rounds = warm * values["warmup_rounds"] + (epochs - warm) * values["rounds"]
    bank, reasons["bank_mib"] = _bank(spec, values["batch"], rounds, device)
    return Sizes(
        **values,
        lr=lr,
        pad=_pad(spec),
        bank_mib=bank,
        holdout_rounds=2 if gpu else 1,
        calibration_images=512 if gpu else 300,
        synthetic_images=2000,
        reasons=reasons,
        generator_channels=channels if "generator" in reasons else None,
        seconds=seconds,
    )


def _trial(spec: InputSpec, classes: int) -> Sizes:
    batch = 32
    bank, _ = _bank(spec, batch, 4, Device("cpu", "", 2**40))
    why = "a trial, which checks in minutes that everything works; its student is not meant to be accurate"
    return Sizes(
        batch=batch, g_steps=3, rounds=1, warmup_rounds=2, epochs=2, warmup_epochs=1, steps=3, student_batch=32,
        lr=0.1, pad=_pad(spec), bank_mib=bank, holdout_rounds=1, calibration_images=32, synthetic_images=64,
        reasons={"batch": why},
    )  # fmt: skip


def _pad(spec: InputSpec) -> int:
    """Padding in pixels before the random crop: 4 at 32, as published; 2 at 16, 16 at 224."""
    shorter = min(spec.height, spec.width)
    return max(1, min(shorter // 8, 16))


def _fitting(wanted: int, bytes_each: float, device: Device, name: str, reasons: dict[str, str]) -> int:
    most = int(SHARE * device.free_bytes / max(bytes_each, 1.0))
    if most >= wanted:
        return wanted
    reasons[name] = f"what fits into {SHARE:.0%} of the {device.free_bytes / 2**30:.0f} GiB of free memory"
    return max(8, 2 ** int(math.log2(max(most, 8))))


def _bank(spec: InputSpec, batch: int, rounds: int, device: Device) -> tuple[int, str]:
    each = math.prod(spec.shape)
    wanted, least = rounds * batch * each, 4 * batch * each
    allowed = max(device.free_bytes / 4, least)
    size = max(1, math.ceil(min(wanted, allowed) / MIB))
    if wanted <= allowed:
        return size, f"all {rounds * batch:,} images of the run"
    return size, f"a quarter of the free memory: {int(size * MIB / each):,} of the run's {rounds * batch:,} images"


def duration(seconds: float) -> str:
    """A rounded duration: "40 minutes", "2.5 hours"."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} minutes"


def student_for(spec: InputSpec, classes: int, teacher: Cost, own: str) -> str:
    """Proposes a student: the largest of the usual ones for the image size that has at most a third of the teacher's
    parameters and no more operations than the teacher; if there is none, the one with the fewest parameters."""
    small = ("nayer:wrn_16_2", "nayer:wrn_16_1", "nayer:resnet8")
    large = ("torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5")
    names = [name for name in (large if max(spec.height, spec.width) > LARGE else small) if name != own]
    costs: dict[str, Cost] = {}
    for name in names:
        with contextlib.suppress(NayerEdgeError):
            costs[name] = cost_of(name, spec, classes)
    fit = [n for n, cost in costs.items() if cost.parameters <= teacher.parameters / 3 and cost.flop <= teacher.flop]
    return fit[0] if fit else min(costs, key=lambda name: costs[name].parameters, default=names[-1])
