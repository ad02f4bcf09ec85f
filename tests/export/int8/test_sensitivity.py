"""Noise per layer, bias correction, and the search for mixed precision."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from nayer_edge.export.int8.calibration import compute_ranges
from nayer_edge.export.int8.sensitivity import (
    LayerSensitivity,
    activation_scale,
    bias_corrected,
    layer_errors,
    most_sensitive_first,
    rounded_weight,
    search_mixed_precision,
)
from nayer_edge.export.parity import Agreement
from nayer_edge.export.targets import get_target
from nayer_edge.export.to_int8 import prepared
from nayer_edge.export.to_onnx import to_onnx

IMAGES = np.random.default_rng(0).random((40, 3, 8, 8), np.float32)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sensitivity")
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )
    with torch.no_grad():
        model[2].weight[3] *= 40  # one loud channel of an otherwise quiet layer
    to_onnx(model, (3, 8, 8), folder / "fp32.onnx")
    return prepared(folder / "fp32.onnx", folder / "prepared.onnx"), folder / "prepared.onnx"


@pytest.mark.parametrize("target", ["cpu", "arm", "tensorrt"])
def test_noise_and_mean_error_are_those_of_a_plain_computation(
    graph: tuple[onnx.ModelProto, Path], target: str
) -> None:
    model, path = graph
    device = get_target(target)
    ranges = compute_ranges(path, IMAGES, ("Conv", "Gemm"), set(), ("minmax",), device)["minmax"]
    found = layer_errors(model, ranges, device, IMAGES)
    assert set(found) == ({"0", "2", "5"} if target != "tensorrt" else {"2", "5"})
    node = next(n for n in model.graph.node if n.name == "2")
    tap = onnx.ModelProto()
    tap.CopyFrom(model)
    wanted = (node.input[0], node.output[0])
    tap.graph.output.extend(v for v in tap.graph.value_info if v.name in wanted)
    session = ort.InferenceSession(tap.SerializeToString(), providers=["CPUExecutionProvider"])
    x, y = session.run(list(wanted), {"images": IMAGES})
    scale, zero = activation_scale(*ranges[node.input[0]], device)
    low, high = (0, 255) if device.activations == "uint8" else (-128, 127)
    quantized = (np.clip(np.rint(x / np.float32(scale)) + zero, low, high) - zero) * np.float32(scale)
    weight = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == node.input[1]))
    rounded = torch.nn.functional.conv2d(
        torch.from_numpy(quantized.astype(np.float32)), torch.from_numpy(rounded_weight(node, weight, device).copy())
    ).numpy()
    expected = 10 * np.log10((y.astype(np.float64) ** 2).sum() / ((y - rounded).astype(np.float64) ** 2).sum())
    assert found["2"].sqnr_db == pytest.approx(float(expected), abs=0.1)
    np.testing.assert_allclose(found["2"].mean, (y - rounded).mean(axis=(0, 2, 3)), atol=2e-5)


@pytest.mark.parametrize(("target", "steps"), [("cpu", 64), ("arm", 127), ("tensorrt", 127)])
def test_weights_are_rounded_per_output_channel(graph: tuple[onnx.ModelProto, Path], target: str, steps: int) -> None:
    model, _ = graph
    node = next(n for n in model.graph.node if n.name == "2")
    weight = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == node.input[1]))
    error = np.abs(rounded_weight(node, weight, get_target(target)) - weight).reshape(len(weight), -1).max(1)
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    assert (error <= largest / (2 * steps) * 1.001).all(), "the loud channel must not coarsen the others"


def test_bias_correction_cancels_the_mean_error(graph: tuple[onnx.ModelProto, Path]) -> None:
    model, path = graph
    device = get_target("cpu")
    ranges = compute_ranges(path, IMAGES, ("Conv", "Gemm"), set(), ("minmax",), device)["minmax"]
    errors = layer_errors(model, ranges, device, IMAGES)
    corrected = bias_corrected(model, errors)
    old = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    new = {t.name: numpy_helper.to_array(t) for t in corrected.graph.initializer}
    for node in corrected.graph.node:
        if node.name in errors:
            shift = new[node.input[2]] - old.get(node.input[2], 0)
            np.testing.assert_allclose(shift, errors[node.name].mean, atol=1e-6)
    assert len(next(n for n in corrected.graph.node if n.name == "2").input) == 3, "it had no bias before"
    assert len(next(n for n in model.graph.node if n.name == "2").input) == 2, "the original is untouched"


def layers(*agreements: float) -> list[LayerSensitivity]:
    return [LayerSensitivity(str(i), 30.0, Agreement(100, a, 0.01)) for i, a in enumerate(agreements)]


def test_the_worst_layer_comes_first() -> None:
    assert most_sensitive_first(layers(0.99, 0.90, 0.95)) == ["1", "2", "0"]
    rows = [LayerSensitivity("a", 40.0, None), LayerSensitivity("b", 12.0, None)]
    assert most_sensitive_first(rows) == ["b", "a"]


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 8, 13])
def test_as_few_layers_as_possible_are_excluded(needed: int) -> None:
    order, asked = [str(i) for i in range(13)], []

    def measure(chosen: Collection[str]) -> Agreement:
        asked.append(len(chosen))
        return Agreement(100, 0.999 if len(chosen) >= needed else 0.9, 0.0)

    chosen, best, trail = search_mixed_precision(measure, order, 0.01)
    assert chosen == order[:needed]
    assert best.top1 == 0.999
    assert [entry["float_layers"] for entry in trail] == asked
    assert len(asked) <= 9


def test_images_that_int8_gains_make_up_for_those_it_loses() -> None:
    """Half of the answers change, but on balance one image in a hundred is lost."""
    changed = Agreement(100, 0.5, 1.0, lost=21, gained=20)
    chosen, best, _ = search_mixed_precision(lambda _: changed, ["a", "b", "c"], 0.01)
    assert (chosen, best) == ([], changed)
    assert search_mixed_precision(lambda _: changed, ["a", "b", "c"], 0.009)[0] == ["a", "b", "c"]


def test_choices_with_which_the_quantizer_fails_are_skipped() -> None:
    order, good, bad = ["a", "b", "c", "d"], Agreement(100, 1.0, 0.0), Agreement(100, 0.5, 1.0)

    def search(results: list[Agreement | None]) -> tuple[list[str], Agreement]:
        chosen, best, trail = search_mixed_precision(lambda layers: results[len(layers)], order, 0.01)
        assert [entry["float_layers"] for entry in trail if entry.get("failed")] == [
            entry["float_layers"] for entry in trail if results[entry["float_layers"]] is None
        ]
        return chosen, best

    assert search([bad, None, good, good, good]) == (order[:2], good)
    assert search([bad, bad, bad, None, good]) == (order, good)
    assert search([bad, bad, bad, None, None]) == (order[:2], bad), "out of reach: as many as could be"
    assert search([bad, None, None, None, None]) == ([], bad)


def test_all_layers_are_excluded_if_the_limit_is_out_of_reach() -> None:
    chosen, best, _ = search_mixed_precision(lambda _: Agreement(100, 0.5, 1.0), ["a", "b", "c"], 0.01)
    assert (chosen, best.top1) == (["a", "b", "c"], 0.5)
