"""The words of a verdict: its reason, the titles and figures of its checks, and what its images can show.

The terminal's table, JUnit XML, the Markdown summary and the page take them from here. A check's own sentence, its
`detail`, is written where the check is decided (`judgement`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .judgement import AT_LEAST, CHECKS, STUDENT_CHECKS, Check, Verdict

if TYPE_CHECKING:
    from ..measurements import Dataset, Report
    from ..recipes.policy import Policy
    from .judgement import Baseline

MARK = {"pass": "✓", "fail": "✗", "inconclusive": "?"}
PLAIN_MARK = {"pass": "pass", "fail": "FAIL", "inconclusive": "?"}
"""marks for terminals and pipes whose encoding lacks ✓ and ✗ (cp1252, ASCII)"""

_TITLES = {
    "runtime": "Stated precision",
    "accuracy_drop_vs_fp32": "Accuracy drop vs FP32",
    "accuracy_drop_vs_teacher": "Accuracy drop vs teacher",
    "accuracy_drop_vs_baseline": "Accuracy drop vs baseline",
    "agreement": "Agreement with teacher",
    "per_class_drop": "Largest drop of a class",
    "int8_coverage": "INT8 coverage",
    "latency_p95": "Latency (p95)",
    "speedup_vs_fp32": "Speed-up vs FP32",
    "size": "File size",
    "parity": "ONNX vs PyTorch logits",
}
_SHOWN_REASONS = 3


@dataclass(frozen=True)
class Reason:
    """Why a verdict is what it is.

    Attributes:
        lead: one sentence.
        details: the sentences of the checks behind it.
        more: how many further ones there are.
    """

    lead: str
    details: tuple[str, ...]
    more: int = 0


class Figures(NamedTuple):
    """The numbers of a check with their units; "–" where there is none."""

    observed: str
    bound: str
    limit: str


def marks(encoding: str | None) -> Mapping[str, str]:
    """The marks that an encoding can write."""
    try:
        "".join(MARK.values()).encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_MARK
    return MARK


def reason(verdict: Verdict) -> Reason:
    """What failed or is inconclusive; of a pass, the check that came closest to its limit."""
    deciding = [check for check in verdict.checks if not check.advisory]
    count = len(deciding)
    if verdict.verdict == "pass":
        closest = min((check for check in deciding if check.bound is not None), key=_room, default=None)
        lead = {1: "The only check passes.", 2: "Both checks pass."}.get(count, f"All {count} checks pass.")
        return Reason(lead, () if closest is None else (f"Closest to its limit: {_lowered(closest.detail)}",))
    decisive = [check for check in deciding if check.verdict == verdict.verdict]
    names = _listed(list(dict.fromkeys(_lowered(title(check.name)) for check in decisive)))
    one = len(decisive) == 1
    which = "the only check" if count == 1 else f"{len(decisive)} of {count} checks"
    if verdict.verdict == "fail":
        lead = f"{which[0].upper()}{which[1:]} {'fails' if one else 'fail'}: {names}."
    else:
        lead = f"No check fails, but {which} {'is' if one else 'are'} inconclusive: {names}."
    details = tuple(check.detail for check in decisive)
    return Reason(lead, details[:_SHOWN_REASONS], max(0, len(details) - _SHOWN_REASONS))


def notes(dataset: Dataset, policy: Policy, baseline: Baseline | None = None) -> tuple[str, ...]:
    """What goes with the checks of a verdict: limits of what it can promise, and the release it was compared with."""
    found = list(promise(dataset)) if dataset.kind == "synthetic" else []
    found += [f"The hold-out is doubtful but was measured anyway: {doubt}" for doubt in dataset.doubts]
    if dataset.duplicates:
        found.append(
            f"{dataset.duplicates:,} of the {dataset.n:,} images are exact copies of others. The confidence "
            "bounds treat each copy as an independent image, so they are too narrow."
        )
    accuracy = policy.accuracy
    limits = (accuracy.max_drop_vs_fp32, accuracy.max_drop_vs_teacher, policy.baseline.max_drop, policy.agreement.min)
    if all(limit is None for limit in limits):
        found.append(
            "The policy limits neither accuracy nor agreement, so this verdict does not say how good the predictions "
            "are."
        )
    if baseline is not None:
        found.append(
            f"Compared with the baseline '{baseline.name}' (SHA-256 of its report.json: "
            f"{baseline.report_sha256[:12]}…) on the same {dataset.n:,} images."
        )
    return tuple(found)


def advice(verdict: Verdict, report: Report, continuable: bool = True, qat: bool = False) -> tuple[str, ...]:
    """What to do if an artifact is too far from the teacher: train the student longer, or quantize better.

    Args:
        continuable: the run can be given more time, because its schedule is constant.
        qat: the graphs were trained after quantization.
    """
    failed = [check for check in verdict.checks if check.verdict == "fail" and not check.advisory]
    found = [
        (check, check.observed, *_distances(check, report))
        for check in failed
        if check.name in STUDENT_CHECKS and check.observed is not None
    ]
    if not found:
        return ()
    # The check that says most against the student.
    check, observed, limit, student = max(found, key=lambda each: math.inf if each[3] is None else each[3] - each[2])
    how = (
        "Give it more training time: nayer-edge run RUN --more 1h."
        if continuable
        else "Give it more training time, in a run that starts with its images: "
        "nayer-edge run RUN --bank RUN --budget 1h --out DIR."
    )
    if student is None:
        return (f"The student is too far from its teacher. {how} Or choose a larger student.",)
    added = max(_distance(check.name, observed) - student, 0.0)
    if student <= limit:
        # Other runtimes quantize the student themselves.
        trainable = not qat and not check.artifact.endswith((".executorch", ".litert"))
        better = (
            "Quantize with training: nayer-edge export RUN --int8 --qat."
            if trainable
            else "Leave more layers in float: nayer-edge run RUN --set export.max_drop=0.002."
        )
        lead = f"The student itself is within the limit ({_points(student)}); quantization adds {_points(added)}."
        return (f"{lead} {better}",)
    lossy = added > student / 10
    cause = f"quantization adds {_points(added)}" if lossy else "quantization is not the cause"
    lead = f"The student is too far from its teacher ({_points(student)}); {cause}."
    return (f"{lead} {how} Or choose a larger student.",)


def _distances(check: Check, report: Report) -> tuple[float, float | None]:
    """The limit of a check, and how far the FP32 student is from its teacher as the check counts it; None if that was
    not measured."""
    limit = _distance(check.name, check.limit or 0.0)
    teacher, student = report.teacher.top1, report.student.top1
    if check.name in AT_LEAST or report.dataset.kind == "synthetic":
        agreement = report.student.agreement
        return limit, None if agreement is None else 1 - agreement
    return limit, None if teacher is None or student is None else teacher - student


def _distance(check: str, value: float) -> float:
    """A drop, or an agreement as the fraction that disagrees."""
    return 1 - value if check in AT_LEAST else value


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f} points"


def promise(dataset: Dataset) -> tuple[str, ...]:
    """What measurements on these images can and cannot show; one sentence or two each."""
    if dataset.kind == "holdout":
        return (
            "Teacher, student and all artifacts were evaluated on the same labelled images. These were used for "
            "nothing else: not for training the student, calibration or model selection.",
            "The bounds hold for images like these. They say nothing about other cameras, sites or classes.",
        )
    return (
        "These images are synthetic: made without data, and in neither the memory bank nor the calibration set. "
        "They have no true class, so the teacher's prediction is used instead.",
        "What this verdict can promise: on images like these, the artifact predicts what its teacher predicts, and "
        "shows no damage from export or quantization.",
        "What it cannot promise: any accuracy on real images. Teacher and artifact may make the same mistakes, and "
        "real images may be harder than these. Even a few hundred labelled real images would show it.",
    )


def title(name: str) -> str:
    """A check's name for people."""
    return _TITLES.get(name, name.replace("_", " ").capitalize())


