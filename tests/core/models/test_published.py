"""Library metadata of published weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nayer_edge.errors import IntegrityError, MissingError, UsageError
from nayer_edge.models import published

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""mean and std of all torchvision classifiers"""


@pytest.mark.parametrize("weights", ["torchvision:IMAGENET1K_V1", "resnet50-0676ba61.pth", "/x/resnet50-0676ba61.pth"])
def test_torchvision_by_name_and_by_file(weights: str) -> None:
    found, origin = published.input_of("torchvision:resnet50", weights)
    assert found == {"channels": 3, "height": 224, "width": 224, **IMAGENET}
    assert origin == "torchvision's ResNet50_Weights.IMAGENET1K_V1"


def test_torchvision_sizes_are_those_of_the_weights() -> None:
    found, _ = published.input_of("torchvision:efficientnet_b3", "torchvision:DEFAULT")
    assert (found["height"], found["width"]) == (300, 300)
    assert published.input_of("torchvision:inception_v3", "torchvision:DEFAULT")[0]["height"] == 299


@pytest.mark.parametrize("weights", [None, "mine.pth", "resnet18-f37072fd.pth"])
def test_the_users_own_weights_have_no_metadata(weights: str | None) -> None:
    assert published.input_of("torchvision:resnet50", weights) == ({}, "")
    assert published.input_of("nayer:resnet8", weights) == ({}, "")


def test_timm_architectures_and_tags() -> None:
    found, origin = published.input_of("timm:resnet18", "mine.pth")
    assert found == {"channels": 3, "height": 224, "width": 224, **IMAGENET}
    assert origin == "timm's resnet18"
    found, origin = published.input_of("timm:tf_efficientnet_b0.ns_jft_in1k", None)
    assert origin == "timm's tf_efficientnet_b0.ns_jft_in1k"
    inception = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert published.input_of("timm:inception_v3.tf_in1k", None)[0] == {
        "channels": 3, "height": 299, "width": 299, **inception,
    }  # fmt: skip
    assert published.input_of("timm:inception_v3", "timm:gluon_in1k")[0] == {
        "channels": 3, "height": 299, "width": 299, **IMAGENET,
    }  # fmt: skip


def test_inception_converts_the_normalisation() -> None:
    """torchvision's constructor sets transform_input for its published weights only."""
    for name in published.TORCHVISION_TF_INPUT:
        assert published.arguments_of(f"torchvision:{name}", "torchvision:DEFAULT") == {"transform_input": True}
        assert published.arguments_of(f"torchvision:{name}", "mine.pth") == {}
    assert published.arguments_of("torchvision:resnet18", "torchvision:DEFAULT") == {}
    assert published.arguments_of("nayer:resnet8", "mine.pth") == {}


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("torchvision:resnet50", "torchvision:IMAGENET1K_V3", "Did you mean 'IMAGENET1K_V2'"),
        ("timm:resnet18", "timm:a1_in2k", "timm has no weights"),
        ("timm:resnet19", None, "timm has no network 'resnet19'"),
    ],
)
def test_unknown_published_weights(model: str, weights: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        published.input_of(model, weights)


def test_weights_of_another_library() -> None:
    with pytest.raises(UsageError, match="are not weights of timm:resnet18"):
        published.fetch("timm:resnet18", "torchvision:DEFAULT")


def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(MissingError, match="cannot be downloaded") as caught:
        published.fetch("torchvision:resnet18", "torchvision:IMAGENET1K_V1")
    assert "resnet18-f37072fd.pth" in caught.value.fix
    assert caught.value.exit_code == 3
    assert not list(tmp_path.rglob("*.pth"))


def test_a_cached_file_must_be_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save({}, path)
    with pytest.raises(IntegrityError, match="not the published file") as caught:
        published.fetch("torchvision:resnet18", "torchvision:IMAGENET1K_V1")
    assert "begin with f37072fd" in caught.value.why
