"""The judgement: every check passes, fails and stays open where it should, in a plain sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nayer_edge.pipelines.gate.judgement import CHECKS, Check, Verdict, judge
from nayer_edge.pipelines.gate.policy import Policy, make_policy
from nayer_edge.pipelines.gate.statistics import binomial_lower, binomial_upper, drop_lower, drop_upper
from nayer_edge.pipelines.measurements import (
    ArtifactReport,
    ClassCounts,
    Dataset,
    Latency,
    Network,
    Paired,
    PairedCounts,
    Report,
)

DIGEST = "0" * 64


def paired(lost: int, gained: int, n: int = 600) -> Paired:
    return Paired(n=n, both_right=n - lost - gained, lost=lost, gained=gained, both_wrong=0)


def measured(name: str, **changes: Any) -> ArtifactReport:
    values: dict[str, Any] = {
        "name": name,
        "file": f"export/student.{name}.onnx",
        "target": "cpu",
        "precision": name.split(".")[0],
        "runtime": "onnxruntime CPUExecutionProvider",
        "status": "measured",
        "precision_verified": True,
        "top1": 0.98,
        "agreement": 0.985,
        "max_abs_diff": 2e-5,
        "latency_ms": Latency(p50=0.3, p95=0.42),
        "threads": 1,
        "speedup_vs_fp32": 3.2,
        "size_bytes": 123_456,
        "sha256": DIGEST,
        "int8_coverage": 1.0 if name.startswith("int8") else None,
        "paired": PairedCounts(vs_fp32=paired(2, 1), vs_teacher=paired(10, 4)),
    }
    return ArtifactReport(**{**values, **changes})


def report_of(*artifacts: ArtifactReport, kind: str = "holdout", n: int = 600) -> Report:
    return Report(
        run="digits",
        dataset=Dataset(kind=kind, n=n, name="digits"),
        teacher=Network(params=100, top1=None if kind == "synthetic" else 0.99),
        student=Network(params=10),
        artifacts=artifacts or (measured("fp32"), measured("int8.cpu")),
        predictions_sha256=DIGEST,
    )


def policy_of(**sections: Any) -> Policy:
    """A policy that limits nothing but what is given."""
    bare = {"accuracy": {}, "int8": {}, "parity": {}}
    return make_policy({**bare, **sections}, "of this test")


def the(verdict: Verdict, name: str, artifact: str | None = None) -> Check:
    found = [c for c in verdict.checks if c.name == name and artifact in (None, c.artifact)]
    assert len(found) == 1, [c.name for c in verdict.checks]
    return found[0]


def synthetic(*, fp32: float | None, int8: float | None, n: int = 2000) -> Report:
    none = PairedCounts()
    return report_of(
        measured("fp32", agreement=fp32, top1=None, paired=none),
        measured("int8.cpu", agreement=int8, top1=None, paired=none),
        kind="synthetic",
        n=n,
    )


def test_default_policy_passes_a_good_release() -> None:
    verdict = judge(report_of(), Policy())
    assert verdict.verdict == "pass"
    assert [check.name for check in verdict.checks] == [
        "runtime",
        "accuracy_drop_vs_fp32",
        "accuracy_drop_vs_teacher",
        "int8_coverage",
        "parity",
    ]
    assert {check.name for check in verdict.checks} <= set(CHECKS)


def test_sentence_of_a_drop() -> None:
    check = the(judge(report_of(), Policy()), "accuracy_drop_vs_fp32")
    assert check.detail == (
        "int8.cpu loses 0.17 points against the FP32 student (2 lost, 1 gained of 600); "
        "at 95 % confidence at most 1.05, the limit is 1.50."
    )
    assert check.observed == pytest.approx(1 / 600)
    assert check.bound == drop_upper(2, 1, 600, 0.05)
    assert check.limit == 0.015


def test_sentence_of_a_gain() -> None:
    counts = PairedCounts(vs_fp32=paired(0, 40))
    check = the(
        judge(report_of(measured("int8.cpu", paired=counts)), policy_of(accuracy={"max_drop_vs_fp32": 0.01})),
        "accuracy_drop_vs_fp32",
    )
    assert check.verdict == "pass"
    assert "gains 6.67 points" in check.detail
    assert "at most -" in check.detail


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [
        (0, 0, "pass"),
        (2, 1, "pass"),
        (9, 0, "inconclusive"),
        (4, 8, "pass"),
        (60, 0, "fail"),
        (30, 5, "inconclusive"),
    ],
)
@pytest.mark.parametrize("reference", ["fp32", "teacher"])
def test_drop_verdicts(reference: str, lost: int, gained: int, expected: str) -> None:
    counts = PairedCounts(**{f"vs_{reference}": paired(lost, gained)})
    verdict = judge(
        report_of(measured("int8.cpu", paired=counts)),
        policy_of(accuracy={f"max_drop_vs_{reference}": 0.015}),
    )
    check = the(verdict, f"accuracy_drop_vs_{reference}")
    assert verdict.verdict == check.verdict == expected
    bound = drop_lower if expected == "fail" else drop_upper
    assert check.bound == bound(lost, gained, 600, 0.05)
    assert ("at least" in check.detail) == (expected == "fail")


def test_confidence_of_the_policy_is_used() -> None:
    counts = PairedCounts(vs_fp32=paired(3, 0))
    for confidence, expected in ((0.95, "pass"), (0.999, "inconclusive")):
        policy = policy_of(accuracy={"max_drop_vs_fp32": 0.015, "confidence": confidence})
        check = the(judge(report_of(measured("int8.cpu", paired=counts)), policy), "accuracy_drop_vs_fp32")
        assert check.verdict == expected
        assert f"{100 * confidence:g} % confidence" in check.detail


def test_inconclusive_says_how_many_images_would_decide() -> None:
    counts = PairedCounts(vs_fp32=paired(0, 0, n=100))
    policy = policy_of(accuracy={"max_drop_vs_fp32": 0.005})
    check = the(judge(report_of(measured("int8.cpu", paired=counts)), policy), "accuracy_drop_vs_fp32")
    assert check.verdict == "inconclusive"
    assert "about 598 images at these rates would pass" in check.detail


def test_inconclusive_at_the_limit_says_that_nothing_would_settle_it() -> None:
    counts = PairedCounts(vs_fp32=paired(9, 0))
    policy = policy_of(accuracy={"max_drop_vs_fp32": 0.015})
    check = the(judge(report_of(measured("int8.cpu", paired=counts)), policy), "accuracy_drop_vs_fp32")
    assert check.verdict == "inconclusive"
    assert "no practicable number of images" in check.detail


def test_numbers_that_differ_look_different() -> None:
    """A bound of 0.50049 % against a limit of 0.5 % must not read 0.50 against 0.50."""
    counts = PairedCounts(vs_fp32=paired(0, 0, n=597))
    policy = policy_of(accuracy={"max_drop_vs_fp32": 0.005})
    check = the(judge(report_of(measured("int8.cpu", paired=counts)), policy), "accuracy_drop_vs_fp32")
    assert check.verdict == "inconclusive"
    assert "0.501" in check.detail
    assert "0.500" in check.detail


@pytest.mark.parametrize("reference", ["fp32", "teacher"])
def test_missing_reference_fails(reference: str) -> None:
    verdict = judge(
        report_of(measured("int8.cpu", paired=PairedCounts())),
        policy_of(accuracy={f"max_drop_vs_{reference}": 0.5}),
    )
    assert verdict.verdict == "fail"
    assert "no paired counts" in the(verdict, f"accuracy_drop_vs_{reference}").detail


def test_counts_that_do_not_add_up_fail() -> None:
    counts = PairedCounts(vs_fp32=Paired(n=600, both_right=10, lost=400, gained=400, both_wrong=0))
    verdict = judge(report_of(measured("int8.cpu", paired=counts)), policy_of(accuracy={"max_drop_vs_fp32": 0.5}))
    assert verdict.verdict == "fail"
    assert "add up to 810" in the(verdict, "accuracy_drop_vs_fp32").detail


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8.arm", "no artefact 'int8.arm' (it holds fp32, int8.cpu). Did you mean 'int8.cpu'?"),
        ("zzz", "no artefact 'zzz' (it holds fp32, int8.cpu)."),
    ],
)
def test_missing_artefact_fails(name: str, expected: str) -> None:
    verdict = judge(report_of(), policy_of(artifacts=[name]))
    assert verdict.verdict == "fail"
    assert expected in the(verdict, "runtime").detail


def test_artefact_named_twice_fails() -> None:
    verdict = judge(report_of(measured("int8.cpu"), measured("int8.cpu", agreement=0.1)), policy_of())
    assert verdict.verdict == "fail"
    assert "2 artefacts" in the(verdict, "runtime").detail


def test_artefact_asked_for_twice_is_judged_once() -> None:
    assert len(judge(report_of(), policy_of(artifacts=["int8.cpu", "int8.cpu"])).checks) == 1


@pytest.mark.parametrize(("status", "words"), [("not_run", "was not run"), ("unavailable", "could not be run here")])
def test_what_was_not_measured_fails_with_the_reason(status: str, words: str) -> None:
    artifact = measured("int8.cpu", status=status, reason="no CUDA device.", precision_verified=True)
    verdict = judge(report_of(artifact), Policy(parity={"max_abs_diff": None}))
    assert verdict.verdict == "fail"
    assert [check.detail for check in verdict.checks] == [f"int8.cpu {words}: no CUDA device."]


def test_unverified_precision_fails() -> None:
    verdict = judge(report_of(measured("int8.cpu", precision_verified=False)), policy_of())
    assert verdict.verdict == "fail"
    assert "not confirmed that int8.cpu ran in int8" in the(verdict, "runtime").detail


@pytest.mark.parametrize(
    ("section", "check", "good", "bad"),
    [
        ({"latency": {"max_p95_ms": 1.0}}, "latency_p95", {}, {"latency_ms": Latency(p50=0.5, p95=1.01)}),
        (
            {"latency": {"min_speedup_vs_fp32": 2.0}},
            "speedup_vs_fp32",
            {"speedup_vs_fp32": 2.0},
            {"speedup_vs_fp32": 1.99},
        ),
        ({"size": {"max_bytes": 1000}}, "size", {"size_bytes": 1000}, {"size_bytes": 1001}),
        ({"int8": {"min_coverage": 0.9}}, "int8_coverage", {"int8_coverage": 0.9}, {"int8_coverage": 0.8999}),
    ],
)
def test_plain_limits(section: dict, check: str, good: dict, bad: dict) -> None:
    policy = policy_of(**section)
    assert the(judge(report_of(measured("int8.cpu", **good)), policy), check).verdict == "pass"
    failed = judge(report_of(measured("int8.cpu", **bad)), policy)
    assert failed.verdict == the(failed, check).verdict == "fail"
    nothing = dict.fromkeys(bad)
    absent = the(judge(report_of(measured("int8.cpu", **nothing)), policy), check)
    assert absent.verdict == "fail"
    assert absent.observed is None
    assert "but the report has no" in absent.detail


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_none_fail(value: float) -> None:
    policy = policy_of(latency={"min_speedup_vs_fp32": 2.0}, parity={"max_abs_diff": 1.0})
    artifacts = measured("int8.cpu", speedup_vs_fp32=value), measured("fp32", max_abs_diff=value)
    verdict = judge(report_of(*artifacts), policy)
    assert [check.verdict for check in verdict.checks] == ["pass", "fail", "fail"]
    assert [check.observed for check in verdict.checks] == [None, None, None]


def test_fp32_is_not_compared_with_itself() -> None:
    policy = policy_of(
        artifacts=["fp32"],
        accuracy={"max_drop_vs_fp32": 0.0, "max_drop_vs_teacher": 0.04},
        latency={"min_speedup_vs_fp32": 9.0},
        int8={"min_coverage": 1.0},
        per_class={"max_drop": 0.1},
    )
    names = [check.name for check in judge(report_of(), policy).checks]
    assert names == ["runtime", "accuracy_drop_vs_teacher"]


@pytest.mark.parametrize(
    ("fp32", "expected"),
    [
        (measured("fp32", max_abs_diff=1e-3), "pass"),
        (measured("fp32", max_abs_diff=1.01e-3), "fail"),
        (measured("fp32", max_abs_diff=None), "fail"),
        (measured("fp32", status="not_run"), "fail"),
        (None, "fail"),
    ],
)
def test_parity_is_checked_on_fp32_even_if_only_int8_ships(fp32: ArtifactReport | None, expected: str) -> None:
    artifacts = [measured("int8.cpu", max_abs_diff=5.0), *([fp32] if fp32 else [])]
    verdict = judge(report_of(*artifacts), policy_of(parity={"max_abs_diff": 1e-3}))
    assert the(verdict, "parity", "fp32").verdict == verdict.verdict == expected


@pytest.mark.parametrize(("agreement", "expected"), [(0.99, "pass"), (0.96, "inconclusive"), (0.9, "fail")])
def test_agreement(agreement: float, expected: str) -> None:
    verdict = judge(report_of(measured("int8.cpu", agreement=agreement)), policy_of(agreement={"min": 0.95}))
    check = the(verdict, "agreement")
    assert check.verdict == verdict.verdict == expected
    bound = binomial_upper if expected == "fail" else binomial_lower
    assert check.bound == bound(round(600 * agreement), 600, 0.05)
    assert ("would pass" in check.detail) == (expected == "inconclusive")
    assert "synthetic" not in check.detail


def test_missing_agreement_fails() -> None:
    verdict = judge(report_of(measured("int8.cpu", agreement=None)), policy_of(agreement={"min": 0.5}))
    assert verdict.verdict == "fail"


@pytest.mark.parametrize(("int8", "expected"), [(0.99, "pass"), (0.965, "inconclusive"), (0.9, "fail")])
def test_synthetic_drop_vs_teacher_is_disagreement(int8: float, expected: str) -> None:
    policy = policy_of(accuracy={"max_drop_vs_teacher": 0.04})
    verdict = judge(synthetic(fp32=0.99, int8=int8), policy)
    check = the(verdict, "accuracy_drop_vs_teacher")
    assert check.verdict == verdict.verdict == expected
    assert check.observed == pytest.approx(1 - int8)
    wrong = 2000 - round(2000 * int8)
    bound = binomial_lower if expected == "fail" else binomial_upper
    assert check.bound == bound(wrong, 2000, 0.05)


@pytest.mark.parametrize(("int8", "expected"), [(0.991, "pass"), (0.98, "inconclusive"), (0.9, "fail")])
def test_synthetic_drop_vs_fp32_holds_for_every_pairing(int8: float, expected: str) -> None:
    policy = policy_of(accuracy={"max_drop_vs_fp32": 0.015})
    n = 2000
    verdict = judge(synthetic(fp32=0.992, int8=int8, n=n), policy)
    check = the(verdict, "accuracy_drop_vs_fp32")
    assert check.verdict == verdict.verdict == expected
    assert check.observed == pytest.approx(0.992 - int8)
    more_lost = round(n * 0.992) - round(n * int8)
    pairings = [(more_lost + gained, gained) for gained in range(n - round(n * 0.992) + 1)]
    if expected == "fail":
        assert check.bound == min(drop_lower(*pair, n, 0.05) for pair in pairings)
    else:
        assert check.bound == max(drop_upper(*pair, n, 0.05) for pair in pairings)


def test_synthetic_numbers_are_never_shown_without_that_word() -> None:
    policy = policy_of(
        accuracy={"max_drop_vs_fp32": 0.015, "max_drop_vs_teacher": 0.04},
        agreement={"min": 0.9},
        parity={"max_abs_diff": 1.0},
    )
    for int8 in (0.991, 0.97, 0.5):
        checks = judge(synthetic(fp32=0.992, int8=int8), policy).checks
        assert len(checks) == 5
        for check in checks[1:]:
            assert check.synthetic
            assert "synthetic" in check.detail
    assert not any(check.synthetic for check in judge(report_of(), policy).checks)


@pytest.mark.parametrize(
    ("fp32", "int8", "check"),
    [
        (None, 0.99, "accuracy_drop_vs_fp32"),
        (0.99, None, "accuracy_drop_vs_fp32"),
        (0.99, None, "accuracy_drop_vs_teacher"),
    ],
)
def test_synthetic_without_agreement_fails(fp32: float | None, int8: float | None, check: str) -> None:
    policy = policy_of(accuracy={f"max_{check.removeprefix('accuracy_')}": 0.5})
    assert the(judge(synthetic(fp32=fp32, int8=int8), policy), check).verdict == "fail"


def test_synthetic_paired_counts_are_not_believed() -> None:
    """Without ground truth nobody can be right, so counts that a report brings along are not used."""
    lying = PairedCounts(vs_fp32=paired(0, 0, 2000), vs_teacher=paired(0, 0, 2000))
    artifacts = measured("fp32", agreement=0.99), measured("int8.cpu", agreement=0.5, paired=lying)
    verdict = judge(report_of(*artifacts, kind="synthetic", n=2000), Policy(parity={"max_abs_diff": None}))
    assert the(verdict, "accuracy_drop_vs_fp32").verdict == "fail"
    assert the(verdict, "accuracy_drop_vs_teacher").verdict == "fail"


def classes(*counts: tuple[str, int, int, int]) -> tuple[ClassCounts, ...]:
    return tuple(ClassCounts(label=label, n=n, lost=lost, gained=gained) for label, n, lost, gained in counts)


@pytest.mark.parametrize("advisory", [True, False])
@pytest.mark.parametrize(
    ("counts", "expected", "words"),
    [
        (classes(("cat", 100, 0, 0), ("dog", 100, 1, 0)), "pass", "No class of int8.cpu loses more than 4.6"),
        (classes(("cat", 100, 0, 0), ("dog", 100, 4, 0)), "inconclusive", "'dog' (4 lost, 0 gained of 100)"),
        (classes(("cat", 100, 0, 0), ("dog", 100, 30, 0)), "fail", "'dog' 30.00 (100 images)"),
        (classes(("cat", 100, 0, 0), ("yak", 0, 0, 0)), "inconclusive", "no images of 'yak'"),
        (classes(("cat", 10, 9, 9)), "fail", "exceed"),
        ((), "fail", "no counts per class"),
    ],
)
def test_per_class(counts: tuple[ClassCounts, ...], expected: str, words: str, advisory: bool) -> None:
    policy = policy_of(per_class={"max_drop": 0.05, "advisory": advisory})
    verdict = judge(report_of(measured("int8.cpu", per_class=counts)), policy)
    check = the(verdict, "per_class_drop")
    assert check.verdict == expected
    assert check.advisory == advisory
    assert words in check.detail
    assert verdict.verdict == ("pass" if advisory else expected)


def test_per_class_failure_is_corrected_for_the_number_of_classes() -> None:
    """A class that would fail alone does not among a hundred others that are fine."""
    suspicious = ("dog", 100, 13, 0)
    assert drop_lower(13, 0, 100, 0.05) > 0.03
    others = [(f"class {i}", 100, 0, 0) for i in range(99)]
    policy = policy_of(per_class={"max_drop": 0.03, "advisory": False})
    alone = judge(report_of(measured("int8.cpu", per_class=classes(suspicious))), policy)
    among = judge(report_of(measured("int8.cpu", per_class=classes(suspicious, *others))), policy)
    assert alone.verdict == "fail"
    assert among.verdict == "inconclusive"


def test_per_class_names_the_worst_and_counts_the_rest() -> None:
    counts = classes(*((f"class {i}", 100, 50 + i, 0) for i in range(6)))
    policy = policy_of(per_class={"max_drop": 0.05})
    check = the(judge(report_of(measured("int8.cpu", per_class=counts)), policy), "per_class_drop")
    assert "'class 5' 55.00 (100 images), 'class 4'" in check.detail
    assert "and 3 more" in check.detail
    assert "class 2" not in check.detail


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.floats(0, 0.2), st.floats(0.9, 0.999), st.booleans())
def test_overall_verdict_follows_from_the_checks(
    lost: int, gained: int, limit: float, confidence: float, advisory: bool
) -> None:
    policy = policy_of(
        accuracy={"max_drop_vs_fp32": limit, "max_drop_vs_teacher": limit, "confidence": confidence},
        agreement={"min": 0.97},
        per_class={"max_drop": limit, "advisory": advisory},
    )
    artifact = measured(
        "int8.cpu",
        paired=PairedCounts(vs_fp32=paired(lost, gained), vs_teacher=paired(gained, lost)),
        per_class=classes(("cat", 200, lost, gained), ("dog", 200, gained, lost)),
    )
    verdict = judge(report_of(artifact), policy)
    deciding = {check.verdict for check in verdict.checks if not check.advisory}
    worst = next(outcome for outcome in ("fail", "inconclusive", "pass") if outcome in deciding)
    assert verdict.verdict == worst
    for check in verdict.checks:
        assert check.detail.endswith(".")
        assert "\n" not in check.detail
        if check.bound is not None and check.name != "agreement":
            assert (check.verdict == "pass") == (check.bound <= check.limit)
