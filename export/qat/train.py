"""Data-free quantization-aware training (QAT): distils the teacher into the INT8 network, rounding included.

Weights, biases and activation ranges are trained for a few epochs on the quantized graph itself (graph_network.py),
with images of the memory bank and the teacher's logits. The results are new values for the constants of the FP32 graph,
and new ranges. They go through the same quantizer as calibrated ones, so all rules of the target apply to them.

Targets share a network if they start from the same quantized graph, because a network adapts to particular rounding
errors. TensorRT and TensorRT-RTX usually do. The graphs for x86 and ARM never do: weights have 7 bits on x86 and 8 on
ARM. Targets that were calibrated by different methods do not, either: each is trained from its own start.

BatchNorm stays folded into the convolutions, as on the device. Unfolding it for training would let the statistics of
small batches change the scales that are being learnt. A BatchNorm that cannot be folded keeps its running statistics
and learns its scale and shift.
"""

from __future__ import annotations

import hashlib
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

from ..int8.calibration import Ranges
from ..int8.qdq import with_qdq
from ..targets import Target
from .graph_network import GraphNetwork

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""random stream → images (B, C, H, W) in [0, 1], and the teacher's logits (B, classes) for them"""


@dataclass(frozen=True)
class Schedule:
    """Length and learning rates.

    Attributes:
        epochs: number of epochs.
        steps: optimiser steps per epoch.
        lr: peak learning rate of Adam, relative to the root mean square weight of each channel; cosine decay to 0.
        temperature: of the distillation loss.
        range_lr: peak learning rate for the logarithms of ranges.
    """

    epochs: int
    steps: int
    lr: float
    temperature: float
    range_lr: float = 2e-3


@dataclass(frozen=True)
class QatResult:
    """What QAT learnt.

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
    """Trains a network with fake quantization against the teacher's logits; in float32, which represents the grids
    exactly.

    Args:
        network: images → logits.
        weights: parameters trained with schedule.lr.
        ranges: parameters trained with schedule.range_lr.
        draw: images and teacher logits of one step.
        schedule: length and learning rates.
        stream: epoch → random stream for `draw`.
        on_step: called after every step.

    Returns:
        mean loss of every epoch.

    Raises:
        TrainingError: the loss is not finite.
    """
    groups = [{"params": p, "lr": lr} for p, lr in ((weights, schedule.lr), (ranges, schedule.range_lr)) if p]
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    total, losses = schedule.epochs * schedule.steps, []
    for epoch in range(schedule.epochs):
        random, summed = stream(epoch), 0.0
        for step in range(schedule.steps):
            factor = cosine(epoch * schedule.steps + step, total, 1.0, 0.0)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
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
                f"The QAT loss became {losses[-1]} in epoch {epoch}.",
                fix="Lower export.qat_lr, or export without --qat.",
            )
    return losses


@dataclass
class QatTrainer:
    """Runs QAT for one target after another; targets with equal quantized graphs share the result.

    Attributes:
        draw: images and teacher logits of one step.
        schedule: length and learning rates.
        stream: epoch → random stream for `draw`.
        device: to train on.
        progress: is told of every step.
    """

    draw: Draw
    schedule: Schedule
    stream: Callable[[int], torch.Generator]
    device: torch.device
    progress: Progress
    _results: dict[tuple[bool, int, bytes], QatResult] = field(default_factory=dict)

    def __call__(
        self, graph: ModelProto, ranges: Ranges, target: Target, nodes_to_exclude: Collection[str]
    ) -> QatResult:
        """Trains a graph.

        Args:
            graph: FP32, prepared; training starts from its constants.
            ranges: calibrated, of every tensor that may be quantized; training starts from them.
            target: its rules apply.
            nodes_to_exclude: eligible nodes that stay in float.

        Raises:
            UsageError: an operator is not supported (torch_operators.py).
            TrainingError: the loss is not finite.
        """
        quantized = with_qdq(graph, ranges, target, nodes_to_exclude=nodes_to_exclude)
        # The graph holds its weights and the scales of its activations, too: all that training starts from.
        start = target.symmetric, target.weight_max, hashlib.sha256(quantized.SerializeToString()).digest()
        if start not in self._results:
            network = GraphNetwork(graph, quantized, ranges, target).to(self.device)
            self.progress.start(f"QAT for {target.name}", self.schedule.epochs * self.schedule.steps)
            weights, learnt = network.weight_parameters(), network.range_parameters()
            losses = train(network, weights, learnt, self.draw, self.schedule, self.stream, self.progress.advance)
            self.progress.finish()
            record = {**asdict(self.schedule), "loss": [float(f"{loss:.4g}") for loss in losses], "first": target.name}
            self._results[start] = QatResult(network.trained(graph), network.ranges(), record)
        found = self._results[start]
        return QatResult(found.graph, {**ranges, **found.ranges}, found.record)
