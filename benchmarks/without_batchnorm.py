"""Students of teachers without BatchNorm: the priors made for them beside NAYER's and real images, over seeds.

    python benchmarks/without_batchnorm.py --folder runs/without_batchnorm \\
        --json benchmarks/results/without_batchnorm.digits.json
    python benchmarks/without_batchnorm.py --data "$NAYER_EDGE_DATA/cifar10" --teachers "GroupNorm ResNet-20" \\
        --folder runs/without_batchnorm --json benchmarks/results/without_batchnorm.cifar10.json

It trains one teacher of each kind on the labelled images (kept in the folder), then a ResNet-8 student of each by every
way: `generator` (synthesis.prior = "generator", settings as `init` writes them, but no reserved rounds), `procedural`
(synthesis.prior = "procedural" without steps on the pixels), one of `ON_PIXELS` (the same with two steps a round),
`real images` (images drawn from the training images, on the schedule of `procedural` for digits and of `generator` for
other images) and, for the teachers with BatchNorm, `NAYER` (the recipe `digits`; for other images the settings of
`generator`, with L_bn and its weights). `folded` is that teacher with its BatchNorms folded into the convolutions. No
real image reaches a student, except for `real images`; nothing is chosen by the hold-out.

A row is written as soon as it is finished, and rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared.figures import keep, kept, spread
from shared.origin import origin
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nayer_edge.batchnorm import raise_bn_momentum
from nayer_edge.config import LTE, Augment, Distill, Generator, InputSpec, Prior, Synthesis, Teach
from nayer_edge.data import datasets
from nayer_edge.data.datasets import LabelledImages
from nayer_edge.distillation import Distillation, Settings
from nayer_edge.labels import embeddings
from nayer_edge.models.build import build
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier
from nayer_edge.pipelines.costs.budget import BudgetPlan, Costs
from nayer_edge.pipelines.costs.budget import settings as settings_of
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime.compute import Compute, random_stream, seeded
from nayer_edge.storage.tensors import load_tensors, save_tensors
from nayer_edge.synthesis import Round
from nayer_edge.train_teacher import teach
from nayer_edge.training.evaluate import logits_of, top1

STUDENT = "nayer:resnet8"
CIFAR = "cifar10-w402-w161-fast"
"""the recipe whose classes count where the images are not digits"""
WAYS = ("generator", "procedural", "real images", "NAYER")
ON_PIXELS: dict[str, dict[str, float]] = {
    "adversarial": {"lambda_adv": 1.0},
    "class term": {"lambda_ce": 1.0},
    "total variation": {"lambda_tv": 1.0},
    "activation norms": {"lambda_act": 1.0},
    "patch similarity": {"lambda_patch": 1.0},
    "PSAQ": {"lambda_ce": 1.0, "lambda_tv": 0.05, "lambda_patch": 1.0},
}
"""ways that take two steps on the pixels of procedural images, by these losses"""


def resnet20(spec: InputSpec, classes: tuple[str, ...]) -> nn.Module:
    """With BatchNorm, from our zoo."""
    return build("nayer:resnet20", spec, classes).network


def group_norms(network: nn.Module, groups: int = 4) -> nn.Module:
    """The network with a GroupNorm in the place of every BatchNorm."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, nn.GroupNorm(groups, module.num_features))
    return network


def folded(network: nn.Module) -> nn.Module:
    """The network with every BatchNorm folded into the convolution before it, as deployed networks have it."""
    modules = dict(network.eval().named_modules())
    names = list(modules)
    for before, name in itertools.pairwise(names):
        convolution, norm = modules[before], modules[name]
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            network.set_submodule(before, fuse_conv_bn_eval(convolution, norm))
            network.set_submodule(name, nn.Identity())
    return network


def convnext(spec: InputSpec, classes: tuple[str, ...]) -> nn.Module:
    """timm's smallest ConvNeXt, with a stem of stride 1."""
    return build("timm:test_convnext@32", spec, classes).network


def convnext_with_batchnorm(spec: InputSpec, classes: tuple[str, ...]) -> nn.Module:
    """The same network with a BatchNorm in the place of every LayerNorm."""
    arguments = {"norm_layer": "batchnorm2d", "conv_mlp": True}
    return build("timm:test_convnext@32", spec, classes, arguments).network


def vit(spec: InputSpec, classes: tuple[str, ...]) -> nn.Module:
    """timm's smallest vision transformer, with patches of 4 pixels."""
    return build("timm:test_vit", spec, classes, {"img_size": spec.height, "patch_size": 4}).network


