"""Optimizers by name: SGD as in the paper, and Muon for the weights of convolutions and linear layers.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a weight matrix with
the nearest semi-orthogonal matrix, approximated by a few Newton–Schulz steps. The variant with weights of constant norm
comes from the CIFAR-10 speed runs (Jordan 2024, https://arxiv.org/abs/2404.00498). `torch.optim.Muon` accepts only
matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""coefficients of Jordan et al.'s quintic iteration: steepest at zero; singular values end between 0.7 and 1.2"""
NEWTON_SCHULZ_STEPS = 3
"""as in the CIFAR-10 speed runs; language models use 5"""
Kind = Literal["sgd", "muon"]


def orthogonalize(matrices: Float[Tensor, "G M N"], steps: int = NEWTON_SCHULZ_STEPS) -> Float[Tensor, "G M N"]:
    """Approximates the nearest semi-orthogonal matrix to each of G matrices: U Vᵀ of its singular value decomposition.

    Newton–Schulz iteration on the matrix divided by its Frobenius norm; a zero matrix stays zero. The iteration runs
    on the smaller side, so tall and wide matrices are treated alike.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    transposed = x.shape[1] > x.shape[2]
    if transposed:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices, SGD with Nesterov momentum for everything else, in one optimizer.

    Parameter groups carry `kind`:

    - `constant`: orthogonalised updates; each weight is kept at Frobenius norm √out. For weights followed by a
      normalisation layer, whose scale has no effect.
    - `free`: orthogonalised updates times √max(1, out / in), decoupled weight decay. For other weight matrices.
    - `sgd`: SGD with Nesterov momentum and weight decay.

    They also carry `groups`, those of a grouped convolution: its weight is orthogonalised group by group,
    so each depthwise filter moves by its normalised gradient.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "kind": "sgd", "groups": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        kind, lr, momentum, decay = group["kind"], group["lr"], group["momentum"], group["weight_decay"]
        if kind == "sgd" and decay:
            gradient = gradient.add(weight, alpha=decay)
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
        update = gradient.add(buffer, alpha=momentum)
        if kind == "sgd":
            weight.add_(update, alpha=-lr)
            return
        out = weight.shape[0]
        blocks = update.reshape(group["groups"], out // group["groups"], -1)
        update = orthogonalize(blocks).reshape(weight.shape)
        if kind == "constant":
            weight.mul_(math.sqrt(out) / (weight.norm() + 1e-12)).add_(update, alpha=-lr)
        else:
            weight.mul_(1 - lr * decay).add_(update, alpha=-lr * math.sqrt(max(1.0, out * out / weight.numel())))


def make_optimizer(
    kind: Kind,
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    muon_lr: float,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Builds the optimizer of a network; every group stores its peak learning rate as `peak_lr`, for `set_rate`.

    Args:
        kind: `sgd` for all parameters, or `muon` for the weights of convolutions and of all linear layers except the
            last (the classifier); biases, normalisation layers and the classifier use SGD.
        lr: peak learning rate of SGD.
        muon_lr: peak learning rate of Muon.
    """
    if kind == "sgd":
        made: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0
        )
    else:
        made = Muon(_muon_groups(model, lr, momentum, weight_decay, muon_lr))
    for group in made.param_groups:
        group["peak_lr"] = group["lr"]
    return made


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Sets every group's learning rate to a fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def _muon_groups(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, muon_lr: float
) -> list[dict[str, Any]]:
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = linear[-1] if linear else None
    groups: list[dict[str, Any]] = []
    taken: set[int] = set()
    for module in model.modules():
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not (convolution or isinstance(module, nn.Linear)) or module is head or id(module.weight) in taken:
            continue
        taken.add(id(module.weight))
        groups.append(
            {
                "params": [module.weight],
                # A convolution without bias is assumed to be followed by a normalisation layer.
                "kind": "constant" if convolution and module.bias is None else "free",
                "groups": module.groups if convolution else 1,
                "lr": muon_lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
            }
        )
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    groups.append({"params": rest, "lr": lr, "momentum": momentum, "weight_decay": weight_decay})
    return groups
