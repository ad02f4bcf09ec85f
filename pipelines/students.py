"""What students cost: parameters, multiply-accumulates, INT8 size and CPU latency.

Cost does not depend on weights, so nothing is trained: networks are untrained, images are noise. Accuracy does; the
shipped recipes say what was measured.
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
"""up to this side a library's strides are lowered (`@32`)"""
NOISE_IMAGES = 8
"""that set the ranges of an INT8 graph of which only size and speed count"""
GRAPH_BYTES = 1500
"""what a quantized layer's nodes and names take in an ONNX file, beside its weights; sizes are then within 10 %"""


@dataclass(frozen=True)
class StudentCost:
    """One row of the table.

    Attributes:
        model: as student.model in a recipe.
        params: trainable parameters.
        macs: multiply-accumulates of convolutions and matrix products for one image.
        int8_bytes: size of the INT8 graph for x86 processors.
        int8_measured: it was exported and quantized; otherwise its size is computed from the weights.
        fp32_ms, int8_ms: median latency of ONNX Runtime at batch 1, milliseconds; None where it was not measured.
        threads: processor threads that it was measured with.
    """

    model: str
    params: int
    macs: int
    int8_bytes: int
    int8_measured: bool
    fp32_ms: float | None = None
    int8_ms: float | None = None
    threads: int | None = None


def students_for(spec: InputSpec) -> list[str]:
    """Students that suit images of this size."""
    side = min(spec.height, spec.width)
    if side > SMALL_PIXELS:
        # The zoo's larger networks work on a quarter of the full resolution to the end.
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
    """Builds every student once.

    Args:
        latency: export, quantize and time it; otherwise its INT8 size is computed.
        runs: timed calls.
        on_student: called with each name when it is done.

    Raises:
        UsageError: there is no such model, or it cannot take such images.
    """
    if classes < 2:
        raise UsageError(f"A classifier of {classes} classes has nothing to decide.", fix="Give --classes 2 or more.")
    labels = [f"class {number}" for number in range(classes)]
    # All names are tried before the first is measured, which takes a while.
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
    """About the size of the INT8 graph: one byte per weight; scale, zero point and INT32 bias per output channel; the
    graph itself."""
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
    return StudentCost(cost.model, cost.params, cost.macs, size, True, slow.p50, fast.p50, slow.threads)


@contextlib.contextmanager
def _runners(files: dict[str, Path], threads: int | None) -> Iterator[dict[str, OrtRunner]]:
    with contextlib.ExitStack() as stack:
        yield {label: stack.enter_context(OrtRunner(path, threads=threads)) for label, path in files.items()}
