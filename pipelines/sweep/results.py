"""What a sweep found: the measurements of its students, the limits that they miss, and the answer in words."""

from __future__ import annotations

import shlex
from pathlib import Path

from nayer_edge.errors import IntegrityError
from nayer_edge.models.load import untrained_teacher
from nayer_edge.runtime.compute import seeded
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

from ..distill import metrics_of
from ..gate import wording
from ..gate.judgement import AT_LEAST, QUANTIZATION_CHECK, STUDENT_CHECKS, Check, Outcome, Verdict
from ..gate.statistics import binomial_lower, binomial_upper
from ..gate.verdict import load_policy, load_report, run_gate
from ..measurements import ArtifactReport, Report
from ..recipes.schema import Recipe
from .halving import EXCLUDED, SMALLER, SMALLEST, growth, way_on
from .record import Bounds, Measured, Missed, StudentRecord, Sweep, Way, now

_FIXED = {"latency_p95", "size"}
"""checks that training does not change"""
_NOISE = {"latency_p95": 1.25, "size": 1.0}
"""a limit is missed for good if it is exceeded by this factor; a latency varies"""
_OTHER_LIMIT = {*_FIXED, "speedup_vs_fp32", "parity"}
"""checks that another student or another limit helps; parity compares FP32 with FP32"""
_LOSS_IN_INT8 = {QUANTIZATION_CHECK, "per_class_drop"}
"""checks that compare with the FP32 student"""
_COVERAGE = "int8_coverage"
"""the check of how many layers run in INT8"""
_UNKNOWN, _NOT_RUN = "unknown", "not run"
"""what would help if it is no `Way`: one short share does not tell; an artifact does not run here"""


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
        each.way = _way(each, out / each.folder)
    passing = [each for each in judged if not each.missed]
    best = min(passing, key=lambda each: each.order, default=None)
    _reconcile(sweep, best)
    if best is not None:
        sweep.verdict, sweep.answer = "pass", best.model
        sweep.sentence = f"{best.model} is the smallest student that passes: {_figures(best)}."
        sweep.command = f"nayer-edge export {_typed(out, best)} --int8"
        return
    sweep.answer, sweep.command = None, ""
    open_ = any(all(missed.verdict == "inconclusive" for missed in each.missed) for each in judged)
    sweep.verdict = "inconclusive" if open_ else "fail"
    stopped = [each for each in sweep.students if each.state == "stopped"]
    if not judged and stopped:
        for each in stopped:
            each.way = "limit" if each.reason.startswith(EXCLUDED) else None
        least = min(stopped, key=lambda each: each.order)
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
        _UNKNOWN: f"nayer-edge run {root} --more 1h",
        "larger": f"nayer-edge students --input {_input(sweep)}",
        "images": f"nayer-edge validate {root} --data FOLDER",
        "limit": f"nayer-edge gate {root} --print-policy",
        "quantization": f"nayer-edge export {root} --int8 --qat",
    }.get(_advised(closest), f"nayer-edge report {root}")


def _reconcile(sweep: Sweep, best: StudentRecord | None) -> None:
    """Makes state and reason of every student agree with its run, which may have been continued or judged by another
    policy since the student was stopped.

    Args:
        best: the smallest student that passes.
    """
    untrue = {SMALLER.format(each.model) for each in sweep.students if each.missed or not each.artifacts}
    for each in sweep.students:
        state, reason = each.state, each.reason
        if not each.artifacts or each.open:
            continue
        if each is best:
            state, reason = "passes", SMALLEST
        elif best is not None and not each.missed:
            state, reason = "stopped", SMALLER.format(best.model)
        elif state == "passes" or reason in untrue:
            state, reason = "stopped", "it does not pass"
        if (state, reason) != (each.state, each.reason):
            each.state, each.reason, each.ended = state, reason, now()


