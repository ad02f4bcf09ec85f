"""Inspects a checkpoint: its network, classes and input, and whether each was stated or guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nayer_edge.config import InputSpec, Prior
from nayer_edge.errors import NayerEdgeError, UsageError
from nayer_edge.labels.class_names import checked
from nayer_edge.models import huggingface, published
from nayer_edge.models.load import is_card_of
from nayer_edge.models.names import ModelName, parse
from nayer_edge.models.state_dicts import AUXILIARY, key_taken, read_state_dict, several_sets

from ..recipes.loading import load_recipe
from .architectures import MOST_CHANNELS, Match, Shapes, compare, find, image_channels, shapes_of

IMAGENET = "imagenet-r50-mobilenet_v2"
"""a shipped recipe with the class names of ImageNet-1k"""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
_HEAD = re.compile(r"fc|head|classif|linear|logits|output", re.IGNORECASE)
MAX_CARD_BYTES = 64 * 2**20
NAMED_IN_CARDS = ("nayer", "torchvision", "timm")
"""sources of networks whose names in our own cards are enough to build them"""
UNKNOWN_CLASSES = 1000
"""a number of classes to build a network with, where the checkpoint suggests none"""


@dataclass(frozen=True)
class Guess:
    """A value and its origin.

    Attributes:
        origin: where the value comes from, for people.
        sure: a file states it; otherwise the user should check it.
    """

    value: Any
    origin: str
    sure: bool


@dataclass(frozen=True)
class Findings:
    """What was found in a checkpoint.

    Attributes:
        path: the file, or the folder of a transformers model.
        key: key in the file under which the weights were found.
        tensors: number of tensors.
        parameters: number of parameters.
        batch_norms: number of BatchNorm layers.
        kind: what there is instead of BatchNorm, for people; empty if there is BatchNorm.
        classes: outputs of its head.
        channels: channels of the images.
        matches: networks that match exactly, or else the nearest.
        input: the input that the model expects; None if unknown.
        labels: class names; None if unknown.
        outside: tensors of the file that are not the network's.
        arguments, resize: of the network, as the file's own card states them.
    """

    path: Path
    key: str
    tensors: int
    parameters: int
    batch_norms: int
    classes: int
    channels: int
    matches: tuple[Match, ...]
    input: Guess | None
    labels: Guess | None
    outside: tuple[str, ...] = ()
    kind: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    resize: tuple[int, int] | None = None

    @property
    def prior(self) -> Prior:
        """What can make images for this teacher."""
        return "batchnorm" if self.batch_norms else "generator"

    @property
    def exact(self) -> tuple[Match, ...]:
        """The networks that match in every tensor."""
        return tuple(match for match in self.matches if match.exact)


def look(path: Path, model: str | None = None, key: str | None = None, channels: int | None = None) -> Findings:
    """Inspects a checkpoint file, or a folder saved by transformers.

    Args:
        model: the network, if known; then only this one is compared.
        key: key of the weights in a file that holds several.
        channels: channels of the images, if known.

    Raises:
        UsageError: no such file, no weights, or not a classifier.
        IntegrityError: the file is damaged, or a pickle that would run code.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return _look_at_folder(path)
    if model is None and key is None and _is_transformers(path):
        return _look_at_folder(path.parent)
    card = _card_beside(path)
    own = card if is_card_of(card, path) else {}
    if model is None and str(own.get("model")).partition(":")[0] in NAMED_IN_CARDS:
        # Networks that differ in strides only have the same tensors.
        model = own["model"]
    stated = model is not None and model == own.get("model")
    rebuild = (own.get("rebuild") or {}) if stated else {}
    tensors = read_state_dict(path, key)
    shapes = shapes_of(tensors)
    classes = _classes(shapes)
    if stated and rebuild.get("arguments"):
        # The network cannot be compared without them, and its own card is enough.
        names = own.get("classes")
        classes = len(names) if isinstance(names, list) else classes
        fitting = Match(str(model), True, len(shapes), len(shapes), classes=classes or UNKNOWN_CLASSES)
        channels, found = channels or _channels(path, shapes), [fitting]
    else:
        channels, found = _network(path, shapes, model, channels, classes)
    if not found or not found[0].exact:
        if rivals := next((match.rivals for match in found if match.rivals), ()):
            raise several_sets(path, rivals)
        if classes is None:
            raise UsageError(
                f"The network in {path} has no linear layer, so it is not a classifier.",
                why=f"None of its {len(tensors)} tensors is the weight of a linear layer with one row per class.",
                fix="Use a checkpoint of the whole classifier, including its head; or name the network with --model.",
            )
    else:
        classes = found[0].classes
        tensors = {name: value for name, value in tensors.items() if name not in set(found[0].outside)}
    assert classes is not None
    name = model or (found[0].model if found and found[0].exact else None)
    return Findings(
        path=path,
        key=key or key_taken(path, key),
        tensors=len(tensors),
        parameters=sum(value.numel() for key, value in tensors.items() if not _is_statistic(key)),
        batch_norms=_batch_norms(shapes_of(tensors)),
        kind=_normalised_by(shapes_of(tensors)),
        classes=classes,
        channels=channels,
        matches=tuple(found),
        input=_input(path, name, channels, card),
        labels=_labels(path, name, classes, card),
        outside=found[0].outside if found and found[0].exact else (),
        arguments=rebuild.get("arguments", {}),
        resize=tuple(rebuild["resize"]) if "resize" in rebuild else None,
    )