def qualifiers(check: Check) -> tuple[str, ...]:
    """What must be said beside a check's title."""
    return tuple(word for word, applies in (("advisory", check.advisory), ("synthetic", check.synthetic)) if applies)


def qualified_title(check: Check) -> str:
    """A check's title with its qualifiers: "Agreement with teacher (synthetic)"."""
    words = ", ".join(qualifiers(check))
    return f"{title(check.name)} ({words})" if words else title(check.name)


def figures(check: Check) -> Figures:
    """Observed value, bound and limit of a check.

    Bound and limit get as many decimals as it takes to tell them apart.
    """
    scale, unit, digits, kind = _unit(check.name)
    limit, compared = check.limit, check.bound if check.bound is not None else check.observed

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{scale * value:,.{digits}{kind}}{unit}"

    while digits < 9 and limit is not None and compared not in (None, limit) and shown(limit) == shown(compared):
        digits += 1
    relation = "≥ " if check.name in AT_LEAST else "≤ "
    return Figures(shown(check.observed), shown(check.bound), "–" if limit is None else relation + shown(limit))


def percent(fraction: float | None, missing: str = "–") -> str:
    """0.9883 → "98.83 %"; None → `missing`."""
    return missing if fraction is None else f"{100 * fraction:.2f} %"


def difference(fraction: float, *, sign: bool = False, digits: int = 2) -> str:
    """A difference of two rates, in points: "0.17", "−0.17"; with `sign` also "+0.17"."""
    text = f"{100 * fraction:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def size(count: int | None) -> str:
    """Bytes as "118.3 kB" or "12.3 MB"."""
    if count is None:
        return "–"
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:,.1f} kB" if count < 1e6 else f"{count / 1e6:,.2f} MB"


def milliseconds(value: float) -> str:
    """With the digits that a timing is worth: "0.184", "4.27", "38.2", "412"."""
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def _room(check: Check) -> float:
    """How far the bound is from its limit, as a part of what the limit leaves."""
    limit, bound = check.limit or 0.0, check.bound or 0.0
    if check.name in AT_LEAST:
        return (bound - limit) / max(1 - limit, 1e-9)
    return (limit - bound) / max(limit, 1e-9)


def _unit(name: str) -> tuple[float, str, int, str]:
    """Scale, unit, least digits of a check's figures, and whether those are decimals or significant ones."""
    unit = CHECKS.get(name, "")
    if unit == "fraction":
        return 100.0, " points" if "drop" in name else " %", 2, "f"
    return {"bytes": (1.0, " B", 0, "f"), "": (1.0, "", 3, "g")}.get(unit, (1.0, f" {unit}", 3, "g"))


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _lowered(text: str) -> str:
    """For the middle of a sentence; names such as INT8 or ONNX keep their capitals."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]
