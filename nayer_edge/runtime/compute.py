"""Where and in which precision tensors are computed, and random numbers that a resumed run draws again."""

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
    """A device and the precision of its matrix arithmetic.

    Attributes:
        device: where tensors live.
        bf16: autocast to bfloat16.
        reason: why, in words.
    """

    device: torch.device
    bf16: bool
    reason: str

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Runs a forward pass in the chosen precision; losses are computed in float32 outside it."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            yield

    def place(self, model: Placed) -> Placed:
        """Moves a model to the device, convolutions channels-last."""
        return model.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def choose(
    device: Literal["auto", "cpu", "cuda"] = "auto", precision: Literal["auto", "fp32", "bf16"] = "auto"
) -> Compute:
    """Chooses device and precision.

    Raises:
        MissingError: CUDA was asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise MissingError(
            "The recipe asks for a CUDA device, and PyTorch finds none here.",
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

    Each purpose has its own stream, so a run that is continued, or that draws more in one place, draws the
    same numbers everywhere else.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator(device).manual_seed(state)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Makes PyTorch's global CPU stream, which weight initialisers draw from, start at `seed`; restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
