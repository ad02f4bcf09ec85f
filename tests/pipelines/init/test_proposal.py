"""`init`: what it finds in real checkpoints, what it asks, what it refuses, and that `run` takes what it writes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models.load import build_classifier, load_teacher, save_classifier, untrained_teacher
from nayer_edge.models.prior import EXPECTED
from nayer_edge.pipelines.costs.model_cost import cost_of
from nayer_edge.pipelines.gate.statistics import drop_upper
from nayer_edge.pipelines.init.inspect_checkpoint import _normalised_by, advice_for, look
from nayer_edge.pipelines.init.parsing import parse_shape, parse_size, parse_values
from nayer_edge.pipelines.init.sizes import student_for
from nayer_edge.pipelines.recipes import preflight
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.steps import STEPS
from nayer_edge.runtime.compute import seeded
from nayer_edge.storage.tensors import save_tensors

Invoke = Callable[..., Any]
TRIAL = ("--effort", "trial")
"""without measuring the networks, which takes seconds"""
TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def weights_of(model: str, classes: int = 10, channels: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    spec = InputSpec(channels=channels)
    return dict(build_classifier(model, spec, [f"c{n}" for n in range(classes)]).backbone.state_dict())


@pytest.fixture(scope="session")
def r18(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The weights of a ResNet-18: 45 MB, to be linked. Read only."""
    return once("r18", lambda folder: torch.save(weights_of("torchvision:resnet18"), folder / "r18.pt")) / "r18.pt"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("\n".join(TEN), encoding="utf-8")
    return tmp_path


def found_in(answer: Any) -> dict[str, Any]:
    return json.loads(answer.out)["found"]


# ------------------------------------------------------------------ what it finds


def test_a_torchvision_state_dict(here: Path, r18: Path, invoke: Invoke) -> None:
    os.link(r18, here / "r18.pt")
    answer = invoke("init", *TRIAL, "r18.pt", "--labels", "labels.txt", "--input", "32", "--yes", "--json")
    assert answer.code == 0, answer.err
    found = found_in(answer)
    assert (found["batch_norms"], found["classes"], found["channels"]) == (20, 10, 3)
    # 11.69 million with ImageNet's head (torchvision's own figure), less 990 of its 1,000 outputs.
    assert found["parameters"] == 11_689_512 - 990 * 513
    assert [(n["model"], n["exact"]) for n in found["networks"]] == [("torchvision:resnet18", True)]
    assert (found["input"]["height"], found["input"]["sure"]) == (224, False)
    recipe = load_recipe("r18.toml")
    assert recipe.gate.int8.min_coverage is None
    assert recipe.teacher.model == "torchvision:resnet18"
    assert recipe.teacher.weights == str(here / "r18.pt")
    assert recipe.teacher.classes == TEN
    assert recipe.teacher.input.shape == (3, 32, 32)
    assert recipe.teacher.input.mean == (0.485, 0.456, 0.406)
    preflight.check(recipe, STEPS)
    text = (here / "r18.toml").read_text(encoding="utf-8")
    assert "20 BatchNorm layers" in text
    assert "(a guess)" in text
    assert 'classes = "labels.txt"' in text
    assert str(here) not in text, "what can be relative is"


def test_prefixes_and_nested_keys(here: Path, invoke: Invoke) -> None:
    weights = weights_of("nayer:resnet8")
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in weights.items()}, "optimizer": {}}, "ddp.pth")
    torch.save({"state_dict": {f"model.{n}": v for n, v in weights.items()}, "epoch": 1}, "lightning.ckpt")
    for name in ("ddp.pth", "lightning.ckpt"):
        answer = invoke(
            "init", *TRIAL, name, "--labels", "labels.txt", "--yes", "--json", "--out", f"{Path(name).stem}.toml"
        )
        assert answer.code == 0, answer.err
        (network,) = found_in(answer)["networks"]
        assert (network["model"], network["exact"]) == ("nayer:resnet8", True)
        assert found_in(answer)["key"] == "state_dict"


@pytest.mark.parametrize(("model", "channels"), [("nayer:wrn_16_1", 1), ("nayer:wrn_22_2", 3), ("nayer:vgg11_bn", 4)])
def test_our_zoo_in_safetensors(here: Path, model: str, channels: int) -> None:
    """The file's tensors are in alphabetical order, so the first is not the one that sees the image."""
    save_tensors(here / "w.safetensors", weights_of(model, 7, channels))
    found = look(here / "w.safetensors")
    assert [(match.model, match.exact) for match in found.matches] == [(model, True)]
    assert (found.classes, found.channels) == (7, channels)
    assert found.input is not None
    assert found.input.value.shape == (channels, 32, 32)


def test_a_timm_network(here: Path) -> None:
    pytest.importorskip("timm")
    torch.save(weights_of("timm:mobilenetv3_small_050", 7), here / "mobilenetv3_small_050.pth")
    found = look(here / "mobilenetv3_small_050.pth")
    assert [match.model for match in found.exact] == ["timm:mobilenetv3_small_050"]
    assert found.input is not None
    assert found.input.value.shape == (3, 224, 224)


