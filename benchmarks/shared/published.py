"""What the published loop does, for comparison: FP32, a list of linears, hooks, a PNG bank on disk, a DataLoader with
workers, and a look at the loss at every step. Written from the description of the method; kept plain on purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms


class ListGenerator(nn.Module):
    """The generator with one nn.Linear per group of labels."""

    def __init__(self, dimensions: int, classes: int, batch: int, noisy_dim: int, width: int, size: int) -> None:
        super().__init__()
        self.classes, self.grid = classes, size // 4
        self.norm = nn.BatchNorm1d(dimensions)
        self.noisy = nn.ModuleList(nn.Linear(dimensions, noisy_dim) for _ in range(-(-batch // classes)))
        self.project = nn.Linear(noisy_dim, 2 * width * self.grid**2)
        self.body = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 3, 3, padding=1),
            nn.Sigmoid(),
        )

    def redraw(self) -> None:
        """New noise."""
        for layer in self.noisy:
            nn.init.normal_(layer.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, embeddings: Tensor) -> Tensor:
        x = self.norm(embeddings)
        parts = [layer(x[i * self.classes : (i + 1) * self.classes]) for i, layer in enumerate(self.noisy)]
        x = self.project(torch.cat(parts)).view(len(embeddings), -1, self.grid, self.grid)
        return self.body(x)


class StatisticsHook:
    """Mean and variance of a BatchNorm's input, as DeepInversion's hook computes them."""

    def __init__(self, module: nn.BatchNorm2d, momentum: float) -> None:
        self.handle = module.register_forward_hook(self._look)
        self.momentum = momentum
        self.memory: tuple[Tensor, Tensor] | None = None

    def _look(self, module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        variance = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        self.now = mean.detach(), variance.detach()
        if self.memory is not None:
            m = self.momentum
            mean = (1 - m) * mean + m * self.memory[0]
            variance = (1 - m) * variance + m * self.memory[1]
        running_mean, running_var = module.running_mean, module.running_var
        self.loss = torch.norm(running_var - variance, 2) + torch.norm(running_mean - mean, 2)  # pyright: ignore[reportOptionalOperand, reportAttributeAccessIssue]

    def remember(self) -> None:
        """Ends a round."""
        if self.memory is None:
            self.memory = self.now
        else:
            m = self.momentum
            self.memory = tuple(m * old + (1 - m) * new for old, new in zip(self.memory, self.now, strict=True))  # pyright: ignore[reportOptionalOperand, reportAttributeAccessIssue]


class PngBank(Dataset[Tensor]):
    """A folder of PNG files, walked anew whenever it is opened."""

    def __init__(self, folder: Path, transform: transforms.Compose) -> None:
        self.files, self.transform = sorted(folder.glob("*.png")), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.files[index]))


def save_png(images: Tensor, folder: Path, prefix: str) -> None:
    """One file per image."""
    pixels = (images.clamp(0, 1).cpu().numpy() * 255).astype(np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{prefix}-{number}.png")


class Published:
    """Teacher, student, generator and bank of the straightforward loop.

    Args:
        teacher, student: FP32 modules that take images in [0, 1].
        embeddings: (K, D).
        folder: of the PNG bank.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        embeddings: Tensor,
        folder: Path,
        *,
        batch: int,
        student_batch: int,
        workers: int,
        temperature: float = 20.0,
        lambdas: tuple[float, float, float] = (10.0, 0.5, 1.33),
    ) -> None:
        self.device = embeddings.device
        self.teacher, self.student, self.embeddings, self.folder = teacher, student, embeddings, folder
        self.batch, self.student_batch, self.workers = batch, student_batch, workers
        self.temperature, self.lambdas = temperature, lambdas
        classes, dimensions = embeddings.shape
        self.generator = ListGenerator(dimensions, classes, batch, 1000, 64, 32).to(self.device)
        self.hooks = [StatisticsHook(m, 0.9) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        self.augment = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
        self.optimizer = torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
        self.rounds = 0

    def synthesize(self, steps: int, *, adversarial: bool) -> None:
        """One round, written to the bank."""
        self.student.eval()
        self.generator.redraw()
        labels = torch.arange(self.batch, device=self.device) % len(self.embeddings)
        optimizer = torch.optim.Adam(self.generator.parameters(), lr=4e-3, betas=(0.5, 0.999))
        best, best_images = 1e9, None
        weight_bn, weight_ce, weight_adv = self.lambdas
        for _ in range(steps):
            images = self.generator(self.embeddings[labels])
            seen = self.augment(images)
            logits = self.teacher(seen)
            loss_bn = sum(hook.loss for hook in self.hooks)
            loss_ce = F.cross_entropy(logits, labels)
            loss_adv = torch.zeros((), device=self.device)
            if adversarial:
                answer = self.student(seen)
                agree = (answer.argmax(1) == logits.argmax(1)).float()
                divergence = F.kl_div(F.log_softmax(answer, 1), F.softmax(logits, 1), reduction="none").sum(1)
                loss_adv = -(divergence * agree).mean()
            loss = weight_bn * loss_bn + weight_ce * loss_ce + weight_adv * loss_adv
            if loss.item() < best:
                best, best_images = loss.item(), images.detach().clone()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for hook in self.hooks:
            hook.remember()
        if best_images is not None:
            save_png(best_images, self.folder, f"{self.rounds:06d}")
        self.rounds += 1

    def train(self, steps: int) -> None:
        """Student steps on a DataLoader opened anew, as after every round."""
        transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )
        bank = PngBank(self.folder, transform)
        sampler = RandomSampler(bank, replacement=True, num_samples=steps * self.student_batch)
        self.student.train()
        for images in DataLoader(bank, self.student_batch, sampler=sampler, num_workers=self.workers):
            images = images.to(self.device)
            with torch.no_grad():
                logits = self.teacher(images)
            answer = self.student(images)
            t = self.temperature
            loss = F.kl_div(F.log_softmax(answer / t, 1), F.softmax(logits / t, 1), reduction="batchmean") * t * t
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
