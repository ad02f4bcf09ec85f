"""The release before: worse, equal and better successors; baselines that are missing, altered or of other images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from nayer_edge.errors import EXIT_FAILED, EXIT_INTEGRITY, EXIT_OK, EXIT_USAGE
from nayer_edge.pipelines.gate.baseline import first_choices
from nayer_edge.pipelines.gate.judgement import Baseline, judge
from nayer_edge.pipelines.gate.statistics import drop_lower, drop_upper
from nayer_edge.pipelines.gate.verdict import run_gate
from nayer_edge.pipelines.measurements import PREDICTIONS_PATH, REPORT_PATH
from nayer_edge.pipelines.schemas import load
from nayer_edge.pipelines.validate import count_pairs
from nayer_edge.storage.files import sha256_of, write_json
from nayer_edge.storage.run_folder import Artifact, RunFolder

N, CLASSES = 800, 10
LABELS = np.random.default_rng(0).integers(0, CLASSES, N).astype(np.int32)
MODEL = "export/student.int8.cpu.onnx"

Release = Callable[..., Path]
Invoke = Callable[..., Any]


def ranks(wrong: Collection[int]) -> np.ndarray:
    """Five ranks per image; the first is the label, except where it is wrong."""
    first = LABELS.copy()
    first[list(wrong)] = (first[list(wrong)] + 1) % CLASSES
    return np.stack([(first + place) % CLASSES for place in range(5)], axis=1).astype(np.int32)


def digest(images: str) -> str:
    return (images * 64)[:64]


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """Makes a validated run whose INT8 model is wrong on some images."""

    def make(name: str, wrong: Collection[int], *, images: str = "a", kind: str = "holdout", **changes: Any) -> Path:
        root = tmp_path / name
        run = RunFolder.create(root, {"name": "digits", "gate": {}}, 0, {}, {})
        (root / MODEL).parent.mkdir()
        (root / MODEL).write_bytes(name.encode())
        (root / "validate").mkdir()
        np.savez_compressed(root / PREDICTIONS_PATH, labels=LABELS, **{"int8.cpu": ranks(wrong)})
        artifact = {
            "name": "int8.cpu",
            "file": MODEL,
            "target": "cpu",
            "precision": "int8",
            "runtime": "onnxruntime",
            "status": "measured",
            "precision_verified": True,
            "sha256": sha256_of(root / MODEL),
            **changes,
        }
        report = {
            "schema": "nayer-edge/report/1",
            "run": "digits",
            "dataset": {"kind": kind, "n": N, "name": "held", "sha256": digest(images)},
            "teacher": {"params": 1},
            "student": {"params": 1},
            "artifacts": [artifact],
            "predictions_sha256": sha256_of(root / PREDICTIONS_PATH),
        }
        write_json(root / REPORT_PATH, report)
        for step, files in (
            ("int8", {"int8": MODEL}),
            ("validate", {"report": REPORT_PATH, "predictions": PREDICTIONS_PATH}),
        ):
            made = Artifact(step, files, {})
            run.record(made, digest="0" * 64, settings={}, parents=[], seconds=0, finished="")
        return root

    return make


def references(folder: Path, run: str, sha256: str | None = None) -> Path:
    path = folder / "references.toml"
    path.write_text(f'[baseline]\nrun = "{run}"\n' + (f'sha256 = "{sha256}"\n' if sha256 else ""))
    return path


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text("[accuracy]\n[int8]\n[parity]\n[baseline]\nmax_drop = 0.01\n")
    return path


@pytest.mark.parametrize(
    ("before", "now", "verdict", "code"),
    [
        (range(20), range(20), "pass", EXIT_OK),
        (range(20), range(5), "pass", EXIT_OK),
        (range(20), range(60), "fail", EXIT_FAILED),
        (range(20), range(30), "inconclusive", EXIT_FAILED),
        (range(20), range(100, 190), "fail", EXIT_FAILED),
    ],
    ids=["equal", "better", "worse", "a little worse", "worse on other images"],
)
def test_successors(
    release: Release,
    invoke: Invoke,
    policy: Path,
    tmp_path: Path,
    before: range,
    now: range,
    verdict: str,
    code: int,
) -> None:
    release("1.0", before)
    root = release("1.1", now)
    files = references(tmp_path, "1.0")
    answer = invoke("gate", root, "--policy", policy, "--references", files, "--json")
    assert answer.code == code, answer.err
    value = json.loads(answer.out)
    jsonschema.validate(value, load("verdict"))
    assert value["verdict"] == verdict
    assert value["baseline"] == {"name": "1.0", "report_sha256": sha256_of(tmp_path / "1.0" / REPORT_PATH)}
    (check,) = [check for check in value["checks"] if check["name"] == "accuracy_drop_vs_baseline"]
    lost, gained = len(set(now) - set(before)), len(set(before) - set(now))
    bound = drop_lower if verdict == "fail" else drop_upper
    assert check["observed"] == pytest.approx((lost - gained) / N)
    assert check["bound"] == pytest.approx(bound(lost, gained, N, 0.05))
    assert f"({lost} lost, {gained} gained of {N})" in check["detail"]
    assert "the baseline '1.0'" in check["detail"]
    table = invoke("gate", root, "--policy", policy, "--references", files).out
    assert "Compared with the baseline '1.0'" in " ".join(table.split())


def test_counts_are_those_of_numpy(release: Release, policy: Path, tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    before, now = (set(chance.choice(N, 90, replace=False).tolist()) for _ in range(2))
    release("before", before)
    root = release("now", now)
    baseline = run_gate(root, policy, references(tmp_path, "before")).baseline
    assert baseline is not None
    wanted = count_pairs(ranks(before)[:, 0] == LABELS, ranks(now)[:, 0] == LABELS)
    assert baseline.paired == {"int8.cpu": wanted}
    assert wanted.lost > 0 < wanted.gained


def test_a_folder_with_report_and_predictions_alone_will_do(release: Release, policy: Path, tmp_path: Path) -> None:
    """What a team commits of a release: two small files."""
    before, root = release("1.0", range(9)), release("1.1", range(9))
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in (REPORT_PATH, PREDICTIONS_PATH):
        shutil.copy(before / name, kept)
    assert run_gate(root, policy, references(tmp_path, "kept")).verdict == "pass"
    sha256 = sha256_of(kept / "report.json")
    assert run_gate(root, policy, references(tmp_path, "kept", sha256)).verdict == "pass"


def test_paths_in_references(release: Release, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release("1.0", range(9))
    root = release("1.1", range(9))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STORE", str(tmp_path))
    (tmp_path / "ci").mkdir()
    for run in (str(tmp_path / "1.0"), "../1.0", "~/1.0", "$STORE/1.0"):
        assert run_gate(root, policy, references(tmp_path / "ci", run)).verdict == "pass", run


def refused(invoke: Invoke, root: Path, policy: Path, files: Path, code: int) -> str:
    answer = invoke("gate", root, "--policy", policy, "--references", files)
    assert answer.code == code, answer.out + answer.err
    assert "Traceback" not in answer.err
    return " ".join(answer.err.split())


def test_a_missing_baseline(release: Release, invoke: Invoke, policy: Path, tmp_path: Path) -> None:
    root = release("1.1", ())
    assert "There is no baseline at" in refused(invoke, root, policy, references(tmp_path, "1.0"), EXIT_USAGE)
    (tmp_path / "1.0").mkdir()
    error = refused(invoke, root, policy, references(tmp_path, "1.0"), EXIT_USAGE)
    assert "has not been validated" in error
    assert "There is no references at" in refused(invoke, root, policy, tmp_path / "none.toml", EXIT_USAGE)


@pytest.mark.parametrize("change", ["report", "predictions", "gone", "digest", "both", "manifest", "labels"])
def test_a_tampered_baseline_is_exit_4(
    release: Release, invoke: Invoke, policy: Path, tmp_path: Path, change: str
) -> None:
    before, root = release("1.0", range(50)), release("1.1", range(60))
    sha256 = sha256_of(before / REPORT_PATH)
    files = references(tmp_path, "1.0", sha256 if change in ("digest", "both") else None)
    report, predictions = before / REPORT_PATH, before / PREDICTIONS_PATH
    if change == "report":
        report.write_bytes(report.read_bytes() + b" ")
    elif change == "predictions":
        np.savez_compressed(predictions, labels=LABELS, **{"int8.cpu": ranks(range(90))})
    elif change == "gone":
        predictions.unlink()
        RunFolder.open(before).forget("validate")
    elif change == "manifest":
        RunFolder.open(before).forget("validate")
    else:
        # Whoever can write there makes all hashes agree; only the digest in references.toml is out of reach.
        labels = np.roll(LABELS, 1) if change == "labels" else LABELS
        np.savez_compressed(predictions, labels=labels, **{"int8.cpu": ranks(range(90))})
        values = json.loads(report.read_text())
        values["predictions_sha256"] = sha256_of(predictions)
        write_json(report, values)
        made = Artifact("validate", {"report": REPORT_PATH, "predictions": PREDICTIONS_PATH}, {})
        held = RunFolder.open(before)
        held.record(made, digest="0" * 64, settings={}, parents=[], seconds=0, finished="")
    error = refused(invoke, root, policy, files, EXIT_INTEGRITY)
    assert "1.0" in error


@pytest.mark.parametrize("damage", [b"", b"PK", b"no archive"], ids=["empty", "cut short", "garbage"])
def test_predictions_that_are_none(tmp_path: Path, damage: bytes) -> None:
    from nayer_edge.errors import IntegrityError

    path = tmp_path / "predictions.npz"
    path.write_bytes(damage)
    with pytest.raises(IntegrityError):
        first_choices(path, ["labels"], N)
    for arrays in (
        {"labels": LABELS[:-1]},
        {"labels": LABELS.astype(np.int64)},
        {"labels": LABELS.astype(">i4")},
        {"labels": np.zeros((N, 6), np.int32)},
        {"labels": np.asfortranarray(ranks(()))},
        {"other": LABELS},
        {"labels": np.array([{}], object)},
    ):
        np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
        with pytest.raises(IntegrityError):
            first_choices(path, ["labels"], N)


def test_other_images_are_refused(release: Release, invoke: Invoke, policy: Path, tmp_path: Path) -> None:
    release("1.0", range(9), images="b")
    root = release("1.1", range(9))
    error = refused(invoke, root, policy, references(tmp_path, "1.0"), EXIT_USAGE)
    assert "measured on different images" in error
    assert "nayer-edge validate" in error
    release("0.9", range(9), kind="synthetic")
    assert "synthetic images" in refused(invoke, root, policy, references(tmp_path, "0.9"), EXIT_USAGE)


def test_an_artefact_that_the_baseline_lacks_fails(release: Release, policy: Path, tmp_path: Path) -> None:
    release("1.0", range(9), status="unavailable", sha256=None)
    verdict = run_gate(release("1.1", range(9)), policy, references(tmp_path, "1.0"))
    assert verdict.verdict == "fail"
    assert "no measured artefact 'int8.cpu'" in verdict.checks[-1].detail


def test_a_limit_without_references_fails_and_references_without_a_limit_are_refused(
    release: Release, invoke: Invoke, policy: Path, tmp_path: Path
) -> None:
    release("1.0", range(9))
    root = release("1.1", range(9))
    verdict = run_gate(root, policy)
    assert verdict.verdict == "fail"
    assert "--references references.toml" in verdict.checks[-1].detail
    policy.write_text("[accuracy]\n[int8]\n[parity]\n")
    error = refused(invoke, root, policy, references(tmp_path, "1.0"), EXIT_USAGE)
    assert "[baseline] max_drop" in error


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[baseline]\n",
        '[baseline]\nrun = ""',
        "[baseline]\nrun = 1",
        '[baseline]\nrunn = "x"',
        "[[baseline",
        '[baseline]\nrun = "x"\nsha256 = "abc"',
        'extra = 1\n[baseline]\nrun = "x"',
    ],
)
def test_references_that_do_not_hold(release: Release, invoke: Invoke, policy: Path, tmp_path: Path, text: str) -> None:
    root = release("1.1", ())
    files = tmp_path / "references.toml"
    files.write_text(text)
    refused(invoke, root, policy, files, EXIT_USAGE)
    if "runn" in text:
        assert "Did you mean 'baseline.run'?" in refused(invoke, root, policy, files, EXIT_USAGE)


def test_judging_is_a_pure_function_of_the_counts(release: Release, policy: Path, tmp_path: Path) -> None:
    """The same report and counts, the same verdict; none of the files is read again."""
    from nayer_edge.pipelines.gate.policy import make_policy
    from nayer_edge.pipelines.gate.verdict import load_report
    from nayer_edge.pipelines.recipes.checking import parse_toml

    release("1.0", range(20))
    root = release("1.1", range(60))
    verdict = run_gate(root, policy, references(tmp_path, "1.0"))
    report, limits = load_report(RunFolder.open(root)), make_policy(parse_toml(policy, "a policy"), "x")
    shutil.rmtree(tmp_path / "1.0")
    assert isinstance(verdict.baseline, Baseline)
    assert judge(report, limits, verdict.baseline).checks == verdict.checks
