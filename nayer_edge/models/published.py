"""Weights published by a library, and the library's metadata about their input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nayer_edge.errors import IntegrityError, MissingError, UsageError, missing_extra, nearest
from nayer_edge.models import huggingface
from nayer_edge.models.names import ModelName, parse, published_weights
from nayer_edge.runtime import hub
from nayer_edge.storage.files import sha256_of

TORCHVISION_TF_INPUT = ("googlenet", "inception_v3")
"""networks whose published weights need `transform_input`: it converts torchvision's normalisation to TensorFlow's"""


def input_of(model: str, weights: str | None) -> tuple[dict[str, Any], str]:
    """A model's input according to the library's own metadata.

    torchvision: the transforms of the weights, identified by name or by their published file name.
    timm: the configuration of the architecture or its tag. hf: the image processor.

    Returns:
        Channels, height, width, mean and std, and their source; empty if they are unknown.

    Raises:
        UsageError: there are no such weights, or there is no such model.
        MissingError: the library is not installed, or its hub cannot be reached.
    """
    parsed = parse(model)
    if parsed.source == "torchvision":
        entry = _torchvision_entry(parsed, weights)
        if entry is None:
            return {}, ""
        if parsed.name not in torchvision_classifiers():
            raise UsageError(
                f"torchvision's {parsed.name} is not a classifier of images.",
                fix="For classifiers, see https://pytorch.org/vision/stable/models.html#classification.",
            )
        transforms = entry.transforms()
        (side,) = transforms.crop_size
        found = {"channels": 3, "height": side, "width": side, "mean": transforms.mean, "std": transforms.std}
        return _plain(found), f"torchvision's {entry}"
    if parsed.source == "timm":
        config, name = _timm_config(parsed, weights)
        channels, height, width = config.input_size
        found = {"channels": channels, "height": height, "width": width, "mean": config.mean, "std": config.std}
        return _plain(found), f"timm's {name}"
    if parsed.source == "hf":
        return huggingface.input_of(parsed), f"the image processor of {parsed.portable}"
    return {}, ""


def torchvision_classifiers() -> list[str]:
    """Names of torchvision's image classifiers. Its other modules contain detection and segmentation models, which may
    download backbone weights."""
    from torchvision import models

    return models.list_models(module=models)


def top1_of(model: str, weights: str | None) -> float | None:
    """The top-1 accuracy that torchvision publishes for weights, as a fraction; None for other weights."""
    parsed = parse(model)
    entry = _torchvision_entry(parsed, weights) if parsed.source == "torchvision" else None
    metrics = {} if entry is None else entry.meta.get("_metrics", {}).get("ImageNet-1K", {})
    return round(metrics["acc@1"] / 100, 5) if "acc@1" in metrics else None


def arguments_of(model: str, weights: str | None) -> dict[str, Any]:
    """Arguments that the network needs for these published weights."""
    parsed = parse(model)
    if parsed.source == "torchvision" and parsed.name in TORCHVISION_TF_INPUT and _torchvision_entry(parsed, weights):
        return {"transform_input": True}
    return {}


def may_transform_input(model: str, weights: str) -> bool:
    """Whether these weights may need `transform_input`, because they may have been trained from the published ones.
    Nothing in them shows it."""
    parsed = parse(model)
    named = parsed.source == "torchvision" and parsed.name in TORCHVISION_TF_INPUT
    return named and not arguments_of(model, weights)


def fetch(model: str, weights: str) -> Path:
    """The file of published weights, from the library's cache or downloaded into it.

    Raises:
        UsageError: there are no such weights.
        MissingError: they are not on this machine and cannot be downloaded.
        IntegrityError: the cached file is not the published one.
    """
    parsed, named = parse(model), published_weights(weights)
    assert named is not None
    if named[0] != parsed.source:
        raise UsageError(f"{weights} are not weights of {parsed.portable}.", fix="Use weights of the same library.")
    if parsed.source == "timm":
        return _fetch_timm(parsed, weights)
    entry = _torchvision_entry(parsed, weights)
    assert entry is not None
    url = str(entry.url)
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise MissingError(
                f"The weights {weights} are not on this machine and cannot be downloaded.",
                why=f"{error}",
                fix=f"Download {url} on a machine with network access, copy it here, and set teacher.weights to its "
                "path. Keep the file name, which identifies the weights.",
            ) from error
    wanted = name.removesuffix(".pth").rpartition("-")[2]
    if not sha256_of(path).startswith(wanted):
        raise IntegrityError(
            f"{path} is not the published file.",
            why=f"Its SHA-256 should begin with {wanted}.",
            fix="Delete it; it will be downloaded again.",
        )
    return path


def _torchvision_entry(model: ModelName, weights: str | None) -> Any:
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise missing_extra("torchvision", "cpu", f"The model {model.portable}") from error
    try:
        entries = get_model_weights(model.name)
    except ValueError:
        # No such network: building it gives a better error.
        return None
    named = published_weights(weights)
    if named is None:
        file = Path(weights or "").name
        return next((entry for entry in entries if str(entry.url).rpartition("/")[2] == file), None)
    known = list(entries.__members__)
    if named[1] not in known:
        raise UsageError(
            f"torchvision publishes no weights '{named[1]}' of {model.name}.{nearest(named[1], known)}",
            fix=f"It publishes {', '.join(known)}.",
        )
    return entries[named[1]]


def _timm_config(model: ModelName, weights: str | None) -> tuple[Any, str]:
    try:
        import timm
        from timm.models import get_pretrained_cfg
    except ImportError as error:
        raise missing_extra("timm", "timm", f"The model {model.portable}") from error
    named = published_weights(weights)
    architecture = model.name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UsageError(
            f"timm has no network '{architecture}'.{nearest(architecture, timm.list_models())}",
            fix="timm.list_models() lists them.",
        )
    name = f"{architecture}.{named[1]}" if named else model.name
    try:
        config = get_pretrained_cfg(name, allow_unregistered=False)
    except (RuntimeError, ValueError) as error:
        tags = [entry.partition(".")[2] for entry in timm.list_pretrained(f"{architecture}.*")]
        raise UsageError(
            f"timm has no weights for {name}.", why=str(error), fix=f"It has {', '.join(tags) or 'none'}."
        ) from error
    return config, name


def _fetch_timm(model: ModelName, weights: str) -> Path:
    config, name = _timm_config(model, weights)
    from huggingface_hub import hf_hub_download

    identifier, _, revision = str(config.hf_hub_id or "").partition("@")
    try:
        hub.require(identifier, "model.safetensors", revision or None)
        return Path(hf_hub_download(identifier, "model.safetensors", revision=revision or None))
    except (OSError, ValueError) as error:
        raise MissingError(
            f"The weights {name} are not on this machine and could not be downloaded from the hub.",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=f"Run hf download {identifier} model.safetensors on a machine with network access, copy the file here, "
            "and set teacher.weights to its path.",
        ) from error


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in found.items()}
