"""The code in docs/PYTHON.md and the scripts in examples/ run, unchanged but for a shorter distillation."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nayer_edge as ne

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "PYTHON.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs all blocks from top to bottom, in one namespace."""
    monkeypatch.chdir(tmp_path)
    reader: dict[str, Any] = {}
    shown = []
    for block in BLOCKS:
        exec(compile(block, "PYTHON.md", "exec"), reader)
        shown.append(capsys.readouterr().out)
    assert reader["teacher"].model.startswith("memory:Sequential@")
    assert reader["files"]["int8.cpu"] == Path("runs/mine/export/student.int8.cpu.onnx")
    assert reader["report"].dataset.kind == "holdout"
    assert reader["report"].teacher.top1 > 0.8, "the page's own teacher has learnt"
    deciding = [check.verdict for check in reader["verdict"].checks if not check.advisory]
    assert deciding
    assert (reader["verdict"].verdict == "pass") == all(verdict == "pass" for verdict in deciding)
    assert (tmp_path / "junit.xml").is_file()
    assert reader["page"].read_text(encoding="utf-8").startswith("<!")
    assert reader["synthetic"].shape == (40, 1, 8, 8)
    assert reader["loaded"].model == "nayer:resnet8"
    assert (tmp_path / "runs" / "mine" / "export" / "student.int8.arm.onnx").is_file()
    assert shown[-1].endswith(" 2\n"), "the error and its exit code"


def test_the_page_names_everything() -> None:
    methods = [name for name, _ in inspect.getmembers(ne.Run, inspect.isfunction) if not name.startswith("_")]
    assert len(methods) >= 6
    code = "\n".join(BLOCKS)
    for name in methods:
        assert f"run.{name}(" in code, name
    for name in set(ne.__all__) - {"Run", "__version__"}:
        assert f"ne.{name}" in PAGE or f"`{name}`" in PAGE, name


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Runs a script of examples/ in the test's folder, in this process; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))

    def run(name: str, *arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    return run


def test_the_example_that_gates_runs(
    script: Callable[..., object], tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unchanged, on a student that was hardly trained."""
    assert script("gate_in_ci.py", str(tiny_run)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "gate: fail"
    assert any(line.startswith("fail ") and " int8.cpu " in line for line in lines)
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").startswith("### nayer-edge gate: ✗ fail")
    assert (tmp_path / "junit.xml").is_file()
    assert script("gate_in_ci.py", "nowhere") == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.slow  # docs/PYTHON.md runs the same calls
def test_the_example_that_distils_runs(
    script: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer epochs and steps than it has: the student is not meant to be accurate, so the gate may fail."""
    distil = ne.distill

    def shortly(*arguments: Any, **settings: Any) -> ne.Run:
        settings["precision"] = "fp32"
        settings["synthesis"] |= {"g_steps": 5}
        settings["distill"] |= {"steps": 20}
        settings["export"] |= {"calibration_images": 50, "calibration_method": "minmax", "max_drop": None}
        return distil(*arguments, **settings)

    monkeypatch.setattr(ne, "distill", shortly)
    assert script("bring_your_own_module.py", "--epochs", "2") in (0, None)
    assert (tmp_path / "runs" / "own_module" / "report.html").is_file()
    verdict = json.loads((tmp_path / "runs" / "own_module" / "gate" / "verdict.json").read_text())["verdict"]
    assert re.search(r"teacher 0\.9\d+, student 0\.\d+, gate: \w+", capsys.readouterr().out)
    # The other script gives the same verdict.
    assert script("gate_in_ci.py", "runs/own_module") == (0 if verdict == "pass" else 1)
    assert capsys.readouterr().out.splitlines()[-1] == f"gate: {verdict}"


def test_every_example_is_run_here() -> None:
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in (ROOT / "examples").glob("*.py")} <= tested
