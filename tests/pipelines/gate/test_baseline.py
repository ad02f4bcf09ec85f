"""The release before: worse, equal and better successors; baselines that are missing, altered or of other images."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nayer_edge.errors import EXIT_FAILED, EXIT_INTEGRITY, EXIT_OK, EXIT_USAGE, IntegrityError
from nayer_edge.pipelines.gate.judgement import Baseline, judge
from nayer_edge.pipelines.gate.statistics import drop_lower, drop_upper
from nayer_edge.pipelines.gate.verdict import run_gate
from nayer_edge.pipelines.measurements import PREDICTIONS_PATH, REPORT_PATH
from nayer_edge.pipelines.schemas import load
from nayer_edge.pipelines.validation.validate import count_pairs
from nayer_edge.storage.files import sha256_of, write_json
from nayer_edge.storage.run_folder import Artifact, RunFolder

N = 797  # not a multiple of eight
MODEL = "export/student.int8.cpu.onnx"

Release = Callable[..., Path]
Invoke = Callable[..., Any]


def right(wrong: Collection[int]) -> np.ndarray:
    """Per image whether its answer is right: all but the wrong ones."""
    found = np.ones(N, bool)
    found[list(wrong)] = False
    return found


def packed(wrong: Collection[int]) -> str:
    return np.packbits(right(wrong)).tobytes().hex()


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
        (root / PREDICTIONS_PATH).write_bytes(b"what the gate does not read")
        artifact = {
            "name": "int8.cpu",
            "file": MODEL,
            "target": "cpu",
            "precision": "int8",
            "runtime": "onnxruntime",
            "status": "measured",
            "precision_verified": True,
            "sha256": sha256_of(root / MODEL),
            "top1": (N - len(wrong)) / N,
            "correct": packed(wrong),
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
    import jsonschema  # takes a second: not in every worker that collects this file

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
    wanted = count_pairs(right(before), right(now))
    assert baseline.paired == {"int8.cpu": wanted}
    assert wanted.lost > 0 < wanted.gained


def test_a_folder_with_only_the_report_will_do(release: Release, policy: Path, tmp_path: Path) -> None:
    """What a team commits of a release: one small file."""
    before, root = release("1.0", range(9)), release("1.1", range(9))
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(before / REPORT_PATH, kept)
    assert run_gate(root, policy, references(tmp_path, "kept")).verdict == "pass"
    sha256 = sha256_of(kept / "report.json")
    assert run_gate(root, policy, references(tmp_path, "kept", sha256)).verdict == "pass"


@pytest.mark.parametrize("whole", [False, True], ids=["report", "run folder"])
def test_a_baseline_with_windows_line_ends(release: Release, policy: Path, tmp_path: Path, whole: bool) -> None:
    """As git checks it out with core.autocrlf; another change is still found."""
    before, root = release("1.0", range(9)), release("1.1", range(9))
    path = before / REPORT_PATH
    if not whole:
        path = Path(shutil.copy(path, tmp_path))
    sha256, data = sha256_of(path), path.read_bytes()
    files = references(tmp_path, "1.0" if whole else ".", sha256)
    path.write_bytes(data.replace(b"\n", b"\r\n"))
    verdict = run_gate(root, policy, files)
    assert verdict.verdict == "pass"
    assert verdict.baseline is not None
    assert verdict.baseline.report_sha256 == sha256
    path.write_bytes(data.replace(b"\n", b"\r\n") + b" ")
    with pytest.raises(IntegrityError):
        run_gate(root, policy, files)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_toml_as_windows_writes_it(release: Release, policy: Path, tmp_path: Path, encoding: str) -> None:
    """PowerShell's `>` writes UTF-16 with a byte order mark."""
    root = release("1.0", range(9))
    text = policy.read_text().replace("[baseline]\nmax_drop = 0.01\n", "[size]\nmax_bytes = 1_000_000\n")
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    policy.write_bytes((mark + text.replace("\n", "\r\n")).encode(encoding))
    assert [check.name for check in run_gate(root, policy).checks if check.name == "size"] == ["size"]


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


@pytest.mark.parametrize("change", ["report", "gone", "manifest", "digest", "accuracy"])
def test_a_tampered_baseline_is_exit_4(
    release: Release, invoke: Invoke, policy: Path, tmp_path: Path, change: str
) -> None:
    before, root = release("1.0", range(50)), release("1.1", range(60))
    files = references(tmp_path, "1.0", sha256_of(before / REPORT_PATH) if change == "digest" else None)
    report = before / REPORT_PATH
    if change == "report":
        report.write_bytes(report.read_bytes() + b" ")
    elif change == "gone":
        shutil.copy(report, report.with_name("kept"))
        report.unlink()
        shutil.move(report.with_name("kept"), before / "report.json")
    elif change == "manifest":
        RunFolder.open(before).forget("validate")
    else:
        # Whoever can write there makes all hashes agree; only the digest in references.toml is out of reach.
        values = json.loads(report.read_text())
        values["artifacts"][0]["correct"] = packed(range(90))
        if change == "digest":
            values["artifacts"][0]["top1"] = (N - 90) / N
        write_json(report, values)
        made = Artifact("validate", {"report": REPORT_PATH, "predictions": PREDICTIONS_PATH}, {})
        held = RunFolder.open(before)
        held.record(made, digest="0" * 64, settings={}, parents=[], seconds=0, finished="")
    error = refused(invoke, root, policy, files, EXIT_INTEGRITY)
    assert "1.0" in error


