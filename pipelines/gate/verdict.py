"""The gate: is this run good enough to ship? For CI, with the base install (no numpy, torch or onnx).

`run_gate` first hashes everything again, then judges the report. The other functions turn a verdict into
JSON, JUnit XML, Markdown, GitHub annotations or a table, and write only where they are told. `wording` has the words.
"""

from __future__ import annotations

import os
import re
import shlex
import xml.etree.ElementTree as ET  # writes only; nothing is parsed
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Group
from rich.table import Table
from rich.text import Text

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.runtime.progress import Progress
from nayer_edge.storage.files import read_json, sha256_of, write_bytes, write_json
from nayer_edge.storage.run_folder import Artifact, RunFolder, require_outside
from nayer_edge.text import inert

from ..measurements import PREDICTIONS_PATH, REPORT_PATH, Report, read_report
from ..recipes.as_toml import to_toml
from ..recipes.checking import parse_toml
from ..recipes.policy import Policy, limited, make_policy
from ..recipes.schema import Recipe
from . import wording
from .baseline import load_baseline
from .judgement import Baseline, Check, Verdict, judge

VERDICT_SCHEMA = "nayer-edge/verdict/1"
VERDICT_PATH = "gate/verdict.json"
JUNIT_PATH = "gate/junit.xml"

_COLOUR = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def run_gate(
    run_root: Path,
    policy_file: Path | None = None,
    references: Path | None = None,
    limits: Mapping[str, Any] | None = None,
) -> Verdict:
    """Judges a run folder.

    Args:
        run_root: the run folder.
        policy_file: a policy in TOML; the one of the run's recipe by default.
        references: a `references.toml` that names the release to compare with.
        limits: overrides of the policy; see `limited`.

    Raises:
        UsageError: there is no run or no report yet, a newer version wrote the report, the policy or references are
            invalid, or the baseline was measured on other images (exit 2).
        IntegrityError: a file differs from the manifest, the report does not match the files, or the baseline is not
            the one that the references name (exit 4).
    """
    run = RunFolder.open(run_root)
    policy = limited(load_policy(run, policy_file), limits or {})
    if references is not None and policy.baseline.max_drop is None:
        raise UsageError(
            f"{references} names a baseline, but the policy does not limit the drop against it.",
            fix="Add to the policy, for one point:\n[baseline]\nmax_drop = 0.01",
        )
    run.require_intact()
    report = load_report(run)
    baseline = None if references is None else load_baseline(references, run, report, policy.artifacts)
    return _judged(run, report, policy, baseline)


def _judged(run: RunFolder, report: Report, policy: Policy, baseline: Baseline | None = None) -> Verdict:
    verdict = judge(report, policy, baseline)
    distill = run.manifest.recipe.get("distill")
    continuable = isinstance(distill, dict) and distill.get("schedule") == "constant"
    export = run.manifest.recipe.get("export")
    qat = isinstance(export, dict) and bool(export.get("qat"))
    advice = wording.advice(verdict, report, continuable, qat)
    return replace(verdict, notes=(*wording.notes(report.dataset, policy, baseline), *advice))


def load_policy(run: RunFolder, policy_file: Path | None = None) -> Policy:
    """The policy in a file, or the one in the run's recipe.

    Raises:
        UsageError: it is missing or invalid.
    """
    if policy_file is not None:
        return make_policy(parse_toml(policy_file, "a policy"), str(policy_file))
    return make_policy(run.manifest.recipe.get("gate", {}), f"in the recipe of {run.root}")


def load_report(run: RunFolder) -> Report:
    """Reads `validate/report.json` and checks that the report matches these files.

    Raises:
        UsageError: there is no report yet, or a newer version wrote it.
        IntegrityError: the report is damaged, or the files have changed since it was written.
    """
    path = run.path(REPORT_PATH)
    again = f"Type: nayer-edge validate {shlex.quote(str(run.root))}"
    if not path.exists() and not run.manifest.steps.keys() >= {"student", "int8"}:
        missing = "student" if "student" not in run.manifest.steps else "INT8 artifact"
        raise UsageError(
            f"{run.root} has not been validated.", f"It has no {missing} yet.", f"Type: nayer-edge run {run.typed}"
        )
    if not path.exists():
        raise UsageError(f"{run.root} has not been validated.", f"It holds no {REPORT_PATH}.", again)
    if REPORT_PATH not in run.manifest.files:
        raise IntegrityError(f"{path} is not listed in the manifest and cannot be trusted.", fix=again)
    report = read_report(path, again)
    if found := _stale(run, report):
        raise IntegrityError(
            f"{path} is stale: it does not match the files in {run.root}.", "; ".join(found) + ".", again
        )
    return report


