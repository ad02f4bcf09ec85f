"""Engines, with TensorRT-RTX's real parser and builder: it builds ahead of time, without a GPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, MissingError, UsageError
from nayer_edge.export.engine_inspector import confirms, layer_types
from nayer_edge.export.fp16 import to_fp16
from nayer_edge.export.to_engine import compute_capabilities, to_engine
from nayer_edge.export.to_int8 import to_int8
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.models import zoo
from nayer_edge.models.load import build_classifier

# Found, not imported, which takes seconds in every worker that collects this file.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed: pip install '.[rtx]'"
)

SHAPE = (3, 32, 32)
IMAGES = np.random.default_rng(0).random((4, *SHAPE), np.float32)
RTX = "tensorrt-rtx"


def export(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "fp32.onnx"
    to_onnx(build_classifier(name, InputSpec(), [str(i) for i in range(10)]), SHAPE, path)
    return path


@pytest.fixture(scope="module")
def files(once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Path]:
    def make(folder: Path) -> None:
        fp32 = export("nayer:resnet8", folder)
        to_fp16(fp32, folder / "fp16.onnx")
        for name, target in (("int8", RTX), ("cpu", "cpu"), ("arm", "arm")):
            to_int8(fp32, folder / f"{name}.onnx", IMAGES, target, method="minmax")

    folder = once("to-engine", make)
    return {name: folder / f"{name}.onnx" for name in ("fp32", "fp16", "int8", "cpu", "arm")}


@pytest.mark.parametrize(
    ("precision", "kinds"), [("fp32", {"float"}), ("fp16", {"float", "half"}), ("int8", {"float", "half", "int8"})]
)
def test_engines_are_built_in_the_types_that_the_graph_states(
    files: dict[str, Path], tmp_path: Path, precision: str, kinds: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed, and options that RTX lacks are noted."""
    info = to_engine(
        files[precision],
        tmp_path / "e.engine",
        RTX,
        compute_capability="sm89",
        batch=(1, 2, 8),
        timing_cache=tmp_path / "t.cache",
    )
    assert capfd.readouterr() == ("", "")
    assert any("timing cache" in note for note in info.notes)
    assert not (tmp_path / "t.cache").exists()
    assert info.size_bytes == (tmp_path / "e.engine").stat().st_size > 1000
    assert set(info.network_types) == kinds, "strongly typed: no layer may silently be of another type"
    if precision != "fp32":
        assert info.network_types["float"] == 1, "only the cast back to float32 logits"
    assert (info.runtime, info.compute_capability, info.batch) == ("tensorrt_rtx", "sm89", (1, 2, 8))
    assert info.precision_verified == confirms(info.layers, precision)
    if not torch.cuda.is_available():
        assert not info.precision_verified
        assert any("not verified" in note for note in info.notes)
    assert any("does not show" in note for note in info.notes) == (precision == "int8")


@pytest.mark.slow
def test_another_kind_of_zoo_student_builds_in_int8(tmp_path: Path) -> None:
    """Beside the ResNet-8 above; the slow tests build every one."""
    path = export("nayer:wrn_16_1", tmp_path)
    to_int8(path, tmp_path / "int8.onnx", IMAGES, RTX, method="minmax")
    assert to_engine(tmp_path / "int8.onnx", tmp_path / "e.engine", RTX, compute_capability="sm89").size_bytes


def test_depthwise_models_build_too(mobilenet_onnx: Path, tmp_path: Path) -> None:
    to_int8(mobilenet_onnx, tmp_path / "int8.onnx", IMAGES, RTX, method="minmax")
    to_engine(tmp_path / "int8.onnx", tmp_path / "e.engine", RTX, compute_capability="sm120")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*zoo.NAMES])
def test_every_student_builds_for_every_gpu(tmp_path: Path, name: str) -> None:
    path = export(f"nayer:{name}", tmp_path)
    to_fp16(path, tmp_path / "fp16.onnx")
    to_int8(path, tmp_path / "int8.onnx", IMAGES, RTX, method="minmax")
    for capability in compute_capabilities(RTX):
        for file in ("fp32.onnx", "fp16.onnx", "int8.onnx"):
            if capability == "sm75" and file == "fp32.onnx":
                continue  # refused: see test_an_fp32_engine_for_turing_is_refused_with_a_way_out
            to_engine(tmp_path / file, tmp_path / "e.engine", RTX, compute_capability=capability)


