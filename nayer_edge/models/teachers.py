"""A trained teacher from its recipe: network, weights from wherever they are, and proof that they belong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nayer_edge.config import Teacher
from nayer_edge.errors import UsageError
from nayer_edge.models import huggingface, published
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import batch_norms, build_classifier, rehearse
from nayer_edge.models.names import parse, published_weights
from nayer_edge.models.state_dicts import Loaded, key_taken, load_weights, read_state_dict
from nayer_edge.storage.run_folder import sha256_of


def untrained(config: Teacher) -> Classifier:
    """The teacher's network; the arguments that published weights need are added to those of the recipe.

    Raises:
        UsageError, MissingError, IntegrityError: see `build_classifier`.
    """
    arguments = published.arguments_of(config.model, config.weights) | config.arguments
    return build_classifier(config.model, config.input, config.classes, arguments)


def load(config: Teacher, random_weights: Classifier) -> tuple[Classifier, dict[str, Any]]:
    """The trained teacher, evaluated, and what its card says of the weights.

    Args:
        random_weights: what `untrained` built.

    Raises:
        UsageError: the weights are not this network's, hold NaN, or the class names are not theirs.
        MissingError: they are on a hub that cannot be reached.
        IntegrityError: the file is damaged, or a pickle that would run code.
    """
    teacher, model = random_weights, parse(config.model)
    if config.weights is None and model.source == "hf":
        _check_labels(config.classes, huggingface.published_labels(model), teacher.model)
        tensors: dict[str, Tensor] = huggingface.own_weights(model)
        loaded, facts = load_weights(teacher, tensors, Path(model.portable)), {"source": model.portable}
    elif config.weights is None:
        # A python model's factory returned it as it is to be.
        loaded = load_weights(teacher, teacher.backbone.state_dict(), Path(model.portable))
        facts = {"source": model.portable}
    else:
        named = published_weights(config.weights) is not None
        path = published.fetch(config.model, config.weights) if named else Path(config.weights)
        tensors = read_state_dict(path, config.weights_key)
        loaded = load_weights(teacher, tensors, path, config.weights_ignore)
        facts = {"source": path.name, "source_sha256": sha256_of(path)}
        if key := key_taken(path, config.weights_key):
            facts["key"] = key
    require_batch_norms(teacher)
    rehearse(teacher)
    return teacher.eval(), {**facts, **_left_out(loaded)}


def require_batch_norms(teacher: Classifier) -> None:
    """Refuses a teacher that data-free synthesis has nothing to hold on to.

    Raises:
        UsageError: it has no BatchNorm with running statistics.
    """
    if not batch_norms(teacher):
        raise UsageError(
            f"The teacher {teacher.model} has no BatchNorm layers.",
            why="NAYER makes images whose activations match the statistics that BatchNorm layers remember; "
            "transformers and ConvNeXt have none, so there is nothing to match.",
            fix="Use a teacher with BatchNorm (ResNet, WideResNet, VGG-BN, MobileNet, EfficientNet, …).",
        )


def _left_out(loaded: Loaded) -> dict[str, Any]:
    facts = loaded.facts()
    return {"weights": facts} if facts else {}


def _check_labels(classes: Sequence[str], published_names: Sequence[str], model: str) -> None:
    """Refuses the model's own class names in another order; other names for its classes are the user's choice."""
    if sorted(classes) == sorted(published_names) and list(classes) != list(published_names):
        first = next(number for number, name in enumerate(published_names) if classes[number] != name)
        raise UsageError(
            f"teacher.classes are the class names of {model} in another order.",
            why=f"Number {first} is '{published_names[first]}' there and '{classes[first]}' in the recipe.",
            fix="Give them in the order of its config.json (id2label).",
        )
