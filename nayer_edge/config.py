"""Recipe sections that the core uses, with their defaults and limits.

The names follow the paper (Tran et al., CVPR 2024) and its published code; docs/PAPER_MAP.md lists both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

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
Side = Annotated[int, Field(ge=4, le=4096)]
"""pixels of an image's side"""
Fit = Literal["exact", "stretch", "center-crop"]
"""what happens to an image of another size than the model's: error, resize, or resize and crop"""
Prior = Literal["batchnorm", "generator", "procedural"]
"""what makes the images of a run"""
Arguments = dict[str, bool | int | float | str]
EMBEDDING_FILES = (".safetensors", ".npz", ".npy")
"""extensions of embedding files"""


class Section(BaseModel):
    """A recipe section: immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


BRIGHTEST_MEAN = 5.0
"""mean and std of normalised pixels from 0 to 1 stay far below; those of pixels up to 255 are far above"""


class InputSpec(Section):
    """The input a model expects: images in [0, 1], channels first, normalised inside the model as (x − mean) / std."""

    channels: Count = 3
    """1: greyscale; 3: RGB"""
    height: Side = 32
    """pixels"""
    width: Side = 32
    """pixels"""
    mean: tuple[float, ...] = (0.5,)
    """for pixels in [0, 1]; one value per channel, or one for all channels"""
    std: tuple[Positive, ...] = (0.5,)
    """for pixels in [0, 1]; one value per channel, or one for all channels"""

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> InputSpec:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {self.channels} channels")
        if max(*map(abs, self.mean), *self.std) > BRIGHTEST_MEAN:
            scaled = "; ".join(
                f"{name} = [{', '.join(f'{value / 255:.4g}' for value in getattr(self, name))}]"
                for name in ("mean", "std")
            )
            raise ValueError(
                "mean and std must be for pixels in [0, 1]; these look like values for [0, 255]: divide them by 255 "
                f"({scaled})"
            )
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        return self.channels, self.height, self.width


class Augment(Section):
    """Random crop with zero padding and random horizontal flip, drawn separately for each image."""

    pad: Annotated[int, Field(ge=0, le=64)] = 4
    """pixels of padding on each side before the crop"""
    flip: bool = True
    """flip each image with probability 1/2; unsuitable for digits and text"""


class Teacher(Section):
    """The trained classifier. It needs `weights`, or a [teach] section that trains it (for demonstrations); hf: and
    python: models can bring their own weights."""

    model: str
    """nayer:wrn_40_2, torchvision:resnet18, timm:resnet18, hf:<hub id or folder>, python:<module or file.py>:<factory>
    (runs only with --trust-code)"""
    arguments: Arguments = {}
    """additional arguments for the library or factory that builds the network"""
    weights: str | None = None
    """a .safetensors file or a state dict, relative to the recipe ($NAYER_EDGE_DATA is expanded); or weights
    that a library publishes, such as torchvision:IMAGENET1K_V1 or timm:a1_in1k"""
    weights_key: str | None = None
    """key of the weights in the file, such as state_dict_ema, or the prefix of their names; needed if the file contains
    several sets of weights"""
    weights_ignore: tuple[str, ...] = ()
    """name prefixes of tensors in the file that do not belong to the network, such as "projector." """
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
    """class names in the order of the classifier's outputs, or a file of class names, relative to the recipe"""
    input: InputSpec = InputSpec()
    """omitted keys default to the library's metadata of the weights, if it has any"""
    resize: tuple[Side, Side] | None = None
    """height and width that the network needs, if it cannot take images of the input's size: the teacher resizes them,
    bilinearly with antialiasing; so a network for 224 pixels can teach a student for 32"""
    input_from: str = ""
    """where the input specification came from; filled in when the recipe is read"""

    @field_validator("classes")
    @classmethod
    def _distinct_labels(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        empty = [str(index) for index, label in enumerate(classes) if not label.strip()]
        if empty:
            raise ValueError(f"class names must not be empty (number {', '.join(empty)})")
        duplicates = sorted(label for label, times in Counter(classes).items() if times > 1)
        if duplicates:
            raise ValueError(f"class names must be unique; used more than once: {', '.join(duplicates)}")
        return classes


class Teach(Section):
    """Trains a teacher on labelled images, for demonstrations and benchmarks."""

    data: str
    """digits, or a folder, parquet or npz file of labelled images"""
    epochs: Count = 20
    """passes over the training images"""
    batch: Count = 128
    """images per step"""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd: SGD for all parameters; muon: Muon for convolutions and hidden linear layers, SGD for the others"""
    lr: Positive = 0.25
    """peak learning rate of SGD (one-cycle schedule)"""
    muon_lr: Positive = 0.05
    """peak learning rate of Muon (one-cycle schedule)"""
    momentum: Fraction = 0.9
    """of SGD (Nesterov)"""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """applied to all parameters"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    augment: Augment = Augment()
    """applied to the training images"""


class LTE(Section):
    """Label-text embeddings: one prompt per class, encoded once by a text encoder."""

    encoder: str = "all-MiniLM-L6-v2"
    """all-MiniLM-L6-v2, a hub id or folder for transformers, a file of embeddings, onehot, or random"""
    prompt: str | tuple[str, ...] = "a photo of a {label}"
    """one template, or several whose embeddings are averaged (Radford et al. 2021, §3.1.4)"""
    synonyms: Literal["first", "all", "average"] = "first"
    """which part of a label such as "tench, Tinca tinca" goes into the prompt: first: tench (the whole label if several
    classes share the first name); all: the whole label; average: each name in its own prompt, embeddings averaged"""

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompts, one or several."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def precomputed(self) -> bool:
        """Whether the encoder is a file of embeddings."""
        return self.encoder.lower().endswith(EMBEDDING_FILES)

    @model_validator(mode="after")
    def _prompt_has_label(self) -> LTE:
        if not self.templates or not all("{label}" in template for template in self.templates):
            raise ValueError("every prompt template must contain {label}")
        if any(len(template.splitlines()) > 1 for template in self.templates):
            raise ValueError("a prompt must be a single line")
        return self


class Student(Section):
    """The compact network to train."""

    model: str
    """as teacher.model; torchvision:mobilenet_v3_small@32 lowers a library network's strides for 32-pixel images"""
    arguments: Arguments = {}
    """additional arguments for the library or factory that builds the network"""
    bank: str | None = None
    """folder of a finished run with the same teacher (`--bank`): start with its images, generator and label embeddings
    instead of filling a memory bank"""


class Generator(Section):
    """E[y] → BatchNorm1d → noisy linear → linear → up-sampling convolutions → sigmoid (paper §3.2, Fig. 2)."""

    noisy_dim: Count = 1000
    """outputs of the noisy linear layer"""
    channels: Count = 64
    """output channels of the last up-sampling convolution; earlier layers have twice as many"""


OF_PRIOR: dict[str, dict[str, Any]] = {
    "generator": {"lambda_ce": 1.0, "lambda_adv": 1.0},
    "procedural": {"lambda_ce": 0.0, "lambda_adv": 0.0, "g_steps": 1},
}
"""defaults of the other priors, as they were measured; procedural images are used as they are drawn"""


class Synthesis(Section):
    """A synthesis round, and the number of rounds (paper Alg. 1, Eq. 4 to 8)."""

    prior: Prior = "batchnorm"
    """what makes images: batchnorm: NAYER's generator, which matches the teacher's BatchNorm statistics. The others are
    not in the paper, need no BatchNorm, and ignore lambda_bn and bn_momentum. generator: the same generator without
    L_bn; lambda_ce and lambda_adv are 1 unless given. procedural: random textures, shapes and strokes, without a
    generator (lr and g_life are ignored) or label embeddings. Losses can move their pixels; they are off unless given a
    weight, because none was measured to help"""
    pixel_step: Positive = 0.1
    """root mean square by which a step changes the pixels of an image in [0, 1]; used by the procedural prior only"""
    batch: Annotated[int, Field(ge=2)] = 400
    """images per round"""
    g_steps: Count = 30
    """optimisation steps per round"""
    rounds: Count = 2
    """rounds per epoch after warm-up (published: g_loops)"""
    warmup_rounds: Count = 10
    """rounds per warm-up epoch (published: gwp_loops)"""
    g_life: Count = 10
    """epochs after which the generator is re-initialised"""
    lr: Positive = 4e-3
    """learning rate of Adam (betas 0.5 and 0.999), which is re-created every round"""
    lambda_bn: Annotated[float, Field(ge=0)] = 10.0
    """weight of L_bn: distance of the images' BatchNorm statistics from the teacher's running statistics"""
    lambda_ce: Annotated[float, Field(ge=0)] = 0.5
    """weight of L_ce: cross-entropy of the teacher's prediction to the class that the image was generated for"""
    lambda_adv: Annotated[float, Field(ge=0)] = 1.33
    """weight of L_adv: divergence between student and teacher, which the generator maximises"""
    lambda_tv: Annotated[float, Field(ge=0)] = 0.0
    """weight of the total variation of the pixels; this and the next two are not in the paper"""
    lambda_act: Annotated[float, Field(ge=0)] = 0.0
    """weight of −mean |features| before the last linear layer (DAFL's activation loss)"""
    lambda_patch: Annotated[float, Field(ge=0)] = 0.0
    """weight of the negative entropy of the similarity between patches, for transformers (PSAQ-ViT)"""
    bn_momentum: Fraction = 0.9
    """weight of earlier rounds' BatchNorm statistics in L_bn (published: bn_mmt); 0 disables it"""
    reserve: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """share of the rounds whose images never enter the memory bank, spread over the whole run; they calibrate INT8 and
    serve as a synthetic hold-out; published: 0"""
    discard_rounds: Annotated[int, Field(ge=0)] = 0
    """number of first rounds whose images are discarded, because the generator is still untrained; published: 0"""
    augment: Augment = Augment()
    """applied to the images inside the loss"""

    @model_validator(mode="before")
    @classmethod
    def _measured_for_the_prior(cls, values: Any) -> Any:
        """The published defaults suit L_bn only; with procedural images, they would move the pixels, at a cost
        (`benchmarks/without_batchnorm.py`)."""
        if isinstance(values, Mapping) and isinstance(prior := values.get("prior"), str):
            return {**OF_PRIOR.get(prior, {}), **values}
        return values

    @property
    def has_generator(self) -> bool:
        """Whether a generator makes the images."""
        return self.prior != "procedural"


class Distill(Section):
    """Trains the student on the memory bank (paper Eq. 9)."""

    epochs: Count = 120
    """including warm-up; the paper's E = 100 is 120 here"""
    warmup_epochs: Annotated[int, Field(ge=0)] = 20
    """epochs of synthesis without student training"""
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
    """final learning rate of SGD; Muon's falls by the same factor"""
    momentum: Fraction = 0.9
    """of SGD and Muon"""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """applied to all parameters"""
    temperature: Positive = 20.0
    """divides the logits of student and teacher in the KL loss"""
    augment: Augment = Augment()
    """applied to the student's training images"""
    views: Annotated[int, Field(ge=0)] = 0
    """0: a new random crop for every draw, as published; n: n fixed views per image, whose teacher logits are cached"""
    mixup: Fraction = 0.0
    """fraction of the student's images that are mixtures of two, labelled by the teacher; published: 0"""
    patience: Annotated[int, Field(ge=0)] = 0
    """stop after this many epochs without better agreement on the synthetic hold-out, with the constant schedule after
    its decay; 0: never"""
    bank_mib: Positive = 4096.0
    """size limit of the memory bank in MiB"""
    holdout_rounds: Count = 2
    """rounds held out as the synthetic hold-out: used to measure agreement, never for training"""
    select: Literal["last", "agreement"] = "last"
    """which student to ship: the last one, or the one with the best agreement on the synthetic hold-out"""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Distill:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be less than epochs ({self.epochs})")
        if self.decay_epochs and self.schedule != "constant":
            raise ValueError("decay_epochs can only be set with the constant schedule")
        if self.schedule == "constant" and not 0 < self.decay_epochs <= self.epochs - self.warmup_epochs:
            after = self.epochs - self.warmup_epochs
            raise ValueError(f"decay_epochs must be between 1 and {after}, the number of epochs after warm-up")
        return self
