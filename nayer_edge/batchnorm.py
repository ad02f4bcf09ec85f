"""BatchNorm: statistics for L_bn, their moving average over rounds, and BatchNorm synchronised across ranks.

On a CPU, `torch.var_mean` of a channels-last activation is 20 times slower than BatchNorm's own kernel, and its
backward makes several more passes; docs/LOG.md has the measurements.
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
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.prior import batch_norms, require_batch_norms
from nayer_edge.runtime.distributed import SINGLE, World, across_ranks


def channel_statistics(x: Float[Tensor, "B C *HW"]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and biased variance per channel, in float32 for any input dtype; differentiable."""
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
        # BatchNorm in eval mode is this map in one kernel, with float32 factors for any activation dtype.
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        return F.batch_norm(x, zero, one, scale, shift, eps=0.0)


class BatchNormStatistics:
    """Collects the input statistics of a teacher's BatchNorm layers, and their moving average over rounds (the memory).

    The memory averages the statistics of each round's last step exponentially. L_bn compares the teacher's running
    statistics with momentum · memory + (1 − momentum) · current (published as bn_mmt; Fast-Datafree, AAAI 2022).

    Args:
        world: ranks that process equal shares of the batch.

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
        """Context manager that collects every BatchNorm's input statistics during one forward pass."""
        return _Watch(self._norms, self._now, self._world)

    def loss(self) -> Float[Tensor, ""]:
        """L_bn of the last watched forward pass."""
        # In order of registration, not of calls: a network may call its layers in another order, and skip some
        # (GoogLeNet's auxiliary heads in eval mode).
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
        """Ends a round: adds the statistics of its last step to the memory."""
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
        """A copy with the same teacher and memory, for rounds that must not change this one."""
        clone = object.__new__(BatchNormStatistics)
        clone._norms, clone.momentum, clone.memory, clone._now = self._norms, self.momentum, self.memory, {}
        clone._world = self._world
        return clone


class _Watch:
    def __init__(self, norms: list[nn.Module], now: dict[int, tuple[Tensor, Tensor]], world: World) -> None:
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
        """Combines the statistics of all ranks, with all layers in one message."""
        layers = sorted(self._now)
        sizes = [len(self._now[layer][0]) for layer in layers]
        local = (torch.cat([self._now[layer][kind] for layer in layers]) for kind in (0, 1))
        means, variances = across_ranks(*local)
        self._now.update(zip(layers, zip(means.split(sizes), variances.split(sizes), strict=True), strict=True))


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all ranks (PyTorch's SyncBatchNorm runs on GPUs only)."""

    @classmethod
    def like(cls, norm: nn.modules.batchnorm._BatchNorm) -> SynchronisedBatchNorm:
        """A synchronised layer that shares the parameters and buffers of `norm`."""
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.affine)
        layer.weight, layer.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(layer, name, buffer)
        return layer.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Float[Tensor, "B C *HW"]) -> Float[Tensor, "B C *HW"]:
        x = input
        if not self.training:
            return super().forward(x)
        mean, variance = across_ranks(*channel_statistics(x))
        mean_value, variance_value = mean.detach(), variance.detach()
        self._follow(mean_value, variance_value, x.numel() // x.shape[1] * dist.get_world_size())
        # BatchNorm in eval mode is one kernel, but treats its statistics as constants. `scale` equals the weight and
        # `shift` the bias; their gradients flow on into variance and mean.
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
    """Makes a model's BatchNorm layers use the batches of all ranks. Its state dict keeps its names and values."""
    if world.size == 1:
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None:
                setattr(parent, name, SynchronisedBatchNorm.like(child))


SHORT_MOMENTUM = 0.1
"""PyTorch's default momentum of BatchNorm's running statistics"""


def raise_bn_momentum(classifier: Classifier) -> None:
    """Raises the BatchNorm momentum of libraries that set it for long schedules to PyTorch's default.

    MobileNetV3 and TensorFlow's EfficientNets use 0.01. After a few hundred steps, the running statistics of such a
    student would still be close to their initial values, and in eval mode (also in L_adv) it would predict the same
    class for every image.
    """
    for norm in batch_norms(classifier):
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.momentum is not None:
            norm.momentum = max(norm.momentum, SHORT_MOMENTUM)
