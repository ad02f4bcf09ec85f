"""One run on several devices: `torchrun … -m nayer_edge distill …` (docs/DISTRIBUTED.md).

A global batch is cut into as many shares as there are processes (*ranks*). The rule that makes N ranks compute what one
process would: every rank has its own loss, the loss of the run is their mean, so the gradients' mean is its gradient;
where a loss depends on statistics of the whole batch, these are averaged in the forward pass and their gradients are
averaged in the backward pass. A world of one rank communicates nothing and changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from nayer_edge.config import Distill, Synthesis
from nayer_edge.errors import TrainingError, UsageError
from nayer_edge.runtime.process import launched

STEP_TIMEOUT = timedelta(minutes=15)
"""how long a rank waits for the others within the loop; rank 0 may be writing a checkpoint meanwhile"""
WAIT_TIMEOUT = timedelta(hours=12)
"""how long the others wait for the student step; rank 0 may be training a teacher meanwhile. A rank that ends closes
its connections, which the others notice at once: the time-outs are for one that hangs."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is.

    Attributes:
        rank: 0 … size − 1; rank 0 writes, prints and decides.
        size: how many.
        messages: a Gloo group for what is not a gradient: texts, and checkpoints on their way to rank 0.
    """

    rank: int = 0
    size: int = 1
    messages: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """This is the rank that writes."""
        return self.rank == 0

    def share(self, whole: Tensor, dim: int = 0) -> Tensor:
        """This rank's contiguous part of something of the whole batch."""
        if self.size == 1:
            return whole
        count = whole.shape[dim] // self.size
        return whole.narrow(dim, self.rank * count, count)

    def mean(self, mine: Tensor) -> Tensor:
        """The mean over ranks, without gradient: the same bits on every rank, because all add in the same order."""
        return mine if self.size == 1 else _all(mine).mean(dim=0)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter], own: Collection[nn.Parameter] = ()) -> None:
        """Turns the gradients of each rank's loss into those of the mean loss, in one message.

        Args:
            own: parameters that only this rank has: no other rank's loss depends on them.
        """
        if self.size == 1:
            return
        mine = {id(parameter) for parameter in own}
        gradients = [(p.grad, id(p) in mine) for p in parameters if p.grad is not None]
        for gradient in (gradient for gradient, alone in gradients if alone):
            gradient /= self.size
        common = [gradient for gradient, alone in gradients if not alone]
        if not common:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in common])
        _meet(dist.all_reduce, flat)
        flat /= self.size
        for gradient, averaged in zip(common, flat.split([gradient.numel() for gradient in common]), strict=True):
            gradient.copy_(averaged.view(gradient.shape))

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors with those of rank 0."""
        if self.size == 1:
            return
        for tensor in tensors:
            dense = tensor.contiguous()
            _meet(dist.broadcast, dense, src=0)
            tensor.copy_(dense)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The tensors of all ranks, equal in shape, on rank 0's CPU; an empty list elsewhere."""
        if self.size == 1:
            return [mine]
        flat = mine.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = [torch.empty_like(flat) for _ in range(self.size)] if self.first else []
        _meet(dist.gather, flat, found or None, dst=0, group=self.messages)
        return [part.view(mine.dtype).view(mine.shape) for part in found]

    def gather_rounds(self, mine: Shaped[Tensor, "n ..."], share: int) -> Shaped[Tensor, "N ..."] | None:
        """Rounds of which each rank has `share` images, as one process would have them; None where not rank 0."""
        parts = self.gather(mine)
        if not parts or self.size == 1:
            return parts[0] if parts else None
        rounds = len(mine) // share
        return torch.cat([part.view(rounds, share, *mine.shape[1:]) for part in parts], dim=1).flatten(0, 1)

    def from_first(self, value: Any = None) -> Any:
        """Rank 0's value (JSON-serialisable), on every rank; the others wait here for it."""
        if self.size == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor(len(text))
        _meet(dist.broadcast, length, src=0, group=self.messages)
        if not self.first:
            text = torch.empty(int(length), dtype=torch.uint8)
        _meet(dist.broadcast, text, src=0, group=self.messages)
        return json.loads(bytes(text.tolist()))

    def require_same(self, facts: object, what: str) -> None:
        """Raises UsageError on every rank where `facts` differ between them."""
        if self.size == 1:
            return
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        _meet(dist.all_gather, found, mine, group=self.messages)
        others = [str(rank) for rank, other in enumerate(found) if not torch.equal(other, found[0])]
        if others:
            raise UsageError(
                f"The processes of this run differ in {what}: rank {', '.join(others)} does not match rank 0.",
                why=f"Rank {self.rank} has {facts}.",
                fix="Give every machine the same package, the same kind of device, and the same run folder.",
            )


