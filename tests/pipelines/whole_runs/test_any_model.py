"""Any teacher, any student, any labels: foreign checkpoints under foreign keys, through to a gated INT8 artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nayer_edge.config import Augment, InputSpec, Teach
from nayer_edge.data import datasets as data
from nayer_edge.export.runners import OrtRunner
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier
from nayer_edge.models.prior import batch_norms
from nayer_edge.models.user_code import trusting
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.runtime.compute import choose, random_stream, seeded
from nayer_edge.storage.tensors import load_tensors, save_tensors
from nayer_edge.train_teacher import teach
from nayer_edge.training.evaluate import logits_of

Invoke = Callable[..., Any]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TINY = """
[lte]
encoder = "random"

[generator]
noisy_dim = 16
channels = 8

[synthesis]
batch = 20
g_steps = 2
rounds = 1
warmup_rounds = 1
g_life = 2
augment = { pad = 1, flip = false }

[distill]
epochs = 2
warmup_epochs = 1
steps = 2
batch = 20
augment = { pad = 1, flip = false }
bank_mib = 16
holdout_rounds = 1

[export]
calibration_images = 20
calibration_method = "minmax"
max_drop = 1.0

[validate]
synthetic_images = 20
"""
# Small, and good enough to reach the figures that the slow tests ask for.
SHORT = """
[generator]
noisy_dim = 256
channels = 32

[synthesis]
batch = 60
g_steps = 20
rounds = 1
warmup_rounds = 4
g_life = 4
lambda_bn = 1.0
lambda_ce = 1.0
augment = { pad = 2, flip = false }

[distill]
epochs = 8
warmup_epochs = 2
steps = 60
batch = 128
lr = 0.1
temperature = 4.0
augment = { pad = 2, flip = false }
bank_mib = 64
holdout_rounds = 1

[export]
calibration_images = 200

[validate]
data = "digits"
"""


def recipe_at(path: Path, teacher: str, classes: Sequence[str], student: str, rest: str) -> Path:
    # In float32: what so few steps make of a student then hangs less on the processor.
    head = f'precision = "fp32"\n\n[teacher]\n{teacher}\nclasses = {json.dumps(list(classes))}\n\n'
    head += f'[student]\nmodel = "{student}"\n'
    path.write_text(head + rest, encoding="utf-8")
    return path


def seen(network: Classifier) -> None:
    """Gives its BatchNorms the statistics of some images, so that its answers differ."""
    for norm in batch_norms(network):
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(16, *network.spec.shape))
    network.eval()


# ------------------------------------------------------------------ odd images and class numbers


@pytest.mark.parametrize(
    ("channels", "height", "width", "classes"),
    [
        pytest.param(1, 16, 24, 2, marks=pytest.mark.slow),
        pytest.param(2, 20, 12, 3, marks=pytest.mark.slow),
        pytest.param(4, 12, 12, 5, marks=pytest.mark.slow),
        pytest.param(13, 9, 17, 7, marks=pytest.mark.slow),
        pytest.param(3, 16, 16, 1000, marks=pytest.mark.slow),
    ],
)
def test_images_and_class_numbers_of_all_kinds(
    channels: int, height: int, width: int, classes: int, tmp_path: Path
) -> None:
    """From a teacher's weights to INT8, and with many channels to the report; with 1000 classes a round of 20 images
    shows few of them."""
    spec = InputSpec(channels=channels, height=height, width=width)
    labels = [f"c{number}" for number in range(classes)]
    with seeded(0):
        network = build_classifier("nayer:wrn_10_1", spec, labels)
    save_tensors(tmp_path / "w.safetensors", network.backbone.state_dict())
    size = f"input = {{ channels = {channels}, height = {height}, width = {width} }}"
    teacher = f'model = "nayer:wrn_10_1"\nweights = "w.safetensors"\n{size}'
    path = recipe_at(tmp_path / "odd.toml", teacher, labels, "nayer:resnet8", TINY)
    last = "report" if channels == 13 else "int8"
    run = run_recipe(load_recipe(str(path), ["device=cpu"]), tmp_path / "run", last=last)
    bank = load_tensors(run.path("bank.safetensors"), "a bank")
    assert bank["images"].shape == (40, channels, height, width)
    with OrtRunner(run.path("export/student.int8.cpu.onnx")) as runner:
        assert runner.infer(np.zeros((3, channels, height, width), dtype=np.float32)).shape == (3, classes)
    if last == "report":
        assert run.path("report.html").stat().st_size > 10_000
    student = load_classifier(run.path("student/student.safetensors"))
    assert student(torch.rand(2, channels, height, width)).shape == (2, classes)
    assert student.classes == tuple(labels)


# ------------------------------------------------------------------ auxiliary heads and dropout

WITH_HEADS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5))
        self.aux = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                 nn.Linear(8, num_classes))
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.body(x)
        logits = self.fc(x.mean(dim=(2, 3)))
        return (logits, self.aux(x)) if self.training else logits
"""


