"""The classifier of teachers and students: a network that takes images in [0, 1].

A `Classifier` includes the normalisation, so that neither a caller nor a device can get it wrong. It can also resize
its images for a network that takes another size only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nayer_edge.config import InputSpec
from nayer_edge.models import build as sources


class Classifier(nn.Module):
    """A backbone with its normalisation and, where `rebuild` has one, its resizing: images in [0, 1] → logits.

    Attributes:
        model: its name, for example "nayer:wrn_40_2".
        spec: the input that it expects.
        classes: class names in the order of the logits.
        rebuild: what else is needed to build it again: arguments, a configuration, library versions, the size to which
            images are resized.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        model: str,
        spec: InputSpec,
        classes: Sequence[str],
        rebuild: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = model
        self.spec = spec
        self.classes = tuple(classes)
        self.rebuild = dict(rebuild or {})
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        normalised = (images - self.mean) / self.std
        if self.resize is not None:
            normalised = F.interpolate(normalised, self.resize, mode="bilinear", antialias=True)
        return sources.logits_in(self.backbone(normalised))

    @property
    def resize(self) -> tuple[int, int] | None:
        """Height and width that the backbone takes; None: those of the images."""
        size = self.rebuild.get("resize")
        return None if size is None else (int(size[0]), int(size[1]))

    @property
    def identity(self) -> str:
        """The name and everything else that determines the function computed by given weights."""
        decisive = {key: value for key, value in self.rebuild.items() if key not in ("versions", "origin")}
        return self.model + (json.dumps(decisive, sort_keys=True) if decisive else "")

    @property
    def parameter_count(self) -> int:
        """Trainable parameters of the backbone."""
        return sum(parameter.numel() for parameter in self.backbone.parameters())
