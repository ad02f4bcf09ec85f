"""One synthesis round (Tran et al., CVPR 2024, Alg. 1, lines 4 to 12, Eq. 4 to 8).

Draw the noisy layer anew, take a fresh Adam, and for g steps minimise
L = λ_bn·L_bn + λ_ce·L_ce + λ_adv·L_adv over all of the generator's weights; keep the images of the best step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nayer_edge import losses
from nayer_edge.augment import crop_and_flip
from nayer_edge.batchnorm import BatchNormStatistics
from nayer_edge.config import Synthesis
from nayer_edge.generator import Generator, balanced_labels
from nayer_edge.memory_bank import to_uint8
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.runtime.distributed import SINGLE, World


@dataclass(frozen=True)
class Round:
    """What one round made.

    Attributes:
        images: of the step with the lowest loss, before augmentation; in a world of several ranks, this one's share.
        labels: what they were made for.
        losses: L_bn, L_ce and L_adv of that step and the whole batch, on the device (reading them waits for it).
    """

    images: UInt8[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]
    losses: Float[Tensor, 3]


def synthesize_round(
    generator: Generator,
    embeddings: Float[Tensor, "K D"],
    teacher: Classifier,
    student: Classifier | None,
    statistics: BatchNormStatistics,
    config: Synthesis,
    compute: Compute,
    random: torch.Generator,
    on_step: Callable[[], None] = lambda: None,
    world: World = SINGLE,
) -> Round:
    """Runs one round; the generator's weights and the statistics' memory go on to the next.

    Args:
        embeddings: of all classes, on the device.
        teacher: evaluated, frozen.
        student: for L_adv; None switches that loss off (warm-up).
        random: a stream on the device, the same on every rank: each draws for the whole batch and takes its share.
        on_step: called after each step.
        world: ranks that make equal shares of the batch.
    """
    generator.noisy.redraw(random)
    labels = world.share(balanced_labels(config.batch, len(embeddings), random))
    inputs = embeddings[labels]
    parameters = list(generator.parameters())
    generator.train()
    optimizer = torch.optim.Adam(parameters, lr=config.lr, betas=(0.5, 0.999), fused=True)
    best_loss = torch.full((), torch.inf, device=inputs.device)
    best_images = torch.empty((), device=inputs.device)
    # What stays where no step has a finite loss, so that the caller sees it.
    best_parts = torch.full((3,), torch.nan, device=inputs.device)
    for step in range(config.g_steps):
        with compute.autocast():
            images = generator(inputs)
            seen = crop_and_flip(images, config.augment, random, world)
            with statistics.watch():
                teacher_logits = teacher(seen)
            student_logits = student(seen) if student is not None else None
        loss_bn = statistics.loss()
        loss_ce = losses.class_loss(teacher_logits, labels)
        if student_logits is None:
            loss_adv = torch.zeros_like(loss_ce)
        else:
            loss_adv = losses.adversarial_loss(teacher_logits, student_logits)
        loss = config.lambda_bn * loss_bn + config.lambda_ce * loss_ce + config.lambda_adv * loss_adv
        with torch.no_grad():
            # Kept on the device: comparing here would wait for it at every step.
            # Judged by the whole batch, so that all ranks keep the same step.
            whole_loss, *parts = world.mean(torch.stack((loss, loss_bn, loss_ce, loss_adv))).unbind()
            better = whole_loss < best_loss
            best_images = images.detach() if step == 0 else torch.where(better, images.detach(), best_images)
            best_parts = torch.where(better, torch.stack(parts), best_parts)
            best_loss = torch.where(better, whole_loss, best_loss)
        optimizer.zero_grad(set_to_none=True)
        # Only the generator's gradients are wanted; the student's weights keep theirs out of it.
        loss.backward(inputs=parameters)
        world.average_gradients(parameters, generator.own_parameters)
        optimizer.step()
        on_step()
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
    """Fresh, class-balanced images from a trained generator, for calibration or as a synthetic hold-out.

    Whole rounds without L_adv on a copy of the generator, so that drawing leaves no trace; images of the last
    round beyond `count` are dropped.

    Args:
        memory: the BatchNorm memory of the training run.
        random: stream of round i; disjoint purposes give disjoint images.
    """
    twin = copy.deepcopy(generator)
    statistics = BatchNormStatistics(teacher, config.bn_momentum)
    statistics.memory = memory
    images, labels = [], []
    for number in range(math.ceil(count / config.batch)):
        made = synthesize_round(twin, embeddings, teacher, None, statistics, config, compute, random(number), on_step)
        images.append(made.images)
        labels.append(made.labels)
    return torch.cat(images)[:count], torch.cat(labels)[:count]
