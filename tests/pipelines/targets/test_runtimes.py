"""Runtimes besides ONNX Runtime and TensorRT, from `export` to the verdict: built, run, read back, kept, and missed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nayer_edge.data.datasets import digits
from nayer_edge.errors import MissingError, UsageError
from nayer_edge.export import runtimes
from nayer_edge.export.runners import OrtRunner
from nayer_edge.export.runtimes import module_of, open_runner, require
from nayer_edge.export.targets import TARGETS, get_target
from nayer_edge.pipelines import actions, deploy
from nayer_edge.pipelines.costs import bench
from nayer_edge.pipelines.deploy import FP16, FP32, QUANTIZATION, RUNTIMES, int8_file
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.trust.lineage import chain
from nayer_edge.storage.files import read_json, sha256_of
from nayer_edge.storage.run_folder import RunFolder

Invoke = Callable[..., Any]
PACKAGES = {"openvino": "openvino", "executorch": "executorch", "litert": "ai_edge_litert"}
"""target → the module of its runtime"""
# Each file that ExecuTorch builds takes half a minute of processor time, and LiteRT's search several seconds;
# tests/export/runtimes has their small form.
SLOW = {"executorch": [pytest.mark.slow], "litert": [pytest.mark.slow]}


@pytest.fixture(params=[pytest.param(name, marks=SLOW.get(name, [])) for name in PACKAGES])
def target(request: pytest.FixtureRequest) -> str:
    """Each target whose runtime is installed."""
    try:
        require(TARGETS[request.param])
    except MissingError as error:
        pytest.skip(f"{error}")
    return request.param


@pytest.fixture(scope="module")
def measured(
    tiny_run: Path, once: Callable[[str, Callable[[Path], object]], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A run with a target more, validated: a copy of this worker, because commands lock a run. Read only."""
    copies: dict[str, Path] = {}

    def of(target: str) -> Path:
        def make(folder: Path) -> None:
            root = Path(shutil.copytree(tiny_run, folder / "digits"))
            actions.export(root, int8=True, targets=[target])
            actions.validate(root)
            actions.make(actions.recipe_in(root), root, last="report")

        if target not in copies:
            made = once(f"runtime-{target}", make) / "digits"
            copies[target] = Path(shutil.copytree(made, tmp_path_factory.mktemp(target) / "runs" / "digits"))
        return copies[target]

    return of


def gone(patch: pytest.MonkeyPatch, target: str) -> None:
    """As if a package that the target needs were not installed."""
    patch.setitem(TARGETS, target, replace(TARGETS[target], packages=("no-such-package",)))


