"""The student's phase alone, replayed on the images of a finished run: what a full bank forgets, how many views.

    python benchmarks/replay.py runs/digits --json benchmarks/results/replay.digits.json

A run's memory bank, where it never was full, holds every image in the order in which it was made. Here the rounds come
in that order, at the epochs at which they came, without being synthesised again, so that many students cost what one
run does. What is left out: in a run, the next images also depend on the student (L_adv).

Measured by agreement with the teacher on real images that no student has seen: the images that the teacher was trained
on, which the hold-out is not part of. Three seeds: weights, draws and augmentation of the student.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from origin import origin

from nayer_edge import compute as computing
from nayer_edge import data, lte
from nayer_edge.artefacts import RunFolder, write_json
from nayer_edge.bank import MemoryBank
from nayer_edge.compute import random_stream, seeded
from nayer_edge.config import Recipe
from nayer_edge.distill import Distillation, Settings, distill
from nayer_edge.models import build_classifier, load_classifier
from nayer_edge.pipelines.recipe import recipe_of
from nayer_edge.synthesis import Round
from nayer_edge.views import ViewCache

STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "full bank": {
        "unbounded": {},
        "a quarter: the oldest leave (shipped)": {"share": 0.25},
        "a quarter: random ones leave": {"share": 0.25, "policy": "random"},
        "a quarter: a uniform sample of all stays": {"share": 0.25, "policy": "reservoir"},
        "a quarter: new ones do not enter": {"share": 0.25, "policy": "newest"},
    },
    "views of an image": {"every crop anew": {"views": 0}, "16": {"views": 16}, "4": {"views": 4}, "1": {"views": 1}},
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
        self._made, self._seen, self._next = made, seen, 0

    def _round(self, *_: Any, **__: Any) -> Round:
        place = slice(self._next, self._next + self.settings.synthesis.batch)
        self._next = place.stop
        return Round(self._made.images[place], self._made.labels[place], torch.zeros(3))

    def _make_holdout(self) -> None:
        self.holdout = self._seen


def main() -> None:
    """Runs the studies, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--study", action="append", choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = RunFolder.open(arguments.run)
    recipe = recipe_of(run.manifest.recipe, run.root)
    bank = MemoryBank.load(run.path(run.artifact("student").files["bank"]), torch.device("cpu"))
    assert bank.added == len(bank), "the bank was full: its first images are gone"
    where = recipe.teach.data if recipe.teach else None
    assert where is not None, "the recipe does not say on which images its teacher was trained"
    seen = data.load(where, "train", recipe.teacher.input, recipe.teacher.classes).images
    found: dict[str, dict[str, Any]] = {}
    for study in arguments.study or STUDIES:
        found[study] = {}
        for name, choice in STUDIES[study].items():
            runs = [one(run, recipe, bank, seen, choice, seed) for seed in range(arguments.seeds)]
            found[study][name] = {
                key: {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
                for key in runs[0]
                for values in [[one_run[key] for one_run in runs]]
            }
            print(f"{study} | {name} | {json.dumps(found[study][name])}", flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                write_json(arguments.json, result(recipe, len(bank), len(seen), found))


def one(
    run: RunFolder, recipe: Recipe, bank: MemoryBank, seen: torch.Tensor, choice: dict[str, Any], seed: int
) -> dict[str, float]:
    """One student."""
    teacher = load_classifier(run.path(run.artifact("teacher").files["teacher"]))
    embeddings = lte.load(run.path(run.artifact("lte").files["lte"]))
    settings = recipe.distill.model_copy(update={"views": choice.get("views", recipe.distill.views)})
    with seeded(random_stream(seed, "student").initial_seed()):
        student = build_classifier(recipe.student.model, teacher.spec, teacher.classes)
    replay = Replay(
        teacher,
        embeddings,
        student,
        Settings(recipe.generator, recipe.synthesis, settings, seed),
        computing.choose("cpu", recipe.precision),
        made=bank,
        seen=seen,
    )
    room = int(choice.get("share", 1.0) * len(bank)) * teacher.spec.channels * teacher.spec.height * teacher.spec.width
    policy, cpu = choice.get("policy"), torch.device("cpu")
    other = OtherPolicy(teacher.spec.shape, room, policy, seed) if policy else None
    replay.bank = MemoryBank(teacher.spec.shape, room, cpu) if other is None else other
    if replay.views is not None:
        order = replay._stream("views")
        replay.views = ViewCache(replay.bank, settings.augment, settings.views, replay.teacher, replay.compute, order)
    if other is not None:
        other.views = replay.views
    began = time.perf_counter()
    distill(replay)
    last = replay.history[-1]
    assert last.loss_kd is not None
    return {
        "agreement_on_real_images": last.agreement,
        "loss_kd": last.loss_kd,
        "bank_images": len(replay.bank),
        "seconds": time.perf_counter() - began,
    }


def result(recipe: Recipe, images: int, seen: int, found: dict[str, Any]) -> dict[str, Any]:
    """What there is so far."""
    return {
        "run": recipe.name,
        "student": recipe.student.model,
        "images_made": images,
        "real_images": seen,
        "studies": found,
        **origin(),
    }


if __name__ == "__main__":
    main()