def _network(
    path: Path, shapes: Shapes, model: str | None, told: int | None, classes: int | None
) -> tuple[int, list[Match]]:
    """The image channels and the matching networks. If no network fits with the given channels, tries the number of
    channels read from the tensors."""
    # Where no layer looks like a head, the network says which one it is.
    guess = classes or UNKNOWN_CLASSES

    def matches(channels: int) -> list[Match]:
        if model is None:
            return find(shapes, channels, guess, path.stem)
        match = compare(model, shapes, channels, guess)
        return [] if match is None else [match]

    channels = told or _channels(path, shapes)
    found = matches(channels)
    seen = _image_channels(shapes)
    # A first convolution with groups hides the number of channels: the network may know it.
    others = [seen] if model is None else [seen, *range(1, MOST_CHANNELS + 1)]
    for other in others:
        if any(match.exact or match.rivals for match in found):
            break
        if other in (None, channels):
            continue
        again = matches(other)
        if any(match.exact for match in again):
            channels, found = other, again
    if told is None and model is not None and found and found[0].exact:
        fitting = list(image_channels(model, shapes, found[0].classes, channels))
        if len(fitting) > 1:
            raise UsageError(
                f"{model} fits the weights with images of {', '.join(map(str, fitting))} channels.",
                why="Its first convolution is grouped, so the weights do not determine the number of channels.",
                fix=f"Give the images' channels: --input {fitting[-1]}xHEIGHTxWIDTH",
            )
        channels = fitting[0] if fitting else channels
    return channels, found


def _is_transformers(path: Path) -> bool:
    """Whether a file is the weights in a folder written by transformers."""
    if path.name != "model.safetensors":
        return False
    card = _json_in(path.with_name("config.json"))
    return "model_type" in card and "architectures" in card


def _look_at_folder(path: Path) -> Findings:
    model = f"hf:{path.resolve()}"
    parsed = parse(model)
    tensors = huggingface.own_weights(parsed)
    shapes = shapes_of(tensors)
    names = huggingface.published_labels(parsed)
    classes = _classes(shapes)
    # The configuration says which layer is the head.
    match = compare(model, shapes, _channels(path, shapes), classes or UNKNOWN_CLASSES)
    classes = match.classes if match is not None else classes
    if classes is None:
        raise UsageError(f"The network in {path} is not a classifier.")
    return Findings(
        path=path,
        key="",
        tensors=len(tensors),
        parameters=sum(value.numel() for key, value in tensors.items() if not _is_statistic(key)),
        batch_norms=_batch_norms(shapes),
        kind=_normalised_by(shapes),
        classes=classes,
        channels=_channels(path, shapes),
        matches=(Match(model, True, len(shapes), len(shapes)),),
        input=_processed(path, parsed, _channels(path, shapes)),
        labels=_usable(names, classes, f"id2label in {path.name}/config.json", True),
    )


def _processed(path: Path, model: ModelName, channels: int) -> Guess:
    """The input from a folder's image processor; without one, a guess."""
    if (path / "preprocessor_config.json").is_file():
        try:
            spec = InputSpec.model_validate(huggingface.input_of(model))
        except huggingface.UnknownSizeError:
            return _usual(path.name, channels, small=False)
        if spec.channels == channels:
            return Guess(spec, f"the image processor in {path.name}", True)
        # It turns pictures into RGB, and this network takes another number of channels.
        usual = _usual(path.name, channels, small=False)
        one = {name: getattr(spec, name)[:1] for name in ("mean", "std") if len(set(getattr(spec, name))) == 1}
        changes = {"height": spec.height, "width": spec.width, **(one if len(one) == 2 else {})}
        return replace(usual, value=usual.value.model_copy(update=changes))
    return _usual(path.name, channels, small=False)


# ------------------------------------------------------------------ from the tensors


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _batch_norms(shapes: Shapes) -> int:
    return sum(name.endswith("running_mean") for name in shapes)


FOLDED = "they were folded into its convolutions"
NONE_OR_FOLDED = "it has no normalisation at all, or one that was folded into its convolutions"


def _normalised_by(shapes: Shapes) -> str:
    """What a network without BatchNorm has instead; one weight per channel is taken for a normalisation."""
    if _batch_norms(shapes):
        return ""
    if any(re.search(r"attn|attention|qkv|in_proj", name) for name in shapes):
        return "it is a transformer"
    if any(name.endswith("weight") and len(shape) == 1 for name, shape in shapes.items()):
        return "it has LayerNorm, GroupNorm or the like"
    if any(re.search(r"reparam|fused", name) for name in shapes):
        return FOLDED
    return NONE_OR_FOLDED


