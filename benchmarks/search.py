"""What gives the best student for the time: candidates beside each other, judged on real images of the training split.

    NAYER_EDGE_DATA=… python benchmarks/search.py RUN --data "$NAYER_EDGE_DATA/cifar10/train.parquet" --seeds 0,1 \\
        --student nayer:wrn_16_1 --banks runs/search --json benchmarks/results/search.cifar10.json

RUN is a run folder with a finished teacher. The last 5,000 images of the training split judge: no test image chooses
anything, and no real image reaches the student. Every candidate is the schedule `base` with a few values changed; it
costs about the same time as `base`. `seconds` is wall-clock time: compare it only on a quiet machine.

Candidates for the images make their own images with their own student. Candidates for the student train on the images
of `base` with the same seed, in the order in which they were made; compare them with `base, replayed`.

A row is written as soon as it is finished, and rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shared.figures import keep, kept, spread
from shared.origin import origin
from torch import Tensor

from nayer_edge import generator as generators
from nayer_edge.batchnorm import raise_bn_momentum
from nayer_edge.config import LTE, Distill, Generator, Synthesis
from nayer_edge.data import datasets
from nayer_edge.distillation import Distillation, Settings
from nayer_edge.labels import embeddings
from nayer_edge.memory_bank import MemoryBank, to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime.compute import random_stream, seeded
from nayer_edge.synthesis import Round
from nayer_edge.training.augment import crop_and_flip
from nayer_edge.training.evaluate import logits_of, top1

JUDGES = 5000
"""images of the training split, its last ones"""
BASE: dict[str, dict[str, Any]] = {
    "generator": {"channels": 32},
    "synthesis": {"batch": 100, "g_steps": 5, "rounds": 6, "warmup_rounds": 25, "g_life": 100_000, "lr": 4e-3},
    "distill": {
        **{"epochs": 28, "warmup_epochs": 4, "steps": 50, "batch": 256, "optimizer": "muon", "lr": 0.1},
        **{"muon_lr": 0.05, "schedule": "constant", "decay_epochs": 6, "weight_decay": 5e-4},
        **{"views": 4, "holdout_rounds": 1},
    },
}
"""about 21,000 images and 1,200 student steps"""


@dataclass(frozen=True)
class Candidate:
    """Changes to `BASE`.

    Attributes:
        changes: recipe section → key → value.
        replay: train on the images of `base`.
        reptile: fraction of a round's way that the generator keeps (Nichol et al. 2018, Reptile); 1: all of it.
        cutmix: fraction of the student's images that are CutMix mixtures (Yun et al., ICCV 2019), labelled by the
            teacher at every step.
        average: decay of a moving average of the student's weights, which is judged; 0: none.
        fresh_statistics: re-estimate the student's BatchNorm statistics on the bank at the end.
    """

    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    replay: bool = False
    reptile: float = 1.0
    cutmix: float = 0.0
    average: float = 0.0
    fresh_statistics: bool = False


def _images(**changes: dict[str, Any]) -> Candidate:
    return Candidate(changes)


def _student(**changes: Any) -> Candidate:
    return Candidate({"distill": changes}, replay=True)


CANDIDATES: dict[str, Candidate] = {
    "base": Candidate(),
    # the images
    "3 steps a round": _images(synthesis={"g_steps": 3, "rounds": 10, "warmup_rounds": 42}),
    "10 steps a round": _images(synthesis={"g_steps": 10, "rounds": 3, "warmup_rounds": 12}),
    "20 steps a round": _images(synthesis={"g_steps": 20, "rounds": 1, "warmup_rounds": 8}),
    "half the images, 1.8 × the steps": _images(synthesis={"rounds": 3, "warmup_rounds": 12}, distill={"steps": 90}),
    "half the images, 1.4 × the steps, decay of half": _images(
        synthesis={"rounds": 4, "warmup_rounds": 12}, distill={"steps": 70, "decay_epochs": 12}
    ),
    "a quarter of the images, 1.6 × the steps, decay of half": _images(
        synthesis={"rounds": 2, "warmup_rounds": 6}, distill={"steps": 80, "decay_epochs": 12}
    ),
    "1.4 × the images, half the steps": _images(synthesis={"rounds": 9, "warmup_rounds": 32}, distill={"steps": 25}),
    "wide generator": _images(generator={"channels": 64}),
    "narrow generator": _images(generator={"channels": 16}),
    "no adversary": _images(synthesis={"lambda_adv": 0.0}),
    "adversary × 2": _images(synthesis={"lambda_adv": 2.66}),
    "no class term": _images(synthesis={"lambda_ce": 0.0}),
    "rate × 2": _images(synthesis={"lr": 8e-3}),
    "L_bn × 3": _images(synthesis={"lambda_bn": 30.0}),
    "meta-learnt start": Candidate(reptile=0.5),
    "filled first": _images(synthesis={"warmup_rounds": 50, "rounds": 1}),
    "first 40 rounds dropped": _images(synthesis={"discard_rounds": 40}),
    "batch 200": _images(synthesis={"batch": 200, "rounds": 3, "warmup_rounds": 12}),
    "one-hot": _images(lte={"encoder": "onehot"}),
    "no memory of statistics": _images(synthesis={"bn_momentum": 0.0}),
    "generator anew every 5 epochs": _images(synthesis={"g_life": 5}),
    # the student, on the images of `base`
    "base, replayed": _student(),
    "sgd": _student(optimizer="sgd"),
    "sgd .4": _student(optimizer="sgd", lr=0.4),
    "muon .1": _student(muon_lr=0.1),
    "muon .025": _student(muon_lr=0.025),
    "mixup of half, kept": _student(mixup=0.5),
    "mixup of half, anew": _student(mixup=0.5, views=0),
    "CutMix of half, anew": Candidate(replay=True, cutmix=0.5),
    "one view": _student(views=1),
    "16 views": _student(views=16),
    "every view anew": _student(views=0),
    "temperature 4": _student(temperature=4.0),
    "temperature 8": _student(temperature=8.0),
    "half batch, twice the steps": _student(batch=128, steps=100),
    "twice the batch, half the steps": _student(batch=512, steps=25),
    "decay of half": Candidate({"distill": {"decay_epochs": 12}, "synthesis": {"rounds": 9}}, replay=True),
    "cosine": Candidate(
        {"distill": {"schedule": "cosine", "decay_epochs": 0}, "synthesis": {"rounds": 4}}, replay=True
    ),
    "no weight decay": _student(weight_decay=0.0),
    "weights averaged": Candidate(replay=True, average=0.99),
    "BatchNorm re-estimated": Candidate(replay=True, fresh_statistics=True),
}


class Trial(Distillation):
    """A distillation with a candidate's changes.

    Args:
        made: the images of `base`; None makes new ones.
    """

    def __init__(self, *parts: Any, candidate: Candidate, made: MemoryBank | None) -> None:
        super().__init__(*parts)
        self._candidate, self._made, self._next = candidate, made, 0
        self.average = copy.deepcopy(self.student) if candidate.average else None

    def _round(self, *parts: Any, **named: Any) -> Round:
        if self._made is not None:
            place = slice(self._next, self._next + self.settings.synthesis.batch)
            self._next = place.stop
            assert self._next <= len(self._made), "base made fewer images"
            return Round(self._made.images[place], self._made.labels[place], torch.zeros(3))
        if self._candidate.reptile == 1:
            return super()._round(*parts, **named)
        before = [tensor.clone() for tensor in generators.common_state(self.generator)]
        made = super()._round(*parts, **named)
        with torch.no_grad():
            for old, new in zip(before, generators.common_state(self.generator), strict=True):
                if new.is_floating_point():
                    new.copy_(torch.lerp(old, new, self._candidate.reptile))
        return made

    def _make_holdout(self) -> None:
        if self._made is None:
            super()._make_holdout()
        else:
            self.holdout = self._made.newest(self.settings.synthesis.batch)[0]

    def _draw(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        if not self._candidate.cutmix:
            return super()._draw(random)
        config = self.settings.distill
        images = to_unit(crop_and_flip(self.bank.draw(config.batch, random), config.augment, random))
        images = cutmix(images, self._candidate.cutmix, random)
        with torch.no_grad(), self.compute.autocast():
            return images, self.teacher(images)

    def _student_step(self, images: Tensor, teacher_logits: Tensor) -> Tensor:
        loss = super()._student_step(images, teacher_logits)
        if self.average is not None:
            now, mean = self.student.state_dict(), self.average.state_dict()
            for name, tensor in mean.items():
                if tensor.is_floating_point():
                    tensor.lerp_(now[name], 1 - self._candidate.average)
        return loss

    def judged(self) -> Classifier:
        """The student to judge."""
        student = self.average or self.student
        if self._candidate.fresh_statistics:
            student = copy.deepcopy(student)
            norms = [m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
            random = random_stream(0, "statistics")
            with torch.no_grad(), self.compute.autocast():
                for _ in range(40):
                    student.train()(super()._draw(random)[0])
        return student.eval()


def cutmix(images: Tensor, share: float, random: torch.Generator) -> Tensor:
    """Pastes a rectangle of another image of the batch into a fraction of the images; its area is uniform in (0, 1)."""
    count, _, height, width = images.shape
    chosen, area, y, x = torch.rand(4, count, generator=random).unbind()
    others = images[torch.randperm(count, generator=random)]
    side = area.sqrt() / 2
    rows = (torch.arange(height)[None] + 0.5) / height
    columns = (torch.arange(width)[None] + 0.5) / width
    inside = ((rows - y[:, None]).abs() < side[:, None])[:, :, None] & ((columns - x[:, None]).abs() < side[:, None])[
        :, None
    ]
    inside &= (chosen < share)[:, None, None]
    return torch.where(inside[:, None], others, images)


def variety(teacher: Classifier, bank: MemoryBank, compute: computing.Compute) -> float:
    """Spread of the bank's images in the input of the teacher's last layer.

    Trace of the within-class covariance of 4,096 images, by the classes that the teacher predicts, over the squared
    norm of their mean.
    """
    last = [m for m in teacher.modules() if isinstance(m, torch.nn.Linear)][-1]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float().cpu()))
    images = bank.images[torch.linspace(0, len(bank) - 1, 4096).long()]
    classes = logits_of(teacher, images, compute).argmax(1).cpu()
    hook.remove()
    features = torch.cat(seen)
    groups = [features[classes == label] for label in classes.unique()]
    within = sum(len(group) * float(group.var(0, correction=0).sum()) for group in groups) / len(features)
    return within / float(features.mean(0).square().sum())


def settings_of(candidate: Candidate, seed: int) -> tuple[Settings, LTE]:
    """The numbers of a candidate."""
    changes = candidate.changes
    parts = [
        kind.model_validate({**BASE.get(name, {}), **changes.get(name, {})})
        for name, kind in (("generator", Generator), ("synthesis", Synthesis), ("distill", Distill))
    ]
    return Settings(*parts, seed), LTE(**changes.get("lte", {}))


@dataclass(frozen=True)
class Case:
    """What all candidates have in common."""

    teacher: Path
    student: str
    images: Tensor
    labels: Tensor
    banks: Path
    compute: computing.Compute


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--student", default="nayer:wrn_16_1")
    parser.add_argument("--candidates", default=";".join(CANDIDATES), help="separated by ;")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--banks", type=Path, required=True, help="folder for the images of base")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    compute = computing.choose()
    teacher_file = given.run / "teacher" / "teacher.safetensors"
    teacher = load_classifier(teacher_file)
    judges = datasets.load(given.data, "holdout", teacher.spec, teacher.classes)
    images, labels = judges.images[-JUDGES:].to(compute.device), judges.labels[-JUDGES:].to(compute.device)
    case = Case(teacher_file, given.student, images, labels, given.banks, compute)
    figures = kept(given.json) or {**origin(), "student": given.student, "rows": {}}
    figures["teacher"] = float(top1(logits_of(compute.place(teacher).eval(), images, compute), labels))
    for seed in (int(text) for text in given.seeds.split(",")):
        for name in given.candidates.split(";"):
            if name not in figures["rows"] or str(seed) not in figures["rows"][name]:
                found = row(case, name, seed)
                figures["rows"].setdefault(name, {})[str(seed)] = found
                figures["summary"] = summary(figures["rows"])
                keep(given.json, figures)
                print(name, seed, found, flush=True)


def row(case: Case, name: str, seed: int) -> dict[str, Any]:
    """One student: accuracy in percent at the end and on the way, images, losses and seconds."""
    candidate, bank_file = CANDIDATES[name], case.banks / f"base.{seed}.safetensors"
    settings, lte = settings_of(candidate, seed)
    teacher = load_classifier(case.teacher)
    with seeded(random_stream(seed, "student").initial_seed()):
        student = build_classifier(case.student, teacher.spec, teacher.classes)
    raise_bn_momentum(student)
    made = MemoryBank.load(bank_file, case.compute.device) if candidate.replay else None
    parts = (teacher, embeddings.build(teacher.classes, lte), student, settings, case.compute)
    run = Trial(*parts, candidate=candidate, made=made)
    curve: list[tuple[int, float]] = []
    began, synthesis_seconds = time.perf_counter(), 0.0
    while not run.finished:
        epoch = run.run_epoch()
        synthesis_seconds += epoch.synthesis_seconds
        if epoch.phase == "distill" and (run.epoch - settings.distill.warmup_epochs) % 6 == 0:
            curve.append((run.epoch, accuracy(run.judged() if run.finished else run.student, case)))
    seconds = time.perf_counter() - began
    if name == "base":
        case.banks.mkdir(parents=True, exist_ok=True)
        run.bank.save(bank_file)
    losses = [epoch for epoch in run.history if epoch.loss_bn]
    return {
        "top1": curve[-1][1],
        "curve": curve,
        "images": run.bank.added,
        "steps": (settings.distill.epochs - settings.distill.warmup_epochs) * settings.distill.steps,
        "loss_bn": losses[-1].loss_bn if losses else None,
        "loss_ce": losses[-1].loss_ce if losses else None,
        "variety": variety(run.teacher, run.bank, case.compute),
        "synthetic_agreement": None if candidate.replay else run.history[-1].agreement,
        "seconds": round(seconds, 1),
        "synthesis_seconds": round(synthesis_seconds, 1),
    }


def accuracy(student: Classifier, case: Case) -> float:
    """Percent of the judging images."""
    return round(100 * float(top1(logits_of(student.eval(), case.images, case.compute), case.labels)), 2)


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, best first."""
    found = {
        name: {"seeds": len(of), "top1": spread([each["top1"] for each in of.values()])} for name, of in rows.items()
    }
    return dict(sorted(found.items(), key=lambda item: -(item[1]["top1"]["mean"] or 0)))


if __name__ == "__main__":
    main()