def test_heads_and_dropout_on_both_sides(tmp_path: Path) -> None:
    """Teacher and student of the user's own code; the teacher's auxiliary BatchNorm never sees an image."""
    (tmp_path / "large.py").write_text(WITH_HEADS)
    (tmp_path / "small.py").write_text(WITH_HEADS.replace("8", "6"))
    spec, classes = InputSpec(height=16, width=16), ("a", "b", "c")
    with trusting(), seeded(0):
        before = build_classifier(f"python:{tmp_path}/large.py:Net", spec, classes).backbone.state_dict()
    torch.save({"net": before}, tmp_path / "w.pt")
    teacher = 'model = "python:large.py:Net"\nweights = "w.pt"\ninput = { height = 16, width = 16 }'
    path = recipe_at(tmp_path / "mine.toml", teacher, classes, "python:small.py:Net", TINY)
    with trusting():
        run = run_recipe(load_recipe(str(path), ["device=cpu"]), tmp_path / "run", last="int8")
        kept = load_classifier(run.path("teacher/teacher.safetensors"))
        made = load_classifier(run.path("student/student.safetensors"))
    assert all(torch.equal(kept.backbone.state_dict()[name], value) for name, value in before.items())
    with trusting(), seeded(random_stream(0, "student").initial_seed()):
        first = build_classifier(f"python:{tmp_path}/small.py:Net", spec, classes).backbone.state_dict()
    after = made.backbone.state_dict()
    assert not torch.equal(after["fc.weight"], first["fc.weight"]), "the student did not learn"
    assert torch.equal(after["aux.4.weight"], first["aux.4.weight"]), "its auxiliary head was taught something"
    assert all(bool(torch.isfinite(value).all()) for value in after.values())


@pytest.mark.slow
def test_a_library_teacher_with_its_auxiliary_heads(tmp_path: Path) -> None:
    spec = InputSpec(height=32, width=32)
    with seeded(0):
        network = build_classifier("torchvision:googlenet", spec, ("a", "b"), {"aux_logits": True})
        seen(network)
    torch.save(network.backbone.state_dict(), tmp_path / "w.pt")
    model = 'model = "torchvision:googlenet"\nweights = "w.pt"\n'
    size = "input = { height = 32, width = 32, mean = [0.5], std = [0.5] }"
    for rest, ignored in ((size, True), (size + "\narguments = { aux_logits = true }", False)):
        path = recipe_at(tmp_path / "mine.toml", model + rest, ("a", "b"), "nayer:resnet8", TINY)
        last = "teacher" if ignored else "student"
        run = run_recipe(load_recipe(str(path), ["device=cpu"]), tmp_path / f"run{ignored}", last=last)
        card = json.loads(run.path("teacher/teacher.json").read_text())
        assert ("weights" in card) == ignored
        if ignored:
            assert all(name.startswith("aux") for name in card["weights"]["ignored"])


# ------------------------------------------------------------------ what is refused before any work


@pytest.mark.parametrize(
    ("teacher", "code", "messages"),
    [
        ('model = "timm:test_vit"\nweights = "w.pt"', 2, ("has no BatchNorm layers", "Nothing was started")),
        ('model = "timm:resnet81"\nweights = "w.pt"', 2, ("timm has no network 'resnet81'", "Did you mean")),
        ('model = "python:nets.py:Net"\nweights = "w.pt"', 4, ("runs only with --trust-code",)),
        ('model = "torchvision:resnet18"\nweights = "w.pt"', 2, ("No normalisation", "[teacher.input]")),
        (
            'model = "torchvision:inception_v3"\nweights = "w.pt"\n'
            "input = { height = 32, width = 32, mean = [0.5], std = [0.5] }",
            2,
            ("cannot take images of 3×32×32", "Nothing was started"),
        ),
        ('model = "timm:resnet10t"\nweights = "w.pt"\ninput = { channels = 1 }', 2, ("3 values for 1 channels",)),
    ],
)
def test_refused_before_any_work(
    invoke: Invoke, tmp_path: Path, teacher: str, code: int, messages: tuple[str, ...]
) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    (tmp_path / "nets.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'it_ran')!r}).touch()\n")
    path = recipe_at(tmp_path / "mine.toml", teacher, ("a", "b"), "nayer:resnet8", TINY)
    answer = invoke("run", path, "--out", tmp_path / "run")
    assert answer.code == code, answer.err
    for message in messages:
        assert message in answer.err
    assert not (tmp_path / "run").exists(), "something was started"
    assert not (tmp_path / "it_ran").exists()


