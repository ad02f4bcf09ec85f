"""Sizes that fit the device: batches, the width of the generator, and the limit of the memory bank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from nayer_edge.config import Generator as GeneratorConfig
from nayer_edge.config import InputSpec
from nayer_edge.generator import Generator
from nayer_edge.runtime.compute import choose

from ..doctor import memory_gib
from .budget import VIEWS
from .model_cost import Cost, flop_of

LARGE = 64
"""longer side in pixels above which batches are smaller on a CPU"""
LEAST_CHANNELS = 32
"""lower limit when the generator is made narrower than the paper's"""
BACKWARD = 3
"""cost and memory of a training step in forward passes (the backward pass counts as two)"""
SHARE = 0.4
"""fraction of the free memory that activations may use"""
BANK_SHARE = 0.25
"""fraction of the free memory that the memory bank and the teacher's cached answers may use"""
MIB = 2**20
_WHAT = {"batch": "round", "student_batch": "student step"}


@dataclass(frozen=True)
class Device:
    """The device that the run will use.

    Attributes:
        name: for comments and messages.
        free_bytes: free memory.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    free_bytes: float


@dataclass(frozen=True)
class Fit:
    """Sizes for a device.

    Attributes:
        batch: images per synthesis round.
        student_batch: images per student step.
        bank_mib: limit of the memory bank.
        reasons: a sentence for each batch that is not the default, by its name.
    """

    batch: int
    student_batch: int
    bank_mib: int
    reasons: dict[str, str]


def device_at_hand(kind: Literal["auto", "cpu", "cuda"] = "auto") -> Device:
    """The device that a run would use, with its free memory. What PyTorch holds of a GPU's memory without using it is
    free.

    Raises:
        MissingError: CUDA was requested but is not available.
    """
    chosen = choose(kind)
    if chosen.device.type == "cuda":
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return Device("cuda", torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0] + held)
    return Device("cpu", chosen.reason.partition(",")[0], (memory_gib()[1] or 4.0) * 2**30)


def fit(spec: InputSpec, teacher: Cost, student: Cost, device: Device, classes: int) -> Fit:
    """The batches of the budget schedule, as far as memory allows, and the limit of the bank.

    A round has one image per class, up to twice the images that suit the device otherwise.
    """
    if device.kind == "cuda":
        wanted = (200, 256) if max(spec.height, spec.width) > LARGE else (400, 512)
    else:
        wanted = (32, 64) if max(spec.height, spec.width) > LARGE else (100, 256)
    reasons: dict[str, str] = {}
    round_of = max(wanted[0], min(classes, 2 * wanted[0]))
    batch = _fitting(round_of, BACKWARD * teacher.activation_bytes, device, "batch", reasons)
    both = teacher.activation_bytes + BACKWARD * student.activation_bytes
    student_batch = _fitting(wanted[1], both, device, "student_batch", reasons)
    pixels = math.prod(spec.shape)
    # The teacher's cached answers share the memory with the images. While they grow, old and new ones exist.
    answers = 1.5 * VIEWS * classes * torch.float32.itemsize
    bank_bytes = max(device.free_bytes * BANK_SHARE * pixels / (pixels + answers), 4 * batch * pixels)
    return Fit(batch, student_batch, max(1, math.ceil(bank_bytes / MIB)), reasons)


def _fitting(wanted: int, bytes_each: float, device: Device, name: str, reasons: dict[str, str]) -> int:
    most = int(SHARE * device.free_bytes / max(bytes_each, 1.0))
    if most >= wanted:
        return wanted
    size = max(8, 2 ** int(math.log2(max(most, 8))))
    free = f"{SHARE:.0%} of the {device.free_bytes / 2**30:.0f} GiB of free memory"
    reasons[name] = f"{size} images per {_WHAT[name]} instead of {wanted}: what fits into {free}"
    return size


def generator_channels(spec: InputSpec, classes: int, teacher: Cost, device: Device) -> int:
    """Width of the generator: the paper's; on a CPU narrower, down to `LEAST_CHANNELS`, if it would need more
    operations than the teacher."""
    channels = GeneratorConfig().channels
    while device.kind == "cpu" and channels > LEAST_CHANNELS and generator_flop(spec, classes, channels) > teacher.flop:
        channels //= 2
    return channels


def generator_flop(spec: InputSpec, classes: int, channels: int) -> float:
    """Floating-point operations of the generator per image (with MiniLM's embedding length)."""
    dimensions, batch = 384, 2 * classes
    with torch.device("meta"):
        config = GeneratorConfig(channels=channels)
        network = Generator(dimensions, classes, batch, spec.shape, config)
        embeddings = torch.zeros(batch, dimensions)
    return flop_of(network.train(), embeddings) / batch
