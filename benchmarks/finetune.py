"""Fine-tuning with fake quantization beside calibration alone: W8A8 on MobileNetV2, W4A4 on ResNet-20, three seeds.

    python benchmarks/finetune.py --json benchmarks/results/finetune.json

No data set is fetched: the digits are those of scikit-learn. Each seed trains a teacher on real digits (16×16) and
distils ResNet-20 without data through the pipeline, from a smaller teacher and with fewer steps than the recipe, so
that three seeds take minutes on one core (`--full`: the recipe's own numbers). MobileNetV2 sees the images enlarged to
32×32; it is distilled on the memory bank that the run left, against the teacher, which is data-free too, but one bank
serves two students. The 600 real hold-out digits are used only for measuring.

W8A8 is what ships: `to_int8` with the images and rules of the pipeline, run by ONNX Runtime. W4A4 is simulated in torch
(4-bit weights per channel and activations per tensor, inputs of products and of skip connections only; the first and
the last product at 8 bits, as is usual): no runtime here has such kernels. Its calibration takes the ranges of least
squared error, for weights and activations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto
from shared.figures import keep, kept
from shared.origin import origin
from torch.nn import functional as F

from nayer_edge.config import InputSpec
from nayer_edge.data import datasets as data
from nayer_edge.distillation import cosine
from nayer_edge.export.int8.calibration import Ranges, compute_ranges
from nayer_edge.export.int8.qdq import calibrated_tensors, with_qdq
from nayer_edge.export.qat.graph_network import GraphNetwork
from nayer_edge.export.qat.train import QatResult, QatTrainer, Schedule, train
from nayer_edge.export.targets import QUANTIZABLE_OPS, TARGETS, Target
from nayer_edge.export.to_int8 import prepared, run_onnx, to_int8
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.losses import distillation_loss
from nayer_edge.memory_bank import MemoryBank, to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier
from nayer_edge.pipelines.deploy import SyntheticSource
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.runtime.compute import random_stream, seeded
from nayer_edge.runtime.progress import Silent
from nayer_edge.training.augment import crop_and_flip

SMALL = (
    "teacher.model=nayer:wrn_16_1",
    "teach.epochs=15",
    "distill.epochs=6",
    "distill.warmup_epochs=2",
    "distill.steps=50",
    "distill.batch=64",
    "synthesis.batch=50",
    "synthesis.g_steps=15",
    "export.calibration_images=100",
)
"""what the default changes of the digits recipe"""

Enlarge = Callable[[torch.Tensor], torch.Tensor]


class Recording(QatTrainer):
    """Keeps what fine-tuning found, whether or not it is chosen."""

    last: QatResult

    def __call__(
        self, graph: ModelProto, ranges: Ranges, target: Target, nodes_to_exclude: Collection[str]
    ) -> QatResult:
        """As QatTrainer."""
        self.last = super().__call__(graph, ranges, target, nodes_to_exclude)
        return self.last


def main() -> None:
    """Runs the seeds that the JSON file does not hold yet, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="the digits recipe's own numbers, and ten times the steps")
    parser.add_argument("--depthwise", default="torchvision:mobilenet_v2", help="the student at 32 pixels")
    parser.add_argument("--depthwise-steps", type=int, default=250, help="that distil it (ten times as many: --full)")
    parser.add_argument("--targets", default="cpu,arm", help="of the W8A8 study")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = {"changes": [] if arguments.full else list(SMALL), **vars(schedules(arguments))}
    settings = json.loads(json.dumps(settings, default=dataclasses.asdict))
    before = kept(arguments.json)
    if before.get("settings") != settings:
        before = {}
    began, runs = time.process_time() - before.get("cpu_seconds", 0), before.get("runs", [])
    for seed in range(arguments.seeds):
        if any(run["seed"] == seed for run in runs):
            continue
        with tempfile.TemporaryDirectory() as folder:
            runs.append(one(seed, Path(folder), arguments))
        print(json.dumps(runs[-1]), flush=True)
        result = {
            "settings": settings,
            "runs": runs,
            "mean": {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key != "seed"},
            "cpu_seconds": round(time.process_time() - began),
            **origin(),
        }
        keep(arguments.json, result)
    print(table(result))


def schedules(arguments: argparse.Namespace) -> argparse.Namespace:
    """How long each fine-tuning takes, and how many steps distil the depthwise student."""
    times = 10 if arguments.full else 1
    return argparse.Namespace(
        depthwise=arguments.depthwise,
        depthwise_steps=arguments.depthwise_steps * times,
        w8a8=Schedule(epochs=2 * times, steps=40, lr=1e-3, temperature=4.0),
        w4a4=Schedule(epochs=3 * times, steps=40, lr=5e-3, temperature=4.0, range_lr=5e-3),
    )