def advice(student: StudentRecord) -> str:
    """What would help a student that does not pass, in words; empty for one that passes."""
    if student.state == "failed":
        return "the same command once more, which tries this student again"
    words = {
        "time": "more time (nayer-edge run … --more)",
        "larger": "a larger student: the last part of its training improved it too little",
        _UNKNOWN: "more time (nayer-edge run … --more) or a larger student; one short share does not tell which",
        "images": "more hold-out images, which would decide",
        "limit": f"{_other_student(student)} or another limit: training does not change this",
        "quantization": _other_quantization(student),
        _NOT_RUN: "an artifact that runs here as it states: training does not change this",
    }
    return words.get(_advised(student), "")


def _advised(student: StudentRecord) -> str:
    """The key of the advice for a student; empty if there is none."""
    if student.way is not None or not student.missed:
        return student.way or ""
    if any(missed.check == "runtime" for missed in student.missed):
        return _NOT_RUN
    return _UNKNOWN if _shortfall(student) > 0 else ""


def _other_student(student: StudentRecord) -> str:
    """Less to compute makes an artifact faster and smaller, but not INT8 faster than FP32."""
    smaller = not student.missed or any(missed.check in _FIXED for missed in student.missed)
    return "a smaller student" if smaller else "another student"


def _other_quantization(student: StudentRecord) -> str:
    failed = {missed.check for missed in student.missed if missed.verdict == "fail"}
    if not failed & _LOSS_IN_INT8:
        return "more layers in INT8: --qat, or a higher export.max_drop, which leaves fewer layers in float"
    if _COVERAGE in failed:
        return "a smaller loss in INT8: --qat, which also leaves fewer layers in float"
    return "a smaller loss in INT8: --qat, or a lower export.max_drop, which leaves more layers in float"


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
    excess = (missed.observed or 0.0) - (missed.limit or 0.0)
    return -excess if missed.check in AT_LEAST else excess


def _shortfall(student: StudentRecord) -> float:
    """By how much a student is too far from its teacher, as a fraction; 0 if it is close enough."""
    trained = (missed for missed in student.missed if missed.check in STUDENT_CHECKS)
    return max((_too_much(missed) for missed in trained), default=0.0)


def _grown(student: StudentRecord, root: Path) -> list[tuple[float, float]]:
    """(seconds of training, agreement) after every share; within the share, where it was the only one."""
    points = [(made.trained_seconds, made.agreement.value) for made in student.shares]
    if len(points) != 1:
        return points
    try:
        lines = [line for line in metrics_of(root) if line["phase"] == "distill"]
    except IntegrityError:
        return points
    missed = 1 - lines[-1]["agreement"] if lines else 0.0
    if missed <= 0:
        return points
    # A run's own images are harder or easier than those that all students share: what it misses of them is scaled.
    scale = (1 - points[0][1]) / missed
    # Epochs without rounds of images are those in which the learning rate falls.
    trained = [line for line in lines if line["loss_ce"] is not None]
    return growth([(line["seconds"], 1 - scale * (1 - line["agreement"])) for line in trained])


def _way(student: StudentRecord, root: Path) -> Way | None:
    if not student.missed:
        return None
    if any(missed.check in _OTHER_LIMIT for missed in student.missed):
        return "limit"
    needed = _shortfall(student)
    if needed > 0:
        return way_on(_grown(student, root), needed)
    if any(missed.check in {*_LOSS_IN_INT8, _COVERAGE} and missed.verdict == "fail" for missed in student.missed):
        return "quantization"
    return "images" if all(missed.verdict == "inconclusive" for missed in student.missed) else None


def _distance(student: StudentRecord) -> tuple[int, float, str]:
    """Sorts students by what keeps them from passing: fewer failing checks, then the smaller shortfall."""
    failing = [missed for missed in student.missed if missed.verdict == "fail"]
    short = sum(max(_too_much(missed), 0.0) for missed in student.missed if missed.check in STUDENT_CHECKS)
    return len(failing), short, student.model


def _figures(student: StudentRecord) -> str:
    artifact = student.shipped
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
