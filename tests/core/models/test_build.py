"""Networks built by name from each source, and the logits in their outputs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.models import published
from nayer_edge.models.build import logits_in
from nayer_edge.models.load import build_classifier, check_forward, load_classifier, save_classifier
from nayer_edge.models.names import located, parse, published_weights

SPEC = InputSpec(channels=3, height=32, width=32)
CLASSES = ("a", "b", "c")


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("nayer:wrn_40_2", ("nayer", "wrn_40_2", None, None, "")),
        ("torchvision:mobilenet_v2@32", ("torchvision", "mobilenet_v2", 32, None, "")),
        ("timm:resnet18.a1_in1k@64", ("timm", "resnet18.a1_in1k", 64, None, "")),
        ("hf:org/name", ("hf", "org/name", None, None, "")),
        ("hf:org/name@v1.0", ("hf", "org/name", None, "v1.0", "")),
        ("python:a.b:make", ("python", "a.b", None, None, "make")),
        ("python:/x/net.py:make", ("python", "/x/net.py", None, None, "make")),
        ("python:C:/x/net.py:make", ("python", "C:/x/net.py", None, None, "make")),
    ],
)
def test_parsed_names(model: str, parts: tuple[Any, ...]) -> None:
    found = parse(model)
    assert (found.source, found.name, found.small, found.revision, found.factory) == parts
    assert found.portable == ("python:net.py:make" if "net.py" in model else model)


def test_files_and_folders_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert located("python:nets.py:make", tmp_path) == f"python:{tmp_path}/nets.py:make"
    assert located("python:../nets.py:make", tmp_path / "models") == f"python:{tmp_path}/nets.py:make"
    assert located("python:package.nets:make", tmp_path) == "python:package.nets:make"
    assert located("hf:models/mine", tmp_path) == f"hf:{tmp_path}/models/mine"
    assert located("hf:org/name", tmp_path) == "hf:org/name"
    assert located("nayer:resnet8", tmp_path) == "nayer:resnet8"
    assert parse(f"hf:{tmp_path}/models/mine").portable == "hf:mine"
    assert parse(f"hf:{tmp_path}/models/mine").path == tmp_path / "models" / "mine"
    assert parse(f"hf:{tmp_path}/models/moved").local
    assert parse(f"hf:{tmp_path}/models/moved").path is None
    monkeypatch.chdir(tmp_path)
    assert parse("hf:models/mine").path == tmp_path / "models" / "mine"


def test_published_weights() -> None:
    assert published_weights("torchvision:IMAGENET1K_V1") == ("torchvision", "IMAGENET1K_V1")
    assert published_weights("timm:a1_in1k") == ("timm", "a1_in1k")
    for weights in (None, "file.pth", "hf:x", "C:\\file.pth"):
        assert published_weights(weights) is None


# ------------------------------------------------------------------ building


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_timm(channels: int, tmp_path: Path) -> None:
    spec = InputSpec(channels=channels, height=32, width=40)
    network = build_classifier("timm:mobilenetv3_small_050", spec, CLASSES, {"drop_rate": 0.3}).eval()
    images = torch.rand(2, *spec.shape)
    assert network(images).shape == (2, 3)
    assert network.rebuild["arguments"] == {"drop_rate": 0.3}
    assert network.rebuild["versions"].keys() == {"timm"}
    save_classifier(network, tmp_path / "s.safetensors", {})
    read = load_classifier(tmp_path / "s.safetensors")
    assert torch.equal(read(images), network(images))
    assert read.rebuild == network.rebuild


def test_a_timm_tag_names_the_same_network() -> None:
    plain, tagged = (build_classifier(f"timm:{name}", SPEC, CLASSES) for name in ("resnet10t", "resnet10t.c3_in1k"))
    assert plain.backbone.state_dict().keys() == tagged.backbone.state_dict().keys()
    assert tagged.model == "timm:resnet10t.c3_in1k"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm:resnet19", "timm has no network 'resnet19'. Did you mean 'resnet"),
        ("timm:resnet18.a1_in2k", "no weights 'a1_in2k' for resnet18. Did you mean"),
        ("timm:hf_hub:org/model", "timm has no network"),
        ("timm:", "timm has no network"),
        ("trochvision:resnet18", "Did you mean 'torchvision'"),
        ("torchvision:resnet18@", "torchvision has no classifier 'resnet18@'"),
        ("nayer:resnet8@32", "The zoo has no network"),
    ],
)
def test_unknown_names_and_the_nearest_known(model: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.").replace("?", r"\?")):
        build_classifier(model, SPEC, CLASSES)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("timm:resnet18", {"checkpoint_path": "/tmp/evil.pth"}),
        ("timm:resnet18", {"pretrained": True}),
        ("timm:resnet18", {"pretrained_cfg_overlay": "x"}),
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("torchvision:resnet18", {"num_classes": 4}),
    ],
)
def test_arguments_that_would_download_or_duplicate_keys(model: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"does not accept the argument {next(iter(arguments))}"):
        build_classifier(model, SPEC, CLASSES, arguments)


@pytest.mark.parametrize("model", ["timm:resnet18", "torchvision:resnet18"])
def test_arguments_that_a_network_does_not_accept(model: str) -> None:
    with pytest.raises(UsageError, match="cannot be built with wings = 2"):
        build_classifier(model, SPEC, CLASSES, {"wings": 2})
    with pytest.raises(UsageError, match="takes no arguments"):
        build_classifier("nayer:resnet8", SPEC, CLASSES, {"width": 2})


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("torchvision:vit_b_16", {"image_size": 100}),
        ("torchvision:mobilenet_v2", {"round_nearest": 0}),
        ("timm:resnet18", {"act_layer": "foo"}),
        ("timm:efficientnet_b0", {"norm_layer": "foo"}),
        ("timm:resnet18", {"block": "x"}),
    ],
)
def test_whatever_a_library_raises_is_a_message(model: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be built with"):
        build_classifier(model, SPEC, CLASSES, arguments)


@pytest.mark.parametrize("error", [AttributeError("no such layer"), KeyError("x"), ZeroDivisionError(), RuntimeError()])
def test_a_network_that_cannot_run(error: Exception) -> None:
    def fails(*_: Any) -> None:
        raise error

    network = build_classifier("nayer:resnet8", SPEC, CLASSES)
    network.backbone.register_forward_pre_hook(fails)
    with pytest.raises(UsageError, match="cannot take images of"):
        check_forward(network)


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("r3d_18", "KINETICS400_V1"),
        ("deeplabv3_resnet50", "COCO_WITH_VOC_LABELS_V1"),
        ("fasterrcnn_resnet50_fpn", "COCO_V1"),
    ],
)
def test_published_weights_of_other_tasks(model: str, weights: str) -> None:
    with pytest.raises(UsageError, match=f"torchvision's {model} is not a classifier of images"):
        published.input_of(f"torchvision:{model}", f"torchvision:{weights}")


def test_arguments_are_part_of_the_identity() -> None:
    plain = build_classifier("torchvision:mobilenet_v2", SPEC, CLASSES)
    other = build_classifier("torchvision:mobilenet_v2", SPEC, CLASSES, {"dropout": 0.5})
    assert plain.identity == plain.model
    assert other.identity != plain.identity


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_heads_are_not_built(name: str) -> None:
    spec = InputSpec(height=96, width=96)
    with torch.device("meta"):  # to draw these networks' weights takes seconds
        network = build_classifier(f"torchvision:{name}", spec, CLASSES)
        whole = build_classifier(f"torchvision:{name}", spec, CLASSES, {"aux_logits": True})
        for training in (True, False):
            assert network.train(training)(torch.rand(2, *spec.shape)).shape == (2, 3)
    assert not [key for key in network.backbone.state_dict() if "aux" in key.lower()]
    assert [key for key in whole.backbone.state_dict() if "aux" in key.lower()]


@pytest.mark.slow
def test_without_timm(tmp_path: Path) -> None:
    """In a process that cannot import it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('timm', 'transformers'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    program = (
        "from nayer_edge.config import InputSpec\n"
        "from nayer_edge.errors import MissingError\n"
        "from nayer_edge.models.load import build_classifier\n"
        "for model, extra in (('timm:resnet18', 'timm'), ('hf:org/name', 'cpu')):\n"
        "    try:\n"
        "        build_classifier(model, InputSpec(), ('a', 'b'))\n"
        "    except MissingError as error:\n"
        "        assert f\"pip install '.[{extra}]'\" in error.fix, error.fix\n"
        "    else:\n"
        "        raise AssertionError(model)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ what networks return

Outputs = namedtuple("Outputs", ["logits", "aux_logits"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, x + 1),
        lambda x: [x],
        lambda x: {"logits": x, "loss": None},
        lambda x: OrderedDict(features=x + 1, logits=x),
        lambda x: SimpleNamespace(logits=x),
        lambda x: Outputs(x, x + 1),
    ],
)
def test_logits_are_found(wrap: Any) -> None:
    x = torch.rand(2, 3)
    assert logits_in(wrap(x)) is x


@pytest.mark.parametrize("output", [None, "logits", (), {}, {"out": torch.rand(2, 3)}, SimpleNamespace(logits=3), (3,)])
def test_no_logits(output: Any) -> None:
    with pytest.raises(UsageError, match="without logits"):
        logits_in(output)


# ------------------------------------------------------------------ check_forward


def test_check_forward_has_no_side_effects() -> None:
    network = build_classifier("torchvision:mobilenet_v3_small", SPEC, CLASSES).train()
    before = copy.deepcopy(network.state_dict())
    check_forward(network)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    with torch.device("meta"):
        check_forward(build_classifier("torchvision:mobilenet_v3_small", SPEC, CLASSES))


def test_images_that_a_network_cannot_take() -> None:
    with torch.device("meta"):
        network = build_classifier("torchvision:inception_v3", SPEC, CLASSES)
    network = network.to_empty(device="cpu")
    with pytest.raises(UsageError, match="cannot take images of 3×32×32") as caught:
        check_forward(network)
    assert "input size" in caught.value.why


def test_another_number_of_outputs() -> None:
    network = build_classifier("nayer:resnet8", SPEC, CLASSES)
    network.backbone.add_module("fc", nn.Linear(64, 1000))
    with pytest.raises(UsageError, match=r"\(2, 1000\) for 2 images; with 3 classes it should be \(2, 3\)"):
        check_forward(network)
