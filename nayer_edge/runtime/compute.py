"""Device, precision, and random streams that a resumed run can reproduce."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn

from nayer_edge.errors import MissingError
from nayer_edge.runtime.provenance import hardware

Placed = TypeVar("Placed", bound=nn.Module)


@dataclass(frozen=True)
class Compute:
    """A device and the precision of its matrix operations.

    Attributes:
        device: where tensors are stored.
        bf16: whether to autocast to bfloat16.
        reason: the reason for this choice, as text.
    """

    device: torch.device
    bf16: bool
    reason: str

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Context manager for forward passes in the chosen precision; compute losses outside it, in float32."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            yield

    def place(self, model: Placed) -> Placed:
        """Moves a model to the device, in channels-last memory format where that is safe."""
        unsafe = _unsafe_in_channels_last(model) if self.device.type == "cpu" else []
        for convolution in unsafe:
            if _contiguous not in convolution._forward_pre_hooks.values():
                convolution.register_forward_pre_hook(_contiguous)
        if self.device.type == "cpu" and self.bf16:
            for module in model.modules():
                if _slow_in_bf16(module):
                    module.__class__ = _Float32Conv2d
        order = torch.contiguous_format if unsafe else torch.channels_last
        return model.to(self.device, memory_format=order)  # pyright: ignore[reportCallIssue]


def _unsafe_in_channels_last(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions whose training in channels-last format corrupts memory on this processor.

    Without AVX-512, oneDNN (torch 2.15) writes beyond its buffers when it computes the weight gradient of a strided 1×1
    convolution with 2 to 7 input channels in that format. The process then aborts, here or later.
    """
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        return []
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and 1 < module.in_channels // module.groups < 8
    ]


def _slow_in_bf16(module: nn.Module) -> bool:
    """Whether a layer is a depthwise convolution with a stride or a kernel larger than 3×3, whose gradients oneDNN
    (torch 2.15) computes several times as slowly in bf16 as in float32 (docs/LOG.md, 2026-12-01, "Why depthwise
    students are slow")."""
    if type(module) is not nn.Conv2d or not 1 < module.groups == module.in_channels:
        return False
    return max(module.stride) > 1 or max(module.kernel_size) > 3


class _Float32Conv2d(nn.Conv2d):
    """A convolution that autocast leaves in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def _contiguous(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Forward pre-hook: the images that a network is given may be channels-last."""
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])


def choose(
    device: Literal["auto", "cpu", "cuda"] = "auto", precision: Literal["auto", "fp32", "bf16"] = "auto"
) -> Compute:
    """Chooses device and precision.

    Raises:
        MissingError: CUDA was requested and is not available.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise MissingError(
            "The recipe requires a CUDA device, but PyTorch finds none.",
            fix="Type: nayer-edge doctor   or run on the CPU with --set device=cpu",
        )
    kind = "cuda" if device == "cuda" or (device == "auto" and cuda) else "cpu"
    if kind == "cuda":
        native, what = torch.cuda.is_bf16_supported(), torch.cuda.get_device_name()
    else:
        found = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in hardware()["instructions"]]
        native, what = bool(found), f"CPU with {found[0]}" if found else "CPU without bf16 arithmetic"
    bf16 = native if precision == "auto" else precision == "bf16"
    return Compute(torch.device(kind), bf16, f"{what}, {'bf16 autocast' if bf16 else 'float32'}")


def random_stream(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator for one purpose, for example `random_stream(seed, "synthesis", epoch, round)`.

    Each purpose has its own stream, so that resuming a run, or drawing more numbers in one place, does not change the
    numbers drawn elsewhere.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator(device).manual_seed(state)


@contextlib.contextmanager
def usual_settings() -> Iterator[None]:
    """Context manager with torch's usual settings, whatever the caller has changed: gradients are computed, and new
    tensors are float32 on the CPU."""
    dtype = torch.get_default_dtype()
    moved = torch.get_default_device().type != "cpu"
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu") if moved else contextlib.nullcontext():
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's global generators, which weight initialisers and dropout use, and restores them afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
