"""A straightforward reference implementation of NAYER (Tran et al., CVPR 2024, arXiv 2310.00258, Algorithm 1).

Written from the paper's description, for comparison in the tests. It favours clarity over speed: float32, one image at
a time, Python lists, forward hooks. It shares no code with the package, only the order in which random numbers are
drawn, which makes the two comparable:

    a round     one normal block (groups, D, Z) for the noisy layer; a permutation if there are fewer images
                than classes; then, for each step, the crops (2, B) and the flips (B)
    a KD step   places in the bank (B), then crops and flips

Algorithm 1 of the paper, with the published code's schedule (warm-up, generator life, BatchNorm momentum):

    for each epoch:
        every `g_life` epochs: a new generator
        for each round:                                          synthesis_round
            re-draw the noisy layer, balanced labels, a new Adam
            for g steps: minimise λ_bn L_bn + λ_ce L_ce + λ_adv L_adv
            append the images of the best step to the memory bank
        after warm-up, for each step:                            distillation_epoch
            minimise KL(teacher ‖ student) on images from the bank
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stream = Callable[..., torch.Generator]
Statistics = list[tuple[Tensor, Tensor]]


class ReferenceGenerator(nn.Module):
    """E[y] → BatchNorm1d → one noisy nn.Linear per group of K labels → nn.Linear → convolutions → sigmoid."""

    def __init__(
        self, dimensions: int, classes: int, batch: int, shape: tuple[int, int, int], noisy_dim: int, width: int
    ) -> None:
        super().__init__()
        self.shape, self.classes = shape, classes
        _, height, wide = shape
        self.doublings = 2 if max(height, wide) <= 64 else 5
        self.grid = math.ceil(height / 2**self.doublings), math.ceil(wide / 2**self.doublings)
        self.norm = nn.BatchNorm1d(dimensions)
        self.project = nn.Linear(noisy_dim, 2 * width * self.grid[0] * self.grid[1])
        self.first_norm = nn.BatchNorm2d(2 * width)
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for number in range(self.doublings):
            outputs = width if number == self.doublings - 1 else 2 * width
            self.convolutions.append(nn.Conv2d(2 * width, outputs, 3, padding=1))
            self.norms.append(nn.BatchNorm2d(outputs))
        self.last = nn.Conv2d(width, shape[0], 3, padding=1)
        # Created last, so that the weights of the other layers do not depend on the batch size.
        self.noisy = nn.ModuleList(nn.Linear(dimensions, noisy_dim) for _ in range(math.ceil(batch / classes)))

    @torch.no_grad()
    def redraw(self, random: torch.Generator) -> None:
        """Noisy weights ~ N(0, 1), biases 0."""
        outputs, inputs = self.noisy[0].weight.shape
        drawn = torch.empty(len(self.noisy), inputs, outputs).normal_(generator=random)
        for linear, weight in zip(self.noisy, drawn, strict=True):
            linear.weight.copy_(weight.T)
            linear.bias.zero_()

    def forward(self, embeddings: Tensor) -> Tensor:
        normed = self.norm(embeddings)
        groups = [normed[start : start + self.classes] for start in range(0, len(normed), self.classes)]
        noisy = torch.cat([linear(group) for linear, group in zip(self.noisy, groups, strict=True)])
        x = self.first_norm(self.project(noisy).view(len(noisy), -1, *self.grid))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.leaky_relu(norm(convolution(F.interpolate(x, scale_factor=2))), 0.2)
        x = self.last(x)
        _, height, width = self.shape
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        return torch.sigmoid(x[:, :, top : top + height, left : left + width])


def take_over(mine: ReferenceGenerator, theirs: nn.Module) -> ReferenceGenerator:
    """Copies the weights of the package's generator, whose noisy layer is a single grouped tensor."""
    with torch.no_grad():
        state: Any = theirs
        for index, linear in enumerate(mine.noisy):
            linear.weight.copy_(state.noisy.weight[index].T)
            linear.bias.copy_(state.noisy.bias[index, 0])
        mine.norm.load_state_dict(state.embedding_norm.state_dict())
        mine.project.load_state_dict(state.project.state_dict())
        convolutions = [module for module in state.body if isinstance(module, nn.Conv2d)]
        norms = [module for module in state.body if isinstance(module, nn.BatchNorm2d)]
        for own, other in zip([*mine.convolutions, mine.last], convolutions, strict=True):
            own.load_state_dict(other.state_dict())
        for own, other in zip([mine.first_norm, *mine.norms], norms, strict=True):
            own.load_state_dict(other.state_dict())
    return mine


