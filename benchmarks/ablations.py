"""What each choice of the method is worth, and what would be faster: one thing changed at a time.

    python benchmarks/ablations.py digits --json benchmarks/results/ablations.digits.json
    NAYER_EDGE_DATA=… python benchmarks/ablations.py cifar10 --json benchmarks/results/ablations.cifar10.json
    … python benchmarks/ablations.py cifar10 --study faster --json benchmarks/results/faster.cifar10.json

digits: the shipped recipe. A seed is a fold inside the 1,197 training images: it trains its own teacher on two thirds
of them, and its students are measured on the last third. The hold-out stays unseen.

cifar10: the WRN-40-2 of $NAYER_EDGE_DATA and a WRN-16-1, scaled down to minutes on two cores (`CIFAR10`). Its figures
are comparable only with each other.

On real images: accuracy, and agreement with the teacher. The study of the method measures on the 10,000 test images,
which are not used to choose anything. Candidates for a faster recipe ("faster", of about the same work each) are judged
by agreement on `FIRST` images of the training split instead, which the teacher has seen and no student has.

Without real images: each run leaves the synthetic hold-out that its own generator made, and every student of a seed
is asked for all of them ("agreement_on_all_holdouts"), since a variant's own would judge its images as well as its
student. It does not rank variants of such short runs (docs/LOG.md) and chooses nothing.

Every variant has its first seed before any has its second; runs that the JSON file holds already are not repeated, and
those of them without figures on real images are measured from the students that they left.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar import PROTOCOLS
from shared.figures import keep, kept, spread
from shared.origin import commit, origin
from sklearn.model_selection import StratifiedKFold
from torch.nn import functional as F

from nayer_edge import losses
from nayer_edge.data import datasets as data
from nayer_edge.data.datasets import LabelledImages
from nayer_edge.distillation import Distillation, Settings, distill
from nayer_edge.generator import Generator
from nayer_edge.labels import embeddings as lte
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.runtime.compute import Compute, choose, random_stream, seeded
from nayer_edge.storage.tensors import load_tensors, save_tensors
from nayer_edge.train_teacher import teach
from nayer_edge.training import evaluate

CIFAR10 = PROTOCOLS["minutes"]
FIRST = 5_000
FIGURES = ("top1", "agreement_on_real_images", "agreement_on_all_holdouts", "loss_ce", "loss_bn", "seconds")


@dataclass(frozen=True)
class Variant:
    """What is different from the recipe: settings, and changes that no setting expresses."""

    settings: tuple[str, ...] = ()
    change: Callable[[Distillation], Callable[[], None]] | None = None
    """done before the first epoch; what it returns, after the last"""
    only_on: str | None = None


@dataclass(frozen=True)
class Case:
    """A teacher, and real images that it did not see, with its answers to them."""

    teacher: Classifier
    images: LabelledImages
    logits: torch.Tensor


def drawn_once(run: Distillation) -> Callable[[], None]:
    """Later rounds go on with the noisy layer of the first, which is trained like every other."""
    draw, drawn = run.generator.noisy.redraw, False

    def redraw(random: torch.Generator) -> None:
        nonlocal drawn
        if not drawn:
            draw(random)
        drawn = True

    run.generator.noisy.redraw = redraw
    return lambda: None


def averaged(run: Distillation) -> Callable[[], None]:
    """The student that is shipped is a running mean of the weights, over about 50 steps (EMA)."""
    step = run._student_step
    mean: dict[str, torch.Tensor] = {}

    def student_step(*batch: torch.Tensor) -> torch.Tensor:
        loss = step(*batch)
        for name, tensor in run.student.backbone.state_dict().items():
            if name not in mean or not tensor.is_floating_point():
                mean[name] = tensor.detach().clone()
            else:
                mean[name].lerp_(tensor, 0.02)
        return loss

    run._student_step = student_step

    def end() -> None:
        run.student.backbone.load_state_dict(mean)

    return end


def hard_images(run: Distillation) -> Callable[[], None]:
    """Half of each batch is drawn by how far student and teacher were apart when the image was last seen."""
    views, original = run.views, losses.distillation_loss
    assert views is not None
    far = torch.full((run.bank.capacity,), torch.inf)
    drawn = torch.empty(0, dtype=torch.long)

    def draw(random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal drawn
        count, images = run.settings.distill.batch, len(run.bank)
        known = far[:images].isfinite()
        # Images never seen count as the hardest one seen so far.
        weights = torch.where(known, far[:images], far[:images][known].max() if known.any() else 1.0)
        hard = torch.multinomial(weights + 1e-6, count // 2, replacement=True, generator=random)
        drawn = torch.cat((torch.randint(0, images, (count - len(hard),), generator=random), hard))
        return views.at(drawn, torch.randint(0, views.views, (count,), generator=random))

    def loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        with torch.no_grad():
            far[drawn] = F.kl_div(
                F.log_softmax(student.float(), 1), F.log_softmax(teacher.float(), 1), reduction="none", log_target=True
            ).sum(1)
        return original(student, teacher, temperature)

    run._draw, losses.distillation_loss = draw, loss

    def end() -> None:
        losses.distillation_loss = original

    return end


def mixed_classes(run: Distillation) -> Callable[[], None]:
    """Half of the images are made from the mean of two label embeddings, for both classes in equal parts."""
    original, classes = losses.class_loss, len(run.embeddings)
    other = torch.arange(classes).roll(1)
    run.embeddings = torch.cat((run.embeddings, (run.embeddings + run.embeddings[other]) / 2))
    wanted = torch.eye(classes)
    wanted = torch.cat((wanted, (wanted + wanted[other]) / 2))
    settings, dimensions = run.settings, run.embeddings.shape[1]
    run.generator = Generator(
        dimensions, len(wanted), settings.synthesis.batch, run.teacher.spec.shape, settings.generator
    )
    run.compute.place(run.generator)
    losses.class_loss = lambda logits, labels: F.cross_entropy(logits.float(), wanted[labels])

    def end() -> None:
        losses.class_loss = original

    return end


AS_SHIPPED = "as shipped"
ONE_HOT = Variant(("lte.encoder=onehot",))
MIXED = Variant(("distill.mixup=0.5",))
FEW_STEPS = ("synthesis.g_steps=5", "synthesis.warmup_rounds=9", "synthesis.rounds=6")
STUDIES: dict[str, dict[str, Variant]] = {
    "method": {
        AS_SHIPPED: Variant(),
        "CLIP instead of MiniLM": Variant(
            ('lte.encoder="$NAYER_EDGE_DATA/lte/clip-vit-b32-cifar10.safetensors"',), only_on="cifar10"
        ),
        "one-hot instead of MiniLM": ONE_HOT,
        "random instead of MiniLM": Variant(("lte.encoder=random",)),
        "noisy layer drawn once": Variant(change=drawn_once),
        "BatchNorm momentum off": Variant(("synthesis.bn_momentum=0",)),
        "no adversarial loss": Variant(("synthesis.lambda_adv=0",)),
        "every crop anew": Variant(("distill.views=0",), only_on="cifar10"),
        "4 views of an image": Variant(("distill.views=4",), only_on="digits"),
        "16 views of an image": Variant(("distill.views=16",), only_on="cifar10"),
    },
    "faster": {
        AS_SHIPPED: Variant(),
        "5 steps a round, 3 × the rounds": Variant(FEW_STEPS, only_on="cifar10"),
        "5 rounds an epoch of warm-up, then 1": Variant(
            ("synthesis.warmup_rounds=5", "synthesis.rounds=1"), only_on="cifar10"
        ),
        "L_ce weighs 4 ×": Variant(("synthesis.lambda_ce=2",), only_on="cifar10"),
        "temperature 4": Variant(("distill.temperature=4",)),
        "learning rate 0.1": Variant(("distill.lr=0.1",), only_on="cifar10"),
        "half the batch, twice the steps": Variant(("distill.batch=32", "distill.steps=200"), only_on="cifar10"),
        "averaged student": Variant(change=averaged),
        "hard images more often": Variant(change=hard_images, only_on="cifar10"),
        "mixed classes": Variant(change=mixed_classes),
        "mixed images": MIXED,
        "one-hot instead of MiniLM": ONE_HOT,
        # Of those that gained, together: chosen after two seeds of the ones above.
        "5 steps, one-hot": Variant((*FEW_STEPS, *ONE_HOT.settings), only_on="cifar10"),
        "one-hot, mixed images": Variant((*ONE_HOT.settings, *MIXED.settings)),
        "5 steps, mixed images": Variant((*FEW_STEPS, *MIXED.settings), only_on="cifar10"),
        "5 steps, one-hot, mixed images": Variant((*FEW_STEPS, *ONE_HOT.settings, *MIXED.settings), only_on="cifar10"),
    },
}


def main() -> None:
    """Runs what is asked for, prints it as it comes, and writes the figures."""
    every = dict.fromkeys(name for study in STUDIES.values() for name in study)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("on", choices=["digits", "cifar10"])
    parser.add_argument("--study", choices=list(STUDIES), default="method")
    parser.add_argument("--variant", action="append", choices=list(every), help="of the study; several times; or all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="to share the seeds between machines")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="A.B=C", help="of every run, as smaller sizes"
    )
    parser.add_argument("--kept", type=Path, default=Path("runs/ablations"), help="where students and hold-outs stay")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    variants = arguments.variant or [name for name, each in study.items() if each.only_on in (None, arguments.on)]
    runs: list[dict[str, Any]] = kept(arguments.json).get("runs", [])
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in variants:
            run = next((run for run in runs if (run["variant"], run["seed"]) == (name, seed)), None)
            if run and "top1" in run:
                continue
            recipe = recipe_for(arguments.on, [*arguments.settings, *study[name].settings])
            file, on = file_of(arguments, name, seed), case_of(arguments, seed)
            if run is None:
                run = {"variant": name, "seed": seed} | one(recipe, on, study[name], seed, file)
                runs.append(run)
            run.update(measured(recipe, on, file))
            print(json.dumps(run), flush=True)
            keep(arguments.json, result(arguments, runs))
        ask_all(arguments, seed, [run for run in runs if run["seed"] == seed])
        keep(arguments.json, result(arguments, runs))
    print(table(runs))


def file_of(arguments: argparse.Namespace, variant: str, seed: int) -> Path:
    """Where a student stays, and the hold-out that its generator made."""
    name = re.sub(r"\W+", "-", variant).strip("-").lower()
    return arguments.kept / f"{arguments.on}-{arguments.study}-{name}-s{seed}.safetensors"


def recipe_for(on: str, settings: list[str]) -> Recipe:
    """The recipe with these settings."""
    if on == "digits":
        return load_recipe("digits", settings)
    teacher = Path(os.environ["NAYER_EDGE_DATA"]) / "teachers" / "wrn40_2_cifar10.safetensors"
    return load_recipe("cifar10-w402-w161-e100", [*CIFAR10, f"teacher.weights={json.dumps(str(teacher))}", *settings])


def case_of(arguments: argparse.Namespace, seed: int) -> Case:
    """What students of this seed are measured on."""
    return case(arguments.on, arguments.study, seed if arguments.on == "digits" else 0)


@functools.lru_cache(maxsize=1)
def case(on: str, study: str, seed: int) -> Case:
    """Of the digits every seed has its own teacher and images; of CIFAR-10 there is one of each."""
    recipe = recipe_for(on, [])
    compute = choose(recipe.device, recipe.precision)
    if on == "digits":
        teacher, images = fold(recipe, compute, seed)
    else:
        folder = Path("runs") / "ablations-teacher"
        run = run_recipe(recipe, folder, last="teacher")
        teacher = load_classifier(run.path(run.artifact("teacher").files["teacher"]))
        if study == "faster":
            where = Path(os.environ["NAYER_EDGE_DATA"]) / "cifar10" / "train.parquet"
            images = data.load(str(where), "train", recipe.teacher.input, recipe.teacher.classes)
            images = LabelledImages(images.images[:FIRST], images.labels[:FIRST], images.name)
        else:
            images = data.load(str(recipe.validate_.data), "holdout", recipe.teacher.input, recipe.teacher.classes)
    return Case(teacher, images, evaluate.logits_of(compute.place(teacher), images.images, compute))


def fold(recipe: Recipe, compute: Compute, number: int) -> tuple[Classifier, LabelledImages]:
    """A teacher of one fold, and the images that it did not see."""
    assert recipe.teach is not None
    images = data.load("digits", "train", recipe.teacher.input, recipe.teacher.classes)
    folds = StratifiedKFold(3, shuffle=True, random_state=1).split(images.images, images.labels)
    seen, unseen = (LabelledImages(images.images[part], images.labels[part], "fold") for part in list(folds)[number])
    with seeded(random_stream(number, "teacher").initial_seed()):
        teacher = build_classifier(recipe.teacher.model, recipe.teacher.input, recipe.teacher.classes)
    return teach(teacher, seen, recipe.teach, compute, number), unseen


def one(recipe: Recipe, on: Case, variant: Variant, seed: int, file: Path) -> dict[str, Any]:
    """One student."""
    compute = choose(recipe.device, recipe.precision)
    embeddings = lte.build(recipe.teacher.classes, recipe.lte)
    with seeded(random_stream(seed, "student").initial_seed()):
        student = build_classifier(recipe.student.model, on.teacher.spec, on.teacher.classes)
    run = Distillation(
        on.teacher, embeddings, student, Settings(recipe.generator, recipe.synthesis, recipe.distill, seed), compute
    )
    end = variant.change(run) if variant.change else lambda: None
    began = time.perf_counter()
    distill(run)
    end()
    seconds = time.perf_counter() - began
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(file, student.backbone.state_dict() | {"holdout": run.holdout})
    return {
        "bank_images": len(run.bank),
        "loss_ce": run.history[-1].loss_ce,
        "loss_bn": run.history[-1].loss_bn,
        "seconds": seconds,
        "compute": compute.reason,
        "commit": commit(),
    }


def measured(recipe: Recipe, on: Case, file: Path) -> dict[str, float | int]:
    """A kept student on real images."""
    compute = choose(recipe.device, recipe.precision)
    student = compute.place(build_classifier(recipe.student.model, on.teacher.spec, on.teacher.classes))
    tensors = load_tensors(file, "a student")
    del tensors["holdout"]
    student.backbone.load_state_dict(tensors)
    logits = evaluate.logits_of(student, on.images.images, compute)
    return {
        "real_images": len(logits),
        "teacher_top1": evaluate.top1(on.logits, on.images.labels),
        "top1": evaluate.top1(logits, on.images.labels),
        "agreement_on_real_images": float(evaluate.agreement(logits, on.logits)),
    }


def ask_all(arguments: argparse.Namespace, seed: int, runs: list[dict[str, Any]]) -> None:
    """Every student of a seed agrees with the teacher on a share of the hold-outs of all of them."""
    files = [file_of(arguments, run["variant"], seed) for run in runs]
    if not runs or not all(file.is_file() for file in files):
        return
    found = [load_tensors(file, "a student") for file in files]
    recipe, on = recipe_for(arguments.on, arguments.settings), case_of(arguments, seed)
    compute = choose(recipe.device, recipe.precision)
    images = torch.cat([tensors.pop("holdout") for tensors in found])
    teacher = evaluate.logits_of(on.teacher, images, compute)
    student = compute.place(build_classifier(recipe.student.model, on.teacher.spec, on.teacher.classes))
    for run, tensors in zip(runs, found, strict=True):
        student.backbone.load_state_dict(tensors)
        logits = evaluate.logits_of(student, images, compute)
        run["agreement_on_all_holdouts"] = float(evaluate.agreement(logits, teacher))
        run["holdout_images"] = len(images)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of each figure, by variant."""
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(run)
    return {
        variant: {"seeds": len(group)} | {key: spread([run[key] for run in group if key in run]) for key in FIGURES}
        for variant, group in by_variant.items()
    }


