"""The torch form of a graph computes what ONNX Runtime computes, rounding included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.export.int8.calibration import Ranges, compute_ranges
from nayer_edge.export.int8.qdq import calibrated_tensors, with_qdq
from nayer_edge.export.qat.graph_network import GraphNetwork
from nayer_edge.export.qat.torch_operators import OPERATORS
from nayer_edge.export.targets import TARGETS, Target, quantized_operators
from nayer_edge.export.to_int8 import prepared
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.models.load import build_classifier

Once = Callable[[str, Callable[[Path], object]], Path]
SHAPE = (3, 8, 8)
IMAGES = np.random.default_rng(0).random((24, *SHAPE), np.float32)

SCHEMES = (
    TARGETS["cpu"],
    TARGETS["arm"],
    TARGETS["tensorrt"],
    replace(TARGETS["cpu"], bias="float"),
    replace(TARGETS["arm"], bias="float"),
)
IDS = ("cpu", "arm", "tensorrt", "cpu with float biases", "arm with float biases")


class Mixed(nn.Module):
    """What the zoo does not have: depthwise, h-swish, squeeze and excitation, concatenation, pooling of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.average = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(images))
        x = x * self.squeeze(x)
        left, right = torch.chunk(x, 2, dim=1)
        x = torch.cat([right, left, nn.functional.silu(x)], dim=1)
        x = torch.relu(self.norm(self.average(self.pool(x))))
        return self.head(x.flatten(1))


def run(model: ModelProto, images: np.ndarray) -> np.ndarray:
    """ONNX Runtime without any optimisation."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def alive(model: nn.Module) -> nn.Module:
    """Random weights, with activations of ordinary size and BatchNorms that are no identity."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        model.train()(torch.from_numpy(IMAGES))
    return model.eval()


@pytest.fixture(
    scope="module", params=["mixed", "nayer:resnet8", pytest.param("nayer:wrn_10_1", marks=pytest.mark.slow)]
)
def graph(request: pytest.FixtureRequest, once: Once) -> tuple[Path, ModelProto]:
    def build() -> nn.Module:
        spec = InputSpec(height=8, width=8)
        return alive(Mixed() if request.param == "mixed" else build_classifier(request.param, spec, list("abcde")))

    return prepared_once(once, f"qat-{request.param.replace(':', '-')}", build)


def prepared_once(once: Once, name: str, build: Callable[[], nn.Module]) -> tuple[Path, ModelProto]:
    """A network's graph, prepared for quantization once for all workers: its file and what it holds."""

    def export(folder: Path) -> None:
        torch.manual_seed(0)
        to_onnx(build(), SHAPE, folder / "fp32.onnx")
        prepared(folder / "fp32.onnx", folder / "prepared.onnx")

    path = once(name, export) / "prepared.onnx"
    return path, onnx.load(path)


def ranges_of(graph: tuple[Path, ModelProto], target: Target) -> Ranges:
    operators = (*quantized_operators(target), "Add")
    tensors = calibrated_tensors(graph[1], target)
    return compute_ranges(graph[0], IMAGES, operators, tensors, ("minmax",), target)["minmax"]


def same_errors(found: np.ndarray, wanted: np.ndarray, exact: np.ndarray, rounded_biases: bool) -> None:
    """Two computations round to the same levels: their errors against `exact` are the same errors.

    On some images they are equal but for the order of sums. Where a value lies within 1e-7 of a tie, one of them may
    take the next level, and the layers behind follow. Biases rounded to 32 bits, which only one of them has, do the
    same, a little more often.
    """
    difference, error = np.abs(found - wanted).max(axis=1), np.abs(wanted - exact).max(axis=1)
    assert (error > 1e-3).mean() > 0.9, "there must be something to compare"
    assert rounded_biases or (difference < 1e-5).mean() > 0.1, difference
    assert np.corrcoef((found - exact).ravel(), (wanted - exact).ravel())[0, 1] > 0.8