def test_networks_that_only_pad_differently_are_a_question(here: Path, invoke: Invoke) -> None:
    """timm's `tf_` networks have the same tensors as their twins, and give other answers."""
    pytest.importorskip("timm")
    torch.save(weights_of("timm:tf_mobilenetv3_small_075"), "mobilenetv3_small_075.pth")
    answer = invoke("init", *TRIAL, "mobilenetv3_small_075.pth", "--labels", "labels.txt", "--yes")
    assert answer.code == 2
    assert "2 networks" in answer.err
    assert "--model" in answer.err.splitlines()[-1]


def test_networks_that_smooth_before_subsampling(here: Path, invoke: Invoke) -> None:
    """timm's `aa` and `blur` networks have the tensors of torchvision's, and give other answers."""
    pytest.importorskip("timm")
    weights = weights_of("timm:resnetblur18")
    torch.save(weights, "resnetblur18_mine.pth")
    answer = invoke("init", *TRIAL, "resnetblur18_mine.pth", "--labels", "labels.txt", "--yes")
    assert (answer.code, "2 networks" in answer.err) == (2, True), answer.err
    assert "timm:resnetblur18" in answer.err
    torch.save(weights, "mine.pth")
    answer = invoke("init", *TRIAL, "mine.pth", "--labels", "labels.txt", "--input", "32", "--yes")
    assert answer.code == 0, answer.err
    assert "timm:resnetblur18: the same tensors" in " ".join(answer.out.split())


def test_a_network_that_may_transform_its_input(here: Path, invoke: Invoke) -> None:
    """torchvision sets this for its published GoogLeNet and Inception, and no tensor of a fine-tuned one shows it."""
    torch.save(weights_of("torchvision:googlenet"), "mine.pth")
    answer = invoke("init", *TRIAL, "mine.pth", "--labels", "labels.txt", "--input", "64", "--yes")
    assert answer.code == 0, answer.err
    assert "enable transform_input in the recipe" in " ".join(answer.out.split())
    assert "# arguments = { transform_input = true }" in (here / "mine.toml").read_text()


@pytest.mark.parametrize(
    "told", [{"height": 24, "width": 24}, {"size": 24, "mean": [0.4], "std": [0.2]}, {"name": "image"}]
)
def test_a_json_file_that_states_a_part_of_the_input_is_no_card(here: Path, r18: Path, told: dict[str, Any]) -> None:
    os.link(r18, here / "mine.pt")
    (here / "mine.json").write_text(json.dumps({"input": told}))
    found = look(here / "mine.pt").input
    assert found is not None
    assert not found.sure
    assert found.value.shape == (3, 224, 224)


def test_a_card_beside_the_weights_is_believed(here: Path, invoke: Invoke) -> None:
    save_tensors(here / "t.safetensors", weights_of("nayer:resnet8", 3, 1))
    card = {"input": {"channels": 1, "height": 12, "width": 20, "mean": [0.4], "std": [0.3], "range": "[0,1]"}}
    (here / "t.json").write_text(json.dumps({**card, "classes": ["猫", "chien", "dog\x1b[2J"]}), encoding="utf-8")
    answer = invoke("init", "t.safetensors", "--effort", "trial")
    assert answer.code == 0, answer.err
    assert "\x1b" not in answer.out
    recipe = load_recipe("t.toml")
    assert recipe.teacher.classes == ("猫", "chien", "dog\x1b[2J")
    assert recipe.teacher.input == InputSpec(channels=1, height=12, width=20, mean=(0.4,), std=(0.3,))
    (here / "t.json").write_text('{"input": 3, "classes": ["a"]}')
    assert invoke("init", *TRIAL, "t.safetensors", "--out", "again.toml").code == 2, (
        "a card that does not hold tells nothing"
    )


@pytest.mark.parametrize(
    ("model", "arguments", "resize"),
    [
        ("torchvision:resnet18@32", {}, None),
        ("timm:test_efficientnet", {"act_layer": "relu"}, None),
        ("torchvision:mobilenet_v2", {"width_mult": 0.5}, None),
        ("torchvision:resnet18", {}, (64, 64)),
    ],
)
def test_our_own_card_says_what_tensors_do_not(
    here: Path, invoke: Invoke, model: str, arguments: dict[str, Any], resize: tuple[int, int] | None
) -> None:
    """Strides, arguments and the size to which a network resizes its images change no tensor."""
    names = tuple(f"class {number}" for number in range(10))
    with seeded(0):
        saved = build_classifier(model, InputSpec(), names, arguments, resize=resize).eval()
    save_classifier(saved, here / "mine.safetensors", {})
    answer = invoke("init", "mine.safetensors", "--yes", "--student", "nayer:resnet8", "--effort", "trial")
    assert answer.code == 0, answer.err
    config = load_recipe("mine.toml").teacher
    teacher, _ = load_teacher(config, untrained_teacher(config))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(teacher(images), saved(images))


def test_the_card_of_another_network_lends_no_arguments(here: Path) -> None:
    names = tuple(f"class {number}" for number in range(10))
    saved = build_classifier("timm:test_efficientnet", InputSpec(), names, {"act_layer": "relu"})
    save_classifier(saved, here / "mine.safetensors", {})
    assert look(here / "mine.safetensors").arguments == {"act_layer": "relu"}
    assert look(here / "mine.safetensors", model="timm:test_byobnet").arguments == {}


# ------------------------------------------------------------------ the head, the channels, the layout

