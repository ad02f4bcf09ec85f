"""What each choice is worth, on digits: three folds inside the training images; the hold-out stays unseen.

    python benchmarks/ablations.py --json benchmarks/results/ablations.json

The digits recipe with one setting changed at a time. Every fold trains its own teacher on two thirds of the 1,197
training images, and measures students on the last third.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import StratifiedKFold

from nayer_edge import data, evaluate, lte, provenance
from nayer_edge.compute import choose, random_stream, seeded
from nayer_edge.config import Recipe
from nayer_edge.data import LabelledImages
from nayer_edge.distill import Distillation, Settings, distill
from nayer_edge.models import Classifier, build_classifier
from nayer_edge.pipelines.recipe import load_recipe
from nayer_edge.teach import teach

STUDIES: dict[str, dict[str, list[str]]] = {
    "views": {
        "every crop anew": ["distill.views=0"],
        "16 views": ["distill.views=16"],
        "4 views": ["distill.views=4"],
    },
    "embeddings": {
        "MiniLM": [],
        "one-hot": ["lte.encoder=onehot"],
        "random": ["lte.encoder=random"],
    },
    "bn momentum": {"0.9": [], "0 (off)": ["synthesis.bn_momentum=0"]},
    "adversarial": {"1.33": [], "0 (off)": ["synthesis.lambda_adv=0"]},
}


def main() -> None:
    """Runs the studies that are asked for, and writes their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", action="append", choices=list(STUDIES))
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="A.B=C", help="of every run, as smaller sizes"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    teachers = [fold(number) for number in range(arguments.folds)]
    found: dict[str, Any] = {}
    for study in arguments.study or STUDIES:
        found[study] = {}
        for name, settings in STUDIES[study].items():
            recipe = load_recipe("digits", [*arguments.settings, *settings])
            runs = [one(recipe, seed, *teacher) for seed, teacher in enumerate(teachers)]
            found[study][name] = summary(runs)
            print(study, "|", name, "|", json.dumps(found[study][name]), flush=True)
            if arguments.json:
                save(arguments.json, found, [teacher[3] for teacher in teachers])


def fold(number: int) -> tuple[Classifier, torch.Tensor, torch.Tensor, float]:
    """A teacher of one fold, and the images that it did not see."""
    recipe = load_recipe("digits")
    assert recipe.teach is not None
    images = data.load("digits", "train", recipe.teacher.input, recipe.teacher.classes)
    folds = StratifiedKFold(3, shuffle=True, random_state=1).split(images.images, images.labels)
    seen, unseen = list(folds)[number]
    with seeded(random_stream(number, "teacher").initial_seed()):
        teacher = build_classifier(recipe.teacher.model, recipe.teacher.input, recipe.teacher.classes)
    part = LabelledImages(images.images[seen], images.labels[seen], "fold")
    compute = choose(recipe.device, recipe.precision)
    teach(teacher, part, recipe.teach, compute, number)
    accuracy = evaluate.top1(evaluate.logits_of(teacher, images.images[unseen], compute), images.labels[unseen])
    return teacher, images.images[unseen], images.labels[unseen], accuracy


def one(
    recipe: Recipe,
    seed: int,
    teacher: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    _accuracy: float,
) -> dict[str, float]:
    """One student."""
    compute = choose(recipe.device, recipe.precision)
    embeddings = lte.build(recipe.teacher.classes, recipe.lte)
    with seeded(random_stream(seed, "student").initial_seed()):
        student = build_classifier(recipe.student.model, teacher.spec, teacher.classes)
    run = Distillation(
        teacher, embeddings, student, Settings(recipe.generator, recipe.synthesis, recipe.distill, seed), compute
    )
    began = time.perf_counter()
    distill(run)
    return {
        "top1": evaluate.top1(evaluate.logits_of(student, images, compute), labels),
        "agreement": run.history[-1].agreement,
        "bank_images": len(run.bank),
        "loss_ce": run.history[-1].loss_ce,
        "seconds": time.perf_counter() - began,
    }


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and spread of each figure."""
    return {
        key: {
            "mean": round(statistics.mean(run[key] for run in runs), 4),
            "sd": round(statistics.stdev(run[key] for run in runs), 4) if len(runs) > 1 else None,
        }
        for key in runs[0]
    }


def save(path: Path, found: dict[str, Any], teachers: list[float]) -> None:
    """Writes what there is so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "studies": found,
        "teacher_top1": teachers,
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "command": "python benchmarks/ablations.py " + " ".join(sys.argv[1:]),
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
