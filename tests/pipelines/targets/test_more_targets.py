"""Asking for more loses nothing: targets are added, and what was measured stays while its hashes hold."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nayer_edge.errors import IntegrityError, MissingError, UsageError
from nayer_edge.export.runners import TensorRtRunner
from nayer_edge.pipelines import actions, deploy
from nayer_edge.pipelines.deploy import ENGINES, FP16, FP32, QUANTIZATION, int8_file
from nayer_edge.pipelines.validation import runnable
from nayer_edge.storage.files import sha256_of, write_json
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

Invoke = Callable[..., Any]
CPU, ARM, TENSORRT = (int8_file(target) for target in ("cpu", "arm", "tensorrt"))


def targets_of(root: Path) -> list[str]:
    return json.loads((root / MANIFEST).read_text())["recipe"]["export"]["targets"]


def report_of(root: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((root / "validate" / "report.json").read_text())
    return {artifact["name"]: artifact for artifact in report["artifacts"]}


@pytest.fixture
def altered_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine, whose generator draws other images: what it makes anew is not what was measured."""
    drawn = deploy.SyntheticSource.draw

    def other(self: deploy.SyntheticSource, purpose: str, count: int, progress: Any) -> np.ndarray:
        return 1 - drawn(self, purpose, count, progress)

    monkeypatch.setattr(deploy.SyntheticSource, "draw", other)


@pytest.mark.usefixtures("altered_calibration")
def test_a_target_is_added_and_the_others_stay_as_they_were_measured(finished: Path, invoke: Invoke) -> None:
    before = {name: sha256_of(finished / name) for name in (FP32, CPU)}
    record = json.loads((finished / QUANTIZATION).read_text())["cpu"]
    judged = invoke("gate", finished, "--json").out
    answer = invoke("export", finished, "--int8", "--target", "arm")
    assert answer.code == 0, answer.err
    assert "removed" not in answer.out
    assert "Not validated yet: student.int8.arm.onnx." in answer.out
    assert targets_of(finished) == ["cpu", "arm"]
    assert {name: sha256_of(finished / name) for name in before} == before
    records = json.loads((finished / QUANTIZATION).read_text())
    assert list(records) == ["cpu", "arm"]
    assert records["cpu"] == record
    assert records["arm"]["calibration"]["sha256"] != record["calibration"]["sha256"]
    assert invoke("gate", finished, "--json").out == judged, "the report still speaks of these files"
    assert invoke("validate", finished).code == 0
    measured = report_of(finished)
    assert set(measured) == {"fp32", "int8.cpu", "int8.arm"}
    assert measured["int8.cpu"]["sha256"] == before[CPU]
    assert RunFolder.open(finished).problems() == RunFolder.open(finished).unexpected_files() == []


def test_only_replaces_and_says_what_it_removes(finished: Path, invoke: Invoke) -> None:
    assert invoke("export", finished, "--int8", "--only").code == 2
    answer = invoke("export", finished, "--int8", "--target", "arm", "--only")
    assert answer.code == 0, answer.err
    assert f"removed {CPU}" in " ".join(answer.out.split())
    assert targets_of(finished) == ["arm"]
    assert not (finished / CPU).exists()
    assert list(json.loads((finished / QUANTIZATION).read_text())) == ["arm"]
    assert invoke("gate", finished).code == 4, "the report speaks of a file that is gone"
    before = sha256_of(finished / ARM)
    # The same target again is nothing new.
    assert invoke("export", finished, "--int8", "--target", "arm,arm", "--target", "arm").code == 0
    assert targets_of(finished) == ["arm"]
    assert sha256_of(finished / ARM) == before


def test_what_cannot_be_kept_is_made_again(finished: Path, invoke: Invoke) -> None:
    """Another setting, with a target added at the same time: every target is made by it."""
    before = sha256_of(finished / CPU)
    actions.export(finished, int8=True, targets=["arm"], settings={"calibration_images": 10, "max_drop": None})
    records = json.loads((finished / QUANTIZATION).read_text())
    assert {target: records[target]["calibration"]["n"] for target in records} == {"cpu": 10, "arm": 10}
    assert records["cpu"]["file_sha256"] == sha256_of(finished / CPU)
    assert before != sha256_of(finished / CPU)
    assert invoke("gate", finished).code == 4, "what was measured has changed"


