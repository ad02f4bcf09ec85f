"""Muon against its formula by singular value decomposition and against PyTorch's own, SGD against PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nayer_edge.training.optimizers import NEWTON_SCHULZ, Muon, make_optimizer, orthogonalize, set_rate


def quintic(values: torch.Tensor, steps: int) -> torch.Tensor:
    """The iteration of `orthogonalize`, on the singular values alone."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 27), (2, 40, 9), (5, 1, 9), (1, 6, 1)])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonalize_maps_singular_values_and_keeps_singular_vectors(shape: tuple[int, ...], steps: int) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    s = s / matrices.norm(dim=(1, 2))[:, None]
    torch.testing.assert_close(
        orthogonalize(matrices, steps), u @ (quintic(s, steps)[:, :, None] * vt), rtol=0, atol=1e-5
    )


def test_five_steps_come_close_to_orthogonal() -> None:
    found = torch.linalg.svdvals(orthogonalize(torch.randn(1, 16, 48, generator=torch.Generator().manual_seed(1)), 5))
    assert found.min() > 0.6
    assert found.max() < 1.3


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[torch.Tensor]) -> torch.Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach().clone()


def gradients_of(shape: tuple[int, ...], count: int = 4) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=random) for _ in range(count)]


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_a_free_matrix_moves_as_with_pytorchs_muon(shape: tuple[int, int]) -> None:
    start, gradients = torch.randn(shape, generator=torch.Generator().manual_seed(3)), gradients_of(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "kind": "free", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    reference = torch.optim.Muon(
        [theirs], lr=0.05, momentum=0.9, weight_decay=0.01, ns_coefficients=NEWTON_SCHULZ, ns_steps=3,
        adjust_lr_fn="original",
    )  # fmt: skip
    # PyTorch's iterates in bfloat16.
    torch.testing.assert_close(
        step(Muon([group]), ours, gradients), step(reference, theirs, gradients), rtol=0, atol=4e-3
    )


def test_other_parameters_move_as_with_pytorchs_sgd() -> None:
    start, gradients = torch.randn(7, generator=torch.Generator().manual_seed(3)), gradients_of((7,))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.02, nesterov=True)
    torch.testing.assert_close(step(Muon([group]), ours, gradients), step(reference, theirs, gradients))


def test_a_constant_weight_keeps_its_norm() -> None:
    weight = nn.Parameter(3 * torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(4)))
    optimizer = Muon([{"params": [weight], "kind": "constant", "lr": 0.05, "momentum": 0.9}])
    direction = weight.detach() / weight.detach().norm()
    moved = step(optimizer, weight, gradients_of((16, 4, 3, 3), 1))
    # One step from √16 by an update whose singular values are about 1: at most 0.05 × 1.3 × √16 away from the sphere.
    assert abs(float(moved.norm()) - 4) < 0.27
    assert float((moved / moved.norm() * direction).sum()) > 0.99


def test_depthwise_filters_move_each_by_its_own_direction() -> None:
    weight = nn.Parameter(torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(5)))
    gradient = gradients_of((6, 1, 3, 3), 1)[0] * torch.tensor([1.0, 10, 100, 1e-2, 1e-3, 1]).view(6, 1, 1, 1)
    optimizer = Muon([{"params": [weight], "kind": "constant", "groups": 6, "lr": 0.1, "momentum": 0.0}])
    before = weight.detach() * math.sqrt(6) / weight.detach().norm()
    moved = step(optimizer, weight, [gradient]) - before
    unit = gradient.flatten(1) / gradient.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        moved.flatten(1), -0.1 * float(quintic(torch.tensor(1.0, dtype=torch.float64), 3)) * unit, rtol=0, atol=2e-4
    )


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.biased = nn.Conv2d(8, 4, 1)
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)


def test_which_weight_is_treated_how() -> None:
    network = Small()
    optimizer = make_optimizer("muon", network, lr=0.1, muon_lr=0.05, momentum=0.9, weight_decay=1e-4)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {
        names[id(parameter)]: (group["kind"], group["groups"], group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        "first.weight": ("constant", 1, 0.05),
        "depthwise.weight": ("constant", 8, 0.05),
        "biased.weight": ("free", 1, 0.05),
        "hidden.weight": ("free", 1, 0.05),
        **dict.fromkeys(
            ("norm.weight", "norm.bias", "biased.bias", "hidden.bias", "head.weight", "head.bias"), ("sgd", 1, 0.1)
        ),
    }


@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_a_rate_is_a_share_of_every_groups_peak(kind: str) -> None:
    optimizer = make_optimizer(kind, Small(), lr=0.2, muon_lr=0.05, momentum=0.9, weight_decay=0.0)  # pyright: ignore[reportArgumentType]
    set_rate(optimizer, 0.5)
    set_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == ({0.05} if kind == "sgd" else {0.05, 0.0125})