TEACHERS: dict[str, Callable[[InputSpec, tuple[str, ...]], nn.Module]] = {
    "GroupNorm ResNet-20": lambda spec, classes: group_norms(resnet20(spec, classes)),
    "ConvNeXt": convnext,
    "ViT": vit,
    "BatchNorm ResNet-20": resnet20,
    "BatchNorm ConvNeXt": convnext_with_batchnorm,
    "folded ResNet-20": resnet20,
}
SAME_TRAINING = {"folded ResNet-20": "BatchNorm ResNet-20"}
"""the teacher whose weights another one is made of"""
DIGITS: dict[str, dict[str, Any]] = {
    "GroupNorm ResNet-20": {"epochs": 15, "lr": 0.1},
    "ConvNeXt": {"epochs": 25, "lr": 0.05, "muon_lr": 0.02},
    "ViT": {"epochs": 30, "lr": 0.05, "muon_lr": 0.02},
    "BatchNorm ResNet-20": {"epochs": 15, "lr": 0.1},
    "BatchNorm ConvNeXt": {"epochs": 25, "lr": 0.05, "muon_lr": 0.02},
}
"""how the teachers are trained on digits, in addition to `TEACH`"""
PHOTOS: dict[str, Any] = {"epochs": 10, "batch": 256, "lr": 0.1}
"""how they are trained on other images: shortly, for two cores"""
TRAINED = Path(__file__).parent / "teachers"
"""CIFAR-10 teachers, whose training takes an hour of one core"""
TEACH: dict[str, Any] = {"batch": 64, "optimizer": "muon"}


def schedule(digits: bool) -> tuple[Synthesis, Distill]:
    """The student's schedule. On digits 1,400 steps and 16,800 images; the other one is a guess that was never run."""
    augment = Augment(pad=2, flip=False) if digits else Augment()
    synthesis = Synthesis(
        prior="procedural",
        batch=200,
        g_steps=2,
        rounds=8 if digits else 20,
        warmup_rounds=20 if digits else 50,
        lambda_ce=0.0,
        lambda_adv=0.0,
        augment=Augment(pad=0, flip=False),
    )
    distill = Distill(
        epochs=15 if digits else 10,
        warmup_epochs=1 if digits else 2,
        decay_epochs=6 if digits else 3,
        steps=100 if digits else 250,
        batch=128 if digits else 256,
        optimizer="muon",
        lr=0.1,
        schedule="constant",
        temperature=20.0,
        augment=augment,
        views=4,
        holdout_rounds=1,
    )
    return synthesis, distill


def generated(digits: bool, prior: Prior) -> tuple[Generator, Synthesis, Distill]:
    """The settings that `init` writes for a prior with a generator, without reserved rounds, and in fixed sizes."""
    if digits:
        costs = Costs(0, 0, 0, 0, 0, student_batch=128)
        sizes = BudgetPlan(10, rounds=7, warmup_rounds=6, warmup_epochs=2, epochs=14, decay_epochs=4, steps=70,
                           images=6800, steps_in_all=840, seconds={"fill": 0, "rest": 0})  # fmt: skip
    else:
        costs = Costs(0, 0, 0, 0, 0)
        sizes = BudgetPlan(10, rounds=7, warmup_rounds=6, warmup_epochs=2, epochs=12, decay_epochs=3, steps=140,
                           images=6100, steps_in_all=1400, seconds={"fill": 0, "rest": 0})  # fmt: skip
    sections = settings_of(1, sizes, costs, bank_mib=256, prior=prior)
    augment = Augment(pad=2, flip=False) if digits else Augment()
    synthesis = Synthesis.model_validate({**sections["synthesis"], "reserve": 0, "augment": augment})
    distill = Distill.model_validate({**sections["distill"], "augment": augment})
    return Generator(channels=32), synthesis, distill


class OnReal(Distillation):
    """Takes every image from a data set in place of making it."""

    real: LabelledImages

    def _round(self, random: torch.Generator, *_parts: Any, **_named: Any) -> Round:
        count = self.settings.synthesis.batch
        places = torch.randint(0, len(self.real.images), (count,), generator=random)
        return Round(self.real.images[places], self.real.labels[places], torch.zeros(3))


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or labelled images as teach.data (32 pixels, RGB)")
    parser.add_argument("--teachers", default=";".join(TEACHERS), help="separated by ;")
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by ;")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", type=Path, required=True, help="where the teachers' weights are kept")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    digits = given.data == "digits"
    side, channels = (16, 1) if digits else (32, 3)
    spec = InputSpec(channels=channels, height=side, width=side, mean=(0.5,), std=(0.5,))
    recipe = load_recipe("digits" if digits else CIFAR)
    classes = recipe.teacher.classes
    train = datasets.load(given.data, "train", spec, classes)
    holdout = datasets.load(given.data, "holdout", spec, classes, None if digits else "test")
    compute = computing.choose("cpu") if digits else computing.choose()
    figures = kept(given.json) or {"student": STUDENT, "teachers": {}, "rows": []}
    for way in given.ways.split(";"):
        for seed in map(int, given.seeds.split(",")):
            for kind in given.teachers.split(";"):
                if (way == "NAYER") != kind.startswith("BatchNorm"):
                    continue
                if any((r["teacher"], r["way"], r["seed"]) == (kind, way, seed) for r in figures["rows"]):
                    continue
                teacher = teacher_of(kind, spec, classes, train, compute, given.folder, digits)
                if kind not in figures["teachers"]:
                    found = float(top1(logits_of(teacher, holdout.images, compute), holdout.labels))
                    figures["teachers"][kind] = {"top1": found, "parameters": teacher.parameter_count}
                figures["rows"].append(row(kind, way, seed, teacher, train, holdout, compute))
                figures["summary"] = summary(figures["rows"])
                figures |= {"images": len(holdout.images), **origin()}
                keep(given.json, figures)
                print(json.dumps(figures["rows"][-1]), flush=True)


