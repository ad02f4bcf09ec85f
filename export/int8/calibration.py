"""Activation ranges from calibration images, by four methods.

Min-max, percentile and entropy use ONNX Runtime's implementation; MSE is our own. Images are streamed in batches whose
activations fit a fixed memory budget. The first pass finds the extremes inside the graph. The second counts activations
into histograms of fixed range, which the other three methods use.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import HistogramCollector, create_calibrator

from nayer_edge.errors import UsageError, nearest

from ..runners import as_bytes
from ..targets import Target

METHODS = ("minmax", "percentile", "entropy", "mse")
PERCENTILE = 99.99
ACTIVATION_BUDGET = 64 * 2**20
"""bytes of activations in memory at a time"""
_BINS = 4096
# With ONNX Runtime's default of 128 bins its entropy search has a single candidate, which equals min-max.
_ENTROPY_BINS = 512
_ENTROPY_LEVELS = 128
_SAMPLES = 4_000_000
"""values counted per tensor; the extremes are always exact"""
_STRIDES = (1, 2, 3, 5, 7, 11, 13, 17, 23, 31, 43, 61, 83, 113, 157, 211, 307, 401, 601, 1009)

Ranges = dict[str, tuple[float, float]]
"""tensor name → (lowest, highest) real value that its integers represent"""


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values in equal bins over [-limit, limit].

    Attributes:
        counts: (bins,), int64.
        limit: largest absolute value seen.
        lowest: smallest value seen.
        highest: largest value seen.
    """

    counts: np.ndarray
    limit: float
    lowest: float
    highest: float

    @property
    def centers(self) -> np.ndarray:
        """Middle of every bin, (bins,), float64."""
        edges = np.linspace(-self.limit, self.limit, len(self.counts) + 1)
        return (edges[:-1] + edges[1:]) / 2


