"""Identifies the network of a checkpoint by comparing tensor names and shapes with our zoo, torchvision and timm.

Candidates are built on the meta device, and only those of the families whose tensor names match.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from nayer_edge.config import InputSpec
from nayer_edge.errors import NayerEdgeError
from nayer_edge.models import build as sources
from nayer_edge.models import zoo
from nayer_edge.models.state_dicts import AUXILIARY

Shapes = Mapping[str, tuple[int, ...]]
PLACEHOLDER = "class"
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
    """

    model: str
    exact: bool
    fitting: int
    wanted: int
    differing: tuple[str, ...] = ()
    prefix: str = ""
    same_names: bool = True


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
                twins = [other for other in names if other != model and _base(other) == _base(model)]
                found = [compare(other, shapes, channels, classes) for other in twins]
                return [match, *(other for other in found if other is not None and other.exact)]
            matches += [match] if match is not None else []
            if match is not None and match.same_names and match.fitting >= ALMOST * match.wanted:
                # This network with another stem or head: no other library can match better.
                return [match]
    return sorted(matches, key=lambda match: -match.fitting / max(match.wanted, 1))[:3]


def compare(model: str, shapes: Shapes, channels: int, classes: int) -> Match | None:
    """Compares the weights with a network; None if it cannot be built."""
    wanted = _shapes_of_network(model, channels, classes)
    if wanted is None:
        return None
    best: Match | None = None
    for prefix in ("", *_prefixes(shapes)):
        inside = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        fitting = sum(inside.get(name) == shape for name, shape in wanted.items())
        exact = inside.keys() == wanted.keys() and fitting == len(wanted)
        if best is None or (exact, fitting) > (best.exact, best.fitting):
            differing = tuple(_differences(inside, wanted))
            best = Match(model, exact, fitting, len(wanted), differing, prefix, inside.keys() == wanted.keys())
    return best


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
    """A model name without the `tf_` of timm's variants with TensorFlow padding."""
    return model.replace(":tf_", ":")


def _hinted(names: list[str], hint: str) -> list[str]:
    return sorted(names, key=lambda name: (-_named(name, hint), len(name), name))


def _named(name: str, hint: str) -> int:
    """Length of the network's name if the file name contains it as a whole word, otherwise 0."""
    text, whole = re.sub(r"[^a-z0-9]+", "_", hint.lower()), re.sub(r"[^a-z0-9]+", "_", name.lower())
    return len(name) if re.search(rf"(^|_){re.escape(whole)}(_|$)", text) else 0


@lru_cache(maxsize=512)
def _shapes_of_network(model: str, channels: int, classes: int) -> dict[str, tuple[int, ...]] | None:
    spec, labels = InputSpec(channels=channels), [f"{PLACEHOLDER} {number}" for number in range(classes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("timm").setLevel(logging.ERROR)
        try:
            with torch.device("meta"):
                network = sources.build(model, spec, labels).network
        except NayerEdgeError:
            return None
        except RuntimeError:
            # Some networks compute their widths with tensors, which fails on the meta device.
            try:
                network = sources.build(model, spec, labels).network
            except (NayerEdgeError, RuntimeError):
                return None
    return shapes_of(network.state_dict())


def _prefixes(shapes: Shapes) -> list[str]:
    """Prefixes that at least 80 % of the names share ("model.", "backbone.")."""
    found: dict[str, int] = {}
    for name in shapes:
        parts = name.split(".")
        for count in range(1, min(len(parts), 3)):
            prefix = ".".join(parts[:count]) + "."
            found[prefix] = found.get(prefix, 0) + 1
    return [prefix for prefix, times in sorted(found.items()) if times >= 0.8 * len(shapes)]


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
