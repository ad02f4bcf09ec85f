"""Builds teachers and students by name; saves and loads them as weights with a readable JSON card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from nayer_edge.config import InputSpec, Teacher
from nayer_edge.errors import WRONG_ARGUMENT, IntegrityError, UsageError
from nayer_edge.models import build as sources
from nayer_edge.models import huggingface, published
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.names import MEMORY, parse, published_weights
from nayer_edge.models.prior import require_prior
from nayer_edge.models.state_dicts import Loaded, key_taken, load_weights, read_state_dict
from nayer_edge.storage.files import read_json, sha256_of, write_json
from nayer_edge.storage.tensors import load_tensors, save_tensors

CARD_SCHEMA = "nayer-edge/model/1"


def build_classifier(
    model: str,
    spec: InputSpec,
    classes: Sequence[str],
    arguments: Mapping[str, Any] | None = None,
    rebuild: Mapping[str, Any] | None = None,
    resize: tuple[int, int] | None = None,
) -> Classifier:
    """Builds an untrained classifier by name.

    Args:
        model: as in a recipe; see `nayer_edge.models.names`.
        arguments, rebuild: see `nayer_edge.models.build.build`.
        resize: height and width that the network takes, if not those of the images; default: that in `rebuild`.

    Raises:
        UsageError: no such source or network, or it cannot be built.
        MissingError: its library is not installed, or its hub cannot be reached.
        IntegrityError: a `python:` model without --trust-code.
    """
    resize = resize or (rebuild or {}).get("resize")
    seen = spec if resize is None else spec.model_copy(update={"height": resize[0], "width": resize[1]})
    built = sources.build(model, seen, classes, arguments, rebuild)
    found = built.rebuild if resize is None else {**built.rebuild, "resize": list(resize)}
    return Classifier(built.network, built.name, spec, classes, found)


def check_forward(classifier: Classifier) -> None:
    """Runs one forward pass in eval mode, so that a classifier that cannot run is found before any work.

    Raises:
        UsageError: it cannot take images of its input size, or its output has another number of classes.
    """
    device, training = next((p.device for p in classifier.parameters()), torch.device("cpu")), classifier.training
    spec, size = classifier.spec, classifier.resize
    resized = "" if size is None else f", resized to {size[0]}×{size[1]}"
    try:
        with torch.no_grad():
            logits = classifier.eval()(torch.zeros(2, *spec.shape, device=device))
    except WRONG_ARGUMENT as error:
        raise UsageError(
            f"{classifier.model} cannot take images of {spec.channels}×{spec.height}×{spec.width}{resized}.",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="Check teacher.input. If the network takes another size only, set teacher.resize = [height, width]: "
            "it then resizes its images itself.",
        ) from error
    finally:
        classifier.train(training)
    if logits.shape != (2, len(classifier.classes)):
        raise UsageError(
            f"{classifier.model} returns a tensor of shape {tuple(logits.shape)} for 2 images; "
            f"with {len(classifier.classes)} classes it should be (2, {len(classifier.classes)}).",
            fix="Give teacher.classes one name for each output, in order.",
        )


def save_classifier(classifier: Classifier, weights: Path, facts: Mapping[str, Any]) -> None:
    """Writes `<name>.safetensors`, and beside it the card `<name>.json` to rebuild the classifier.

    Args:
        facts: additional entries of the card, for example how the classifier was trained.
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


def is_card_of(card: Mapping[str, Any], weights: Path) -> bool:
    """Whether a JSON file's content is the card that `save_classifier` wrote for these weights."""
    return card.get("schema") == CARD_SCHEMA and card.get("sha256") == sha256_of(weights)


