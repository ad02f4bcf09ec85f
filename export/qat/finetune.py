"""Data-free fine-tuning: an INT8 network learns, with its rounding in the forward pass, to answer as the teacher does.

Calibration alone chooses ranges for weights that know nothing of rounding. Here weights, biases and ranges are trained
for a few epochs on the quantized graph itself (graph_network.py), with images of the memory bank and the teacher's
logits. Only two things come out of it, new values for the constants of the FP32 graph and new ranges; they go through
the same quantizer as calibrated ones, so that every rule of a target holds for them too.

One network is trained for each scheme, that is, for each set of targets whose graphs round at the same tensors to the
same grids, and not one for all: what a network learns is to live with particular rounding errors. TensorRT and
TensorRT-RTX share one. UINT8 and INT8 with a zero point are one grid, but x86 takes 7 bits for weights where ARM takes
8, so these two are trained apart.

BatchNorm: the exporter has folded it into the convolutions, and there it stays, as the device has it. It is not
unfolded for training: statistics of small batches would change the very scales that are being learnt. What cannot be
folded keeps its running statistics and learns scale and shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn

from nayer_edge.distillation import cosine
from nayer_edge.errors import TrainingError
from nayer_edge.losses import distillation_loss
from nayer_edge.runtime.progress import Progress

from ..calibration import Ranges
from ..qdq import with_qdq
from ..targets import Target
from .graph_network import GraphNetwork

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""a random stream → images (B, C, H, W) in [0, 1], and the teacher's logits (B, classes) for them"""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs, steps: epochs, and optimiser steps in each.
        lr: peak step of Adam, as a fraction of each channel's root mean square weight; cosine decay to 0.
        range_lr: the same for the logarithms of ranges.
        temperature: of the distillation loss.
    """

    epochs: int
    steps: int
    lr: float
    temperature: float
    range_lr: float = 2e-3


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning found.

    Attributes:
        graph: the FP32 graph with new weights and biases.
        ranges: of activations.
        record: schedule and mean loss of every epoch, for quantization.json.
    """

    graph: ModelProto
    ranges: Ranges
    record: dict[str, Any]


def train(
    network: nn.Module,
    weights: list[nn.Parameter],
    ranges: list[nn.Parameter],
    draw: Draw,
    schedule: Schedule,
    stream: Callable[[int], torch.Generator],
    on_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Trains a network with fake quantization against the teacher's logits; in float32, where its grids are exact.

    Args:
        weights, ranges: the parameters, which step with schedule.lr and schedule.range_lr.
        draw: the images of one step.
        stream: epoch → the random stream that its images are drawn by.

    Returns:
        mean loss of every epoch.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    groups = [(weights, schedule.lr), (ranges, schedule.range_lr)]
    optimizer = torch.optim.Adam([{"params": part, "lr": lr} for part, lr in groups if part], betas=(0.9, 0.99))
    total, losses = schedule.epochs * schedule.steps, []
    for epoch in range(schedule.epochs):
        random, summed = stream(epoch), 0.0
        for step in range(schedule.steps):
            factor = cosine(epoch * schedule.steps + step, total, 1.0, 0.0)
            for group, lr in zip(optimizer.param_groups, (lr for part, lr in groups if part), strict=True):
                group["lr"] = lr * factor
            images, teacher_logits = draw(random)
            loss = distillation_loss(network(images), teacher_logits, schedule.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            summed += loss.item()
            on_step()
        losses.append(summed / schedule.steps)
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"The loss of fine-tuning became {losses[-1]} in epoch {epoch}.",
                fix="Lower export.finetune_lr, or export without --finetune.",
            )
    return losses


@dataclass
class FineTuner:
    """Fine-tunes for target after target; those of one scheme share the result.

    Attributes:
        draw: the images of one step.
        schedule: how long and how fast.
        stream: epoch → random stream.
        device: where to train.
        progress: shows the steps.
    """

    draw: Draw
    schedule: Schedule
    stream: Callable[[int], torch.Generator]
    device: torch.device
    progress: Progress
    _done: dict[Any, Tuned] = field(default_factory=dict)

    def __call__(self, graph: ModelProto, ranges: Ranges, target: Target, float_nodes: Collection[str]) -> Tuned:
        """Fine-tunes a graph.

        Args:
            graph: FP32, prepared; its constants are the values to begin with.
            ranges: calibrated, of every tensor that may be quantized; those to begin with.
            target: whose scheme.
            float_nodes: products that stay in float.

        Raises:
            UsageError: an operator has no differentiable form here.
            TrainingError: the loss is no longer finite.
        """
        quantized = with_qdq(graph, ranges, target, float_nodes=float_nodes)
        scheme = (target.symmetric, target.weight_max, *((n.op_type, n.name, *n.input) for n in quantized.graph.node))
        if scheme not in self._done:
            network = GraphNetwork(graph, quantized, ranges, target).to(self.device)
            self.progress.start(f"fine-tune for {target.name}", self.schedule.epochs * self.schedule.steps)
            weights, learnt = network.weight_parameters(), network.range_parameters()
            losses = train(network, weights, learnt, self.draw, self.schedule, self.stream, self.progress.advance)
            self.progress.finish()
            record = {**asdict(self.schedule), "loss": [float(f"{loss:.4g}") for loss in losses], "first": target.name}
            self._done[scheme] = Tuned(network.trained(graph), network.ranges(), record)
        found = self._done[scheme]
        return Tuned(found.graph, {**ranges, **found.ranges}, found.record)
