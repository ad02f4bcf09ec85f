"""The recipe: every number of a run, in TOML, checked as a whole before any work.

The names follow the paper (Tran et al., CVPR 2024) and its published code; docs/PAPER_MAP.md lists both.
"""

from __future__ import annotations

import shlex
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from nayer_edge.errors import UsageError, nearest
from nayer_edge.models.names import BRING_WEIGHTS

Fraction = Annotated[float, Field(ge=0, le=1)]
Checked = TypeVar("Checked", bound=BaseModel)
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Fit = Literal["exact", "stretch", "center-crop"]
"""what is done with a picture that is not of the model's size: refuse it, resize it, or resize and crop it"""
Arguments = dict[str, bool | int | float | str]
EMBEDDING_FILES = (".safetensors", ".npz", ".npy")
"""what the name of a file of embeddings ends with"""


class Section(BaseModel):
    """A part of a recipe: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class InputSpec(Section):
    """What a model eats: images in [0, 1], channels first, normalised inside the model as (x − mean) / std."""

    channels: Count = 3
    """1: grey, 3: red, green, blue"""
    height: Annotated[int, Field(ge=4, le=4096)] = 32
    """pixels"""
    width: Annotated[int, Field(ge=4, le=4096)] = 32
    """pixels"""
    mean: tuple[float, ...] = (0.5,)
    """one value per channel, or one for all"""
    std: tuple[Positive, ...] = (0.5,)
    """one value per channel, or one for all"""

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> InputSpec:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {self.channels} channels")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        return self.channels, self.height, self.width


class Augment(Section):
    """Random crop with zero padding and horizontal flip, drawn anew for every image."""

    pad: Annotated[int, Field(ge=0, le=64)] = 4
    """pixels added on each side before the crop"""
    flip: bool = True
    """mirror half of the images; wrong for digits and text"""


class Teacher(Section):
    """The trained classifier. Either `weights` are given, or a [teach] section trains it (for demonstrations); hf: and
    python: models may bring their own."""

    model: str
    """nayer:wrn_40_2, torchvision:resnet18, timm:resnet18, hf:<hub id or folder>, python:<module or file.py>:<factory>
    (runs only with --trust-code)"""
    arguments: Arguments = {}
    """further arguments of the network, for its library or factory"""
    weights: str | None = None
    """a .safetensors file or a state dict, relative to the recipe ($NAYER_EDGE_DATA is expanded); or those that a
    library publishes, as torchvision:IMAGENET1K_V1 or timm:a1_in1k"""
    weights_key: str | None = None
    """where in the file they are, or the prefix of their names; needed where it holds several, as state_dict_ema"""
    weights_ignore: tuple[str, ...] = ()
    """beginnings of names in the file that are no part of the network, as "projector." """
    classes: Annotated[
        tuple[str, ...],
        Field(min_length=2, max_length=100_000),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 100_000},
                    {"type": "string", "description": "a text, JSON or CSV file of class names"},
                ]
            }
        ),
    ]
    """class names in the order of the classifier's outputs, or a file of them, relative to the recipe"""
    input: InputSpec = InputSpec()
    """what is not written comes from the library's own description of the weights, where it has one"""
    input_from: str = ""
    """where that came from; written when the recipe is read"""

    @field_validator("classes")
    @classmethod
    def _distinct_labels(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        empty = [str(index) for index, label in enumerate(classes) if not label.strip()]
        if empty:
            raise ValueError(f"class names must not be empty (number {', '.join(empty)})")
        doubled = sorted(label for label, times in Counter(classes).items() if times > 1)
        if doubled:
            raise ValueError(f"class names must differ; more than once: {', '.join(doubled)}")
        return classes


class Teach(Section):
    """Training a teacher on labelled images: for demonstrations and benchmarks."""

    data: str
    """digits, or a folder, parquet or npz file of labelled images"""
    epochs: Count = 20
    """passes over the images"""
    batch: Count = 128
    """images per step"""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd: for all parameters; muon: for convolutions and hidden linear layers, SGD for the rest"""
    lr: Positive = 0.25
    """peak of SGD's one-cycle schedule"""
    muon_lr: Positive = 0.05
    """peak of Muon's one-cycle schedule"""
    momentum: Fraction = 0.9
    """of SGD, with Nesterov"""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """of all parameters"""
    label_smoothing: Fraction = 0.0
    """how much of each label goes to all classes alike"""
    augment: Augment = Augment()
    """of the training images"""


class LTE(Section):
    """Label-text embeddings: one prompt per class through a text encoder, once."""

    encoder: str = "all-MiniLM-L6-v2"
    """all-MiniLM-L6-v2, a hub id or folder for transformers, a file of embeddings, onehot, or random"""
    prompt: str | tuple[str, ...] = "a photo of a {label}"
    """one template, or several whose embeddings are averaged (Radford et al. 2021, §3.1.4)"""
    synonyms: Literal["first", "all", "average"] = "first"
    """what of "tench, Tinca tinca" stands in the prompt: first: tench (where classes share it, the whole label); all:
    the label as it is; average: each name in a prompt of its own, averaged"""

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompts, one or several."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def precomputed(self) -> bool:
        """The encoder is a file of embeddings."""
        return self.encoder.lower().endswith(EMBEDDING_FILES)

    @model_validator(mode="after")
    def _prompt_has_label(self) -> LTE:
        if not self.templates or not all("{label}" in template for template in self.templates):
            raise ValueError("the prompt must contain {label}, and so must each of several")
        if any(len(template.splitlines()) > 1 for template in self.templates):
            raise ValueError("a prompt is one line")
        return self


class Student(Section):
    """The compact network to train."""

    model: str
    """as teacher.model; torchvision:mobilenet_v3_small@32 lowers a library network's strides for 32-pixel images"""
    arguments: Arguments = {}
    """further arguments of the network, for its library or factory"""


class Generator(Section):
    """E[y] → BatchNorm1d → noisy linear → linear → up-sampling convolutions → sigmoid (paper §3.2, Fig. 2)."""

    noisy_dim: Count = 1000
    """outputs of the noisy linear layer"""
    channels: Count = 64
    """width of the last convolutions; the first have twice as many"""


class Synthesis(Section):
    """One synthesis round and how many of them there are (paper Alg. 1, Eq. 4 to 8)."""

    batch: Annotated[int, Field(ge=2)] = 400
    """images per round"""
    g_steps: Count = 30
    """optimisation steps per round"""
    rounds: Count = 2
    """rounds per epoch after warm-up (published: g_loops)"""
    warmup_rounds: Count = 10
    """rounds per warm-up epoch (published: gwp_loops)"""
    g_life: Count = 10
    """epochs after which the generator is created anew"""
    lr: Positive = 4e-3
    """Adam, betas 0.5 and 0.999, a fresh one every round"""
    lambda_bn: Annotated[float, Field(ge=0)] = 10.0
    """weight of L_bn: the BatchNorm statistics of the images against those that the teacher remembers"""
    lambda_ce: Annotated[float, Field(ge=0)] = 0.5
    """weight of L_ce: the teacher sees the class that the image was made for"""
    lambda_adv: Annotated[float, Field(ge=0)] = 1.33
    """weight of L_adv: the student does not answer as the teacher does"""
    bn_momentum: Fraction = 0.9
    """how much of the BatchNorm statistics of earlier rounds L_bn remembers (published: bn_mmt); 0 disables it"""
    augment: Augment = Augment()
    """applied inside the loss"""


class Distill(Section):
    """Training the student on the memory bank (paper Eq. 9)."""

    epochs: Count = 120
    """warm-up included; the paper's E = 100 is 120"""
    warmup_epochs: Annotated[int, Field(ge=0)] = 20
    """epochs of synthesis alone"""
    steps: Count = 400
    """student steps per epoch"""
    batch: Annotated[int, Field(ge=2)] = 512
    """images per student step"""
    lr: Positive = 0.2
    """start of the cosine schedule of SGD"""
    lr_min: Annotated[float, Field(ge=0)] = 2e-4
    """end of the cosine schedule"""
    momentum: Fraction = 0.9
    """of SGD"""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """of all parameters"""
    temperature: Positive = 20.0
    """by which the logits of both are divided before they are compared"""
    augment: Augment = Augment()
    """of the images that the student sees"""
    views: Annotated[int, Field(ge=0)] = 0
    """0: every crop is drawn anew, as published; n: each image is seen in n fixed views, whose teacher logits are
    computed once"""
    mixup: Fraction = 0.0
    """share of the student's images that are mixtures of two, with the teacher's answer to the mixture; published: 0"""
    patience: Annotated[int, Field(ge=0)] = 0
    """stop after so many epochs without better agreement on the synthetic hold-out; 0: never"""
    bank_mib: Positive = 4096.0
    """byte budget of the memory bank, MiB"""
    holdout_rounds: Count = 2
    """synthetic hold-out rounds: measured for agreement, never trained on"""
    select: Literal["last", "agreement"] = "last"
    """which student is shipped: the last one, or the one that agrees best on the synthetic hold-out"""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Distill:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be less than epochs ({self.epochs})")
        return self


class Export(Section):
    """ONNX and the quantized graphs."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    """version of the ONNX operator set"""
    targets: tuple[str, ...] = ("cpu",)
    """which devices get a quantized graph; nayer_edge/export/targets.py lists them"""
    calibration_images: Annotated[int, Field(ge=1, le=65536)] = 512
    """synthetic images drawn from the trained generator"""
    calibration_method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"
    """auto: the one whose INT8 model agrees best with FP32 on a synthetic hold-out"""
    max_drop: Fraction | None = 0.02
    """largest fraction of the synthetic hold-out on which INT8 may choose another class than FP32; the most sensitive
    layers return to float until it holds"""
    sensitivity: bool = False
    """measure every layer alone, whether or not one has to return to float"""
    finetune: bool = False
    """train the INT8 network with its rounding on images of the memory bank; kept where it agrees better with FP32 on
    the synthetic hold-out than calibration alone"""
    finetune_epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    """of fine-tuning"""
    finetune_steps: Annotated[int, Field(ge=1, le=100_000)] = 100
    """steps per epoch, of distill.batch images each"""
    finetune_lr: Annotated[float, Field(gt=0, le=0.1)] = 1e-3
    """peak step of Adam, as a fraction of each channel's root mean square weight"""
    fp16: bool = False
    """also write an FP16 graph (always written where an engine is to be built)"""
    engines: bool = True
    """build engines for the targets that have one"""
    compute_capability: str = "sm89"
    """for TensorRT-RTX, which builds ahead of time: sm75, sm80, sm86, sm89, sm120, …"""


class Validate(Section):
    """On which images the artefacts are compared with the teacher."""

    data: str | None = None
    """labelled hold-out images (they only measure); none: fresh synthetic images"""
    fit: Fit = "exact"
    """pictures that are not of the model's size or kind: exact refuses them, with their count; stretch resizes them;
    center-crop resizes the shorter side to 8/7 of the model's and cuts the middle out"""
    synthetic_images: Count = 2000
    """how many, where there is no hold-out"""


class AccuracyPolicy(Section):
    """Paired accuracy drops, fractions in [0, 1]; see docs/ARCHITECTURE.md for the statistics."""

    max_drop_vs_fp32: Fraction | None = None
    """against the FP32 student: what quantization may cost"""
    max_drop_vs_teacher: Fraction | None = None
    """against the teacher: what the whole way may cost"""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """of the one-sided bounds of every check that has one"""


class AgreementPolicy(Section):
    """Fraction of images on which artefact and teacher choose the same class."""

    min: Fraction | None = None
    """at least so many"""


class LatencyPolicy(Section):
    """At batch 1, on the machine that ran `validate`."""

    max_p95_ms: Positive | None = None
    """19 of 20 runs take no longer, in ms"""
    min_speedup_vs_fp32: Positive | None = None
    """how many times as fast as the FP32 student"""


class SizePolicy(Section):
    """Of one artefact's file."""

    max_bytes: Count | None = None
    """bytes"""


class Int8Policy(Section):
    """Fraction of eligible convolutions and matrix products that run in INT8."""

    min_coverage: Fraction | None = None
    """at least so many; 1: all of them"""


class ParityPolicy(Section):
    """Largest absolute logit difference between FP32 ONNX and the torch student."""

    max_abs_diff: Positive | None = None
    """of a logit"""


class PerClassPolicy(Section):
    """Drop of any single class against the FP32 student."""

    max_drop: Fraction | None = None
    """no class loses more"""
    advisory: bool = True
    """report, but do not fail"""


class BaselinePolicy(Section):
    """Paired accuracy drop against the same artefact of the baseline run that `gate --references` names."""

    max_drop: Fraction | None = None
    """against the release before"""


class Policy(Section):
    """What an artefact must satisfy before it ships. A check whose limit is absent is not made."""

    artifacts: Annotated[tuple[str, ...], Field(min_length=1)] = ("int8.cpu",)
    """names as in report.json"""
    accuracy: AccuracyPolicy = AccuracyPolicy(max_drop_vs_fp32=0.015, max_drop_vs_teacher=0.04)
    baseline: BaselinePolicy = BaselinePolicy()
    agreement: AgreementPolicy = AgreementPolicy()
    latency: LatencyPolicy = LatencyPolicy()
    size: SizePolicy = SizePolicy()
    int8: Int8Policy = Int8Policy(min_coverage=1.0)
    parity: ParityPolicy = ParityPolicy(max_abs_diff=1e-3)
    per_class: PerClassPolicy = PerClassPolicy()


class Baseline(Section):
    """The release to compare with."""

    run: Annotated[str, Field(min_length=1)]
    """a validated run folder, or a folder with its report.json and predictions.npz; relative to this file"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """of its report.json; without it, whoever can write there can lower the bar"""


class References(Section):
    """`references.toml`: what `gate` compares a run with, beside the limits of the policy."""

    baseline: Baseline
    """the release before"""


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


def parse_toml(path: Path, what: str) -> dict[str, Any]:
    """Reads a TOML file of at most 1 MiB.

    Raises:
        UsageError: it is missing, too large or not TOML.
    """
    try:
        if path.stat().st_size > 2**20:
            raise UsageError(f"{path} is larger than {what} can be (1 MiB).")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no {what} at {path}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not readable as {what}.", why=f"{error}", fix="Mend the file.") from error


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Every problem of a validation as one sentence each; unknown keys with the nearest known name."""
    sentences = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = known_keys(model, problem["loc"][:-1])
            hint = nearest(str(problem["loc"][-1]), known)
            section = where.rpartition(".")[0]
            whole = hint.replace("'", f"'{section}.", 1) if section else hint
            sentences.append(f"unknown key '{where}'.{whole}")
        elif problem["type"] == "missing":
            sentences.append(f"'{where}' is missing.")
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            sentences.append(f"{where}: {reason}." if where else f"{reason}.")
    return sentences


def known_keys(model: type[BaseModel], location: tuple[int | str, ...] = ()) -> list[str]:
    """The keys that `model` knows at a place inside it, nested sections by name."""
    current: Any = model
    for part in location:
        current = _section_of(_field_of(current, part))
        if current is None:
            return []
    return [field.alias or name for name, field in current.model_fields.items()]


def is_default(key: str, value: Any) -> bool:
    """Whether a key of a recipe ("distill.mixup") has the value, as JSON, that it has where nobody wrote it."""
    field = _field_at(key.split("."))
    if field is None or field.is_required():
        return False
    return value == _as_json(field.get_default(call_default_factory=True))


def _as_json(value: Any) -> Any:
    """As it stands in a manifest: tuples become lists, sections tables."""
    return TypeAdapter(Any).dump_python(value, mode="json", by_alias=True)


def _field_at(parts: Sequence[str]) -> Any:
    """The field of a recipe that a dotted key names; None where there is none."""
    model: Any = Recipe
    field = None
    for part in parts:
        field = _field_of(model, part)
        model = _section_of(field)
    return field


def _field_of(model: type[BaseModel] | None, key: int | str) -> Any:
    """The field that a key names, by its alias too; None where there is no such field."""
    fields = model.model_fields.items() if model else ()
    return next((field for name, field in fields if key in (name, field.alias)), None)


def _section_of(field: Any) -> type[BaseModel] | None:
    """The nested section that a field holds, optional or not; None where it holds a value."""
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def make_recipe(values: dict[str, Any], source: str, settings: Sequence[str] = ()) -> Recipe:
    """Checks a recipe; all its problems are reported at once.

    Args:
        settings: `--set` items that are part of the values already, for the message.

    Raises:
        UsageError: it does not hold.
    """
    if settings:
        typed = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
        return _checked(Recipe, values, f"The recipe {source} does not hold with {typed}:", "Mend what --set says.")
    fix = "Mend these lines. `nayer-edge recipes` shows recipes that work."
    return _checked(Recipe, values, f"The recipe {source} does not hold:", fix)


def make_policy(values: dict[str, Any], source: str) -> Policy:
    """Checks a gate policy; all its problems are reported at once.

    Raises:
        UsageError: it does not hold.
    """
    fix = "Mend these lines. `nayer-edge gate RUN --print-policy` shows the one in force."
    return _checked(Policy, values, f"The policy {source} does not hold:", fix)


def make_references(values: dict[str, Any], source: str) -> References:
    """Checks what a run is to be compared with; all problems are reported at once.

    Raises:
        UsageError: it does not hold.
    """
    fix = 'Mend these lines. For example: [baseline] run = "runs/last"'
    return _checked(References, values, f"The references {source} do not hold:", fix)


def _checked(kind: type[Checked], values: dict[str, Any], what: str, fix: str) -> Checked:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        why = "\n".join(f"  - {sentence}" for sentence in problems_of(error, kind))
        raise UsageError(what, why=why, fix=fix) from error


def apply_settings(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Applies `--set a.b=c` to a recipe's values; c is read as TOML, or as a string where it is not TOML.

    One key changes: a section that the recipe did not write keeps the rest of what it is by default, limits of the gate
    above all. (One that it writes says all by itself.)

    Raises:
        UsageError: an item is not of this form.
    """
    values = _copied(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise UsageError(f"'{setting}' is not of the form a.b=c.", fix="For example: --set distill.epochs=40")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        place = values
        for depth, part in enumerate(parts[:-1], start=1):
            # What a run folder left out stands there as null.
            if place.get(part) is None:
                place[part] = _set_by_default(parts[:depth])
            place = place[part]
            if not isinstance(place, dict):
                raise UsageError(f"'{part}' in --set {setting} is a value, not a section.")
        place[parts[-1]] = value
    return values


def _set_by_default(parts: list[str]) -> dict[str, Any]:
    """What a recipe without this section has there, as far as the section by itself would not."""
    field = _field_at(parts)
    default = field.get_default(call_default_factory=True) if field and not field.is_required() else None
    if not isinstance(default, BaseModel):
        return {}
    kind = type(default)
    values = _as_json(default)
    own = {
        field.alias or name: field.get_default(call_default_factory=True) for name, field in kind.model_fields.items()
    }
    return {key: value for key, value in values.items() if value != _as_json(own[key])}


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value