OWN = """
import torch
from torch import nn


class Blocks(nn.Module):
    \"\"\"Squeeze and excitation with linear layers under numbers, and a head without one.\"\"\"
    def __init__(self, classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.ModuleDict({"fc": nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))})
        self.fc = nn.Linear(16, classes)
    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.fc(x * self.layer1["fc"](x).sigmoid())


class Bottleneck(nn.Module):
    \"\"\"The head `classifier` after `fc`: in a file in alphabetical order the head comes first.\"\"\"
    def __init__(self, classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.fc, self.classifier = nn.Linear(16, 32), nn.Linear(32, classes)
    def forward(self, x):
        return self.classifier(self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


class Pointwise(nn.Module):
    \"\"\"SqueezeNet's way: a convolution as the head.\"\"\"
    def __init__(self, classes):
        super().__init__()
        self.conv, self.bn, self.top = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Conv2d(16, classes, 1)
    def forward(self, x):
        return self.top(torch.relu(self.bn(self.conv(x)))).mean((2, 3))


class Cosine(nn.Module):
    \"\"\"Weights of classes as a parameter, of which no name says that it is the head.\"\"\"
    def __init__(self, classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.prototypes, self.scale = nn.Parameter(torch.randn(classes, 16)), nn.Linear(16, 16)
    def forward(self, x):
        return self.scale(torch.relu(self.bn(self.conv(x))).mean((2, 3))) @ self.prototypes.T


class Grouped(nn.Module):
    def __init__(self, classes, bands, groups, width=12):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(bands, width, 3, 2, 1, groups=groups), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)
    def forward(self, x):
        return self.fc(torch.relu(self.bn2(self.conv2(torch.relu(self.bn(self.conv(x)))))).mean((2, 3)))


def six(num_classes):
    return Grouped(num_classes, 6, 2)

def halves(num_classes, in_chans):
    return Grouped(num_classes, in_chans, 2)

def each(num_classes, in_chans):
    return Grouped(num_classes, in_chans, in_chans, 2 * in_chans)

def hidden(num_classes, in_chans):
    return Grouped(num_classes, in_chans, in_chans)
"""


def own(here: Path, name: str, *arguments: int) -> Any:
    """A network of the user's own code, in own.py."""
    (here / "own.py").write_text(OWN)
    values: dict[str, Any] = {}
    exec(compile(OWN, "own.py", "exec"), values)
    torch.manual_seed(0)
    return values[name](*arguments)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["Blocks", "Bottleneck", "Pointwise", "Cosine"])
def test_the_network_says_which_layer_is_the_head(here: Path, name: str, suffix: str) -> None:
    from nayer_edge.models.user_code import trusting

    weights = own(here, name, 7).state_dict()
    path = here / f"own{suffix}"
    save_tensors(path, weights) if suffix == ".safetensors" else torch.save(weights, path)
    with trusting():
        found = look(path, f"python:{here / 'own.py'}:{name}")
    assert [match.exact for match in found.matches] == [True]
    assert found.classes == 7


@pytest.mark.parametrize("name", ["Blocks", "Bottleneck"])
def test_without_the_network_the_outermost_layer_counts(here: Path, name: str) -> None:
    save_tensors(here / "own.safetensors", own(here, name, 7).state_dict())
    assert look(here / "own.safetensors").classes == 7


@pytest.mark.parametrize(("name", "arguments"), [("six", (7,)), ("halves", (7, 6)), ("each", (7, 6))])
def test_groups_do_not_hide_the_bands(here: Path, name: str, arguments: tuple[int, ...]) -> None:
    from nayer_edge.models.user_code import trusting

    torch.save(own(here, name, *arguments).state_dict(), "own.pt")
    with trusting():
        found = look(here / "own.pt", f"python:{here / 'own.py'}:{name}")
    assert (found.channels, found.classes, bool(found.exact)) == (6, 7, True)


def test_bands_that_the_weights_do_not_tell_are_asked_for(here: Path) -> None:
    """A convolution of twelve filters with a group per band has the same weights for 1, 2, 3, 4, 6 and 12 bands."""
    from nayer_edge.models.user_code import trusting

    torch.save(own(here, "hidden", 7, 6).state_dict(), "own.pt")
    model = f"python:{here / 'own.py'}:hidden"
    with trusting():
        with pytest.raises(UsageError, match="images of 1, 2, 3, 4, 6, 12 channels") as caught:
            look(here / "own.pt", model)
        assert "--input" in caught.value.fix
        assert look(here / "own.pt", model, channels=6).channels == 6


def test_layouts_of_trainers(here: Path, r18: Path) -> None:
    weights = torch.load(r18)
    parts = {("head." if name.startswith("fc") else "backbone.") + name: value for name, value in weights.items()}
    torch.save({"meta": {"epoch": 1}, "state_dict": parts}, "mm.pth")
    averaged = {f"model_ema.{name.replace('.', '')}": value for name, value in weights.items() if value.ndim}
    torch.save({"state_dict": {**{f"model.{n}": v for n, v in weights.items()}, **averaged}}, "litema.ckpt")
    for name in ("mm.pth", "litema.ckpt"):
        found = look(here / name)
        assert [(match.model, match.exact) for match in found.matches] == [("torchvision:resnet18", True)]
        assert (found.classes, found.parameters) == (10, 11_689_512 - 990 * 513)
    assert len(found.outside) == len(averaged)


