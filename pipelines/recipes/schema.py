"""The recipe: all settings of a run, in TOML, validated as a whole before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

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

from .policy import Policy


class Export(Section):
    """ONNX export and quantization."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    """ONNX opset version"""
    targets: tuple[str, ...] = ("cpu",)
    """targets to quantize for; cpu, arm, openvino, executorch, litert, tensorrt, tensorrt-rtx"""
    calibration_images: Annotated[int, Field(ge=1, le=65536)] = 512
    """number of synthetic images, reserved during distillation or drawn from the trained generator"""
    calibration_method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"
    """auto: the method whose INT8 model agrees best with FP32 on a synthetic hold-out; executorch and litert calibrate
    by themselves"""
    max_drop: Fraction | None = 0.02
    """largest drop of INT8 against FP32 on synthetic images, with the teacher's predictions as labels; the most
    sensitive layers are excluded from quantization until the limit holds (mixed precision)"""
    sensitivity: bool = False
    """measure the sensitivity of every layer, even if no layer has to be excluded"""
    qat: bool = False
    """quantization-aware training on images of the memory bank; its result is kept if it agrees better with FP32 on the
    synthetic hold-out than calibration alone. Not for executorch and litert, which quantize by themselves"""
    qat_epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    """epochs of QAT"""
    qat_steps: Annotated[int, Field(ge=1, le=100_000)] = 100
    """optimiser steps per epoch, each on distill.batch images"""
    qat_lr: Annotated[float, Field(gt=0, le=0.1)] = 1e-3
    """peak learning rate of Adam, relative to the root mean square weight of each channel"""
    fp16: bool = False
    """also write FP16 files for TensorRT, OpenVINO and LiteRT (TensorRT's is always written if an engine is built)"""
    engines: bool = True
    """build engines for targets that use one"""
    compute_capability: str = "sm89"
    """GPU architecture for TensorRT-RTX, which builds ahead of time: sm75, sm80, sm86, sm89, sm120, …"""


class Validate(Section):
    """The images on which the artifacts are compared with the teacher."""

    data: str | None = None
    """labelled hold-out images, used only to measure; if absent, synthetic images"""
    fit: Fit = "exact"
    """handling of images whose size differs from the model's: exact: error with their count; stretch: resize;
    center-crop: resize the shorter side to 8/7 of the model's size and crop the centre. For a grey model, colour
    pictures are refused with exact, and converted with the others"""
    split: str | None = None
    """which part of the hold-out, if it has several: train, validation, test, or its own name"""
    allow_implausible: bool = False
    """measure even if the labels look wrong: the teacher's accuracy is near chance or far below the published one, or
    it predicts one class for nearly all images"""
    synthetic_images: Count = 2000
    """number of synthetic images, if there is no hold-out"""


class Budget(Section):
    """The time that the run was planned for (`--budget`); a run that turns out slower or faster changes its length."""

    seconds: Positive
    """seconds for the whole run, without training a teacher"""
    fill_seconds: Annotated[float, Field(ge=0)]
    """expected seconds of the warm-up epochs"""
    rest_seconds: Annotated[float, Field(ge=0)]
    """expected seconds after distillation: export, quantization, validation, report"""


class Sweep(Section):
    """What `nayer-edge sweep` tries, unless its options say otherwise; other commands ignore it."""

    students: tuple[str, ...] = ()
    """models, as for student.model; empty: some that suit the teacher"""
    seconds: Positive | None = None
    """seconds for all students, and for their images if there are none; absent: 40 % of the time that separate
    runs of all students would take"""


class Measured(Section):
    """Results measured by the recipe's author, so that users know what to expect."""

    teacher_top1: Fraction | None = None
    """top-1 accuracy of the teacher, mean over the seeds"""
    student_top1: Fraction | None = None
    """top-1 accuracy of the student, mean over the seeds"""
    student_top1_sd: Annotated[float, Field(ge=0)] | None = None
    """standard deviation over the seeds"""
    int8_drop: float | None = None
    """top-1 of the FP32 student minus top-1 of the INT8 model, as a fraction"""
    seeds: Count | None = None
    """number of seeds"""
    seconds: Positive | None = None
    """duration of a whole run"""
    hardware: str | None = None
    """hardware of the measurements"""


class Recipe(Section):
    """A whole run: teacher, embeddings, synthesis, student, export, validation and gate."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """name of the run; a recipe file's own name, if absent"""
    description: str = ""
    """one line, which `nayer-edge recipes` shows"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """seed of all random streams"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """training precision; auto: bf16 autocast if the processor supports bf16 arithmetic"""
    tracking: Literal["none", "tensorboard"] = "none"
    """tensorboard: also write metrics to <run>.tensorboard/ (extra: tracking)"""
    image_time: Annotated[float, Field(ge=0.05, le=0.95)] = 0.35
    """share of the time of distillation in which images are made, where `--budget` plans the run. 0.35 was measured to
    be best for one student; a run whose images several students will use should make more. What exceeds 0.35 is made
    before the student is trained, and counts as 0.35 in a run that starts with other images (`--bank`)"""
    measured: Measured = Measured()
    budget: Budget | None = None
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
    sweep: Sweep | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_language_model(cls, values: Any) -> Any:
        """Procedural images do not use the label embeddings, so they need no text encoder."""
        if not isinstance(values, Mapping):
            return values
        synthesis, lte = values.get("synthesis"), values.get("lte") or {}
        if isinstance(synthesis, Mapping) and synthesis.get("prior") == "procedural" and isinstance(lte, Mapping):
            return {**values, "lte": {"encoder": "onehot", **lte}}
        return values

    @model_validator(mode="after")
    def _teacher_has_weights(self) -> Recipe:
        brings_its_own = self.teacher.model.startswith(tuple(f"{source}:" for source in BRING_WEIGHTS))
        none = self.teacher.weights is None and self.teach is None
        if (self.teacher.weights is not None and self.teach is not None) or (none and not brings_its_own):
            raise ValueError("give either teacher.weights or a [teach] section that trains the teacher")
        return self

    @model_validator(mode="after")
    def _budget_can_be_kept(self) -> Recipe:
        if self.budget is not None and self.distill.schedule != "constant":
            raise ValueError('a [budget] needs distill.schedule = "constant", whose length can be adapted')
        return self
