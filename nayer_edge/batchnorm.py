"""BatchNorm: the statistics that L_bn compares, their memory, and one BatchNorm over several ranks.

`torch.var_mean` over a channels-last activation takes twenty times as long on a CPU as the kernel that BatchNorm
itself uses, and its autograd formula makes several passes more; docs/LOG.md has the figures.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nayer_edge import losses
from nayer_edge.errors import no_batch_norms
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.distributed import SINGLE, World, across_ranks


def channel_statistics(x: Float[Tensor, "B C *HW"]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and biased variance over everything but the channel, float32 whatever the input; differentiable."""
    return _ChannelStatistics.apply(x)  # pyright: ignore[reportReturnType]


class _ChannelStatistics(torch.autograd.Function):
    """d mean/dx = 1/N and d variance/dx = 2 (x − mean)/N: the gradient is one affine map per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type == "cpu":
            unused = torch.zeros(x.shape[1])
            mean, variance = torch.ops.aten.batch_norm_update_stats(x, unused, unused, 0.0)
        else:
            axes = [0, *range(2, x.ndim)]
            variance, mean = torch.var_mean(x.float(), dim=axes, correction=0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        mean_gradient, variance_gradient = gradients
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        scale = variance_gradient * (2 / count)
        shift = mean_gradient / count - scale * mean
        # An evaluated BatchNorm is that map in one kernel, with float32 factors whatever the activation's type.
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        return F.batch_norm(x, zero, one, scale, shift, eps=0.0)


class BatchNormStatistics:
    """Watches the inputs of a teacher's BatchNorms, and remembers those of earlier rounds.

    The memory is an exponential mean over rounds of the last step's statistics; L_bn then compares the running
    statistics with momentum · memory + (1 − momentum) · now (published as bn_mmt; Fast-Datafree, AAAI 2022).

    Args:
        world: ranks that watch equal shares of the batch.

    Raises:
        UsageError: the teacher has no BatchNorm with running statistics.
    """

    def __init__(self, teacher: nn.Module, momentum: float, world: World = SINGLE) -> None:
        require_batch_norms(teacher, "The teacher")
        self._norms, self._world = batch_norms(teacher), world
        self.momentum = momentum
        self.memory: list[tuple[Tensor, Tensor]] | None = None
        self._now: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(self) -> _Watch:
        """A context in which every BatchNorm's input statistics are gathered during the one forward pass."""
        return _Watch(self._norms, self._now, self._world)

    def loss(self) -> Float[Tensor, ""]:
        """L_bn of the pass that was just watched."""
        # By layer, not in the order of the pass: a network may call its layers in another order than it lists them,
        # and leave some out (the auxiliary heads of an evaluated GoogLeNet).
        watched = [norm for index, norm in enumerate(self._norms) if index in self._now]
        now, memory, m = self._in_order(), self.memory, self.momentum
        if memory is not None and m > 0:
            means = [(1 - m) * mean + m * old for (mean, _), (old, _) in zip(now, memory, strict=True)]
            variances = [(1 - m) * var + m * old for (_, var), (_, old) in zip(now, memory, strict=True)]
        else:
            means, variances = [mean for mean, _ in now], [var for _, var in now]
        return losses.batchnorm_loss(
            means,
            variances,
            [norm.running_mean for norm in watched],  # pyright: ignore[reportArgumentType]
            [norm.running_var for norm in watched],  # pyright: ignore[reportArgumentType]
        )

    def remember(self) -> None:
        """Ends a round: the statistics of its last step enter the memory."""
        now = [(mean.detach().clone(), var.detach().clone()) for mean, var in self._in_order()]
        if self.memory is None:
            self.memory = now
        else:
            m = self.momentum
            self.memory = [
                (m * old_mean + (1 - m) * mean, m * old_var + (1 - m) * var)
                for (mean, var), (old_mean, old_var) in zip(now, self.memory, strict=True)
            ]

    def _in_order(self) -> list[tuple[Tensor, Tensor]]:
        return [self._now[index] for index in sorted(self._now)]

    def copy(self) -> BatchNormStatistics:
        """The same teacher and memory, for rounds that must leave no trace."""
        twin = object.__new__(BatchNormStatistics)
        twin._norms, twin.momentum, twin.memory, twin._now = self._norms, self.momentum, self.memory, {}
        twin._world = self._world
        return twin