def test_without_int8_targets_are_added_too(finished: Path) -> None:
    actions.export(finished, targets=["tensorrt"], engines=True)
    assert targets_of(finished) == ["cpu", "tensorrt"]
    assert (finished / FP16).is_file()
    assert (finished / CPU).is_file()
    with pytest.raises(UsageError, match="no target 'toaster'"):
        actions.export(finished, targets=["toaster"])
    for useless in (
        {"targets": ["arm", "openvino"]},
        {"targets": ["arm"], "only": True},
        {"compute_capability": "sm89"},
    ):
        with pytest.raises(UsageError, match=r"[Ww]ithout --int8") as caught:
            actions.export(finished, **useless)
        assert caught.value.fix == "Add --int8."
    assert targets_of(finished) == ["cpu", "tensorrt"], "nothing was changed"


class TestEngines:
    """The GPU is not real: a build copies its graph, with a number that no other build has."""

    @pytest.fixture
    def builds(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        made: list[str] = []

        def build(graph: Path, engine: Path, target: str, **_options: Any) -> Any:
            made.append(engine.name)
            engine.write_bytes(graph.read_bytes() + bytes([len(made)]))
            return deploy_info(target)

        monkeypatch.setattr(deploy, "to_engine", build)
        return made

    @pytest.fixture
    def finished(self, tiny_run: Path, once: Callable[[str, Callable[[Path], object]], Path], tmp_path: Path) -> Path:
        """A copy of the finished run with the graph for TensorRT, to be altered."""

        def make(folder: Path) -> None:
            root = Path(shutil.copytree(tiny_run, folder / "digits"))
            actions.export(root, int8=True, targets=["tensorrt"], engines=False)

        return Path(shutil.copytree(once("with-tensorrt", make) / "digits", tmp_path / "runs" / "digits"))

    @pytest.mark.slow
    def test_an_engine_is_not_built_again(
        self, finished: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch, invoke: Invoke
    ) -> None:
        actions.export(finished, int8=True, targets=["tensorrt"], engines=True)
        assert len(builds) == 2
        names = [record["file"] for record in json.loads((finished / ENGINES).read_text())]
        before = {name: sha256_of(finished / name) for name in names}

        def unavailable(*_arguments: Any, **_options: Any) -> Any:
            raise MissingError("TensorRT is not installed.", fix="Install it.")

        monkeypatch.setattr(deploy, "to_engine", unavailable)
        assert invoke("export", finished, "--int8", "--target", "arm").code == 0
        assert {name: sha256_of(finished / name) for name in names} == before
        assert {record["status"] for record in json.loads((finished / ENGINES).read_text())} == {"built"}
        # An engine whose graph changed is built again, or said to be lacking.
        settings = {"calibration_images": 10}
        run = actions.export(finished, int8=True, settings=settings)
        statuses = {r["precision"]: r["status"] for r in json.loads((finished / ENGINES).read_text())}
        assert statuses == {"fp16": "built", "int8": "unavailable"}
        actions.require_engines(run, ["cpu,arm"])
        with pytest.raises(MissingError, match=r"int8\.tensorrt\.engine"):
            actions.require_engines(run)

    def test_engines_that_cannot_be_loaded_are_built_again_as_the_message_says(
        self, finished: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch, invoke: Invoke
    ) -> None:
        """As after an update of TensorRT; the runtime is real, and looks at the file before it looks for a GPU."""
        pytest.importorskip("tensorrt_rtx")
        actions.export(finished, int8=True, targets=["tensorrt"], engines=True)
        actions.export(finished, int8=True, targets=["tensorrt"], engines=True)
        assert len(builds) == 2
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            with pytest.raises(IntegrityError, match="does not load") as caught:
                TensorRtRunner(finished / "export" / builds[0], flavour="tensorrt_rtx").__enter__()
        commands = re.findall(r"nayer-edge (export RUN [^,]+)", caught.value.fix)
        assert len(commands) == 2
        for command in commands:
            assert invoke(*command.replace("RUN", str(finished)).split()).code == 0
        assert len(builds) == 4

    @pytest.mark.slow
    def test_an_engine_that_is_refused_does_not_end_the_step(
        self, finished: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build = deploy.to_engine

        def refuses_int8(graph: Path, engine: Path, target: str, **options: Any) -> Any:
            if "int8" in graph.name:
                raise UsageError("tensorrt rejects this graph: it has no kernel for conv1.", fix="Use the FP16 file.")
            return build(graph, engine, target, **options)

        monkeypatch.setattr(deploy, "to_engine", refuses_int8)
        run = actions.export(finished, int8=True, targets=["tensorrt"], engines=True)
        found = {record["precision"]: record for record in json.loads((finished / ENGINES).read_text())}
        assert (found["fp16"]["status"], found["int8"]["status"]) == ("built", "unavailable")
        assert "has no kernel for conv1" in found["int8"]["reason"]
        with pytest.raises(MissingError, match=r"int8\.tensorrt\.engine"):
            actions.require_engines(run)
        # A GPU that does not exist is a mistake of the user's, and ends it at once.
        pytest.importorskip("tensorrt_rtx")
        with pytest.raises(UsageError, match="does not build for 'sm12'"):
            actions.export(finished, int8=True, targets=["tensorrt-rtx"], engines=True, compute_capability="sm12")

    @pytest.mark.slow
    def test_a_measured_engine_stays_measured_without_its_gpu(
        self, finished: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch, invoke: Invoke
    ) -> None:
        actions.export(finished, int8=True, targets=["tensorrt"], engines=True)
        assert builds
        real = runnable.TensorRtRunner
        monkeypatch.setattr(runnable, "TensorRtRunner", lambda path, *, flavour: runnable.OrtRunner(finished / FP32))
        assert invoke("validate", finished).code == 0
        name = "fp16.tensorrt.engine"
        before = report_of(finished)
        assert before[name]["status"] == "measured"
        assert before[name]["earlier"] is None
        monkeypatch.setattr(runnable, "TensorRtRunner", real)
        assert invoke("export", finished, "--int8", "--target", "arm").code == 0
        assert invoke("validate", finished).code == 0
        after = report_of(finished)
        assert after["int8.arm"]["status"] == "measured"
        for engine in (name, "int8.tensorrt.engine"):
            kept = dict(after[engine])
            assert kept.pop("earlier")["created"]
            assert kept == {key: value for key, value in before[engine].items() if key != "earlier"}
        with np.load(finished / "validate" / "predictions.npz", allow_pickle=False) as held:
            assert held[name].shape == held["teacher"].shape
        # Other images: nothing of it holds.
        assert invoke("validate", finished, "--synthetic").code == 0
        assert report_of(finished)[name]["status"] == "not_run"


def deploy_info(target: str) -> Any:
    """What `to_engine` returns, with the fields that the step reads."""
    from types import SimpleNamespace

    return SimpleNamespace(
        runtime=target, version="0", compute_capability="local", batch=(1, 1, 1), network_types={}, layers={},
        precision_verified=True, notes=(), size_bytes=1,
    )  # fmt: skip


@pytest.mark.slow
def test_a_verified_measurement_is_not_replaced_by_one_of_another_device(finished: Path, invoke: Invoke) -> None:
    """An ARM graph that was validated on an ARM device, and is validated again on x86 with one target more."""
    assert invoke("export", finished, "--int8", "--target", "arm").code == 0
    assert invoke("validate", finished).code == 0
    path = finished / "validate" / "report.json"
    report = json.loads(path.read_text())
    for artifact in report["artifacts"]:
        if artifact["name"] == "int8.arm":
            if artifact["precision_verified"]:
                pytest.skip("this is an ARM device")
            measured = {"latency_ms": {"p50": 7.0, "p95": 8.0}, "threads": 4}
            artifact |= {"precision_verified": True, "simulated": False, **measured}
    write_json(path, report)
    run = RunFolder.open(finished)
    entry = run.manifest.files["validate/report.json"]
    run.manifest.files["validate/report.json"] = entry.model_copy(
        update={"sha256": sha256_of(path), "bytes": path.stat().st_size}
    )
    run.save()
    assert invoke("export", finished, "--int8", "--target", "tensorrt", "--no-engine").code == 0
    assert invoke("validate", finished).code == 0
    found = report_of(finished)["int8.arm"]
    assert found["precision_verified"]
    assert found["latency_ms"] == {"p50": 7.0, "p95": 8.0}
    assert found["earlier"]["created"] == report["created"]
    assert report_of(finished)["int8.cpu"]["earlier"] is None, "this machine can measure it"
    policy = finished.parent / "policy.toml"
    policy.write_text('artifacts = ["int8.arm"]\naccuracy = {}\nparity = {}\n')
    answer = invoke("gate", finished, "--policy", policy)
    assert answer.code == 0, answer.out
    assert "measured earlier" in " ".join(answer.out.split())
    assert invoke("report", finished).code == 0
    assert f"measured earlier, {report['created']}" in (finished / "report.html").read_text()
