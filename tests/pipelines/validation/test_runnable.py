"""What runs on this machine, engines included: they are measured where their GPU is, and named where it is not."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nayer_edge.errors import MissingError
from nayer_edge.export import targets
from nayer_edge.export.runners import OrtRunner
from nayer_edge.export.to_int8 import run_onnx
from nayer_edge.pipelines.costs import bench
from nayer_edge.pipelines.deploy import ENGINES, FP32, int8_file
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.pipelines.validation import runnable
from nayer_edge.pipelines.validation.runnable import engines, graphs, open_all
from nayer_edge.storage.files import read_json
from nayer_edge.storage.run_folder import RunFolder

NAME = "fp16.tensorrt-rtx.engine"


@pytest.fixture
def with_engines(
    tiny_run: Path, tiny_settings: list[str], once: Callable[[str, Callable[[Path], object]], Path], tmp_path: Path
) -> Path:
    """A run with engines of TensorRT-RTX; TensorRT proper is asked for and not at hand."""
    pytest.importorskip("tensorrt_rtx")
    settings = [*tiny_settings, 'export.targets=["cpu","tensorrt-rtx"]', "export.engines=true"]

    def make(folder: Path) -> None:
        root = Path(shutil.copytree(tiny_run, folder / "digits"))
        run_recipe(load_recipe("digits", settings), root, last="engine")

    return Path(shutil.copytree(once("with-engines", make) / "digits", tmp_path / "runs" / "digits"))


def validated(root: Path) -> dict[str, dict[str, Any]]:
    """The report's artifacts by name, made anew."""
    run = run_recipe(recipe_of(RunFolder.open(root).manifest.recipe, root), root, last="validate")
    report = json.loads((run.root / "validate" / "report.json").read_text())
    return {artifact["name"]: artifact for artifact in report["artifacts"]}


def test_without_their_gpu_engines_are_named(with_engines: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = validated(with_engines)
    assert found[NAME]["status"] == "not_run"
    assert "needs a GPU to run" in found[NAME]["reason"]
    assert "\n" not in found[NAME]["reason"]
    assert found[NAME]["size_bytes"] == (with_engines / found[NAME]["file"]).stat().st_size
    assert found[NAME]["top1"] is found[NAME]["latency_ms"] is None
    run = RunFolder.open(with_engines)
    records = read_json(run.path(ENGINES), "the list of engines")
    with contextlib.ExitStack() as stack:
        opened, refused = open_all(engines(records), run, stack)
    assert not opened
    assert all(isinstance(error, MissingError) for error in refused.values())
    assert set(refused) == {record["name"] for record in records}


def test_an_engine_that_opens_is_measured_like_a_graph(with_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is the one thing that is not real here: ONNX Runtime computes what the engine was built from."""

    def stand_in(path: Path, *, flavour: str) -> OrtRunner:
        assert path.suffix == ".engine"
        assert flavour == "tensorrt_rtx"
        return OrtRunner(with_engines / FP32)

    monkeypatch.setattr(runnable, "TensorRtRunner", stand_in)
    found = validated(with_engines)
    engine, fp32 = found[NAME], found["fp32"]
    assert engine["status"] == "measured"
    assert engine["runtime"] == "tensorrt_rtx"
    for key in ("top1", "agreement"):
        assert engine[key] == fp32[key]
    assert engine["paired"]["vs_fp32"]["lost"] == engine["paired"]["vs_fp32"]["gained"] == 0
    assert engine["latency_ms"]["p50"] > 0
    assert engine["speedup_vs_fp32"] is None, "FP32 ran on another device"
    assert engine["precision_verified"] is False, "nothing was read from the engine itself"
    assert engine["int8_coverage"] is None
    run = RunFolder.open(with_engines)
    timings, refused = bench.measure(run, recipe_of(run.manifest.recipe, run.root), [1], 5)
    assert refused == {}
    assert {"fp32", "int8.cpu", NAME} <= {timing.runner for timing in timings}


@pytest.mark.gpu
def test_an_engine_agrees_with_its_graph_on_a_gpu(with_engines: Path) -> None:
    found = validated(with_engines)
    if found[NAME]["status"] == "not_run":
        pytest.skip(found[NAME]["reason"])
    assert found[NAME]["agreement"] == pytest.approx(found["fp32"]["agreement"], abs=0.01)
    assert found[NAME]["latency_ms"]["p50"] > 0


def test_what_cannot_be_built_is_no_candidate(tiny_run: Path) -> None:
    absent = {"name": "x", "file": "x", "target": "tensorrt", "precision": "fp16", "status": "unavailable"}
    assert engines([absent]) == []
    config = recipe_of(RunFolder.open(tiny_run).manifest.recipe, tiny_run)
    assert [candidate.name for candidate in graphs(config)] == ["fp32", "int8.cpu"]


def test_only_devices_like_this_one_are_timed() -> None:
    for machine, names in (("x86_64", {"cpu"}), ("aarch64", {"cpu", "arm"})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(targets, "platform", SimpleNamespace(machine=lambda machine=machine: machine))
            assert {name for name, target in targets.TARGETS.items() if targets.is_native(target)} == names


def test_graphs_for_other_devices_are_computed_as_they_are_written(finished: Path, tiny_settings: list[str]) -> None:
    """ONNX Runtime moves Q/DQ pairs and takes kernels that overflow without VNNI; that is no property of the GPU that
    the graph is for. (A ResNet-18 lost 6 points of 98 that way in the report of a machine with AVX2.)"""
    settings = [*tiny_settings, 'export.targets=["cpu","tensorrt"]', "export.engines=false"]
    run = run_recipe(load_recipe("digits", settings), finished, last="validate")
    config = recipe_of(run.manifest.recipe, run.root)
    images = np.random.default_rng(0).random((7, 1, 16, 16), dtype=np.float32)
    with contextlib.ExitStack() as stack:
        opened, _ = open_all(graphs(config), run, stack)
        kernels = {name: Counter(node.op_type for node in opened[name].optimised_graph().graph.node) for name in opened}
        as_written = {name for name, runner in opened.items() if getattr(runner, "as_written", False)}
        logits = opened["int8.tensorrt"].infer(images)
    assert as_written == {"int8.tensorrt"}
    assert kernels["int8.cpu"]["QLinearConv"] > 0
    assert kernels["int8.tensorrt"]["QLinearConv"] == 0
    assert kernels["int8.tensorrt"]["DequantizeLinear"] > 0
    np.testing.assert_array_equal(logits, run_onnx(run.path(int8_file("tensorrt")), images, as_written=True))
