"""Runtimes that quantize networks themselves: the record, the limit on the drop, FP32 files that are not faithful."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nayer_edge.errors import MissingError, UsageError
from nayer_edge.export.runtimes import describe, module_of, require
from nayer_edge.export.targets import TARGETS, Target
from nayer_edge.export.to_int8 import to_int8
from nayer_edge.export.to_runtime import to_float_file, to_int8_file
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.files import sha256_of

pytestmark = pytest.mark.usefixtures("litert_converts_once")
SHAPE = (3, 8, 12)
PARENT = "0" * 64
RUNNERS = {"executorch": "ExecuTorchRunner", "litert": "LiteRtRunner"}


@pytest.fixture(params=[pytest.param("executorch", marks=pytest.mark.slow), "litert"])
def target(request: pytest.FixtureRequest) -> Target:
    """Each target with a quantizer of its own that is installed."""
    try:
        require(TARGETS[request.param])
    except MissingError as error:
        pytest.skip(f"{error}")
    return TARGETS[request.param]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()


def images(n: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).random((n, *SHAPE), np.float32)
    return drawn * np.linspace(0.2, 1, n, dtype=np.float32)[:, None, None, None]


def test_both_files_and_the_record(target: Target, network: nn.Module, tmp_path: Path) -> None:
    to_float_file(network, SHAPE, tmp_path / "fp32", target)
    assert describe(target, tmp_path / "fp32")["coverage"]["int8"] == 0
    record = to_int8_file(
        network, SHAPE, tmp_path / "int8", target, images(16, 0), images(32, 1), max_drop=0.5, parent_sha256=PARENT
    )
    json.dumps(record, allow_nan=False)
    assert record["file_sha256"] == sha256_of(tmp_path / "int8")
    assert record["coverage"]["int8"] == describe(target, tmp_path / "int8")["coverage"]["int8"] == 2
    assert (record["float_nodes"], record["drop_held"], record["fall_back"][0]["float_layers"]) == ([], True, 0)
    assert (record["calibration"]["n"], record["holdout"]["n"], record["final"]["n"]) == (16, 32, 32)
    assert require(target) in record["measured_in"]
    assert record["build"]["batch"] == 1
    assert record["build"]["batch_reason"]
    assert record["build"]["float_layers_reach"]


class Told(Silent):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.done = 0

    def start(self, what: str, total: int) -> None:
        assert "layers" in what
        self.totals.append(total)

    def advance(self, count: int = 1) -> None:
        self.done += count


@pytest.mark.slow
def test_the_limit_is_held_in_the_runtime(
    target: Target, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that answers nonsense while the classifier is in INT8: the classifier stays in float, and no more."""
    runner = getattr(module_of(target), RUNNERS[target.name])
    real: Callable[..., np.ndarray] = runner.infer

    def infer(self: object, given: np.ndarray) -> np.ndarray:
        logits = real(self, given)
        in_float = {layer for layer, _ in describe(target, self.path)["coverage"]["not_int8"]}  # type: ignore[attr-defined]
        return logits if "4" in in_float else -logits

    monkeypatch.setattr(runner, "infer", infer)
    told = Told()
    given = images(16, 0), images(32, 1)
    record = to_int8_file(
        network, SHAPE, tmp_path / "int8", target, *given, max_drop=0.2, parent_sha256=PARENT, progress=told
    )
    assert (told.totals, told.done) == ([2], 2), "two layers, each told of when it is measured"
    assert (record["float_nodes"], record["drop_held"]) == (["4"], True)
    assert [row["node"] for row in record["sensitivity"]] == ["0", "4"]
    assert [name for name, _ in record["coverage"]["not_int8"]] == ["4"]


@pytest.mark.slow
def test_a_quantizer_that_fails_with_one_choice_of_layers(
    target: Target, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its INT8 file is not lost: the search goes on without that choice, and the record says why."""
    module, runner = module_of(target), getattr(module_of(target), RUNNERS[target.name])
    build: Callable[..., Any] = module.build
    infer: Callable[..., np.ndarray] = runner.infer

    def fails(*arguments: Any, **named: Any) -> Any:
        if named["float_layers"] == ["4"]:
            raise UsageError("It cannot.", why="Not with that layer.")
        return build(*arguments, **named)

    def in_float(self: Any, given: np.ndarray) -> np.ndarray:
        whole = describe(target, self.path)["coverage"]["int8"] == 0
        return infer(self, given) if whole else -infer(self, given)

    monkeypatch.setattr(module, "build", fails)
    monkeypatch.setattr(runner, "infer", in_float)
    record = to_int8_file(
        network, SHAPE, tmp_path / "int8", target, images(16, 0), images(32, 1), max_drop=0.2, parent_sha256=PARENT
    )
    assert (record["float_nodes"], record["drop_held"]) == (["0", "4"], True)
    assert record["failed"] == [{"float_layers": ["4"], "reason": "It cannot. Not with that layer."}]
    json.dumps(record, allow_nan=False)


def test_an_fp32_file_that_computes_something_else_is_refused(
    target: Target, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = getattr(module_of(target), RUNNERS[target.name])
    real: Callable[..., np.ndarray] = runner.infer
    monkeypatch.setattr(runner, "infer", lambda self, given: real(self, given) + 0.01)
    with pytest.raises(UsageError, match="does not compute the same logits"):
        to_float_file(network, SHAPE, tmp_path / "fp32", target)
    assert not (tmp_path / "fp32").exists()


@pytest.mark.slow
def test_a_new_file_that_the_runtime_refuses_is_the_targets_fault(
    target: Target, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not IntegrityError, which would end the whole export and advise to repeat it."""
    build: Callable[..., Any] = module_of(target).build

    def cut(*arguments: Any, **named: Any) -> Any:
        built = build(*arguments, **named)
        built.path.write_bytes(built.path.read_bytes()[:100])
        return built

    monkeypatch.setattr(module_of(target), "build", cut)
    with pytest.raises(UsageError, match=f"built for '{target.name}' does not run") as caught:
        to_float_file(network, SHAPE, tmp_path / "fp32", target)
    assert "does not load" in caught.value.what
    assert f"Leave out the target '{target.name}'" in caught.value.fix
    with pytest.raises(UsageError, match="does not run"):
        to_int8_file(network, SHAPE, tmp_path / "int8", target, images(4, 0), images(4, 1), parent_sha256=PARENT)


@pytest.mark.parametrize("name", RUNNERS)
def test_such_a_target_takes_no_onnx_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes no ONNX file"):
        to_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", images(4, 0), name)
