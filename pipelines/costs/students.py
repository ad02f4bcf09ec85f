"""Measures the cost of students: parameters, multiply-accumulates, INT8 size and CPU latency.

Cost does not depend on the weights, so the networks are untrained and the images are noise. For measured accuracies,
see the shipped recipes.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.export.benchmark import benchmark
from nayer_edge.export.runners import OrtRunner
from nayer_edge.export.to_int8 import to_int8
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, check_forward
from nayer_edge.runtime.compute import seeded

from .model_cost import cost_of_network

ZOO = ("nayer:resnet8", "nayer:resnet20", "nayer:wrn_16_1", "nayer:wrn_16_2", "nayer:wrn_40_1")
LIBRARY = (
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:mobilenet_v3_small",
    "torchvision:mobilenet_v2",
    "torchvision:efficientnet_b0",
)
SMALL_PIXELS = 96
"""up to this side length, library networks are used with reduced strides (`@32`)"""
NOISE_IMAGES = 8
"""calibration images for INT8 graphs of which only size and speed are measured"""
GRAPH_BYTES = 1500
"""bytes of a quantized layer's nodes and names in an ONNX file, besides its weights; estimates are then within 10 %"""


@dataclass(frozen=True)
class StudentCost:
    """One row of the table.

    Attributes:
        model: as student.model in a recipe.
        params: trainable parameters.
        macs: multiply-accumulates of convolutions and matrix products for one image.
        int8_bytes: size of the INT8 graph for x86 processors.
        int8_measured: the size is that of an exported and quantized file; otherwise it is estimated from the weights.
        fp32_ms, int8_ms: median latency of ONNX Runtime at batch 1, milliseconds; None if not measured.
        fp32_p95_ms, int8_p95_ms: its 95th percentile.
        threads: CPU threads used for the measurement.
    """

    model: str
    params: int
    macs: int
    int8_bytes: int
    int8_measured: bool
    fp32_ms: float | None = None
    int8_ms: float | None = None
    threads: int | None = None
    fp32_p95_ms: float | None = None
    int8_p95_ms: float | None = None


def students_for(spec: InputSpec) -> list[str]:
    """Students suited to this image size."""
    side = min(spec.height, spec.width)
    if side > SMALL_PIXELS:
        # The larger networks of the zoo are too slow: they end at a quarter of the full resolution.
        return [*ZOO[:2], *LIBRARY]
    return [*ZOO, *(f"{model}@{side}" for model in LIBRARY)]


def measure(
    models: Sequence[str],
    spec: InputSpec,
    classes: int,
    *,
    latency: bool = True,
    runs: int = 100,
    threads: int | None = None,
    on_student: Callable[[str], None] = lambda _model: None,
) -> list[StudentCost]:
    """Measures every student.

    Args:
        latency: export, quantize and time each student; otherwise only estimate its INT8 size.
        runs: number of timed calls.
        threads: CPU threads; None for the runtime's default.
        on_student: called with the name of each finished student.

    Raises:
        UsageError: a model does not exist or does not accept this input, or there are fewer than 2 classes.
    """
    if classes < 2:
        raise UsageError(f"A classifier needs at least 2 classes, not {classes}.", fix="Set --classes to 2 or more.")
    labels = [f"class {number}" for number in range(classes)]
    # Check all names first: measuring takes a while.
    for model in models:
        with torch.device("meta"):
            check_forward(build_classifier(model, spec, labels))
    found = []
    for model in models:
        with seeded(0):
            network = build_classifier(model, spec, labels).eval()
        counted = cost_of_network(network)
        cost = StudentCost(model, counted.parameters, counted.macs, int8_bytes_of(network), False)
        found.append(_timed(network, cost, runs, threads) if latency else cost)
        on_student(model)
    return found


def int8_bytes_of(network: Classifier) -> int:
    """Estimates the size of the INT8 graph: one byte per weight; scale, zero point and INT32 bias per output channel;
    the nodes themselves."""
    total = 0
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            outputs = module.weight.shape[0]
            total += module.weight.numel() + outputs * (4 + 1 + 4) + GRAPH_BYTES
    return total


def _timed(network: Classifier, cost: StudentCost, runs: int, threads: int | None) -> StudentCost:
    shape = network.spec.shape
    noise = np.random.default_rng(0).random((NOISE_IMAGES, *shape), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        to_onnx(network, shape, fp32)
        to_int8(fp32, int8, noise, "cpu", method="minmax", bias_correction="off", provenance="noise")
        size = int8.stat().st_size
        with _runners({"fp32": fp32, "int8": int8}, threads) as runners:
            timings = benchmark(runners, shape, runs=runs, max_seconds=20)
    slow, fast = timings
    return StudentCost(
        cost.model, cost.params, cost.macs, size, True, slow.p50, fast.p50, slow.threads, slow.p95, fast.p95
    )


@contextlib.contextmanager
def _runners(files: dict[str, Path], threads: int | None) -> Iterator[dict[str, OrtRunner]]:
    with contextlib.ExitStack() as stack:
        yield {label: stack.enter_context(OrtRunner(path, threads=threads)) for label, path in files.items()}