def test_an_fp32_engine_for_turing_is_refused_with_a_way_out(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no FP32 GEMM kernels") as caught:
        to_engine(files["fp32"], tmp_path / "e.engine", RTX, compute_capability="sm75")
    assert "--fp16" in caught.value.fix
    assert not (tmp_path / "e.engine").exists()
    to_engine(files["fp16"], tmp_path / "e.engine", RTX, compute_capability="sm75")


@pytest.mark.parametrize("target", ["cpu", "arm"])
def test_a_graph_for_another_target_is_refused_in_one_sentence(
    files: dict[str, Path], tmp_path: Path, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        to_engine(files[target], tmp_path / "e.engine", RTX, compute_capability="sm89")
    assert capfd.readouterr() == ("", "")
    # Which of its two reasons the parser meets first depends on the order of the nodes.
    reasons = ("is a bias quantized to INT32, which TensorRT does not take", "has a zero point other than 0")
    assert any(reason in caught.value.what for reason in reasons), caught.value.what
    assert "\n" not in caught.value.what
    assert f"--target {RTX}" in caught.value.fix
    assert not (tmp_path / "e.engine").exists()


def altered(source: Path, path: Path, dtype: type, zero: int) -> Path:
    """The INT8 graph with other zero points on its activations."""
    model = onnx.load(source)
    weights = {n.input[2] for n in model.graph.node if n.op_type == "DequantizeLinear"} - {
        n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"
    }
    used = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in used - weights:
            shape = numpy_helper.to_array(tensor).shape
            tensor.CopyFrom(numpy_helper.from_array(np.full(shape, zero, dtype), tensor.name))
    path.write_bytes(model.SerializeToString())
    return path


def test_zero_points_other_than_zero_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = altered(files["int8"], tmp_path / "asymmetric.onnx", np.int8, 5)
    with pytest.raises(UsageError, match="has a zero point other than 0"):
        to_engine(path, tmp_path / "e.engine", RTX, compute_capability="sm89")


def test_unsigned_activations_are_refused_although_the_parser_takes_them(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """With zero points of 0 the parser reads UINT8 as INT8 and everything above 127 would be cut off in silence."""
    path = altered(files["int8"], tmp_path / "unsigned.onnx", np.uint8, 0)
    with pytest.raises(UsageError) as caught:
        to_engine(path, tmp_path / "e.engine", RTX, compute_capability="sm89")
    assert "UINT8" in str(caught.value)


def test_int32_biases_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """ONNX Runtime's symmetric graph has no zero points, and still biases that the parser does not take."""
    model = onnx.load(files["int8"])
    node = next(n for n in model.graph.node if n.op_type == "Gemm")
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.ones(10, np.int32), "bias_int32"),
            numpy_helper.from_array(np.array(0.01, np.float16), "bias_scale"),
        ]
    )
    dq = onnx.helper.make_node("DequantizeLinear", ["bias_int32", "bias_scale"], ["bias_float"], "bias_dq")
    model.graph.node.insert(0, dq)
    inputs = [*node.input[:2], "bias_float"]
    node = next(n for n in model.graph.node if n.op_type == "Gemm")
    del node.input[:]
    node.input.extend(inputs)
    (tmp_path / "bias.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match="'bias_dq' is a bias quantized to INT32"):
        to_engine(tmp_path / "bias.onnx", tmp_path / "e.engine", RTX, compute_capability="sm89")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_to_build_for_must_be_known(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs to know which GPU") as caught:
        to_engine(files["fp32"], tmp_path / "e.engine", RTX)
    assert "sm89" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"compute_capability": "sm98"}, "Did you mean 'sm89'"),
        ({"target": "cpu"}, "needs no engine"),
        ({"batch": (4, 2, 8)}, "are not a valid profile"),
        ({"batch": (0, 1, 1)}, "are not a valid profile"),
    ],
)
def test_wrong_arguments_are_refused(
    files: dict[str, Path], tmp_path: Path, change: dict[str, object], why: str
) -> None:
    arguments = {"target": RTX, "compute_capability": "sm89"} | change
    with pytest.raises(UsageError, match=why):
        to_engine(files["fp32"], tmp_path / "e.engine", **arguments)  # pyright: ignore[reportArgumentType]


def test_a_damaged_file_is_an_integrity_error(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(files["fp32"].read_bytes()[:-500])
    with pytest.raises(IntegrityError):
        to_engine(tmp_path / "cut.onnx", tmp_path / "e.engine", RTX, compute_capability="sm89")


def test_tensorrt_proper_says_what_is_missing(files: dict[str, Path], tmp_path: Path) -> None:
    try:
        import tensorrt  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(MissingError, match="needs the Python package 'tensorrt'") as caught:
            to_engine(files["fp32"], tmp_path / "e.engine", "tensorrt")
        assert "pip install '.[gpu]'" in caught.value.fix
        return
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="on the GPU that it is for"):
            to_engine(files["fp32"], tmp_path / "e.engine", "tensorrt")


def test_capabilities_are_listed_in_order() -> None:
    found = compute_capabilities(RTX)
    assert found[0] == "sm75"
    assert found[-1].startswith("sm12")
    assert compute_capabilities("tensorrt") == ()


def test_inspector_json_is_counted_by_type() -> None:
    text = json.dumps(
        {
            "Layers": [
                {"Name": "a", "Inputs": [{"Format/Datatype": "Int8 NCHW32"}]},
                {"Name": "b", "Inputs": [{"Format/Datatype": "Row major linear FP16"}]},
                {"Name": "c", "Inputs": [{"Datatype": "Half"}]},
                {"Name": "d", "Inputs": []},
                "a name alone",
            ]
        }
    )
    assert layer_types(text) == {"fp16": 1, "half": 1, "int8": 1}
    assert confirms(layer_types(text), "int8")
    assert confirms({"half": 3}, "fp16")
    assert not confirms({"half": 3}, "int8"), "an INT8 graph whose engine computes in half precision"
    assert not confirms({}, "fp32")
    with pytest.raises(IntegrityError):
        layer_types("not json")