def _stale(run: RunFolder, report: Report) -> list[str]:
    """How each file that the report measured has changed since. (The hashes in the manifest were checked before.)"""
    found = []
    for artifact in report.artifacts:
        if artifact.sha256 is None:
            if artifact.status == "measured":
                found.append(f"the report has no SHA-256 for {artifact.name}")
        elif (actual := _hash(run, artifact.file)) != artifact.sha256:
            change = "is missing" if actual is None else "is not the file that was measured"
            found.append(f"{artifact.file} {change}")
    if (actual := _hash(run, PREDICTIONS_PATH)) != report.predictions_sha256:
        change = "is missing" if actual is None else "is not the one that the report was computed from"
        found.append(f"{PREDICTIONS_PATH} {change}")
    return found


def _hash(run: RunFolder, name: str) -> str | None:
    path = run.path(name)
    if not path.is_file():
        return None
    record = run.manifest.files.get(name)
    return record.sha256 if record else sha256_of(path)


def require_outputs(run_root: Path, outputs: Mapping[str, Path | None], inputs: Sequence[Path | None] = ()) -> None:
    """Refuses outputs that would alter a run folder, overwrite what the gate reads, or overwrite each other.

    Args:
        outputs: option → file to write.
        inputs: the policy and the references.

    Raises:
        UsageError: an output is one of those.
    """
    taken = {path.resolve(): "which the gate reads" for path in inputs if path is not None}
    for option, path in outputs.items():
        if path is None:
            continue
        require_outside(path, option, run_root)
        place = path.resolve()
        if place in taken:
            raise UsageError(f"{option} would overwrite {path}, {taken[place]}.", fix="Choose another file.")
        taken[place] = f"which {option} writes"


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """The content of `verdict.json`; texts are made inert."""
    baseline = verdict.baseline
    return {
        "schema": VERDICT_SCHEMA,
        "verdict": verdict.verdict,
        "notes": [inert(note) for note in verdict.notes],
        "baseline": baseline and {"name": inert(baseline.name), "report_sha256": baseline.report_sha256},
        "checks": [
            {
                "name": check.name,
                "artifact": inert(check.artifact),
                "observed": check.observed,
                "bound": check.bound,
                "limit": check.limit,
                "verdict": check.verdict,
                "advisory": check.advisory,
                "synthetic": check.synthetic,
                "detail": inert(check.detail),
            }
            for check in verdict.checks
        ],
    }


def read_verdict(path: Path) -> Verdict:
    """Reads `verdict.json`; the baseline, whose counts are not in it, is left out.

    Raises:
        IntegrityError: it is not readable as a verdict.
    """
    values = read_json(path, "a verdict")
    try:
        names = [field.name for field in fields(Check)]
        checks = tuple(Check(**{name: check[name] for name in names if name in check}) for check in values["checks"])
        return Verdict(values["verdict"], checks, tuple(values.get("notes", ())))
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not readable as a verdict.", why=f"{type(error).__name__}: {error}") from error


def junit_xml(verdict: Verdict) -> bytes:
    """One test case per check: failures of type `fail` or `inconclusive`, and advisory checks always pass."""
    failures = sum(check.verdict != "pass" and not check.advisory for check in verdict.checks)
    counts = {"tests": str(len(verdict.checks)), "failures": str(failures), "errors": "0"}
    suites = ET.Element("testsuites", {"name": "nayer-edge gate", "time": "0", **counts})
    suite = ET.SubElement(suites, "testsuite", {**suites.attrib, "skipped": "0"})
    for check in verdict.checks:
        case = ET.SubElement(
            suite, "testcase", name=check.name, classname=f"nayer-edge.gate.{inert(check.artifact)}", time="0"
        )
        detail = inert(check.detail)
        if check.verdict != "pass" and not check.advisory:
            ET.SubElement(case, "failure", type=check.verdict, message=detail).text = detail
        else:
            prefix = f"advisory, {check.verdict}: " if check.advisory else ""
            ET.SubElement(case, "system-out").text = prefix + detail
    if verdict.notes:
        ET.SubElement(suite, "system-out").text = "\n".join(inert(note) for note in verdict.notes)
    ET.indent(suites)
    return ET.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"


def write_junit(verdict: Verdict, path: Path) -> None:
    """Writes JUnit XML, atomically.

    Raises:
        UsageError: the file cannot be written.
    """
    write_bytes(path, junit_xml(verdict))