def report_of(root: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((root / "validate" / "report.json").read_text())
    return {artifact["name"]: artifact for artifact in report["artifacts"]}


def test_both_precisions_are_built_and_read_back(measured: Callable[[str], Path], target: str) -> None:
    root = measured(target)
    run = RunFolder.open(root)
    assert run.problems() == run.unexpected_files() == []
    fp32, int8 = read_json(root / RUNTIMES, "")
    assert (fp32["name"], int8["name"]) == (f"fp32.{target}", f"int8.{target}")
    for entry in (fp32, int8):
        assert (entry["status"], entry["target"]) == ("built", target)
        assert entry["sha256"] == sha256_of(root / entry["file"])
        assert (entry["runtime"], bool(entry["version"])) == (target, True)
    assert fp32["int8"] == {}
    assert (fp32["coverage"]["int8"], int8["coverage"]["int8"], int8["coverage"]["eligible"]) == (0, 10, 10)
    record = read_json(root / QUANTIZATION, "")[target]
    assert record["file_sha256"] == int8["sha256"]
    assert record["calibration"]["sha256"] == read_json(root / QUANTIZATION, "")["cpu"]["calibration"]["sha256"]
    assert record["coverage"]["fraction"] == 1.0
    assert int8["version"] in record["measured_in"]


def test_they_are_measured_like_the_others(measured: Callable[[str], Path], target: str) -> None:
    found = report_of(measured(target))
    assert set(found) == {"fp32", "int8.cpu", f"fp32.{target}", f"int8.{target}"}
    fp32, int8 = found[f"fp32.{target}"], found[f"int8.{target}"]
    for artifact in (fp32, int8):
        assert (artifact["status"], artifact["runtime"], artifact["precision_verified"]) == ("measured", target, True)
        assert artifact["latency_ms"]["p50"] > 0
        assert artifact["paired"]["vs_fp32"]["n"] == 600
    assert fp32["max_abs_diff"] < 1e-3
    assert fp32["speedup_vs_fp32"] == 1.0
    assert fp32["paired"]["vs_fp32"]["lost"] == fp32["paired"]["vs_fp32"]["gained"] == 0
    assert int8["int8_coverage"] == 1.0
    assert int8["size_bytes"] < 0.6 * fp32["size_bytes"]
    assert abs(int8["top1"] - found["fp32"]["top1"]) < 0.02


def test_fp16_on_request(
    measured: Callable[[str], Path], target: str, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(measured(target), tmp_path / "runs" / "digits"))
    int8 = sha256_of(root / int8_file(target))
    assert invoke("export", root, "--int8", "--fp16").code == 0
    actions.validate(root)
    found, has = report_of(root), target != "executorch"
    assert (f"fp16.{target}" in found) == has
    if has:
        half, whole = found[f"fp16.{target}"], found[f"fp32.{target}"]
        assert (half["status"], half["runtime"], half["precision"]) == ("measured", target, "fp16")
        assert half["paired"]["vs_fp32"]["n"] == 600
        assert half["size_bytes"] < 0.65 * whole["size_bytes"]
        assert 0 < half["max_abs_diff"] < 0.05
        assert (half["simulated"], half["latency_ms"]) == (True, None), "computed in FP32 here"
        verdict = actions.gate(root, policy=policy_for(tmp_path, f"fp16.{target}"))
        assert verdict.verdict == "fail"
        assert "was computed in FP32" in next(check.detail for check in verdict.checks if check.name == "runtime")
        verdict = actions.gate(root, policy=policy_for(tmp_path, f"fp16.{target}", "accept_simulated = true"))
        assert verdict.verdict == "pass", verdict
        run = RunFolder.open(root)
        (artifact,) = [each for each in report_artifacts(run) if each.name == f"fp16.{target}"]
        links = [link.name for link in chain(run.manifest, artifact)]
        assert (FP16 in links) == (target == "openvino"), "LiteRT's file is made from the network"
        assert links[-1] == half["file"]
    assert sha256_of(root / int8_file(target)) == int8
    # Nothing else is made anew, and so nothing is lost where the runtime is not installed.
    with monkeypatch.context() as patch:
        patch.setattr(deploy, "_quantize", None)
        gone(patch, target)
        assert invoke("export", root, "--int8", "--no-fp16").code == 0
        assert not list((root / "export").glob("*fp16*"))
        assert invoke("export", root, "--int8", "--fp16").code == (3 if has else 0)
    assert sha256_of(root / int8_file(target)) == int8
    records = {entry["name"]: entry["status"] for entry in read_json(root / RUNTIMES, "")}
    assert records[f"int8.{target}"] == records[f"fp32.{target}"] == "built"
    assert records.get(f"fp16.{target}") == ("unavailable" if has else None)
    assert invoke("export", root, "--int8").code == 0
    records = {entry["name"]: entry["status"] for entry in read_json(root / RUNTIMES, "")}
    assert records.get(f"fp16.{target}") == ("built" if has else None)
    assert RunFolder.open(root).problems() == RunFolder.open(root).unexpected_files() == []


def policy_for(folder: Path, artifact: str, more: str = "") -> Path:
    """A policy for one artifact."""
    path = folder / "policy.toml"
    path.write_text(f'artifacts = ["{artifact}"]\n{more}\naccuracy = {{ max_drop_vs_fp32 = 0.05 }}\n')
    return path


def test_the_gate_takes_them_by_name(measured: Callable[[str], Path], target: str, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        f'artifacts = ["fp32.{target}", "int8.{target}"]\n'
        "accuracy = { max_drop_vs_fp32 = 0.05 }\nparity = { max_abs_diff = 1e-3 }\nint8 = { min_coverage = 1.0 }\n"
        "latency = { min_speedup_vs_fp32 = 0.001 }\n"
    )
    verdict = actions.gate(measured(target), policy=policy)
    checks = {(check.name, check.artifact): check.verdict for check in verdict.checks}
    wanted = {
        ("runtime", f"fp32.{target}"),
        ("runtime", f"int8.{target}"),
        ("accuracy_drop_vs_fp32", f"fp32.{target}"),
        ("accuracy_drop_vs_fp32", f"int8.{target}"),
        ("parity", "fp32"),
        ("parity", f"fp32.{target}"),
        ("int8_coverage", f"int8.{target}"),
        ("speedup_vs_fp32", f"int8.{target}"),
    }
    assert wanted <= set(checks)
    assert {checks[key] for key in wanted} == {"pass"}, verdict


def test_bench_compares_with_fp32_in_the_same_runtime(measured: Callable[[str], Path], target: str) -> None:
    run = RunFolder.open(measured(target))
    timings = {t.runner: t for t in bench.measure(run, actions.recipe_in(run.root), [1, 2], 5)[0] if t.batch == 2}
    assert list(timings) == ["fp32", "int8.cpu", f"fp32.{target}", f"int8.{target}"]
    assert timings[f"fp32.{target}"].ratio == 1.0


def test_bench_names_what_cannot_run_here(
    measured: Callable[[str], Path], target: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = measured(target)
    gone(monkeypatch, target)
    answer = invoke("bench", root, "--batch", "1", "--runs", "5")
    assert answer.code == 0, answer.err
    told = " ".join(answer.out.split())
    assert f"int8.{target}: not measured. Target '{target}' needs the Python package" in told
    assert "int8.cpu" in told


def test_page_bill_of_materials_and_lineage_name_them(measured: Callable[[str], Path], target: str) -> None:
    pytest.importorskip("cyclonedx")
    from nayer_edge.pipelines.trust.sbom import make_sbom

    run = RunFolder.open(measured(target))
    page = (run.root / "report.html").read_text()
    assert "Other runtimes" in page
    assert f"<code>int8.{target}</code>" in page
    parts = {part["name"]: part for part in json.loads(make_sbom(run))["components"]}
    assert parts[int8_file(target)]["type"] == "machine-learning-model"
    assert parts[int8_file(target)]["modelCard"]["quantitativeAnalysis"]
    assert set(TARGETS[target].packages) <= set(parts)
    for artifact in report_artifacts(run):
        assert all(link.record is not None for link in chain(run.manifest, artifact)), artifact.name


def report_artifacts(run: RunFolder) -> tuple[Any, ...]:
    from nayer_edge.pipelines.measurements import REPORT_PATH, read_report

    return read_report(run.path(REPORT_PATH), "").artifacts


@pytest.mark.parametrize(
    "target",
    ["openvino", *(pytest.param(name, marks=pytest.mark.slow) for name in ("executorch", "litert"))],
    indirect=True,
)
def test_a_target_without_its_runtime_is_missed_and_nothing_else(
    finished: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    with monkeypatch.context() as patch:
        gone(patch, target)
        answer = invoke("export", finished, "--int8", "--target", f"arm,{target}")
        assert answer.code == 3
        told = " ".join(answer.err.split())
        assert f"Everything was exported except fp32.{target}, int8.{target}." in told
        assert f"pip install '.[{target}]'" in told
        assert list(read_json(finished / QUANTIZATION, "")) == ["cpu", "arm"]
        assert (finished / int8_file("arm")).is_file()
        assert not (finished / int8_file(target)).exists()
        run = RunFolder.open(finished)
        assert run.problems() == run.unexpected_files() == []
        assert invoke("validate", finished).code == 0
        found = report_of(finished)
        assert found["int8.arm"]["status"] == "measured"
        for name in (f"fp32.{target}", f"int8.{target}"):
            assert found[name]["status"] == "unavailable"
            assert f".[{target}]" in found[name]["reason"]
        assert invoke("report", finished).code == 0
        assert invoke("run", finished, "--until", "student").code == 0, "it has no part in the missing files"
        assert invoke("run", finished, "--until", "engine").code == 3
    if target == "openvino":
        return  # A whole build, as in `measured`; `test_fp16_on_request` has a file that is tried again.
    before = sha256_of(finished / int8_file("arm"))
    assert invoke("export", finished, "--int8").code == 0, "what was missing is tried again"
    assert [entry["status"] for entry in read_json(finished / RUNTIMES, "")] == ["built", "built"]
    assert sha256_of(finished / int8_file("arm")) == before


def test_a_named_target_is_rebuilt_if_another_version_has_built_it(
    measured: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    root = Path(shutil.copytree(measured(target), tmp_path / "runs" / "digits"))
    own = [root / entry["file"] for entry in read_json(root / RUNTIMES, "") if entry["file"] != FP32]

    def written(*paths: Path) -> list[int]:
        return [path.stat().st_mtime_ns for path in paths]

    cpu, before = written(root / int8_file("cpu")), written(*own)
    actions.export(root, int8=True, targets=[target])
    assert written(*own) == before
    with monkeypatch.context() as patch:
        patch.setattr(runtimes, "require", lambda _target: "99.0")
        actions.export(root, int8=True, targets=["cpu"])
        assert written(*own) == before, "not named"
        actions.export(root, int8=True, targets=[target])
    by_onnx_runtime = TARGETS[target].suffix == ".onnx"
    assert all((now == then) == by_onnx_runtime for now, then in zip(written(*own), before, strict=True))
    assert written(root / int8_file("cpu")) == cpu
    assert RunFolder.open(root).problems() == RunFolder.open(root).unexpected_files() == []


def test_what_a_runtime_lacks_is_told_and_the_rest_is_exported(
    finished: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise UsageError("It lacks an operator: Det (layer 'volume').")

    reads_onnx = TARGETS[target].suffix == ".onnx"
    monkeypatch.setattr(module_of(TARGETS[target]), "describe" if reads_onnx else "build", refuse)
    answer = invoke("export", finished, "--int8", "--target", f"arm,{target}")
    assert answer.code == 3
    assert "Det (layer 'volume')" in " ".join(answer.err.split())
    assert list(read_json(finished / QUANTIZATION, "")) == ["cpu", "arm"]


@pytest.mark.slow
def test_a_measurement_stays_where_the_runtime_is_gone(
    measured: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    root = Path(shutil.copytree(measured(target), tmp_path / "runs" / "digits"))
    before = report_of(root)[f"int8.{target}"]
    gone(monkeypatch, target)
    actions.export(root, int8=True, targets=["arm"])
    assert sha256_of(root / int8_file(target)) == before["sha256"]
    actions.validate(root)
    after = report_of(root)[f"int8.{target}"]
    assert after.pop("earlier")["created"]
    assert after == {key: value for key, value in before.items() if key != "earlier"}


def test_a_file_that_was_cut_short_stops_everything(
    measured: Callable[[str], Path], tmp_path: Path, invoke: Invoke, target: str
) -> None:
    root = Path(shutil.copytree(measured(target), tmp_path / "runs" / "digits"))
    path = root / int8_file(target)
    path.write_bytes(path.read_bytes()[:-100])
    for command in ("verify", "validate", "gate", "bench"):
        assert invoke(command, root).code == 4, command


EXAMPLES = {"openvino": "OpenVINO", "executorch": "ExecuTorch", "litert": "LiteRT"}
"""target → the section of docs/DEPLOYING.md whose example runs its file"""
ALONE = {
    "openvino": ("torch", "onnx", "onnxruntime", "nayer_edge"),
    "executorch": ("nayer_edge",),  # its runtime imports torch, which looks for most of the others
    "litert": ("torch", "jax", "onnx", "onnxruntime", "nayer_edge"),
}
"""target → what the example must do without"""


def test_the_example_runs_with_the_runtime_alone(
    measured: Callable[[str], Path],
    target: str,
    without: Callable[..., dict[str, str]],
    example: Callable[[str], str],
) -> None:
    root, spec = measured(target), load_recipe("digits").teacher.input
    images = digits("holdout", spec).images[:7].numpy().astype(np.float32) / 255
    np.save(root.parents[1] / "images.npy", images)
    done = subprocess.run(
        [sys.executable, "-c", example(EXAMPLES[target])],
        env={"PATH": "", **without(*ALONE[target])},
        cwd=root.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with open_runner(get_target(target), root / int8_file(target), threads=1) as runner:
        wanted = runner.infer(images)
    assert done.stdout.strip() == str(wanted.argmax(axis=1))
    with OrtRunner(root / deploy.FP32, threads=1) as runner:
        agree = (runner.infer(images).argmax(1) == wanted.argmax(1)).sum()
    assert agree >= 6


@pytest.mark.slow
def test_the_runtime_is_not_imported_without_its_target() -> None:
    program = (
        "import sys\nimport nayer_edge.pipelines.deploy\n"
        "import nayer_edge.pipelines.validation.validate, nayer_edge.pipelines.validation.runnable\n"
        f"assert not {set(PACKAGES.values())!r} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_is_missing_without_such_targets(tiny_run: Path) -> None:
    assert not (tiny_run / RUNTIMES).exists()
    actions.require_engines(RunFolder.open(tiny_run))
