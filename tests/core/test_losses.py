"""Each loss against an independent formula in NumPy, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nayer_edge import losses
from nayer_edge.batchnorm import channel_statistics


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(64, 7, generator=random) * 3, torch.randn(64, 7, generator=random) * 3


def test_class_loss_is_the_mean_negative_log_probability(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, _ = logits
    labels = torch.arange(64) % 7
    expected = -np.log(softmax(teacher.double().numpy())[np.arange(64), labels.numpy()]).mean()
    assert float(losses.class_loss(teacher, labels)) == pytest.approx(expected, rel=1e-5)


def test_adversarial_loss_counts_only_images_on_which_both_agree(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = logits
    p, q = softmax(teacher.double().numpy()), softmax(student.double().numpy())
    divergence = (p * (np.log(p) - np.log(q))).sum(axis=1)
    agree = p.argmax(axis=1) == q.argmax(axis=1)
    assert 0 < agree.sum() < 64
    assert float(losses.adversarial_loss(teacher, student)) == pytest.approx(-(divergence * agree).mean(), rel=1e-4)


def test_adversarial_loss_is_never_positive_and_zero_for_equal_networks(
    logits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    teacher, student = logits
    assert float(losses.adversarial_loss(teacher, student)) < 0
    assert float(losses.adversarial_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_distillation_loss_is_kl_at_temperature(logits: tuple[torch.Tensor, torch.Tensor], temperature: float) -> None:
    teacher, student = logits
    p = softmax(teacher.double().numpy() / temperature)
    q = softmax(student.double().numpy() / temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    assert float(losses.distillation_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-4)


def test_batchnorm_loss_sums_norms_that_are_not_squared() -> None:
    means = [torch.tensor([1.0, 2.0]), torch.tensor([0.0])]
    variances = [torch.tensor([1.0, 1.0]), torch.tensor([4.0])]
    running_means = [torch.tensor([4.0, 6.0]), torch.tensor([2.0])]
    running_variances = [torch.tensor([1.0, 1.0]), torch.tensor([1.0])]
    found = losses.batchnorm_loss(means, variances, running_means, running_variances)
    assert float(found) == pytest.approx(5 + 2 + 0 + 3)


@pytest.mark.parametrize("shape", [(40, 6, 5, 3), (17, 4), (3, 1, 2, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channel_statistics_and_their_gradient(shape: tuple[int, ...], layout: str) -> None:
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("channels-last needs four dimensions")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 2
    ours = x.clone().contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    ours.requires_grad_(True)
    wanted = x.double().requires_grad_(True)
    axes = [0, *range(2, x.ndim)]
    mean, variance = channel_statistics(ours)
    wanted_mean = wanted.mean(dim=axes)
    wanted_variance = ((wanted - wanted.mean(dim=axes, keepdim=True)) ** 2).mean(dim=axes)
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), wanted_variance, rtol=1e-5, atol=1e-5)
    weights = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(2))
    (weights[0] * mean + weights[1] * variance).sum().backward()
    (weights[0].double() * wanted_mean + weights[1].double() * wanted_variance).sum().backward()
    assert ours.grad is not None
    assert wanted.grad is not None
    torch.testing.assert_close(ours.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)


def test_channel_statistics_of_bfloat16_are_float32() -> None:
    x = torch.randn(400, 8, 8, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    mean, variance = channel_statistics(x)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(variance, x.float().var(dim=(0, 2, 3), correction=0), rtol=1e-3, atol=1e-4)
