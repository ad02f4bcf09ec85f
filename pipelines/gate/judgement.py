"""The verdict: a pure function of what was measured and what is required.

Standard library only. There is a check for every limit in the policy, and always `runtime`. The overall verdict is
`fail` if any check fails, else `inconclusive` if any is, else `pass`; advisory checks never change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from nayer_edge.errors import nearest

from .statistics import (
    binomial_lower,
    binomial_upper,
    drop_lower,
    drop_upper,
    holm,
    images_to_decide,
    images_to_decide_rate,
)

if TYPE_CHECKING:
    from ..measurements import ArtifactReport, ClassCounts, Paired, Report
    from ..recipes.policy import Policy

Outcome = Literal["pass", "fail", "inconclusive"]

FP32 = "fp32"
"""name of the artifact that parity is checked on, and that speed and accuracy are compared with"""

_NAMED_CLASSES = 3


@dataclass(frozen=True)
class Check:
    """One requirement and how it stands.

    Attributes:
        name: one of `CHECKS`.
        artifact: as in report.json.
        observed: what was measured, in the unit of `CHECKS`; None where nothing was.
        bound: the confidence bound that decided (of a drop the upper one, or the lower one where it fails);
            None where the check compares plain numbers.
        limit: from the policy; None for `runtime`.
        verdict: pass, fail or inconclusive.
        detail: one sentence for whoever releases.
        advisory: reported, but without effect on the overall verdict.
        synthetic: measured on synthetic images, which must be shown beside its numbers.
    """

    name: str
    artifact: str
    observed: float | None
    bound: float | None
    limit: float | None
    verdict: Outcome
    detail: str
    advisory: bool = False
    synthetic: bool = False


@dataclass(frozen=True)
class Baseline:
    """The previous release, paired with this one on the same images.

    Attributes:
        name: of its folder.
        report_sha256: of its report.json.
        paired: artifact → counts, the baseline's artifact of the same name being the reference.
    """

    name: str
    report_sha256: str
    paired: Mapping[str, Paired]


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run, and every check behind it.

    Attributes:
        notes: sentences about what this verdict can and cannot promise.
        baseline: the release that it was compared with.
    """

    verdict: Outcome
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    baseline: Baseline | None = None


CHECKS = {
    "runtime": "",
    "accuracy_drop_vs_fp32": "fraction",
    "accuracy_drop_vs_teacher": "fraction",
    "accuracy_drop_vs_baseline": "fraction",
    "agreement": "fraction",
    "per_class_drop": "fraction",
    "int8_coverage": "fraction",
    "latency_p95": "ms",
    "speedup_vs_fp32": "×",
    "size": "bytes",
    "parity": "",
}
"""names of the checks and the unit of their observed value, bound and limit"""
AT_LEAST = {"agreement", "int8_coverage", "speedup_vs_fp32"}
"""checks whose limit is a minimum"""
STUDENT_CHECKS = {"accuracy_drop_vs_teacher", "agreement"}
"""checks that fail if the student is too far from its teacher; more training or a larger student helps"""
QUANTIZATION_CHECK = "accuracy_drop_vs_fp32"
"""the check that quantization alone decides"""


def judge(report: Report, policy: Policy, baseline: Baseline | None = None) -> Verdict:
    """Compares a report with a policy.

    Args:
        report: what `validate` measured.
        policy: what an artifact must satisfy.
        baseline: the previous release; where the policy limits the drop against it and there is none, that check fails.

    Returns:
        The verdict, with the checks in the order of the policy's artifacts.
    """
    names = dict.fromkeys(policy.artifacts)
    checks = [check for name in names for check in _judge_artifact(report, policy, baseline, name)]
    if policy.parity.max_abs_diff is not None:
        fp32 = [name for name in names if name.startswith(f"{FP32}.")]
        checks += [_parity(report, name, policy.parity.max_abs_diff) for name in (FP32, *fp32)]
    deciding = {check.verdict for check in checks if not check.advisory}
    overall: Outcome = "fail" if "fail" in deciding else "inconclusive" if "inconclusive" in deciding else "pass"
    return Verdict(overall, tuple(checks), baseline=baseline)


