"""ExecuTorch and LiteRT files: parity, INT8, what is read back, the runtime alone, refusals."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nayer_edge.errors import IntegrityError, MissingError, UsageError
from nayer_edge.export.runners import TorchRunner
from nayer_edge.export.runtimes import litert
from nayer_edge.export.runtimes.edge_file import ON_REQUEST, BuiltFile

pytestmark = pytest.mark.usefixtures("litert_converts_once")
CONVERT = litert._converted
SHAPE = (3, 16, 16)
Student = Callable[[tuple[int, int, int]], nn.Module]
Draw = Callable[..., np.ndarray]
Build = Callable[[str, Callable[[Path], BuiltFile]], BuiltFile]


class Inverse(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x + torch.eye(4))


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat((second, first), dim=1)


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


@dataclass(frozen=True)
class Edge:
    """A runtime that quantizes networks itself, and what is its own in these tests.

    Attributes:
        packages: the modules of its extra.
        versions: of what packages its files tell the version, the runtime's first.
        convolution, linear: its operators for them.
        in_float: what may stay in float; `normalisation` is one of them and must.
        identifier: of the format of another version (bytes 4 to 8 of a flatbuffer).
        odd: a layer that it has no operator for.
        alone: a program that runs a file without nayer-edge.
    """

    name: str
    runner: str
    packages: tuple[str, ...]
    versions: tuple[str, ...]
    convolution: str
    linear: str
    in_float: frozenset[str]
    normalisation: str
    identifier: bytes
    odd: type[nn.Module]
    operator: str
    alone: str

    @property
    def module(self) -> ModuleType:
        return import_module(f"nayer_edge.export.runtimes.{self.name}")

    def build(self, *arguments: Any, **options: Any) -> BuiltFile:
        return self.module.build(*arguments, **options)

    def describe(self, path: Path) -> dict[str, Any]:
        return self.module.describe(path)

    def open(self, path: Path, **options: Any) -> Any:
        return getattr(self.module, self.runner)(path, **options)

    def agreement(self, network: nn.Module, built: BuiltFile, images: np.ndarray) -> float:
        with self.open(built.path) as runner:
            return float((runner.infer(images).argmax(1) == expected(network, images).argmax(1)).mean())


EXECUTORCH = Edge(
    name="executorch",
    runner="ExecuTorchRunner",
    packages=("executorch", "torchao"),
    versions=("executorch", "torchao", "torch"),
    convolution="Conv2d",
    linear="FullyConnected",
    in_float=frozenset({"Subtract", "Div", "Multiply", "StaticTranspose"}),
    normalisation="Div",
    identifier=b"ET00",
    odd=Inverse,
    operator="inv",
    alone="""