SINGLE = World()
"""one process"""

_current = SINGLE


def current() -> World:
    """The world that `joined` entered; one process outside it."""
    return _current


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Meets the other processes that torchrun started: Gloo for tensors on the CPU, NCCL for those on a GPU.

    Raises:
        UsageError: torchrun's environment is incomplete.
        TrainingError: the other processes do not connect, or a rank is lost on the way.
    """
    global _current
    rank, size = launched()
    if size == 1:
        yield SINGLE
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    try:
        store, _rank, _size = next(rendezvous("env://", timeout=STEP_TIMEOUT))
        # torchrun may keep its store over restarts; the addresses in it are then those of processes that have ended.
        store = PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
        messages = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    except ValueError as error:
        raise UsageError(
            "torchrun's environment is incomplete.", why=f"{error}", fix="Start it with torchrun."
        ) from error
    except RuntimeError as error:
        raise TrainingError("The processes of this run did not find each other.", why=_first_line(error)) from error
    _current = World(rank, size, messages)  # pyright: ignore[reportArgumentType] (every rank is a member)
    try:
        yield _current
        # Only on success: if a rank was lost, NCCL would wait for it here. After an error, the system closes it.
        dist.destroy_process_group()
    finally:
        _current = SINGLE


def share_problems(synthesis: Synthesis, distill: Distill, classes: int, size: int) -> list[str]:
    """Why these batches cannot be cut into `size` equal shares, each with whole groups of the noisy layer."""
    problems: list[str] = []
    if size == 1:
        return problems
    # With fewer images than classes there is one group, which all ranks have.
    unit = size if synthesis.batch <= classes else size * classes
    if synthesis.batch % unit:
        valid = ", ".join(str(number) for number in _multiples(synthesis.batch, unit))
        problems.append(
            f"synthesis.batch: {synthesis.batch} images of {classes} classes are not {size} "
            + (f"shares with every class equally often; {valid} are" if unit > size else f"equal shares; {valid} are")
        )
    if distill.batch % size:
        valid = ", ".join(str(number) for number in _multiples(distill.batch, size))
        problems.append(f"distill.batch: {distill.batch} images are not {size} equal shares; {valid} are")
    return problems


def _multiples(near: int, unit: int) -> list[int]:
    below = near // unit * unit
    return [number for number in (below, below + unit) if number]


def across_ranks(
    means: Float[Tensor, " C"], variances: Float[Tensor, " C"]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and biased variance of the batch of all ranks, from those of equal shares of it; differentiable."""
    return _AcrossRanks.apply(means, variances)  # pyright: ignore[reportReturnType]


class _AcrossRanks(torch.autograd.Function):
    """μ = mean(μᵣ) and σ² = mean(σᵣ²) + var(μᵣ), which avoids cancellation, so dσ²/dμᵣ ∝ 2 (μᵣ − μ)."""

    @staticmethod
    def forward(ctx: Any, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        found = _all(torch.stack((means, variances)))
        mean = found[:, 0].mean(dim=0)
        ctx.save_for_backward(means - mean)
        return mean, found[:, 1].mean(dim=0) + found[:, 0].var(dim=0, correction=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (deviation,) = ctx.saved_tensors
        both = torch.stack(gradients)
        _meet(dist.all_reduce, both)
        of_mean, of_variance = both / dist.get_world_size()
        return of_mean + 2 * deviation * of_variance, of_variance


def _all(mine: Tensor) -> Tensor:
    """The tensors of all ranks, stacked along a new first dimension."""
    mine = mine.contiguous()
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    _meet(dist.all_gather, found, mine)
    return torch.stack(found)


def _meet(collective: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Calls a collective, in which every rank must take part."""
    try:
        collective(*arguments, **options)
    except RuntimeError as error:
        raise TrainingError(
            "This process lost its connection to the other processes of the run.",
            why=f"One of them ended or hangs: {_first_line(error)}",
            fix="Look for the first error in their output. The same command continues from the last checkpoint.",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
