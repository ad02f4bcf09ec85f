"""Trains a teacher on labelled images, for demonstrations and benchmarks; the images are augmented on the device."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from nayer_edge.config import Teach
from nayer_edge.data.datasets import LabelledImages
from nayer_edge.errors import IntegrityError, TrainingError
from nayer_edge.memory_bank import to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute, random_stream, seeded
from nayer_edge.runtime.progress import Progress, Silent
from nayer_edge.storage.files import digest_of
from nayer_edge.storage.tensors import load_tensors, save_tensors
from nayer_edge.training.augment import crop_and_flip
from nayer_edge.training.optimizers import make_optimizer

CHECKPOINT_SECONDS = 60.0
"""minimum time between two checkpoints"""


def teach(
    classifier: Classifier,
    data: LabelledImages,
    config: Teach,
    compute: Compute,
    seed: int,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Classifier:
    """Trains with a one-cycle schedule (Smith & Topin 2019, arXiv 1708.07120); returns the last epoch's weights.

    Args:
        classifier: untrained; trained in place.
        data: uint8 images of the classifier's size.
        checkpoint: where the state is saved after an epoch, and read again if it belongs to the same training.
        checkpoint_seconds: minimum time between two checkpoints.

    Returns:
        The classifier in eval mode, on the compute device.

    Raises:
        TrainingError: the loss is not finite.
        IntegrityError: the checkpoint is damaged.
    """
    progress = progress or Silent()
    compute.place(classifier).train()
    images, labels = data.images.to(compute.device), data.labels.to(compute.device)
    batch = min(config.batch, len(images))
    steps = len(images) // batch
    optimizer = make_optimizer(
        config.optimizer,
        classifier,
        lr=config.lr,
        muon_lr=config.muon_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peaks, total_steps=steps * config.epochs, cycle_momentum=False
    )
    state = _State(classifier, optimizer, schedule, _digest(classifier, data, config, compute, seed))
    first = state.restore(checkpoint) if checkpoint is not None else 0
    written = -math.inf
    progress.start("teach", steps * config.epochs)
    progress.advance(steps * first)
    for epoch in range(first, config.epochs):
        random = random_stream(seed, "teach", epoch, device=compute.device)
        order = torch.randperm(len(images), generator=random, device=compute.device)
        total = torch.zeros((), device=compute.device)
        # Dropout and stochastic depth draw from torch's global generator.
        with seeded(random_stream(seed, "teach dropout", epoch).initial_seed()):
            for step in range(steps):
                chosen = order[step * batch : (step + 1) * batch]
                seen = to_unit(crop_and_flip(images[chosen], config.augment, random))
                with compute.autocast():
                    logits = classifier(seen)
                loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=config.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
                progress.advance()
        mean = float(total) / steps
        if not math.isfinite(mean):
            raise TrainingError(
                f"The teacher's loss became {mean} in epoch {epoch + 1}.",
                fix="Lower teach.lr, or add --set precision=fp32.",
            )
        progress.figures(epoch=f"{epoch + 1}/{config.epochs}", loss=mean)
        if checkpoint is not None and time.monotonic() - written >= checkpoint_seconds:
            state.save(checkpoint, epoch + 1)
            written = time.monotonic()
    progress.finish()
    return classifier.eval()


def _digest(classifier: Classifier, data: LabelledImages, config: Teach, compute: Compute, seed: int) -> str:
    """Identifies a training: a checkpoint with another digest is not continued."""
    pixels = hashlib.sha256(data.images.cpu().numpy().tobytes())
    pixels.update(data.labels.cpu().numpy().tobytes())
    return digest_of(
        {
            "teach": config.model_dump(mode="json", exclude={"data"}),
            "images": pixels.hexdigest(),
            "model": classifier.identity,
            "bf16": compute.bf16,
            "seed": seed,
        }
    )


class _State:
    """Everything needed to continue a training: weights, momentum and schedule. Random streams belong to epochs."""

    def __init__(
        self,
        classifier: Classifier,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.OneCycleLR,
        digest: str,
    ) -> None:
        self._classifier, self._optimizer, self._schedule, self._digest = classifier, optimizer, schedule, digest

    def save(self, path: Path, epoch: int) -> None:
        """Writes the state after so many epochs."""
        tensors = {f"weights.{name}": tensor for name, tensor in self._classifier.backbone.state_dict().items()}
        for index, parameter in enumerate(self._classifier.parameters()):
            if parameter in self._optimizer.state:
                tensors[f"momentum.{index}"] = self._optimizer.state[parameter]["momentum_buffer"]
        facts = {"digest": self._digest, "epoch": epoch, "schedule": self._schedule.state_dict()}
        save_tensors(path, tensors, {"facts": json.dumps(facts)})

    def restore(self, path: Path) -> int:
        """Reads the state; returns the number of finished epochs, 0 if there is none of this training.

        Raises:
            IntegrityError: the file is damaged.
        """
        if not path.is_file():
            return 0
        tensors = load_tensors(path, "a checkpoint")
        try:
            facts = self._facts(path)
            if facts["digest"] != self._digest:
                return 0
            weights = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
            self._classifier.backbone.load_state_dict(weights)
            for index, parameter in enumerate(self._classifier.parameters()):
                if f"momentum.{index}" in tensors:
                    buffer = torch.empty_like(parameter).copy_(tensors[f"momentum.{index}"])
                    self._optimizer.state[parameter]["momentum_buffer"] = buffer
            self._schedule.load_state_dict(facts["schedule"])
            for group, lr in zip(self._optimizer.param_groups, self._schedule.get_last_lr(), strict=True):
                group["lr"] = lr
            return int(facts["epoch"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise IntegrityError(
                f"{path} is not a checkpoint of this teacher.",
                why=f"{error}".splitlines()[0] if f"{error}" else type(error).__name__,
                fix=f"Remove it to train the teacher from the first epoch: rm {shlex.quote(str(path))}",
            ) from error

    @staticmethod
    def _facts(path: Path) -> dict[str, Any]:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["facts"])
