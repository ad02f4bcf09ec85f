"""What a command leaves behind when it was mistyped, cut short or not allowed: nothing that a later one believes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nayer_edge.errors import UsageError
from nayer_edge.export.targets import TARGETS
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.pipelines.trust.verification import examine
from nayer_edge.pipelines.validation.runnable import graphs
from nayer_edge.pipelines.validation.validate import Seen, _report, require_answers
from nayer_edge.storage.run_folder import MANIFEST, RunFolder, clear_folder

Invoke = Callable[..., Any]


@pytest.fixture
def holdout(tmp_path: Path) -> Path:
    """Forty labelled pictures of noise."""
    random = np.random.default_rng(0)
    path = tmp_path / "noise.npz"
    np.savez(path, images=random.integers(0, 256, (40, 16, 16), np.uint8), labels=np.arange(40) % 10)
    return path


def report_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "validate" / "report.json").read_text())


def test_a_mistyped_hold_out_is_not_taken_for_the_last(invoke: Invoke, finished: Path, holdout: Path) -> None:
    assert invoke("validate", finished, "--data", holdout, "--allow-implausible").code == 0
    before = (finished / MANIFEST).read_bytes()
    for words in (
        ("validate", finished, "--data", "/nowhere/new.npz"),
        ("run", finished, "--set", "validate.data=/nowhere/new.npz"),
        ("run", finished, "--set", "teacher.weights=/nowhere/t.pt", "--set", "teach=''"),
    ):
        answer = invoke(*words)
        assert answer.code == 2, words
        assert "there is no /nowhere/" in answer.err or "teach" in answer.err
        assert (finished / MANIFEST).read_bytes() == before
    holdout.unlink()
    answer = invoke("validate", finished)
    assert (answer.code, report_of(finished)["dataset"]["n"]) == (0, 40), "the same one counts as what it was"


def test_no_verdict_lies_beside_a_report_that_it_is_not_about(invoke: Invoke, finished: Path, holdout: Path) -> None:
    files = [finished / "gate" / "verdict.json", finished / "gate" / "junit.xml", finished / "report.html"]
    assert all(path.is_file() for path in files)
    answer = invoke("validate", finished, "--data", holdout, "--allow-implausible")
    assert answer.code == 0
    assert "Removed outdated results (gate, report)" in " ".join(answer.out.split())
    assert not any(path.exists() for path in files)
    assert examine(RunFolder.open(finished)).problems == ()
    assert invoke("validate", finished, "--data", holdout, "--allow-implausible").out.count("Removed") == 0, (
        "nothing was measured"
    )
    assert invoke("report", finished).code == 0
    assert all(path.is_file() for path in files)


def seen_of(not_finite: dict[str, int]) -> Seen:
    """1,000 images, all right but for INT8, which is wrong where `not_finite` says that another has no answer."""
    ranks = {name: np.zeros((1000, 1), np.int32) for name in ("teacher", "student", "fp32", "int8.cpu")}
    ranks["int8.cpu"][:100] = 1
    for name, count in not_finite.items():
        ranks[name][:count] = 1
    return Seen(ranks, dict.fromkeys(ranks, 0.0), dict.fromkeys(ranks, 0) | not_finite, "0" * 64)


def test_images_without_an_answer_of_the_teacher_are_no_excuse() -> None:
    require_answers(seen_of({}), "x")
    with pytest.raises(UsageError, match=r"not finite on 100 of 1,000 images of held\.npz"):
        require_answers(seen_of({"teacher": 100}), "held.npz")


@pytest.mark.parametrize(("broken", "pairs"), [(0, True), (100, False)])
def test_images_without_an_answer_of_fp32_are_none_either(finished: Path, broken: int, pairs: bool) -> None:
    candidate = next(c for c in graphs(load_recipe("digits")) if c.name == "int8.cpu")
    assert candidate.target in TARGETS
    labels = np.zeros(1000, np.int64)
    report = _report(candidate, RunFolder.open(finished), None, seen_of({"fp32": broken}), labels, list("0123456789"))
    assert report.paired is not None
    assert (report.paired.vs_fp32 is not None) is pairs
    assert report.paired.vs_teacher is not None
    assert report.paired.vs_teacher.lost == 100
    assert bool(report.per_class) is pairs, "nor class by class"


def test_nothing_is_written_into_a_run(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    before = (finished / MANIFEST).read_bytes()
    for words in (
        ("sbom", finished, "--out", finished / "bom.json"),
        ("sbom", finished, "--out", finished / MANIFEST),
        ("lte", "build", "digits", "--out", finished / "lte.safetensors"),
        ("lte", "build", "digits", "--out", finished / "student" / "mine.safetensors"),
    ):
        answer = invoke(*words)
        assert answer.code == 2, words
        assert "lies inside" in answer.err
    assert (finished / MANIFEST).read_bytes() == before
    assert examine(RunFolder.open(finished)).problems == ()
    assert invoke("sbom", finished, "--out", tmp_path / "bom.json").code == 0


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_fresh_start_that_was_cut_short_can_be_repeated(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    weights = shutil.copy(finished / "teacher" / "teacher.safetensors", tmp_path / "w.safetensors")
    original, left = shutil.rmtree, [after]

    def interrupted(path: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        original(path)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            clear_folder(finished)
    assert (finished / MANIFEST).is_file()
    # Weights instead of training.
    recipe = load_recipe("digits", ["teacher.model=nayer:wrn_10_1", f"teacher.weights={weights}"])
    run_recipe(recipe, finished, last="teacher", fresh=True)
    assert list(RunFolder.open(finished).manifest.steps) == ["teacher"]
    assert RunFolder.open(finished).unexpected_files() == []


def test_init_names_the_hold_out_as_seen_from_the_recipe(
    invoke: Invoke, finished: Path, holdout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(finished / "teacher" / "teacher.safetensors", tmp_path / "t.safetensors")
    (tmp_path / "labels.txt").write_text("\n".join(load_recipe("digits").teacher.classes))
    words = ("init", "t.safetensors", "--model", "nayer:wrn_10_1", "--labels", "labels.txt", "--input", "1x16x16",
             "--mean", "0.5", "--std", "0.5", "--no-flip", "--effort", "trial", "--yes")  # fmt: skip
    answer = invoke(*words, "--data", "nosuch.npz", "--out", "recipes/mine.toml")
    assert answer.code == 2
    assert "nosuch.npz" in answer.err
    assert not (tmp_path / "recipes" / "mine.toml").exists(), "the mended command must not find it in its way"
    answer = invoke(*words, "--data", holdout.name, "--out", "recipes/mine.toml")
    assert answer.code == 0, answer.err
    assert load_recipe("recipes/mine.toml").validate_.data == str(holdout)
    kept = (tmp_path / "recipes" / "mine.toml").read_bytes()
    assert invoke(*words, "--data", "nosuch.npz", "--out", "recipes/mine.toml", "--force").code == 2
    assert (tmp_path / "recipes" / "mine.toml").read_bytes() == kept


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read everything")
@pytest.mark.parametrize("name", ["export/student.fp32.onnx", "validate"])
def test_what_may_not_be_read_is_no_failed_gate(
    finished: Path, name: str, spawn_each: Callable[..., list[Any]]
) -> None:
    # Root without these two is bound by the modes of its own files.
    humble = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    commands = (["gate", finished], ["verify", finished])
    (finished / name).chmod(0)
    try:
        answers = spawn_each(*commands, under=humble)
    finally:
        (finished / name).chmod(0o755)
    for command, answer in zip(commands, answers, strict=True):
        assert answer.code == 2, (command, answer)
        assert "permission denied" in answer.err, command


def test_export_changes_only_what_it_is_told(invoke: Invoke, finished: Path) -> None:
    def written() -> tuple[bool, bool]:
        export = json.loads((finished / MANIFEST).read_text())["recipe"]["export"]
        assert (finished / "export" / "student.fp16.onnx").is_file() is export["fp16"]
        return export["fp16"], export["engines"]

    assert invoke("export", finished, "--fp16", "--no-engine").code == 0
    assert written() == (True, False)
    assert invoke("export", finished).code == 0
    assert written() == (True, False)
    assert invoke("export", finished, "--no-fp16").code == 0
    assert written() == (False, False)