def new_generator(random: torch.Generator, *arguments: Any) -> ReferenceGenerator:
    """PyTorch's default initialisation, with the stream's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.initial_seed())
        return ReferenceGenerator(*arguments)


def labels_of_a_round(batch: int, classes: int, random: torch.Generator) -> Tensor:
    """Every class equally often; distinct classes if the batch has fewer images than classes."""
    if batch < classes:
        return torch.randperm(classes, generator=random)[:batch]
    return torch.tensor([number % classes for number in range(batch)])


def crop_and_flip(images: Tensor, pad: int, flip: bool, random: torch.Generator) -> Tensor:
    """Zero-pads, crops and mirrors, image by image."""
    if pad == 0 and not flip:
        return images
    count, _, height, width = images.shape
    shifts = torch.randint(-pad, pad + 1, (2, count), generator=random)
    mirrored = torch.randint(0, 2, (count,), generator=random)
    made = []
    for index in range(count):
        padded = F.pad(images[index], (pad, pad, pad, pad))
        top, left = pad + int(shifts[0, index]), pad + int(shifts[1, index])
        crop = padded[:, top : top + height, left : left + width]
        made.append(crop.flip(2) if flip and mirrored[index] == 1 else crop)
    return torch.stack(made)


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(p/T) ‖ softmax(q/T)) of each image."""
    p, q = torch.softmax(p_logits / temperature, 1), torch.softmax(q_logits / temperature, 1)
    return (p * (p.log() - q.log())).sum(1)


def teacher_with_statistics(teacher: nn.Module, images: Tensor) -> tuple[Tensor, Statistics, list[nn.Module]]:
    """The teacher's logits, and mean and biased variance of the input of each BatchNorm."""
    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    entered: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        entered[module] = inputs[0]

    hooks = [layer.register_forward_hook(remember) for layer in layers]
    logits = teacher(images)
    for hook in hooks:
        hook.remove()
    statistics = [(entered[layer].mean([0, 2, 3]), entered[layer].var([0, 2, 3], unbiased=False)) for layer in layers]
    return logits, statistics, layers


def batchnorm_loss(now: Statistics, layers: list[nn.Module], memory: Statistics | None, momentum: float) -> Tensor:
    """L_bn = Σ ‖μ̂ − μ‖₂ + ‖σ̂² − σ²‖₂ with μ = (1 − m)·now + m·memory from the second round on."""
    total = torch.zeros(())
    for index, (mean, variance) in enumerate(now):
        layer: Any = layers[index]
        if memory is not None:
            old_mean, old_variance = memory[index]
            mean = (1 - momentum) * mean + momentum * old_mean
            variance = (1 - momentum) * variance + momentum * old_variance
        total = total + (layer.running_mean - mean).norm() + (layer.running_var - variance).norm()
    return total


@dataclass
class Step:
    """One generator step: its losses, and its images before augmentation."""

    bn: float
    ce: float
    adv: float
    loss: float
    images: Tensor


@dataclass
class ReferenceRound:
    """Images of the best step (as bytes), their labels, and every step."""

    images: Tensor
    labels: Tensor
    best: int
    steps: list[Step]
    memory: Statistics


