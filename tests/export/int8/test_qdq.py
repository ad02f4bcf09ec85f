"""One test per rule of each target, on the graph that is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.export.onnx_file import read_onnx
from nayer_edge.export.to_int8 import to_int8
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.models.load import build_classifier

SHAPE = (3, 16, 16)
TENSORRT = ("tensorrt", "tensorrt-rtx")
OURS = ("nayer:resnet8", "nayer:wrn_10_1")
MODELS = (*OURS, "torchvision:mobilenet_v3_small")


def smooth(n: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).random((n, 3, 4, 4), np.float32)
    return coarse.repeat(4, axis=2).repeat(4, axis=3)


def classifier(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_classifier(name, InputSpec(height=16, width=16), [str(i) for i in range(10)])
    with torch.no_grad():
        for seed in range(5):
            model.train()(torch.from_numpy(smooth(16, seed)))
    return model.eval()


def file_of(name: str, target: str = "fp32") -> str:
    return f"{MODELS.index(name)}.{target}.onnx"


@pytest.fixture(scope="module")
def fp32(mobilenet_onnx: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Path]:
    def export(folder: Path) -> None:
        for name in OURS:
            to_onnx(classifier(name), SHAPE, folder / file_of(name))

    folder = once("qdq-fp32", export)
    return {**{name: folder / file_of(name) for name in OURS}, "torchvision:mobilenet_v3_small": mobilenet_onnx}


@pytest.fixture(scope="module")
def graphs(
    fp32: dict[str, Path], once: Callable[[str, Callable[[Path], object]], Path]
) -> dict[tuple[str, str], ModelProto]:
    """(model, target) → quantized graph, the rest in float32."""
    all_of_them = [(name, target) for name in MODELS for target in ("cpu", "arm", *TENSORRT)]

    def quantize(folder: Path) -> None:
        for name, target in all_of_them:
            images = smooth(8, 9) if name in OURS else smooth(8, 9).repeat(2, axis=2).repeat(2, axis=3)
            to_int8(fp32[name], folder / file_of(name, target), images, target, method="minmax", rest="float32")

    folder = once("qdq-int8", quantize)
    return {(name, target): read_onnx(folder / file_of(name, target)) for name, target in all_of_them}


class Graph:
    """Questions to a Q/DQ graph."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {t.name: t for t in model.graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output}

    def consumers(self, name: str) -> list[NodeProto]:
        return [node for node in self.nodes if name in node.input]

    def all(self, *kinds: str) -> list[NodeProto]:
        return [node for node in self.nodes if node.op_type in kinds]

    def quantizers(self) -> list[NodeProto]:
        """Q of activations."""
        return self.all("QuantizeLinear")

    def weight_dqs(self) -> list[NodeProto]:
        return [n for n in self.all("DequantizeLinear") if n.input[0] in self.constants]

    def is_dequantized(self, name: str) -> bool:
        return name in self.producer and self.producer[name].op_type == "DequantizeLinear"

    def value(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("target", "kind"),
    [("cpu", TensorProto.UINT8), ("arm", TensorProto.INT8), *((t, TensorProto.INT8) for t in TENSORRT)],
)
def test_activations_have_the_targets_type(
    graphs: dict[tuple[str, str], ModelProto], name: str, target: str, kind: int
) -> None:
    graph = Graph(graphs[name, target])
    assert graph.quantizers()
    assert {graph.constants[q.input[2]].data_type for q in graph.quantizers()} == {kind}
    assert {graph.value(q.input[1]).ndim for q in graph.quantizers()} == {0}, "one scale per activation"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["cpu", "arm", *TENSORRT])
def test_weights_are_symmetric_int8_with_one_scale_per_output_channel(
    graphs: dict[tuple[str, str], ModelProto], name: str, target: str
) -> None:
    graph, seen = Graph(graphs[name, target]), 0
    largest = 64 if target == "cpu" else 127
    for node in graph.all("Conv", "Gemm"):
        if not graph.is_dequantized(node.input[1]):
            continue
        dq = graph.producer[node.input[1]]
        weight, scale, zero = (graph.value(i) for i in dq.input)
        assert weight.dtype == np.int8
        assert weight.min() >= -largest
        assert not zero.any()
        assert scale.shape == zero.shape == (weight.shape[0],)
        assert next(a.i for a in dq.attribute if a.name == "axis") == 0
        assert np.abs(weight.reshape(len(weight), -1)).max(axis=1).max() == largest
        seen += 1
    assert seen >= 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", TENSORRT)
def test_tensorrt_gets_no_zero_point_other_than_zero(
    graphs: dict[tuple[str, str], ModelProto], name: str, target: str
) -> None:
    graph = Graph(graphs[name, target])
    for node in graph.all("QuantizeLinear", "DequantizeLinear"):
        zero = graph.value(node.input[2])
        assert zero.dtype == np.int8
        assert not zero.any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", TENSORRT)
