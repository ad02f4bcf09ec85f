"""Teachers and students: building them by name, and weights that never travel without a readable card.

A `Classifier` eats images in [0, 1]; normalisation is part of it, so no caller and no device can get it wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nayer_edge import zoo
from nayer_edge.artefacts import read_json, sha256_of, write_atomic, write_json
from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, UsageError, missing_extra, nearest

CARD_SCHEMA = "nayer-edge/model/1"


class Classifier(nn.Module):
    """A backbone with its normalisation: images in [0, 1] → logits.

    Attributes:
        model: its name, for example "nayer:wrn_40_2".
        spec: the images that it eats.
        classes: class names in the order of the logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, model: str, spec: InputSpec, classes: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = model
        self.spec = spec
        self.classes = tuple(classes)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.backbone((images - self.mean) / self.std)

    @property
    def parameter_count(self) -> int:
        """Trainable parameters of the backbone."""
        return sum(parameter.numel() for parameter in self.backbone.parameters())


def build_classifier(model: str, spec: InputSpec, classes: Sequence[str]) -> Classifier:
    """Builds an untrained classifier by name.

    Args:
        model: "nayer:<zoo name>" or "torchvision:<name>".

    Raises:
        UsageError: no such source or network.
    """
    source, colon, name = model.partition(":")
    if not colon:
        raise UsageError(
            f"'{model}' does not say where the model comes from.",
            fix=f"Write nayer:{model} for our zoo, or torchvision:{model}.",
        )
    if source == "nayer":
        backbone = zoo.build(name, spec.channels, len(classes))
    elif source == "torchvision":
        backbone = _torchvision(name, spec.channels, len(classes))
    else:
        raise UsageError(f"There is no model source '{source}' (in '{model}').", fix="Sources: nayer, torchvision.")
    return Classifier(backbone, model, spec, classes)


def _torchvision(name: str, channels: int, classes: int) -> nn.Module:
    try:
        from torchvision import models as torchvision_models
    except ImportError as error:
        raise missing_extra("torchvision", "cpu", f"The model torchvision:{name}") from error
    # Of this module alone: the others detect and segment, and may fetch weights for their backbones.
    known = torchvision_models.list_models(module=torchvision_models)
    if name not in known:
        raise UsageError(
            f"torchvision has no classifier '{name}'.{nearest(name, known)}", fix=f"It has {', '.join(known[:12])}, …"
        )
    network = torchvision_models.get_model(name, weights=None, num_classes=classes)
    if channels != 3:
        _replace_stem(network, channels)
    return network


def _replace_stem(network: nn.Module, channels: int) -> None:
    """Gives the first convolution another number of input channels (library models are built for three)."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            stem = nn.Conv2d(
                channels,
                module.out_channels,
                module.kernel_size,  # pyright: ignore[reportArgumentType]
                module.stride,  # pyright: ignore[reportArgumentType]
                module.padding,  # pyright: ignore[reportArgumentType]
                bias=module.bias is not None,
            )
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, stem)
            return


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, atomically; equal tensors give equal bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_atomic(path, lambda temporary: save_file(plain, temporary, metadata=dict(metadata or {}) or None))


def load_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        IntegrityError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise IntegrityError(f"{path} is not readable as {what}.", why=f"{error}") from error


def save_classifier(classifier: Classifier, weights: Path, facts: Mapping[str, Any]) -> None:
    """Writes `<name>.safetensors` and beside it `<name>.json`, which says how to rebuild it.

    Args:
        facts: what else a reader of the card should know (how it was trained, say).
    """
    save_tensors(weights, classifier.backbone.state_dict())
    card = {
        "schema": CARD_SCHEMA,
        "model": classifier.model,
        "params": classifier.parameter_count,
        "input": classifier.spec.model_dump(mode="json"),
        "classes": list(classifier.classes),
        "sha256": sha256_of(weights),
        **facts,
    }
    write_json(weights.with_suffix(".json"), card)


def load_classifier(weights: Path) -> Classifier:
    """Rebuilds a classifier that `save_classifier` wrote, in evaluation mode, on the CPU.

    Raises:
        IntegrityError: card or weights are missing, damaged or do not belong together.
    """
    card = read_json(weights.with_suffix(".json"), "a model card")
    try:
        if card["schema"] != CARD_SCHEMA:
            raise ValueError(f"its schema is {card['schema']!r}, not {CARD_SCHEMA!r}")
        spec = InputSpec.model_validate(card["input"])
        model, classes, digest = str(card["model"]), [str(label) for label in card["classes"]], card["sha256"]
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise IntegrityError(f"{weights.with_suffix('.json')} is not a model card.", why=f"{error}") from error
    if not weights.is_file() or sha256_of(weights) != digest:
        raise IntegrityError(
            f"{weights} is missing or is not the file that its card describes.",
            fix="Fetch both files again from where they were made.",
        )
    classifier = build_classifier(model, spec, classes)
    load_weights(classifier, load_tensors(weights, "model weights"), weights)
    return classifier.eval()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads foreign weights: safetensors, or a PyTorch state dict with `weights_only=True`.

    Nested `state_dict` or `model` keys and `module.` prefixes are understood.

    Raises:
        UsageError: there is no such file, or it holds no weights.
        IntegrityError: it is damaged, or a pickle that would run code (it was not run).
    """
    if not path.is_file():
        raise UsageError(f"There are no weights at {path}.", fix="Mend teacher.weights in the recipe.")
    if path.suffix == ".safetensors":
        tensors: Any = load_tensors(path, "model weights")
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a damaged or hostile file
            raise IntegrityError(
                f"{path} is not a state dict that can be read safely; nothing in it was run.",
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                fix="Save it again with torch.save(model.state_dict(), …) or safetensors.",
            ) from error
    for key in ("state_dict", "model", "state_dict"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not any(isinstance(value, Tensor) for value in tensors.values()):
        raise UsageError(f"{path} holds no state dict.", fix="Save it with torch.save(model.state_dict(), …).")
    tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def load_weights(classifier: Classifier, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Loads weights into the backbone, strictly.

    Raises:
        UsageError: they belong to another architecture; says which keys, and how many.
    """
    wanted = classifier.backbone.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    extra = sorted(set(tensors) - set(wanted))
    shapes = sorted(n for n in set(wanted) & set(tensors) if wanted[n].shape != tensors[n].shape)
    if missing or extra or shapes:
        parts = []
        for what, names in (("missing", missing), ("not in the model", extra), ("of another shape", shapes)):
            if names:
                shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
                parts.append(f"{len(names)} {what} ({shown})")
        raise UsageError(
            f"The weights in {source} are not those of {classifier.model} with {len(classifier.classes)} classes.",
            why="Keys " + "; ".join(parts) + ".",
            fix="Name the architecture that they were trained with.",
        )
    classifier.backbone.load_state_dict(dict(tensors))


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm with running statistics, in the order of `model.modules()`."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


def weights_digest(classifier: Classifier) -> str:
    """SHA-256 over name and values of the backbone's state."""
    digest = hashlib.sha256(classifier.model.encode())
    for name, tensor in sorted(classifier.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
