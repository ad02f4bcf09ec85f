"""The losses, one pure function per equation (Tran et al., CVPR 2024, arXiv 2310.00258, §3.1).

Shapes: B images, K classes, C channels of one BatchNorm layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def batchnorm_loss(
    means: Sequence[Float[Tensor, " _"]],
    variances: Sequence[Float[Tensor, " _"]],
    running_means: Sequence[Float[Tensor, " _"]],
    running_variances: Sequence[Float[Tensor, " _"]],
) -> Float[Tensor, ""]:
    """L_bn: Σ over BatchNorm layers of ‖σ² − σ̂²‖₂ + ‖μ − μ̂‖₂, norms not squared, σ² biased.

    Args:
        means, variances: of the batch, per layer.
        running_means, running_variances: their targets, the teacher's running statistics.
    """
    residuals = [
        torch.linalg.vector_norm(target - value)
        for value, target in (
            *zip(means, running_means, strict=True),
            *zip(variances, running_variances, strict=True),
        )
    ]
    return torch.stack(residuals).sum()


def class_loss(teacher_logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """L_ce: cross-entropy of the teacher's prediction to the label that the image was generated for."""
    return F.cross_entropy(teacher_logits.float(), labels)


def adversarial_loss(teacher_logits: Float[Tensor, "B K"], student_logits: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """L_adv: −mean(1[argmax S = argmax T] · KL(T‖S)) at temperature 1.

    Drives the generator towards images on which the student still differs from the teacher, but only where both agree
    on the class, so that images stay within their class.
    """
    teacher_log = F.log_softmax(teacher_logits.float(), dim=1)
    student_log = F.log_softmax(student_logits.float(), dim=1)
    divergence = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=1)
    agree = teacher_logits.argmax(dim=1) == student_logits.argmax(dim=1)
    return -(divergence * agree).mean()


def distillation_loss(
    student_logits: Float[Tensor, "B K"], teacher_logits: Float[Tensor, "B K"], temperature: float
) -> Float[Tensor, ""]:
    """L_kd: T² · KL(softmax(t/T) ‖ softmax(s/T)), mean over the batch (Hinton et al. 2015, arXiv 1503.02531)."""
    teacher_log = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    student_log = F.log_softmax(student_logits.float() / temperature, dim=1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2
