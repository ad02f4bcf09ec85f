"""Synthesis and student steps per second, ours against the straightforward published loop.

    python benchmarks/distill_speed.py --json benchmarks/results/distill_speed.cpu.json

Same networks, same sizes, same process, in turns; medians and ranges. WRN-40-2 → WRN-16-1 at CIFAR size. The view cache
(`distill.views`) is timed from cold: the student steps run through a whole student phase in miniature, with a bank as
small as the number of steps is, so that each image is drawn as often as at E = 100 (20.5 million draws from on
average 120,000 images, 171 draws an image). The reference is timed in blocks between; its steps cost the same
throughout.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared.figures import keep
from shared.origin import origin
from shared.published import Published

from nayer_edge.config import LTE, Distill, Generator, InputSpec, Synthesis
from nayer_edge.distillation import Distillation, Settings, peak_memory_mib
from nayer_edge.labels import embeddings as lte
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.models.load import build_classifier
from nayer_edge.runtime.compute import Compute, choose, random_stream
from nayer_edge.training.cached_views import ViewCache

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DRAWS_PER_IMAGE = 171


def main() -> None:
    """Parses, measures, prints, and writes JSON where told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--student", default="nayer:wrn_16_1")
    parser.add_argument("--synthesis-batch", type=int, default=400)
    parser.add_argument("--student-batch", type=int, default=512)
    parser.add_argument("--g-steps", type=int, default=4, help="steps per timed round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--student-steps", type=int, default=240, help="length of the student phase in miniature")
    parser.add_argument("--reference-steps", type=int, default=4, help="per block of the reference")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    keep(arguments.json, result)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds both, times them in turns."""
    compute = choose("auto", arguments.precision)
    spec = InputSpec(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
    torch.manual_seed(0)
    embeddings = lte.build(CLASSES, LTE())
    images_in_bank = max(arguments.student_steps * arguments.student_batch // DRAWS_PER_IMAGE, 64)
    synthesis = Synthesis(batch=arguments.synthesis_batch, g_steps=arguments.g_steps)
    distill = Distill(batch=arguments.student_batch, steps=1, views=arguments.views)
    ours = Distillation(
        build_classifier("nayer:wrn_40_2", spec, CLASSES),
        embeddings,
        build_classifier(arguments.student, spec, CLASSES),
        Settings(Generator(), synthesis, distill, 0),
        compute,
    )
    theirs_teacher = build_classifier("nayer:wrn_40_2", spec, CLASSES).to(compute.device).eval().requires_grad_(False)
    theirs_student = build_classifier(arguments.student, spec, CLASSES).to(compute.device)
    with tempfile.TemporaryDirectory() as folder:
        theirs = Published(
            theirs_teacher,
            theirs_student,
            embeddings.embeddings.to(compute.device),
            Path(folder),
            batch=arguments.synthesis_batch,
            student_batch=arguments.student_batch,
            workers=arguments.workers,
        )
        synthesis_times = _synthesis(ours, theirs, arguments)
        memory_before = peak_memory_mib(compute)
        _fill(ours, theirs, images_in_bank)
        student_times, hit_rate, curve = _student(ours, theirs, arguments)
    ratios = {
        "synthesis": statistics.median(synthesis_times["published"]) / statistics.median(synthesis_times["ours"]),
        "student": statistics.median(student_times["published"]) / statistics.mean(student_times["ours"]),
    }
    return {
        "speedup": {name: round(value, 3) for name, value in ratios.items()},
        "seconds_per_step": {
            "synthesis": {who: _spread(times) for who, times in synthesis_times.items()},
            "student": {who: _spread(times) for who, times in student_times.items()},
        },
        "note": "student: median of the reference over the mean of ours through the whole phase, from a cold cache",
        "cache": {
            "views": arguments.views,
            "hit_rate": round(hit_rate, 4),
            "seconds_per_step_by_tenth": curve,
            "bank_images": images_in_bank,
            "draws_per_image": round(arguments.student_steps * arguments.student_batch / images_in_bank, 1),
        },
        "memory_mib": {"peak": round(peak_memory_mib(compute)), "before_the_bank": round(memory_before)},
        "bank_growth": _bank_growth(compute, arguments.views),
        "sizes": {
            "teacher": "nayer:wrn_40_2",
            "student": arguments.student,
            "synthesis_batch": arguments.synthesis_batch,
            "student_batch": arguments.student_batch,
        },
        "compute": compute.reason,
        **origin(),
    }


def _synthesis(ours: Distillation, theirs: Published, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per synthesis step of both, in turns, L_adv on, after one untimed round each."""
    from nayer_edge.generator import initialise

    initialise(ours.generator, random_stream(0, "generator", device=ours.compute.device))
    times: dict[str, list[float]] = {"ours": [], "published": []}
    for repeat in range(arguments.repeats + 1):
        stream = random_stream(0, "round", repeat, device=ours.compute.device)
        mine = _timed(ours, lambda stream=stream: ours._round(stream, warm=False))
        other = _timed(ours, lambda: theirs.synthesize(arguments.g_steps, adversarial=True))
        if repeat:
            times["ours"].append(mine / arguments.g_steps)
            times["published"].append(other / arguments.g_steps)
    return times