import sys
import torch
from executorch.runtime import Runtime
method = Runtime.get().load_program(sys.argv[1]).load_method("forward")
print([float(value) for value in method.execute([torch.full((1, 3, 16, 16), 0.25)])[0][0]])
assert not any(name.startswith("nayer_edge") for name in sys.modules)
""",
)
LITERT = Edge(
    name="litert",
    runner="LiteRtRunner",
    packages=("ai_edge_litert", "ai_edge_quantizer", "litert_torch"),
    versions=("ai-edge-litert", "litert-torch", "ai-edge-quantizer", "torch"),
    convolution="CONV_2D",
    linear="FULLY_CONNECTED",
    in_float=frozenset({"SUB", "MUL", "TRANSPOSE", "PAD"}),
    normalisation="MUL",
    identifier=b"TFL0",
    odd=Bessel,
    operator="bessel_j0",
    alone="""
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
run = Interpreter(model_path=sys.argv[1]).get_signature_runner()
print(run(images=np.full((1, 3, 16, 16), 0.25, np.float32))["logits"][0].tolist())
assert not {"torch", "jax", "nayer_edge"} & set(sys.modules)
""",
)


# Each file that ExecuTorch builds takes longer than all that LiteRT builds.
@pytest.fixture(
    scope="session", params=[pytest.param(EXECUTORCH, marks=pytest.mark.slow), LITERT], ids=lambda edge: edge.name
)
def edge(request: pytest.FixtureRequest) -> Edge:
    if any(find_spec(package) is None for package in request.param.packages):
        pytest.skip(f"the extra '{request.param.name}' is not installed")
    return request.param


def expected(network: nn.Module, images: np.ndarray) -> np.ndarray:
    with TorchRunner(network) as runner:
        return runner.infer(images)


@pytest.fixture(scope="session")
def built_once(once: Callable[..., Path], convert_once: Callable[..., bytes]) -> Build:
    """(name, build) → what `build` makes of a path, one for all workers."""

    def built(name: str, build: Callable[[Path], BuiltFile]) -> BuiltFile:
        def make(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(litert, "_converted", convert_once)
                record = asdict(build(folder / "file"))
            (folder / "built.json").write_text(json.dumps({**record, "path": ""}))

        folder = once(name, make)
        return BuiltFile(**{**json.loads((folder / "built.json").read_text()), "path": folder / "file"})

    return built


@pytest.fixture(scope="session")
def fp32(edge: Edge, make_student: Student, built_once: Build) -> BuiltFile:
    return built_once(f"{edge.name}-fp32", lambda path: edge.build(make_student(SHAPE), SHAPE, path, precision="fp32"))


@pytest.fixture(scope="session")
def int8(edge: Edge, make_student: Student, draw_patterns: Draw, built_once: Build) -> BuiltFile:
    images = draw_patterns(64, SHAPE, seed=1)
    return built_once(
        f"{edge.name}-int8",
        lambda path: edge.build(make_student(SHAPE), SHAPE, path, precision="int8", calibration=images),
    )


def test_fp32_computes_what_torch_computes(
    edge: Edge, fp32: BuiltFile, make_student: Student, draw_patterns: Draw
) -> None:
    images = draw_patterns(20, SHAPE, seed=2)
    with edge.open(fp32.path) as runner:
        logits = runner.infer(images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected(make_student(SHAPE), images), atol=1e-4)
    assert edge.describe(fp32.path)["coverage"]["int8"] == 0


@pytest.mark.parametrize("edge", [LITERT], indirect=True, ids=lambda edge: edge.name)
def test_fp16_halves_the_weights(
    edge: Edge, fp32: BuiltFile, make_student: Student, draw_patterns: Draw, tmp_path: Path
) -> None:
    network, images = make_student(SHAPE), draw_patterns(20, SHAPE, seed=2)
    built = edge.build(network, SHAPE, tmp_path / "m", precision="fp16")
    saved = fp32.path.stat().st_size - built.path.stat().st_size
    weights = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    assert saved == pytest.approx(2 * weights, rel=0.1)
    with edge.open(built.path) as runner:
        logits = runner.infer(images)
    wanted = expected(network, images)
    # Weights have 11 significant bits in FP16.
    assert 0 < np.abs(logits - wanted).max() < 2**-9 * np.abs(wanted).max()
    found = edge.describe(built.path)
    assert (found["not_delegated"], found["int8"]) == ({}, {})
    assert {why for _, why in found["coverage"]["not_int8"]} == {"the file is FP16"}
    assert "float_casting" in built.record["quantizer"]


@pytest.mark.parametrize("edge", [EXECUTORCH], indirect=True, ids=lambda edge: edge.name)
def test_a_precision_that_a_runtime_lacks_is_refused(edge: Edge, make_student: Student, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no files in 'fp16'") as caught:
        edge.build(make_student(SHAPE), SHAPE, tmp_path / "m", precision="fp16")
    assert caught.value.fix == "Use fp32 or int8."


def test_int8_agrees_with_fp32(edge: Edge, int8: BuiltFile, make_student: Student, draw_patterns: Draw) -> None:
    images = draw_patterns(400, SHAPE, seed=3)
    network = make_student(SHAPE)
    assert edge.agreement(network, int8, images) >= 0.985
    assert int8.path.stat().st_size < 0.5 * 4 * sum(parameter.numel() for parameter in network.parameters())


def test_every_product_runs_in_int8_and_everything_is_delegated(edge: Edge, int8: BuiltFile) -> None:
    found = edge.describe(int8.path)
    assert found["coverage"] == {"eligible": 10, "int8": 10, "fraction": 1.0, "not_int8": []}
    assert "backbone.layer3.0.downsample.0" in found["int8"][edge.convolution]["layers"]
    assert found["int8"][edge.linear]["layers"] == ["backbone.fc"]
    assert found["not_delegated"] == {}
    assert found["float"].keys() <= edge.in_float
    assert [(end["dtype"], end["shape"]) for end in found["inputs"]] == [("float32", [1, 3, 16, 16])]
    assert [(end["dtype"], end["shape"]) for end in found["outputs"]] == [("float32", [1, 10])]
    first, last = found["conversions"][0], found["conversions"][-1]
    assert (first["to"], last["to"]) == ("int8", "float32")
    assert first["scale"] > 0
    assert -128 <= first["zero_point"] <= 127
    assert found["built_with"].keys() == set(edge.versions)


class Dynamic(nn.Module):
    """A convolution whose weight depends on the image, which XNNPACK does not take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 3, 3, 3))
        self.head = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.conv2d(x, self.weight * x.mean()).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("edge", [EXECUTORCH], indirect=True, ids=lambda edge: edge.name)