def advice_for(kind: str) -> str:
    """What to do first about a teacher without BatchNorm; empty if there is nothing but another teacher."""
    if kind not in (FOLDED, NONE_OR_FOLDED):
        return ""
    return "If they were folded and the checkpoint from training still exists, use that one: it has the BatchNorms."


def _channels(path: Path, shapes: Shapes) -> int:
    seen = _image_channels(shapes)
    if seen is None:
        raise UsageError(
            f"The network in {path} has no spatial convolutions.",
            fix="Use a checkpoint of a convolutional image classifier.",
        )
    return seen


def _image_channels(shapes: Shapes) -> int | None:
    """Input channels of the first convolution; None if there is no convolution. The order of tensors in a file is
    arbitrary, so the first convolution is taken to be the one with the fewest input channels that is not depthwise.
    Depthwise ones have one input channel each; a single convolution with one channel reads greyscale images."""
    convolutions = [shape for shape in shapes.values() if len(shape) == 4 and shape[2] * shape[3] > 1]
    if not convolutions:
        return None
    several = [shape[1] for shape in convolutions if shape[1] > 1]
    return 1 if len(convolutions) == len(several) + 1 or not several else min(several)


def _classes(shapes: Shapes) -> int | None:
    """A guess at the number of classes: the outputs of the layer that looks most like a head; None if none does.

    Heads are named like one and lie further out than the layers inside blocks; their outputs feed no other layer. The
    order of tensors in a file says nothing: safetensors sorts them.
    """
    weights = {name: shape for name, shape in shapes.items() if name.endswith("weight") and not AUXILIARY.search(name)}
    linear = {name: shape for name, shape in weights.items() if len(shape) == 2}
    pointwise = {n: s for n, s in weights.items() if len(s) == 4 and s[2:] == (1, 1) and _HEAD.search(n)}
    heads = {name: shape for name, shape in linear.items() if _HEAD.search(name)} or linear or pointwise
    if not heads:
        return None
    least = min(name.count(".") for name in heads)
    outer = {name: shape for name, shape in heads.items() if name.count(".") == least}
    fed = {shape[1] for shape in outer.values()}
    last = [name for name, shape in outer.items() if shape[0] not in fed] or list(outer)
    last.sort(key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")])
    return heads[last[-1]][0]


# ------------------------------------------------------------------ from files beside it


def _card_beside(path: Path) -> dict[str, Any]:
    """A JSON file of the same name that states input and classes, as our own cards do; empty if there is none."""
    return _json_in(path.with_suffix(".json"))


def _json_in(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
            return {}
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _input(path: Path, model: str | None, channels: int, card: Mapping[str, Any]) -> Guess | None:
    told = card.get("input")
    # A card states everything; what is missing in another JSON file must not be taken from the defaults.
    if isinstance(told, dict) and told.keys() >= InputSpec.model_fields.keys():
        try:
            spec = InputSpec.model_validate({k: v for k, v in told.items() if k in InputSpec.model_fields})
            if spec.channels == channels:
                return Guess(spec, path.with_suffix(".json").name, True)
        except ValidationError:
            pass
    if model is None:
        return None
    try:
        found, origin = published.input_of(model, str(path))
    except NayerEdgeError:
        found, origin = {}, ""
    if found and found.get("channels") == channels:
        # timm describes the weights it published; the user's may differ.
        return Guess(InputSpec.model_validate(found), origin, model.startswith("torchvision:"))
    return _usual(model, channels, small=model.startswith("nayer:"), size=int(found.get("height", 224)))


def _usual(model: str, channels: int, *, small: bool, size: int = 224) -> Guess:
    """CIFAR's or ImageNet's input, as a guess."""
    mean, std = (CIFAR_MEAN, CIFAR_STD) if small else (IMAGENET_MEAN, IMAGENET_STD)
    if channels != 3:
        mean, std = (0.5,), (0.5,)
    size = 32 if small else size
    spec = InputSpec(channels=channels, height=size, width=size, mean=mean, std=std)
    what = "CIFAR's" if small else "ImageNet's"
    return Guess(spec, f"{what} size and normalisation, as usual for {model}", False)


def _labels(path: Path, model: str | None, classes: int, card: Mapping[str, Any]) -> Guess | None:
    names = card.get("classes")
    if isinstance(names, list) and (found := _usable(names, classes, path.with_suffix(".json").name, True)):
        return found
    if classes == 1000 and model is not None and not model.startswith("nayer:"):
        return Guess(load_recipe(IMAGENET).teacher.classes, "ImageNet-1k, which also has 1,000 classes", False)
    return None


def _usable(names: list[Any], classes: int, origin: str, sure: bool) -> Guess | None:
    """The class names if they are valid, otherwise None; names that several classes share get the class number."""
    if len(names) != classes or not all(isinstance(name, str) for name in names):
        return None
    shared = {name for name in names if names.count(name) > 1}
    told = [f"{name} (class {number})" if name in shared else name for number, name in enumerate(names)]
    try:
        return Guess(checked(told, origin), origin, sure)
    except UsageError:
        return None
