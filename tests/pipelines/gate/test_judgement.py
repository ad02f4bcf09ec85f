"""The judgement: every check passes, fails and stays open where it should.

The sentences stand in wording.golden.txt, beside this file. After a change of wording, write it anew and read the
difference: NAYER_EDGE_GOLDEN=write python -m pytest tests/pipelines/gate/test_judgement.py -k golden
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nayer_edge.pipelines.gate import wording
from nayer_edge.pipelines.gate.judgement import CHECKS, Baseline, Check, Verdict, judge
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
from nayer_edge.pipelines.recipes.policy import Policy, make_policy

DIGEST = "0" * 64
GOLDEN = Path(__file__).with_name("wording.golden.txt")


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


def synthetic_pairs(lost: int, gained: int, *, wrong: int = 200, n: int = 2000, **changes: Any) -> Report:
    """Counted image by image: FP32 differs from its teacher on `wrong` images, INT8 loses and gains some."""
    counts = Paired(n=n, both_right=n - wrong - lost, lost=lost, gained=gained, both_wrong=wrong - gained)
    right = counts.both_right + gained
    vs_teacher = Paired(n=n, both_right=right, lost=n - right, gained=0, both_wrong=0)
    pairs = PairedCounts(vs_fp32=counts, vs_teacher=vs_teacher)
    int8 = {"agreement": right / n, "top1": None, "paired": PairedCounts(), "paired_synthetic": pairs, **changes}
    fp32 = measured("fp32", agreement=1 - wrong / n, top1=None, paired=PairedCounts())
    return report_of(fp32, measured("int8.cpu", **int8), kind="synthetic", n=n)


def numbers(text: str) -> list[float]:
    """Every number in a sentence, in order (those in names left out)."""
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", text)]


def test_default_policy_passes_a_good_release() -> None:
    verdict = judge(report_of(), Policy())
    assert verdict.verdict == "pass"
    assert [check.name for check in verdict.checks] == [
        "runtime",
        "accuracy_drop_vs_fp32",
        "accuracy_drop_vs_teacher",
        "parity",
    ]
    assert {check.name for check in verdict.checks} <= set(CHECKS)


def test_a_layer_left_in_float_is_reported_and_fails_only_where_a_minimum_is_set() -> None:
    report = report_of(measured("fp32"), measured("int8.cpu", int8_coverage=0.75))
    verdict = judge(report, Policy())
    assert verdict.verdict == "pass"
    assert 75.0 in numbers(the(verdict, "runtime").detail)
    assert judge(report, Policy(int8={"min_coverage": 0.75})).verdict == "pass"
    assert judge(report, Policy(int8={"min_coverage": 0.8})).verdict == "fail"


def test_figures_of_a_drop() -> None:
    check = the(judge(report_of(), Policy()), "accuracy_drop_vs_fp32")
    assert numbers(check.detail) == [0.17, 2, 1, 600, 1.05, 95, 1.5]
    assert check.observed == pytest.approx(1 / 600)
    assert check.bound == drop_upper(2, 1, 600, 0.05)
    assert check.limit == 0.015


def test_figures_of_a_gain() -> None:
    counts = PairedCounts(vs_fp32=paired(0, 40))
    check = the(
        judge(report_of(measured("int8.cpu", paired=counts)), policy_of(accuracy={"max_drop_vs_fp32": 0.01})),
        "accuracy_drop_vs_fp32",
    )
    assert check.verdict == "pass"
    assert check.observed == -40 / 600
    assert check.bound == drop_upper(0, 40, 600, 0.05) < 0
    assert numbers(check.detail) == [6.67, 0, 40, 600, round(100 * check.bound, 2), 95, 1.0]


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


def test_confidence_of_the_policy_is_used() -> None:
    counts = PairedCounts(vs_fp32=paired(3, 0))
    for confidence, expected in ((0.95, "pass"), (0.999, "inconclusive")):
        policy = policy_of(accuracy={"max_drop_vs_fp32": 0.015, "confidence": confidence})
        check = the(judge(report_of(measured("int8.cpu", paired=counts)), policy), "accuracy_drop_vs_fp32")
        assert check.verdict == expected
        assert round(100 * confidence, 6) in numbers(check.detail)


def test_inconclusive_says_how_many_images_would_decide() -> None:
    counts = PairedCounts(vs_fp32=paired(0, 0, n=100))
    policy = policy_of(accuracy={"max_drop_vs_fp32": 0.005})
    check = the(judge(report_of(measured("int8.cpu", paired=counts)), policy), "accuracy_drop_vs_fp32")
    assert check.verdict == "inconclusive"
    assert numbers(check.detail)[-1] == 598


def test_inconclusive_at_the_limit_names_no_number_of_images() -> None:
    counts = PairedCounts(vs_fp32=paired(9, 0))
    policy = policy_of(accuracy={"max_drop_vs_fp32": 0.015})
    check = the(judge(report_of(measured("int8.cpu", paired=counts)), policy), "accuracy_drop_vs_fp32")
    assert check.verdict == "inconclusive"
    assert numbers(check.detail)[-1] == 1.5, "the limit"


def test_numbers_that_differ_look_different() -> None:
    """A bound of 0.50049 % against a limit of 0.5 % must not read 0.50 against 0.50."""
    counts = PairedCounts(vs_fp32=paired(0, 0, n=597))
    policy = policy_of(accuracy={"max_drop_vs_fp32": 0.005})
    check = the(judge(report_of(measured("int8.cpu", paired=counts)), policy), "accuracy_drop_vs_fp32")
    assert check.verdict == "inconclusive"
    assert {0.501, 0.5} <= set(numbers(check.detail))


@pytest.mark.parametrize("reference", ["fp32", "teacher"])
def test_missing_reference_fails(reference: str) -> None:
    verdict = judge(
        report_of(measured("int8.cpu", paired=PairedCounts())),
        policy_of(accuracy={f"max_drop_vs_{reference}": 0.5}),
    )
    assert verdict.verdict == "fail"
    check = the(verdict, f"accuracy_drop_vs_{reference}")
    assert (check.verdict, check.observed, check.bound) == ("fail", None, None)


def test_counts_that_do_not_add_up_fail() -> None:
    counts = PairedCounts(vs_fp32=Paired(n=600, both_right=10, lost=400, gained=400, both_wrong=0))
    verdict = judge(report_of(measured("int8.cpu", paired=counts)), policy_of(accuracy={"max_drop_vs_fp32": 0.5}))
    assert verdict.verdict == "fail"
    assert numbers(the(verdict, "accuracy_drop_vs_fp32").detail) == [810, 600]


@pytest.mark.parametrize(("name", "suggested"), [("int8.arm", True), ("zzz", False)])
def test_missing_artifact_fails(name: str, suggested: bool) -> None:
    verdict = judge(report_of(), policy_of(artifacts=[name]))
    assert verdict.verdict == "fail"
    assert ("Did you mean 'int8.cpu'?" in the(verdict, "runtime").detail) == suggested


def test_artifact_named_twice_fails() -> None:
    verdict = judge(report_of(measured("int8.cpu"), measured("int8.cpu", agreement=0.1)), policy_of())
    assert verdict.verdict == "fail"
    assert [check.name for check in verdict.checks] == ["runtime"]


def test_artifact_asked_for_twice_is_judged_once() -> None:
    assert len(judge(report_of(), policy_of(artifacts=["int8.cpu", "int8.cpu"])).checks) == 1


@pytest.mark.parametrize("status", ["not_run", "unavailable"])
def test_what_was_not_measured_fails_with_the_reason(status: str) -> None:
    artifact = measured("int8.cpu", status=status, reason="no CUDA device.", precision_verified=True)
    verdict = judge(report_of(artifact), Policy(parity={"max_abs_diff": None}))
    assert verdict.verdict == "fail"
    assert [check.name for check in verdict.checks] == ["runtime"]
    assert "no CUDA device" in verdict.checks[0].detail


def test_a_graph_for_another_device_passes_only_where_the_policy_accepts_it() -> None:
    arm = measured("int8.arm", precision_verified=False, simulated=True, latency_ms=None)
    refused = judge(report_of(arm), policy_of(artifacts=["int8.arm"]))
    assert (refused.verdict, the(refused, "runtime").verdict) == ("fail", "fail")
    assert "accept_simulated = true" in the(refused, "runtime").detail
    accepting: dict[str, Any] = {"artifacts": ["int8.arm"], "accept_simulated": True}
    accepted = judge(report_of(arm), policy_of(**accepting))
    assert accepted.verdict == "pass"
    assert "not measured" in the(accepted, "runtime").detail
    broken = arm.model_copy(update={"reason": "its output is not finite on 3 of 600 images"})
    untrusted = judge(report_of(broken), policy_of(**accepting))
    assert (untrusted.verdict, the(untrusted, "runtime").verdict) == ("fail", "fail")
    assert "its output is not finite on 3 of 600 images" in the(untrusted, "runtime").detail
    late = judge(report_of(arm), policy_of(**accepting, latency={"max_p95_ms": 100.0}))
    assert the(late, "latency_p95").verdict == "fail", "its speed is not known here"
    unsure = measured("int8.cpu", precision_verified=False)
    assert judge(report_of(unsure), policy_of(accept_simulated=True)).verdict == "fail", "that one is for this machine"


def test_unverified_precision_fails() -> None:
    verdict = judge(report_of(measured("int8.cpu", precision_verified=False)), policy_of())
    assert verdict.verdict == "fail"
    assert the(verdict, "runtime").verdict == "fail"


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


def test_fp32_in_another_runtime_is_an_artifact_and_not_the_reference() -> None:
    """Its answers and its logits are compared with the student's; its speed has nothing to be compared with."""
    policy = policy_of(
        artifacts=["fp32.litert", "int8.litert"],
        accuracy={"max_drop_vs_fp32": 0.015},
        parity={"max_abs_diff": 1e-3},
        latency={"min_speedup_vs_fp32": 2.0},
    )

    def judged(**changes: Any) -> Verdict:
        other = measured("fp32.litert", **{"speedup_vs_fp32": 1.0, **changes})
        return judge(report_of(measured("fp32"), other, measured("int8.litert")), policy)

    good = judged()
    assert good.verdict == "pass"
    assert {check.artifact for check in good.checks if check.name == "parity"} == {"fp32", "fp32.litert"}
    assert {check.artifact for check in good.checks if check.name == "speedup_vs_fp32"} == {"int8.litert"}
    assert the(judged(max_abs_diff=0.1), "parity", "fp32.litert").verdict == "fail"
    lost = PairedCounts(vs_fp32=paired(60, 0), vs_teacher=paired(60, 0))
    assert the(judged(paired=lost), "accuracy_drop_vs_fp32", "fp32.litert").verdict == "fail"