def _judge_artifact(report: Report, policy: Policy, baseline: Baseline | None, name: str) -> Iterator[Check]:
    found = _find(report, name)
    if isinstance(found, str):
        yield Check("runtime", name, None, None, None, "fail", found)
        return
    yield _runtime(found, accept_simulated=policy.accept_simulated)
    if found.status != "measured":
        return
    alpha = round(1 - policy.accuracy.confidence, 12)
    synthetic = report.dataset.kind == "synthetic"
    # FP32 in another runtime is compared with the reference, too; its speed is measured against itself.
    is_reference = found.name == FP32
    if (limit := policy.accuracy.max_drop_vs_fp32) is not None and not is_reference:
        if synthetic:
            yield _synthetic_drop_vs_fp32(report, found, limit, alpha)
        else:
            yield _drop("accuracy_drop_vs_fp32", "the FP32 student", found, found.paired.vs_fp32, limit, alpha)
    if (limit := policy.accuracy.max_drop_vs_teacher) is not None:
        if synthetic:
            yield _synthetic_drop_vs_teacher(report, found, limit, alpha)
        else:
            yield _drop("accuracy_drop_vs_teacher", "the teacher", found, found.paired.vs_teacher, limit, alpha)
    if (limit := policy.baseline.max_drop) is not None:
        yield _drop_vs_baseline(baseline, found, limit, alpha)
    if (limit := policy.agreement.min) is not None:
        yield _agreement(report, found, limit, alpha)
    if (limit := policy.per_class.max_drop) is not None and not is_reference:
        yield _per_class(found, limit, alpha, policy.per_class.advisory, synthetic)
    if (limit := policy.int8.min_coverage) is not None and found.precision.startswith("int8"):
        yield _coverage(found, limit)
    if (limit := policy.latency.max_p95_ms) is not None:
        yield _latency(found, limit)
    if (limit := policy.latency.min_speedup_vs_fp32) is not None and found.precision != FP32:
        yield _speedup(found, limit)
    if (limit := policy.size.max_bytes) is not None:
        yield _size(found, limit)


def _find(report: Report, name: str) -> ArtifactReport | str:
    """The artifact of this name, or a sentence that says why there is none."""
    known = [artifact.name for artifact in report.artifacts]
    if name not in known:
        held = f"it has {', '.join(known)}" if known else "it has none"
        return f"The report has no artifact '{name}' ({held}).{nearest(name, known)}"
    if known.count(name) > 1:
        return f"The report has {known.count(name)} artifacts named '{name}', so none of them can be checked."
    return report.artifacts[known.index(name)]


def _runtime(artifact: ArtifactReport, *, accept_simulated: bool) -> Check:
    reason = f": {artifact.reason.rstrip('.')}" if artifact.reason else ""
    ran = f"{artifact.precision} through {artifact.runtime}"
    if artifact.status != "measured":
        state = "could not be run here" if artifact.status == "unavailable" else "was not run"
        outcome, detail = "fail", f"{artifact.name} {state}{reason}."
    elif reason:
        # Of a measured artifact, that its output is not finite on some images.
        outcome, detail = "fail", f"{artifact.name} cannot be trusted{reason}."
    elif artifact.simulated and artifact.precision == "fp16" and artifact.runtime not in ("onnxruntime", "tensorrt"):
        outcome = "pass" if accept_simulated else "fail"
        detail = f"{artifact.name} was computed in FP32, from its FP16 weights, and was not timed. " + (
            "The policy accepts that." if accept_simulated else "To accept that: accept_simulated = true in the policy."
        )
    elif artifact.simulated and accept_simulated:
        outcome = "pass"
        detail = (
            f"{artifact.name} is for another device. This machine only simulated its graph, which the policy "
            "accepts; its speed and the kernels of the device were not measured."
        )
    elif artifact.simulated:
        outcome = "fail"
        detail = (
            f"{artifact.name} is for another device: this machine only simulated its graph. Validate it "
            "there, or accept that with accept_simulated = true in the policy."
        )
    elif not artifact.precision_verified:
        outcome = "fail"
        detail = f"The runtime did not confirm that {artifact.name} ran in {ran}."
    else:
        share = artifact.int8_coverage
        covered = "" if share is None else f"; {_percent(share)} % of its quantizable layers run in INT8"
        when = f"; measured earlier, {artifact.earlier.created}" if artifact.earlier else ""
        outcome, detail = "pass", f"{artifact.name} ran in {ran}, as the runtime confirms{covered}{when}."
    return Check("runtime", artifact.name, None, None, None, outcome, detail)


