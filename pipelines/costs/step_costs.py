"""Measures a synthesis step and a student step of a recipe's networks on this machine; medians of a few repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from nayer_edge import synthesis
from nayer_edge.config import Augment, Distill, Generator, Prior, Synthesis
from nayer_edge.distillation import Distillation, Settings
from nayer_edge.export.targets import TARGETS
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute, random_stream, seeded

from ..recipes.schema import Export
from .budget import BATCH, ROUND, Costs
from .fitting import BACKWARD

DIMENSIONS = 384
"""label embedding dimensions, as in MiniLM; other encoders change only the first layer"""
REPEATS = 5
LONGEST = 20.0
"""maximum seconds to measure one kind of step"""
REST_SECONDS = 6.0
"""export, quantization, report and start-up, which hardly depend on the networks; as `REST_STUDENTS`, fitted to runs
of three students (9, 50 and 59 s)"""
REST_IMAGES = 10_000
"""images of an assumed hold-out"""
REST_STUDENTS = 12
"""forward passes of the student per hold-out image: float and INT8, in torch and ONNX Runtime, and calibration"""
QAT_STEP = 4.2
"""a step of quantization-aware training, in student steps: 0.80 s for WRN-16-1 in FP32, 0.19 s for a step in bf16"""


def time_steps(
    teacher: Classifier,
    student: Classifier,
    generator: Generator,
    augment: Augment,
    compute: Compute,
    batch: int = ROUND,
    student_batch: int = BATCH,
    prior: Prior = "batchnorm",
    export: Export | None = None,
    known: Costs | None = None,
) -> Costs:
    """Times the steps of these networks, which need not be trained: the cost of a step does not depend on the weights.

    Both networks stay on the device; training steps change the student.

    Args:
        batch: images per synthesis round.
        student_batch: images per student step.
        prior: what makes images.
        export: what follows the student; None: the defaults.
        known: costs with another student and the same batches. Of these, the teacher's are not measured again.

    Raises:
        UsageError: the teacher cannot be distilled from, or the networks do not fit each other.
    """
    classes = len(teacher.classes)
    steps = 2
    with seeded(0):
        embeddings = LabelEmbeddings(torch.randn(classes, DIMENSIONS), "random", "", "{label}", tuple(teacher.classes))
    settings = Settings(
        generator,
        Synthesis(prior=prior, batch=batch, g_steps=steps, augment=augment),
        Distill(batch=student_batch, views=1, augment=augment, holdout_rounds=1, optimizer="muon"),
        0,
    )
    run = Distillation(teacher, embeddings, student, settings, compute)

    def a_round(with_student: bool) -> synthesis.Round:
        return run._round(random_stream(0, "costs", device=compute.device), warm=not with_student)

    made = a_round(False)
    run.bank.add(made.images, made.labels)
    images = torch.rand(student_batch, *teacher.spec.shape, device=compute.device)

    def answer() -> torch.Tensor:
        with torch.no_grad(), compute.autocast():
            return run.teacher(images)

    logits = answer().float()

    def student_step() -> torch.Tensor:
        run.student.train()
        return run._student_step(images, logits)

    if known is not None and (known.batch, known.student_batch) == (batch, student_batch):
        alone, one_answer = known.synthesis_step, known.teacher_batch
    else:
        alone, one_answer = _median(lambda: a_round(False), compute) / steps, _median(answer, compute)
    both = _median(lambda: a_round(True), compute) / steps
    one_step = _median(student_step, compute)
    return Costs(
        synthesis_step=alone,
        adversary=max(both - alone, 0.0),
        student_step=one_step,
        teacher_batch=one_answer,
        rest=expected_rest(one_step, one_answer, student_batch, export or Export()),
        batch=batch,
        student_batch=student_batch,
    )


def expected_rest(student_step: float, teacher_batch: float, student_batch: int, export: Export) -> float:
    """Expected seconds of export, quantization, validation and report, from the steps' seconds."""
    step, answer = (seconds / student_batch for seconds in (student_step, teacher_batch))
    seconds = REST_SECONDS + REST_IMAGES * (answer + REST_STUDENTS * step / BACKWARD)
    if export.qat:
        # Every graph is trained by itself.
        graphs = sum(TARGETS[name].suffix == ".onnx" for name in export.targets)
        steps = graphs * export.qat_epochs * export.qat_steps
        seconds += steps * (QAT_STEP * student_step + teacher_batch)
    return seconds


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