def test_sets_of_weights_side_by_side_are_a_choice(here: Path, invoke: Invoke) -> None:
    weights = weights_of("nayer:resnet8")
    torch.save({"state_dict": {p + n: v for p in ("net.", "ema net.") for n, v in weights.items()}}, "two.ckpt")
    answer = invoke("init", *TRIAL, "two.ckpt", "--labels", "labels.txt", "--yes")
    assert answer.code == 2
    assert "2 sets of these weights: ema net, net" in answer.err
    assert "--key 'ema net'" in answer.err
    for key in ("net", "ema net"):
        assert look(here / "two.ckpt", key=key).exact


@pytest.mark.slow
def test_the_file_in_a_transformers_folder(here: Path, invoke: Invoke) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    ResNetForImageClassification(config).save_pretrained("hf")
    answer = invoke(
        "init", *TRIAL, "hf/model.safetensors", "--labels", "labels.txt", "--yes", "--json", "--out", "r.toml"
    )
    assert answer.code == 0, answer.err
    assert (found_in(answer)["classes"], found_in(answer)["input"]["sure"]) == (10, False)
    assert load_recipe("r.toml").teacher.model == f"hf:{here / 'hf'}"


@pytest.mark.slow
def test_thousand_classes_are_a_guess(here: Path, invoke: Invoke) -> None:
    torch.save(weights_of("torchvision:mobilenet_v3_small", 1000), "m.pt")
    answer = invoke("init", *TRIAL, "m.pt")
    assert answer.code == 2
    assert "Guess: those of ImageNet-1k" in answer.err
    answer = invoke("init", *TRIAL, "m.pt", "--yes", "--student", "torchvision:shufflenet_v2_x0_5")
    assert answer.code == 0, answer.err
    recipe = load_recipe("m.toml")
    assert len(recipe.teacher.classes) == 1000
    assert len((here / "m.labels.txt").read_text().splitlines()) == 1000
    assert re.search(r"ImageNet-1k\b.*\(a guess\)", (here / "m.toml").read_text())


@pytest.mark.skipif(not os.environ.get("NAYER_EDGE_DATA"), reason="needs the measuring data (NAYER_EDGE_DATA)")
def test_the_measured_cifar_teacher(here: Path, invoke: Invoke) -> None:
    weights = Path(os.environ["NAYER_EDGE_DATA"]) / "teachers" / "wrn40_2_cifar10.safetensors"
    answer = invoke("init", *TRIAL, weights, "--json", "--name", "cifar")
    assert answer.code == 0, answer.err
    found = found_in(answer)
    assert found["parameters"] == 2_243_546, "as its own card says"
    assert [network["model"] for network in found["networks"]] == ["nayer:wrn_40_2"]
    recipe = load_recipe("cifar.toml")
    assert recipe.teacher.classes[:2] == ("airplane", "automobile")
    assert recipe.teacher.input.mean == (0.4914, 0.4822, 0.4465)


# ------------------------------------------------------------------ what it asks


def test_without_a_terminal_it_names_every_flag(here: Path, invoke: Invoke) -> None:
    save_tensors(here / "w.safetensors", weights_of("nayer:resnet8"))
    answer = invoke("init", *TRIAL, "w.safetensors")
    assert answer.code == 2
    assert "4 values are missing" in answer.err
    for flag in ("--labels", "--input", "--mean", "--std", "--yes"):
        assert flag in answer.err
    assert not list(here.glob("*.toml"))
    answer = invoke("init", *TRIAL, "w.safetensors", "--yes")
    assert answer.code == 2, "class names cannot be guessed"
    assert "1 value is missing" in answer.err
    told = ["--labels", "labels.txt", "--input", "3x20x24", "--mean", "0.1,0.2,0.3", "--std", "0.5,0.5,0.5"]
    answer = invoke("init", *TRIAL, "w.safetensors", *told)
    assert answer.code == 0, answer.err
    assert load_recipe("w.toml").teacher.input.shape == (3, 20, 24)


def test_an_empty_value_is_no_answer(here: Path, invoke: Invoke) -> None:
    """As from a shell variable that is not set."""
    save_tensors(here / "w.safetensors", weights_of("nayer:resnet8"))
    told = ("--labels", "labels.txt", "--input", "32", "--std", "0.5", "--mean", "")
    answer = invoke("init", *TRIAL, "w.safetensors", *told)
    assert (answer.code, "'' is not a list of numbers" in answer.err) == (2, True), answer.err


def on_terminal(folder: Path, answers: list[str], *arguments: str) -> tuple[int, str]:
    """A session on a terminal: (exit code, everything that was shown)."""
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "nayer_edge", "init", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    shown, left, deadline = b"", list(answers), time.monotonic() + 240
    seen = 0
    while time.monotonic() < deadline:
        ready, _, _ = select.select([mine], [], [], 0.2)
        if ready:
            try:
                shown += os.read(mine, 4096)
            except OSError:
                break
        # Every question ends with a colon and a blank.
        if left and shown.rstrip(b"\r\n").endswith(b": ") and len(shown) > seen:
            os.write(mine, left.pop(0).encode() + b"\n")
            seen = len(shown) + 1
        if process.poll() is not None and not ready:
            break
    os.close(mine)
    return process.wait(timeout=60), shown.decode(errors="replace")


