"""Weights that a library publishes, and what it says of the images that they were trained on."""

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
"""networks whose published weights want `transform_input`, which turns torchvision's normalisation into TensorFlow's"""


def input_of(model: str, weights: str | None) -> tuple[dict[str, Any], str]:
    """What the library's own metadata says of a model's input.

    torchvision: the transforms of the weights that are named, or whose published file name `weights` has.
    timm: the configuration of the architecture or of its tag. hf: the image processor.

    Returns:
        Some of channels, height, width, mean and std, and where they are from; nothing where nobody knows.

    Raises:
        UsageError: there are no such weights or models.
        MissingError: the library is not installed, or its hub cannot be reached.
    """
    parsed = parse(model)
    if parsed.source == "torchvision":
        entry = _torchvision_entry(parsed, weights)
        if entry is None:
            return {}, ""
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


def arguments_of(model: str, weights: str | None) -> dict[str, Any]:
    """What a network must be built with so that published weights mean what they meant."""
    parsed = parse(model)
    if parsed.source == "torchvision" and parsed.name in TORCHVISION_TF_INPUT and _torchvision_entry(parsed, weights):
        return {"transform_input": True}
    return {}


def fetch(model: str, weights: str) -> Path:
    """The file of named published weights: from the library's cache, or downloaded into it.

    Raises:
        UsageError: there are no such weights.
        MissingError: they are not here and cannot be downloaded.
        IntegrityError: the cached file is not the published one.
    """
    parsed, named = parse(model), published_weights(weights)
    assert named is not None
    if named[0] != parsed.source:
        raise UsageError(f"{weights} are no weights of {parsed.portable}.", fix="Both must be of one library.")
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
                fix=f"Fetch {url} where there is a network, bring it here, and give teacher.weights = its path; keep "
                "the name, by which it is recognised.",
            ) from error
    wanted = name.removesuffix(".pth").rpartition("-")[2]
    if not sha256_of(path).startswith(wanted):
        raise IntegrityError(
            f"{path} is not the published file.",
            why=f"Its SHA-256 should begin with {wanted}.",
            fix="Delete it; it is fetched again.",
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
        # No such network: building it says so better.
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
            f"timm knows no weights of {name}.", why=str(error), fix=f"It knows {', '.join(tags) or 'none'}."
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
            f"The weights {name} are not on this machine, and the hub did not give them.",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=f"Where there is a network, type: hf download {identifier} model.safetensors, bring the file here, and "
            "give teacher.weights = its path.",
        ) from error


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in found.items()}