# ------------------------------------------------------------------ foreign checkpoints, end to end


PYTHON = """
from torch import nn

def make(num_classes, width=16):
    def block(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(block(3, width), block(width, 2 * width), block(2 * width, 4 * width),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))
"""


def taught(network: Classifier, epochs: int) -> Classifier:
    """Trains it for a moment; for no epoch at all it only sees some images."""
    if epochs == 0:
        seen(network)
        return network
    images = data.load("digits", "train", network.spec, network.classes)
    settings = Teach(data="digits", epochs=epochs, batch=64, lr=0.05, augment=Augment(pad=2, flip=False))
    return teach(network, images, settings, choose("cpu", "auto"), seed=0)


def checkpoint(source: str, folder: Path, epochs: int) -> tuple[str, torch.Tensor]:
    """Trains a classifier of digits and leaves it as people do; returns the recipe's lines, and its logits for the
    hold-out."""
    spec = InputSpec(channels=3, height=32, width=32, **IMAGENET)
    size = (
        "input = { channels = 3, height = 32, width = 32, mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }"
    )
    if source == "hf":
        import transformers

        config = transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=10
        )
        config.save_pretrained(folder / "resnet")
        processor = transformers.ConvNextImageProcessor(
            size={"shortest_edge": 32}, image_mean=list(IMAGENET["mean"]), image_std=list(IMAGENET["std"])
        )
        processor.save_pretrained(folder / "resnet")
        name, lines = f"hf:{folder}/resnet", 'model = "hf:resnet"'
    elif source == "python":
        (folder / "nets.py").write_text(PYTHON)
        name, lines = f"python:{folder}/nets.py:make", f'model = "python:nets.py:make"\nweights = "last.ckpt"\n{size}'
    else:
        # timm says itself how its networks normalise.
        size = "input = { height = 32, width = 32 }" if source.startswith("timm:") else size
        name, lines = source, f'model = "{source}"\nweights = "last.ckpt"\n{size}'
    with trusting(), seeded(0):
        network = build_classifier(name, spec, DIGITS)
    taught(network, epochs)
    if source == "hf":
        network.backbone.save_pretrained(folder / "resnet")
    else:
        # A distributed Lightning run, in half precision on disk.
        state = {f"model.module.{n}": v.half() if v.is_floating_point() else v
                 for n, v in network.backbone.state_dict().items()}  # fmt: skip
        torch.save({"epoch": epochs, "state_dict": state, "optimizer_states": [{}]}, folder / "last.ckpt")
    return lines, answers(network)


def answers(network: Classifier) -> torch.Tensor:
    """Logits for the held-out digits."""
    return logits_of(network, held_out(network.spec).images, choose("cpu", "fp32"))


def held_out(spec: InputSpec) -> data.LabelledImages:
    return data.load("digits", "holdout", spec, DIGITS)


def through(invoke: Invoke, path: Path, root: Path, *trust: str) -> dict[str, Any]:
    """The way of a user, command by command; returns the report."""
    assert invoke("distill", path, "--out", root, *trust).code == 0
    assert invoke("export", root, "--int8", *trust).code == 0
    assert invoke("validate", root, "--data", "digits", *trust).code == 0
    return json.loads((root / "validate" / "report.json").read_text())


