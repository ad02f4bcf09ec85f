"""What a sweep found: the measurements of its students, the limits that they miss, and the answer in words."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from nayer_edge.models.load import untrained_teacher
from nayer_edge.runtime.compute import seeded
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

from ..gate import wording
from ..gate.judgement import Check, Verdict
from ..gate.statistics import binomial_lower, binomial_upper
from ..gate.verdict import load_policy, load_report, run_gate
from ..measurements import ArtifactReport, Report
from ..recipes.schema import Recipe
from .halving import way_on
from .record import Bounds, Measured, Missed, StudentRecord, Sweep, Way

Outcome = Literal["pass", "fail", "inconclusive"]

_FIXED = {"latency_p95", "size"}
"""checks that training does not change"""
_NOISE = {"latency_p95": 1.25, "size": 1.0}
"""a limit is missed for good if it is exceeded by this factor; a latency varies"""
_INT8_DROP = "accuracy_drop_vs_fp32"
"""the check that quantization alone decides"""
_TRAINED = {"accuracy_drop_vs_teacher": 1, "agreement": -1}
"""checks that more training or a larger student helps, and the sign of "too much" """


def teacher_params(recipe: Recipe, bank: Path | None) -> int:
    """Parameters of the teacher."""
    if bank is not None and (bank / MANIFEST).is_file():
        made = RunFolder.open(bank).manifest.steps.get("teacher")
        if made is not None and isinstance(count := made.numbers.get("parameters"), int):
            return count
    with seeded(0):
        return untrained_teacher(recipe.teacher).parameter_count


def bounds(count: int, n: int, confidence: float) -> Bounds:
    """A rate with its two-sided Clopper–Pearson interval."""
    alpha = (1 - confidence) / 2
    return Bounds(value=count / n, low=binomial_lower(count, n, alpha), high=binomial_upper(count, n, alpha), n=n)


def refresh(student: StudentRecord, root: Path, sweep: Sweep) -> Outcome | None:
    """Fills in what a student's run measured; the verdict of the gate, or None if the run was not validated.

    Raises:
        IntegrityError: the run was altered.
    """
    if not (root / MANIFEST).is_file():
        return None
    run = RunFolder.open(root)
    if "validate" not in run.manifest.steps:
        return None
    verdict, report, policy = run_gate(root), load_report(run), load_policy(run)
    named, confidence = policy.artifacts, policy.accuracy.confidence
    student.artifacts = [
        _measured(artifact, report, verdict if artifact.name in named else None, confidence)
        for artifact in report.artifacts
        if artifact.status == "measured"
    ]
    student.missed = [
        Missed(
            check=check.name,
            artifact=check.artifact,
            observed=check.observed,
            bound=check.bound,
            limit=check.limit,
            verdict="fail" if check.verdict == "fail" else "inconclusive",
            detail=check.detail,
        )
        for check in _failing(verdict)
    ]
    sweep.images, sweep.kind = f"{report.dataset.n:,} {_images(report)}: {report.dataset.name}", report.dataset.kind
    sweep.teacher_accuracy = report.teacher.top1
    return verdict.verdict


def limit_missed(student: StudentRecord) -> str:
    """The limit that a student misses however long it is trained; empty if there is none."""
    for missed in student.missed:
        if missed.check not in _FIXED or missed.observed is None or missed.limit is None:
            continue
        if missed.observed > _NOISE[missed.check] * missed.limit:
            return missed.detail.rstrip(".")
    return ""


def conclude(sweep: Sweep, out: Path) -> None:
    """Fills in the answer: the smallest student that passes, or what keeps each from passing and what would help."""
    judged = [each for each in sweep.students if each.artifacts]
    for each in judged:
        each.way = _way(each)
    passing = [each for each in judged if not each.missed]
    if passing:
        best = min(passing, key=lambda each: each.order)
        sweep.verdict, sweep.answer = "pass", best.model
        sweep.sentence = f"{best.model} is the smallest student that passes: {_figures(best)}."
        sweep.command = f"nayer-edge export {_typed(out, best)} --int8"
        return
    sweep.answer, sweep.command = None, ""
    open_ = any(all(missed.verdict == "inconclusive" for missed in each.missed) for each in judged)
    sweep.verdict = "inconclusive" if open_ else "fail"
    excluded = [each for each in sweep.students if each.state == "stopped"]
    if not judged and excluded:
        for each in excluded:
            each.way = "limit"
        least = min(excluded, key=lambda each: each.order)
        sweep.sentence = f"No student passes. {least.model}, the smallest: {least.reason}."
        sweep.command = f"nayer-edge students --input {_input(sweep)}"
        return
    if not judged:
        sweep.sentence = "No student passes: none could be trained."
        return
    closest = min(judged, key=_distance)
    sweep.sentence = f"No student passes. {closest.model} comes closest: {closest.missed[0].detail}"
    root = _typed(out, closest)
    sweep.command = {
        "time": f"nayer-edge run {root} --more 1h",
        "larger": f"nayer-edge students --input {_input(sweep)}",
        "images": f"nayer-edge validate {root} --data FOLDER",
        "limit": f"nayer-edge gate {root} --print-policy",
        "quantization": f"nayer-edge export {root} --int8 --qat",
    }.get(closest.way or "", f"nayer-edge report {root}")


def advice(student: StudentRecord) -> str:
    """What would help a student that does not pass, in words; empty for one that passes."""
    words = {
        "time": "more time (nayer-edge run … --more)",
        "larger": "a larger student: its last share of the time improved it too little",
        "images": "more hold-out images, which would decide",
        "limit": "a smaller student or another limit: training does not change this",
        "quantization": "a smaller loss in INT8: --qat, or a lower export.max_drop, which leaves more layers in float",
    }
    return words.get(student.way or "", "")


def shipped(student: StudentRecord) -> Measured | None:
    """The artifact of a student that the policy is about, or the first one."""
    return next((each for each in student.artifacts if each.verdict is not None), next(iter(student.artifacts), None))


def quality(artifact: Measured) -> Bounds | None:
    """Accuracy on the hold-out, or agreement with the teacher without one."""
    return artifact.accuracy or artifact.agreement


def _failing(verdict: Verdict) -> list[Check]:
    return [check for check in verdict.checks if check.verdict != "pass" and not check.advisory]


def _measured(artifact: ArtifactReport, report: Report, verdict: Verdict | None, confidence: float) -> Measured:
    n = report.dataset.n

    def rate(value: float | None) -> Bounds | None:
        return None if value is None else bounds(round(value * n), n, confidence)

    outcomes = set() if verdict is None else {c.verdict for c in _failing(verdict) if c.artifact == artifact.name}
    outcome: Outcome = "fail" if "fail" in outcomes else "inconclusive" if outcomes else "pass"
    return Measured(
        name=artifact.name,
        accuracy=rate(artifact.top1),
        agreement=rate(artifact.agreement),
        p95_ms=artifact.latency_ms.p95 if artifact.latency_ms else None,
        size_bytes=artifact.size_bytes,
        verdict=None if verdict is None else outcome,
    )


def _images(report: Report) -> str:
    return "synthetic images" if report.dataset.kind == "synthetic" else "labelled images"


def _too_much(missed: Missed) -> float:
    """By how much a check that training helps misses its limit, as a fraction."""
    return _TRAINED[missed.check] * ((missed.observed or 0.0) - (missed.limit or 0.0))


def _way(student: StudentRecord) -> Way | None:
    if not student.missed:
        return None
    if any(missed.check in _FIXED for missed in student.missed):
        return "limit"
    trained = [missed for missed in student.missed if missed.check in _TRAINED]
    needed = max((_too_much(missed) for missed in trained), default=0.0)
    if needed > 0:
        return way_on([(made.trained_seconds, made.agreement.value) for made in student.shares], needed)
    if any(missed.check == _INT8_DROP and missed.verdict == "fail" for missed in student.missed):
        return "quantization"
    return "images" if all(missed.verdict == "inconclusive" for missed in student.missed) else None


def _distance(student: StudentRecord) -> tuple[int, float, str]:
    """Sorts students by what keeps them from passing: fewer failing checks, then the smaller shortfall."""
    failing = [missed for missed in student.missed if missed.verdict == "fail"]
    short = sum(max(_too_much(missed), 0.0) for missed in student.missed if missed.check in _TRAINED)
    return len(failing), short, student.model


def _figures(student: StudentRecord) -> str:
    artifact = shipped(student)
    words = [f"{student.params or 0:,} parameters"]
    if artifact is not None:
        words.append(f"{artifact.name} {wording.size(artifact.size_bytes)}")
        if artifact.p95_ms is not None:
            words.append(f"{wording.milliseconds(artifact.p95_ms)} ms")
        if (found := quality(artifact)) is not None:
            kind = "accuracy" if artifact.accuracy else "agreement with the teacher"
            words.append(f"{wording.percent(found.value)} {kind}")
    return ", ".join(words)


def _input(sweep: Sweep) -> str:
    spec = sweep.recipe["teacher"]["input"]
    return "x".join(str(spec[key]) for key in ("channels", "height", "width"))


def _typed(out: Path, student: StudentRecord) -> str:
    return shlex.quote(str(out / student.folder))
