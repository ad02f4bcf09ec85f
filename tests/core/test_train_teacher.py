"""Training a small teacher on labelled images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nayer_edge.config import Augment, InputSpec, Teach
from nayer_edge.data.datasets import LabelledImages
from nayer_edge.errors import IntegrityError, TrainingError
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, weights_digest
from nayer_edge.runtime.compute import Compute, random_stream, seeded
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.tensors import save_tensors
from nayer_edge.train_teacher import teach
from nayer_edge.training.evaluate import logits_of, top1

SPEC = InputSpec(channels=1, height=8, width=8)
CLASSES = ("upper", "lower", "left", "right")


def halves(count: int, seed: int) -> LabelledImages:
    """Noise with one bright half."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 160, (count, 1, 8, 8), generator=random)
    labels = torch.arange(count) % 4
    for index, label in enumerate(labels.tolist()):
        part = ((slice(0, 4), slice(None)), (slice(4, 8), slice(None)), (slice(None), slice(0, 4)))
        rows, columns = (*part, (slice(None), slice(4, 8)))[label]
        images[index, 0, rows, columns] += 90
    return LabelledImages(images.to(torch.uint8), labels, "halves")


@pytest.fixture
def network() -> Classifier:
    with seeded(0):
        return build_classifier("nayer:resnet8", SPEC, CLASSES)


def settings(**changes: object) -> Teach:
    values = {"data": "halves", "epochs": 4, "batch": 32, "lr": 0.1, "augment": Augment(pad=1, flip=False)}
    return Teach.model_validate(values | changes)


def test_a_small_classifier_learns(network: Classifier, compute: Compute) -> None:
    held_out = halves(200, seed=2)
    trained = teach(network, halves(320, seed=1), settings(), compute, seed=0)
    assert trained is network
    assert not trained.training
    assert top1(logits_of(trained, held_out.images, compute), held_out.labels) > 0.95


class StoppedError(Exception):
    """Stands for an interruption."""


class StopAfter(Silent):
    """Interrupts the training in the middle of an epoch."""

    def __init__(self, calls: int) -> None:
        self.calls, self._most = 0, calls

    def advance(self, count: int = 1) -> None:
        del count
        self.calls += 1
        if self.calls > self._most:
            raise StoppedError


@pytest.mark.parametrize(("optimizer", "dropout"), [("sgd", 0.0), ("muon", 0.0), ("sgd", 0.3)])
def test_an_interrupted_training_continues_bit_identically(
    network: Classifier, compute: Compute, tmp_path: Path, optimizer: str, dropout: float
) -> None:
    """Also with dropout, which draws from torch's global generator."""
    if dropout:
        network.backbone.register_forward_pre_hook(_drops(dropout))
    data, config, path = halves(96, seed=1), settings(optimizer=optimizer), tmp_path / "checkpoint.safetensors"
    fresh, whole = copy.deepcopy(network), copy.deepcopy(network)
    with pytest.raises(StoppedError):
        teach(network, data, config, compute, 0, StopAfter(1 + 7), path, checkpoint_seconds=0)
    # Two of the four epochs are done, and each has three steps.
    continued = teach(fresh, data, config, compute, 0, StopAfter(1 + 6), path, checkpoint_seconds=0)
    assert weights_digest(continued) == weights_digest(teach(whole, data, config, compute, 0))


def _drops(share: float) -> Callable[..., Any]:
    return lambda module, inputs: (F.dropout(inputs[0], share, module.training),)


def test_the_checkpoint_of_another_training_is_not_continued(
    network: Classifier, compute: Compute, tmp_path: Path
) -> None:
    data, path = halves(96, seed=1), tmp_path / "checkpoint.safetensors"
    fresh, whole = copy.deepcopy(network), copy.deepcopy(network)
    teach(network, data, settings(), compute, 0, checkpoint=path)
    for changes in ({"lr": 0.2}, {"epochs": 5}):
        found = teach(copy.deepcopy(fresh), data, settings(**changes), compute, 0, checkpoint=path)
        assert weights_digest(found) == weights_digest(
            teach(copy.deepcopy(whole), data, settings(**changes), compute, 0)
        )
    other = halves(96, seed=2)
    found = teach(fresh, other, settings(), compute, 0, checkpoint=path)
    assert weights_digest(found) == weights_digest(teach(whole, other, settings(), compute, 0))


def test_a_damaged_checkpoint_says_what_to_remove(network: Classifier, compute: Compute, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_tensors(path, {"weights.x": torch.zeros(1)}, {"other": "facts"})
    with pytest.raises(IntegrityError, match="not a checkpoint of this teacher") as caught:
        teach(network, halves(96, seed=1), settings(), compute, 0, checkpoint=path)
    assert f"rm {path}" in caught.value.fix


def test_it_is_sgd_with_nesterov_momentum_and_one_cycle(network: Classifier, compute: Compute) -> None:
    """Against a plain loop with the schedule as a formula: up for 30 % of the steps, then down to almost zero."""
    data, config = halves(96, seed=1), settings(epochs=3, augment=Augment(pad=0, flip=False))
    plain = copy.deepcopy(network).train()
    teach(network, data, config, compute, seed=5)
    steps, peak = 9, config.lr
    top = 0.3 * steps - 1

    def rate(step: int) -> float:
        start, end, part = peak, peak / 25e4, (step - top) / (steps - 1 - top)
        if step <= top:
            start, end, part = peak / 25, peak, step / top
        return end + (start - end) / 2 * (1 + math.cos(math.pi * part))

    velocity = {name: torch.zeros_like(parameter) for name, parameter in plain.named_parameters()}
    for step in range(steps):
        if step % 3 == 0:
            order = torch.randperm(96, generator=random_stream(5, "teach", step // 3))
        chosen = order[step % 3 * 32 : (step % 3 + 1) * 32]
        plain.zero_grad()
        F.cross_entropy(plain(data.images[chosen].float() / 255), data.labels[chosen]).backward()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                assert parameter.grad is not None
                gradient = parameter.grad + config.weight_decay * parameter
                velocity[name] = config.momentum * velocity[name] + gradient
                parameter -= rate(step) * (gradient + config.momentum * velocity[name])
    for (name, value), wanted in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_flipping_hurts_where_left_is_not_right(network: Classifier, compute: Compute) -> None:
    held_out = halves(200, seed=2)
    trained = teach(network, halves(320, seed=1), settings(augment=Augment(pad=1, flip=True)), compute, seed=0)
    assert top1(logits_of(trained, held_out.images, compute), held_out.labels) < 0.85


def test_the_same_seed_gives_the_same_bits(network: Classifier, compute: Compute) -> None:
    data, config = halves(96, seed=1), settings(epochs=2)
    digests = [weights_digest(teach(copy.deepcopy(network), data, config, compute, seed=seed)) for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


def test_fewer_images_than_a_batch(network: Classifier, compute: Compute) -> None:
    before = weights_digest(network)
    teach(network, halves(6, seed=1), settings(epochs=1), compute, seed=0)
    assert weights_digest(network) != before


def test_a_loss_that_explodes_is_named(network: Classifier, compute: Compute) -> None:
    with pytest.raises(TrainingError, match=r"loss became (nan|inf) in epoch [12]") as caught:
        teach(network, halves(96, seed=1), settings(lr=1e30, epochs=2), compute, seed=0)
    assert "teach.lr" in caught.value.fix
