"""What one image through a network costs. Counted, not timed: it depends on shapes, not on weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nayer_edge.config import InputSpec
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier


@dataclass(frozen=True)
class Cost:
    """One image through a network.

    Attributes:
        flop: floating-point operations of a forward pass.
        activation_bytes: what a backward pass has to keep, float32.
        parameters: of the network.
    """

    flop: float
    activation_bytes: float
    parameters: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions and matrix products; two floating-point operations each."""
        return int(self.flop) // 2


def cost_of(model: str, spec: InputSpec, classes: int) -> Cost:
    """The cost of an untrained network by its name, built without memory for its weights where that is possible."""
    labels = [f"class {number}" for number in range(classes)]
    try:
        with torch.device("meta"):
            network = build_classifier(model, spec, labels)
    except RuntimeError:
        network = build_classifier(model, spec, labels)
    return cost_of_network(network.eval().to("meta"))


def cost_of_network(network: Classifier) -> Cost:
    """The cost of a network in evaluation mode, on the device of its weights; the meta device computes nothing."""
    kept = 0

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal kept
        if isinstance(output, Tensor):
            kept += output.numel() * 4

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    try:
        device = next((parameter.device for parameter in network.parameters()), None)
        flop = flop_of(network, torch.zeros(1, *network.spec.shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(float(flop), float(kept), network.parameter_count)


def flop_of(network: nn.Module, inputs: Tensor) -> int:
    """Floating-point operations of one forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(inputs)
    return counter.get_total_flops()
