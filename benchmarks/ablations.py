"""What each choice of the method is worth: one changed at a time, three seeds each.

    python benchmarks/ablations.py digits --json benchmarks/results/ablations.digits.json
    NAYER_EDGE_DATA=… python benchmarks/ablations.py cifar10 --json benchmarks/results/ablations.cifar10.json

digits: the shipped recipe. A seed is a fold inside the 1,197 training images: it trains its own teacher on two thirds
of them, and its students are measured on the last third. The hold-out stays unseen.

cifar10: the WRN-40-2 of $NAYER_EDGE_DATA and a WRN-16-1, scaled down to minutes on two cores (`CIFAR10`), measured on
the 10,000 test images. Its figures compare with each other only.

The synthetic hold-out of one variant is not that of another, so students are compared on real images: accuracy, and
agreement with the teacher. Nothing is chosen here. Every variant has its first seed before any has its second; runs
that the JSON file holds already are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from origin import commit, origin
from sklearn.model_selection import StratifiedKFold

from nayer_edge import data, evaluate, lte
from nayer_edge.artefacts import write_json
from nayer_edge.compute import Compute, choose, random_stream, seeded
from nayer_edge.config import Recipe
from nayer_edge.data import LabelledImages
from nayer_edge.distill import Distillation, Settings, distill
from nayer_edge.generator import Generator
from nayer_edge.models import Classifier, build_classifier, load_classifier
from nayer_edge.pipelines.recipe import load_recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.teach import teach

DRAWN_ONCE = "noisy layer drawn once"
CLIP = "CLIP instead of MiniLM"
VARIANTS: dict[str, list[str]] = {
    "as shipped": [],
    CLIP: ['lte.encoder="$NAYER_EDGE_DATA/lte/clip-vit-b32-cifar10.safetensors"'],
    "one-hot instead of MiniLM": ["lte.encoder=onehot"],
    "random instead of MiniLM": ["lte.encoder=random"],
    DRAWN_ONCE: [],
    "BatchNorm momentum off": ["synthesis.bn_momentum=0"],
    "no adversarial loss": ["synthesis.lambda_adv=0"],
    "every crop anew": ["distill.views=0"],
    "4 views of an image": ["distill.views=4"],
}
# 14 rounds of 15 steps, 560 images, 400 student steps of 64.
CIFAR10 = [
    "synthesis.batch=40",
    "synthesis.g_steps=15",
    "synthesis.warmup_rounds=3",
    "synthesis.rounds=2",
    "distill.warmup_epochs=2",
    "distill.epochs=6",
    "distill.steps=100",
    "distill.batch=64",
    "distill.lr=0.05",
]
FIGURES = ("top1", "agreement_on_real_images", "loss_ce", "loss_bn", "seconds")


@dataclass(frozen=True)
class Case:
    """A teacher, and real images that it did not see, with its answers to them."""

    teacher: Classifier
    images: LabelledImages
    logits: torch.Tensor


def main() -> None:
    """Runs what is asked for, prints it as it comes, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("on", choices=["digits", "cifar10"])
    parser.add_argument("--variant", action="append", choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="A.B=C", help="of every run, as smaller sizes"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    variants = arguments.variant or [name for name in VARIANTS if name != CLIP or arguments.on == "cifar10"]
    kept = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.is_file() else {}
    runs: list[dict[str, Any]] = kept.get("runs", [])
    for seed in range(arguments.seeds):
        for variant in variants:
            if any((run["variant"], run["seed"]) == (variant, seed) for run in runs):
                continue
            recipe = recipe_for(arguments.on, [*arguments.settings, *VARIANTS[variant]])
            runs.append({"variant": variant, "seed": seed, **one(recipe, case(arguments.on, seed), variant, seed)})
            print(json.dumps(runs[-1]), flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                write_json(arguments.json, result(arguments, runs))
    print(table(runs))


def recipe_for(on: str, settings: list[str]) -> Recipe:
    """The recipe with these settings."""
    if on == "digits":
        return load_recipe("digits", settings)
    teacher = Path(os.environ["NAYER_EDGE_DATA"]) / "teachers" / "wrn40_2_cifar10.safetensors"
    return load_recipe("cifar10-w402-w161-e100", [*CIFAR10, f"teacher.weights={json.dumps(str(teacher))}", *settings])


@functools.lru_cache(maxsize=1)
def case(on: str, seed: int) -> Case:
    """Of the digits every seed has its own teacher and images."""
    recipe = recipe_for(on, [])
    compute = choose(recipe.device, recipe.precision)
    if on == "digits":
        teacher, images = fold(recipe, compute, seed)
    else:
        folder = Path("runs") / "ablations-teacher"
        run = run_recipe(recipe, folder, last="teacher")
        teacher = load_classifier(run.path(run.artifact("teacher").files["teacher"]))
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


def one(recipe: Recipe, on: Case, variant: str, seed: int) -> dict[str, Any]:
    """One student."""
    compute = choose(recipe.device, recipe.precision)
    embeddings = lte.build(recipe.teacher.classes, recipe.lte)
    with seeded(random_stream(seed, "student").initial_seed()):
        student = build_classifier(recipe.student.model, on.teacher.spec, on.teacher.classes)
    run = Distillation(
        on.teacher, embeddings, student, Settings(recipe.generator, recipe.synthesis, recipe.distill, seed), compute
    )
    if variant == DRAWN_ONCE:
        draw_once(run.generator)
    began = time.perf_counter()
    distill(run)
    logits = evaluate.logits_of(student, on.images.images, compute)
    return {
        "teacher_top1": evaluate.top1(on.logits, on.images.labels),
        "top1": evaluate.top1(logits, on.images.labels),
        "agreement_on_real_images": float(evaluate.agreement(logits, on.logits)),
        "bank_images": len(run.bank),
        "loss_ce": run.history[-1].loss_ce,
        "loss_bn": run.history[-1].loss_bn,
        "seconds": time.perf_counter() - began,
        "compute": compute.reason,
        "commit": commit(),
    }


def draw_once(generator: Generator) -> None:
    """Later rounds go on with the noisy layer of the first, which is trained like every other."""
    draw, drawn = generator.noisy.redraw, False

    def redraw(random: torch.Generator) -> None:
        nonlocal drawn
        if not drawn:
            draw(random)
        drawn = True

    generator.noisy.redraw = redraw


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of each figure, by variant."""
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(run)
    return {
        variant: {"seeds": len(group)}
        | {
            key: {
                "mean": statistics.mean(run[key] for run in group),
                "sd": statistics.stdev(run[key] for run in group) if len(group) > 1 else None,
            }
            for key in FIGURES
        }
        for variant, group in by_variant.items()
    }


def result(arguments: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What there is so far."""
    settings = [*(CIFAR10 if arguments.on == "cifar10" else []), *arguments.settings]
    return {"on": arguments.on, "settings": settings, "summary": summary(runs), "runs": runs, **origin()}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, rates in per cent."""
    lines = [
        "| | seeds | top-1, % | agrees with the teacher, % | L_ce, last epoch | L_bn, last epoch |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for variant, found in summary(runs).items():
        cells = [spread(found[key], 100, 2) for key in FIGURES[:2]] + [spread(found[key], 1, 3) for key in FIGURES[2:4]]
        lines.append(f"| {variant} | {found['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(found: dict[str, float | None], scale: int, digits: int) -> str:
    """Mean ± standard deviation; a single run has no spread."""
    mean, sd = found["mean"], found["sd"]
    assert mean is not None
    return f"{scale * mean:.{digits}f}" + ("" if sd is None else f" ± {scale * sd:.{digits}f}")


if __name__ == "__main__":
    main()