@pytest.mark.parametrize(("agreement", "expected"), [(0.99, "pass"), (0.96, "inconclusive"), (0.9, "fail")])
def test_agreement(agreement: float, expected: str) -> None:
    verdict = judge(report_of(measured("int8.cpu", agreement=agreement)), policy_of(agreement={"min": 0.95}))
    check = the(verdict, "agreement")
    assert check.verdict == verdict.verdict == expected
    bound = binomial_upper if expected == "fail" else binomial_lower
    assert check.bound == bound(round(600 * agreement), 600, 0.05)
    assert not check.synthetic


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


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [(0, 0, "pass"), (12, 2, "pass"), (30, 30, "pass"), (0, 40, "pass"), (30, 10, "inconclusive"), (70, 5, "fail")],
)
def test_synthetic_drop_vs_fp32_is_counted_image_by_image(lost: int, gained: int, expected: str) -> None:
    """By their rates alone, an identical INT8 would be inconclusive where FP32 differs from its teacher on a tenth."""
    policy = policy_of(accuracy={"max_drop_vs_fp32": 0.015})
    verdict = judge(synthetic_pairs(lost, gained), policy)
    check = the(verdict, "accuracy_drop_vs_fp32")
    assert check.verdict == verdict.verdict == expected
    assert check.observed == pytest.approx((lost - gained) / 2000)
    assert check.bound == (drop_lower if expected == "fail" else drop_upper)(lost, gained, 2000, 0.05)
    real = judge(report_of(measured("int8.cpu", paired=PairedCounts(vs_fp32=paired(lost, gained, 2000)))), policy)
    assert the(real, "accuracy_drop_vs_fp32").bound == check.bound, "the same bounds as on real images"
    assert check.synthetic
    assert "synthetic" in check.detail


