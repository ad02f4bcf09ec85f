"""Graphs that usual classifiers do not have: the INT8 file computes what the FP32 file computes, or says why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional as F

from nayer_edge.errors import UsageError
from nayer_edge.export.int8 import qdq
from nayer_edge.export.int8.coverage import Coverage
from nayer_edge.export.int8.qdq import with_dead_tensors
from nayer_edge.export.int8.sensitivity import activation_scale
from nayer_edge.export.plain_graph import distinct
from nayer_edge.export.runners import OrtRunner
from nayer_edge.export.targets import get_target
from nayer_edge.export.to_int8 import Int8Result, prepared, run_onnx, to_int8
from nayer_edge.export.to_onnx import to_onnx

SHAPE = (3, 16, 16)
TARGETS = ("cpu", "arm", "tensorrt")
NEAR = 0.05
"""mean difference of the logits over their standard deviation; rounding such small networks stays below 0.02"""


def smooth(n: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).random((n, 3, 4, 4), np.float32)
    return coarse.repeat(4, axis=2).repeat(4, axis=3)


IMAGES = smooth(64, 5)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Head(nn.Module):
    """Three convolutions, then `between`, then classes."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.between = conv(3, 16), conv(16, 16), between or nn.Identity()
        self.fc = nn.Linear(16, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.between(self.b(F.relu(self.a(x)))).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))


class Factors(Head):
    """y = 2 x W + 0.5 c: Gemm with alpha and beta."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.linspace(-1, 1, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.c, self.features(x), self.fc.weight.T, alpha=2.0, beta=0.5)


class Rows(Head):
    """Products whose C is one value, and one row."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.one, self.row = nn.Parameter(torch.tensor([0.3])), nn.Parameter(torch.linspace(-1, 1, 10)[None])
        self.w = nn.Parameter(torch.randn(16, 16, generator=random) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(torch.addmm(self.one, self.features(x), self.w))
        return torch.addmm(self.row, hidden, self.fc.weight.T)


class Pooled(Head):
    """The classes' values are pooled and flattened, as in SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(16, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(F.relu(self.last(F.relu(self.b(F.relu(self.a(x)))))), 16).flatten(1)


class Scaled(Head):
    """They are divided by a temperature."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 0.07


class Upsampling(Head):
    """A layer that ONNX Runtime has no INT8 kernel for, between two that it has one for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.c = nn.ConvTranspose2d(16, 16, 2, stride=2), conv(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.c(F.relu(self.up(F.relu(self.a(x)))))).mean((2, 3)))


class ClipTo(nn.Module):
    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(self.low, self.high)


class SharedSkip(nn.Module):
    """Two residual adds read the same tensor, which no quantized product reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c1, self.c2 = conv(3, 16), conv(16, 16), conv(16, 16)
        self.bn1, self.bn2, self.fc = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        y = self.c1(F.relu(self.bn1(x))) + x
        z = self.c2(F.relu(self.bn2(y))) + x
        return self.fc(F.relu(z).mean((2, 3)))


class Gate(Head):
    """A product with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.linspace(0.1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.features(x)
        return self.fc(features * torch.sigmoid(features @ self.v)[:, None])


class Grouped(Head):
    """A product with a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0)))
        self.last = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.features(x).reshape(-1, 4, 1, 4)
        return self.last((parts @ self.w).flatten(1))


class Twice(nn.Module):
    """A layer applied twice, beside one whose name is what a second node of the first would be called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.conv_2, self.fc = conv(3, 16), conv(16, 16), conv(16, 16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv(F.relu(self.conv(x))))
        return self.fc(F.relu(self.conv_2(x)).mean((2, 3)))


class Pruned(Head):
    """Half of a layer's channels have no weights, and biases that its large inputs must not hide."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.b.weight[::2] = 0
            self.b.bias[::2] = torch.linspace(0.1, 0.9, 8)
            self.a.weight *= 100
            self.b.weight /= 100


MODELS = {
    "factors": Factors,
    "rows": Rows,
    "upsampling": Upsampling,
    "pooled": Pooled,
    "scaled": Scaled,
    "clip above": lambda: Head(ClipTo(0.3, 2.0)),
    "clip below": lambda: Head(ClipTo(-2.0, -0.1)),
    "clip around": lambda: Head(ClipTo(0.0, 6.0)),
    "shared skip": SharedSkip,
    "vector": Gate,
    "stack": Grouped,
    "twice": Twice,
    "pruned": Pruned,
}


@pytest.fixture(scope="module")
def fp32(once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Path]:
    files = {name: f"{name.replace(' ', '_')}.onnx" for name in MODELS}

    def export(folder: Path) -> None:
        for name, build in MODELS.items():
            torch.manual_seed(0)
            to_onnx(build().eval(), SHAPE, folder / files[name])

    folder = once("rare-fp32", export)
    return {name: folder / file for name, file in files.items()}


