"""From a trained nn.Module to a gated INT8 model, without its training images.

    python examples/bring_your_own_module.py

The module is a small network that this script trains on scikit-learn's handwritten digits; replace it with your own.
The last 600 digits are held out and used only for validation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nayer_edge as ne

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HELD_OUT = 600


def convolution(before: int, after: int, stride: int) -> nn.Module:
    """A convolution with BatchNorm, whose statistics the synthetic images are trained to match."""
    layer = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


class Network(nn.Module):
    """Three convolutions and a linear layer, for 8×8 greyscale images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(1, 48, 1), convolution(48, 96, 2), convolution(96, 96, 1))
        self.head = nn.Linear(96, len(NAMES))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 1, 8, 8) → logits (B, 10)."""
        return self.head(self.layers(x).mean(dim=(2, 3)))


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Stands for your own training, done earlier where the images were available."""
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network((images[batch] - 0.5) / 0.5), labels[batch]).backward()
            optimizer.step()


def main() -> None:
    """Runs everything: teacher, student, INT8, verdict, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/own_module"), help="the run folder")
    parser.add_argument("--epochs", type=int, default=12, help="distillation epochs")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images / 16).float().unsqueeze(1), torch.from_numpy(digits.target)
    network = Network()
    train(network, images[:-HELD_OUT], labels[:-HELD_OUT], epochs=10)

    teacher = ne.Teacher(network, classes=NAMES, input=ne.InputSpec(channels=1, height=8, width=8))
    crop = {"pad": 1, "flip": False}  # a digit is not its mirror image
    run = ne.distill(
        teacher,
        student="nayer:resnet8",
        out=arguments.out,
        progress=True,
        generator={"noisy_dim": 256, "channels": 32},
        synthesis={"batch": 100, "g_steps": 30, "rounds": 1, "warmup_rounds": 6, "g_life": 5, "augment": crop},
        distill={
            "epochs": arguments.epochs,
            "warmup_epochs": 1,
            "holdout_rounds": 1,
            "steps": 60,
            "batch": 128,
            "lr": 0.1,
            "temperature": 4.0,
            "augment": crop,
            "bank_mib": 64,
        },
        export={"calibration_images": 200},
        gate={"accuracy": {"max_drop_vs_fp32": 0.015, "max_drop_vs_teacher": 0.05}},
    )

    holdout = arguments.out.with_name(f"{arguments.out.name}.holdout.npz")
    np.savez(holdout, images=(images[-HELD_OUT:] * 255).byte().numpy(), labels=labels[-HELD_OUT:].numpy())
    run.export(int8=True, progress=True)
    report = run.validate(holdout, progress=True)
    verdict = run.gate()
    for check in verdict.checks:
        print(f"{check.verdict:<13}{check.detail}")
    print(f"teacher {report.teacher.top1:.4f}, student {report.student.top1:.4f}, gate: {verdict.verdict}")
    print(run.report())


if __name__ == "__main__":
    main()