def summary_markdown(verdict: Verdict) -> str:
    """The verdict as GitHub-flavoured Markdown, for a step summary; texts cannot act as HTML or Markdown."""
    lines = [
        f"### nayer-edge gate: {wording.MARK[verdict.verdict]} {verdict.verdict}",
        "",
        "| | Check | Artifact | Observed | Bound | Limit | |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for check in verdict.checks:
        title, figures = wording.qualified_title(check), wording.figures(check)
        words = [wording.MARK[check.verdict], title, check.artifact, *figures, check.detail]
        lines.append("| " + " | ".join(_literal(word) for word in words) + " |")
    for note in verdict.notes:
        lines += ["", _literal(note)]
    return "\n".join(lines) + "\n"


def append_summary(verdict: Verdict, path: Path) -> None:
    """Appends the summary to a file, as `$GITHUB_STEP_SUMMARY` expects.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(summary_markdown(verdict))
    except OSError as error:
        raise UsageError(
            f"Cannot write {path}.",
            f"The system says: {error.strerror or error}.",
            "Choose another --summary.",
        ) from error


def _literal(text: str) -> str:
    """Text as Markdown that shows exactly this text: punctuation becomes character references, which never act."""

    def reference(match: re.Match[str]) -> str:
        return f"&#{ord(match[0])};"

    # Full stops inside words would make links of host names.
    return re.sub(r"[^\w ,.%✓✗×≤≥–-]|_|\.(?=[^\W\d])", reference, inert(text))


def github_annotations(verdict: Verdict) -> list[str]:
    """GitHub workflow commands: an error for each check that did not pass, a warning for advisory ones."""
    return [
        f"::{'warning' if check.advisory else 'error'} "
        f"title={_command_property(f'nayer-edge gate: {check.name} of {check.artifact} ({check.verdict})')}"
        f"::{_command_data(check.detail)}"
        for check in verdict.checks
        if check.verdict != "pass"
    ]


def print_annotations(verdict: Verdict, stream: TextIO, environ: Mapping[str, str] = os.environ) -> None:
    """Prints the annotations where GITHUB_ACTIONS is "true", and nothing elsewhere."""
    if environ.get("GITHUB_ACTIONS") == "true":
        stream.writelines(f"{line}\n" for line in github_annotations(verdict))


def _command_data(text: str) -> str:
    """Escapes a workflow command's message, which a line break would end."""
    for character in "%\r\n":
        text = text.replace(character, f"%{ord(character):02X}")
    return inert(text)


def _command_property(text: str) -> str:
    """Escapes a workflow command's property."""
    return _command_data(text).replace(":", "%3A").replace(",", "%2C")


def verdict_table(verdict: Verdict, encoding: str | None = None) -> Group:
    """The verdict for a terminal: a table that fits 80 columns, and a sentence for each check below it.

    Args:
        encoding: of the terminal; default: one that has every character.
    """
    marks = wording.marks(encoding)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("Check", overflow="fold")
    table.add_column("Artifact", overflow="fold")
    for heading in ("Observed", "Bound", "Limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    sentences = Table.grid(padding=(0, 1, 0, 0))
    for check in verdict.checks:
        style = "dim" if check.advisory else _COLOUR[check.verdict]
        mark = Text(marks[check.verdict], style=style)
        title, figures = wording.qualified_title(check), wording.figures(check)
        table.add_row(mark, _shown(title), _shown(check.artifact), *map(_shown, figures))
        sentences.add_row(mark, _shown(check.detail))
    mark = f"{wording.MARK[verdict.verdict]} " if marks is wording.MARK else ""
    overall = Text(f"{mark}gate: {verdict.verdict}", style=f"bold {_COLOUR[verdict.verdict]}")
    notes = [line for note in verdict.notes for line in (_shown(note), "")]
    return Group(table, "", sentences, "", *notes, overall)


def _shown(text: str) -> Text:
    """Text for a terminal or a CI log, where neither escapes nor workflow commands (`::`, `##[`) may act."""
    return Text(inert(text).replace("::", ":\N{ZERO WIDTH SPACE}:").replace("##[", "#\N{ZERO WIDTH SPACE}#["))


def policy_toml(policy: Policy) -> str:
    """The policy as TOML that `make_policy` reads back unchanged; limits that are not set become comments."""
    values = policy.model_dump(mode="json")
    text = to_toml({key: value for key, value in values.items() if not isinstance(value, dict)})
    for section, limits in values.items():
        if isinstance(limits, dict):
            lines = (
                f"# {key} is not limited\n" if value is None else to_toml({key: value}) for key, value in limits.items()
            )
            text += f"\n[{section}]\n" + "".join(lines)
    return text


def make_verdict(validate: Artifact, *, config: Recipe, out: RunFolder, progress: Progress) -> Artifact:
    """The pipeline's gate step: judges by the recipe's policy and keeps the verdict in the run folder.

    A verdict that is not `pass` is a result, not an error.

    Raises:
        IntegrityError: a file differs from the manifest, or the report does not match the files.
    """
    del validate, progress
    out.require_intact()
    verdict = _judged(out, load_report(out), config.gate)
    write_json(out.path(VERDICT_PATH), verdict_json(verdict))
    write_junit(verdict, out.path(JUNIT_PATH))
    return Artifact("gate", {"verdict": VERDICT_PATH, "junit": JUNIT_PATH}, {"verdict": verdict.verdict})