def _fill(ours: Distillation, theirs: Published, count: int) -> None:
    """The same random images in both banks."""
    from published import save_png

    images = torch.rand(count, 3, 32, 32, generator=random_stream(0, "fill"))
    ours.bank.add((images * 255).to(torch.uint8).to(ours.compute.device), torch.zeros(count, dtype=torch.long))
    for file in theirs.folder.glob("*.png"):
        file.unlink()
    save_png(images, theirs.folder, "fill")


def _student(
    ours: Distillation, theirs: Published, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], float, list[float]]:
    """Ours through a whole phase from cold, the reference in blocks between."""
    times: dict[str, list[float]] = {"ours": [], "published": []}
    # One untimed step each; ours on another cache, so that the timed one starts cold.
    views, ours.views = ours.views, None
    ours._train_student(0, lambda: None)
    ours.views = views
    theirs.train(1)
    every = max(1, arguments.student_steps // arguments.repeats)
    for step in range(arguments.student_steps):
        times["ours"].append(_timed(ours, lambda step=step: ours._train_student(step % 100, lambda: None)))
        if step % every == 0:
            seconds = _timed(ours, lambda: theirs.train(arguments.reference_steps))
            times["published"].append(seconds / arguments.reference_steps)
    tenth = max(1, len(times["ours"]) // 10)
    curve = [
        round(statistics.mean(times["ours"][start : start + tenth]), 4)
        for start in range(0, len(times["ours"]) - tenth + 1, tenth)
    ]
    hit_rate = 0.0 if ours.views is None else 1 - ours.views.computed / ours.views.asked
    return times, hit_rate, curve


def _bank_growth(compute: Compute, views: int) -> list[dict[str, float]]:
    """Memory beside a growing bank and its cache of views, MiB: the bytes of the images, those of the cached logits,
    and what the process grew by (the storage grows by doubling, and keeps old and new while it copies)."""
    spec = InputSpec()
    bank = MemoryBank(spec.shape, 2**31, compute.device)
    teacher = build_classifier("nayer:wrn_10_1", spec, CLASSES).to(compute.device).eval()
    stream = random_stream(0, "growth", device=compute.device)
    cache = ViewCache(bank, Distill().augment, views, teacher, compute, stream) if views else None
    before, found = _memory_mib(compute), []
    round_of = torch.zeros(4096, *spec.shape, dtype=torch.uint8, device=compute.device)
    labels = torch.zeros(4096, dtype=torch.long, device=compute.device)
    for images in (4096, 16384, 65536, 163840):
        while len(bank) < images:
            bank.add(round_of, labels)
        if cache is not None:
            cache.draw(8, stream)
        held = images * spec.channels * spec.height * spec.width / 2**20
        cached = 0.0 if cache is None else sum(t.numel() * t.element_size() for t in cache.tensors().values()) / 2**20
        found.append(
            {
                "images": images,
                "images_mib": round(held, 1),
                "cached_logits_mib": round(cached, 1),
                "process_grew_mib": round(_memory_mib(compute) - before, 1),
            }
        )
    return found


def _memory_mib(compute: Compute) -> float:
    """In use now: allocated on a GPU, resident on a CPU."""
    if compute.device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _timed(ours: Distillation, work: Callable[[], object]) -> float:
    cuda = ours.compute.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _spread(times: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(times), 5),
        "mean": round(statistics.mean(times), 5),
        "min": round(min(times), 5),
        "max": round(max(times), 5),
    }


if __name__ == "__main__":
    main()
