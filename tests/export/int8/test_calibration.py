"""Ranges: exact extremes, streamed in bounded memory, each method against an independent computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from nayer_edge.errors import UsageError
from nayer_edge.export.int8 import calibration
from nayer_edge.export.int8.calibration import (
    METHODS,
    Histogram,
    compute_ranges,
    mse_range,
    require_images,
)
from nayer_edge.export.targets import get_target
from nayer_edge.export.to_int8 import prepared
from nayer_edge.export.to_onnx import to_onnx

SHAPE = (3, 8, 8)
OPERATORS = ("Conv", "Gemm", "Relu")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("calibration")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    to_onnx(model, SHAPE, folder / "fp32.onnx")
    prepared(folder / "fp32.onnx", folder / "prepared.onnx")
    return folder / "prepared.onnx"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(0.5, 0.2, (150, *SHAPE)), 0, 1).astype(np.float32)


def activations(graph: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """All activations at once, the plain way."""
    model = onnx.load(graph)
    names = [n.output[0] for n in model.graph.node if n.op_type in OPERATORS]
    known = {v.name for v in model.graph.output}
    model.graph.output.extend(v for v in model.graph.value_info if v.name in names and v.name not in known)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [o.name for o in session.get_outputs()]
    return dict(zip(outputs, session.run(None, {"images": images}), strict=True)) | {"images": images}


def ranges(graph: Path, images: np.ndarray, *methods: str, target: str = "cpu") -> dict[str, calibration.Ranges]:
    return compute_ranges(graph, images, OPERATORS, set(activations(graph, images[:1])), methods, get_target(target))


def test_extremes_are_exact_over_all_batches(graph: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = activations(graph, images)
    monkeypatch.setattr(calibration, "ACTIVATION_BUDGET", 100_000)
    found = ranges(graph, images, "minmax")["minmax"]
    assert set(expected) <= set(found)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], (values.min(), values.max()), rtol=1e-5, atol=1e-6)


def test_no_batch_exceeds_the_budget(graph: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    one = sum(v.nbytes for v in activations(graph, images[:1]).values())
    monkeypatch.setattr(calibration, "ACTIVATION_BUDGET", 3 * one)
    sizes = [len(batch) for _, batch in calibration._batches(calibration._probe(graph, []), images)]
    assert max(sizes) <= 3
    assert sum(sizes) == len(images)


def test_percentile_cuts_the_tails(graph: Path, images: np.ndarray) -> None:
    found = ranges(graph, images, "minmax", "percentile")
    tail = (100 - calibration.PERCENTILE) / 200
    for name, values in activations(graph, images).items():
        low, high = found["percentile"][name]
        width = float(2 * np.abs(values).max() / 4096) * 1.01
        assert (values < low).mean() <= tail <= (values <= low + width).mean()
        assert (values > high + width).mean() <= tail <= (values >= high - width).mean()


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_mse_is_no_worse_than_any_range_of_a_brute_force_grid(target: str) -> None:
    rng = np.random.default_rng(0)
    values = np.maximum(rng.standard_t(3, 20_000), -1.5)
    limit = float(np.abs(values).max())
    counts, edges = np.histogram(values, 4096, (-limit, limit))
    symmetric = get_target(target).symmetric
    found = mse_range(Histogram(counts, limit, float(values.min()), float(values.max())), symmetric=symmetric)
    centers = (edges[:-1] + edges[1:]) / 2

    def error(low: float, high: float) -> float:
        if symmetric:
            high = max(-low, high)
            low = -high
        scale = (high - low) / (254 if symmetric else 255)
        zero = round(-low / scale)
        level = np.clip(np.rint(centers / scale) + zero, 0, 254 if symmetric else 255)
        return float((((level - zero) * scale - centers) ** 2 * counts).sum())

    grid = np.linspace(0.2, 1.0, 40)
    best = min(error(values.min() * a, values.max() * b) for a in grid for b in grid)
    assert error(*found) <= best * 1.02
    assert error(*found) < 0.9 * error(float(values.min()), float(values.max())), "clipping must pay here"


def test_entropy_has_more_than_one_candidate(graph: Path, images: np.ndarray) -> None:
    """With ONNX Runtime's default of 128 bins its search has one candidate and is min-max under another name."""
    found = ranges(graph, images, "minmax", "entropy")
    assert any(found["entropy"][n][1] < 0.95 * found["minmax"][n][1] for n in found["minmax"])


@pytest.mark.parametrize("method", METHODS)
def test_ranges_lie_within_the_extremes_and_are_the_same_every_time(
    graph: Path, images: np.ndarray, method: str
) -> None:
    extremes = ranges(graph, images, "minmax")["minmax"]
    first, second = (ranges(graph, images, method)[method] for _ in range(2))
    assert first == second
    for name, (low, high) in first.items():
        assert extremes[name][0] - 1e-5 <= low <= high <= extremes[name][1] + 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_constant_and_dead_activations_do_not_break_a_method(graph: Path, method: str) -> None:
    black = np.zeros((3, *SHAPE), np.float32)
    assert all(np.isfinite(ends).all() for ends in ranges(graph, black, method)[method].values())


def test_nothing_is_printed_and_nothing_left_behind(
    graph: Path, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(graph.parent.iterdir())
    ranges(graph, images, *METHODS)
    assert capfd.readouterr() == ("", "")
    assert sorted(graph.parent.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_names_the_nearest(graph: Path, images: np.ndarray) -> None:
    with pytest.raises(UsageError, match="Did you mean 'percentile'"):
        ranges(graph, images, "percentil")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (np.zeros((0, 3, 8, 8), np.float32), "shape"),
        (np.zeros((4, 1, 8, 8), np.float32), "shape"),
        (np.zeros((4, 3, 8), np.float32), "shape"),
        (np.zeros((4, 8, 8, 3), np.float32), "shape"),
        (np.full((4, 3, 8, 8), 255.0, np.float32), r"\[0, 1\]"),
        (np.full((4, 3, 8, 8), np.nan, np.float32), r"\[0, 1\]"),
        (np.full((4, 3, 8, 8), -1.0, np.float32), r"\[0, 1\]"),
    ],
)
def test_wrong_calibration_images_are_refused(bad: np.ndarray, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        require_images(bad, ("batch", 3, 8, 8), "calibration")


def test_bytes_are_accepted_as_pixels() -> None:
    found = require_images(np.full((2, 3, 8, 8), 51, np.uint8), ("batch", 3, 8, 8), "calibration")
    assert found.dtype == np.float32
    assert found.max() == pytest.approx(0.2)