def _drop(
    name: str, reference: str, artifact: ArtifactReport, paired: Paired | None, limit: float, alpha: float
) -> Check:
    if paired is None:
        return _missing(name, artifact, limit, f"paired counts against {reference}")
    if wrong := _contradiction(artifact, paired, reference):
        return Check(name, artifact.name, None, None, limit, "fail", wrong)
    lost, gained, n = paired.lost, paired.gained, paired.n
    change = f"{'loses' if lost >= gained else 'gains'} {_percent(abs(lost - gained) / n)} points against {reference}"
    observed = f"{artifact.name} {change} ({lost} lost, {gained} gained of {n:,})"
    return _bounded_drop(name, artifact, paired, observed, limit, alpha)


def _contradiction(artifact: ArtifactReport, paired: Paired, reference: str) -> str:
    """A sentence about counts that do not add up; empty if they do."""
    total = paired.both_right + paired.lost + paired.gained + paired.both_wrong
    if total == paired.n:
        return ""
    return (
        f"The counts of {artifact.name} against {reference} add up to {total}, "
        f"not to the {paired.n} images of the report."
    )


def _bounded_drop(
    name: str, artifact: ArtifactReport, paired: Paired, observed: str, limit: float, alpha: float
) -> Check:
    """The verdict on paired counts, with the sentence that begins with `observed`."""
    lost, gained, n = paired.lost, paired.gained, paired.n
    upper, lower = drop_upper(lost, gained, n, alpha), drop_lower(lost, gained, n, alpha)
    verdict, bound = _bounded(upper, lower, limit)
    drop = (lost - gained) / n
    size, limit_text = _apart(abs(bound), limit)
    side = "at least" if verdict == "fail" else "at most"
    detail = (
        f"{observed}; the drop is {side} {'-' if bound < 0 else ''}{size} at {_confidence(alpha)} confidence "
        f"(limit {limit_text})"
    )
    if verdict == "inconclusive":
        detail += _would_decide(images_to_decide(lost, gained, n, limit, alpha), drop < limit)
    detail += "."
    return Check(name, artifact.name, drop, bound, limit, verdict, detail)


def _drop_vs_baseline(baseline: Baseline | None, artifact: ArtifactReport, limit: float, alpha: float) -> Check:
    name = "accuracy_drop_vs_baseline"
    if baseline is None:
        detail = (
            f"The policy limits the drop of {artifact.name} against a baseline, but none was given: "
            "use --references references.toml."
        )
        return Check(name, artifact.name, None, None, limit, "fail", detail)
    if artifact.name not in baseline.paired:
        detail = f"The baseline '{baseline.name}' has no measured artifact '{artifact.name}' to compare with."
        return Check(name, artifact.name, None, None, limit, "fail", detail)
    return _drop(name, f"the baseline '{baseline.name}'", artifact, baseline.paired[artifact.name], limit, alpha)


def _synthetic_drop_vs_teacher(report: Report, artifact: ArtifactReport, limit: float, alpha: float) -> Check:
    """The teacher's prediction is used as the true class: every disagreement counts as lost."""
    name = "accuracy_drop_vs_teacher"
    if artifact.agreement is None:
        return _missing(name, artifact, limit, "agreement with the teacher")
    n = report.dataset.n
    wrong = n - round(artifact.agreement * n)
    upper, lower = binomial_upper(wrong, n, alpha), binomial_lower(wrong, n, alpha)
    verdict, bound = _bounded(upper, lower, limit)
    bound_text, limit_text = _apart(bound, limit)
    side = "at least" if verdict == "fail" else "at most"
    detail = (
        f"On synthetic images, {artifact.name} disagrees with the teacher, whose predictions count as the true "
        f"classes, on {_percent(wrong / n)} % ({wrong} of {n:,}); the share is {side} {bound_text} % at "
        f"{_confidence(alpha)} confidence (limit {limit_text} %)"
    )
    if verdict == "inconclusive":
        detail += _would_decide(images_to_decide_rate(n - wrong, n, 1 - limit, alpha), wrong < limit * n)
    return Check(name, artifact.name, wrong / n, bound, limit, verdict, detail + ".", synthetic=True)


