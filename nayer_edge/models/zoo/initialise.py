"""Weight initialisation shared by the zoo."""

from __future__ import annotations

from torch import nn


def initialise(model: nn.Module) -> None:
    """He-normal convolutions (fan-out), unit BatchNorms, zero biases (He et al. 2015, arXiv 1502.01852, Eq. 14)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
