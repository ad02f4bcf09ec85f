"""Builds untrained networks by name, with one function per source."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import WRONG_ARGUMENT, UsageError, missing_extra, nearest, on_meta
from nayer_edge.models import huggingface, in_memory, user_code, zoo
from nayer_edge.models.adapt import lower_strides, replace_channels
from nayer_edge.models.names import MEMORY, ModelName, parse
from nayer_edge.models.published import torchvision_classifiers

FORBIDDEN_ARGUMENTS = ("pretrained", "checkpoint", "weights", "cache", "num_classes", "in_chans", "scriptable", "url")
"""forbidden parts of argument names: they would download or load files, or duplicate other recipe keys"""
AUXILIARY = {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": True}}
"""torchvision networks with auxiliary heads, which are built without them"""
PACKAGES = {"torchvision": "torchvision", "timm": "timm", "hf": "transformers"}


@dataclass(frozen=True)
class Built:
    """An untrained network, and what is needed to build it again.

    Attributes:
        name: the model name without local folders.
        rebuild: what its card must store in addition to name, classes and input.
    """

    network: nn.Module
    name: str
    rebuild: dict[str, Any] = field(default_factory=dict)


def build(
    model: str,
    spec: InputSpec,
    classes: Sequence[str],
    arguments: Mapping[str, Any] | None = None,
    rebuild: Mapping[str, Any] | None = None,
) -> Built:
    """Builds an untrained network: (B, C, H, W) normalised images → logits, or the library's wrapper around them.

    Args:
        model: its name, see `nayer_edge.models.names`.
        arguments: additional arguments for the library or factory, numbers and strings.
        rebuild: `Built.rebuild` of an earlier build; nothing else is read, except a python model's file.

    Raises:
        UsageError: no such source or network, it does not accept these
            arguments, or it is a module in the memory of another program.
        MissingError: its library is not installed, or its hub cannot be reached.
        IntegrityError: a python model without --trust-code.
    """
    known, options = dict(rebuild or {}), dict(arguments or {})
    if rebuild and "origin" in known:
        model = str(known["origin"])
    parsed = parse(model)
    found: dict[str, Any] = {"arguments": options} if options else {}
    if parsed.source != "python":
        _check_arguments(parsed, options)
    if parsed.source == "nayer":
        if options:
            raise UsageError(f"{model} takes no arguments.", fix="Remove them, or name another network.")
        return Built(zoo.build(parsed.name, spec.channels, len(classes)), model)
    if parsed.source == MEMORY:
        return Built(in_memory.build(parsed), f"{MEMORY}:{parsed.name}", {"origin": model, "available": False})
    if parsed.source == "python":
        network, digest = user_code.build(parsed, spec, len(classes), options, known.get("sha256"))
        if not isinstance(network, nn.Module):
            raise UsageError(f"{parsed.portable} returned a {type(network).__name__}.", fix="Return a torch.nn.Module.")
        if digest is not None:
            found |= {"origin": model, "sha256": digest}
    elif parsed.source == "hf":
        network, config = huggingface.build(parsed, spec, classes, options, known.get("config"))
        found["config"] = config
    else:
        network = _torchvision(parsed, spec, classes, options) if parsed.source == "torchvision" else _timm(
            parsed, spec, classes, options
        )  # fmt: skip
        if parsed.small is not None:
            found["lowered_strides"] = _lowered(network, parsed, spec)
    if package := PACKAGES.get(parsed.source):
        found["versions"] = {package: importlib.metadata.version(package)}
    return Built(network, parsed.portable, found)


def logits_in(output: Any) -> Tensor:
    """Extracts the logits from a network's output: a tensor, `logits` of a dictionary or data class, or the first item
    of a tuple (auxiliary heads follow it).

    Raises:
        UsageError: there are no logits.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, tuple | list) and output:
            found = output[0]
    if not isinstance(found, Tensor):
        raise UsageError(
            f"The network returns a {type(output).__name__} without logits.",
            fix="Return a tensor of shape (batch, classes), a tuple that starts with one, or a dictionary with the key "
            "logits.",
        )
    return found


def _check_arguments(model: ModelName, options: Mapping[str, Any]) -> None:
    bad = [name for name in options if any(word in name for word in FORBIDDEN_ARGUMENTS)]
    if bad:
        raise UsageError(
            f"{model.portable} does not accept the argument {', '.join(bad)} here.",
            why="Weights, classes and channels have their own keys in the recipe.",
            fix="Use teacher.weights, teacher.classes and teacher.input.channels.",
        )


def _torchvision(model: ModelName, spec: InputSpec, classes: Sequence[str], options: Mapping[str, Any]) -> nn.Module:
    try:
        from torchvision import models as torchvision_models
    except ImportError as error:
        raise missing_extra("torchvision", "cpu", f"The model {model.portable}") from error
    known = torchvision_classifiers()
    if model.name not in known:
        raise UsageError(
            f"torchvision has no classifier '{model.name}'.{nearest(model.name, known)}",
            fix=f"It has {', '.join(known[:12])}, …",
        )
    given = dict(options)
    if model.name in AUXILIARY:
        given = {"aux_logits": False, **AUXILIARY[model.name], **given}
    try:
        network = torchvision_models.get_model(model.name, weights=None, num_classes=len(classes), **given)
    except WRONG_ARGUMENT as error:
        if on_meta(error):
            raise
        raise _refused(model, options, error) from error
    if spec.channels != 3:
        replace_channels(network, spec.channels)
    return network


def _timm(model: ModelName, spec: InputSpec, classes: Sequence[str], options: Mapping[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise missing_extra("timm", "timm", f"The model {model.portable}") from error
    architecture, _, tag = model.name.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(
            f"timm has no network '{architecture}'.{nearest(architecture, timm.list_models())}",
            fix="timm.list_models() lists them; for a hub model, use the name of its architecture.",
        )
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UsageError(
            f"timm has no weights '{tag}' for {architecture}.{nearest(tag, tags)}",
            fix=f"It has {', '.join(tags)}." if tags else f"Write timm:{architecture}.",
        )
    try:
        return timm.create_model(model.name, pretrained=False, num_classes=len(classes), in_chans=spec.channels,
                                 **options)  # fmt: skip
    except WRONG_ARGUMENT as error:
        if on_meta(error):
            raise
        raise _refused(model, options, error) from error


def _refused(model: ModelName, options: Mapping[str, Any], error: Exception) -> UsageError:
    given = ", ".join(f"{name} = {value!r}" for name, value in options.items())
    return UsageError(
        f"{model.portable} cannot be built" + (f" with {given}." if given else "."),
        why=str(error).splitlines()[0] if str(error) else type(error).__name__,
    )


def _lowered(network: nn.Module, model: ModelName, spec: InputSpec) -> list[str]:
    assert model.small is not None
    try:
        return lower_strides(network, spec.channels, model.small)
    except UsageError as error:
        raise UsageError(f"{model.portable}: {error.what}", why=error.why, fix=error.fix) from error