def _synthetic_drop_vs_fp32(report: Report, artifact: ArtifactReport, limit: float, alpha: float) -> Check:
    """The drop against FP32 image by image, with the teacher's prediction in the place of the truth."""
    name, paired = "accuracy_drop_vs_fp32", artifact.paired_synthetic.vs_fp32
    if paired is None:
        return _synthetic_drop_from_rates(report, artifact, limit, alpha)
    n = report.dataset.n
    wrong = _contradiction(artifact, paired, "FP32 on synthetic images")
    agreed = paired.both_right + paired.gained
    if not wrong and (paired.n != n or artifact.agreement is None or agreed != round(artifact.agreement * n)):
        wrong = f"The counts of {artifact.name} on synthetic images do not match its agreement with the teacher."
    if wrong:
        return Check(name, artifact.name, None, None, limit, "fail", wrong, synthetic=True)
    lost, gained = paired.lost, paired.gained
    observed = (
        f"On {n:,} synthetic images, whose true class is the teacher's prediction, {artifact.name} "
        f"{'loses' if lost >= gained else 'gains'} {_percent(abs(lost - gained) / n)} points against FP32 "
        f"({lost} lost, {gained} gained)"
    )
    return replace(_bounded_drop(name, artifact, paired, observed, limit, alpha), synthetic=True)


def _synthetic_drop_from_rates(report: Report, artifact: ArtifactReport, limit: float, alpha: float) -> Check:
    """The difference in agreement with the teacher, for reports of versions that did not count image by image.

    How the answers of the two networks pair up is unknown, so the least favourable pairing is assumed:
    as many images gained, and as many more lost, as the two rates allow. Bounds widen with the number of discordant
    images, so both bounds hold for every pairing.
    """
    name = "accuracy_drop_vs_fp32"
    reference = _find(report, FP32)
    if isinstance(reference, str) or reference.status != "measured" or reference.agreement is None:
        return _missing(name, artifact, limit, f"agreement of '{FP32}' with the teacher")
    if artifact.agreement is None:
        return _missing(name, artifact, limit, "agreement with the teacher")
    n = report.dataset.n
    right_fp32, right = round(reference.agreement * n), round(artifact.agreement * n)
    gained = min(n - right_fp32, right)
    lost = gained + right_fp32 - right
    upper, lower = drop_upper(lost, gained, n, alpha), drop_lower(lost, gained, n, alpha)
    verdict, bound = _bounded(upper, lower, limit)
    drop = (right_fp32 - right) / n
    size, limit_text = _apart(abs(bound), limit)
    side = "at least" if verdict == "fail" else "at most"
    detail = (
        f"On {n:,} synthetic images {artifact.name} agrees with the teacher on {_percent(right / n)} % and "
        f"FP32 on {_percent(right_fp32 / n)} %, a drop of {_percent(drop)} points; the drop is {side} "
        f"{'-' if bound < 0 else ''}{size} at {_confidence(alpha)} confidence, for every possible "
        f"pairing of the predictions (limit {limit_text})"
    )
    if verdict == "inconclusive":
        detail += _would_decide(images_to_decide(lost, gained, n, limit, alpha), drop < limit)
    return Check(name, artifact.name, drop, bound, limit, verdict, detail + ".", synthetic=True)


def _agreement(report: Report, artifact: ArtifactReport, limit: float, alpha: float) -> Check:
    if artifact.agreement is None:
        return _missing("agreement", artifact, limit, "agreement with the teacher")
    n = report.dataset.n
    same = round(artifact.agreement * n)
    lower, upper = binomial_lower(same, n, alpha), binomial_upper(same, n, alpha)
    verdict: Outcome = "pass" if lower >= limit else "fail" if upper < limit else "inconclusive"
    bound = upper if verdict == "fail" else lower
    side = "at most" if verdict == "fail" else "at least"
    bound_text, limit_text = _apart(bound, limit)
    synthetic = report.dataset.kind == "synthetic"
    kind = "synthetic images" if synthetic else "images"
    detail = (
        f"{artifact.name} agrees with the teacher on {_percent(same / n)} % of {n:,} {kind}; the share is {side} "
        f"{bound_text} % at {_confidence(alpha)} confidence (minimum {limit_text} %)"
    )
    if verdict == "inconclusive":
        detail += _would_decide(images_to_decide_rate(same, n, limit, alpha), same > limit * n)
    detail += "."
    return Check("agreement", artifact.name, same / n, bound, limit, verdict, detail, synthetic=synthetic)


