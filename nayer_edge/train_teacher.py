"""Trains a teacher on labelled images, for demonstrations and benchmarks; the images are augmented on the device."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from nayer_edge.augment import crop_and_flip
from nayer_edge.config import Teach
from nayer_edge.data.datasets import LabelledImages
from nayer_edge.errors import TrainingError
from nayer_edge.memory_bank import to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.optimizers import make_optimizer
from nayer_edge.runtime.compute import Compute, random_stream
from nayer_edge.runtime.progress import Progress, Silent


def teach(
    classifier: Classifier,
    data: LabelledImages,
    config: Teach,
    compute: Compute,
    seed: int,
    progress: Progress | None = None,
) -> Classifier:
    """Trains with a one-cycle schedule (Smith & Topin 2019, arXiv 1708.07120); returns the last epoch's weights.

    Args:
        classifier: untrained; trained in place.
        data: uint8 images of the classifier's size.

    Returns:
        The classifier in eval mode, on the compute device.

    Raises:
        TrainingError: the loss is not finite.
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
    progress.start("teach", steps * config.epochs)
    for epoch in range(config.epochs):
        random = random_stream(seed, "teach", epoch, device=compute.device)
        order = torch.randperm(len(images), generator=random, device=compute.device)
        total = torch.zeros((), device=compute.device)
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
    progress.finish()
    return classifier.eval()
