"""OpenVINO: the same answers as ONNX Runtime, INT8 where its compiled model says so, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from nayer_edge.errors import IntegrityError, MissingError, UsageError
from nayer_edge.export.fp16 import to_fp16
from nayer_edge.export.int8.coverage import int8_coverage
from nayer_edge.export.runners import OrtRunner
from nayer_edge.export.runtimes import describe, require
from nayer_edge.export.runtimes.openvino import OpenVinoRunner
from nayer_edge.export.targets import get_target
from nayer_edge.export.to_int8 import run_onnx, to_int8
from nayer_edge.export.to_onnx import to_onnx

# Found, not imported, which takes seconds in every worker that collects this file.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
TARGET = get_target("openvino")
LAYERS = ["0", "2.conv", "2.depthwise", "5"]


class Block(nn.Module):
    """A residual block with a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.depthwise(torch.relu(self.conv(x))))


Exported = Callable[..., tuple[Path, np.ndarray]]


@pytest.fixture(scope="module")
def exported(once: Callable[[str, Callable[[Path], object]], Path]) -> Exported:
    """(channels) → the FP32 file of a small network for images that are not square, and images for it. Read only."""

    def files(channels: int = 3) -> tuple[Path, np.ndarray]:
        def export(folder: Path) -> None:
            torch.manual_seed(0)
            network = nn.Sequential(
                nn.Conv2d(channels, 16, 3), nn.ReLU(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
            )
            to_onnx(network, (channels, 12, 20), folder / "fp32.onnx")

        path = once(f"openvino-{channels}", export) / "fp32.onnx"
        images = np.random.default_rng(0).random((24, channels, 12, 20), np.float32)
        # Each image has a brightness of its own, so that logits differ.
        return path, images * np.linspace(0.2, 1, 24, dtype=np.float32)[:, None, None, None]

    return files


@pytest.mark.parametrize("channels", [1, pytest.param(13, marks=pytest.mark.slow)])
def test_it_computes_what_onnx_runtime_computes(exported: Exported, channels: int) -> None:
    path, images = exported(channels)
    with OpenVinoRunner(path, threads=1, batch=5) as runner:
        found = runner.infer(images)
        one = runner.infer(images[:1])
        assert (runner.name, runner.provider, runner.threads) == ("openvino", "CPU", 1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, run_onnx(path, images), atol=1e-5)
    np.testing.assert_allclose(one, found[:1], atol=1e-6)


def test_an_fp32_file_runs_in_float_and_says_so(exported: Exported) -> None:
    path, _ = exported()
    found = describe(TARGET, path)
    assert (found["int8"], found["batch"]) == ({}, "any")
    assert found["float"]["Convolution"]["count"] == 3
    assert set(LAYERS[:3]) <= set(found["float"]["Convolution"]["layers"])
    (source,), (target,) = found["inputs"], found["outputs"]
    assert (source["name"], source["dtype"], source["shape"]) == ("images", "float32", [-1, 3, 12, 20])
    assert (target["name"], target["dtype"], target["shape"]) == ("logits", "float32", [-1, 5])
    assert found["coverage"]["int8"] == 0
    assert [name for name, _ in found["coverage"]["not_int8"]] == LAYERS


def test_a_file_in_fp16_is_computed_in_float32(exported: Exported, tmp_path: Path) -> None:
    """As on any processor without FP16 arithmetic; what was rounded is the weights."""
    path, images = exported()
    to_fp16(path, tmp_path / "half.onnx", images)
    with OpenVinoRunner(tmp_path / "half.onnx", threads=1) as runner:
        logits, kinds = runner.infer(images), {computes for _, _, computes in runner.operators()}
    wanted = run_onnx(path, images)
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - wanted).max() < 2**-8 * np.abs(wanted).max()
    assert "f32" in kinds
    assert "f16" not in kinds


def test_every_layer_of_a_quantized_file_runs_in_int8(exported: Exported, tmp_path: Path) -> None:
    path, images = exported()
    result = to_int8(path, tmp_path / "q.onnx", images[:12], "openvino", holdout_images=images[12:], method="minmax")
    found = describe(TARGET, tmp_path / "q.onnx")
    assert (found["coverage"]["int8"], found["coverage"]["not_int8"]) == (4, [])
    assert found["int8"]["Convolution"]["count"] == 3
    assert (result.coverage.fraction, result.coverage.verified) == (1.0, True)
    assert result.record["measured_in"] == f"openvino {require(TARGET)} on this processor"
    assert result.record["versions"]["openvino"] == require(TARGET)
    with OpenVinoRunner(tmp_path / "q.onnx", threads=1) as runner:
        logits = runner.infer(images)
    fp32, wanted = run_onnx(path, images), run_onnx(tmp_path / "q.onnx", images, as_written=True)
    noise = np.abs(wanted - fp32).mean()
    assert 0 < np.abs(logits - fp32).mean() < 2 * noise


@pytest.mark.parametrize("layer", [LAYERS[0], *(pytest.param(layer, marks=pytest.mark.slow) for layer in LAYERS[1:])])
def test_an_excluded_layer_stays_in_float(exported: Exported, tmp_path: Path, layer: str) -> None:
    path, images = exported()
    to_int8(path, tmp_path / "q.onnx", images, "openvino", method="minmax", nodes_to_exclude=[layer])
    found = int8_coverage(tmp_path / "q.onnx", "openvino")
    assert found.not_int8 == [(layer, "excluded from quantization (mixed precision)")]


def test_a_drop_limit_is_held_in_openvino(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agreement that decides is that of OpenVINO: with a runner that answers nonsense, every layer is excluded."""
    path, images = exported()
    real = OpenVinoRunner.infer
    monkeypatch.setattr(OpenVinoRunner, "infer", lambda self, images: -real(self, images))
    result = to_int8(
        path, tmp_path / "q.onnx", images[:12], "openvino", holdout_images=images[12:], method="minmax", max_drop=0.0
    )
    assert list(result.excluded_nodes) == sorted(LAYERS)
    assert result.record["drop_held"] is False


def test_an_operator_that_openvino_lacks_is_named_with_its_layer(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Det", ["images"], ["logits"], name="volume")],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    with OrtRunner(tmp_path / "m.onnx", threads=1):
        pass
    with pytest.raises(UsageError, match=r"lacks an operator of m\.onnx: Det \(layer 'volume'\)"):
        describe(TARGET, tmp_path / "m.onnx")


def test_what_is_no_sound_file_is_refused(exported: Exported, tmp_path: Path) -> None:
    source, images = exported()
    path, whole = tmp_path / "fp32.onnx", source.read_bytes()
    for cut in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(IntegrityError), OpenVinoRunner(path):
            pass
    path.write_bytes(whole)
    with OpenVinoRunner(path, threads=1) as runner:
        with pytest.raises(UsageError, match=r"does not run on images of shape \(1, 12, 20\)"):
            runner.infer(images[:, :1])
        with pytest.raises(UsageError, match="cannot be run"):
            runner.infer(images[:0])


def test_without_the_package_the_line_that_installs_it(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = exported()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingError, match=r"pip install '\.\[openvino\]'") as caught:
        describe(TARGET, path)
    assert caught.value.exit_code == 3
    with pytest.raises(MissingError, match=r"pip install '\.\[openvino\]'"):
        require(dataclasses.replace(TARGET, packages=("no-such-package",)))


@pytest.mark.slow
def test_nothing_is_reported_and_no_home_is_needed() -> None:
    """OpenVINO reports its import to its makers, unless the package that does so is missing."""
    program = (
        "import sys; from nayer_edge.export.runtimes.openvino import import_openvino; import_openvino();"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