def _per_class(artifact: ArtifactReport, limit: float, alpha: float, advisory: bool, synthetic: bool) -> Check:
    """Drop of the worst class.

    Multiplicity: to pass, every class must pass, so a false pass of the whole needs a false pass of a class that is
    truly bad, and no correction is needed (an intersection–union test). To fail, one class is enough, so lower bounds
    are corrected by Holm's procedure: the probability of calling any good class bad is at most alpha.
    """
    name = "per_class_drop"
    if not artifact.per_class:
        lacking = "counts per class (synthetic images have no true class)" if synthetic else "counts per class"
        return _missing(name, artifact, limit, lacking, advisory)
    for each in artifact.per_class:
        if each.lost + each.gained > each.n:
            detail = f"The counts of class '{each.label}' of {artifact.name} exceed its {each.n} images."
            return Check(name, artifact.name, None, None, limit, "fail", detail, advisory)
    seen = [each for each in artifact.per_class if each.n > 0]
    unseen = [each.label for each in artifact.per_class if each.n == 0]
    bad = holm(lambda i, level: _class_lower(seen[i], level) > limit, len(seen), alpha)
    drops = [(each.lost - each.gained) / each.n for each in seen]
    if bad:
        order = sorted(bad, key=lambda i: -drops[i])
        level = alpha / (len(seen) - len(bad) + 1)
        bound = max(_class_lower(seen[i], level) for i in bad)
        worst = _listed([f"'{seen[i].label}' {_percent(drops[i])} ({seen[i].n} images)" for i in order])
        detail = (
            f"{artifact.name} loses more than the allowed {_percent(limit)} points on {len(bad)} of {len(seen)} "
            f"classes, at {_confidence(alpha)} confidence for all of them together: {worst}."
        )
        return Check(name, artifact.name, max(drops), bound, limit, "fail", detail, advisory)
    uppers = [drop_upper(each.lost, each.gained, each.n, alpha) for each in seen]
    open_ = sorted((i for i, upper in enumerate(uppers) if upper > limit), key=lambda i: -uppers[i])
    observed, bound = max(drops, default=None), max(uppers, default=None)
    if unseen:
        classes = _listed([f"'{label}'" for label in unseen])
        detail = f"The hold-out has no images of {classes}, so the drop of {artifact.name} there is unknown."
        return Check(name, artifact.name, observed, bound, limit, "inconclusive", detail, advisory)
    if open_:
        worst = seen[open_[0]]
        need = images_to_decide(worst.lost, worst.gained, worst.n, limit, alpha)
        bound_text, limit_text = _apart(uppers[open_[0]], limit)
        detail = (
            f"{len(open_)} of {len(seen)} classes of {artifact.name} {'is' if len(open_) == 1 else 'are'} "
            f"inconclusive, the worst is '{worst.label}' ({worst.lost} lost, {worst.gained} gained of {worst.n:,}): "
            f"it loses at most {bound_text} points at {_confidence(alpha)} confidence (limit {limit_text})"
            f"{_would_decide(need, drops[open_[0]] < limit)}."
        )
        return Check(name, artifact.name, observed, bound, limit, "inconclusive", detail, advisory)
    worst_text, limit_text = _apart(bound or 0.0, limit)
    detail = (
        f"No class of {artifact.name} loses more than {worst_text} points at {_confidence(alpha)} "
        f"confidence (limit {limit_text})."
    )
    return Check(name, artifact.name, observed, bound, limit, "pass", detail, advisory)


def _class_lower(counts: ClassCounts, level: float) -> float:
    return drop_lower(counts.lost, counts.gained, counts.n, level)


def _coverage(artifact: ArtifactReport, limit: float) -> Check:
    share = artifact.int8_coverage
    if share is None:
        return _missing("int8_coverage", artifact, limit, "INT8 coverage")
    verdict: Outcome = "pass" if share >= limit else "fail"
    share_text, limit_text = _apart(share, limit)
    detail = (
        f"{share_text} % of the quantizable convolutions and matrix products of {artifact.name} run in INT8 "
        f"(minimum {limit_text} %)."
    )
    return Check("int8_coverage", artifact.name, share, None, limit, verdict, detail)


