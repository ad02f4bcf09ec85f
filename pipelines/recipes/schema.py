"""The recipe: every number of a run, in TOML, checked as a whole before any work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from nayer_edge.config import (
    LTE,
    Count,
    Distill,
    Fit,
    Fraction,
    Generator,
    Positive,
    Section,
    Student,
    Synthesis,
    Teach,
    Teacher,
)
from nayer_edge.models.names import BRING_WEIGHTS

from ..gate.policy import Policy


class Export(Section):
    """ONNX and the quantized graphs."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    """version of the ONNX operator set"""
    targets: tuple[str, ...] = ("cpu",)
    """devices to quantize for; nayer_edge/export/targets.py lists them"""
    calibration_images: Annotated[int, Field(ge=1, le=65536)] = 512
    """synthetic images drawn from the trained generator"""
    calibration_method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"
    """auto: the method whose INT8 model agrees best with FP32 on a synthetic hold-out"""
    max_drop: Fraction | None = 0.02
    """largest fraction of the synthetic hold-out on which INT8 may predict another class than FP32; the most sensitive
    layers are excluded from quantization until the limit holds (mixed precision)"""
    sensitivity: bool = False
    """measure the sensitivity of every layer, even if no layer has to be excluded"""
    qat: bool = False
    """quantization-aware training on images of the memory bank; its result is kept if it agrees better with FP32 on the
    synthetic hold-out than calibration alone"""
    qat_epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    """epochs of QAT"""
    qat_steps: Annotated[int, Field(ge=1, le=100_000)] = 100
    """optimiser steps per epoch, each on distill.batch images"""
    qat_lr: Annotated[float, Field(gt=0, le=0.1)] = 1e-3
    """peak learning rate of Adam, relative to the root mean square weight of each channel"""
    fp16: bool = False
    """also write an FP16 graph (always written if an engine is to be built)"""
    engines: bool = True
    """build engines for the targets that have one"""
    compute_capability: str = "sm89"
    """GPU that TensorRT-RTX builds for, ahead of time: sm75, sm80, sm86, sm89, sm120, …"""


class Validate(Section):
    """On which images the artefacts are compared with the teacher."""

    data: str | None = None
    """labelled hold-out images (they only measure); none: fresh synthetic images"""
    fit: Fit = "exact"
    """pictures that are not of the model's size or kind: exact refuses them, with their count; stretch resizes them;
    center-crop resizes the shorter side to 8/7 of the model's and cuts the middle out"""
    synthetic_images: Count = 2000
    """how many, where there is no hold-out"""


class Measured(Section):
    """What the recipe's author measured, so that a user knows what to expect."""

    teacher_top1: Fraction | None = None
    """mean over the seeds"""
    student_top1: Fraction | None = None
    """mean over the seeds"""
    student_top1_sd: Annotated[float, Field(ge=0)] | None = None
    """its standard deviation"""
    int8_drop: float | None = None
    """FP32 student top-1 minus INT8 top-1, fraction"""
    seeds: Count | None = None
    """how many"""
    seconds: Positive | None = None
    """of a whole run"""
    hardware: str | None = None
    """on what"""


class Recipe(Section):
    """A whole run: teacher, embeddings, synthesis, student, export, validation, gate."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """the file's, unless it says another"""
    description: str = ""
    """one line, shown by `nayer-edge recipes`"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """of every random stream"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of training; auto: bf16 autocast where the processor has bf16 arithmetic"""
    tracking: Literal["none", "tensorboard"] = "none"
    """tensorboard: metrics also go to <run>.tensorboard/ (extra: tracking)"""
    measured: Measured = Measured()
    teacher: Teacher
    teach: Teach | None = None
    lte: LTE = LTE()
    student: Student
    generator: Generator = Generator()
    synthesis: Synthesis = Synthesis()
    distill: Distill = Distill()
    export: Export = Export()
    validate_: Annotated[Validate, Field(alias="validate")] = Validate()
    gate: Policy = Policy()

    @model_validator(mode="after")
    def _teacher_has_weights(self) -> Recipe:
        brings_its_own = self.teacher.model.startswith(tuple(f"{source}:" for source in BRING_WEIGHTS))
        none = self.teacher.weights is None and self.teach is None
        if (self.teacher.weights is not None and self.teach is not None) or (none and not brings_its_own):
            raise ValueError("give either teacher.weights or a [teach] section that trains the teacher")
        return self
