"""The gate on run folders: exit codes, staleness, and outputs in which hostile texts cannot act."""

from __future__ import annotations

import ast
import functools
import io
import itertools
import json
import sys
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from nayer_edge.config import Section
from nayer_edge.errors import EXIT_INTEGRITY, EXIT_USAGE, IntegrityError, NayerEdgeError, UsageError
from nayer_edge.pipelines.gate import verdict as gate
from nayer_edge.pipelines.gate import wording
from nayer_edge.pipelines.gate.judgement import Check, Verdict
from nayer_edge.pipelines.gate.verdict import (
    append_summary,
    github_annotations,
    junit_xml,
    load_policy,
    make_verdict,
    policy_toml,
    print_annotations,
    read_verdict,
    require_outputs,
    run_gate,
    summary_markdown,
    verdict_json,
    verdict_table,
    write_junit,
)
from nayer_edge.pipelines.measurements import PREDICTIONS_PATH, REPORT_PATH, Dataset, Report
from nayer_edge.pipelines.recipes.policy import Policy, make_policy
from nayer_edge.pipelines.recipes.settings import make_recipe
from nayer_edge.pipelines.schemas import __main__ as schema_writer
from nayer_edge.pipelines.schemas import load
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.files import sha256_of, write_json
from nayer_edge.storage.run_folder import Artifact, RunFolder
from nayer_edge.text import inert

if TYPE_CHECKING:
    from xmlschema import XMLSchema

FP32, INT8 = "export/student.fp32.onnx", "export/student.int8.cpu.onnx"
HOSTILE = (
    "cat\x1b[2J\x1b]0;owned\x07\x00\ud800\ufffe\u202e"
    "\r\n::error::owned\n##[error]owned <script>alert(1)</script> <img src=x onerror=1> "
    "[a](http://evil.example) ![b](http://evil.example/i.png) `c` **d** | e | www.evil.example "
    "a@evil.example https://evil.example %0A::warning::x ]]> & \" ' \\"
)


@functools.cache
def schema() -> XMLSchema:
    """Of JUnit files. Not read at the top: every worker collects this file, and this takes a second."""
    from xmlschema import XMLSchema

    return XMLSchema(Path(__file__).parents[1] / "junit.xsd")


def report_values(root: Path) -> dict[str, Any]:
    def paired(lost: int, gained: int) -> dict[str, int]:
        return {"n": 600, "both_right": 590 - lost, "lost": lost, "gained": gained, "both_wrong": 10 - gained}

    def artifact(name: str, file: str) -> dict[str, Any]:
        return {
            "name": name,
            "file": file,
            "target": "cpu",
            "precision": name.split(".")[0],
            "runtime": "onnxruntime CPUExecutionProvider",
            "status": "measured",
            "reason": None,
            "precision_verified": True,
            "top1": 0.98,
            "agreement": 0.98,
            "max_abs_diff": 1e-5,
            "latency_ms": {"p50": 0.2, "p95": 0.3},
            "threads": 1,
            "speedup_vs_fp32": 4.0,
            "size_bytes": (root / file).stat().st_size,
            "sha256": sha256_of(root / file),
            "int8_coverage": 1.0,
            "paired": {"vs_fp32": paired(2, 1), "vs_teacher": paired(9, 4)},
            "per_class": [{"label": "cat", "n": 600, "lost": 2, "gained": 1}],
        }

    return {
        "schema": "nayer-edge/report/1",
        "run": "digits",
        "dataset": {"kind": "holdout", "n": 600, "name": "digits"},
        "teacher": {"top1": 0.99, "params": 1000},
        "student": {"top1": 0.985, "params": 100, "agreement": 0.98},
        "artifacts": [artifact("fp32", FP32), artifact("int8.cpu", INT8)],
        "predictions_sha256": sha256_of(root / PREDICTIONS_PATH),
        "hardware": {"cpu": "test"},
        "created": "2025-01-01T00:00:00Z",
    }


def record(run: RunFolder, step: str, **files: str) -> None:
    run.record(
        Artifact(step, files, {}),
        digest="0" * 64,
        settings={},
        parents=[],
        seconds=0,
        finished="2025-01-01T00:00:00Z",
    )