def synthesis_round(
    generator: ReferenceGenerator,
    embeddings: Tensor,
    teacher: nn.Module,
    student: nn.Module | None,
    memory: Statistics | None,
    config: Any,
    random: torch.Generator,
) -> ReferenceRound:
    """Lines 4 to 12 of Algorithm 1; no student: warm-up, L_adv = 0."""
    generator.redraw(random)
    labels = labels_of_a_round(config.batch, len(embeddings), random)
    adam = torch.optim.Adam(generator.parameters(), lr=config.lr, betas=(0.5, 0.999))
    generator.train()
    steps: list[Step] = []
    now: Statistics = []
    for _ in range(config.g_steps):
        images = generator(embeddings[labels])
        seen = crop_and_flip(images, config.augment.pad, config.augment.flip, random)
        logits, now, layers = teacher_with_statistics(teacher, seen)
        bn = batchnorm_loss(now, layers, memory, config.bn_momentum)
        ce = -torch.log_softmax(logits, 1)[range(len(labels)), labels].mean()
        adv = torch.zeros(())
        if student is not None:
            answers = student(seen)
            agree = (logits.argmax(1) == answers.argmax(1)).float()
            adv = -(agree * kl(logits, answers)).mean()
        loss = config.lambda_bn * bn + config.lambda_ce * ce + config.lambda_adv * adv
        steps.append(Step(bn.item(), ce.item(), adv.item(), loss.item(), images.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    if student is not None:
        student.zero_grad()  # only the generator is trained here
    last = [(mean.detach(), variance.detach()) for mean, variance in now]
    if memory is None:
        remembered = last
    else:
        m = config.bn_momentum
        remembered = [
            (m * old_mean + (1 - m) * mean, m * old_variance + (1 - m) * variance)
            for (old_mean, old_variance), (mean, variance) in zip(memory, last, strict=True)
        ]
    best = min(range(len(steps)), key=lambda number: steps[number].loss)
    return ReferenceRound((steps[best].images * 255).round().to(torch.uint8), labels, best, steps, remembered)


def learning_rate(step: int, steps: int, start: float, end: float) -> float:
    """Cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def distillation_epoch(
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    bank: list[Tensor],
    config: Any,
    epoch: int,
    random: torch.Generator,
) -> float:
    """The student's steps of one epoch after warm-up, counted from 0; returns the mean loss."""
    student.train()
    losses = []
    for step in range(config.steps):
        total = (config.epochs - config.warmup_epochs) * config.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch * config.steps + step, total, config.lr, config.lr_min)
        places = torch.randint(0, len(bank), (config.batch,), generator=random)
        images = torch.stack([bank[place] for place in places])
        images = crop_and_flip(images, config.augment.pad, config.augment.flip, random).float() / 255
        with torch.no_grad():
            wanted = teacher(images)
        loss = config.temperature**2 * kl(wanted, student(images), config.temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    student.eval()
    return sum(losses) / len(losses)


@dataclass
class ReferenceRun:
    """The result of a run: one line of losses per epoch, and the bank, oldest image first."""

    curve: list[dict[str, float | None]] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def distil(
    teacher: nn.Module,
    student: nn.Module,
    embeddings: Tensor,
    shape: tuple[int, int, int],
    settings: Any,
    stream: Stream,
) -> ReferenceRun:
    """The whole of Algorithm 1; the student is trained in place."""
    synthesis, config = settings.synthesis, settings.distill
    run = ReferenceRun()
    generator: ReferenceGenerator | None = None
    memory: Statistics | None = None
    optimizer = torch.optim.SGD(
        student.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    for epoch in range(config.epochs):
        warm = epoch < config.warmup_epochs
        if epoch % synthesis.g_life == 0:
            sizes = (embeddings.shape[1], len(embeddings), synthesis.batch, shape)
            widths = (settings.generator.noisy_dim, settings.generator.channels)
            generator = new_generator(stream("generator", epoch), *sizes, *widths)
        assert generator is not None
        best: list[Step] = []
        for number in range(synthesis.warmup_rounds if warm else synthesis.rounds):
            made = synthesis_round(
                generator,
                embeddings,
                teacher,
                None if warm else student.eval(),
                memory,
                synthesis,
                stream("round", epoch, number),
            )
            memory = made.memory
            best.append(made.steps[made.best])
            run.images.extend(made.images)
            run.labels.extend(made.labels.tolist())
        kd = None
        if not warm:
            later = epoch - config.warmup_epochs
            random = stream("student", later)
            kd = distillation_epoch(student, teacher, optimizer, run.images, config, later, random)
        run.curve.append(
            {
                "loss_bn": sum(step.bn for step in best) / len(best),
                "loss_ce": sum(step.ce for step in best) / len(best),
                "loss_adv": sum(step.adv for step in best) / len(best),
                "loss_kd": kd,
            }
        )
    return run
