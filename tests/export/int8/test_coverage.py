"""INT8 coverage read from the runtime's optimised graph."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.export import targets
from nayer_edge.export.eligible import eligible_nodes
from nayer_edge.export.int8.coverage import int8_coverage
from nayer_edge.export.targets import FLOAT_ONLY_OPS, PASS_THROUGH_OPS, QUANTIZABLE_OPS, get_target
from nayer_edge.export.to_int8 import prepared, to_int8
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.models.load import build_classifier

IMAGES = np.random.default_rng(0).random((8, 3, 16, 16), np.float32)


@pytest.fixture(scope="module")
def fp32(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    def export(folder: Path) -> None:
        torch.manual_seed(0)
        network = build_classifier("nayer:resnet8", InputSpec(height=16, width=16), ["a", "b"])
        to_onnx(network, (3, 16, 16), folder / "fp32.onnx")

    return once("coverage-fp32", export) / "fp32.onnx"


@pytest.mark.parametrize("target", ["cpu", "arm", "tensorrt", "tensorrt-rtx"])
def test_everything_eligible_runs_in_int8(fp32: Path, tmp_path: Path, target: str) -> None:
    to_int8(fp32, tmp_path / "m.onnx", IMAGES, target, method="minmax")
    found = int8_coverage(tmp_path / "m.onnx", target)
    assert found.fraction == 1.0, found.not_int8
    assert found.eligible == found.int8 == (10 if target in ("cpu", "arm") else 9)
    assert found.not_int8 == []
    assert len(found.ineligible) == (0 if target in ("cpu", "arm") else 1)
    assert found.verified == (target == "cpu")


def test_what_an_arm_processor_runs_is_verified_there(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph that ONNX Runtime executes is read on the machine itself, whichever family the file was made for."""
    monkeypatch.setattr(targets, "is_arm", lambda: True)
    for target in ("cpu", "arm"):
        to_int8(fp32, tmp_path / "m.onnx", IMAGES, target, method="minmax")
        assert int8_coverage(tmp_path / "m.onnx", target).verified


def test_an_fp32_file_has_none(fp32: Path) -> None:
    found = int8_coverage(fp32)
    assert (found.int8, found.fraction) == (0, 0.0)
    assert len(found.not_int8) == found.eligible == 10


def test_the_wrong_graph_for_the_processor_is_seen(fp32: Path, tmp_path: Path) -> None:
    """A symmetric graph made for TensorRT is annotated INT8 throughout, and ONNX Runtime runs it in float."""
    to_int8(fp32, tmp_path / "m.onnx", IMAGES, "tensorrt", method="minmax", rest="float32")
    assert int8_coverage(tmp_path / "m.onnx", "tensorrt").fraction == 1.0
    assert int8_coverage(tmp_path / "m.onnx", "cpu").fraction < 0.2


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        pytest.param("cpu", (0, 3, 4, 5, 9), id="cpu"),  # stem; two convolutions and shortcut of a block; head
        pytest.param("arm", (3,), id="arm"),
        pytest.param("cpu", range(10), id="cpu, all", marks=pytest.mark.slow),
    ],
)
def test_every_layer_can_be_excluded(fp32: Path, tmp_path: Path, target: str, numbers: Collection[int]) -> None:
    """In the graph that ONNX Runtime executes, which quantizes some weights that the file does not."""
    layers = [n.name for n in eligible_nodes(onnx.load(fp32), get_target(target))[0]]
    assert len(layers) == 10
    layers = [layers[number] for number in numbers]
    kept = []
    for layer in layers:
        to_int8(fp32, tmp_path / "m.onnx", IMAGES, target, method="minmax", nodes_to_exclude=[layer])
        found = int8_coverage(tmp_path / "m.onnx", target)
        assert found.int8 == found.eligible - 1
        kept.append(found.not_int8)
    assert kept == [[(layer, "excluded from quantization (mixed precision)")] for layer in layers]


def test_what_keeps_an_excluded_layer_in_float_changes_no_value(fp32: Path, tmp_path: Path) -> None:
    layers = [n.name for n in eligible_nodes(onnx.load(fp32), get_target("cpu"))[0]]
    to_int8(fp32, tmp_path / "m.onnx", IMAGES, "cpu", method="minmax", nodes_to_exclude=layers[1::2])
    graph = onnx.load(tmp_path / "m.onnx")
    without = onnx.ModelProto()
    without.CopyFrom(graph)
    barriers = {n.output[0]: n.input[0] for n in graph.graph.node if n.name.endswith("_stays_float")}
    assert barriers
    del without.graph.node[:]
    for node in graph.graph.node:
        if node.output[0] not in barriers:
            added = without.graph.node.add()
            added.CopyFrom(node)
            added.input[:] = [barriers.get(name, name) for name in node.input]
    images = IMAGES[:2]
    found, plain = (ReferenceEvaluator(m).run(None, {graph.graph.input[0].name: images})[0] for m in (graph, without))
    np.testing.assert_array_equal(found, plain)


def test_products_of_two_activations_are_ineligible_with_a_reason(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "x"], ["xx"], name="attention"),
            helper.make_node("MatMul", ["xx", "w"], ["y"], name="projection"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    found = int8_coverage(tmp_path / "m.onnx")
    assert [name for name, _ in found.ineligible] == ["attention"]
    assert "no constant weight" in found.ineligible[0][1]
    assert found.eligible == 1


def test_operators_without_an_int8_form_are_ineligible_and_not_ignored(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Einsum", ["x", "w"], ["xw"], name="mixing", equation="ij,jk->ik"),
            helper.make_node("MatMul", ["xw", "w"], ["y"], name="projection"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    found = int8_coverage(tmp_path / "m.onnx")
    assert found.eligible == 1
    ((name, reason),) = found.ineligible
    assert name == "mixing"
    assert reason.startswith("no quantized form")


@pytest.mark.parametrize(
    "model",
    [
        "nayer:wrn_10_1",
        pytest.param("nayer:vgg11_bn", marks=pytest.mark.slow),
        pytest.param("torchvision:shufflenet_v2_x0_5", marks=pytest.mark.slow),
        pytest.param("torchvision:efficientnet_b0", marks=pytest.mark.slow),
        pytest.param("torchvision:convnext_tiny", marks=pytest.mark.slow),
    ],
)
def test_the_table_decides_about_every_operator_of_a_student(model: str, tmp_path: Path) -> None:
    """None is quantized or kept in float by accident."""
    size = 32 if model.startswith("torchvision") else 16
    network = build_classifier(model, InputSpec(height=size, width=size), ["a", "b"])
    to_onnx(network, (3, size, size), tmp_path / "fp32.onnx")
    every_operator_is_decided(tmp_path / "fp32.onnx", tmp_path)


@pytest.mark.slow
def test_the_table_decides_about_every_operator_of_a_mobilenet(mobilenet_onnx: Path, tmp_path: Path) -> None:
    every_operator_is_decided(mobilenet_onnx, tmp_path)


def every_operator_is_decided(fp32: Path, folder: Path) -> None:
    found = {node.op_type for node in prepared(fp32, folder / "prepared.onnx").graph.node}
    assert found <= {*QUANTIZABLE_OPS, *FLOAT_ONLY_OPS, *(op.op_type for op in PASS_THROUGH_OPS)}


def test_nothing_eligible_is_a_coverage_of_zero(tmp_path: Path) -> None:
    to_onnx(nn.Flatten(), (1, 2, 2), tmp_path / "m.onnx")
    assert int8_coverage(tmp_path / "m.onnx").fraction == 0.0