def test_reports_without_synthetic_counts_are_judged_as_before() -> None:
    policy = policy_of(accuracy={"max_drop_vs_fp32": 0.015})
    assert judge(synthetic(fp32=0.9, int8=0.9), policy).verdict == "inconclusive"
    assert judge(synthetic_pairs(0, 0, paired_synthetic=PairedCounts()), policy).verdict == "inconclusive"


@pytest.mark.parametrize(
    "changes",
    [
        {"agreement": 0.95},
        {"agreement": None},
        {"paired_synthetic": PairedCounts(vs_fp32=Paired(n=2000, both_right=1800, lost=0, gained=0, both_wrong=0))},
        {"paired_synthetic": PairedCounts(vs_fp32=paired(0, 0, 20))},
    ],
)
def test_synthetic_counts_that_contradict_the_report_fail(changes: dict[str, Any]) -> None:
    report = synthetic_pairs(0, 0, **changes)
    verdict = judge(report, policy_of(accuracy={"max_drop_vs_fp32": 0.015}))
    assert the(verdict, "accuracy_drop_vs_fp32").verdict == "fail"
    assert the(verdict, "accuracy_drop_vs_fp32").synthetic


def test_counts_against_synthetic_answers_are_not_believed_on_a_hold_out() -> None:
    pairs = PairedCounts(vs_fp32=paired(0, 0), vs_teacher=paired(0, 0))
    report = report_of(measured("int8.cpu", paired=PairedCounts(), paired_synthetic=pairs))
    verdict = judge(report, policy_of(accuracy={"max_drop_vs_fp32": 0.5, "max_drop_vs_teacher": 0.5}))
    assert {check.verdict for check in verdict.checks if check.name != "runtime"} == {"fail"}


