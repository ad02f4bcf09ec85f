"""The student's phase alone, replayed on the images of a finished run: what a full bank forgets, views, mixtures.

    python benchmarks/replay.py runs/digits --json benchmarks/results/replay.digits.json
    NAYER_EDGE_DATA=… python benchmarks/replay.py runs/cifar10-w402-w161-e100-cpu-study-s0 \\
        --train "$NAYER_EDGE_DATA/cifar10/train.parquet" --first 5000 --json benchmarks/results/replay.cifar10.json

A run's memory bank, where it never was full, holds every image in the order in which it was made. Here the rounds come
in that order, at the epochs at which they came, without being synthesised again, so that many students cost what one
run does. What is left out: in a run, the next images also depend on the student (L_adv).

Measured by agreement with the teacher on real images that no student has seen: the images that the teacher was trained
on, which the hold-out is not part of. Three seeds: weights, draws and augmentation of the student.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shared.figures import keep, kept, spread
from shared.origin import origin

from nayer_edge.data import datasets as data
from nayer_edge.data.datasets import LabelledImages
from nayer_edge.distillation import Distillation, Settings, distill
from nayer_edge.labels import embeddings as lte
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier
from nayer_edge.pipelines.recipes.loading import recipe_of
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime.compute import Compute, random_stream, seeded
from nayer_edge.storage.run_folder import RunFolder
from nayer_edge.synthesis import Round
from nayer_edge.training.cached_views import ViewCache
from nayer_edge.training.evaluate import agreement, logits_of, top1

STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "full bank": {
        "unbounded": {},
        "a quarter: the oldest leave (shipped)": {"share": 0.25},
        "a quarter: random ones leave": {"share": 0.25, "policy": "random"},
        "a quarter: a uniform sample of all stays": {"share": 0.25, "policy": "reservoir"},
        "a quarter: new ones do not enter": {"share": 0.25, "policy": "newest"},
    },
    "views of an image": {"16": {"views": 16}, "4": {"views": 4}, "1": {"views": 1}, "every crop anew": {"views": 0}},
    "mixed views": {"none": {"mixup": 0.0}, "half of them": {"mixup": 0.5}},
}


class OtherPolicy(MemoryBank):
    """A bank that, when full, does not forget its oldest images: to compare with, and not shipped.

    "random" overwrites any places; "reservoir" keeps a uniform sample of all images ever made (Vitter 1985,
    Algorithm R); "newest" keeps what came first.
    """

    def __init__(self, shape: tuple[int, int, int], budget_bytes: int, policy: str, seed: int) -> None:
        super().__init__(shape, budget_bytes, torch.device("cpu"))
        self._policy, self._random = policy, random_stream(seed, "policy")
        self.views: ViewCache | None = None

    def add(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Like the bank's own until it is full, and then by the policy."""
        room = self.capacity - len(self)
        if room > 0:
            super().add(images[:room], labels[:room])
            images, labels = images[room:], labels[room:]
        if self._policy == "newest" or not len(images):
            return
        for image, label in zip(images, labels, strict=True):
            self.added += 1
            bound = self.added if self._policy == "reservoir" else self.capacity
            place = int(torch.randint(0, bound, (), generator=self._random))
            if place < self.capacity:
                self._images[place], self._labels[place] = image, label
                if self.views is not None and place < len(self.views._known):
                    # The cache knows only that the oldest leave.
                    self.views._known[place] = False


class Replay(Distillation):
    """A distillation whose rounds were made before.

    Args:
        made: the bank that holds them.
        seen: real images on which student and teacher are compared after every epoch.
    """

    def __init__(self, *parts: Any, made: MemoryBank, seen: torch.Tensor) -> None:
        super().__init__(*parts)
        self._made, self._seen, self._next, self._rounds = made, seen, 0, 0

    def _round(self, *_: Any, **__: Any) -> Round:
        """The next round in the bank; for one that never entered it, any images, which are not kept either."""
        config, number = self.settings.synthesis, self._rounds - self.settings.synthesis.discard_rounds
        self._rounds += 1
        start = min(self._next, len(self._made) - config.batch)
        place = slice(start, start + config.batch)
        if number >= 0 and not self.reserved(number):
            self._next += config.batch
        return Round(self._made.images[place], self._made.labels[place], torch.zeros(3))

    def _make_holdout(self) -> None:
        self.holdout = self._seen


@dataclass(frozen=True)
class Case:
    """What all students have in common: the run, and real images with the teacher's answers."""

    run: RunFolder
    recipe: Recipe
    teacher: Classifier
    made: MemoryBank
    seen: LabelledImages
    answers: torch.Tensor
    compute: Compute


