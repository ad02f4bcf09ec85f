"""What gives the best student for the time: candidates beside each other, judged on real images of the training split.

    NAYER_EDGE_DATA=… python benchmarks/search.py RUN --data "$NAYER_EDGE_DATA/cifar10/train.parquet" --seeds 0,1 \\
        --student nayer:wrn_16_1 --candidates "base,no adversary" --json benchmarks/results/search.cifar10.json

RUN is a run folder with a finished teacher. The last 5,000 images of the training split judge: no test image chooses
anything, and no real image reaches the student. Every candidate is the schedule `base` with a few values changed. The
images and student steps of all candidates cost about the same. `seconds` is wall-clock time: compare it only on a quiet
machine.

A row is written as soon as it is finished, and rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from figures import keep, kept
from origin import origin

from nayer_edge.config import LTE, Distill, Generator, Synthesis
from nayer_edge.data import datasets
from nayer_edge.distillation import Distillation, Settings
from nayer_edge.evaluate import logits_of, top1
from nayer_edge.labels import embeddings
from nayer_edge.models.load import build_classifier, load_classifier, raise_bn_momentum
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime.compute import random_stream, seeded

JUDGES = 5000
"""images of the training split, its last ones"""
BASE: dict[str, dict[str, Any]] = {
    "generator": {"channels": 32},
    "synthesis": {"batch": 100, "g_steps": 5, "rounds": 6, "warmup_rounds": 25, "g_life": 100_000, "lr": 4e-3},
    "distill": {
        **{
            "epochs": 28,
            "warmup_epochs": 4,
            "steps": 50,
            "batch": 256,
            "optimizer": "muon",
            "lr": 0.1,
            "muon_lr": 0.05,
        },
        **{"schedule": "constant", "decay_epochs": 6, "weight_decay": 5e-4, "views": 4, "holdout_rounds": 1},
    },
}
"""about 21,000 images and 1,200 student steps: two minutes of student, and as long for the images"""
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    "base": {},
    "sgd": {"distill": {"optimizer": "sgd"}},
    "cosine": {"distill": {"schedule": "cosine", "decay_epochs": 0}},
    "decay of half": {"distill": {"decay_epochs": 12}},
    "filled first": {"synthesis": {"warmup_rounds": 50, "rounds": 1}},
    "no adversary": {"synthesis": {"lambda_adv": 0.0}},
    "adversary × 2": {"synthesis": {"lambda_adv": 2.66}},
    "3 steps a round": {"synthesis": {"g_steps": 3, "rounds": 10, "warmup_rounds": 42}},
    "10 steps a round": {"synthesis": {"g_steps": 10, "rounds": 3, "warmup_rounds": 12}},
    "rate × 2": {"synthesis": {"lr": 8e-3}},
    "L_bn × 3": {"synthesis": {"lambda_bn": 30.0}},
    "no memory of statistics": {"synthesis": {"bn_momentum": 0.0}},
    "generator anew every 5 epochs": {"synthesis": {"g_life": 5}},
    "first 40 rounds dropped": {"synthesis": {"discard_rounds": 40}},
    "batch 200": {"synthesis": {"batch": 200, "rounds": 3, "warmup_rounds": 12}},
    "mixup of half": {"distill": {"mixup": 0.5}},
    "one view": {"distill": {"views": 1}},
    "16 views": {"distill": {"views": 16}},
    "temperature 4": {"distill": {"temperature": 4.0}},
    "temperature 8": {"distill": {"temperature": 8.0}},
    "half batch, twice the steps": {"distill": {"batch": 128, "steps": 100}},
    "muon .1": {"distill": {"muon_lr": 0.1}},
    "muon .025": {"distill": {"muon_lr": 0.025}},
    "wide generator": {"generator": {"channels": 64}},
    "one-hot": {"lte": {"encoder": "onehot"}},
    "no class term": {"synthesis": {"lambda_ce": 0.0}},
}


def settings_of(candidate: str, seed: int) -> tuple[Settings, LTE]:
    """The numbers of a candidate."""
    changes = CANDIDATES[candidate]
    parts = [
        kind.model_validate({**BASE.get(name, {}), **changes.get(name, {})})
        for name, kind in (("generator", Generator), ("synthesis", Synthesis), ("distill", Distill))
    ]
    return Settings(*parts, seed), LTE(**changes.get("lte", {}))


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--student", default="nayer:wrn_16_1")
    parser.add_argument("--candidates", default=",".join(CANDIDATES))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    compute = computing.choose()
    teacher_file = given.run / "teacher" / "teacher.safetensors"
    teacher = load_classifier(teacher_file)
    judges = datasets.load(given.data, "holdout", teacher.spec, teacher.classes)
    images, labels = judges.images[-JUDGES:].to(compute.device), judges.labels[-JUDGES:].to(compute.device)
    figures = kept(given.json) or {**origin(), "student": given.student, "rows": {}}
    figures["teacher"] = float(top1(logits_of(compute.place(teacher).eval(), images, compute), labels))
    for seed in (int(text) for text in given.seeds.split(",")):
        for candidate in given.candidates.split(","):
            if f"{candidate}/{seed}" in figures["rows"]:
                continue
            figures["rows"][f"{candidate}/{seed}"] = row(
                candidate, seed, given.student, teacher_file, images, labels, compute
            )
            keep(given.json, figures)
            print(candidate, seed, figures["rows"][f"{candidate}/{seed}"], flush=True)


def row(
    candidate: str,
    seed: int,
    student_name: str,
    teacher_file: Path,
    images: torch.Tensor,
    labels: torch.Tensor,
    compute: computing.Compute,
) -> dict[str, Any]:
    """One student: accuracy in percent at the end and before the decay, images, losses and seconds."""
    settings, lte = settings_of(candidate, seed)
    teacher = load_classifier(teacher_file)
    with seeded(random_stream(seed, "student").initial_seed()):
        student = build_classifier(student_name, teacher.spec, teacher.classes)
    raise_bn_momentum(student)
    run = Distillation(teacher, embeddings.build(teacher.classes, lte), student, settings, compute)
    curve: list[tuple[int, float]] = []
    began, synthesis_seconds = time.perf_counter(), 0.0
    while not run.finished:
        epoch = run.run_epoch()
        if epoch.phase == "warmup":
            synthesis_seconds += epoch.seconds
        elif (run.epoch - settings.distill.warmup_epochs) % 6 == 0 or run.epoch == run.decay_start:
            curve.append((run.epoch, round(100 * float(top1(logits_of(run.student, images, compute), labels)), 2)))
    return {
        "top1": curve[-1][1],
        "curve": curve,
        "images": run.bank.added,
        "steps": (settings.distill.epochs - settings.distill.warmup_epochs) * settings.distill.steps,
        "loss_bn": run.history[settings.distill.warmup_epochs - 1].loss_bn,
        "loss_ce": run.history[settings.distill.warmup_epochs - 1].loss_ce,
        "synthetic_agreement": run.history[-1].agreement,
        "seconds": round(time.perf_counter() - began, 1),
        "warmup_seconds": round(synthesis_seconds, 1),
    }


if __name__ == "__main__":
    main()