def test_products_outside_the_delegate_count(edge: Edge, tmp_path: Path) -> None:
    """In FP32; in INT8, ExecuTorch refuses such a network."""
    built = edge.build(Dynamic(), SHAPE, tmp_path / "m.pte", precision="fp32")
    coverage = edge.describe(built.path)["coverage"]
    assert (coverage["eligible"], coverage["int8"], coverage["fraction"]) == (2, 0, 0.0)
    assert ["aten::convolution", "not delegated to XNNPACK"] in coverage["not_int8"]


def test_the_record_says_what_was_done(edge: Edge, int8: BuiltFile) -> None:
    json.dumps(int8.record, allow_nan=False)
    assert int8.record["calibration"] == {"n": 64}
    assert int8.record["batch"] == 1
    assert int8.record["batch_reason"]
    assert int8.record["not_int8"] == []
    assert edge.normalisation in int8.record["in_float"]


@pytest.mark.slow
def test_named_layers_stay_in_float(edge: Edge, make_student: Student, draw_patterns: Draw, tmp_path: Path) -> None:
    network, layers = make_student(SHAPE), ["backbone.layer1", "backbone.fc"]
    calibration = draw_patterns(16, SHAPE, seed=1)
    built = edge.build(network, SHAPE, tmp_path / "m", precision="int8", calibration=calibration, float_layers=layers)
    found = edge.describe(built.path)
    assert (found["coverage"]["eligible"], found["coverage"]["int8"]) == (10, 7)
    in_float = ["backbone.layer1.0.conv1", "backbone.layer1.0.conv2", "backbone.fc"]
    assert found["coverage"]["not_int8"] == [[layer, ON_REQUEST] for layer in in_float]
    assert edge.agreement(network, built, draw_patterns(100, SHAPE, seed=3)) >= 0.97