@torch.no_grad()
def test_the_float_graph(graph: tuple[Path, ModelProto]) -> None:
    network = GraphNetwork(graph[1], graph[1], {}, TARGETS["cpu"])
    wanted = run(graph[1], IMAGES)
    assert np.abs(wanted).max() > 0.05, "there must be something to compare"
    np.testing.assert_allclose(network(torch.from_numpy(IMAGES)).numpy(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", SCHEMES, ids=IDS)
@torch.no_grad()
def test_the_quantized_graph(graph: tuple[Path, ModelProto], target: Target) -> None:
    ranges = ranges_of(graph, target)
    quantized = with_qdq(graph[1], ranges, target)
    network = GraphNetwork(graph[1], quantized, ranges, target)
    same_errors(
        network(torch.from_numpy(IMAGES)).numpy(), run(quantized, IMAGES), run(graph[1], IMAGES), target.bias == "int32"
    )


@pytest.mark.parametrize("target", SCHEMES, ids=IDS)
def test_what_was_trained_is_what_is_written(graph: tuple[Path, ModelProto], target: Target) -> None:
    """Changed weights, biases and ranges go through the quantizer and compute the same in ONNX Runtime."""
    ranges = ranges_of(graph, target)
    network = GraphNetwork(graph[1], with_qdq(graph[1], ranges, target), ranges, target)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.weight_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
        for parameter in network.range_parameters():
            parameter += 0.2 * torch.rand(parameter.shape, generator=random)
        found = network(torch.from_numpy(IMAGES)).numpy()
    written = with_qdq(network.trained(graph[1]), ranges | network.ranges(), target)
    same_errors(found, run(written, IMAGES), run(with_qdq(graph[1], ranges, target), IMAGES), target.bias == "int32")


def test_everything_that_can_learn_gets_a_gradient(graph: tuple[Path, ModelProto]) -> None:
    target = TARGETS["cpu"]
    ranges = ranges_of(graph, target)
    for bits in (8, 4):
        network = GraphNetwork(graph[1], with_qdq(graph[1], ranges, target), ranges, target, bits=bits)
        network(torch.from_numpy(IMAGES)).square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
        largest = [float(p.grad.abs().max()) for p in network.weight_parameters() if p.grad is not None]
        assert sum(size > 0 for size in largest) > 0.8 * len(largest)


@torch.no_grad()
def test_four_bits_have_sixteen_levels_but_at_the_edges(graph: tuple[Path, ModelProto]) -> None:
    target = TARGETS["cpu"]
    ranges = ranges_of(graph, target)
    quantized = with_qdq(graph[1], ranges, target)
    network = GraphNetwork(graph[1], quantized, ranges, target, bits=4)
    grids = [module.grid.bits for module in network.learnt_ranges]
    assert grids.count(8) in (1, 2)
    assert set(grids) == {4, 8}
    products = [n for n in quantized.graph.node if n.op_type in ("Conv", "Gemm")]
    for node in products:
        constant = node.input[1].removesuffix("_DequantizeLinear_Output") + "_quantized"
        first_channel = network._weight(constant)[0].unique()
        if node.name in (products[0].name, products[-1].name):
            assert len(first_channel) > 15
        else:
            assert len(first_channel) <= 15
    exact, coarse = network(torch.from_numpy(IMAGES)), run(quantized, IMAGES)
    assert np.abs(exact.numpy() - coarse).mean() > 0, "4 bits are not 8"


def test_an_operator_without_a_gradient_is_named_with_its_layer() -> None:
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["y"], name="head.NonZero")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [2, None])],
    )
    model = helper.make_model(graph)
    with pytest.raises(UsageError, match=r"NonZero \(layer 'head.NonZero'\)[\s\S]*without --qat"):
        GraphNetwork(model, model, {}, TARGETS["cpu"])