def main() -> None:
    """Runs the studies, every choice with a seed before any with the next; prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--study", action="append", choices=list(STUDIES))
    parser.add_argument("--train", help="images that the teacher was trained on, as teach.data; the recipe's own")
    parser.add_argument("--first", type=int, help="so many of them; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="to share the seeds between machines")
    parser.add_argument("--json", type=Path, help="runs that it holds already are not repeated")
    arguments = parser.parse_args()
    case = case_of(arguments.run, arguments.train, arguments.first)
    runs: list[dict[str, Any]] = kept(arguments.json).get("runs", [])
    for study in arguments.study or STUDIES:
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for name, choice in STUDIES[study].items():
                asked = {**unchanged(case.recipe), **choice}
                if any((each["choice"], each["seed"]) == (asked, seed) for each in runs):
                    continue
                runs.append({"choice": asked, "seed": seed, **one(case, asked, seed)})
                print(f"{study} | {name} | {json.dumps(runs[-1])}", flush=True)
                keep(arguments.json, result(case, runs))
    # Runs that were made elsewhere may have joined the file.
    keep(arguments.json, result(case, runs))


def case_of(folder: Path, train: str | None, first: int | None) -> Case:
    """A finished run and `first` of the images that its teacher was trained on."""
    run = RunFolder.open(folder)
    recipe = recipe_of(run.manifest.recipe, run.root)
    made = MemoryBank.load(run.path(run.artifact("student").files["bank"]), torch.device("cpu"))
    assert made.added == len(made), "the bank was full: its first images are gone"
    where = train or (recipe.teach.data if recipe.teach else None)
    assert where is not None, "--train is needed: the recipe does not say on which images its teacher was trained"
    seen = data.load(where, "train", recipe.teacher.input, recipe.teacher.classes)
    seen = LabelledImages(seen.images[:first], seen.labels[:first], seen.name)
    compute = computing.choose("cpu", recipe.precision)
    teacher = load_classifier(run.path(run.artifact("teacher").files["teacher"]))
    return Case(run, recipe, teacher, made, seen, logits_of(teacher, seen.images, compute), compute)


def unchanged(recipe: Recipe) -> dict[str, Any]:
    """The choice that a recipe makes, with a bank that is never full."""
    return {"share": 1.0, "policy": "ring", "views": recipe.distill.views, "mixup": recipe.distill.mixup}


def one(case: Case, choice: dict[str, Any], seed: int) -> dict[str, float]:
    """One student."""
    teacher, spec = case.teacher, case.teacher.spec
    embeddings = lte.load(case.run.path(case.run.artifact("lte").files["lte"]))
    config = case.recipe.distill.model_copy(update={"views": choice["views"], "mixup": choice["mixup"]})
    with seeded(random_stream(seed, "student").initial_seed()):
        student = build_classifier(case.recipe.student.model, spec, teacher.classes)
    settings = Settings(case.recipe.generator, case.recipe.synthesis, config, seed)
    # What is compared after every epoch is not what is measured; the teacher's answers for that are kept.
    replay = Replay(teacher, embeddings, student, settings, case.compute, made=case.made, seen=case.seen.images[:100])
    room = int(choice["share"] * len(case.made)) * spec.channels * spec.height * spec.width
    other = None if choice["policy"] == "ring" else OtherPolicy(spec.shape, room, choice["policy"], seed)
    replay.bank = MemoryBank(spec.shape, room, torch.device("cpu")) if other is None else other
    if replay.views is not None:
        order = replay._stream("views")
        replay.views = ViewCache(replay.bank, config.augment, config.views, teacher, case.compute, order, config.mixup)
        if other is not None:
            other.views = replay.views
    began = time.perf_counter()
    trained = distill(replay)
    seconds = time.perf_counter() - began
    logits = logits_of(trained, case.seen.images, case.compute)
    last = replay.history[-1]
    assert last.loss_kd is not None
    return {
        "agreement_on_real_images": float(agreement(logits, case.answers)),
        "top1": top1(logits, case.seen.labels),
        "loss_kd": last.loss_kd,
        "bank_images": len(replay.bank),
        "seconds": seconds,
    }


def result(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What there is so far: mean and spread by study, and every run."""
    studies: dict[str, Any] = {}
    for study, choices in STUDIES.items():
        for name, choice in choices.items():
            found = [each for each in runs if each["choice"] == {**unchanged(case.recipe), **choice}]
            if found:
                studies.setdefault(study, {})[name] = {
                    "seeds": len(found),
                    **{key: spread([each[key] for each in found]) for key in found[0] if key not in ("choice", "seed")},
                }
    return {
        "run": case.run.root.name,
        "student": case.recipe.student.model,
        "images_made": len(case.made),
        "real_images": len(case.seen.images),
        "distill": case.recipe.distill.model_dump(mode="json"),
        "studies": studies,
        "runs": runs,
        **origin(),
    }


if __name__ == "__main__":
    main()