def test_tensorrt_gets_float_biases(graphs: dict[tuple[str, str], ModelProto], name: str, target: str) -> None:
    graph = Graph(graphs[name, target])
    assert not [t for t in graph.constants.values() if t.data_type == TensorProto.INT32]
    for node in graph.all("Conv", "Gemm"):
        for bias in node.input[2:3]:
            assert graph.constants[bias].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["cpu", "arm"])
def test_onnx_runtime_gets_int32_biases_at_input_times_weight_scale(
    graphs: dict[tuple[str, str], ModelProto], name: str, target: str
) -> None:
    graph, seen = Graph(graphs[name, target]), 0
    for node in graph.all("Conv", "Gemm"):
        for bias in node.input[2:3]:
            dq = graph.producer[bias]
            assert graph.constants[dq.input[0]].data_type == TensorProto.INT32
            x, w = (graph.value(graph.producer[i].input[1]) for i in node.input[:2])
            np.testing.assert_allclose(graph.value(dq.input[1]), x * w, rtol=1e-6)
            seen += 1
    assert seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", TENSORRT)
def test_tensorrt_has_q_only_before_quantized_operators_and_on_skip_inputs(
    graphs: dict[tuple[str, str], ModelProto], name: str, target: str
) -> None:
    graph = Graph(graphs[name, target])
    adds = 0
    for q in graph.quantizers():
        for dq in graph.consumers(q.output[0]):
            for user in graph.consumers(dq.output[0]):
                assert user.op_type in ("Conv", "Gemm", "Add"), f"{user.name} reads a quantized tensor"
                adds += user.op_type == "Add"
        source = graph.producer.get(q.input[0])
        users = [u for dq in graph.consumers(q.output[0]) for u in graph.consumers(dq.output[0])]
        if source is not None and source.op_type == "Conv" and all(u.op_type == "Add" for u in users):
            # The output of a convolution is quantized alone only where it is a skip (a down-sampling shortcut).
            assert len(users) == 1
    residual = [
        add
        for add in graph.all("Add")
        if any(i in graph.producer and graph.producer[i].op_type in ("Conv", "DequantizeLinear") for i in add.input)
    ]
    for add in residual:
        flags = [graph.is_dequantized(i) for i in add.input]
        assert sum(flags) == 1, f"{add.name}: exactly the skip input is quantized, not {flags}"
        main = add.input[flags.index(False)]
        assert graph.producer[main].op_type == "Conv", "the main branch joins its Add unquantized, to fuse"
    assert adds == len(residual)


@pytest.mark.parametrize("target", TENSORRT)
def test_tensorrt_takes_the_deeper_convolution_as_main_branch(
    graphs: dict[tuple[str, str], ModelProto], target: str
) -> None:
    graph, shortcuts = Graph(graphs["nayer:resnet8", target]), 0
    for add in graph.all("Add"):
        quantized = next(i for i in add.input if graph.is_dequantized(i))
        source = graph.producer.get(graph.producer[graph.producer[quantized].input[0]].input[0])
        if source is not None and source.op_type == "Conv":
            weight = graph.producer[source.input[1]].input[0]
            assert graph.constants[weight].dims[2:] == [1, 1], "the 1×1 shortcut is the skip"
            shortcuts += 1
    assert shortcuts == 2


@pytest.mark.parametrize("target", ["cpu", "arm"])
def test_onnx_runtime_quantizes_both_inputs_and_the_output_of_an_add(
    graphs: dict[tuple[str, str], ModelProto], target: str
) -> None:
    for name in MODELS:
        graph = Graph(graphs[name, target])
        for add in graph.all("Add"):
            assert all(graph.is_dequantized(i) for i in add.input)
            assert [n.op_type for n in graph.consumers(add.output[0])] == ["QuantizeLinear"]


@pytest.mark.parametrize("target", ["cpu", "arm"])
def test_relu_disappears_into_saturation(graphs: dict[tuple[str, str], ModelProto], target: str) -> None:
    graph = Graph(graphs["nayer:resnet8", target])
    assert not graph.all("Relu")
    smallest = 0 if target == "cpu" else -128
    floors = [int(graph.value(q.input[2])) for q in graph.quantizers()]
    assert Counter(floors)[smallest] >= 6, "after a ReLU, zero is the smallest integer"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["cpu", "arm", *TENSORRT])