class _Watch:
    def __init__(
        self, norms: list[nn.modules.batchnorm._BatchNorm], now: dict[int, tuple[Tensor, Tensor]], world: World
    ) -> None:
        self._norms, self._now, self._world = norms, now, world
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        self._now.clear()
        for index, norm in enumerate(self._norms):
            self._handles.append(norm.register_forward_pre_hook(functools.partial(self._gather, index)))

    def _gather(self, index: int, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._now[index] = channel_statistics(inputs[0])

    def __exit__(self, exception: object, *_more: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self._world.size > 1 and exception is None:
            self._combine()

    def _combine(self) -> None:
        """The statistics of the batch of all ranks, every layer in one message."""
        layers = sorted(self._now)
        sizes = [len(self._now[layer][0]) for layer in layers]
        local = (torch.cat([self._now[layer][kind] for layer in layers]) for kind in (0, 1))
        means, variances = across_ranks(*local)
        self._now.update(zip(layers, zip(means.split(sizes), variances.split(sizes), strict=True), strict=True))


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm whose batch is that of all ranks. (PyTorch's SyncBatchNorm runs on GPUs only.)"""

    @classmethod
    def like(cls, norm: nn.modules.batchnorm._BatchNorm) -> SynchronisedBatchNorm:
        """The same parameters and buffers."""
        twin = cls(norm.num_features, norm.eps, norm.momentum, norm.affine)
        twin.weight, twin.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(twin, name, buffer)
        return twin.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Float[Tensor, "B C *HW"]) -> Float[Tensor, "B C *HW"]:
        x = input
        if not self.training:
            return super().forward(x)
        mean, variance = across_ranks(*channel_statistics(x))
        mean_value, variance_value = mean.detach(), variance.detach()
        self._follow(mean_value, variance_value, x.numel() // x.shape[1] * dist.get_world_size())
        # An evaluated BatchNorm is one kernel, but takes its statistics for constants. `scale` has the value of the
        # weight and `shift` that of the bias; their gradients go on into variance and mean.
        inverse = torch.rsqrt(variance + self.eps)
        weight = self.weight if self.affine else torch.ones_like(mean_value)
        bias = self.bias if self.affine else torch.zeros_like(mean_value)
        scale = weight * (inverse / inverse.detach())
        shift = bias + (mean_value - mean) * inverse * weight
        return F.batch_norm(x, mean_value, variance_value, scale, shift, eps=self.eps)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), factor)


def synchronise_batchnorms(model: nn.Module, world: World) -> None:
    """Lets the BatchNorms of a model see the batch of all ranks. Names and values of its state stay."""
    if world.size == 1:
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None:
                setattr(parent, name, SynchronisedBatchNorm.like(child))


SHORT_MOMENTUM = 0.1
"""PyTorch's own, of the running statistics of BatchNorms"""


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm with running statistics, in the order of `model.modules()`."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


def raise_bn_momentum(classifier: Classifier) -> None:
    """Lets BatchNorms remember tens of batches and not hundreds, where a library set them so for its long schedules.

    MobileNetV3 and TensorFlow's EfficientNets have a momentum of 0.01. A student of some hundred steps would be
    evaluated, also by L_adv, with statistics that are mostly their initial ones, and answer the same to every image.
    """
    for norm in batch_norms(classifier):
        if norm.momentum is not None:
            norm.momentum = max(norm.momentum, SHORT_MOMENTUM)


def require_batch_norms(network: nn.Module, what: str) -> None:
    """Refuses a network that has no statistics for synthesis to match.

    Args:
        what: names the network in the message, as "The teacher".

    Raises:
        UsageError: it has no BatchNorm with running statistics.
    """
    if not batch_norms(network):
        raise no_batch_norms(what)