def one(seed: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one seed."""
    changes = [] if arguments.full else list(SMALL)
    recipe = load_recipe("digits", [*changes, f"seed={seed}", "student.model=nayer:resnet20"])
    run = run_recipe(recipe, folder / "run", last="student")
    teacher, lte, student = (run.artifact(name) for name in ("teacher", "lte", "student"))
    source = SyntheticSource.open(teacher, lte, student, recipe, run)
    bank = MemoryBank.load(run.path(student.files["bank"]), torch.device("cpu"))
    real = data.load("digits", "holdout", recipe.teacher.input, recipe.teacher.classes)
    images, labels = to_unit(real.images), real.labels.numpy()
    count = recipe.export.calibration_images
    calibration, holdout = (
        torch.from_numpy(source.draw(purpose, count, Silent())) for purpose in ("calibration", "calibration hold-out")
    )
    plan, found = schedules(arguments), {"seed": seed}
    found["teacher_top1"] = accuracy(source.teacher_logits(images.numpy()), labels)
    network = load_classifier(run.path(student.files["student"]))
    draw = drawer(source, bank, recipe, lambda x: x)
    say(seed, "W4A4")
    found |= w4a4(network, draw, calibration, (images.numpy(), labels), plan.w4a4, folder, seed)
    say(seed, "the depthwise student")
    depthwise = distilled(plan, recipe, drawer(source, bank, recipe, enlarged), seed)
    tune = Recording(drawer(source, bank, recipe, enlarged), plan.w8a8, streams(seed), torch.device("cpu"), Silent())
    shown = (enlarged(images).numpy(), labels)
    for target in arguments.targets.split(","):
        say(seed, f"W8A8 for {target}")
        found |= w8a8(depthwise, target, tune, (enlarged(calibration), enlarged(holdout)), shown, folder)
    return found


def say(seed: int, what: str) -> None:
    """Progress, on stderr."""
    print(f"seed {seed}: {what} ({time.process_time():.0f} s of processor time so far)", file=sys.stderr, flush=True)


def w8a8(
    student: Classifier,
    target: str,
    tune: Recording,
    synthetic: tuple[torch.Tensor, torch.Tensor],
    real: tuple[np.ndarray, np.ndarray],
    folder: Path,
) -> dict[str, float]:
    """The files that ship with calibration alone and after fine-tuning, in ONNX Runtime."""
    calibration, holdout = (part.numpy() for part in synthetic)
    images, labels = real
    rules, fp32_path, path = TARGETS[target], folder / "fp32.onnx", folder / f"{target}.onnx"
    to_onnx(student, student.spec.shape, fp32_path)
    fp32 = run_onnx(fp32_path, images)
    best = to_int8(fp32_path, path, calibration, target, holdout_images=holdout).method
    logits = {"ptq": run_onnx(path, images, as_written=target != "cpu")}
    result = to_int8(fp32_path, path, calibration, target, method=best, holdout_images=holdout, qat=tune)
    logits["shipped"] = run_onnx(path, images, as_written=target != "cpu")
    onnx.save(with_qdq(tune.last.graph, tune.last.ranges, rules), path)
    logits["tuned"] = run_onnx(path, images, as_written=target != "cpu")
    record = result.record["finetune"]
    found = {
        "w8a8_fp32_top1": accuracy(fp32, labels),
        f"w8a8_{target}_synthetic_ptq_agreement": record["calibrated"]["top1"],
        f"w8a8_{target}_synthetic_tuned_agreement": record["finetuned"]["top1"],
        f"w8a8_{target}_kept": float(record["chosen"]),
    }
    for name, answers in logits.items():
        found[f"w8a8_{target}_{name}_top1"] = accuracy(answers, labels)
        found[f"w8a8_{target}_{name}_agreement"] = float((answers.argmax(1) == fp32.argmax(1)).mean())
    return found


def w4a4(
    student: Classifier,
    draw: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    calibration: torch.Tensor,
    real: tuple[np.ndarray, np.ndarray],
    schedule: Schedule,
    folder: Path,
    seed: int,
) -> dict[str, float]:
    """4-bit weights and activations, simulated, before and after fine-tuning."""
    images, labels = real
    to_onnx(student, student.spec.shape, folder / "w4a4.onnx")
    graph = prepared(folder / "w4a4.onnx", folder / "prepared.onnx")
    # Unsigned activations where a device would chain nothing: the usual setting of such studies.
    target = dataclasses.replace(TARGETS["cpu"], weight_max=127, outputs=False, residual="skip", bias="float")
    tensors = calibrated_tensors(graph, target)
    operators = (*QUANTIZABLE_OPS, "Add")
    found = compute_ranges(
        folder / "prepared.onnx", calibration.numpy(), operators, tensors, ("minmax", "mse"), target, bits=4
    )
    products = [node for node in graph.graph.node if node.op_type in QUANTIZABLE_OPS]
    edges = {products[0].input[0], products[-1].input[0]}
    ranges = {name: found["minmax" if name in edges else "mse"][name] for name in found["mse"]}
    network = GraphNetwork(graph, with_qdq(graph, ranges, target), ranges, target, bits=4)
    fp32 = run_onnx(folder / "w4a4.onnx", images)
    before = simulated(network, images)
    train(network, network.weight_parameters(), network.range_parameters(), draw, schedule, streams(seed))
    after = simulated(network, images)
    figures = {"w4a4_fp32_top1": accuracy(fp32, labels)}
    for name, logits in (("ptq", before), ("tuned", after)):
        figures[f"w4a4_{name}_top1"] = accuracy(logits, labels)
        figures[f"w4a4_{name}_agreement"] = float((logits.argmax(1) == fp32.argmax(1)).mean())
    return figures


def distilled(
    plan: argparse.Namespace,
    recipe: Recipe,
    draw: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    seed: int,
) -> Classifier:
    """The depthwise student at 32 pixels, trained on the bank against the teacher."""
    spec = InputSpec(channels=1, height=32, width=32, mean=(0.5,), std=(0.5,))
    with seeded(random_stream(seed, "depthwise").initial_seed()):
        student = build_classifier(plan.depthwise, spec, recipe.teacher.classes)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    random, steps = random_stream(seed, "depthwise images"), plan.depthwise_steps
    student.train()
    with seeded(random_stream(seed, "dropout").initial_seed()):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, steps, 0.1, 1e-4)
            images, logits = draw(random)
            optimizer.zero_grad(set_to_none=True)
            distillation_loss(student(images), logits, recipe.distill.temperature).backward()
            optimizer.step()
    return student.eval()


def drawer(
    source: SyntheticSource, bank: MemoryBank, recipe: Recipe, enlarge: Enlarge
) -> Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]:
    """Augmented images of the bank, enlarged for the student, and the teacher's logits for them as they are."""

    def draw(random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images = to_unit(crop_and_flip(bank.draw(recipe.distill.batch, random), recipe.distill.augment, random))
        with torch.no_grad():
            return enlarge(images), source.teacher(images)

    return draw


def enlarged(images: torch.Tensor) -> torch.Tensor:
    """16×16 → 32×32."""
    return F.interpolate(images, scale_factor=2, mode="bilinear").clamp(0, 1)


def streams(seed: int) -> Callable[[int], torch.Generator]:
    """Epoch → random stream."""
    return lambda epoch: random_stream(seed, "finetune", epoch)


@torch.no_grad()
def simulated(network: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Logits of a network with fake quantization."""
    return np.concatenate([network(part).numpy() for part in torch.from_numpy(images).split(200)])


def table(result: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    mean, runs = result["mean"], result["runs"]

    def row(name: str, prefix: str, version: str) -> str:
        agreement = f"{prefix}_{version}_agreement"
        each = ", ".join(f"{100 * run[f'{prefix}_{version}_top1']:.1f}" for run in runs)
        follows = f"{100 * mean[agreement]:.2f} %" if agreement in mean else ""
        return f"| {name} | {100 * mean[f'{prefix}_{version}_top1']:.2f} % ({each}) | {follows} |"

    lines = ["| | real top-1, mean (each seed) | agrees with FP32 |", "|---|---|---|"]
    lines.append(row("ResNet-20 FP32", "w4a4", "fp32"))
    lines.append(row("W4A4 simulated, calibration alone", "w4a4", "ptq"))
    lines.append(row("W4A4 simulated, fine-tuned", "w4a4", "tuned"))
    lines.append(row("depthwise FP32", "w8a8", "fp32"))
    for target in [key.removeprefix("w8a8_").removesuffix("_kept") for key in mean if key.endswith("_kept")]:
        lines.append(row(f"{target}, calibration alone", f"w8a8_{target}", "ptq"))
        lines.append(row(f"{target}, fine-tuned", f"w8a8_{target}", "tuned"))
        kept = int(sum(run[f"w8a8_{target}_kept"] for run in runs))
        lines.append(row(f"{target}, what --qat ships ({kept} of {len(runs)} tuned)", f"w8a8_{target}", "shipped"))
    return "\n".join(lines)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fraction that is right."""
    return float((logits.argmax(1) == labels).mean())


if __name__ == "__main__":
    main()
