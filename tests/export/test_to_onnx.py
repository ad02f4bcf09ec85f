"""Export: parity, dynamic batch, names, provenance without leaks, determinism, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.export.onnx_file import metadata_of
from nayer_edge.export.parity import compare, edge_cases
from nayer_edge.export.runners import OrtRunner, TorchRunner, as_bytes
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.models.load import build_classifier

SHAPE = (3, 16, 12)


def classifier(name: str = "nayer:resnet8", shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    torch.manual_seed(0)
    channels, height, width = shape
    spec = InputSpec(channels=channels, height=height, width=width, mean=(0.4,), std=(0.2,))
    model = build_classifier(name, spec, [str(i) for i in range(10)])
    model.train()
    with torch.no_grad():  # running statistics of something, so that folding BatchNorm has work to do
        for _ in range(5):
            model(torch.rand(16, *shape))
    return model.eval()


def assert_same_logits(model: nn.Module, path: Path, shape: tuple[int, int, int]) -> None:
    images = np.concatenate([*edge_cases(shape).values(), np.random.default_rng(1).random((5, *shape), np.float32)])
    with TorchRunner(model) as torch_runner, OrtRunner(path) as ort_runner:
        expected = torch_runner.infer(images)
        found = compare(expected, ort_runner.infer(images), tolerance=1e-4 * max(1, np.abs(expected).max()))
    assert found.verdict == "match", found


@pytest.mark.parametrize(
    ("name", "shape"), [("nayer:resnet8", (1, 8, 8)), pytest.param("nayer:wrn_16_1", SHAPE, marks=pytest.mark.slow)]
)
def test_the_graph_computes_what_the_module_computes(tmp_path: Path, name: str, shape: tuple[int, int, int]) -> None:
    model = classifier(name, shape)
    info = to_onnx(model, shape, tmp_path / "m.onnx")
    assert_same_logits(model, tmp_path / "m.onnx", shape)
    assert info.classes == 10
    assert info.operators.get("ReduceMean", 0) == 0, "global means must be GlobalAveragePool"


def test_a_mobilenet_computes_the_same_too(mobilenet: nn.Module, mobilenet_onnx: Path) -> None:
    assert_same_logits(mobilenet, mobilenet_onnx, (3, 32, 32))
    operators = {node.op_type for node in onnx.load(mobilenet_onnx).graph.node}
    assert "GlobalAveragePool" in operators
    assert "ReduceMean" not in operators


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    to_onnx(classifier(), SHAPE, path, metadata={"nayer_edge.classes": '["é", "b"]'})
    return path


def test_the_batch_is_dynamic_and_the_names_are_fixed(exported: Path) -> None:
    graph = onnx.load(exported).graph
    assert [v.name for v in graph.input] == ["images"]
    assert [v.name for v in graph.output] == ["logits"]
    for value in (graph.input[0], graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    with OrtRunner(exported, batch=7) as runner:
        for n in (1, 2, 7, 15):
            assert runner.infer(np.zeros((n, *SHAPE), np.float32)).shape == (n, 10)


def test_one_file_without_source_paths_and_with_our_provenance(exported: Path) -> None:
    model = onnx.load(exported)
    data = exported.read_bytes()
    assert [p.name for p in exported.parent.iterdir()] == ["m.onnx"]
    for leak in (b".py", b"site-packages", b"/home", b"pkg.torch", b"stack_trace", str(Path.cwd()).encode()):
        assert leak not in data, leak
    assert metadata_of(model)["nayer_edge.classes"] == '["é", "b"]'
    assert "nayer_edge.version" in metadata_of(model)
    assert not model.graph.value_info
    onnx.checker.check_model(model, full_check=True)


def test_nodes_are_named_after_their_layers(exported: Path) -> None:
    names = [node.name for node in onnx.load(exported).graph.node]
    assert len(set(names)) == len(names)
    convolutions = [n.name for n in onnx.load(exported).graph.node if n.op_type == "Conv"]
    assert set(convolutions) <= {name for name, _ in classifier().backbone.named_modules()}  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def test_exporting_twice_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    to_onnx(classifier(), SHAPE, tmp_path / "again.onnx", metadata={"nayer_edge.classes": '["é", "b"]'})
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


@pytest.mark.slow
def test_the_opset_is_read_back(tmp_path: Path) -> None:
    info = to_onnx(classifier(), SHAPE, tmp_path / "m.onnx", opset=18)
    versions = {entry.domain: entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import}
    assert versions == {"": info.opset}
    assert info.opset == 18


def test_uint8_pixels_are_divided_inside_the_graph(exported: Path, tmp_path: Path) -> None:
    info = to_onnx(classifier(), SHAPE, tmp_path / "bytes.onnx", uint8_input=True)
    assert info.input_dtype == "uint8"
    images = np.random.default_rng(0).random((4, *SHAPE), np.float32)
    images = as_bytes(images).astype(np.float32) / 255
    with OrtRunner(exported) as floats, OrtRunner(tmp_path / "bytes.onnx") as pixels:
        assert compare(floats.infer(images), pixels.infer(images), tolerance=1e-4).verdict == "match"


def test_the_module_is_left_as_it_was_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = classifier().train().double().to(memory_format=torch.channels_last)
    model.eval()
    next(model.children()).train()
    modes = [m.training for m in model.modules()]
    before = {k: (v.clone(), v.dtype, v.stride()) for k, v in model.state_dict().items()}
    to_onnx(model, SHAPE, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert value.dtype == before[name][1]
        assert value.stride() == before[name][2]
        assert torch.equal(value, before[name][0])


class Eigenvalues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(x[:, 0] @ x[:, 0].transpose(1, 2))


def test_an_unsupported_operator_is_named_with_its_layer(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 3, 3, padding=1))
    model.add_module("odd", Eigenvalues())
    with pytest.raises(UsageError, match=r"_linalg_eigh has no ONNX form \(layer 'odd'\)"):
        to_onnx(model, (3, 8, 8), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(2, -1))


class FixedSum(FixedBatch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1)) + torch.zeros(2, 10)


@pytest.mark.parametrize("model", [FixedBatch(), FixedSum()])
def test_a_fixed_batch_is_refused(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(UsageError, match="fixes its batch size"):
        to_onnx(model, (3, 8, 8), tmp_path / "m.onnx")


def test_wrong_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not take images of shape"):
        to_onnx(classifier(), (1, 16, 16), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="does not return logits"):
        to_onnx(nn.Conv2d(3, 4, 3), (3, 8, 8), tmp_path / "m.onnx")


class Branch(FixedBatch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1)) if x.sum() > 0 else self.linear(-x.flatten(1))


def test_control_flow_on_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be traced"):
        to_onnx(Branch(), (3, 8, 8), tmp_path / "m.onnx")
