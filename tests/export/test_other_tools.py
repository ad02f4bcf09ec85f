"""Tools that are not ours accept what is exported: onnx.checker, OpenVINO, Polygraphy's lint.

OpenVINO computes each graph twice. *As written*, its own low-precision transformations off, it rounds where the Q/DQ
pairs stand, as ONNX Runtime does in float: what differs is the order of sums, which moves a value near a tie to the
next level. *Transformed*, as its users have it, it computes with bytes, moves scales through the layers and
requantizes with other roundings than ONNX Runtime's kernels; then it must not be further from FP32 than twice the noise
that quantization itself makes. That is asked of the x86 graph alone: signed 8-bit weights overflow in its kernels on
processors without VNNI, which is why that graph has 7 bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.data.datasets import digits
from nayer_edge.export.to_int8 import run_onnx, to_int8
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.models.load import build_classifier
from nayer_edge.pipelines.deploy import FP32

STUDENTS = (
    "digits",
    pytest.param("nayer:resnet8", marks=pytest.mark.slow),
    pytest.param("torchvision:mobilenet_v3_small", marks=pytest.mark.slow),
)
GRAPHS = ("cpu", "arm", "tensorrt", "tensorrt-rtx")
PRECISIONS = ("fp32", *GRAPHS)


@dataclass(frozen=True)
class Exported:
    """A student's files by target ("fp32" too), and images for it."""

    files: dict[str, Path]
    images: np.ndarray


@pytest.fixture(scope="module", params=STUDENTS)
def exported(request: pytest.FixtureRequest, once: Callable[[str, Callable[[Path], object]], Path]) -> Exported:
    """The run's own FP32 file (a ResNet-8), or a network with random weights, and the INT8 file of every target."""
    name, fp32 = request.param, None
    if name == "digits":
        fp32 = request.getfixturevalue("tiny_run") / FP32
        images = digits("holdout", InputSpec(channels=1, height=16, width=16)).images[:64].numpy() / np.float32(255)
    else:
        size = 32 if "mobilenet" in name else 16
        images = np.random.default_rng(0).random((64, 3, size, size), np.float32)
        if "mobilenet" in name:
            fp32 = request.getfixturevalue("mobilenet_onnx")

    def make(folder: Path) -> None:
        if fp32 is None:
            size = images.shape[-1]
            torch.manual_seed(0)
            network = build_classifier(name, InputSpec(height=size, width=size), [str(i) for i in range(10)])
            to_onnx(alive(network, images), (3, size, size), folder / "fp32.onnx")
        for target in GRAPHS:
            to_int8(fp32 or folder / "fp32.onnx", folder / f"{target}.onnx", images[:32], target, method="minmax")

    folder = once(f"other-tools-{name.replace(':', '-')}", make)
    files = {target: folder / f"{target}.onnx" for target in GRAPHS}
    return Exported({"fp32": fp32 or folder / "fp32.onnx", **files}, images[32:])


def alive(model: nn.Module, images: np.ndarray) -> nn.Module:
    """Random weights, with activations of ordinary size and logits that differ between images."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
            if isinstance(module, nn.Linear):
                module.weight *= 10
        model.train()(torch.from_numpy(images))
    return model.eval()


def openvino(path: Path, images: np.ndarray, *, as_written: bool) -> np.ndarray:
    """Logits in OpenVINO's CPU plugin."""
    vino = pytest.importorskip("openvino")
    core = vino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"} | ({"LP_TRANSFORMS_MODE": "NO"} if as_written else {})
    compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
    return np.asarray(compiled([images])[compiled.output(0)])


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_checker_and_shape_inference_pass(exported: Exported, name: str) -> None:
    onnx.checker.check_model(exported.files[name], full_check=True)


def test_openvino_computes_the_fp32_graph(exported: Exported) -> None:
    wanted = run_onnx(exported.files["fp32"], exported.images)
    found = openvino(exported.files["fp32"], exported.images, as_written=True)
    assert wanted.std() > 0.01, "there must be something to compare"
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("target", GRAPHS)
def test_openvino_computes_every_quantized_graph(exported: Exported, target: str) -> None:
    """Sums in another order, or FP16 between the products, put some values on the other side of a rounding: it may be
    another rounding than ONNX Runtime's, but not a worse one."""
    fp32 = run_onnx(exported.files["fp32"], exported.images)
    wanted = run_onnx(exported.files[target], exported.images, as_written=True)
    noise = np.abs(wanted - fp32).mean()
    assert noise > 0
    found = openvino(exported.files[target], exported.images, as_written=True)
    own = np.abs(found - fp32).mean()
    assert own < 2 * noise
    # Two roundings that have nothing in common would differ by about 1.4 times the noise of one.
    assert np.abs(found - wanted).mean() < 1.4 * max(noise, own)
    same_classes(found, wanted, 5 * noise)


def test_openvino_runs_the_x86_graph_with_bytes(exported: Exported) -> None:
    fp32 = run_onnx(exported.files["fp32"], exported.images)
    wanted = run_onnx(exported.files["cpu"], exported.images)
    noise = np.abs(wanted - fp32).mean()
    found = openvino(exported.files["cpu"], exported.images, as_written=False)
    assert np.abs(found - fp32).mean() < 2 * noise
    same_classes(found, wanted, 5 * noise)


def same_classes(found: np.ndarray, wanted: np.ndarray, margin: float) -> None:
    """On every image whose first class is ahead by more than what rounding can move, both name the same one."""
    ordered = np.sort(wanted, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > margin
    assert clear.any(), "there must be something to compare"
    np.testing.assert_array_equal(found.argmax(1)[clear], wanted.argmax(1)[clear])


# What Polygraphy's lint may say, and why it is no fault of the file.
EXPLAINED = {
    "Could not find a CPU kernel and hence can't constant fold Mul node": "ONNX Runtime's processor kernels have no "
    "FP16 multiplication, so it leaves one of two FP16 constants of TensorRT's graph to the device",
}


LINT = """
import sys
from polygraphy.tools import main
for path in sys.argv[1:]:
    sys.argv = ["polygraphy", "check", "lint", path, "--output", path + ".json"]
    if status := main():
        sys.exit(status)
"""


@pytest.mark.slow
def test_polygraphys_lint_finds_nothing_unexplained(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    pytest.importorskip("onnx_graphsurgeon", reason="Polygraphy's lint needs onnx-graphsurgeon")
    copies = [tmp_path / f"{name}.onnx" for name in ("fp32", "cpu", "tensorrt")]
    for copy in copies:
        copy.write_bytes(exported.files[copy.stem].read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", LINT, *map(str, copies)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for copy in copies:
        found = json.loads(copy.with_suffix(".onnx.json").read_text())
        assert found["summary"]["failing"] == []
        assert len(found["summary"]["passing"]) > 10
        messages = [entry["message"] for entry in found["lint_entries"]]
        assert [text for text in messages if not any(text.startswith(known) for known in EXPLAINED)] == []
