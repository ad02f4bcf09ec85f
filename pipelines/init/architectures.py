"""Identifies the network of a checkpoint by comparing tensor names and shapes with our zoo, torchvision and timm.

Candidates are built on the meta device, and only those of the families whose tensor names match.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from nayer_edge.config import InputSpec
from nayer_edge.errors import NayerEdgeError
from nayer_edge.models import build as sources
from nayer_edge.models import zoo
from nayer_edge.models.state_dicts import AUXILIARY, align

Shapes = Mapping[str, tuple[int, ...]]
PLACEHOLDER = "class"
PROBES = (41, 43)
"""class counts and channel counts that no layer is likely to have otherwise"""
MOST_CHANNELS = 16
"""numbers of channels that are tried where the first convolution has groups"""
ALMOST = 0.9
"""fraction of matching shapes above which, if all names match, it is this network with another stem or head"""


@dataclass(frozen=True)
class Family:
    """Networks that share a naming scheme for their tensors.

    Attributes:
        tensors: tensor names that all of them have.
        torchvision: regular expression for their names in torchvision.
        timm: timm modules that define them.
    """

    tensors: tuple[str, ...]
    torchvision: str = ""
    timm: tuple[str, ...] = ()


FAMILIES = (
    Family(("layer1.0.conv1.weight", "fc.weight"), r"(wide_)?res(net|next)\d", ("resnet", "resnetv2", "res2net")),
    Family(("features.0.0.weight", "classifier.1.weight"), r"(mobilenet_v2|efficientnet)"),
    Family(("features.0.0.weight", "classifier.3.weight"), r"mobilenet_v3"),
    Family(("stage2.0.branch2.0.weight",), r"shufflenet"),
    Family(("trunk_output.block1.block1-0.f.a.0.weight",), r"regnet"),
    Family(("features.denseblock1.denselayer1.norm1.weight",), r"densenet", ("densenet",)),
    Family(("layers.0.weight", "layers.8.0.layers.0.weight"), r"mnasnet"),
    Family(("features.0.weight", "classifier.6.weight"), r"vgg\d+_bn"),
    Family(("inception3a.branch1.conv.weight",), r"googlenet"),
    Family(("Mixed_5b.branch1x1.conv.weight",), r"inception_v3", ("inception_v3",)),
    Family(("conv_stem.weight", "conv_head.bias"), timm=("mobilenetv3", "ghostnet", "hardcorenas")),
    Family(("conv_stem.weight", "conv_head.weight", "bn2.weight"), timm=("efficientnet",)),
    Family(("stem.conv.weight", "s1.b1.conv1.conv.weight"), timm=("regnet",)),
    Family(("stages.0.0.conv1.weight",), timm=("resnetv2", "cspnet", "byobnet")),
    Family(("stem.conv.weight", "stages.0.0.conv1_1x1.conv.weight"), timm=("byobnet",)),
    Family(("features.0.weight", "pre_logits.fc1.weight"), timm=("vgg",)),
    Family(("base_layer.0.weight",), timm=("dla",)),
    Family(("stem.0.weight",), timm=("rexnet", "hrnet", "mobilenetv5")),
    Family(("conv1.weight", "bn1.weight", "stage2.0.branches.0.0.conv1.weight"), timm=("hrnet",)),
    Family(("block1.rep.0.conv1.weight",), timm=("xception",)),
)


@dataclass(frozen=True)
class Match:
    """A network that the weights may belong to.

    Attributes:
        model: name of the network, as in a recipe.
        exact: all names and shapes match.
        fitting: number of the network's tensors that the file holds with the same shape.
        wanted: number of tensors in the network.
        differing: the differences, in words, each with a few examples.
        prefix: prefix of the tensor names in the file.
        same_names: all names match; only shapes differ.
        classes: outputs of its head in the file.
        outside: tensors of the file that are not the network's.
        rivals: prefixes under which the file holds these tensors, if there are several.
    """

    model: str
    exact: bool
    fitting: int
    wanted: int
    differing: tuple[str, ...] = ()
    prefix: str = ""
    same_names: bool = True
    classes: int = 0
    outside: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name, without batch counters and auxiliary training heads."""
    return {
        name: tuple(value.shape)
        for name, value in tensors.items()
        if not name.endswith("num_batches_tracked") and not AUXILIARY.search(name)
    }


