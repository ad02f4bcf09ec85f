"""Small networks, settings and random streams shared by the core tests."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nayer_edge.config import Augment, Distill, InputSpec, Synthesis
from nayer_edge.config import Generator as GeneratorConfig
from nayer_edge.distillation import Distillation, Settings
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.prior import batch_norms
from nayer_edge.runtime.compute import Compute, choose, seeded

CLASSES = ("red", "green", "blue")
SPEC = InputSpec(channels=2, height=8, width=8, mean=(0.4, 0.5), std=(0.3, 0.25))
GENERATOR = GeneratorConfig(noisy_dim=10, channels=4)
# Three groups of three classes, the last one incomplete; two warm-up epochs; a re-initialised generator in the third.
SYNTHESIS = Synthesis(
    batch=8, g_steps=4, rounds=2, warmup_rounds=3, g_life=2, lr=4e-3, augment=Augment(pad=1, flip=True)
)
DISTILL = Distill(
    epochs=4,
    warmup_epochs=2,
    steps=3,
    batch=12,
    lr=0.05,
    temperature=4.0,
    augment=Augment(pad=1, flip=True),
    bank_mib=1.0,
    holdout_rounds=1,
)


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """`reference.py` beside this file, found wherever pytest was started."""
    path = Path(__file__).with_name("reference.py")
    specification = importlib.util.spec_from_file_location("nayer_edge_reference", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compute() -> Compute:
    """float32 on the CPU, as in the reference."""
    return choose("cpu", "fp32")


class Smooth(nn.Module):
    """A small smooth network with nested BatchNorms.

    A ReLU whose input is within a rounding error of zero can have different gradients here and in the reference, and
    Adam turns each into a full step. Smooth networks stay close to the reference.
    """

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        sizes = ((channels, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 3 * width, 2))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
                )
                for inputs, outputs, stride in sizes
            )
        )
        self.fc = nn.Linear(3 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean(dim=(2, 3)))


def smooth(seed: int, width: int, scale: float) -> Classifier:
    """An untrained network, hence the same on every machine, with running statistics of smooth images."""
    with seeded(seed):
        network = Classifier(Smooth(SPEC.channels, width, len(CLASSES)), f"test:smooth_{width}", SPEC, CLASSES)
        coarse = torch.rand(64, SPEC.channels, 3, 3)
    images = F.interpolate(coarse, (SPEC.height, SPEC.width), mode="bilinear", align_corners=True)
    with torch.no_grad():
        for norm in batch_norms(network):
            norm.momentum = 1.0
        network.train()(images)
        for norm in batch_norms(network):
            norm.momentum = 0.1
            norm.num_batches_tracked.zero_()  # pyright: ignore[reportOptionalMemberAccess]
        head = network.eval().backbone.get_submodule("fc")
        head.weight.mul_(scale)
        head.bias.sub_(network(images).mean(dim=0))
    return network


@pytest.fixture(scope="session")
def _teacher() -> Classifier:
    return smooth(seed=1, width=8, scale=4)


@pytest.fixture
def teacher(_teacher: Classifier) -> Classifier:
    """A custom teacher: three classes, two channels, 8×8 pixels."""
    return copy.deepcopy(_teacher).requires_grad_(False)


@pytest.fixture
def plain(teacher: Classifier) -> Classifier:
    """The teacher with a GroupNorm in the place of each BatchNorm."""
    for name, module in list(teacher.backbone.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            teacher.backbone.set_submodule(name, nn.GroupNorm(2, module.num_features))
    return teacher.eval().requires_grad_(False)


@pytest.fixture
def student() -> Classifier:
    """An untrained student, with the same weights as at the start of a distillation."""
    return smooth(seed=10, width=4, scale=4)


@pytest.fixture(scope="session")
def label_embeddings() -> LabelEmbeddings:
    """Three labels in six dimensions."""
    values = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    return LabelEmbeddings(values, "test", "1", "a {label}", CLASSES)


def changed(settings: Settings, **changes: Any) -> Settings:
    """Settings with some keys replaced: `changed(s, g_life=3, epochs=5, bank_mib=2.0)`."""
    parts: dict[str, Any] = {"seed": changes.pop("seed", settings.seed)}
    for name in ("generator", "synthesis", "distill"):
        section = getattr(settings, name)
        mine = {key: changes.pop(f"{name}_{key}") for key in type(section).model_fields if f"{name}_{key}" in changes}
        parts[name] = type(section).model_validate({**section.model_dump(), **mine})
    assert not changes, f"no section has {sorted(changes)}"
    return Settings(**parts)


@pytest.fixture(scope="session")
def settings() -> Callable[..., Settings]:
    """`settings(synthesis_g_life=3, distill_epochs=5, seed=1)`: the small settings with these changes."""
    small = Settings(GENERATOR, SYNTHESIS, DISTILL, seed=0)
    return lambda **changes: changed(small, **changes)


@pytest.fixture(scope="session")
def start(
    _teacher: Classifier,
    label_embeddings: LabelEmbeddings,
    settings: Callable[..., Settings],
    compute: Compute,
) -> Callable[..., Distillation]:
    """`start(distill_epochs=5)`: a new distillation with its own networks."""

    def begin(*, on: Compute = compute, **changes: Any) -> Distillation:
        student = smooth(seed=10, width=4, scale=4)
        return Distillation(copy.deepcopy(_teacher), label_embeddings, student, settings(**changes), on)

    return begin


@pytest.fixture
def stream() -> Callable[[int], torch.Generator]:
    """`stream(5)`: a new random stream."""
    return lambda seed: torch.Generator().manual_seed(seed)