def classes(*counts: tuple[str, int, int, int]) -> tuple[ClassCounts, ...]:
    return tuple(ClassCounts(label=label, n=n, lost=lost, gained=gained) for label, n, lost, gained in counts)


@pytest.mark.parametrize("advisory", [True, False])
@pytest.mark.parametrize(
    ("counts", "expected", "words"),
    [
        (classes(("cat", 100, 0, 0), ("dog", 100, 1, 0)), "pass", "4.6"),
        (classes(("cat", 100, 0, 0), ("dog", 100, 4, 0)), "inconclusive", "'dog'"),
        (classes(("cat", 100, 0, 0), ("dog", 100, 30, 0)), "fail", "'dog' 30.00"),
        (classes(("cat", 100, 0, 0), ("yak", 0, 0, 0)), "inconclusive", "'yak'"),
        (classes(("cat", 10, 9, 9)), "fail", "'cat'"),
        ((), "fail", "int8.cpu"),
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
    assert re.findall(r"'class (\d)'", check.detail) == ["5", "4", "3"]
    assert numbers(check.detail)[-1] == 3, "three more"


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


def scenarios() -> dict[str, tuple[Report, Policy, Baseline | None]]:
    """Reports and policies that lead to every kind of sentence."""

    def one(**changes: Any) -> Report:
        return report_of(measured("fp32"), measured("int8.cpu", **changes))

    drops = policy_of(accuracy={"max_drop_vs_fp32": 0.015, "max_drop_vs_teacher": 0.04})
    plain = policy_of(
        latency={"max_p95_ms": 0.4, "min_speedup_vs_fp32": 4.0}, size={"max_bytes": 100_000}, int8={"min_coverage": 1.0}
    )
    each = policy_of(per_class={"max_drop": 0.05, "advisory": False})
    agree = policy_of(agreement={"min": 0.95})
    on_synthetic, strict = (
        policy_of(
            accuracy={"max_drop_vs_fp32": 0.015, "max_drop_vs_teacher": 0.04},
            agreement={"min": 0.97},
            parity={"max_abs_diff": limit},
        )
        for limit in (1e-3, 1e-6)
    )
    last = policy_of(baseline={"max_drop": 0.01})
    baseline = Baseline("1.4", DIGEST, {"int8.cpu": paired(3, 0)})
    nothing = {
        "agreement": None, "latency_ms": None, "speedup_vs_fp32": None, "size_bytes": None, "int8_coverage": None,
        "paired": PairedCounts(),
    }  # fmt: skip
    found: dict[str, tuple[Report, Policy, Baseline | None]] = {
        "a good release": (report_of(), Policy(), None),
        "a loss and a gain": (
            one(paired=PairedCounts(vs_fp32=paired(60, 0), vs_teacher=paired(0, 40))), drops, None
        ),
        "too few images": (one(paired=PairedCounts(vs_fp32=paired(1, 0, 90), vs_teacher=paired(24, 0))), drops, None),
        "impossible counts": (
            one(paired=PairedCounts(vs_fp32=Paired(n=600, both_right=10, lost=400, gained=400, both_wrong=0))),
            policy_of(accuracy={"max_drop_vs_fp32": 0.015}), None,
        ),
        "plain limits, missed": (one(int8_coverage=0.9), plain, None),
        "plain limits, kept": (
            one(speedup_vs_fp32=5.0, size_bytes=9, latency_ms=Latency(p50=0.1, p95=0.2)), plain, None
        ),
        "plain numbers that are none": (one(speedup_vs_fp32=math.nan), plain, None),
        "nothing but accuracy measured": (
            one(**nothing), plain.model_copy(update={"accuracy": drops.accuracy, "agreement": agree.agreement}), None
        ),
        "not run": (one(status="not_run", reason="The device is elsewhere."), Policy(), None),
        "unavailable": (one(status="unavailable", reason="no GPU"), Policy(), None),
        "precision not confirmed": (one(precision_verified=False), policy_of(), None),
        "no such artifact": (report_of(), policy_of(artifacts=["int8.gpu"]), None),
        "an artifact twice": (report_of(measured("int8.cpu"), measured("int8.cpu")), policy_of(), None),
        "agreement, kept": (report_of(), agree, None),
        "agreement, missed": (one(agreement=0.9), agree, None),
        "agreement, open": (one(agreement=0.96), agree, None),
        "no class loses much": (one(per_class=classes(("cat", 300, 1, 0), ("dog", 300, 1, 1))), each, None),
        "some classes lose much": (one(per_class=classes(*((f"{n}", 100, 40, 0) for n in range(5)))), each, None),
        "a class is open": (one(per_class=classes(("cat", 100, 4, 0), ("dog", 300, 1, 1))), each, None),
        "a class without images": (one(per_class=classes(("cat", 300, 0, 0), ("yak", 0, 0, 0))), each, None),
        "impossible counts of a class": (one(per_class=classes(("cat", 10, 9, 9))), each, None),
        "an advisory check": (
            one(per_class=classes(("cat", 100, 40, 0))), policy_of(per_class={"max_drop": 0.05}), None
        ),
        "synthetic, kept": (synthetic(fp32=0.992, int8=0.992), on_synthetic, None),
        "synthetic, missed": (synthetic(fp32=0.992, int8=0.9), strict, None),
        "synthetic, open": (synthetic(fp32=0.98, int8=0.965), on_synthetic, None),
        "synthetic pairs, kept": (synthetic_pairs(2, 3), on_synthetic, None),
        "synthetic pairs, missed": (synthetic_pairs(90, 0, wrong=20), on_synthetic, None),
        "synthetic pairs, open": (synthetic_pairs(30, 8, wrong=20), on_synthetic, None),
        "synthetic pairs, impossible": (synthetic_pairs(2, 3, agreement=0.99), on_synthetic, None),
        "a baseline": (report_of(), last, baseline),
        "a baseline is required": (report_of(), last, None),
        "a baseline without the artifact": (report_of(), last, Baseline("1.4", DIGEST, {})),
    }  # fmt: skip
    return found


def worded(report: Report, policy: Policy, baseline: Baseline | None) -> list[str]:
    """All that people are told about a verdict."""
    verdict = judge(report, policy, baseline)
    reason = wording.reason(verdict)
    lines = [f"{wording.MARK[verdict.verdict]} {reason.lead}", *(f"  {detail}" for detail in reason.details)]
    for check in verdict.checks:
        lines.append("  ".join((wording.MARK[check.verdict], wording.qualified_title(check), *wording.figures(check))))
        lines.append(f"    {check.detail}")
    return [*lines, *(f"note: {note}" for note in wording.notes(report.dataset, policy, baseline))]


def test_the_sentences_are_the_golden_ones() -> None:
    found = scenarios()
    holdout = wording.promise(report_of().dataset)
    parts = [[f"== {name}", *worded(*found[name])] for name in found]
    text = "\n\n".join("\n".join(part) for part in [*parts, ["== on labelled images", *holdout]]) + "\n"
    if os.environ.get("NAYER_EDGE_GOLDEN") == "write":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "see the beginning of this file"
    assert {check.name for given in found.values() for check in judge(*given).checks} == set(CHECKS)


# ------------------------------------------------------------------ what to do


@pytest.mark.parametrize(
    ("student", "int8", "said"),
    [
        (0.90, 0.897, "The student is too far from its teacher (9.0 points); quantization is not the cause. Give it"),
        (0.90, 0.80, "The student is too far from its teacher (9.0 points); quantization adds 10.0 points. Give it"),
        (0.985, 0.80, "The student itself is within the limit (0.5 points); quantization adds 18.5 points. Quantize"),
        (None, 0.80, "The student is too far from its teacher. Give it"),
    ],
)
@pytest.mark.parametrize("also", [True, False])
def test_advice_names_the_part_that_loses(student: float | None, int8: float, said: str, also: bool) -> None:
    """A teacher of 99 %, and a limit of 4 points; with and without a limit on quantization itself."""
    lost = round(600 * (0.99 - int8))
    counts = paired(lost, 0)
    report = report_of(measured("int8.cpu", top1=int8, paired=PairedCounts(vs_teacher=counts, vs_fp32=paired(0, 0))))
    report = report.model_copy(update={"student": Network(params=10, top1=student)})
    limits = {"max_drop_vs_teacher": 0.04, **({"max_drop_vs_fp32": 0.015} if also else {})}
    verdict = judge(report, policy_of(accuracy=limits))
    assert the(verdict, "accuracy_drop_vs_teacher").verdict == "fail"
    (found,) = wording.advice(verdict, report)
    assert found.startswith(said)
    assert ("--more" in found) == (said.endswith("Give it"))


def test_advice_names_what_can_still_be_done() -> None:
    """A runtime that quantizes by itself, and a graph that was trained already, keep more layers in float instead."""
    counts = PairedCounts(vs_teacher=paired(60, 0), vs_fp32=paired(0, 0))
    limits = policy_of(accuracy={"max_drop_vs_teacher": 0.04}, artifacts=["int8.cpu", "int8.litert"])
    for name, qat, said in (
        ("int8.cpu", False, "--qat"), ("int8.cpu", True, "export.max_drop"), ("int8.litert", False, "export.max_drop")
    ):  # fmt: skip
        report = report_of(measured(name, top1=0.89, paired=counts))
        report = report.model_copy(update={"student": Network(params=10, top1=0.985)})
        (found,) = wording.advice(judge(report, limits), report, qat=qat)
        assert said in found, name


def test_advice_on_synthetic_images_counts_disagreement() -> None:
    report = synthetic(fp32=0.8, int8=0.79)
    verdict = judge(report, policy_of(agreement={"min": 0.9}))
    near, far = (report.model_copy(update={"student": Network(params=10, agreement=a)}) for a in (0.95, 0.8))
    assert "within the limit (5.0 points); quantization adds 16.0 points" in wording.advice(verdict, near)[0]
    assert "too far from its teacher (20.0 points); quantization is not the cause" in wording.advice(verdict, far)[0]
    assert "--bank RUN" in wording.advice(verdict, far, continuable=False)[0]
    assert wording.advice(judge(report_of(), Policy()), report) == ()
