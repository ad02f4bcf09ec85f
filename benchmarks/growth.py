"""How time and memory of a distillation grow: with the teacher, image size, number of classes and number of images.

    python benchmarks/growth.py --json benchmarks/results/growth.json --figure docs/growth.svg

Every case runs in a process of its own, so that its peak memory is its own. The times are those that `--budget` plans
with: medians of a few steps, at the sizes that it would choose. Compare them only on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from shared.figures import keep, kept
from shared.origin import origin

from nayer_edge.config import Augment, Generator, InputSpec
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.models.load import build_classifier
from nayer_edge.pipelines.costs.budget import BATCH, VIEWS, g_steps_for
from nayer_edge.pipelines.costs.fitting import device_at_hand, fit, generator_channels
from nayer_edge.pipelines.costs.model_cost import cost_of_network
from nayer_edge.pipelines.costs.step_costs import time_steps
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime.compute import random_stream
from nayer_edge.training.cached_views import ViewCache

STUDENT = "nayer:wrn_16_1"
BASE = {"teacher": "nayer:resnet20", "pixels": 32, "classes": 10, "images": 0}
STUDIES: dict[str, tuple[str, list[Any]]] = {
    "teacher": ("teacher", ["nayer:resnet8", "nayer:resnet20", "nayer:resnet56", "nayer:wrn_40_2", "nayer:resnet18"]),
    "image size": ("pixels", [16, 32, 64, 128]),
    "classes": ("classes", [2, 10, 100, 1000]),
    "images in the bank": ("images", [1000, 10_000, 100_000, 400_000]),
}


def main() -> None:
    """Measures what is missing, and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(**json.loads(given.one))))
        return
    figures = kept(given.json) or {**origin(), "student": STUDENT, "rows": []}
    for key, values in STUDIES.values():
        for value in values:
            case = {**BASE, key: value}
            if any(case.items() <= row.items() for row in figures["rows"]):
                continue
            words = [sys.executable, __file__, "--one", json.dumps(case)]
            found = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            figures["rows"].append({**case, **json.loads(found)})
            print(figures["rows"][-1], flush=True)
            keep(given.json, figures)
    if given.figure:
        draw(figures["rows"], given.figure)


def one(teacher: str, pixels: int, classes: int, images: int) -> dict[str, Any]:
    """Seconds and peak memory of one case: those of a bank with so many images, or of the steps."""
    spec = InputSpec(channels=3, height=pixels, width=pixels, mean=(0.5,) * 3, std=(0.25,) * 3)
    names = tuple(f"class {number}" for number in range(classes))
    network, student = build_classifier(teacher, spec, names), build_classifier(STUDENT, spec, names)
    compute, augment = computing.choose(), Augment(pad=4, flip=True)
    if images:
        found = bank_of(images, network, augment, compute)
    else:
        device = device_at_hand()
        costs = cost_of_network(network), cost_of_network(student)
        sizes, channels = fit(spec, *costs, device, classes), generator_channels(spec, classes, costs[0], device)
        generator = Generator(channels=channels)
        made = time_steps(network, student, generator, augment, compute, sizes.batch, sizes.student_batch)
        found = {
            "seconds_per_image": made.synthesis_step * g_steps_for(classes) / made.batch,
            "seconds_per_student_image": (made.student_step + made.teacher_batch) / made.student_batch,
            "teacher_mflop": costs[0].flop / 1e6,
        }
    return {**found, "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def bank_of(count: int, teacher: Any, augment: Augment, compute: computing.Compute) -> dict[str, Any]:
    """Draws student batches from a bank of random images."""
    random = random_stream(0, "growth", device=compute.device)
    bank = MemoryBank(teacher.spec.shape, count * 3072, compute.device)
    for _ in range(count // 100):
        images = torch.randint(0, 256, (100, *teacher.spec.shape), generator=random, dtype=torch.uint8)
        bank.add(images, torch.zeros(100, dtype=torch.long))
    views = ViewCache(bank, augment, VIEWS, compute.place(teacher).eval(), compute, random)
    views.draw(BATCH, random)
    views._known[:] = True  # measure drawing, not the teacher
    times = []
    for _ in range(20):
        began = time.perf_counter()
        views.draw(BATCH, random)
        times.append(time.perf_counter() - began)
    return {"seconds_per_draw": sorted(times)[len(times) // 2]}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each study: milliseconds per image, and peak memory."""
    mpl.rcParams["svg.hashsalt"] = "nayer-edge"
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, (key, values)) in zip(figure.subplots(2, 2).flat, STUDIES.items(), strict=True):
        chosen = [next(row for row in rows if {**BASE, key: value}.items() <= row.items()) for value in values]
        labels = [str(value).removeprefix("nayer:") for value in values]
        if key == "images":
            axes.plot(labels, [1000 * row["seconds_per_draw"] / BATCH for row in chosen], "o-", label="draw an image")
        else:
            axes.plot(labels, [1000 * row["seconds_per_image"] for row in chosen], "o-", label="make an image")
            steps = [1000 * row["seconds_per_student_image"] for row in chosen]
            axes.plot(labels, steps, "s-", label="train on an image")
        axes.set_ylabel("milliseconds")
        axes.set_yscale("log")
        memory = axes.twinx()
        memory.plot(labels, [row["peak_mib"] / 1024 for row in chosen], "k:", label="peak memory (right)")
        memory.set_ylim(0)
        memory.set_ylabel("GiB")
        axes.set_title(title)
        lines = [*axes.get_lines(), *memory.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], fontsize="small", loc="upper left")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