@pytest.mark.parametrize(
    "correct",
    [
        packed(range(9))[:-2],
        packed(range(9)) + "00",
        packed(range(9))[:-1] + "f",
        packed(range(8)),
        "xy",
        "",
        "0" * 10**6,
    ],
    ids=["short", "long", "padding", "accuracy", "letters", "empty", "huge"],
)
@pytest.mark.parametrize("which", ["baseline", "run"])
def test_bits_that_cannot_be(
    release: Release, invoke: Invoke, policy: Path, tmp_path: Path, correct: str, which: str
) -> None:
    release("1.0", range(9), **({"correct": correct} if which == "baseline" else {}))
    root = release("1.1", range(9), **({"correct": correct} if which == "run" else {}))
    refused(invoke, root, policy, references(tmp_path, "1.0"), EXIT_INTEGRITY)


@pytest.mark.parametrize("which", ["1.0", "1.1"])
def test_a_report_of_an_older_version_has_to_be_made_again(
    release: Release, invoke: Invoke, policy: Path, tmp_path: Path, which: str
) -> None:
    for name in ("1.0", "1.1"):
        release(name, range(9), **({"correct": None} if name == which else {}))
    error = refused(invoke, tmp_path / "1.1", policy, references(tmp_path, "1.0"), EXIT_USAGE)
    assert f"nayer-edge validate {tmp_path / which} --data HOLDOUT" in error
    if which == "1.0":
        (tmp_path / "kept").mkdir()
        shutil.copy(tmp_path / which / REPORT_PATH, tmp_path / "kept")
        error = refused(invoke, tmp_path / "1.1", policy, references(tmp_path, "kept"), EXIT_USAGE)
        assert f"copy {REPORT_PATH} to {tmp_path / 'kept'}" in error


@pytest.mark.slow
def test_the_commands_that_make_it_again_do_so(finished: Path, invoke: Invoke, policy: Path, tmp_path: Path) -> None:
    values = json.loads((finished / REPORT_PATH).read_text())
    for artifact in values["artifacts"]:
        artifact["correct"] = None
    write_json(finished / REPORT_PATH, values)
    run = RunFolder.open(finished)
    record = run.manifest.files[REPORT_PATH]
    changed = {"sha256": sha256_of(finished / REPORT_PATH), "bytes": (finished / REPORT_PATH).stat().st_size}
    run.manifest.files[REPORT_PATH] = record.model_copy(update=changed)
    run.save()
    files = references(tmp_path, str(finished))
    error = refused(invoke, finished, policy, files, EXIT_USAGE)
    first, second = re.findall(rf"nayer-edge (validate {finished} --(?:synthetic|data HOLDOUT))", error)
    for command in (first, second.replace("HOLDOUT", "digits")):
        assert invoke(*command.split()).code == EXIT_OK
    assert run_gate(finished, policy, files).baseline is not None


def test_other_images_are_refused(release: Release, invoke: Invoke, policy: Path, tmp_path: Path) -> None:
    release("1.0", range(9), images="b")
    root = release("1.1", range(9))
    error = refused(invoke, root, policy, references(tmp_path, "1.0"), EXIT_USAGE)
    assert "measured on different images" in error
    assert "nayer-edge validate" in error
    assert "other sizes" not in error
    for name, fit in (("1.0", "stretch"), ("1.1", "center-crop")):
        run = RunFolder.open(root.with_name(name))
        values = json.loads(run.path(REPORT_PATH).read_text())
        values["dataset"]["fit"] = fit
        write_json(run.path(REPORT_PATH), values)
        held = {"sha256": sha256_of(run.path(REPORT_PATH)), "bytes": run.path(REPORT_PATH).stat().st_size}
        run.manifest.files[REPORT_PATH] = run.manifest.files[REPORT_PATH].model_copy(update=held)
        run.save()
    error = refused(invoke, root, policy, references(tmp_path, "1.0"), EXIT_USAGE)
    assert "Pictures of other sizes: center-crop here, stretch there." in " ".join(error.split())
    release("0.9", range(9), kind="synthetic")
    assert "synthetic images" in refused(invoke, root, policy, references(tmp_path, "0.9"), EXIT_USAGE)


def test_an_artifact_that_the_baseline_lacks_fails(release: Release, policy: Path, tmp_path: Path) -> None:
    release("1.0", range(9), status="unavailable", sha256=None)
    verdict = run_gate(release("1.1", range(9)), policy, references(tmp_path, "1.0"))
    assert verdict.verdict == "fail"
    assert "no measured artifact 'int8.cpu'" in verdict.checks[-1].detail


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
    from nayer_edge.pipelines.gate.verdict import load_report
    from nayer_edge.pipelines.recipes.checking import parse_toml
    from nayer_edge.pipelines.recipes.policy import make_policy

    release("1.0", range(20))
    root = release("1.1", range(60))
    verdict = run_gate(root, policy, references(tmp_path, "1.0"))
    report, limits = load_report(RunFolder.open(root)), make_policy(parse_toml(policy, "a policy"), "x")
    shutil.rmtree(tmp_path / "1.0")
    assert isinstance(verdict.baseline, Baseline)
    assert judge(report, limits, verdict.baseline).checks == verdict.checks