@pytest.mark.slow
def test_questions_on_a_terminal(here: Path) -> None:
    save_tensors(here / "w.safetensors", weights_of("nayer:resnet20"))
    (here / "short.txt").write_text("a\nb\n")
    answers = ["nowhere.txt", "short.txt", "labels.txt", "sixteen", "3x16x16", "", "0.2,0.2,0.2"]
    code, shown = on_terminal(here, answers, "w.safetensors", "--effort", "trial", "--out", "asked.toml")
    assert code == 0, shown
    assert "There is no file of class names at nowhere.txt" in shown
    assert re.search(r"short\.txt holds 2 class names.* 10 outputs", shown)
    assert "'sixteen' is not an image size" in shown
    recipe = load_recipe(str(here / "asked.toml"))
    assert recipe.teacher.input.shape == (3, 16, 16)
    assert recipe.teacher.input.mean == (0.4914, 0.4822, 0.4465), "the guess, by pressing Enter"
    assert recipe.teacher.input.std == (0.2, 0.2, 0.2)


# ------------------------------------------------------------------ what it refuses


NETS = """
from timm.models.vision_transformer import VisionTransformer
from torch import nn

def vit(num_classes, in_chans):
    return VisionTransformer(16, 4, in_chans, num_classes, embed_dim=24, depth=1, num_heads=2)

def plain(num_classes, in_chans):
    body = nn.Conv2d(in_chans, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(8, num_classes))
"""


def without_batch_norms(kind: str) -> dict[str, torch.Tensor]:
    made: dict[str, Any] = {}
    exec(NETS, made)
    torch.manual_seed(0)
    network = made[kind](10, 1)
    network(torch.zeros(1, 1, 16, 16))
    return dict(network.state_dict())


@pytest.mark.parametrize(("kind", "words"), [("vit", "it is a transformer"), ("plain", "folded into its convolutions")])
def test_a_teacher_without_batchnorm_gets_the_generator_alone(
    here: Path, invoke: Invoke, kind: str, words: str
) -> None:
    pytest.importorskip("timm")
    torch.save(without_batch_norms(kind), "w.pt")
    (here / "nets.py").write_text(NETS)
    told = ("w.pt", "--model", f"python:nets.py:{kind}", "--trust-code", "--labels", "labels.txt", "--yes", "--no-flip")
    answer = invoke("init", *TRIAL, *told, "--input", "1x16x16", "--mean", "0.5", "--std", "0.5")
    assert answer.code == 0, answer.err
    assert words in answer.out
    assert EXPECTED in answer.out.replace("\n", " ")
    text = (here / "w.toml").read_text(encoding="utf-8")
    assert EXPECTED.rstrip(".") in text
    recipe = load_recipe("w.toml")
    assert (recipe.synthesis.prior, recipe.lte.encoder) == ("generator", "all-MiniLM-L6-v2")
    # The weights that were measured, not those of the paper.
    assert (recipe.synthesis.lambda_ce, recipe.synthesis.lambda_adv) == (1.0, 1.0)
    answer = invoke("init", *TRIAL, *told, "--input", "1x16x16", "--json", "--mean", "0", "--std", "1", "--force")
    found = found_in(answer)
    assert (found["batch_norms"], found["prior"]) == (0, "generator")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stages.0.rbr_reparam", "they were folded into its convolutions"),  # RepVGG, deployed
        ("stages.0.reparam_conv", "they were folded into its convolutions"),  # MobileOne, FastViT
        ("features.0", "no normalisation at all, or one that was folded"),
    ],
)
def test_folded_batchnorms_are_recognised(name: str, said: str) -> None:
    shapes = {f"{name}.weight": (8, 3, 3, 3), f"{name}.bias": (8,), "head.weight": (10, 8), "head.bias": (10,)}
    found = _normalised_by(shapes)
    assert said in found
    assert "the checkpoint from training" in advice_for(found)
    assert not advice_for(_normalised_by({**shapes, "norm.weight": (8,)})), "another kind of normalisation"


def test_a_budget_for_a_teacher_without_batchnorm(here: Path, invoke: Invoke) -> None:
    torch.save(without_batch_norms("plain"), "w.pt")
    (here / "nets.py").write_text(NETS)
    told = ("w.pt", "--model", "python:nets.py:plain", "--trust-code", "--labels", "labels.txt", "--yes")
    answer = invoke("init", "--budget", "30m", *told, "--input", "1x16x16")
    assert answer.code == 0, answer.err
    recipe = load_recipe("w.toml")
    assert recipe.synthesis.prior == "generator"
    assert (recipe.synthesis.lambda_ce, recipe.synthesis.lambda_adv, recipe.synthesis.g_steps) == (1.0, 1.0, 10)
    assert "[generator]" in (here / "w.toml").read_text(encoding="utf-8")


def test_no_prior_is_proposed_where_none_was_measured(here: Path, invoke: Invoke) -> None:
    torch.save(without_batch_norms("plain"), "w.pt")
    (here / "nets.py").write_text(NETS)
    told = ("--model", "python:nets.py:plain", "--trust-code", "--labels", "labels.txt", "--yes", "--input", "1x64x64")
    answer = invoke("init", *TRIAL, "w.pt", *told)
    assert answer.code == 2
    assert "has no BatchNorm layers: it has no normalisation at all" in answer.err
    assert "This has not been measured at 64×64" in answer.err
    assert not list(here.glob("*.toml"))


