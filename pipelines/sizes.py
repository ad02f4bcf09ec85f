"""How large a run should be on the device at hand: batches, rounds, epochs, memory bank, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nayer_edge.config import InputSpec
from nayer_edge.errors import NayerEdgeError
from nayer_edge.models import build_classifier

from .doctor import memory_gib

Effort = Literal["trial", "normal"]

CPU_FLOP = 4e14
"""floating-point operations that a run on a processor should take: about an hour on a few cores"""
LARGE = 64
"""pixels of the longer side above which the settings for ImageNet's sizes hold"""
BACKWARD = 3
"""a step's cost and memory as multiples of a forward pass (forward, and twice as much backward)"""
SHARE = 0.4
"""of the free memory that activations may take"""
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """One image through a network.

    Attributes:
        flop: floating-point operations of a forward pass.
        activation_bytes: what a backward pass has to keep, float32.
        parameters: of the network.
    """

    flop: float
    activation_bytes: float
    parameters: int


@dataclass(frozen=True)
class Device:
    """Where the run is to be.

    Attributes:
        kind: cpu or cuda.
        name: for a comment.
        free_bytes: memory that it may use.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    free_bytes: float


@dataclass(frozen=True)
class Sizes:
    """The numbers of a recipe that depend on device, image size and networks.

    Attributes:
        reasons: why, by name of the number.
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


def device_at_hand(kind: Literal["auto", "cpu", "cuda"] = "auto") -> Device:
    """The device that a run would use, and its free memory.

    Raises:
        MissingError: CUDA was asked for and there is none.
    """
    from nayer_edge.compute import choose

    chosen = choose(kind)
    if chosen.device.type == "cuda":
        return Device("cuda", torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0])
    return Device("cpu", chosen.reason.partition(",")[0], (memory_gib()[1] or 4.0) * 2**30)


def cost_of(model: str, spec: InputSpec, classes: int) -> Cost:
    """What one image costs, counted on a network without memory for its weights."""
    labels = [f"class {number}" for number in range(classes)]
    try:
        with torch.device("meta"):
            network, images = build_classifier(model, spec, labels), torch.zeros(1, *spec.shape)
    except RuntimeError:
        network, images = build_classifier(model, spec, labels).to("meta"), torch.zeros(1, *spec.shape, device="meta")
    network.eval().to("meta")
    kept = 0

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal kept
        if isinstance(output, torch.Tensor):
            kept += output.numel() * 4

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return Cost(float(counter.get_total_flops()), float(kept), network.parameter_count)


def choose(spec: InputSpec, classes: int, teacher: Cost, student: Cost, device: Device, effort: Effort) -> Sizes:
    """Sizes for a run; those of the paper where a GPU lets them be, smaller ones on a processor."""
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
        lr, why = 0.1, "a processor's share of the paper's; the next numbers to raise where there is time"
    reasons = {"batch": why}
    values["batch"] = _fitting(values["batch"], BACKWARD * teacher.activation_bytes, device, "batch", reasons)
    both = teacher.activation_bytes + BACKWARD * student.activation_bytes
    values["student_batch"] = _fitting(values["student_batch"], both, device, "student_batch", reasons)
    round_flop = values["g_steps"] * values["batch"] * BACKWARD * teacher.flop
    step_flop = values["student_batch"] * (teacher.flop + BACKWARD * student.flop)
    if not gpu:
        epoch = values["rounds"] * round_flop + values["steps"] * step_flop
        affordable = CPU_FLOP / epoch
        values["epochs"] = int(min(max(affordable, 10), 40))
        values["warmup_epochs"] = max(2, values["epochs"] // 5)
    warm, epochs = values["warmup_epochs"], values["epochs"]
    total = warm * values["warmup_rounds"] * round_flop + (epochs - warm) * (
        values["rounds"] * round_flop + values["steps"] * step_flop
    )
    reasons["epochs"] = f"with these numbers the run takes about {total:.0e} floating-point operations"
    if not gpu:
        reasons["epochs"] += f", {_hours(total)} at 100 GFLOP/s"
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
    )


def _trial(spec: InputSpec, classes: int) -> Sizes:
    batch = 32
    bank, _ = _bank(spec, batch, 4, Device("cpu", "", 2**40))
    why = "a trial: it shows in minutes that everything fits, and its student is no good"
    return Sizes(
        batch=batch, g_steps=3, rounds=1, warmup_rounds=2, epochs=2, warmup_epochs=1, steps=3, student_batch=32,
        lr=0.1, pad=_pad(spec), bank_mib=bank, holdout_rounds=1, calibration_images=32, synthetic_images=64,
        reasons={"batch": why},
    )  # fmt: skip


def _pad(spec: InputSpec) -> int:
    """Pixels around an image before the random crop: 4 at 32, as published; 2 at 16, 16 at 224."""
    shorter = min(spec.height, spec.width)
    return max(1, min(shorter // 8, 16))


def _fitting(wanted: int, bytes_each: float, device: Device, name: str, reasons: dict[str, str]) -> int:
    most = int(SHARE * device.free_bytes / max(bytes_each, 1.0))
    if most >= wanted:
        return wanted
    reasons[name] = f"what fits into {SHARE:.0%} of the {device.free_bytes / 2**30:.0f} GiB that are free"
    return max(8, 2 ** int(math.log2(max(most, 8))))


def _bank(spec: InputSpec, batch: int, rounds: int, device: Device) -> tuple[int, str]:
    each = math.prod(spec.shape)
    wanted, least = rounds * batch * each, 4 * batch * each
    allowed = max(device.free_bytes / 4, least)
    size = max(1, math.ceil(min(wanted, allowed) / MIB))
    if wanted <= allowed:
        return size, f"all {rounds * batch:,} images of the run"
    return size, f"a quarter of the free memory: {int(size * MIB / each):,} of the run's {rounds * batch:,} images"


def _hours(flop: float) -> str:
    seconds = flop / 1e11
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} minutes"


def student_for(spec: InputSpec, classes: int, teacher: Cost, own: str) -> str:
    """A student for the edge: of the usual ones for the image size the largest with at most a third of the teacher's
    parameters, or the smallest of all."""
    small = ("nayer:wrn_16_2", "nayer:wrn_16_1", "nayer:resnet8")
    large = ("torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5")
    names = [name for name in (large if max(spec.height, spec.width) > LARGE else small) if name != own]
    for name in names:
        try:
            if cost_of(name, spec, classes).parameters <= teacher.parameters / 3:
                return name
        except NayerEdgeError:
            continue
    return names[-1]