def find(shapes: Shapes, channels: int, classes: int, hint: str = "") -> list[Match]:
    """The networks that match exactly or, if there is none, up to three of the nearest.

    Args:
        hint: the file name, which often contains the network's name.
    """
    matches: list[Match] = []
    for names in _candidates(shapes, hint):
        for model in names:
            match = compare(model, shapes, channels, classes)
            if match is not None and match.exact:
                # One library with an exact match is enough: networks of the same name are the same in the others.
                # Within timm they are not: its `tf_` variants have the same tensors, but different padding.
                same_tensors = [other for other in names if other != model and _base(other) == _base(model)]
                # The file's name may be that of a timm variant of another library's network.
                same_tensors += [
                    other for other in variants(model) if other not in same_tensors and _named(other[5:], hint)
                ]
                found = [compare(other, shapes, channels, classes) for other in same_tensors]
                return [match, *(other for other in found if other is not None and other.exact)]
            matches += [match] if match is not None else []
            if match is not None and match.same_names and match.fitting >= ALMOST * match.wanted:
                # This network with another stem or head: no other library can match better.
                return [match]
    return sorted(matches, key=lambda match: -match.fitting / max(match.wanted, 1))[:3]


def compare(model: str, shapes: Shapes, channels: int, classes: int) -> Match | None:
    """Compares the weights with a network; None if it cannot be built.

    Args:
        classes: a guess; where only the head differs, its outputs in the file are what counts.
    """
    wanted = _shapes_of_network(model, channels, classes)
    if wanted is None:
        return None
    alignment = align(shapes, wanted)
    inside = {name: shapes[held] for name, held in alignment.names.items()}
    # Networks with other names are not this one, whatever their head.
    if wanted.keys() <= inside.keys() and any(inside[name] != shape for name, shape in wanted.items()):
        head = _head_of(model, channels)
        outputs = {inside[name][0] for name in head if inside.get(name)}
        if len(outputs) == 1 and (rebuilt := _shapes_of_network(model, channels, *outputs)) is not None:
            wanted, classes = rebuilt, outputs.pop()
    fitting = sum(inside.get(name) == shape for name, shape in wanted.items())
    exact = inside.keys() == wanted.keys() and fitting == len(wanted) and not alignment.rivals
    return Match(
        model,
        exact,
        fitting,
        len(wanted),
        tuple(_differences(inside, wanted)),
        alignment.prefix,
        inside.keys() == wanted.keys(),
        classes,
        alignment.outside,
        alignment.rivals,
    )


@lru_cache(maxsize=512)
def _head_of(model: str, channels: int) -> frozenset[str]:
    """Names of the tensors with one row per class: those that change with the number of classes."""
    several = [_shapes_of_network(model, channels, count) or {} for count in PROBES]
    return frozenset(
        name
        for name, shape in several[0].items()
        if shape[:1] == (PROBES[0],) and several[1].get(name, ())[:1] == (PROBES[1],)
    )


def image_channels(model: str, shapes: Shapes, classes: int, channels: int) -> tuple[int, ...]:
    """The numbers of image channels with which a network fits the weights.

    A convolution with groups stores the channels of one group, so its weights alone do not tell. Where the network's
    first convolution has none, or code fixes the number of channels, the network does.

    Args:
        channels: a number with which it fits.
    """
    taken, groups = _stem_of(model, channels, classes)
    # One channel may be that of one group.
    if taken != channels or (groups == 1 and channels > 1):
        return (taken,)
    fitting = {
        _stem_of(model, count, classes)[0]
        for count in range(1, MOST_CHANNELS + 1)
        if (match := compare(model, shapes, count, classes)) is not None and match.exact
    }
    return tuple(sorted(fitting)) or (channels,)


def _stem_of(model: str, channels: int, classes: int) -> tuple[int, int]:
    """Input channels and groups of a network's first convolution: the one whose input changes with the images'
    channels, or, if code fixes those, the one that is defined first."""
    network, other = _built(model, channels, classes), _built(model, PROBES[0], classes)
    convolutions = dict(_convolutions(network))
    taking = [name for name, module in _convolutions(other) if module.in_channels == PROBES[0]]
    first = next((convolutions[name] for name in taking if name in convolutions), None)
    first = first or next(iter(convolutions.values()), None)
    return (channels, 1) if first is None else (first.in_channels, first.groups)


def _convolutions(network: torch.nn.Module | None) -> Iterator[tuple[str, torch.nn.Conv2d]]:
    for name, module in network.named_modules() if network is not None else ():
        if isinstance(module, torch.nn.Conv2d):
            yield name, module


def _candidates(shapes: Shapes, hint: str) -> Iterator[list[str]]:
    """Names to try, library by library, names suggested by the file name first."""
    yield [f"nayer:{name}" for name in _of_zoo(shapes)]
    bare = {name.removeprefix(prefix) for prefix in ("", *_prefixes(shapes)) for name in shapes}
    families = [family for family in FAMILIES if all(name in bare for name in family.tensors)]
    yield [f"torchvision:{name}" for name in _hinted(_of_torchvision(families), hint)]
    yield [f"timm:{name}" for name in _hinted(_of_timm(families, hint), hint)]