def test_an_unknown_transformer_is_a_question(here: Path, invoke: Invoke) -> None:
    from torchvision.models import VisionTransformer

    torch.save(VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).state_dict(), "vit.pt")
    answer = invoke("init", *TRIAL, "vit.pt", "--labels", "labels.txt", "--yes")
    assert answer.code == 2
    assert "it is a transformer" in answer.out
    assert "The network was not recognised" in answer.err
    assert not list(here.glob("*.toml"))


class Hostile:
    """Makes a folder if anybody unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_a_hostile_pickle_is_refused_and_not_run(here: Path, invoke: Invoke) -> None:
    torch.save({"state_dict": Hostile()}, "evil.pt")
    answer = invoke("init", *TRIAL, "evil.pt", "--labels", "labels.txt", "--yes")
    assert answer.code == 4
    assert "nothing in it was run" in answer.err
    assert not (here / "ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "short", "text", "absent", "folder"])
def test_files_that_are_no_checkpoints(here: Path, invoke: Invoke, name: str, damage: str) -> None:
    path = here / name
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        weights = weights_of("nayer:resnet8")
        save_tensors(path, weights) if path.suffix == ".safetensors" else torch.save(weights, path)
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "short": whole[: len(whole) // 2], "text": b"not a checkpoint\n"}[damage])
    answer = invoke("init", *TRIAL, name, "--labels", "labels.txt", "--yes")
    assert answer.code in (2, 4), answer.err
    assert "Traceback" not in answer.err
    assert "Unexpected internal error" not in answer.err
    assert not list(here.glob("*.toml"))


def test_networks_that_are_no_classifiers_or_unknown(here: Path) -> None:
    from torch import nn

    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict(), "headless.pt")
    with pytest.raises(UsageError, match="no linear layer"):
        look(here / "headless.pt")
    torch.save(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).state_dict(), "mlp.pt")
    with pytest.raises(UsageError, match="no spatial convolutions"):
        look(here / "mlp.pt")
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    torch.save(own.state_dict(), "own.pt")
    found = look(here / "own.pt")
    assert not found.exact
    assert (found.classes, found.channels, found.batch_norms) == (4, 3, 1)


def test_a_network_of_ones_own(here: Path, invoke: Invoke) -> None:
    """The checkpoint says what it can, the rest comes from the user's code, which runs only where it is trusted."""
    torch.save(weights_of("nayer:resnet8"), "own.pt")
    (here / "mine.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1),\n"
        "                         nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return nn.Sequential(body, nn.Linear(8, num_classes))\n"
    )
    mine: dict[str, Any] = {}
    exec((here / "mine.py").read_text(), mine)
    torch.manual_seed(0)
    torch.save(mine["build"](10).state_dict(), "own.pt")
    told = ["--labels", "labels.txt", "--input", "32", "--mean", "0.5", "--std", "0.5"]
    answer = invoke("init", *TRIAL, "own.pt", *told)
    assert answer.code == 2
    assert "python:file.py:factory" in answer.err
    answer = invoke("init", *TRIAL, "own.pt", *told, "--model", "python:mine.py:build")
    assert answer.code == 4
    assert "--trust-code" in answer.err
    answer = invoke(
        "init", *TRIAL, "own.pt", *told, "--model", "python:mine.py:build", "--trust-code", "--student", "nayer:resnet8"
    )
    assert answer.code == 0, answer.err
    assert 'model = "python:mine.py:build"' in (here / "own.toml").read_text()


