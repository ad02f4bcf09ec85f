"""Losses for synthetic images that need no BatchNorm statistics. Not part of NAYER; each is off by default.

Shapes: B images, C channels, H × W pixels, N patches, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nayer_edge.config import Synthesis
from nayer_edge.errors import UsageError

MOST_PAIRS = 256
"""pairs of patches per image whose similarities are compared, evenly chosen from all"""
LEAST_BANDWIDTH = 1e-3
"""of the density of similarities, which may all be equal"""


def total_variation(images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbouring pixels, vertical plus horizontal.

    Mahendran & Vedaldi, CVPR 2015 (https://arxiv.org/abs/1412.0035), anisotropic, with β = 1.
    """
    down, across = images.diff(dim=2), images.diff(dim=3)
    return sum((part.abs().mean() for part in (down, across) if part.numel()), images.new_zeros(()))


def activation_loss(features: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """L_a: −mean |f| of the features before the classifier, which are large for images like those of the training.

    Chen et al., "Data-free learning of student networks", ICCV 2019 (https://arxiv.org/abs/1904.01186), as a mean
    over the features in place of their sum.
    """
    return -features.abs().mean()


def patch_similarity_loss(tokens: Float[Tensor, "B N D"]) -> Float[Tensor, ""]:
    """L_PSE of one layer: the negative entropy of the similarities between an image's patches, mean over the images.

    Noise makes all patches alike; objects make some alike and others not. Li et al., "Patch similarity aware data-free
    quantization for vision transformers", ECCV 2022 (https://arxiv.org/abs/2203.02250): cosine similarity, a
    Gaussian kernel density, and its differential entropy, here by resubstitution with Silverman's bandwidth.
    """
    unit = F.normalize(tokens.float(), dim=2, eps=1e-6)
    count = unit.shape[1]
    rows, columns = torch.triu_indices(count, count, 1, device=unit.device)
    chosen = torch.arange(min(len(rows), MOST_PAIRS), device=unit.device) * len(rows) // min(len(rows), MOST_PAIRS)
    rows, columns = rows[chosen], columns[chosen]
    similarity = (unit @ unit.transpose(1, 2))[:, rows, columns]
    pairs = similarity.shape[1]
    spread = similarity.detach().std(dim=1, keepdim=True, correction=0)
    bandwidth = (1.06 * spread * pairs**-0.2).clamp_min(LEAST_BANDWIDTH)[:, :, None]
    distance = (similarity[:, :, None] - similarity[:, None, :]) / bandwidth
    density = torch.logsumexp(-0.5 * distance.square(), dim=2) - math.log(pairs * math.sqrt(2 * math.pi))
    return (density - bandwidth[:, :, 0].log()).mean()


def weights(config: Synthesis) -> tuple[float, float, float]:
    """The weights of these losses."""
    return config.lambda_tv, config.lambda_act, config.lambda_patch


def weighted_loss(images: Float[Tensor, "B C H W"], watched: Watched, config: Synthesis) -> Float[Tensor, ""]:
    """λ_tv · TV + λ_act · L_a + λ_patch · Σ L_PSE over the attention layers; losses without a weight are not computed.

    Args:
        images: before augmentation.
        watched: what the teacher computed of the augmented images; see `watching`.
    """
    loss = images.new_zeros((), dtype=torch.float32)
    if config.lambda_tv:
        loss = loss + config.lambda_tv * total_variation(images.float())
    if config.lambda_act and watched.features is not None:
        loss = loss + config.lambda_act * activation_loss(watched.features.float())
    for tokens in watched.tokens if config.lambda_patch else ():
        loss = loss + config.lambda_patch * patch_similarity_loss(tokens)
    return loss


@dataclass
class Watched:
    """What a network computed on its way to the logits.

    Attributes:
        features: inputs of the last linear layer, (B, D); None if it has none.
        tokens: outputs of the attention layers, (B, N, D) each.
    """

    features: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)


def attention_layers(network: nn.Module) -> list[nn.Module]:
    """The outermost modules that are attention by their names: timm's `Attention`, torch's `MultiheadAttention`,
    `ViTAttention` of transformers, and so on."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in network.named_modules():
        if type(module).__name__.endswith("Attention") and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return [module for _, module in found]


def require_layers(teacher: nn.Module, config: Synthesis) -> None:
    """Raises UsageError if a loss with a weight has no layers to look at."""
    if config.lambda_patch and not attention_layers(teacher):
        raise UsageError(
            "synthesis.lambda_patch compares the patches of a transformer, and the teacher has no attention layers.",
            fix="Set synthesis.lambda_patch to 0.",
        )
    if config.lambda_act and not any(isinstance(module, nn.Linear) for module in teacher.modules()):
        raise UsageError(
            "synthesis.lambda_act looks at the features before the last linear layer, and the teacher has none.",
            fix="Set synthesis.lambda_act to 0.",
        )


@contextmanager
def watching(network: nn.Module) -> Iterator[Watched]:
    """Records what these losses need of the next forward pass."""
    seen = Watched()

    def before_head(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.features = inputs[0].flatten(1)

    def after_attention(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        if isinstance(tokens, Tensor) and tokens.ndim == 3 and tokens.shape[1] > 2:
            seen.tokens.append(tokens)

    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(after_attention) for module in attention_layers(network)]
    handles += [linear[-1].register_forward_pre_hook(before_head)] if linear else []
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
