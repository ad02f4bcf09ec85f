"""One synthesis round (Tran et al., CVPR 2024, Alg. 1, lines 4 to 12, Eq. 4 to 8).

Re-draw the noisy layer, create a new Adam optimizer, and for g steps minimise
L = λ_bn·L_bn + λ_ce·L_ce + λ_adv·L_adv over all weights of the generator; keep the images of the best step. Recipes may
add the losses of `nayer_edge.image_priors` to L.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nayer_edge import losses
from nayer_edge.batchnorm import BatchNormStatistics
from nayer_edge.config import Synthesis
from nayer_edge.generator import Generator, balanced_labels
from nayer_edge.image_priors import watching, weighted_loss, weights
from nayer_edge.memory_bank import to_uint8
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.runtime.distributed import SINGLE, World
from nayer_edge.training.augment import crop_and_flip


@dataclass(frozen=True)
class Round:
    """The result of one round.

    Attributes:
        images: those of the step with the lowest loss, before augmentation; with several ranks, this rank's share.
        labels: the classes that they were generated for.
        losses: L_bn, L_ce and L_adv of that step over the whole batch, on the device (reading them synchronises).
    """

    images: UInt8[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]
    losses: Float[Tensor, 3]


def synthesize_round(
    generator: Generator,
    embeddings: Float[Tensor, "K D"],
    teacher: Classifier,
    student: Classifier | None,
    statistics: BatchNormStatistics | None,
    config: Synthesis,
    compute: Compute,
    random: torch.Generator,
    on_step: Callable[[], None] = lambda: None,
    world: World = SINGLE,
) -> Round:
    """Runs one round. The generator's weights and the BatchNorm memory carry over to the next.

    Args:
        embeddings: of all classes, on the device.
        teacher: in eval mode, frozen.
        student: for L_adv; None disables that loss (warm-up).
        statistics: for L_bn; None disables that loss.
        random: generator on the device, equal on every rank: each draws for the whole batch and uses its share.
        on_step: called after each step.
        world: ranks that generate equal shares of the batch.
    """
    generator.noisy.redraw(random)
    labels = world.share(balanced_labels(config.batch, len(embeddings), random))
    inputs = embeddings[labels]
    parameters = list(generator.parameters())
    generator.train()
    optimizer = torch.optim.Adam(parameters, lr=config.lr, betas=(0.5, 0.999), fused=True)
    best_loss = torch.full((), torch.inf, device=inputs.device)
    best_images = torch.empty((), device=inputs.device)
    # Stays NaN if no step has a finite loss, so that the caller notices.
    best_parts = torch.full((3,), torch.nan, device=inputs.device)
    for step in range(config.g_steps):
        with compute.autocast():
            images = generator(inputs)
            seen = crop_and_flip(images, config.augment, random, world)
            with (
                statistics.watch() if statistics else nullcontext(),
                watching(teacher) if any(weights(config)) else nullcontext() as watched,
            ):
                teacher_logits = teacher(seen)
            student_logits = student(seen) if student is not None else None
        loss_ce = losses.class_loss(teacher_logits, labels)
        loss_bn = statistics.loss() if statistics else torch.zeros_like(loss_ce)
        if student_logits is None:
            loss_adv = torch.zeros_like(loss_ce)
        else:
            loss_adv = losses.adversarial_loss(teacher_logits, student_logits)
        # Without statistics, L_bn is 0 and its weight has no effect.
        loss = config.lambda_bn * loss_bn + config.lambda_ce * loss_ce + config.lambda_adv * loss_adv
        if watched is not None:
            loss = loss + weighted_loss(images, watched, config)
        with torch.no_grad():
            # On the device: a comparison in Python would synchronise at every step.
            # By the loss over the whole batch, so that all ranks keep the same step.
            whole_loss, *parts = world.mean(torch.stack((loss, loss_bn, loss_ce, loss_adv))).unbind()
            better = whole_loss < best_loss
            best_images = images.detach() if step == 0 else torch.where(better, images.detach(), best_images)
            best_parts = torch.where(better, torch.stack(parts), best_parts)
            best_loss = torch.where(better, whole_loss, best_loss)
        optimizer.zero_grad(set_to_none=True)
        # Gradients of the generator only; the student's must not change.
        loss.backward(inputs=parameters)
        world.average_gradients(parameters, generator.own_parameters)
        optimizer.step()
        on_step()
    if statistics:
        statistics.remember()
    return Round(to_uint8(best_images), labels, best_parts)


def draw_images(
    generator: Generator,
    embeddings: Float[Tensor, "K D"],
    teacher: Classifier,
    memory: list[tuple[Tensor, Tensor]] | None,
    config: Synthesis,
    compute: Compute,
    random: Callable[[int], torch.Generator],
    count: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[UInt8[Tensor, "N C H W"], Int[Tensor, " N"]]:
    """New, class-balanced images from a trained generator, for calibration or as a synthetic hold-out.

    Runs whole rounds without L_adv on a copy of the generator, which itself is unchanged. Images of the last round
    beyond `count` are dropped.

    Args:
        memory: the BatchNorm memory of the training run.
        random: returns the random generator of round i; different streams give different images.
    """
    clone = copy.deepcopy(generator)
    statistics = None
    if config.prior == "batchnorm":
        statistics = BatchNormStatistics(teacher, config.bn_momentum)
        statistics.memory = memory
    images, labels = [], []
    for number in range(math.ceil(count / config.batch)):
        made = synthesize_round(clone, embeddings, teacher, None, statistics, config, compute, random(number), on_step)
        images.append(made.images)
        labels.append(made.labels)
    return torch.cat(images)[:count], torch.cat(labels)[:count]