def int8(path: Path, target: str, folder: Path, **options: object) -> Int8Result:
    return to_int8(path, folder / "int8.onnx", smooth(64, 7), target, method="minmax", rest="float32", **options)  # type: ignore[arg-type]


Made = Callable[[str, str], tuple[Path, Coverage]]
COVERAGE = TypeAdapter(Coverage)


@pytest.fixture(scope="module")
def made(fp32: dict[str, Path], once: Callable[[str, Callable[[Path], object]], Path]) -> Made:
    """(name, target) → the INT8 file, made once for all workers, and its coverage."""

    def quantized(name: str, target: str) -> tuple[Path, Coverage]:
        def make(folder: Path) -> None:
            result = int8(fp32[name], target, folder)
            (folder / "coverage.json").write_bytes(COVERAGE.dump_json(result.coverage))

        folder = once(f"rare-int8-{name.replace(' ', '_')}-{target}", make)
        return folder / "int8.onnx", COVERAGE.validate_json((folder / "coverage.json").read_bytes())

    return quantized


# What they test lies in the graph before it is quantized, or in what both of the other targets do.
ARM_SLOW = ("rows", "vector", "stack", "twice", "pruned", "upsampling")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=[pytest.mark.slow] if target == "arm" and name in ARM_SLOW else [])
        for name in MODELS
        for target in TARGETS
    ],
)
def test_int8_computes_what_fp32_does(fp32: dict[str, Path], made: Made, name: str, target: str) -> None:
    reference = run_onnx(fp32[name], IMAGES)
    path, coverage = made(name, target)
    logits = run_onnx(path, IMAGES, as_written=target != "cpu")
    assert np.abs(logits - reference).mean() / reference.std() < NEAR
    assert coverage.fraction == 1.0, coverage.not_int8


@pytest.mark.parametrize(("name", "excluded"), [("vector", 1), ("stack", 1), ("twice", 0)])
def test_products_that_are_none_with_a_matrix_are_named(made: Made, name: str, excluded: int) -> None:
    _, coverage = made(name, "cpu")
    assert sum("weight is not a matrix" in reason for _, reason in coverage.ineligible) == excluded


@pytest.mark.parametrize("target", ["cpu", "arm"])
@pytest.mark.parametrize("name", ["factors", "pooled", "scaled"])
def test_logits_have_more_than_256_levels(made: Made, name: str, target: str) -> None:
    """Whatever stands between the last product and the output."""
    logits = run_onnx(made(name, target)[0], IMAGES, as_written=target != "cpu")
    assert len(np.unique(logits)) > 256


def test_what_has_no_kernel_stays_in_float(made: Made) -> None:
    """Between Q/DQ pairs, ONNX Runtime quantizes its weights per tensor, which no file says."""
    path, _ = made("upsampling", "cpu")
    graph = OrtRunner(path, target=get_target("cpu")).optimised_graph().graph
    (layer,) = [node for node in graph.node if node.op_type == "ConvTranspose"]
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types.get(layer.input[1]) == TensorProto.FLOAT