def test_another_architecture_and_a_changed_stem(here: Path, r18: Path, invoke: Invoke) -> None:
    weights = torch.load(r18)
    weights["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(weights, "cifar_r18.pt")
    told = ["--labels", "labels.txt", "--yes"]
    answer = invoke("init", *TRIAL, "cifar_r18.pt", *told)
    assert answer.code == 2
    assert "nearest: torchvision:resnet18, 101 of 102 tensors fit" in answer.err
    assert "conv1.weight is 64×3×3×3 in the file, 64×3×7×7 in the network" in answer.err
    answer = invoke("init", *TRIAL, "cifar_r18.pt", *told, "--model", "nayer:resnet20")
    assert answer.code == 2
    assert "do not fit nayer:resnet20" in answer.err


def test_labels_must_be_as_many_as_outputs(here: Path, invoke: Invoke) -> None:
    save_tensors(here / "w.safetensors", weights_of("nayer:resnet8", 7))
    answer = invoke("init", *TRIAL, "w.safetensors", "--labels", "labels.txt", "--yes")
    assert answer.code == 2
    assert re.search(r"labels\.txt holds 10 class names.* 7 outputs", answer.err)


def test_it_overwrites_nothing_without_force(here: Path, invoke: Invoke) -> None:
    save_tensors(here / "w.safetensors", weights_of("nayer:resnet20"))
    (here / "w.toml").write_text("mine")
    told = ["w.safetensors", "--labels", "labels.txt", "--yes", "--effort", "trial"]
    assert invoke("init", *TRIAL, *told).code == 2
    assert (here / "w.toml").read_text() == "mine"
    assert invoke("init", *TRIAL, *told, "--force").code == 0
    assert load_recipe("w.toml").teacher.model == "nayer:resnet20"
    assert invoke("init", *TRIAL, *told, "--out", "w.yaml").code == 2
    assert invoke("init", *TRIAL, *told, "--name", "../evil", "--out", "x.toml").code == 2
    assert invoke("init", *TRIAL, *told, "--student", "nayer:resnet20", "--out", "x.toml").code == 2


def test_nan_in_the_weights(here: Path, invoke: Invoke) -> None:
    weights = weights_of("nayer:resnet8")
    next(value for name, value in weights.items() if name.endswith("running_var")).fill_(float("nan"))
    torch.save(weights, "nan.pt")
    answer = invoke("init", *TRIAL, "nan.pt", "--labels", "labels.txt", "--yes")
    assert answer.code == 2
    assert "NaN" in answer.err
    assert not (here / "nan.toml").exists()


# ------------------------------------------------------------------ sizes and answers


def test_what_is_wrong_at_first_sight_is_said_at_once(
    here: Path, spawn_each: Callable[..., list[Any]], without: Callable[..., dict[str, str]]
) -> None:
    """Before torch is imported, which takes seconds."""
    (here / "w.pt").write_bytes(b"weights")
    (here / "twice.txt").write_text("one\none\n")
    (here / "there.toml").write_text("")
    wrong = (
        (["nope.pt"], "There is no checkpoint at nope.pt."),
        (["w.pt", "--labels", "nope.txt"], "There is no file of class names at nope.txt."),
        (["w.pt", "--labels", "twice.txt"], "one"),
        (["w.pt", "--input", "32x32xwide"], "is not an image size"),
        (["w.pt", "--out", "there.toml"], "there.toml already exists."),
        (["w.pt", "--name", "../evil"], "is not a valid recipe name"),
    )
    answers = spawn_each(*(["init", *words] for words, _ in wrong), env=without("torch", "numpy"), cwd=here)
    for (_, message), answer in zip(wrong, answers, strict=True):
        assert answer.code == 2, answer.err
        assert message in answer.err


@pytest.mark.slow
def test_a_network_for_one_image_size_only(here: Path, invoke: Invoke) -> None:
    """LeViT's attention biases belong to a number of positions: 224 pixels, or the size given with --resize."""
    pytest.importorskip("timm")
    torch.save(weights_of("timm:levit_128s"), "levit.pt")
    known = ("init", "levit.pt", "--model", "timm:levit_128s", "--labels", "labels.txt", *TRIAL, "--yes")
    answer = invoke(*known, "--input", "3x32x32", "--mean", "0.5", "--std", "0.5", "--out", "a.toml")
    assert answer.code == 0, answer.err
    assert "resized to 224×224" in answer.out
    teacher = load_recipe("a.toml").teacher
    assert (teacher.resize, teacher.input.shape) == ((224, 224), (3, 32, 32))
    assert invoke(*known, "--input", "3x224x224", "--out", "b.toml").code == 0
    assert load_recipe("b.toml").teacher.resize is None, "as large as it wants them"
    answer = invoke(*known, "--input", "3x32x32", "--resize", "100x100", "--out", "c.toml")
    assert answer.code == 2
    assert "resized to 100×100" in answer.err
    assert "teacher.resize" in answer.err
    assert not Path("c.toml").exists()


def test_the_channels_that_the_weights_have(here: Path, r18: Path, invoke: Invoke) -> None:
    """The option is wrong, not the file."""
    os.link(r18, here / "r18.pt")
    answer = invoke("init", *TRIAL, "r18.pt", "--labels", "labels.txt", "--input", "1x32x32", "--yes")
    assert answer.code == 2
    assert re.search(r"expects 3-channel images.* 1x32x32", answer.err)
    assert "--input 3x32x32" in answer.err


@pytest.mark.slow
def test_what_was_said_is_not_called_a_guess(here: Path, r18: Path, invoke: Invoke) -> None:
    os.link(r18, here / "r18.pt")
    told = [
        "--labels",
        "labels.txt",
        "--input",
        "16x16",
        "--mean",
        "0.5",
        "--std",
        "0.5",
        "--student",
        "nayer:wrn_16_2",
    ]
    answer = invoke("init", "r18.pt", *told, "--budget", "8h")
    assert answer.code == 0, answer.err
    assert "guess" not in answer.out
    assert "3×16×16, mean 0.5, std 0.5 (the options)" in answer.out
    # WRN-16-2 has fewer parameters than ResNet-18 and, at 16 pixels, more to compute.
    assert "larger or slower than the teacher" in answer.out
    assert re.search(r"time +[78] h.*: .* of images, .* of training, .* of learning-rate decay", answer.out)
    assert re.search(r"images +[\d,]+ from rounds of 100 with 10 steps each", answer.out)
    recipe = load_recipe("r18.toml")
    assert recipe.generator.channels == 32
    assert recipe.budget is not None
    assert recipe.budget.seconds == 8 * 3600
    # Whatever the accuracy search accepts, the gate that is written beside it can pass.
    limit, images = recipe.gate.accuracy.max_drop_vs_fp32, recipe.validate_.synthetic_images
    assert recipe.export.max_drop is not None
    assert limit is not None
    assert drop_upper(round(recipe.export.max_drop * images), 0, images, 1 - recipe.gate.accuracy.confidence) <= limit
    assert (recipe.distill.schedule, recipe.distill.optimizer, recipe.synthesis.reserve) == ("constant", "muon", 0.05)


def test_what_it_writes_runs(here: Path, invoke: Invoke) -> None:
    save_tensors(here / "w.safetensors", weights_of("nayer:resnet20", 10, 1))
    told = ["--labels", "labels.txt", "--input", "1x8x8", "--mean", "0.5", "--std", "0.5"]
    answer = invoke("init", "w.safetensors", *told, "--effort", "trial", "--student", "nayer:resnet8")
    assert answer.code == 0, answer.err
    answer = invoke("run", "w.toml", "--until", "student")
    assert answer.code == 0, answer.err
    assert (here / "runs" / "w" / "student" / "student.safetensors").is_file()


def test_costs_are_those_of_the_network() -> None:
    # Published for torchvision's ResNet-18 at 224 pixels: 1.814 GMACs, 11.69 million parameters.
    cost = cost_of("torchvision:resnet18", InputSpec(height=224, width=224), 1000)
    assert cost.flop / 2 == pytest.approx(1.814e9, rel=2e-3)
    assert cost.parameters == 11_689_512
    # Counted by hand: one output of 16×16 floats per channel for the first convolution is the least.
    assert cost.activation_bytes > 4 * 64 * 112 * 112 * 3


def test_the_student_is_faster_than_the_teacher() -> None:
    for pixels, own in ((32, "torchvision:resnet18"), (32, "nayer:wrn_40_2"), (224, "torchvision:resnet18")):
        spec = InputSpec(height=pixels, width=pixels)
        teacher = cost_of(own, spec, 10)
        student = cost_of(student_for(spec, 10, teacher, own), spec, 10)
        assert student.parameters <= teacher.parameters / 3
        assert student.flop <= teacher.flop
    spec = InputSpec()
    found = student_for(spec, 10, cost_of("nayer:resnet8", spec, 10), "nayer:resnet8")
    assert found == "nayer:wrn_16_1", "none is smaller; this is the smallest of the others"


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("3x224x224", (3, 224, 224)),
        ("1×28×30", (1, 28, 30)),
        ("32", (3, 32, 32)),
        ("8 x 9", (3, 8, 9)),
        ("32x24x3", (3, 32, 24)),
        ("32, 24, 3", (3, 32, 24)),
        ("9x8x1", (1, 9, 8)),
        ("4x4x4", (4, 4, 4)),
        ("8x32x32", (8, 32, 32)),
    ],
)
def test_image_sizes(text: str, shape: tuple[int, int, int]) -> None:
    assert parse_shape(text, 3) == shape