class Again(nn.Module):
    """One convolution applied twice: two products with one weight and, as they are quantized, a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("target", SCHEMES, ids=IDS)
def test_both_uses_of_a_layer_are_trained_as_they_are_written(once: Once, target: Target) -> None:
    graph = prepared_once(once, "qat-again", lambda: Again().eval())
    ranges = ranges_of(graph, target)
    network = GraphNetwork(graph[1], with_qdq(graph[1], ranges, target), ranges, target)
    with torch.no_grad():
        for parameter in network.weight_parameters():
            parameter += 0.5
        found = network(torch.from_numpy(IMAGES)).numpy()
    wanted = run(with_qdq(network.trained(graph[1]), ranges | network.ranges(), target), IMAGES)
    assert np.abs(found - wanted).max() < 0.02 * wanted.std()


def single(operator: str, inputs: dict[str, np.ndarray], outputs: int = 1, **attributes: object) -> ModelProto:
    """A graph of one node, whose first input is x and whose others are constants."""
    names = list(inputs)
    graph = helper.make_graph(
        [helper.make_node(operator, names, [f"y{i}" for i in range(outputs)], name="only", **attributes)],
        "g",
        [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, inputs[names[0]].shape)],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)],
        [numpy_helper.from_array(value, name) for name, value in inputs.items() if name != names[0]],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


X = np.random.default_rng(1).normal(size=(2, 4, 6, 5)).astype(np.float32)
FLAT = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("AveragePool", {"x": X}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("AveragePool", {"x": X}, {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("MaxPool", {"x": X}, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        ("MaxPool", {"x": X}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
        ("Conv", {"x": X, "w": X[:, :2, :3, :3]}, {"group": 2, "pads": [0, 1, 1, 0], "dilations": [1, 1]}),
        (
            "ConvTranspose",
            {"x": X, "w": X.reshape(4, 2, 6, 5)[:, :, :3, :3]},
            {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        ),
        ("Gemm", {"x": FLAT, "w": FLAT, "b": FLAT[0, :3]}, {"transB": 1, "alpha": 0.5, "beta": 2.0}),
        ("Gemm", {"x": FLAT, "w": FLAT[:, :2]}, {"transA": 1}),
        ("MatMul", {"x": X, "w": FLAT[:, :3].repeat(5, axis=0)[:5]}, {}),
        ("Clip", {"x": X, "low": np.array(-0.5, np.float32), "high": np.array(0.25, np.float32)}, {}),
        ("HardSigmoid", {"x": X}, {}),
        ("HardSwish", {"x": X}, {}),
        ("LeakyRelu", {"x": X}, {}),
        ("Gelu", {"x": X}, {"approximate": "tanh"}),
        ("Tanh", {"x": X}, {}),
        ("Softmax", {"x": X}, {"axis": 1}),
        ("LayerNormalization", {"x": X, "s": X[0, 0, 0], "b": X[0, 0, 1]}, {"axis": -1}),
        ("Flatten", {"x": X}, {"axis": 2}),
        ("Reshape", {"x": X, "shape": ints(0, -1, 5)}, {}),
        ("Transpose", {"x": X}, {"perm": [0, 2, 3, 1]}),
        ("Slice", {"x": X, "s": ints(1, 0), "e": ints(9, 4), "a": ints(2, 3), "t": ints(2, 1)}, {}),
        ("Slice", {"x": X, "s": ints(0, 1), "e": ints(2, 3)}, {}),
        ("Slice", {"x": X, "s": ints(-1), "e": ints(-99), "a": ints(2), "t": ints(-1)}, {}),
        ("Slice", {"x": X, "s": ints(99, 3), "e": ints(1, 0), "a": ints(3, 1), "t": ints(-2, -1)}, {}),
        ("Pad", {"x": X, "p": ints(0, 1, 0, 0, 0, 2, 1, 0)}, {}),
        ("Pad", {"x": X, "p": ints(1, 2), "v": np.array(3.0, np.float32), "a": ints(-1)}, {}),
        ("Pad", {"x": X, "p": ints(0, 0, 1, 1, 0, 0, 1, 1)}, {"mode": "reflect"}),
        ("Pad", {"x": X, "p": ints(0, 0, 1, 2, 0, 0, 2, 1)}, {"mode": "edge"}),
        ("Pad", {"x": X, "p": ints(0, 0, 1, 2, 0, 0, 2, 1)}, {"mode": "wrap"}),
        ("ReduceMean", {"x": X, "a": ints(1, 3)}, {"keepdims": 0}),
        ("ReduceMean", {"x": X}, {}),
        ("Unsqueeze", {"x": FLAT, "a": ints(0, 2)}, {}),
        ("Squeeze", {"x": X[:1], "a": ints(0)}, {}),
        ("Identity", {"x": X}, {}),
        ("Sigmoid", {"x": X}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_operators(operator: str, inputs: dict[str, np.ndarray], attributes: dict[str, object]) -> None:
    model = single(operator, inputs, **attributes)
    network = GraphNetwork(model, model, {}, TARGETS["cpu"])
    found = network(torch.from_numpy(inputs["x"])).numpy()
    np.testing.assert_allclose(found, run(model, inputs["x"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "attributes"), [({"n": ints(3, 1)}, {"axis": 1}), ({}, {"axis": 1, "num_outputs": 2})]
)
@torch.no_grad()
def test_split(sizes: dict[str, np.ndarray], attributes: dict[str, int]) -> None:
    model = single("Split", {"x": X, **sizes}, 2, **attributes)
    found = OPERATORS["Split"](attributes, torch.from_numpy(X), *(torch.from_numpy(n) for n in sizes.values()))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for mine, wanted in zip(found, session.run(None, {"x": X}), strict=True):
        np.testing.assert_array_equal(mine.numpy(), wanted)


@pytest.mark.parametrize(
    ("operator", "attributes", "why"),
    [
        ("Conv", {"auto_pad": "SAME_UPPER"}, "auto_pad"),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, "asymmetric"),
    ],
)
def test_unsupported_attributes_are_refused(operator: str, attributes: dict[str, object], why: str) -> None:
    inputs = {"x": X} | ({"w": X[:, :4, :3, :3]} if operator == "Conv" else {})
    model = single(operator, inputs, **attributes)
    with pytest.raises(UsageError, match=why):
        GraphNetwork(model, model, {}, TARGETS["cpu"])