def _latency(artifact: ArtifactReport, limit: float) -> Check:
    if artifact.latency_ms is None:
        return _missing("latency_p95", artifact, limit, "latency")
    threads = f" with {artifact.threads} thread{'s' * (artifact.threads != 1)}" if artifact.threads else ""
    text = "The 95th percentile of {}'s latency at batch 1{} is {:,.3g} ms (limit {:,.3g} ms)."
    p95 = artifact.latency_ms.p95
    verdict: Outcome = "pass" if p95 <= limit else "fail"
    detail = text.format(artifact.name, threads, p95, limit)
    return _plain("latency_p95", artifact, p95, limit, verdict, detail)


def _speedup(artifact: ArtifactReport, limit: float) -> Check:
    speedup = artifact.speedup_vs_fp32
    if speedup is None:
        return _missing("speedup_vs_fp32", artifact, limit, "speed-up against FP32")
    verdict: Outcome = "pass" if speedup >= limit else "fail"
    detail = f"{artifact.name} is {speedup:,.3g} times as fast as FP32 at batch 1 (minimum {limit:,.3g})."
    return _plain("speedup_vs_fp32", artifact, speedup, limit, verdict, detail)


def _size(artifact: ArtifactReport, limit: int) -> Check:
    if artifact.size_bytes is None:
        return _missing("size", artifact, limit, "size")
    verdict: Outcome = "pass" if artifact.size_bytes <= limit else "fail"
    detail = f"{artifact.name} takes {artifact.size_bytes:,} bytes (limit {limit:,})."
    return _plain("size", artifact, artifact.size_bytes, limit, verdict, detail)


def _parity(report: Report, name: str, limit: float) -> Check:
    found = _find(report, name)
    if isinstance(found, str):
        return Check("parity", name, None, None, limit, "fail", found)
    if found.status != "measured" or found.max_abs_diff is None:
        return _missing("parity", found, limit, "difference from the torch student")
    difference = found.max_abs_diff
    verdict: Outcome = "pass" if difference <= limit else "fail"
    synthetic = report.dataset.kind == "synthetic"
    where = "On synthetic images the" if synthetic else "The"
    detail = (
        f"{where} logits of {found.name} differ from those of the student in torch by at most "
        f"{difference:.3g} (limit {limit:.3g})."
    )
    check = _plain("parity", found, difference, limit, verdict, detail)
    return replace(check, synthetic=synthetic)


def _plain(name: str, artifact: ArtifactReport, observed: float, limit: float, verdict: Outcome, detail: str) -> Check:
    """A check of a plain number; a number that is not finite counts as not measured."""
    if not math.isfinite(observed):
        return Check(name, artifact.name, None, None, limit, "fail", f"The {name} of {artifact.name} is not a number.")
    return Check(name, artifact.name, observed, None, limit, verdict, detail)


def _missing(name: str, artifact: ArtifactReport, limit: float, what: str, advisory: bool = False) -> Check:
    detail = f"The policy limits {name} of {artifact.name}, but the report has no {what}."
    return Check(name, artifact.name, None, None, limit, "fail", detail, advisory)


def _bounded(upper: float, lower: float, limit: float) -> tuple[Outcome, float]:
    """Verdict on `drop ≤ limit`, and the bound that decided it."""
    if upper <= limit:
        return "pass", upper
    if lower > limit:
        return "fail", lower
    return "inconclusive", upper


def _would_decide(images: int | None, passes: bool) -> str:
    if images is None:
        return "; no practical number of images would decide it at these rates"
    return f"; about {images:,} images at these rates would {'pass' if passes else 'fail'}"


def _listed(items: list[str]) -> str:
    more = len(items) - _NAMED_CLASSES
    return ", ".join(items[:_NAMED_CLASSES]) + (f" and {more} more" if more > 0 else "")


def _percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f}"


def _apart(left: float, right: float) -> tuple[str, str]:
    """Two fractions as percentages, with enough digits that different numbers look different."""
    digits = 2
    while left != right and digits < 8 and _percent(left, digits) == _percent(right, digits):
        digits += 1
    return _percent(left, digits), _percent(right, digits)


def _confidence(alpha: float) -> str:
    return f"{100 * (1 - alpha):.6g} %"