class _OneBatch(CalibrationDataReader):
    """Gives a calibrator a single batch; it keeps all activations of everything that it reads in memory."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        self._feeds: list[dict[str, np.ndarray]] = [{name: images}]

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._feeds.pop() if self._feeds else None


def require_images(images: np.ndarray, input_shape: Sequence[int | str | None], purpose: str) -> np.ndarray:
    """Checks images against a model's input (batch, C, H, W).

    Returns:
        float32 images (n, C, H, W).

    Raises:
        UsageError: there are none, the shape differs, they are not finite, or they lie outside [0, 1].
    """
    images = np.asarray(images)
    wanted = tuple(input_shape[1:])
    if (
        images.ndim != 4
        or len(images) == 0
        or any(isinstance(want, int) and want != got for want, got in zip(wanted, images.shape[1:], strict=True))
    ):
        raise UsageError(
            f"The {purpose} images have shape {images.shape}; the model takes "
            f"(n, {', '.join(map(str, wanted))}) with n of at least 1.",
            fix="Draw new ones with: nayer-edge calibration-data RUN",
        )
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    images = images.astype(np.float32, copy=False)
    lowest, highest = float(images.min()), float(images.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)) or lowest < -1e-6 or highest > 1 + 1e-6:
        raise UsageError(
            f"The {purpose} images have values from {lowest:g} to {highest:g}; they must lie in [0, 1].",
            why="Normalisation is part of the model.",
            fix="Pass images before normalisation: uint8, or divided by 255.",
        )
    return images


def compute_ranges(
    model_path: Path,
    images: np.ndarray,
    operators: Sequence[str],
    tensors: Collection[str],
    methods: Sequence[str],
    target: Target,
    bits: int = 8,
) -> dict[str, Ranges]:
    """Runs the FP32 graph on calibration images and finds each tensor's range by each method.

    Args:
        model_path: FP32 graph after pre-processing (shapes inferred).
        images: (n, C, H, W), float32 in [0, 1].
        operators: operator types whose inputs and outputs get a range.
        tensors: those tensors whose range matters; the others get their extremes by every method.
        methods: of METHODS.
        target: decides whether ranges are symmetric.
        bits: of the integers, for MSE.

    Returns:
        method → tensor → (lowest, highest). Deterministic: the same images give the same ranges.

    Raises:
        UsageError: an unknown method.
    """
    for method in methods:
        if method not in METHODS:
            raise UsageError(
                f"There is no calibration method '{method}'.{nearest(method, (*METHODS, 'auto'))}",
                why=f"The methods are {', '.join(METHODS)} and auto, which compares them.",
            )
    extremes = _extremes(model_path, images, operators)
    found: dict[str, Ranges] = {"minmax": extremes}
    if set(methods) - {"minmax"}:
        counted = {name: ends for name, ends in extremes.items() if name in tensors}
        histograms = _histograms(model_path, images, counted)
        if "percentile" in methods:
            found["percentile"] = extremes | _with_collector(histograms, "percentile")
        if "entropy" in methods:
            coarse = {name: _rebinned(h, _ENTROPY_BINS) for name, h in histograms.items()}
            found["entropy"] = extremes | _with_collector(coarse, "entropy")
        if "mse" in methods:
            found["mse"] = extremes | {
                name: mse_range(h, symmetric=target.symmetric, bits=bits) for name, h in histograms.items()
            }
    return {method: found[method] for method in methods}


def _batches(session: ort.InferenceSession, images: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(input name, images) in batches as large as the activation budget allows, by the size of one image's outputs."""
    source = session.get_inputs()[0]
    uint8 = source.type == "tensor(uint8)"

    def feed(part: np.ndarray) -> np.ndarray:
        return as_bytes(part) if uint8 else np.ascontiguousarray(part)

    one = sum(np.asarray(out).nbytes for out in session.run(None, {source.name: feed(images[:1])}))
    size = int(np.clip(ACTIVATION_BUDGET // max(one, 1), 1, 64))
    for start in range(0, len(images), size):
        yield source.name, feed(images[start : start + size])


def _extremes(model_path: Path, images: np.ndarray, operators: Sequence[str]) -> Ranges:
    augmented = model_path.with_suffix(".minmax.onnx")
    with contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            model_path, list(operators), str(augmented), calibrate_method=CalibrationMethod.MinMax
        )
        # The calibrator's own session runs without optimisations: twice the time for the same extremes.
        calibrator.infer_session = cpu_session(augmented.read_bytes())
        for name, batch in _batches(_probe(model_path, []), images):
            calibrator.collect_data(_OneBatch(name, batch))
        data = calibrator.compute_data()
    augmented.unlink()
    return {name: (float(np.min(data[name].lowest)), float(np.max(data[name].highest))) for name in sorted(data.keys())}


def _probe(model_path: Path, tensors: Sequence[str]) -> ort.InferenceSession:
    """The FP32 graph with the named tensors (all, if none is named) among its outputs."""
    return _with_outputs(onnx.load(str(model_path)), tensors)


def _with_outputs(model: ModelProto, tensors: Sequence[str]) -> ort.InferenceSession:
    infos = {v.name: v for v in (*model.graph.value_info, *model.graph.input)}
    outputs = {v.name for v in model.graph.output}
    wanted = tensors or [n for n, v in infos.items() if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    model.graph.output.extend(infos[name] for name in wanted if name not in outputs and name in infos)
    return cpu_session(model.SerializeToString())


def largest_values(model: ModelProto, images: np.ndarray) -> dict[str, float]:
    """Every float tensor that an FP32 graph computes → its largest finite absolute value over images.

    Args:
        model: FP32; not changed.
        images: (n, C, H, W), float32 in [0, 1].
    """
    session = _with_outputs(onnx.shape_inference.infer_shapes(model), [])
    found = dict.fromkeys((output.name for output in session.get_outputs()), 0.0)
    for source, batch in _batches(session, images):
        for name, output in zip(found, session.run(None, {source: batch}), strict=True):
            values = np.abs(np.asarray(output))
            found[name] = max(found[name], float(values.max(initial=0.0, where=np.isfinite(values))))
    return found


def cpu_session(model: bytes) -> ort.InferenceSession:
    """A serialized graph in ONNX Runtime on the CPU, without its warnings."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _histograms(model_path: Path, images: np.ndarray, extremes: Ranges) -> dict[str, Histogram]:
    session = _probe(model_path, list(extremes))
    names = [output.name for output in session.get_outputs()]
    limits = {name: max(abs(low), abs(high)) for name, (low, high) in extremes.items()}
    counts = {name: np.zeros(_BINS, np.int64) for name in extremes}
    for number, (source, batch) in enumerate(_batches(session, images)):
        for name, output in zip(names, session.run(None, {source: batch}), strict=True):
            values = np.asarray(output)
            if name in counts and limits[name] > 0:
                total = values.size // len(values) * len(images)
                # A prime stride with another start in every batch prefers no row, column or channel.
                stride = next((s for s in _STRIDES if total // s <= _SAMPLES), _STRIDES[-1])
                sample = torch.from_numpy(values).flatten()[number % stride :: stride]
                bins = torch.histc(sample, _BINS, -limits[name], limits[name])
                counts[name] += bins.numpy().astype(np.int64)
    return {name: Histogram(counts[name], limits[name], *extremes[name]) for name in extremes}


def _rebinned(histogram: Histogram, bins: int) -> Histogram:
    counts = histogram.counts.reshape(bins, -1).sum(axis=1)
    return Histogram(counts, histogram.limit, histogram.lowest, histogram.highest)


def _with_collector(histograms: Mapping[str, Histogram], method: str) -> Ranges:
    """ONNX Runtime's percentile and entropy searches, given histograms instead of raw activations."""
    collector = HistogramCollector(method, False, _BINS, _ENTROPY_LEVELS, PERCENTILE, "same")
    dead = {name: (h.lowest, h.highest) for name, h in histograms.items() if not h.counts.any()}
    for name, h in histograms.items():
        if name not in dead:
            edges = np.linspace(-h.limit, h.limit, len(h.counts) + 1, dtype=np.float32)
            collector.histogram_dict[name] = (
                h.counts,
                edges,
                np.float32(h.lowest),
                np.float32(h.highest),
                np.float32(h.limit),
            )
    if not collector.histogram_dict:
        return dead
    with contextlib.redirect_stdout(io.StringIO()):
        found = collector.compute_collection_result()
    return dead | {name: (float(data[0]), float(data[1])) for name, data in found.items()}


def mse_range(histogram: Histogram, *, symmetric: bool, candidates: int = 80, bits: int = 8) -> tuple[float, float]:
    """The range whose quantization has the lowest mean squared error over a histogram.

    Both ends are shrunk together, then each alone, from the extremes down to a fifth of them. Clipping and rounding
    errors are summed over the centres of the bins. Memory: one (candidates, bins) array at a time.

    Args:
        histogram: of one tensor.
        symmetric: 2^b − 2 steps around zero (TensorRT), else 2^b − 1 steps between the ends.
        candidates: ranges tried per search.
        bits: b.

    Returns:
        (lowest, highest).
    """
    low, high = min(histogram.lowest, 0.0), max(histogram.highest, 0.0)
    keep = histogram.counts > 0
    if not keep.any() or low == high:
        return histogram.lowest, histogram.highest
    values, counts = histogram.centers[keep], histogram.counts[keep].astype(np.float64)
    shrink = np.linspace(1.0, 0.2, candidates)

    def best(lows: np.ndarray, highs: np.ndarray) -> int:
        if symmetric:
            highs = np.maximum(-lows, highs)
            lows = -highs
        steps = 2.0**bits - (2 if symmetric else 1)
        scale = ((highs - lows) / steps)[:, None]
        zero = np.rint(-lows[:, None] / scale)
        level = np.clip(np.rint(values / scale) + zero, 0, steps)
        error = (((level - zero) * scale - values) ** 2 * counts).sum(axis=1)
        return int(np.argmin(error))

    first = shrink[best(low * shrink, high * shrink)]
    low, high = low * first, high * first
    if not symmetric and low < 0 < high:
        low *= shrink[best(low * shrink, np.full(candidates, high))]
        high *= shrink[best(np.full(candidates, low), high * shrink)]
    return float(low), float(high)