def write_report(root: Path, **changes: Any) -> None:
    """Writes and records a report, as `validate` does."""
    write_json(root / REPORT_PATH, {**report_values(root), **changes})
    record(RunFolder.open(root), "validate", report=REPORT_PATH, predictions=PREDICTIONS_PATH)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run folder with exported files, predictions and a report, all recorded."""
    folder = tmp_path / "a run"
    run = RunFolder.create(folder, {"name": "digits", "gate": {}}, 0, {"nayer-edge": "0"}, {})
    for name, content in ((FP32, b"fp32"), (INT8, b"int8"), (PREDICTIONS_PATH, b"predictions")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    record(run, "export", fp32=FP32, int8=INT8)
    write_report(folder)
    return folder


def refused(root: Path, policy: Path | None = None) -> NayerEdgeError:
    with pytest.raises(NayerEdgeError) as caught:
        run_gate(root, policy)
    return caught.value


def test_a_good_run_passes(root: Path) -> None:
    verdict = run_gate(root)
    assert verdict.verdict == "pass"
    assert len(verdict.checks) == 4, "INT8 coverage is not limited by default"


def test_the_gate_writes_nothing_by_itself(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    verdict = run_gate(root)
    for show in (verdict_json, junit_xml, summary_markdown, github_annotations, verdict_table):
        show(verdict)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_no_run(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert error.exit_code == EXIT_USAGE
    assert "not a run folder" in error.what


def test_no_report_yet(root: Path) -> None:
    (root / REPORT_PATH).unlink()
    RunFolder.open(root).forget("validate")
    error = refused(root)
    assert isinstance(error, UsageError)
    assert (error.why, error.fix) == ("It has no student yet.", f"Type: nayer-edge run '{root}'")
    for step in ("student", "int8"):
        run = RunFolder.open(root)
        run.record(Artifact(step, {}, {}), digest="0" * 64, settings={}, parents=[], seconds=0, finished="")
    error = refused(root)
    assert error.fix == f"Type: nayer-edge validate '{root}'", "a path with a space is quoted for the shell"


def test_report_that_the_manifest_knows_is_missing(root: Path) -> None:
    (root / REPORT_PATH).unlink()
    assert refused(root).exit_code == EXIT_INTEGRITY


def test_report_that_the_manifest_does_not_know(root: Path) -> None:
    RunFolder.open(root).forget("validate")
    error = refused(root)
    assert isinstance(error, IntegrityError)
    assert REPORT_PATH in error.what


@pytest.mark.parametrize("name", [FP32, INT8, PREDICTIONS_PATH, REPORT_PATH])
@pytest.mark.parametrize("change", ["altered", "same size", "missing"])
def test_altered_file(root: Path, name: str, change: str) -> None:
    path = root / name
    if change == "missing":
        path.unlink()
    elif change == "altered":
        path.write_bytes(path.read_bytes() + b" ")
    else:
        path.write_bytes(path.read_bytes()[::-1])
    error = refused(root)
    assert isinstance(error, IntegrityError)
    assert error.exit_code == EXIT_INTEGRITY
    assert name in error.why


@pytest.mark.parametrize("name", [FP32, INT8, PREDICTIONS_PATH])
def test_stale_report(root: Path, name: str) -> None:
    """The file was made anew and recorded, and `validate` was not repeated."""
    (root / name).write_bytes(b"made anew")
    if name == PREDICTIONS_PATH:
        record(RunFolder.open(root), "validate", report=REPORT_PATH, predictions=PREDICTIONS_PATH)
    else:
        record(RunFolder.open(root), "export", fp32=FP32, int8=INT8)
    error = refused(root)
    assert isinstance(error, IntegrityError)
    assert name in error.why
    assert error.fix == f"Type: nayer-edge validate '{root}'"


@pytest.mark.parametrize("name", [INT8, PREDICTIONS_PATH])
def test_stale_report_whose_file_is_gone(root: Path, name: str) -> None:
    (root / name).unlink()
    if name == INT8:
        record(RunFolder.open(root), "export", fp32=FP32)
    else:
        record(RunFolder.open(root), "validate", report=REPORT_PATH)
    error = refused(root)
    assert isinstance(error, IntegrityError)
    assert name in error.why


def test_measured_file_outside_the_manifest_is_hashed(root: Path) -> None:
    record(RunFolder.open(root), "export", fp32=FP32)
    assert run_gate(root).verdict == "pass"
    (root / INT8).write_bytes(b"swapped")
    assert INT8 in refused(root).why


def test_measured_artifact_without_a_hash(root: Path) -> None:
    values = report_values(root)["artifacts"]
    values[1]["sha256"] = None
    write_report(root, artifacts=values)
    error = refused(root)
    assert isinstance(error, IntegrityError)
    assert "int8.cpu" in error.why


def test_artifact_that_was_not_run_needs_no_file(root: Path) -> None:
    values = report_values(root)["artifacts"]
    absent = {**values[1], "name": "int8.tensorrt", "file": "export/none.engine", "status": "unavailable"}
    absent |= {"sha256": None, "reason": "no GPU"}
    write_report(root, artifacts=[*values, absent])
    assert run_gate(root).verdict == "pass"


def test_path_that_leaves_the_run(root: Path) -> None:
    values = report_values(root)["artifacts"]
    values[1]["file"] = "../outside.onnx"
    write_report(root, artifacts=values)
    error = refused(root)
    assert isinstance(error, IntegrityError)
    assert "outside the run folder" in error.what


def test_newer_report(root: Path) -> None:
    write_report(root, schema="nayer-edge/report/2")
    error = refused(root)
    assert isinstance(error, UsageError)
    assert "Update this installation" in error.fix


@pytest.mark.parametrize("schema", ["nayer-edge/report/0", "nayer-edge/report/x", "other/report/2", 2, None, []])
def test_report_of_another_kind(root: Path, schema: object) -> None:
    write_report(root, schema=schema)
    assert isinstance(refused(root), IntegrityError)


def test_report_with_keys_of_a_newer_minor_version(root: Path) -> None:
    write_report(root, brand_new={"key": 1})
    assert run_gate(root).verdict == "pass"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schema": "nayer-edge/report/1"}',
        b'{"a": NaN}',
        b"[" * 100_000,
    ],
)
def test_unreadable_report(root: Path, content: bytes) -> None:
    (root / REPORT_PATH).write_bytes(content)
    record(RunFolder.open(root), "validate", report=REPORT_PATH, predictions=PREDICTIONS_PATH)
    assert isinstance(refused(root), IntegrityError)


def write_policy(root: Path, text: str) -> Path:
    path = root.parent / "policy.toml"
    path.write_text(text)
    return path


def test_policy_with_an_unknown_key(root: Path) -> None:
    error = refused(root, write_policy(root, "[accuracy]\nmax_drop_vs_fp23 = 0.01\n"))
    assert error.exit_code == EXIT_USAGE
    assert "unknown key 'accuracy.max_drop_vs_fp23'. Did you mean 'accuracy.max_drop_vs_fp32'?" in error.why


@pytest.mark.parametrize("text", ["[accuracy", "artifacts = []", "[accuracy]\nconfidence = 1.5", "gate = 1"])
def test_policy_that_does_not_hold(root: Path, text: str) -> None:
    assert refused(root, write_policy(root, text)).exit_code == EXIT_USAGE


def test_policy_that_is_not_there(root: Path) -> None:
    assert refused(root, root / "none.toml").exit_code == EXIT_USAGE


def test_policy_of_the_recipe_is_the_default(root: Path) -> None:
    run = RunFolder.open(root)
    assert load_policy(run) == Policy()
    run.manifest.recipe["gate"] = {"size": {"max_bytes": 1}}
    run.save()
    verdict = run_gate(root)
    assert verdict.verdict == "fail"
    assert run_gate(root, write_policy(root, "")).verdict == "pass", "a file takes its place"


@pytest.mark.parametrize(
    "text",
    [
        "[size]\nmax_bytes = 1",
        "[latency]\nmax_p95_ms = 1e-9",
        "[latency]\nmin_speedup_vs_fp32 = 1e9",
        "[parity]\nmax_abs_diff = 1e-30",
        "[agreement]\nmin = 1.0",
        "artifacts = ['int8.nowhere']",
    ],
)
def test_impossible_limits_fail(root: Path, text: str) -> None:
    verdict = run_gate(root, write_policy(root, text))
    assert verdict.verdict == "fail"
    assert sum(check.verdict == "fail" for check in verdict.checks) == 1


def test_a_limit_that_the_images_cannot_settle(root: Path) -> None:
    verdict = run_gate(root, write_policy(root, "[accuracy]\nmax_drop_vs_fp32 = 0.002"))
    assert verdict.verdict == "inconclusive"


@pytest.mark.parametrize(("limit", "expected"), [(10**9, "pass"), (1, "fail")])
def test_the_step_judges_by_the_recipe_and_writes_into_the_run(root: Path, limit: int, expected: str) -> None:
    values = {
        "name": "digits",
        "teacher": {"model": "nayer:resnet20", "weights": "t.safetensors", "classes": ["a", "b"]},
        "student": {"model": "nayer:resnet8"},
        "gate": {"size": {"max_bytes": limit}},
    }
    recipe = make_recipe(values, "of this test")
    run = RunFolder.open(root)
    made = make_verdict(run.artifact("validate"), config=recipe, out=run, progress=Silent())
    written = json.loads((root / "gate" / "verdict.json").read_text())
    assert written["verdict"] == made.numbers["verdict"] == expected
    assert_junit((root / "gate" / "junit.xml").read_bytes())
    record(run, "gate", **made.files)
    assert run_gate(root).verdict == "pass", "recorded outputs do not disturb the next run"
    (root / INT8).write_bytes(b"tampered")
    with pytest.raises(IntegrityError):
        make_verdict(made, config=recipe, out=run, progress=Silent())


def hostile_verdict() -> Verdict:
    detail = f"Class '{HOSTILE}' of int8.cpu."
    return Verdict(
        "fail",
        (
            Check("runtime", "int8.cpu", None, None, None, "pass", "It ran."),
            Check("accuracy_drop_vs_fp32", HOSTILE, 0.1, 0.05, 0.015, "fail", detail),
            Check("accuracy_drop_vs_teacher", "a,b:c", 0.01, 0.05, 0.04, "inconclusive", detail),
            Check("per_class_drop", "int8.cpu", 0.2, 0.3, 0.05, "fail", detail, advisory=True),
            Check("agreement", "int8.cpu", 0.99, 0.98, 0.97, "pass", detail, synthetic=True),
            Check("size", "int8.cpu", 1_234_567_890, None, 10, "fail", "It is large."),
        ),
    )


def test_verdict_json_is_the_published_contract(root: Path, tmp_path: Path) -> None:
    import jsonschema  # takes a second: not in every worker that collects this file

    for verdict in (run_gate(root), hostile_verdict(), Verdict("pass", ())):
        value = verdict_json(verdict)
        jsonschema.validate(value, load("verdict"))
        write_json(tmp_path / "verdict.json", value)
        read = json.loads((tmp_path / "verdict.json").read_text(encoding="utf-8"))
        assert read == value
        assert read["verdict"] == verdict.verdict
        assert [c["verdict"] for c in read["checks"]] == [c.verdict for c in verdict.checks]
        assert verdict_json(read_verdict(tmp_path / "verdict.json")) == value
    assert "\x1b" not in json.dumps(verdict_json(hostile_verdict()), ensure_ascii=False)


def test_a_verdict_with_keys_of_another_minor_version(root: Path, tmp_path: Path) -> None:
    value = verdict_json(run_gate(root))
    del value["notes"]
    for check in value["checks"]:
        del check["synthetic"]
        check["brand_new"] = 1
    write_json(tmp_path / "verdict.json", value | {"brand_new": 1})
    assert read_verdict(tmp_path / "verdict.json") == run_gate(root)


@pytest.mark.parametrize(
    "value", [{}, {"verdict": "pass"}, {"verdict": "pass", "checks": [{"name": "size"}]}, {"checks": 1}]
)
def test_an_unreadable_verdict(tmp_path: Path, value: dict[str, Any]) -> None:
    write_json(tmp_path / "verdict.json", value)
    with pytest.raises(IntegrityError):
        read_verdict(tmp_path / "verdict.json")


def assert_junit(xml: bytes) -> None:
    """Valid against tests/pipelines/junit.xsd, with counts that are those of the elements."""
    schema().validate(io.BytesIO(xml))
    root = ET.fromstring(xml)
    for element in [root, *root.iter("testsuite")]:
        assert int(element.attrib["tests"]) == len(list(element.iter("testcase")))
        assert int(element.attrib["failures"]) == len(list(element.iter("failure")))


@pytest.mark.parametrize(
    "xml",
    [
        b"<testsuites><testcase name='a' classname='b'/></testsuites>",
        b"<testsuite name='a' tests='one' failures='0' errors='0'/>",
        b"<testsuite name='a' tests='0' failures='0'/>",
        b"<testsuite name='a' tests='0' failures='0' errors='0' verdict='x'/>",
        b"<testsuites><testsuite name='a' tests='1' failures='0' errors='0'><testcase name='x'/>"
        b"</testsuite></testsuites>",
    ],
)
def test_the_schema_refuses_what_is_no_junit(xml: bytes) -> None:
    from xmlschema import XMLSchemaValidationError

    with pytest.raises(XMLSchemaValidationError):
        schema().validate(io.BytesIO(xml))


def test_junit(tmp_path: Path) -> None:
    verdict = hostile_verdict()
    write_junit(verdict, tmp_path / "out" / "junit.xml")
    assert_junit((tmp_path / "out" / "junit.xml").read_bytes())
    suites = ET.parse(tmp_path / "out" / "junit.xml").getroot()
    assert suites.tag == "testsuites"
    (suite,) = suites
    cases = list(suite)
    assert [case.get("name") for case in cases] == [check.name for check in verdict.checks]
    assert suite.get("tests") == suites.get("tests") == "6"
    assert suite.get("failures") == suites.get("failures") == "3"
    kinds = [None if (f := case.find("failure")) is None else f.get("type") for case in cases]
    assert kinds == [None, "fail", "inconclusive", None, None, "fail"]
    assert cases[3].findtext("system-out", "").startswith("advisory, fail: Class 'cat")
    assert cases[1].find("failure").text == inert(verdict.checks[1].detail)
    assert cases[1].get("classname") == f"nayer-edge.gate.{inert(HOSTILE)}"


def test_a_synthetic_verdict_says_what_it_can_and_cannot_promise_everywhere(root: Path) -> None:
    import jsonschema  # takes a second: not in every worker that collects this file

    values = report_values(root)
    for artifact in values["artifacts"]:
        artifact |= {"top1": None, "paired": {"vs_fp32": None, "vs_teacher": None}, "per_class": [], "agreement": 1.0}
    write_report(
        root,
        dataset={"kind": "synthetic", "n": 2000, "name": "drawn from the trained generator"},
        artifacts=values["artifacts"],
    )
    verdict = run_gate(root)
    assert verdict.verdict == "pass"
    value = verdict_json(verdict)
    jsonschema.validate(value, load("verdict"))
    assert [check["name"] for check in value["checks"] if check["synthetic"]] == [
        "accuracy_drop_vs_fp32",
        "accuracy_drop_vs_teacher",
        "parity",
    ]
    assert_junit(junit_xml(verdict))
    shown = {
        "table": " ".join(rendered(verdict).split()),
        "json": json.dumps(value, ensure_ascii=False),
        "junit": " ".join(ET.fromstring(junit_xml(verdict)).find("testsuite").findtext("system-out").split()),
        "summary": MarkdownIt().render(summary_markdown(verdict)),
    }
    for name, text in shown.items():
        for note in wording.promise(Dataset(kind="synthetic", n=2000, name="x")):
            assert note in text, name
    assert "synthetic" not in json.dumps(verdict_json(replace(verdict, notes=()))["notes"])


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ("[accuracy]\nconfidence = 0.99", True),
        ("[accuracy]\nmax_drop_vs_fp32 = 0.5", False),
        ("[accuracy]\n[agreement]\nmin = 0.1", False),
        ("[int8]\nmin_coverage = 0.5", False),
    ],
)
def test_a_policy_that_limits_no_answer_is_told_so(root: Path, tmp_path: Path, limits: str, said: bool) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(limits)
    verdict = run_gate(root, policy)
    assert len(verdict.notes) == said


def test_a_verdict_on_labelled_images_needs_no_such_words(root: Path) -> None:
    assert run_gate(root).notes == ()
    assert "cannot promise" not in rendered(run_gate(root))


def test_outputs_never_alter_a_run_nor_each_other(root: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(root / "gate")
    policy = tmp_path / "policy.toml"
    for outputs, words in (
        ({"--junit": root / "gate" / "junit.xml"}, "lies inside the run folder"),
        ({"--json-out": root / "x.json"}, "lies inside the run folder"),
        ({"--summary": link / "s.md"}, "lies inside the run folder"),
        ({"--summary": root / ".." / root.name / "s.md"}, "lies inside the run folder"),
        ({"--junit": tmp_path / "x", "--json-out": tmp_path / "." / "x"}, "which --junit writes"),
        ({"--json-out": policy}, "which the gate reads"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            require_outputs(root, outputs, [policy, None])
        assert caught.value.fix
    require_outputs(root, {"--junit": tmp_path / "a", "--json-out": tmp_path / "b", "--summary": None}, [policy])


def test_junit_of_real_verdict_has_no_failures(root: Path) -> None:
    assert_junit(junit_xml(run_gate(root)))
    suites = ET.fromstring(junit_xml(run_gate(root)))
    assert suites.get("failures") == "0"
    assert suites.find(".//failure") is None


@given(st.text(st.characters()))
def test_junit_holds_any_text(text: str) -> None:
    verdict = Verdict("fail", (Check("size", text, 1, None, 0, "fail", text),))
    assert_junit(junit_xml(verdict))
    (failure,) = ET.fromstring(junit_xml(verdict)).iter("failure")
    assert (failure.text or "") == inert(text)
    assert failure.get("message") == inert(text)


def test_summary_cannot_be_escaped() -> None:
    verdict = hostile_verdict()
    markdown = summary_markdown(verdict)
    assert len(markdown.splitlines()) == 4 + len(verdict.checks)
    parser = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")
    tags = set()
    for token in parser.parse(markdown):
        tags.add(token.type)
        for child in token.children or ():
            assert child.type in {"text", "text_special"}, child
    assert not any("html" in tag or "link" in tag or "code" in tag for tag in tags)
    rows = [token for token in parser.parse(markdown) if token.type == "tr_open"]
    assert len(rows) == 1 + len(verdict.checks)
    html = parser.render(markdown)
    assert html.count("<td") == 7 * len(verdict.checks)
    assert "<script" not in html
    for character in ("\x1b", "\u202e", "\x07"):
        assert character not in html
        assert f"&#{ord(character)};" not in markdown
    assert "<img" not in html
    assert "www.evil" not in markdown
    assert "a@evil" not in markdown
    assert "https:" not in markdown
    assert "Agreement with teacher &#40;synthetic&#41;" in markdown


def test_summary_shows_texts_as_they_are() -> None:
    check = Check("size", "int8.cpu", 1, None, 2, "pass", "A | `b` <c> *d* [e](f) 1.50 % & größer_als.")
    html = MarkdownIt().enable("table").render(summary_markdown(Verdict("pass", (check,))))
    assert "A | `b` &lt;c&gt; *d* [e](f) 1.50 % &amp; größer_als." in html


def test_summary_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    append_summary(hostile_verdict(), path)
    assert path.read_text(encoding="utf-8") == "before\n" + summary_markdown(hostile_verdict())
    with pytest.raises(UsageError):
        append_summary(hostile_verdict(), tmp_path)


def test_annotations_are_one_line_each() -> None:
    lines = github_annotations(hostile_verdict())
    assert [line.split(" ")[0] for line in lines] == ["::error", "::error", "::warning", "::error"]
    for line in lines:
        assert "\n" not in line
        assert "\r" not in line
        assert "\x1b" not in line
        properties = line.removeprefix("::").split("::")[0]
        assert properties.count(",") == 0, "a comma would start another property"
    assert "a%2Cb%3Ac" in lines[1]
    assert "%250A::warning::x" in lines[0], "a percent sign of the text is not taken for an escape"
    assert "%0D%0A::error::owned" in lines[0]


@pytest.mark.parametrize("value", [None, "", "false", "1"])
def test_annotations_are_printed_on_github_only(value: str | None) -> None:
    stream = io.StringIO()
    print_annotations(hostile_verdict(), stream, {} if value is None else {"GITHUB_ACTIONS": value})
    assert stream.getvalue() == ""
    print_annotations(hostile_verdict(), stream, {"GITHUB_ACTIONS": "true"})
    assert stream.getvalue().splitlines() == github_annotations(hostile_verdict())


def rendered(verdict: Verdict, width: int = 80, **options: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(verdict_table(verdict))
    return stream.getvalue()


def test_table_fits_80_columns(root: Path) -> None:
    text = rendered(run_gate(root))
    assert max(map(len, text.splitlines())) <= 80
    for words in ("Accuracy drop vs teacher", "int8.cpu", "1.05 points", "≤ 1.50 points", "✓ gate: pass"):
        assert words in text
    assert "…" not in text, "nothing is cut off"


def test_table_is_inert() -> None:
    for width in (40, 80, 200):
        text = rendered(hostile_verdict(), width)
        assert not any(ord(character) < 32 and character != "\n" for character in text)
        assert "\u202e" not in text
        assert "::" not in text
        assert "##[" not in text
    assert "Agreement with teacher (synthetic)" in rendered(hostile_verdict(), 200)
    assert "Largest drop of a class (advisory)" in rendered(hostile_verdict(), 200)
    coloured = rendered(hostile_verdict(), force_terminal=True, color_system="standard")
    assert "\x1b[2J" not in coloured
    assert "\x1b]0;" not in coloured


def test_table_does_not_read_markup() -> None:
    check = Check("size", "[red]x[/red]", 1, None, 2, "pass", "[bold]b[/bold] :smile: [/nonsense]")
    text = rendered(Verdict("pass", (check,)))
    assert "[red]x[/red]" in text
    assert "[bold]b[/bold] :smile: [/nonsense]" in text


@given(st.text(st.characters()))
def test_inert_text(text: str) -> None:
    shown = inert(text)
    assert len(shown) == len(text)
    shown.encode()
    assert inert(shown) == shown
    assert all(c.isprintable() or ord(c) > 0x9F for c in shown)


def test_inert_leaves_other_scripts_alone() -> None:
    assert inert("größer – 猫 קיטי 🐈‍⬛ é") == "größer – 猫 קיטי 🐈‍⬛ é"
    for character in "\x00\x1b\x7f\x9b\n\r\t\u202e\u2066\u200f\u2028\ud800\uffff":
        assert inert(f"a{character}b") == "a\ufffdb"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"artifacts": ["int8.cpu", 'we"ird\\ \x7f \t 猫 🐈']},
        {"accuracy": {}, "int8": {}, "parity": {}},
        {
            "accuracy": {"max_drop_vs_fp32": 1e-5, "confidence": 0.999},
            "latency": {"max_p95_ms": 1e22, "min_speedup_vs_fp32": 0.1},
            "size": {"max_bytes": 10**12},
            "per_class": {"max_drop": 0.1, "advisory": False},
        },
    ],
)
def test_policy_toml_is_read_back_as_it_was(values: dict[str, Any]) -> None:
    policy = make_policy(values, "of this test")
    assert make_policy(tomllib.loads(policy_toml(policy)), "printed") == policy


def test_policy_toml_names_every_key() -> None:
    text = policy_toml(Policy())
    for name, field in Policy.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            assert f"[{name}]" in text
            assert all(key in text for key in field.annotation.model_fields)
        else:
            assert f"{name} = " in text


@pytest.mark.parametrize("name", ["recipe", "policy", "references", "report", "verdict", "manifest", "sweep"])
def test_committed_schemas_are_up_to_date(name: str) -> None:
    import jsonschema  # takes a second: not in every worker that collects this file

    assert load(name) == schema_writer.schemas()[name], "type: make schemas"
    jsonschema.Draft202012Validator.check_schema(load(name))
    assert load(name)["$id"] == f"nayer-edge/{name}/1"


def test_schemas_are_written_beside_the_module(tmp_path: Path) -> None:
    schema_writer.write(tmp_path)
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text()) == load(path.name.split(".")[0])
    assert len(list(tmp_path.iterdir())) == 7


def test_files_of_a_run_follow_their_schemas(root: Path) -> None:
    import jsonschema  # takes a second: not in every worker that collects this file

    jsonschema.validate(json.loads((root / "manifest.json").read_text()), load("manifest"))
    values = json.loads((root / REPORT_PATH).read_text())
    jsonschema.validate(values, load("report"))
    jsonschema.validate(Report.model_validate(values).model_dump(mode="json", by_alias=True), load("report"))
    jsonschema.validate(tomllib.loads(policy_toml(Policy())), load("policy"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"accuracy": {"max_drop": 1}}, load("policy"))


@pytest.mark.parametrize("module", ["statistics", "judgement"])
def test_judgement_is_standard_library_at_run_time(module: str) -> None:
    source = Path(gate.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    guarded = itertools.chain.from_iterable(
        ast.walk(node) for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    skipped = set(map(id, guarded))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= set(sys.stdlib_module_names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module == "nayer_edge.errors" or node.module.split(".")[0] in sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom):
            assert node.module == "statistics"