def load_classifier(weights: Path) -> Classifier:
    """Rebuilds a classifier written by `save_classifier`, in eval mode, on the CPU.

    Raises:
        IntegrityError: card or weights are missing, damaged or do not match.
    """
    card = read_json(weights.with_suffix(".json"), "a model card")
    try:
        if card["schema"] != CARD_SCHEMA:
            raise ValueError(f"its schema is {card['schema']!r}, not {CARD_SCHEMA!r}")
        spec = InputSpec.model_validate(card["input"])
        model, classes, digest = str(card["model"]), [str(label) for label in card["classes"]], card["sha256"]
        rebuild = dict(card.get("rebuild", {}))
        arguments = dict(rebuild.get("arguments", {}))
        if "resize" in rebuild:
            height, width = rebuild["resize"]
            InputSpec(height=height, width=width)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise IntegrityError(f"{weights.with_suffix('.json')} is not a model card.", why=f"{error}") from error
    if not weights.is_file() or sha256_of(weights) != digest:
        raise IntegrityError(
            f"{weights} is missing or does not match its card.",
            fix="Copy both files again from their source.",
        )
    classifier = build_classifier(model, spec, classes, arguments, rebuild)
    load_weights(classifier, load_tensors(weights, "model weights"), weights)
    return classifier.eval()


def weights_digest(classifier: Classifier) -> str:
    """SHA-256 of the classifier's identity and the names and values of the backbone's state dict."""
    digest = hashlib.sha256(classifier.identity.encode())
    for name, tensor in sorted(classifier.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def untrained_teacher(config: Teacher) -> Classifier:
    """The teacher's untrained network, built with the recipe's arguments and those that published weights need.

    Raises:
        UsageError, MissingError, IntegrityError: see `build_classifier`.
    """
    arguments = published.arguments_of(config.model, config.weights) | config.arguments
    return build_classifier(config.model, config.input, config.classes, arguments, resize=config.resize)


def load_teacher(
    config: Teacher, random_weights: Classifier, prior: str = "batchnorm"
) -> tuple[Classifier, dict[str, Any]]:
    """Loads the trained teacher.

    Args:
        random_weights: the result of `untrained_teacher`.
        prior: `synthesis.prior`, which decides whether the teacher needs BatchNorm.

    Returns:
        The teacher in eval mode, and the card's entries about its weights.

    Raises:
        UsageError: the weights do not match the network or contain NaN, or the class names do not match.
        MissingError: they are on a hub that cannot be reached.
        IntegrityError: the file is damaged, or a pickle that would run code.
    """
    teacher, model = random_weights, parse(config.model)
    if config.weights is None and model.source == "hf":
        _check_labels(config.classes, huggingface.published_labels(model), teacher.model)
        tensors: dict[str, Tensor] = huggingface.own_weights(model)
        loaded, facts = load_weights(teacher, tensors, Path(model.portable)), {"source": model.portable}
    elif config.weights is None:
        # The factory of a python model, or the calling program, gave a trained network.
        loaded = load_weights(teacher, teacher.backbone.state_dict(), Path(model.portable))
        facts = {"source": MEMORY if model.source == MEMORY else model.portable}
    else:
        named = published_weights(config.weights) is not None
        path = published.fetch(config.model, config.weights) if named else Path(config.weights)
        tensors = read_state_dict(path, config.weights_key)
        loaded = load_weights(teacher, tensors, path, config.weights_ignore)
        facts: dict[str, Any] = {"source": path.name, "source_sha256": sha256_of(path)}
        if key := key_taken(path, config.weights_key):
            facts["key"] = key
        if (top1 := published.top1_of(config.model, config.weights)) is not None:
            facts["published_top1"] = top1
    require_prior(teacher, f"The teacher {teacher.model}", prior)
    check_forward(teacher)
    return teacher.eval(), {**facts, **_left_out(loaded)}


def _left_out(loaded: Loaded) -> dict[str, Any]:
    facts = loaded.facts()
    return {"weights": facts} if facts else {}


def _check_labels(classes: Sequence[str], published_names: Sequence[str], model: str) -> None:
    """Rejects the model's own class names in another order; other class names are the user's choice."""
    if sorted(classes) == sorted(published_names) and list(classes) != list(published_names):
        first = next(number for number, name in enumerate(published_names) if classes[number] != name)
        raise UsageError(
            f"teacher.classes are the class names of {model} in another order.",
            why=f"Number {first} is '{published_names[first]}' there and '{classes[first]}' in the recipe.",
            fix="Use the order of its config.json (id2label).",
        )
