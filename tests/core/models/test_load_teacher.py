"""Teachers from recipes: unsuitable teachers are rejected with the reason before any work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nayer_edge.config import InputSpec, Teacher
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_teacher, untrained_teacher
from nayer_edge.models.user_code import trusting
from nayer_edge.runtime.compute import seeded

SPEC = InputSpec(height=32, width=32)
CLASSES = ("a", "b", "c")


def teacher_of(model: str, path: Path | None = None, **changes: Any) -> Teacher:
    weights = None if path is None else str(path)
    return Teacher.model_validate(
        {"model": model, "weights": weights, "classes": CLASSES, "input": SPEC.model_dump(), **changes}
    )


def loaded(config: Teacher) -> tuple[Classifier, dict[str, Any]]:
    return load_teacher(config, untrained_teacher(config))


def test_the_card_lists_what_was_loaded(tmp_path: Path) -> None:
    with seeded(3):
        network = build_classifier("timm:resnet10t", SPEC, CLASSES).eval()
    state = {f"module.{name}": value.half() for name, value in network.backbone.state_dict().items()}
    path = tmp_path / "best.pth.tar"
    torch.save({"epoch": 7, "state_dict": state, "state_dict_ema": {n: v + 1 for n, v in state.items()}}, path)
    teacher, facts = loaded(teacher_of("timm:resnet10t", path, weights_key="state_dict"))
    assert facts["source"] == "best.pth.tar"
    assert facts["key"] == "state_dict"
    assert facts["weights"] == {"notes": ["stored as float16"]}
    assert not teacher.training
    images = torch.rand(2, *SPEC.shape)
    torch.testing.assert_close(teacher(images), network(images), atol=0.02, rtol=0.02)
    with pytest.raises(UsageError, match="2 sets of weights"):
        loaded(teacher_of("timm:resnet10t", path))


@pytest.mark.parametrize("model", ["timm:test_vit", pytest.param("torchvision:convnext_tiny", marks=pytest.mark.slow)])
def test_teachers_without_batchnorm(model: str, tmp_path: Path) -> None:
    config = teacher_of(model, tmp_path / "w.pt", input={"height": 160, "width": 160})
    network = untrained_teacher(config)
    torch.save(network.backbone.state_dict(), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="has no BatchNorm layers") as caught:
        load_teacher(config, network)
    assert "Transformers, ConvNeXt and GroupNorm networks store none" in caught.value.why


def test_dropout_is_off(tmp_path: Path) -> None:
    with seeded(0):
        network = build_classifier("torchvision:mobilenet_v2", SPEC, CLASSES, {"dropout": 0.9})
    torch.save(network.backbone.state_dict(), tmp_path / "w.pt")
    teacher, _ = loaded(teacher_of("torchvision:mobilenet_v2", tmp_path / "w.pt", arguments={"dropout": 0.9}))
    images = torch.rand(4, *SPEC.shape)
    assert torch.equal(teacher(images), teacher(images))
    assert teacher.rebuild["arguments"] == {"dropout": 0.9}
    dropped = teacher.train()
    assert not torch.equal(dropped(images), dropped(images)), "there is no dropout: this test proves nothing"


def test_python_models_may_bring_their_weights(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def trained(bias=3.5):\n"
        "    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *head)\n"
        "    nn.init.constant_(net[-1].bias, bias)\n"
        "    return net\n"
    )
    with trusting():
        teacher, facts = loaded(teacher_of(f"python:{tmp_path}/nets.py:trained"))
        assert facts == {"source": "python:nets.py:trained"}
        assert torch.equal(teacher.backbone.get_submodule("4").bias, torch.full((3,), 3.5))
        broken = teacher_of(f"python:{tmp_path}/nets.py:trained").model_copy(update={"arguments": {"bias": math.nan}})
        with pytest.raises(UsageError, match="NaN or infinity"):
            loaded(broken)
        with pytest.raises(UsageError, match=r"\(2, 3\) for 2 images; with 4 classes it should be \(2, 4\)"):
            loaded(teacher_of(f"python:{tmp_path}/nets.py:trained", classes=("a", "b", "c", "d")))


class Hostile:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    torch.save({"state_dict": Hostile(tmp_path / "it_ran")}, tmp_path / "w.pt")
    with pytest.raises(IntegrityError, match="nothing in it was run") as caught:
        loaded(teacher_of("torchvision:resnet18", tmp_path / "w.pt"))
    assert caught.value.exit_code == 4
    assert not (tmp_path / "it_ran").exists()


def test_another_architecture(tmp_path: Path) -> None:
    other = build_classifier("nayer:resnet20", SPEC, CLASSES).backbone.state_dict()
    torch.save(other, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="do not match nayer:resnet8") as caught:
        loaded(teacher_of("nayer:resnet8", tmp_path / "w.pt"))
    mine = build_classifier("nayer:resnet8", SPEC, CLASSES).backbone.state_dict()
    assert f"{len(set(other) - set(mine))} not in the model" in caught.value.why
    assert "Use the architecture" in caught.value.fix