@pytest.mark.parametrize(
    "source",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("torchvision:resnet18", "timm:resnet10t")),
        "hf",
        "python",
    ],
)
def test_a_foreign_checkpoint_is_taken_over(source: str, invoke: Invoke, tmp_path: Path) -> None:
    """The teacher in the run folder answers as the checkpoint did, on real images."""
    lines, logits = checkpoint(source, tmp_path, epochs=0)
    path = recipe_at(tmp_path / "mine.toml", lines, DIGITS, "nayer:resnet8", TINY)
    trust = ("--trust-code",) if source == "python" else ()
    answer = invoke("run", path, "--until", "teacher", "--out", tmp_path / "run", *trust)
    assert answer.code == 0, answer.err
    card = json.loads((tmp_path / "run" / "teacher" / "teacher.json").read_text())
    assert card["input_from"] == {
        "timm:resnet10t": "timm's resnet10t; height, width from the recipe",
        "hf": "the image processor of hf:resnet",
    }.get(source, "the recipe")
    with trusting():
        teacher = load_classifier(tmp_path / "run" / "teacher" / "teacher.safetensors")
    assert (teacher.spec.height, teacher.spec.mean) == (32, IMAGENET["mean"])
    # The folder goes on with what it was begun with, wherever that came from.
    answer = invoke("run", tmp_path / "run", "--until", "lte", *trust)
    assert answer.code == 0, answer.err
    assert "= teacher   already finished" in answer.out
    # The file is in half precision.
    scale = float(logits.std())
    torch.testing.assert_close(answers(teacher), logits, atol=0.02 * scale, rtol=0)


def test_a_foreign_checkpoint_goes_through_to_the_gate(invoke: Invoke, tmp_path: Path) -> None:
    """The short variant: everything that the slow tests do, too little of it to be any good."""
    lines, _ = checkpoint("python", tmp_path, epochs=3)
    # Few BatchNorms: in so few steps the many of a MobileNet would not get to know an image, and all would look alike.
    # No loss is allowed, because how much so short a distillation loses depends on the machine.
    gate = "[gate]\naccuracy = { max_drop_vs_fp32 = 0.015, max_drop_vs_teacher = 0.0 }\n"
    rest = TINY.replace("\nsteps = 2", "\nsteps = 10") + gate
    path = recipe_at(tmp_path / "mine.toml", lines, DIGITS, "nayer:resnet8", rest)
    root = tmp_path / "run"
    assert "--trust-code" in invoke("distill", path, "--out", root).err
    report = through(invoke, path, root, "--trust-code")
    assert {artifact["name"]: artifact["status"] for artifact in report["artifacts"]} == {
        "fp32": "measured",
        "int8.cpu": "measured",
    }
    assert report["teacher"]["top1"] > 0.2
    assert report["student"]["top1"] < report["teacher"]["top1"] - 0.05, "else the gate has nothing to find"
    assert report["dataset"]["name"].startswith("digits")
    answer = invoke("gate", root, "--json")
    assert answer.code == 1, "an untrained student passed"
    verdicts = {check["name"]: check["verdict"] for check in json.loads(answer.out)["checks"]}
    assert verdicts["accuracy_drop_vs_teacher"] == "fail"
    # INT8 is made from the generator with the teacher, so its code runs again.
    assert invoke("calibration-data", root, "-n", "20", "--out", tmp_path / "c").code == 4
    assert invoke("calibration-data", root, "-n", "20", "--out", tmp_path / "c", "--trust-code").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("source", ["torchvision:resnet18", "timm:resnet18", "hf", "python"])
def test_a_foreign_checkpoint_becomes_a_gated_artifact(source: str, invoke: Invoke, tmp_path: Path) -> None:
    """Digits at 32 pixels in three channels → MobileNetV3-small, in INT8."""
    lines, logits = checkpoint(source, tmp_path, epochs=10)
    spec = InputSpec(height=32, width=32)
    accuracy = float((logits.argmax(dim=1) == held_out(spec).labels).float().mean())
    assert accuracy > 0.95
    gate = '[gate]\nartifacts = ["int8.cpu"]\naccuracy = { max_drop_vs_fp32 = 0.03, max_drop_vs_teacher = 0.15 }\n'
    path = recipe_at(tmp_path / "mine.toml", lines, DIGITS, "torchvision:mobilenet_v3_small@32", SHORT + gate)
    report = through(invoke, path, tmp_path / "run", *(("--trust-code",) if source == "python" else ()))
    measured = {artifact["name"]: artifact for artifact in report["artifacts"]}
    print(source, report["teacher"]["top1"], report["student"]["top1"], measured["int8.cpu"]["top1"])
    assert report["teacher"]["top1"] == pytest.approx(accuracy, abs=0.005)
    answer = invoke("gate", tmp_path / "run")
    assert answer.code == 0, answer.out