def _of_zoo(shapes: Shapes) -> list[str]:
    """Names of our zoo; the depth and width of a WideResNet are read from its tensors."""
    names: list[str] = list(zoo.NAMES)
    for prefix in ("", *_prefixes(shapes)):
        blocks = {
            match[1] for name in shapes if (match := re.match(re.escape(prefix) + r"block1\.layer\.(\d+)\.", name))
        }
        first = shapes.get(f"{prefix}block1.layer.0.conv1.weight")
        if blocks and first:
            wide = f"wrn_{6 * len(blocks) + 4}_{max(1, first[0] // 16)}"
            names = [wide, *(name for name in names if name != wide)]
    return names


def _of_torchvision(families: Sequence[Family]) -> list[str]:
    try:
        from torchvision import models as torchvision_models
    except ImportError:
        return []
    patterns = [family.torchvision for family in families if family.torchvision]
    known = torchvision_models.list_models(module=torchvision_models)
    return [name for name in known if any(re.match(pattern, name) for pattern in patterns)]


def _of_timm(families: Sequence[Family], hint: str) -> list[str]:
    try:
        import timm
    except ImportError:
        return []
    modules = {module for family in families for module in family.timm}
    found = [name for module in sorted(modules) for name in timm.list_models(module=module)]
    # Any network named in the file name, whatever its family.
    return list(dict.fromkeys([*found, *(name for name in timm.list_models() if _named(name, hint) == len(name))]))


def _base(model: str) -> str:
    """A network's name without library, and without what tells timm's variants with the same tensors apart: `tf_` for
    TensorFlow's padding, `aa` and `blur` for smoothing before each subsampling."""
    name = model.rpartition(":")[2].removeprefix("tf_")
    return re.sub(r"_(aa|blur)(?=_)", "", re.sub(r"(?<=(?:net|ext))(aa|blur)(?=\d)", "", name))


@lru_cache(maxsize=64)
def variants(model: str) -> tuple[str, ...]:
    """timm's networks that have the tensors of another library's network, but smooth or pad where it does not."""
    if model.startswith("timm:"):
        return ()
    try:
        import timm
    except ImportError:
        return ()
    base = _base(model)
    return tuple(f"timm:{name}" for name in timm.list_models() if _base(name) == base != name)


def _hinted(names: list[str], hint: str) -> list[str]:
    return sorted(names, key=lambda name: (-_named(name, hint), len(name), name))


def _named(name: str, hint: str) -> int:
    """Length of the network's name if the file name contains it as a whole word, otherwise 0."""
    text, whole = re.sub(r"[^a-z0-9]+", "_", hint.lower()), re.sub(r"[^a-z0-9]+", "_", name.lower())
    return len(name) if re.search(rf"(^|_){re.escape(whole)}(_|$)", text) else 0


@lru_cache(maxsize=512)
def _shapes_of_network(model: str, channels: int, classes: int) -> dict[str, tuple[int, ...]] | None:
    network = _built(model, channels, classes)
    return None if network is None else shapes_of(network.state_dict())


def _built(model: str, channels: int, classes: int) -> torch.nn.Module | None:
    """The network on the meta device if possible; None if it cannot be built."""
    spec, labels = InputSpec(channels=channels), [f"{PLACEHOLDER} {number}" for number in range(classes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("timm").setLevel(logging.ERROR)
        try:
            with torch.device("meta"):
                return sources.build(model, spec, labels).network
        except NayerEdgeError:
            return None
        except RuntimeError:
            # Some networks compute their widths with tensors, which fails on the meta device.
            try:
                return sources.build(model, spec, labels).network
            except (NayerEdgeError, RuntimeError):
                return None


def _prefixes(shapes: Shapes) -> list[str]:
    """Prefixes of up to two parts that several names share ("model.", "backbone.")."""
    counts = Counter(
        ".".join(parts[:count]) + "."
        for parts in (name.split(".") for name in shapes)
        for count in range(1, min(len(parts), 3))
    )
    return [prefix for prefix, times in counts.items() if times > 1]


def _differences(inside: Shapes, wanted: Shapes) -> Iterator[str]:
    def written(shape: tuple[int, ...]) -> str:
        return "×".join(map(str, shape)) or "a scalar"

    for what, names in (
        ("missing", [name for name in wanted if name not in inside]),
        ("not in the network", [name for name in inside if name not in wanted]),
    ):
        if names:
            yield f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
    other = [name for name, shape in wanted.items() if name in inside and inside[name] != shape]
    if other:
        name = other[0]
        yield (
            f"{len(other)} with another shape ({name} is {written(inside[name])} in the file, {written(wanted[name])} "
            "in the network)"
        )