def test_logits_and_images_stay_float(graphs: dict[tuple[str, str], ModelProto], name: str, target: str) -> None:
    model = graphs[name, target]
    graph = Graph(model)
    assert graph.producer["logits"].op_type == "Gemm"
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("target", TENSORRT)
def test_tensorrt_leaves_depthwise_and_image_convolutions_in_float(
    graphs: dict[tuple[str, str], ModelProto], target: str
) -> None:
    graph = Graph(graphs["torchvision:mobilenet_v3_small", target])
    for node in graph.all("Conv"):
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        weight = node.input[1]
        dims = graph.constants[weight if weight in graph.constants else graph.producer[weight].input[0]].dims
        eligible = groups == 1 and dims[1] >= 8
        assert graph.is_dequantized(node.input[0]) == graph.is_dequantized(weight) == eligible


@pytest.mark.parametrize("target", TENSORRT)
def test_the_rest_is_fp16_with_float32_inputs_and_outputs(fp32: dict[str, Path], tmp_path: Path, target: str) -> None:
    to_int8(fp32["nayer:resnet8"], tmp_path / "m.onnx", smooth(8, 9), target, method="minmax")
    model = read_onnx(tmp_path / "m.onnx")
    kinds = Counter(t.data_type for t in model.graph.initializer)
    assert kinds[TensorProto.FLOAT] == 0
    assert kinds[TensorProto.FLOAT16] > 0
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    scales = [Graph(model).value(n.input[1]) for n in Graph(model).quantizers()]
    assert all(s.dtype == np.float16 and s > 0 for s in scales)


def test_excluded_nodes_and_pass_through_nodes_between_them_stay_float(fp32: dict[str, Path], tmp_path: Path) -> None:
    source = read_onnx(fp32["nayer:resnet8"])
    everything = [n.name for n in source.graph.node if n.op_type in ("Conv", "Gemm")]
    to_int8(
        fp32["nayer:resnet8"], tmp_path / "m.onnx", smooth(8, 9), "cpu", method="minmax", nodes_to_exclude=everything
    )
    graph = Graph(read_onnx(tmp_path / "m.onnx"))
    assert not graph.quantizers(), "an Add in INT8 between float convolutions would only lose accuracy"
    first = everything[1]
    to_int8(fp32["nayer:resnet8"], tmp_path / "n.onnx", smooth(8, 9), "cpu", method="minmax", nodes_to_exclude=[first])
    graph = Graph(read_onnx(tmp_path / "n.onnx"))
    floats = [n.name for n in graph.all("Conv", "Gemm") if not graph.is_dequantized(n.input[1])]
    assert floats == [first]


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.stem(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_an_excluded_layer_keeps_a_weight_that_it_shares_with_a_quantized_one(
    once: Callable[[str, Callable[[Path], object]], Path], tmp_path: Path, target: str
) -> None:
    torch.manual_seed(0)
    network = Tied().eval()
    fp32 = once("qdq-tied", lambda folder: to_onnx(network, SHAPE, folder / "fp32.onnx")) / "fp32.onnx"
    convs = [node for node in read_onnx(fp32).graph.node if node.op_type == "Conv"]
    assert convs[1].input[1] == convs[2].input[1], "the exported file has the weight once"
    first, second = (node.name for node in convs[1:])
    excluded = {"nodes_to_exclude": [second], "method": "minmax", "rest": "float32"}
    to_int8(fp32, tmp_path / "m.onnx", smooth(8, 9), target, **excluded)  # type: ignore[arg-type]
    graph = Graph(read_onnx(tmp_path / "m.onnx"))
    first, second = (next(node for node in graph.all("Conv") if node.name == name) for name in (first, second))
    assert graph.is_dequantized(first.input[1])
    assert np.array_equal(numpy_helper.to_array(graph.constants[second.input[1]]), network.second.weight.detach())


class TwoReaders(nn.Module):
    """One tensor that a convolution and a pooling layer both read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = torch.cat([self.conv(x), torch.max_pool2d(x, 3, 1, 1)], dim=1)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("target", TENSORRT)
def test_tensorrt_reads_the_float_tensor_in_operators_that_are_not_quantized(
    once: Callable[[str, Callable[[Path], object]], Path], tmp_path: Path, target: str
) -> None:
    torch.manual_seed(0)
    network = TwoReaders()
    fp32 = once("qdq-two-readers", lambda folder: to_onnx(network, SHAPE, folder / "fp32.onnx")) / "fp32.onnx"
    to_int8(fp32, tmp_path / "m.onnx", smooth(8, 9), target, method="minmax", rest="float32")
    graph = Graph(read_onnx(tmp_path / "m.onnx"))
    (pool,), (concat,) = graph.all("MaxPool"), graph.all("Concat")
    assert graph.producer[pool.input[0]].op_type == "Relu"
    assert not any(graph.is_dequantized(name) for name in concat.input)
    conv = next(n for n in graph.all("Conv") if n.name == "conv")
    assert graph.is_dequantized(conv.input[0])
