"""What the missing images cost: the student of a finished run, trained again on real images.

    NAYER_EDGE_DATA=… python benchmarks/real_images.py runs/cifar10-w402-w161-e100-cpu-study-s0 \\
        --train "$NAYER_EDGE_DATA/cifar10/train.parquet" --json benchmarks/results/real_images.cifar10.json

The same student, step for step as many as in the run, three ways:

- synthetic images: the run's own, replayed in the order in which they were made;
- as many real training images in their place, unlabelled, with the teacher's predictions as for the synthetic ones;
- labels: all training images and their labels, no teacher, as many images in all as the run's steps took
  (`teach`'s optimiser, with the recipe's own learning rate for training on labels).

Measured on the run's hold-out, which no student has seen. The run's own student stands beside them: its images also
depended on the student that they were made for. Nothing is chosen here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from replay import Replay
from shared.figures import keep, kept, spread
from shared.origin import origin

from nayer_edge.config import Teach
from nayer_edge.data import datasets as data
from nayer_edge.data.datasets import LabelledImages
from nayer_edge.distillation import Settings, distill
from nayer_edge.labels import embeddings as lte
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier
from nayer_edge.pipelines.recipes.loading import recipe_of
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime.compute import Compute, random_stream, seeded
from nayer_edge.storage.run_folder import RunFolder
from nayer_edge.train_teacher import teach
from nayer_edge.training import evaluate

WAYS = ("synthetic images", "as many real images", "labels of all real images")


def main() -> None:
    """Runs every way with every seed, prints as it goes, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--train", help="labelled training images, as teach.data; the recipe's own by default")
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="to share the seeds between machines")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = RunFolder.open(arguments.run)
    recipe = as_run(recipe_of(run.manifest.recipe, run.root), run)
    where = arguments.train or (recipe.teach.data if recipe.teach else None)
    assert where is not None, "--train is needed: the recipe does not say where training images are"
    train = data.load(where, "train", recipe.teacher.input, recipe.teacher.classes)
    holdout = data.load(str(recipe.validate_.data), "holdout", recipe.teacher.input, recipe.teacher.classes)
    compute = computing.choose("cpu", recipe.precision)
    teacher = compute.place(load_classifier(run.path(run.artifact("teacher").files["teacher"])))
    own = load_classifier(run.path(run.artifact("student").files["student"]))
    found: dict[str, Any] = {
        "the run's own student": evaluate.top1(evaluate.logits_of(own, holdout.images, compute), holdout.labels)
    }
    runs: list[dict[str, Any]] = kept(arguments.json).get("runs", [])
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for way in arguments.way or WAYS:
            if any((each["way"], each["seed"]) == (way, seed) for each in runs):
                continue
            began = time.perf_counter()
            student = taught(way, run, recipe, teacher, train, compute, seed)
            logits = evaluate.logits_of(student, holdout.images, compute)
            runs.append(
                {
                    "way": way,
                    "seed": seed,
                    "top1": evaluate.top1(logits, holdout.labels),
                    "seconds": time.perf_counter() - began,
                }
            )
            print(json.dumps(runs[-1]), flush=True)
            keep(arguments.json, result(run, recipe, found, runs, len(holdout.images)))
    # Runs that were made elsewhere may have joined the file.
    keep(arguments.json, result(run, recipe, found, runs, len(holdout.images)))


def as_run(recipe: Recipe, run: RunFolder) -> Recipe:
    """The recipe with the length that the run had: one with a budget changes its length if time runs short."""
    if recipe.distill.schedule != "constant":
        return recipe
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    length = {
        "epochs": len(lines),
        "warmup_epochs": sum(line["phase"] == "warmup" for line in lines),
        "decay_epochs": sum(line["phase"] == "distill" and line["loss_bn"] is None for line in lines),
    }
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update=length)})


def taught(
    way: str,
    run: RunFolder,
    recipe: Recipe,
    teacher: Classifier,
    train: LabelledImages,
    compute: Compute,
    seed: int,
) -> Classifier:
    """One student."""
    with seeded(random_stream(seed, "student").initial_seed()):
        student = build_classifier(recipe.student.model, teacher.spec, teacher.classes)
    if way == WAYS[2]:
        config = recipe.teach or Teach(data="")
        seen = recipe.distill.batch * recipe.distill.steps * (recipe.distill.epochs - recipe.distill.warmup_epochs)
        passes = max(1, round(seen / len(train.images)))
        return teach(student, train, config.model_copy(update={"epochs": passes}), compute, seed)
    made = MemoryBank.load(run.path(run.artifact("student").files["bank"]), torch.device("cpu"))
    assert made.added == len(made), "the bank was full: its first images are gone"
    if way == WAYS[1]:
        order = torch.randperm(len(train.images), generator=random_stream(seed, "real images"))[: len(made)]
        made.refill(train.images[order], train.labels[order], len(order))
    replay = Replay(
        teacher,
        lte.load(run.path(run.artifact("lte").files["lte"])),
        student,
        Settings(recipe.generator, recipe.synthesis, recipe.distill, seed),
        compute,
        made=made,
        # Nothing is chosen by it; `Replay` compares on these after every epoch.
        seen=made.images[:100],
    )
    return distill(replay)


def result(run: RunFolder, recipe: Recipe, found: dict[str, Any], runs: list[dict[str, Any]], n: int) -> dict[str, Any]:
    """What there is so far."""
    by_way: dict[str, list[float]] = {}
    for each in runs:
        by_way.setdefault(each["way"], []).append(each["top1"])
    ways = {way: {"seeds": len(values), **spread(values)} for way, values in by_way.items()}
    return {
        "run": run.root.name,
        "student": recipe.student.model,
        "images": n,
        "distill": recipe.distill.model_dump(mode="json"),
        **found,
        "ways": ways,
        "runs": runs,
        **origin(),
    }


if __name__ == "__main__":
    main()