def result(arguments: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What there is so far."""
    settings = [*(CIFAR10 if arguments.on == "cifar10" else []), *arguments.settings]
    where = f"the first {FIRST} of the training split" if arguments.study == "faster" else "the test images"
    return {
        "on": arguments.on,
        "study": arguments.study,
        "measured_on": where if arguments.on == "cifar10" else "a third of the training images",
        "settings": settings,
        "summary": summary(runs),
        "runs": runs,
        **origin(),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, rates in per cent."""
    lines = [
        "| | seeds | top-1, % | agrees with the teacher on real images, % | on all synthetic hold-outs, % "
        "| L_ce, last epoch | L_bn, last epoch | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for variant, found in summary(runs).items():
        scales = zip(FIGURES, (100, 100, 100, 1, 1, 1), (2, 2, 2, 3, 2, 0), strict=True)
        cells = [written(found[key], scale, digits) for key, scale, digits in scales]
        lines.append(f"| {variant} | {found['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(found: dict[str, float | None], scale: int, digits: int) -> str:
    """Mean ± standard deviation; a single run has no spread."""
    mean, sd = found["mean"], found["sd"]
    if mean is None:
        return ""
    return f"{scale * mean:.{digits}f}" + ("" if sd is None else f" ± {scale * sd:.{digits}f}")


if __name__ == "__main__":
    main()