@pytest.mark.parametrize("text", ["", "x", "3x", "axb", "1x2x3x4", "-3x4x4", "٣x4x4", "3.5"])
def test_no_image_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_shape(text, 3)


def test_the_size_that_a_network_needs() -> None:
    assert parse_size("224x192", "--resize") == (224, 192)
    assert parse_size("224", "--resize") == (224, 224)
    for text in ("", "3x224x224", "a", "-4"):
        with pytest.raises(UsageError, match="height and a width"):
            parse_size(text, "--resize")


def test_numbers() -> None:
    assert parse_values("0.485, 0.456 0.406", "--mean") == (0.485, 0.456, 0.406)
    for text in ("", "a", "0.1;0.2"):
        with pytest.raises(UsageError):
            parse_values(text, "--mean")


def test_a_folder_of_transformers(here: Path, invoke: Invoke) -> None:
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    names = {0: "crane", 1: "cat", 2: "crane"}
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names)
    ResNetForImageClassification(config).save_pretrained(here / "hf")
    processor = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0)
    processor.save_pretrained(here / "hf")
    answer = invoke("init", *TRIAL, "hf", "--student", "nayer:resnet8")
    assert answer.code == 0, answer.err
    recipe = load_recipe("hf.toml")
    assert recipe.teacher.classes == ("crane (class 0)", "cat", "crane (class 2)")
    assert recipe.teacher.weights is None
    assert 'model = "hf:hf"' in (here / "hf.toml").read_text()


@pytest.mark.parametrize(("resizes", "channels"), [(False, 3), (True, 1)])
def test_an_image_processor_that_does_not_tell_the_input(here: Path, resizes: bool, channels: int) -> None:
    """It leaves the size as it is, or makes RGB of every picture, whatever the network takes."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=channels
    )
    ResNetForImageClassification(config).save_pretrained(here / "hf")
    ViTImageProcessor(
        size={"height": 40, "width": 48}, do_resize=resizes, image_mean=[0.3] * 3, image_std=[0.2] * 3
    ).save_pretrained(here / "hf")
    found = look(here / "hf").input
    assert found is not None
    assert not found.sure
    if resizes:
        assert found.value == InputSpec(channels=1, height=40, width=48, mean=(0.3,), std=(0.2,))
    else:
        assert found.value.shape == (3, 224, 224), "not the size of the picture that was tried"


def test_errors_are_ours(here: Path) -> None:
    with pytest.raises((UsageError, IntegrityError)):
        look(here / "labels.txt")