def teacher_of(
    kind: str,
    spec: InputSpec,
    classes: tuple[str, ...],
    train: LabelledImages,
    compute: Compute,
    folder: Path,
    digits: bool,
) -> Classifier:
    """The trained teacher: from the folder, or trained now."""
    with seeded(random_stream(0, "teacher").initial_seed()):
        network = Classifier(TEACHERS[kind](spec, classes), f"benchmark:{kind}", spec, classes)
    trained = SAME_TRAINING.get(kind, kind)
    path = folder / f"{trained}.safetensors"
    plain = trained.lower().replace(" ", "_").replace("-", "")
    if not path.is_file() and not digits and (shipped := TRAINED / f"cifar10_{plain}.safetensors").is_file():
        path = shipped
    if path.is_file():
        network.backbone.load_state_dict(load_tensors(path, "a teacher"))
    else:
        own = DIGITS[trained] | {"augment": {"pad": 2, "flip": False}} if digits else PHOTOS
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished.safetensors")
        teach(network, train, Teach.model_validate({"data": "", **TEACH, **own}), compute, 0, checkpoint=unfinished)
        unfinished.unlink(missing_ok=True)
        save_tensors(path, network.backbone.state_dict())
    if kind == "folded ResNet-20":
        network = Classifier(folded(network.backbone), network.model, spec, classes)
    return network.eval()


def row(
    kind: str,
    way: str,
    seed: int,
    teacher: Classifier,
    train: LabelledImages,
    holdout: LabelledImages,
    compute: Compute,
) -> dict[str, Any]:
    """One student."""
    digits = teacher.spec.channels == 1
    if way == "NAYER" and digits:
        recipe = load_recipe("digits")
        generator, synthesis, distill, lte = recipe.generator, recipe.synthesis, recipe.distill, recipe.lte
    elif way in {"generator", "NAYER"} or (way == "real images" and not digits):
        generator, synthesis, distill = generated(digits, "batchnorm" if way == "NAYER" else "generator")
        lte = LTE()
    else:
        synthesis, distill = schedule(digits)
        generator, lte = Generator(), LTE(encoder="onehot")
    if way in ON_PIXELS:
        synthesis = synthesis.model_copy(update={"pixel_step": 0.03, **ON_PIXELS[way]})
    with seeded(random_stream(seed, "student").initial_seed()):
        student = build_classifier(STUDENT, teacher.spec, teacher.classes)
    raise_bn_momentum(student)
    kind_of_run = OnReal if way == "real images" else Distillation
    found = embeddings.build(teacher.classes, lte)
    run = kind_of_run(teacher, found, student, Settings(generator, synthesis, distill, seed), compute)
    if isinstance(run, OnReal):
        run.real = train
    began, processor = time.perf_counter(), time.process_time()
    while not run.finished:
        run.run_epoch()
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    student = run.result()

    def right(of: LabelledImages) -> float:
        return float(top1(logits_of(student, of.images, compute), of.labels))

    return {
        "teacher": kind,
        "way": way,
        "seed": seed,
        "top1": right(holdout),
        # Settings may be chosen by this one.
        "top1_on_training_images": right(train),
        "synthetic_agreement": None if way == "real images" else run.history[-1].agreement,
        "images": len(run.bank),
        "steps": (distill.epochs - distill.warmup_epochs) * distill.steps,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over the seeds, by teacher and way."""
    found: dict[str, dict[str, Any]] = {}
    for each in rows:
        values = [r["top1"] for r in rows if (r["teacher"], r["way"]) == (each["teacher"], each["way"])]
        found.setdefault(each["teacher"], {})[each["way"]] = {"seeds": len(values), **spread(values)}
    return found


if __name__ == "__main__":
    main()
