"""Teachers and students: building them by name, and weights that never travel without a readable card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models import build as sources
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.state_dicts import load_weights
from nayer_edge.storage.run_folder import read_json, sha256_of, write_json
from nayer_edge.storage.tensors import load_tensors, save_tensors

CARD_SCHEMA = "nayer-edge/model/1"
SHORT_MOMENTUM = 0.1
"""PyTorch's own, of the running statistics of BatchNorms"""


def build_classifier(
    model: str,
    spec: InputSpec,
    classes: Sequence[str],
    arguments: Mapping[str, Any] | None = None,
    rebuild: Mapping[str, Any] | None = None,
) -> Classifier:
    """Builds an untrained classifier by name.

    Args:
        model: as in a recipe; see `nayer_edge.models.names`.
        arguments, rebuild: see `nayer_edge.models.build.build`.

    Raises:
        UsageError: no such source or network, or it cannot be built.
        MissingError: its library is not installed, or its hub cannot be reached.
        IntegrityError: a `python:` model that nobody trusted.
    """
    built = sources.build(model, spec, classes, arguments, rebuild)
    return Classifier(built.network, built.name, spec, classes, built.rebuild)


def rehearse(classifier: Classifier) -> None:
    """Lets an evaluated classifier answer once, so that one that cannot is found before any work.

    Raises:
        UsageError: it cannot take such images, or answers with another number of classes.
    """
    device, training = next((p.device for p in classifier.parameters()), torch.device("cpu")), classifier.training
    spec = classifier.spec
    try:
        with torch.no_grad():
            logits = classifier.eval()(torch.zeros(2, *spec.shape, device=device))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise UsageError(
            f"{classifier.model} cannot take images of {spec.channels}×{spec.height}×{spec.width}.",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="Check teacher.input; a network may also want larger images.",
        ) from error
    finally:
        classifier.train(training)
    if logits.shape != (2, len(classifier.classes)):
        raise UsageError(
            f"{classifier.model} answers with a tensor of shape {tuple(logits.shape)} to 2 images; "
            f"{len(classifier.classes)} classes make it (2, {len(classifier.classes)}).",
            fix="Give teacher.classes one name for each output, in their order.",
        )


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
        **({"rebuild": classifier.rebuild} if classifier.rebuild else {}),
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
        rebuild = dict(card.get("rebuild", {}))
        arguments = dict(rebuild.get("arguments", {}))
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise IntegrityError(f"{weights.with_suffix('.json')} is not a model card.", why=f"{error}") from error
    if not weights.is_file() or sha256_of(weights) != digest:
        raise IntegrityError(
            f"{weights} is missing or is not the file that its card describes.",
            fix="Fetch both files again from where they were made.",
        )
    classifier = build_classifier(model, spec, classes, arguments, rebuild)
    load_weights(classifier, load_tensors(weights, "model weights"), weights)
    return classifier.eval()


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm with running statistics, in the order of `model.modules()`."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


def quicken_batch_norms(classifier: Classifier) -> None:
    """Lets BatchNorms remember tens of batches and not hundreds, where a library set them so for its long schedules.

    MobileNetV3 and TensorFlow's EfficientNets have a momentum of 0.01. A student of some hundred steps would be
    evaluated, also by L_adv, with statistics that are mostly their initial ones, and answer the same to every image.
    """
    for norm in batch_norms(classifier):
        if norm.momentum is not None:
            norm.momentum = max(norm.momentum, SHORT_MOMENTUM)


def weights_digest(classifier: Classifier) -> str:
    """SHA-256 over the classifier's identity, and name and values of the backbone's state."""
    digest = hashlib.sha256(classifier.identity.encode())
    for name, tensor in sorted(classifier.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
