"""Logits, top-1 accuracy and agreement."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nayer_edge.memory_bank import to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute


@torch.inference_mode()
def logits_of(
    classifier: Classifier, images: UInt8[Tensor, "N C H W"], compute: Compute, batch: int | None = None
) -> Float[Tensor, "N K"]:
    """Logits in evaluation mode, in float32. The images may be on any device; the result is on the model's.

    Args:
        batch: images per forward pass; None: 512 on a GPU and 64 on a CPU, whose allocator returns larger activations
            to the system after every layer (docs/LOG.md).
    """
    if batch is None:
        batch = 512 if compute.device.type == "cuda" else 64
    was_training = classifier.training
    classifier.eval()
    parts = []
    for start in range(0, len(images), batch):
        with compute.autocast():
            parts.append(classifier(to_unit(images[start : start + batch].to(compute.device))).float())
    classifier.train(was_training)
    return torch.cat(parts)


def agreement(a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Float[Tensor, ""]:
    """Fraction of images on which both predict the same class, on the logits' device."""
    return (a.argmax(dim=1) == b.argmax(dim=1)).float().mean()


def top1(logits: Float[Tensor, "N K"], labels: Int[Tensor, " N"]) -> float:
    """Fraction of correctly classified images."""
    return float((logits.argmax(dim=1) == labels.to(logits.device)).float().mean())
