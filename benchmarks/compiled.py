"""Does torch.compile pay here? Eager and compiled passes of the two loops, in turns, in one process.

    python benchmarks/compiled.py

WRN-40-2 → WRN-16-1 at CIFAR size, forward and backward: the generator, the teacher as synthesis uses it (gradient with
respect to the images, BatchNorm statistics gathered on the way), the student's training step. Compilation is timed
apart: it is paid once per process and shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from nayer_edge.batchnorm import BatchNormStatistics
from nayer_edge.config import Generator as GeneratorConfig
from nayer_edge.config import InputSpec
from nayer_edge.generator import Generator
from nayer_edge.models.load import build_classifier
from nayer_edge.runtime.compute import choose, random_stream

CLASSES = tuple(str(number) for number in range(10))


def main() -> None:
    """Prints one line per pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    compute, spec = choose("auto", "auto"), InputSpec()
    random = random_stream(0, "compiled", device=compute.device)
    images = torch.rand(arguments.batch, *spec.shape, generator=random, device=compute.device)
    teacher = compute.place(build_classifier("nayer:wrn_40_2", spec, CLASSES)).eval().requires_grad_(False)
    student = compute.place(build_classifier("nayer:wrn_16_1", spec, CLASSES)).train()
    embeddings = torch.randn(arguments.batch, 384, generator=random, device=compute.device)
    generator = Generator(384, len(CLASSES), arguments.batch, spec.shape, GeneratorConfig()).to(compute.device)
    generator.noisy.redraw(random)
    found = BatchNormStatistics(teacher, 0.0)
    print(compute.reason, f"batch {arguments.batch}")

    def through_generator(network: Callable[..., torch.Tensor]) -> None:
        with compute.autocast():
            made = network(embeddings)
        made.float().sum().backward()

    def through_teacher(network: Callable[..., torch.Tensor]) -> None:
        seen = images.clone().requires_grad_()
        with compute.autocast(), found.watch():
            logits = network(seen)
        (found.loss() + logits.float().logsumexp(1).mean()).backward()

    def through_student(network: Callable[..., torch.Tensor]) -> None:
        with compute.autocast():
            logits = network(images)
        logits.float().logsumexp(1).mean().backward()

    for name, work, network in (
        ("generator, forward and backward", through_generator, generator),
        ("teacher with statistics, forward and backward to the images", through_teacher, teacher),
        ("student, forward and backward", through_student, student),
    ):
        compiled, began = torch.compile(network), time.perf_counter()
        work(compiled)
        compiling = time.perf_counter() - began
        times: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(arguments.repeats):
            for version, of in (("eager", network), ("compiled", compiled)):
                began = time.perf_counter()
                work(of)
                if compute.device.type == "cuda":
                    torch.cuda.synchronize()
                times[version].append(time.perf_counter() - began)
        medians = {version: statistics.median(values) for version, values in times.items()}
        print(
            f"{name}: eager {medians['eager']:.4f} s, compiled {medians['compiled']:.4f} s "
            f"({medians['eager'] / medians['compiled']:.2f} ×), compiled in {compiling:.0f} s"
        )


if __name__ == "__main__":
    main()
