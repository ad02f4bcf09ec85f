"""Measures a synthesis step and a student step of a recipe's networks on this machine; medians of a few repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from nayer_edge import synthesis
from nayer_edge.config import Augment, Distill, Generator, Synthesis
from nayer_edge.distillation import Distillation, Settings
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_teacher, untrained_teacher
from nayer_edge.runtime.compute import Compute, choose, random_stream, seeded

from ..recipes.schema import Recipe
from .budget import BATCH, ROUND, Costs

DIMENSIONS = 384
"""label embedding dimensions, as in MiniLM; other encoders change only the first layer"""
REPEATS = 5
LONGEST = 60.0
"""maximum seconds to measure one kind of step"""


def measure(recipe: Recipe, rest: float) -> Costs:
    """Times the steps of a recipe's networks on its device.

    The teacher need not be trained: the cost of a step does not depend on the weights.

    Args:
        rest: expected seconds for export, validation and report.

    Raises:
        UsageError, MissingError: the networks cannot be built or do not accept such images.
    """
    compute = choose(recipe.device, recipe.precision)
    with seeded(0):
        teacher = untrained_teacher(recipe.teacher)
        student = build_classifier(recipe.student.model, teacher.spec, teacher.classes, recipe.student.arguments)
    if recipe.teacher.weights is None and recipe.teach is None:
        teacher, _ = load_teacher(recipe.teacher, teacher)
    return time_steps(teacher, student, recipe.generator, recipe.synthesis.augment, compute, rest)


def time_steps(
    teacher: Classifier, student: Classifier, generator: Generator, augment: Augment, compute: Compute, rest: float
) -> Costs:
    """As `measure`, for given networks. Both stay on the device; training steps change the student."""
    classes = len(teacher.classes)
    batch, student_batch = max(ROUND, min(classes, 2 * ROUND)), BATCH
    steps = 2
    with seeded(0):
        embeddings = LabelEmbeddings(torch.randn(classes, DIMENSIONS), "random", "", "{label}", tuple(teacher.classes))
    settings = Settings(
        generator,
        Synthesis(batch=batch, g_steps=steps, augment=augment),
        Distill(batch=student_batch, views=1, augment=augment, holdout_rounds=1, optimizer="muon"),
        0,
    )
    run = Distillation(teacher, embeddings, student, settings, compute)

    def a_round(with_student: bool) -> synthesis.Round:
        return run._round(random_stream(0, "costs", device=compute.device), warm=not with_student)

    made = a_round(False)
    run.bank.add(made.images, made.labels)
    images = torch.rand(student_batch, *teacher.spec.shape, device=compute.device)
    images = images.to(memory_format=torch.channels_last)

    def answer() -> torch.Tensor:
        with torch.no_grad(), compute.autocast():
            return run.teacher(images)

    logits = answer().float()

    def student_step() -> torch.Tensor:
        run.student.train()
        return run._student_step(images, logits)

    alone = _median(lambda: a_round(False), compute) / steps
    both = _median(lambda: a_round(True), compute) / steps
    return Costs(
        synthesis_step=alone,
        adversary=max(both - alone, 0.0),
        student_step=_median(student_step, compute),
        teacher_batch=_median(answer, compute),
        rest=rest,
        batch=batch,
        student_batch=student_batch,
    )


def _median(work: Callable[[], object], compute: Compute) -> float:
    """Median seconds, after one warm-up run."""
    times: list[float] = []
    work()
    while len(times) < REPEATS and (len(times) < 2 or sum(times) < LONGEST):
        began = time.perf_counter()
        work()
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
