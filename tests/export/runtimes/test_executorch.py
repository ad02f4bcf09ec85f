"""ExecuTorch files: parity, INT8, what is read back, the runtime alone, refusals."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.export.runners import TorchRunner
from nayer_edge.export.runtimes.edge_file import ON_REQUEST, BuiltFile
from nayer_edge.export.runtimes.executorch import ExecuTorchRunner, build, describe

pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("executorch", "torchao")),
    reason="the extra 'executorch' is not installed",
)

SHAPE = (3, 16, 16)
Student = Callable[[tuple[int, int, int]], nn.Module]
Draw = Callable[..., np.ndarray]


def expected(network: nn.Module, images: np.ndarray) -> np.ndarray:
    with TorchRunner(network) as runner:
        return runner.infer(images)


def agreement(network: nn.Module, built: BuiltFile, images: np.ndarray) -> float:
    with ExecuTorchRunner(built.path) as runner:
        return float((runner.infer(images).argmax(1) == expected(network, images).argmax(1)).mean())


@pytest.fixture(scope="module")
def fp32(make_student: Student, tmp_path_factory: pytest.TempPathFactory) -> BuiltFile:
    return build(make_student(SHAPE), SHAPE, tmp_path_factory.mktemp("et") / "fp32.pte", precision="fp32")


@pytest.fixture(scope="module")
def int8(make_student: Student, draw_patterns: Draw, tmp_path_factory: pytest.TempPathFactory) -> BuiltFile:
    path = tmp_path_factory.mktemp("et") / "int8.pte"
    calibration = draw_patterns(64, SHAPE, seed=1)
    return build(make_student(SHAPE), SHAPE, path, precision="int8", calibration=calibration)


def test_fp32_computes_what_torch_computes(fp32: BuiltFile, make_student: Student, draw_patterns: Draw) -> None:
    images = draw_patterns(20, SHAPE, seed=2)
    with ExecuTorchRunner(fp32.path) as runner:
        logits = runner.infer(images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected(make_student(SHAPE), images), atol=1e-4)
    assert describe(fp32.path)["coverage"]["int8"] == 0


def test_int8_agrees_with_fp32(int8: BuiltFile, fp32: BuiltFile, make_student: Student, draw_patterns: Draw) -> None:
    images = draw_patterns(400, SHAPE, seed=3)
    assert agreement(make_student(SHAPE), int8, images) >= 0.985
    assert int8.path.stat().st_size < 0.5 * fp32.path.stat().st_size


def test_every_product_runs_in_int8_and_everything_is_delegated(int8: BuiltFile) -> None:
    found = describe(int8.path)
    assert found["coverage"] == {"eligible": 10, "int8": 10, "fraction": 1.0, "not_int8": []}
    assert "backbone.layer3.0.downsample.0" in found["int8"]["Conv2d"]["layers"]
    assert found["int8"]["FullyConnected"]["layers"] == ["backbone.fc"]
    assert found["not_delegated"] == {}
    assert found["float"].keys() <= {"Subtract", "Div", "Multiply", "StaticTranspose"}
    assert [(end["dtype"], end["shape"]) for end in found["inputs"]] == [("float32", [1, 3, 16, 16])]
    assert [(end["dtype"], end["shape"]) for end in found["outputs"]] == [("float32", [1, 10])]
    first, last = found["conversions"][0], found["conversions"][-1]
    assert (first["to"], last["to"]) == ("int8", "float32")
    assert first["scale"] > 0
    assert -128 <= first["zero_point"] <= 127
    assert found["built_with"].keys() == {"executorch", "torchao", "torch"}


def test_the_record_is_json_and_says_what_was_done(int8: BuiltFile) -> None:
    record = json.loads(json.dumps(int8.record, allow_nan=False))
    assert record["calibration"] == {"n": 64}
    assert record["batch"] == 1
    assert record["batch_reason"]
    assert record["not_int8"] == []
    assert "Div" in record["in_float"], "the normalisation"


@pytest.mark.slow  # builds another file; test_litert.py has the same for the other quantizer
def test_named_layers_stay_in_float(make_student: Student, draw_patterns: Draw, tmp_path: Path) -> None:
    network, layers = make_student(SHAPE), ["backbone.layer1", "backbone.fc"]
    calibration = draw_patterns(16, SHAPE, seed=1)
    built = build(network, SHAPE, tmp_path / "m.pte", precision="int8", calibration=calibration, float_layers=layers)
    found = describe(built.path)
    assert (found["coverage"]["eligible"], found["coverage"]["int8"]) == (10, 7)
    in_float = ["backbone.layer1.0.conv1", "backbone.layer1.0.conv2", "backbone.fc"]
    assert found["coverage"]["not_int8"] == [[layer, ON_REQUEST] for layer in in_float]
    assert agreement(network, built, draw_patterns(100, SHAPE, seed=3)) >= 0.97


ALONE = """
import sys
import torch
from executorch.runtime import Runtime
method = Runtime.get().load_program(sys.argv[1]).load_method("forward")
print([float(value) for value in method.execute([torch.full((1, 3, 16, 16), 0.25)])[0][0]])
assert not any(name.startswith("nayer_edge") for name in sys.modules)
"""


@pytest.mark.slow  # another process imports torch and the runtime
def test_the_runtime_alone_runs_the_file(int8: BuiltFile, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(int8.path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    with ExecuTorchRunner(int8.path) as runner:
        logits = runner.infer(np.full((1, *SHAPE), 0.25, np.float32))
    np.testing.assert_allclose(json.loads(done.stdout), logits[0], atol=1e-6)


def test_threads_are_set_and_restored(fp32: BuiltFile, capfd: pytest.CaptureFixture[str]) -> None:
    from executorch.extension.pybindings import portable_lib

    before = portable_lib._threadpool_get_thread_count()
    capfd.readouterr()
    with ExecuTorchRunner(fp32.path, threads=1) as runner:
        assert portable_lib._threadpool_get_thread_count() == runner.threads == 1
    assert portable_lib._threadpool_get_thread_count() == before
    assert capfd.readouterr().err == "", "the runtime's notes about /sys must not reach the terminal"


@pytest.mark.parametrize("shape", [pytest.param((1, 16, 16), marks=pytest.mark.slow), (13, 8, 12)])
def test_channels_and_rectangles(
    shape: tuple[int, int, int], make_student: Student, draw_patterns: Draw, tmp_path: Path
) -> None:
    network, images = make_student(shape), draw_patterns(3, shape, seed=2)
    built = build(network, shape, tmp_path / "m.pte", precision="fp32")
    with ExecuTorchRunner(built.path) as runner:
        np.testing.assert_allclose(runner.infer(images), expected(network, images), atol=1e-4)
        with pytest.raises(UsageError, match="does not run on images of shape"):
            runner.infer(images[:, :, :8])


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_file_is_an_integrity_error(int8: BuiltFile, share: float, tmp_path: Path) -> None:
    data = int8.path.read_bytes()
    (tmp_path / "cut.pte").write_bytes(data[: int(share * len(data))])
    with pytest.raises(IntegrityError, match="does not load"), ExecuTorchRunner(tmp_path / "cut.pte"):
        pass


def test_another_version_of_the_runtime_is_named(int8: BuiltFile, tmp_path: Path) -> None:
    version = int8.record["versions"]["executorch"]
    data = int8.path.read_bytes().replace(f'"executorch": "{version}"'.encode(), b'"executorch": "0.0.1"')
    # The identifier of the format: bytes 4 to 8 of a flatbuffer.
    (tmp_path / "old.pte").write_bytes(data[:4] + b"ET00" + data[8:])
    with pytest.raises(IntegrityError, match=r"built by executorch 0\.0\.1"), ExecuTorchRunner(tmp_path / "old.pte"):
        pass


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x + torch.eye(4))


def test_an_operator_that_is_missing_is_named_with_its_layer(tmp_path: Path) -> None:
    network = nn.Sequential()
    network.add_module("odd", Odd())
    network.add_module("flat", nn.Flatten())
    with pytest.raises(UsageError, match=r"operator .*inv.*layer 'odd'"):
        build(network, (1, 4, 4), tmp_path / "m.pte", precision="fp32")
    assert not (tmp_path / "m.pte").exists()


def test_wrong_arguments_are_refused(make_student: Student, tmp_path: Path) -> None:
    network, path = make_student(SHAPE), tmp_path / "m.pte"
    with pytest.raises(UsageError, match="needs calibration images"):
        build(network, SHAPE, path, precision="int8")
    with pytest.raises(UsageError, match=r"no layer backbone\.conv9"):
        build(network, SHAPE, path, precision="fp32", float_layers=["backbone.conv9"])
    with pytest.raises(UsageError, match="does not take images"):
        build(network, (4, 16, 16), path, precision="fp32")
    with pytest.raises(IntegrityError, match="does not exist"), ExecuTorchRunner(path):
        pass


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(
    fp32: BuiltFile, int8: BuiltFile, make_student: Student, draw_patterns: Draw, tmp_path: Path
) -> None:
    again = build(make_student(SHAPE), SHAPE, tmp_path / "fp32.pte", precision="fp32")
    assert again.sha256 == fp32.sha256
    calibration = draw_patterns(64, SHAPE, seed=1)
    again = build(make_student(SHAPE), SHAPE, tmp_path / "int8.pte", precision="int8", calibration=calibration)
    assert again.sha256 == int8.sha256


@pytest.mark.slow
def test_mobilenet(mobilenet: nn.Module, tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((64, 3, 32, 32), np.float32)
    built = build(mobilenet, (3, 32, 32), tmp_path / "m.pte", precision="int8", calibration=images)
    found = describe(built.path)
    assert found["coverage"]["fraction"] > 0.9
    assert all(layer and reason for layer, reason in found["coverage"]["not_int8"])
    assert agreement(mobilenet, built, images) >= 0.8


def test_files_can_be_open_at_the_same_time(
    fp32: BuiltFile, int8: BuiltFile, make_student: Student, draw_patterns: Draw
) -> None:
    """Each keeps its program and the process's thread pool alive."""
    images = draw_patterns(20, SHAPE, seed=2)
    wanted = expected(make_student(SHAPE), images)
    with ExecuTorchRunner(fp32.path, threads=2) as first, ExecuTorchRunner(int8.path, threads=2) as second:
        gc.collect()
        np.testing.assert_allclose(first.infer(images), wanted, atol=1e-4)
        assert (second.infer(images).argmax(1) == wanted.argmax(1)).mean() > 0.9
        np.testing.assert_allclose(first.infer(images), wanted, atol=1e-4)
