"""Inspects a checkpoint: its network, classes and input, and whether each was stated or guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from nayer_edge.config import InputSpec
from nayer_edge.errors import NayerEdgeError, UsageError, no_batch_norms
from nayer_edge.labels.class_names import checked
from nayer_edge.models import published
from nayer_edge.models.names import parse
from nayer_edge.models.state_dicts import AUXILIARY, key_taken, read_state_dict

from ..recipes.loading import load_recipe
from .architectures import Match, Shapes, compare, find, shapes_of

IMAGENET = "imagenet-r50-mobilenet_v2"
"""a shipped recipe with the class names of ImageNet-1k"""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
_HEAD = re.compile(r"fc|head|classif|linear|logits|output", re.IGNORECASE)
MAX_CARD_BYTES = 64 * 2**20


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
        classes: outputs of the last linear layer.
        channels: channels of the images.
        matches: networks that match exactly, or else the nearest.
        input: the input that the model expects; None if unknown.
        labels: class names; None if unknown.
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
        UsageError: no such file, no weights, no BatchNorm layers, or not a classifier.
        IntegrityError: the file is damaged, or a pickle that would run code.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return _look_at_folder(path)
    tensors = read_state_dict(path, key)
    shapes = shapes_of(tensors)
    batch_norms = _require_batch_norms(path, shapes)
    classes = _classes(path, tensors, shapes)
    channels, found = _network(path, shapes, model, channels or _channels(path, shapes), classes)
    card = _card_beside(path)
    name = model or (found[0].model if found and found[0].exact else None)
    return Findings(
        path=path,
        key=key or key_taken(path, key),
        tensors=len(tensors),
        parameters=sum(value.numel() for key, value in tensors.items() if not _is_statistic(key)),
        batch_norms=batch_norms,
        classes=classes,
        channels=channels,
        matches=tuple(found),
        input=_input(path, name, channels, classes, card),
        labels=_labels(path, name, classes, card),
    )


def _network(path: Path, shapes: Shapes, model: str | None, channels: int, classes: int) -> tuple[int, list[Match]]:
    """The image channels and the matching networks. If no network fits with the given channels, tries the number of
    channels read from the tensors."""

    def matches(channels: int) -> list[Match]:
        if model is None:
            return find(shapes, channels, classes, path.stem)
        match = compare(model, shapes, channels, classes)
        return [] if match is None else [match]

    found = matches(channels)
    seen = _image_channels(shapes)
    if seen not in (None, channels) and not any(match.exact for match in found):
        others = matches(seen)
        if any(match.exact for match in others):
            return seen, others
    return channels, found


def _look_at_folder(path: Path) -> Findings:
    from nayer_edge.models import huggingface

    model = f"hf:{path.resolve()}"
    parsed = parse(model)
    tensors = huggingface.own_weights(parsed)
    shapes = shapes_of(tensors)
    batch_norms = _require_batch_norms(path, shapes)
    names = huggingface.published_labels(parsed)
    classes = _classes(path, tensors, shapes)
    origin = f"the image processor in {path.name}"
    return Findings(
        path=path,
        key="",
        tensors=len(tensors),
        parameters=sum(value.numel() for key, value in tensors.items() if not _is_statistic(key)),
        batch_norms=batch_norms,
        classes=classes,
        channels=_channels(path, shapes),
        matches=(Match(model, True, len(shapes), len(shapes)),),
        input=Guess(InputSpec.model_validate(huggingface.input_of(parsed)), origin, True),
        labels=_usable(names, classes, f"id2label in {path.name}/config.json", True),
    )


# ------------------------------------------------------------------ from the tensors


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _require_batch_norms(path: Path, shapes: Shapes) -> int:
    count = sum(name.endswith("running_mean") for name in shapes)
    if count == 0:
        attends = any(re.search(r"attn|attention|qkv", name) for name in shapes)
        raise no_batch_norms(f"The network in {path}", ": it is a transformer" if attends else "")
    return count


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


def _classes(path: Path, tensors: Mapping[str, Tensor], shapes: Shapes) -> int:
    """Number of outputs of the last linear layer."""
    linear = [name for name, shape in shapes.items() if len(shape) == 2 and name.endswith("weight")]
    linear = [name for name in linear if not AUXILIARY.search(name)]
    linear.sort(key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")])
    heads = [name for name in linear if _HEAD.search(name)] or linear
    if not heads:
        raise UsageError(
            f"The network in {path} has no linear layer, so it is not a classifier.",
            why=f"None of its {len(tensors)} tensors is the weight of a linear layer with one row per class.",
            fix="Use a checkpoint of the whole classifier, including its head.",
        )
    return shapes[heads[-1]][0]


# ------------------------------------------------------------------ from files beside it


def _card_beside(path: Path) -> dict[str, Any]:
    """A JSON file of the same name that states input and classes, as our own cards do; empty if there is none."""
    card = path.with_suffix(".json")
    try:
        if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
            return {}
        value = json.loads(card.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _input(path: Path, model: str | None, channels: int, classes: int, card: Mapping[str, Any]) -> Guess | None:
    told = card.get("input")
    if isinstance(told, dict):
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
    small = model.startswith("nayer:")
    size = 32 if small else int(found.get("height", 224))
    mean, std = (CIFAR_MEAN, CIFAR_STD) if small else (IMAGENET_MEAN, IMAGENET_STD)
    if channels != 3:
        mean, std = (0.5,), (0.5,)
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
