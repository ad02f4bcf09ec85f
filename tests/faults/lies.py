"""Silent training failures: wrong weights, losses and images that would go unnoticed for hours."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import processes
from .hostile import _teacher
from .kit import Kit, Tally

Weights = dict[str, Tensor]


def lies(kit: Kit, tries: int) -> Tally:
    """Each failure exits with 1, or with 2 if the weights show it, and the error names the problem and a fix."""
    tally = Tally("silent training failures (NaN, constant, dead, collapsed, copies)")
    twins = kit.room().with_suffix(".npy")
    np.save(twins, np.ones((3, 4), np.float32))
    for number in range(tries):
        what, weights, settings, words = CASES[number % len(CASES)]
        recipe = kit.recipe
        if weights is not None:
            from nayer_edge.models.load import load_tensors, save_tensors

            path = kit.room().with_suffix(".safetensors")
            save_tensors(path, weights(load_tensors(kit.finished / "teacher" / "teacher.safetensors", "weights")))
            recipe = _teacher(kit, path)
        sets = [part for setting in (*settings, f"seed={number}") for part in ("--set", setting.format(twins=twins))]
        root = kit.room()
        outcome = processes.run("run", recipe, "--out", root, "--until", "student", *sets)
        wrong = outcome.wrong(2, 5)
        if not wrong and not all(re.search(word, outcome.err) for word in words):
            wrong = f"it does not say {' and '.join(words)}: {outcome.err}"
        if not wrong and (root / "student" / "student.safetensors").exists():
            wrong = "a student was written"
        tally.count(wrong, what)
    return tally


def healthy(kit: Kit, tries: int) -> Tally:
    """No false alarms: the same run with other seeds gives no warnings."""
    tally = Tally("no false alarm with other seeds")
    for number in range(tries):
        root = kit.room()
        outcome = processes.run(*kit.run(root), "--until", "student", "--set", f"seed={100 + number}")
        wrong = outcome.wrong(0)
        tally.count(wrong or ("a notice: " + outcome.out if "! For" in outcome.out else ""), f"seed {100 + number}")
    return tally


def _filled(value: float, part: str = "") -> Callable[[Weights], Weights]:
    return lambda weights: {
        name: torch.full_like(tensor, value) if part in name and tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


def _one_class(weights: Weights) -> Weights:
    """A teacher that predicts one class for every image, with varying logits."""
    bias = max(name for name in weights if name.endswith("bias") and weights[name].shape == (3,))
    return {**weights, bias: torch.tensor([0.0, 1e4, 0.0])}


def _one_nan(weights: Weights) -> Weights:
    name = next(name for name, tensor in weights.items() if tensor.ndim == 4)
    tensor = weights[name].clone()
    tensor[0, 0, 0, 0] = torch.nan
    return {**weights, name: tensor}


LONG = ("distill.epochs=24", "distill.warmup_epochs=22", "distill.steps=1", "synthesis.warmup_rounds=1")
"""enough epochs for checks that need many"""

# Name, teacher weights, settings, and patterns in the error message.
CASES: tuple[tuple[str, Callable[[Weights], Weights] | None, tuple[str, ...], tuple[str, ...]], ...] = (
    ("a teacher of NaN", _filled(torch.nan), (), ("NaN or infinity", "checkpoint")),
    ("one weight is NaN", _one_nan, (), ("NaN or infinity", "checkpoint")),
    ("a teacher of infinities", _filled(torch.inf), (), ("NaN or infinity", "checkpoint")),
    ("a constant teacher", _filled(0.0), (), ("the same output", "weights")),
    ("losses that become NaN", None, ("distill.lr=1e30",), ("became", "distill.lr")),
    ("synthesis that becomes NaN", None, ("synthesis.lr=1e30",), ("became", "synthesis.lr")),
    ("all synthetic images of one class", _one_class, LONG, ("one and the same class", "lambda_ce")),
    # Equal label embeddings: the BatchNorm before the noisy layer maps them to zero, so a round's images are equal.
    ("synthetic images that are copies", None, (*LONG, "lte.encoder={twins}"), ("copies", "noisy_dim")),
    # At this rate the student dies or overflows, by chance.
    (
        "a dead student",
        None,
        ("distill.lr=300", "distill.lr_min=300", "distill.steps=30"),
        ("dead|became", "distill.lr"),
    ),
)