@pytest.mark.slow  # another process imports the runtime
def test_the_runtime_alone_runs_the_file(edge: Edge, int8: BuiltFile, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", edge.alone, str(int8.path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    with edge.open(int8.path) as runner:
        logits = runner.infer(np.full((1, *SHAPE), 0.25, np.float32))
    np.testing.assert_allclose(json.loads(done.stdout), logits[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("edge", [EXECUTORCH], indirect=True, ids=lambda edge: edge.name)
def test_executorchs_threads_are_set_and_restored(
    edge: Edge, int8: BuiltFile, capfd: pytest.CaptureFixture[str]
) -> None:
    from executorch.extension.pybindings import portable_lib

    before = portable_lib._threadpool_get_thread_count()
    capfd.readouterr()
    with edge.open(int8.path, threads=1) as runner:
        assert portable_lib._threadpool_get_thread_count() == runner.threads == 1
    assert portable_lib._threadpool_get_thread_count() == before
    assert capfd.readouterr().err == "", "the runtime's notes about /sys must not reach the terminal"


@pytest.mark.parametrize("edge", [LITERT], indirect=True, ids=lambda edge: edge.name)
def test_litert_takes_threads_and_leaves_the_terminal_clean(
    edge: Edge, fp32: BuiltFile, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    image = np.full((1, *SHAPE), 0.5, np.float32)
    with edge.open(fp32.path, threads=1) as one, edge.open(fp32.path, threads=2) as two:
        assert (one.threads, two.threads) == (1, 2)
        np.testing.assert_allclose(one.infer(image), two.infer(image), atol=1e-5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 16, 16), (13, 8, 12)])
def test_channels_and_rectangles(
    edge: Edge, shape: tuple[int, int, int], make_student: Student, draw_patterns: Draw, tmp_path: Path
) -> None:
    network, images = make_student(shape), draw_patterns(3, shape, seed=2)
    built = edge.build(network, shape, tmp_path / "m", precision="fp32")
    with edge.open(built.path) as runner:
        np.testing.assert_allclose(runner.infer(images), expected(network, images), atol=1e-4)
        with pytest.raises(UsageError, match="does not run on images of shape"):
            runner.infer(images[:, :, :4])


def test_transposed_convolutions_and_splits_run_in_int8(edge: Edge, draw_patterns: Draw, tmp_path: Path) -> None:
    """The first input of LiteRT's TRANSPOSE_CONV is a shape, that of SPLIT an axis: not what tells the type."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), Halves(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ).eval()
    built = edge.build(
        network, (3, 8, 12), tmp_path / "m", precision="int8", calibration=draw_patterns(8, (3, 8, 12), seed=3)
    )
    found = edge.describe(built.path)
    assert (found["coverage"]["eligible"], found["coverage"]["int8"]) == (4, 4)
    assert not set(found["float"]) & {"TRANSPOSE_CONV", "SPLIT"}


@pytest.mark.parametrize("hardly", [0.0, 1e-7])
def test_an_activation_that_never_fires(edge: Edge, hardly: float, draw_patterns: Draw, tmp_path: Path) -> None:
    """As in MobileNetV3's squeeze-and-excitation: the first of two convolutions is 0 on every calibration image, or
    very small."""
    torch.manual_seed(0)
    squeeze = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
    )
    with torch.no_grad():
        squeeze[1].weight.mul_(hardly or 1.0)  # type: ignore[operator]
        squeeze[1].bias.fill_(hardly or -100.0)  # type: ignore[operator]

    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.squeeze = nn.Conv2d(3, 8, 3, padding=1), squeeze
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            return self.head(x * self.squeeze(x))

    network, images = Excited().eval(), draw_patterns(64, (3, 8, 8), seed=3)
    built = edge.build(network, (3, 8, 8), tmp_path / "m", precision="int8", calibration=images)
    wanted = expected(network, images)
    with edge.open(built.path) as runner:
        assert np.abs(runner.infer(images) - wanted).max() < 0.05 * np.ptp(wanted)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_file_is_an_integrity_error(edge: Edge, int8: BuiltFile, share: float, tmp_path: Path) -> None:
    data = int8.path.read_bytes()
    (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
    with pytest.raises(IntegrityError, match="does not load"), edge.open(tmp_path / "cut"):
        pass


def test_another_version_of_the_runtime_is_named(edge: Edge, int8: BuiltFile, tmp_path: Path) -> None:
    package = edge.versions[0]
    version = int8.record["versions"][package]
    data = int8.path.read_bytes().replace(f'"{package}": "{version}"'.encode(), f'"{package}": "0.0.1"'.encode())
    (tmp_path / "old").write_bytes(data[:4] + edge.identifier + data[8:])
    with (
        pytest.raises(IntegrityError, match=rf"built by {package} 0\.0\.1[\s\S]*--int8 --target {edge.name}$"),
        edge.open(tmp_path / "old"),
    ):
        pass


def test_an_operator_that_is_missing_is_named_with_its_layer(edge: Edge, tmp_path: Path) -> None:
    network = nn.Sequential()
    network.add_module("odd", edge.odd())
    network.add_module("flat", nn.Flatten())
    with pytest.raises(UsageError, match=rf"operator .*{edge.operator}.*layer 'odd'"):
        edge.build(network, (1, 4, 4), tmp_path / "m", precision="fp32")
    assert not (tmp_path / "m").exists()


def test_wrong_arguments_are_refused(edge: Edge, make_student: Student, tmp_path: Path) -> None:
    network, path = make_student(SHAPE), tmp_path / "m"
    with pytest.raises(UsageError, match="needs calibration images"):
        edge.build(network, SHAPE, path, precision="int8")
    with pytest.raises(UsageError, match=r"no layer backbone\.conv9"):
        edge.build(network, SHAPE, path, precision="fp32", float_layers=["backbone.conv9"])
    with pytest.raises(UsageError, match="does not take images"):
        edge.build(network, (4, 16, 16), path, precision="fp32")
    with pytest.raises(IntegrityError, match="does not exist"), edge.open(path):
        pass


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(
    edge: Edge,
    fp32: BuiltFile,
    int8: BuiltFile,
    make_student: Student,
    draw_patterns: Draw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(litert, "_converted", CONVERT)
    again = edge.build(make_student(SHAPE), SHAPE, tmp_path / "fp32", precision="fp32")
    assert again.sha256 == fp32.sha256
    calibration = draw_patterns(64, SHAPE, seed=1)
    again = edge.build(make_student(SHAPE), SHAPE, tmp_path / "int8", precision="int8", calibration=calibration)
    assert again.sha256 == int8.sha256


@pytest.mark.slow
def test_mobilenet(edge: Edge, mobilenet: nn.Module, tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((64, 3, 32, 32), np.float32)
    built = edge.build(mobilenet, (3, 32, 32), tmp_path / "m", precision="int8", calibration=images)
    found = edge.describe(built.path)
    assert found["coverage"]["fraction"] > 0.9
    assert all(layer and reason for layer, reason in found["coverage"]["not_int8"])
    # Random weights and noise: which class is largest is a close call that hangs on the processor; the logits are not.
    with edge.open(built.path) as runner:
        logits = runner.infer(images)
    wanted = expected(mobilenet, images)
    assert correlation(logits, wanted) > 0.7
    assert abs(correlation(np.roll(logits, 1, axis=0), wanted)) < 0.3, "of the logits of other images"


def correlation(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of logits, after the mean of each class is taken away."""
    return float(np.corrcoef((found - found.mean(0)).ravel(), (wanted - wanted.mean(0)).ravel())[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("edge", [EXECUTORCH], indirect=True, ids=lambda edge: edge.name)
def test_executorch_files_can_be_open_at_the_same_time(
    edge: Edge, fp32: BuiltFile, int8: BuiltFile, make_student: Student, draw_patterns: Draw
) -> None:
    """Each keeps its program and the process's thread pool alive."""
    images = draw_patterns(20, SHAPE, seed=2)
    wanted = expected(make_student(SHAPE), images)
    with edge.open(fp32.path, threads=2) as first, edge.open(int8.path, threads=2) as second:
        gc.collect()
        np.testing.assert_allclose(first.infer(images), wanted, atol=1e-4)
        assert (second.infer(images).argmax(1) == wanted.argmax(1)).mean() > 0.9
        np.testing.assert_allclose(first.infer(images), wanted, atol=1e-4)


class Broken:
    """A finder of modules whose native code does not load, as with a torch of another version."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.package or name.startswith(f"{self.package}."):
            raise ImportError("undefined symbol: _ZN3c10")


def test_a_package_whose_native_code_does_not_load(
    edge: Edge, int8: BuiltFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MissingError, which lets the other targets go on; not a crash, and not "not installed"."""
    package = edge.packages[0]
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(package), *sys.meta_path])
    with pytest.raises(MissingError, match="installed but cannot be imported") as caught, edge.open(int8.path):
        pass
    assert "undefined symbol" in caught.value.why
    assert torch.__version__.partition("+")[0] in caught.value.why
    assert f".[{edge.name}]" in caught.value.fix