def test_a_constant_connects_nothing() -> None:
    """Two sums with one constant: the second lies between excluded layers, and would only lose accuracy."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["a"], "a"), node("Add", ["a", "half"], ["p"], "p"),
        node("Conv", ["x", "w"], ["b"], "b"), node("Add", ["b", "half"], ["q"], "q"),
        node("Conv", ["q", "w"], ["c"], "c"),
    ]  # fmt: skip
    constants = [numpy_helper.from_array(np.ones(1, np.float32), name) for name in ("w", "half")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], constants))
    assert qdq._isolated(model, {"a"}, ("Conv", "Add")) == {"q"}


def test_a_clip_is_removed_only_where_saturation_does_the_same(made: Made) -> None:
    left = {}
    for name in ("clip above", "clip below", "clip around"):
        model = onnx.load(made(name, "cpu")[0])
        left[name] = sum(node.op_type == "Clip" for node in model.graph.node)
    assert left == {"clip above": 1, "clip below": 1, "clip around": 0}


def test_names_are_nobody_elses(fp32: dict[str, Path]) -> None:
    names = Counter(node.name for node in onnx.load(fp32["twice"]).graph.node)
    assert max(names.values()) == 1
    assert {"conv", "conv_2"} <= set(names)
    assert list(distinct(["a", "a", "a_2", "a", "b"])) == ["a", "a_3", "a_2", "a_4", "b"]
    assert list(distinct(["a", "b"], taken=["a", "a_2"])) == ["a_3", "b"]


def test_a_factor_of_a_bias_that_is_no_constant(tmp_path: Path) -> None:
    """ONNX allows any tensor there; the graph that is quantized computes the same."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((768, 10)).astype(np.float32),
        "v": random.standard_normal((768, 10)).astype(np.float32),
        "shape": np.array([0, 768]),
    }
    nodes = [
        helper.make_node("Reshape", ["image", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "v"], ["c"]),
        helper.make_node("Gemm", ["flat", "w", "c"], ["logits"], alpha=0.5, beta=-3.0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    model = prepared(path, tmp_path / "plain.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert not any(a.name in ("alpha", "beta") for node in model.graph.node for a in node.attribute)
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    np.testing.assert_allclose(run_onnx(tmp_path / "plain.onnx", IMAGES), run_onnx(path, IMAGES), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_scales_in_fp16_need_their_opset(tmp_path: Path, target: str) -> None:
    path = tmp_path / "old.onnx"
    to_onnx(Head().eval(), SHAPE, path, opset=18)
    with pytest.raises(UsageError, match="too old") as refused:
        to_int8(path, tmp_path / "m.onnx", smooth(16, 7), target, method="minmax")
    assert "--set export.opset=19" in refused.value.fix
    assert int8(path, target, tmp_path).coverage.fraction == 1.0
    newer = tmp_path / "newer.onnx"
    to_onnx(Head().eval(), SHAPE, newer, opset=19)
    to_int8(newer, tmp_path / "m.onnx", smooth(16, 7), target, method="minmax")


def test_a_graph_that_cannot_run_is_not_blamed_on_the_images(tmp_path: Path) -> None:
    """A Gather from a place that is not there, which ONNX Runtime finds when it runs."""
    nodes = [
        helper.make_node("Gather", ["image", "far"], ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([99]), "far")],
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with OrtRunner(path) as runner, pytest.raises(UsageError, match="cannot run it"):
        runner.infer(IMAGES)


class Dead(nn.Module):
    """A residual branch that ends in an activation which never fires on the calibration images.

    Args:
        last: the activation.
        push: sign of the branch before it: −1 for an activation that is 0 below 0, 1 for one that is 0 above.
        squeeze: the branch is a squeeze-and-excitation gate, and what is dead lies within it.
        lift: added to the branch, to be just above 0.
    """

    def __init__(self, last: nn.Module, *, push: float = -1.0, squeeze: bool = False, lift: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = conv(3, 16), conv(16, 16), nn.Conv2d(16, 16, 1), nn.Linear(16, 10)
        self.last, self.squeeze, self.lift = last, squeeze, lift
        with torch.no_grad():
            self.b.weight *= 3
            self.b.bias.copy_(push * torch.linspace(9, 25, 16))  # pyright: ignore[reportOptionalMemberAccess]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x))
        if self.squeeze:
            gate = self.last(self.b(y.mean((2, 3), keepdim=True)))
            return (y * F.hardsigmoid(self.c(gate))).mean((2, 3))
        return (y + self.c(self.last(self.b(y)) + self.lift)).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))


DEAD = {
    "relu": lambda: Dead(nn.ReLU()),
    "relu6": lambda: Dead(nn.ReLU6()),
    "clip below 0": lambda: Dead(nn.Hardtanh(-6.0, 0.0), push=1.0),
    "squeeze": lambda: Dead(nn.ReLU(), squeeze=True),
    "denormal": lambda: Dead(nn.ReLU(), lift=1e-39),
}


@pytest.mark.parametrize(
    "name",
    [
        "relu",
        "squeeze",
        *(pytest.param(name, marks=pytest.mark.slow) for name in DEAD if name not in ("relu", "squeeze")),
    ],
)
def test_an_activation_that_never_fires_stays_silent(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    to_onnx(DEAD[name]().eval(), SHAPE, tmp_path / "fp32.onnx")
    reference = run_onnx(tmp_path / "fp32.onnx", IMAGES)
    for target in TARGETS:
        result = int8(tmp_path / "fp32.onnx", target, tmp_path)
        logits = run_onnx(result.path, IMAGES, as_written=target != "cpu")
        assert np.abs(logits - reference).mean() / reference.std() < NEAR, target
        assert result.coverage.fraction == 1.0, result.coverage.not_int8


def test_the_zero_point_of_a_dead_activation_is_where_it_saturates() -> None:
    """[0, 0] has no scale; the zero point decides which side of 0 a removed activation still cuts off."""
    target = get_target("arm")
    cases = ((0.0, None, -128), (0.0, 6.0, -128), (-6.0, 0.0, 127), (None, 0.0, 127), (-3.0, 3.0, 0))
    for low, high, expected in cases:
        given = {"l": low, "h": high}
        bounds = {k: numpy_helper.from_array(np.array(v, np.float32), k) for k, v in given.items() if v is not None}
        inputs = ["x", *(k if k in bounds else "" for k in given)]
        graph = helper.make_graph(
            [helper.make_node("Clip", inputs, ["y"], "clip")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
            list(bounds.values()),
        )
        found = with_dead_tensors(helper.make_model(graph), {"y": (0.0, 0.0), "x": (0.0, 1e-40), "z": (-2.0, 1.0)})
        assert activation_scale(*found["y"], target)[1] == pytest.approx(expected, abs=1), (low, high)
        assert found["x"] == (0.0, 1.0), "no scale in float32 either"
        assert found["z"] == (-2.0, 1.0)
