"""The recipe: every number of a run, in TOML, checked as a whole before any work.

The names follow the paper (Tran et al., CVPR 2024) and its published code; docs/PAPER_MAP.md lists both.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
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
    reserve: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """share of the rounds whose images never enter the memory bank: half of them calibrate, half are the synthetic
    hold-out; published: 0"""
    discard_rounds: Annotated[int, Field(ge=0)] = 0
    """first rounds whose images are not kept: the generator is still untrained; published: 0"""
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
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd: for all parameters, as published; muon: for convolutions and hidden linear layers, SGD for the rest"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: the learning rate falls over the whole run, as published; constant: it falls only in the last
    decay_epochs, so that a finished run can be continued from before them"""
    decay_epochs: Annotated[int, Field(ge=0)] = 0
    """last epochs of the constant schedule: the rate falls linearly to lr_min, and no images are made"""
    lr: Positive = 0.2
    """peak learning rate of SGD"""
    muon_lr: Positive = 0.05
    """peak learning rate of Muon"""
    lr_min: Annotated[float, Field(ge=0)] = 2e-4
    """learning rate of SGD at the end; Muon's falls to the same share of its peak"""
    momentum: Fraction = 0.9
    """of SGD and Muon"""
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
        if self.decay_epochs and self.schedule != "constant":
            raise ValueError("decay_epochs belongs to the constant schedule")
        if self.schedule == "constant" and not 0 < self.decay_epochs <= self.epochs - self.warmup_epochs:
            after = self.epochs - self.warmup_epochs
            raise ValueError(f"the constant schedule needs 1 to {after} decay_epochs, those after warm-up at most")
        return self
