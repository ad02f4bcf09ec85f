"""Does agreement on synthetic images predict the drop on real ones? Many students of one teacher, measured on both.

    python benchmarks/cifar.py --recipe digits --keep-students --results build      # a run, and its students by epoch
    python benchmarks/synthetic_agreement.py measure runs/digits-paper-s0 \\
        --json benchmarks/results/synthetic_agreement.digits.json
    python benchmarks/synthetic_agreement.py plot benchmarks/results/synthetic_agreement.*.json \\
        --out docs/synthetic_agreement.svg

Students of different quality: the distilled one after each epoch, and with `--taught`, ones that were trained on the
real images for some epochs. Each is then degraded as an export could degrade it: weights rounded to 8 … 2 bits per
output channel, or INT8 with one layer's scale wrong. This gives the two comparisons that the gate makes:

- a student with its teacher: real drop = teacher's accuracy minus the student's;
- a rounded student with itself unrounded: real drop = FP32 accuracy minus its own.

Beside each stands what the gate sees without real images: 1 − agreement of the two on fresh synthetic hold-out images,
drawn from the run's generator and used for nothing else; with `--reserved`, on those that the run reserved for
`validate`. The test images only measure; nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from scipy.stats import spearmanr
from shared.figures import keep
from shared.origin import origin
from torch import nn

from nayer_edge.data import datasets as data
from nayer_edge.data.datasets import LabelledImages
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier
from nayer_edge.pipelines.deploy import SyntheticSource
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime.compute import random_stream, seeded
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.run_folder import RunFolder
from nayer_edge.train_teacher import teach
from nayer_edge.training import evaluate

BITS = (8, 6, 5, 4, 3, 2)


def main() -> None:
    """Measures a run, or draws what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("run", type=Path)
    measuring.add_argument("--students", type=Path, help="students by epoch; RUN.students by default")
    measuring.add_argument("--taught", default="", metavar="EPOCHS,…", help="train students on real images, too")
    measuring.add_argument("--images", type=int, default=1000, help="synthetic hold-out")
    measuring.add_argument("--reserved", action="store_true", help="the run's own hold-out in place of a fresh one")
    measuring.add_argument("--real-images", type=int, help="a random sample of the hold-out, to save time")
    measuring.add_argument("--json", type=Path, required=True)
    drawing = commands.add_parser("plot")
    drawing.add_argument("results", type=Path, nargs="+")
    drawing.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "plot":
        plot([json.loads(path.read_text()) for path in arguments.results], arguments.out)
    else:
        keep(arguments.json, measure(arguments))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All pairs of one run."""
    run = RunFolder.open(arguments.run)
    recipe = recipe_of(run.manifest.recipe, run.root)
    teacher, lte, student = (run.artifact(name) for name in ("teacher", "lte", "student"))
    source = SyntheticSource.open(teacher, lte, student, recipe, run)
    spec, classes = recipe.teacher.input, recipe.teacher.classes
    real = data.load(str(recipe.validate_.data), "holdout", spec, classes)
    if arguments.real_images is not None:
        sample = torch.randperm(len(real.labels), generator=random_stream(0, "sample"))[: arguments.real_images]
        real = LabelledImages(real.images[sample], real.labels[sample], real.name)
    purpose = "validate" if arguments.reserved else "synthetic agreement study"
    assert not arguments.reserved or source.ready(purpose) >= arguments.images, "the run reserved fewer images"
    drawn = source.draw(purpose, arguments.images, Silent())
    synthetic = torch.from_numpy((drawn * 255).round().astype(np.uint8))

    def seen(network: Classifier) -> tuple[torch.Tensor, float]:
        """Classes on the synthetic images, accuracy on the real ones."""
        source.compute.place(network)
        top1 = evaluate.top1(evaluate.logits_of(network, real.images, source.compute), real.labels)
        return evaluate.logits_of(network, synthetic, source.compute).argmax(1).cpu(), top1

    teacher_seen = seen(source.teacher)
    rows: list[dict[str, Any]] = []

    def compare(kind: str, name: str, one: tuple[torch.Tensor, float], other: tuple[torch.Tensor, float]) -> None:
        agreement = float((one[0] == other[0]).float().mean())
        rows.append({"kind": kind, "name": name, "agreement": agreement, "drop": one[1] - other[1], "top1": other[1]})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    folder = arguments.students or arguments.run.with_name(f"{arguments.run.name}.students")
    for name, network in students(
        folder, load_classifier(run.path(student.files["student"])), arguments.taught, recipe
    ):
        whole = seen(network)
        compare("teacher", name, teacher_seen, whole)
        for label, worse in damaged(network):
            compare("fp32", f"{name}, {label}", whole, seen(worse))
    return {
        "run": recipe.name,
        "student": recipe.student.model,
        "teacher_top1": teacher_seen[1],
        "synthetic_images": len(synthetic),
        "reserved": arguments.reserved,
        "real_images": len(real.labels),
        "rows": rows,
        "summary": {kind: summary([row for row in rows if row["kind"] == kind]) for kind in ("teacher", "fp32")},
        **origin(),
    }


def students(folder: Path, final: Classifier, taught: str, recipe: Recipe) -> Iterator[tuple[str, Classifier]]:
    """(name, network): by epoch, or else the final one; then those of real images."""
    kept = sorted(folder.glob("epoch-*.safetensors"))
    if not kept:
        yield "final", final
    for path in kept:
        network = copy.deepcopy(final)
        network.load_state_dict(load_file(path))
        yield path.stem, network.eval()
    for epochs in (int(part) for part in taught.split(",") if part):
        # The recipe with its [teach], which a run with ready weights does not keep.
        plan = load_recipe(recipe.name).teach
        assert plan is not None, "the recipe does not say how to train on real images"
        with seeded(random_stream(recipe.seed, "taught", epochs).initial_seed()):
            network = build_classifier(recipe.student.model, recipe.teacher.input, recipe.teacher.classes)
        images = data.load(plan.data, "train", recipe.teacher.input, recipe.teacher.classes)
        teach(network, images, plan.model_copy(update={"epochs": epochs}), computing.choose("cpu", "auto"), epochs)
        yield f"{epochs} epochs on real images", network.eval()


def damaged(network: Classifier) -> Iterator[tuple[str, Classifier]]:
    """(what was done, network): every product's weights on fewer levels, or one layer's weights half as large."""
    for bits in BITS:
        yield f"{bits} bits", rounded(network, bits)
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for name in (layers[0], layers[len(layers) // 2], layers[-1]):
        wrong = rounded(network, 8)
        with torch.no_grad():
            wrong.get_submodule(name).weight.mul_(0.5)
        yield f"8 bits, scale of {name} halved", wrong


@torch.no_grad()
def rounded(network: Classifier, bits: int) -> Classifier:
    """A copy whose weights lie on 2^bits − 1 levels, one scale per output channel."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            limit = weight.abs().flatten(1).amax(1).clamp_min(1e-12).view(-1, *[1] * (weight.dim() - 1))
            scale = limit / (2 ** (bits - 1) - 1)
            weight.copy_((weight / scale).round() * scale)
    return network


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How well one predicts the other, over pairs; differences in points."""
    lost = np.array([1 - row["agreement"] for row in rows])
    drop = np.array([row["drop"] for row in rows])
    beyond = 100 * (drop - lost)
    worst = int(beyond.argmax())
    return {
        "pairs": len(rows),
        "spearman": float(spearmanr(lost, drop).statistic) if len(rows) > 1 else None,
        "real_drop_minus_disagreement_points": {
            "median": float(np.median(beyond)),
            "largest": float(beyond[worst]),
            "at": rows[worst]["name"],
            "smallest": float(beyond.min()),
        },
        "of_those_with_at_most_1_percent_disagreement": {
            "pairs": int((lost <= 0.01).sum()),
            "largest_drop_points": float(100 * drop[lost <= 0.01].max()) if (lost <= 0.01).any() else None,
        },
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """One row of panels for each run: against the teacher, against FP32."""
    mpl.rcParams.update({"svg.hashsalt": "nayer-edge", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(8, 3.6 * len(results)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(results), 2, squeeze=False)
    names = {"teacher": "student against teacher", "fp32": "rounded student against itself in FP32"}
    for result, line in zip(results, panels, strict=True):
        for (kind, title), axis in zip(names.items(), line, strict=True):
            rows = [row for row in result["rows"] if row["kind"] == kind]
            lost = [100 * (1 - row["agreement"]) for row in rows]
            drop = [100 * row["drop"] for row in rows]
            reach = 1.05 * max(*lost, *drop, 1.0)
            axis.plot([0, reach], [0, reach], "--", color="#888888", linewidth=1, label="equal")
            for real, marker, colour, label in (
                (False, "o", "#1f5fbf", "distilled without data"),
                (True, "^", "#c2571a", "trained on real images"),
            ):
                chosen = [n for n, row in enumerate(rows) if ("real images" in row["name"]) == real]
                if chosen:
                    points = [lost[n] for n in chosen], [drop[n] for n in chosen]
                    axis.plot(*points, marker, color=colour, markersize=4, alpha=0.7, label=label)
            axis.set_title(f"{result['run'].partition('-')[0]}: {title}", fontsize=9)
            axis.set_xlabel(f"1 − agreement on {result['synthetic_images']:,} synthetic images, %")
            axis.set_ylabel("drop on real images, points")
            axis.text(0.97, 0.03, f"rank correlation {spearman(result, kind)}", transform=axis.transAxes, ha="right")
            axis.legend(loc="upper left", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def spearman(result: dict[str, Any], kind: str) -> str:
    """In two digits."""
    return f"{result['summary'][kind]['spearman']:.2f}"


if __name__ == "__main__":
    main()
