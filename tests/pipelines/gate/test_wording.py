"""The words of a verdict: which checks its reason names, and figures with their units.

The sentences themselves stand in wording.golden.txt; see test_judgement.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from nayer_edge.pipelines.gate import wording
from nayer_edge.pipelines.gate.judgement import CHECKS, Check, Outcome, Verdict
from nayer_edge.pipelines.measurements import Dataset


def check(name: str, verdict: Outcome, **values: Any) -> Check:
    return Check(
        **{
            **{"name": name, "artifact": "int8.cpu", "observed": 0.0, "bound": None, "limit": None, "verdict": verdict},
            **{"detail": f"{name} is so.", **values},
        }
    )


def reason_of(verdict: Outcome, *checks: Check) -> wording.Reason:
    return wording.reason(Verdict(verdict, checks))


def test_a_pass_names_the_check_closest_to_its_limit() -> None:
    close = check("accuracy_drop_vs_fp32", "pass", bound=0.014, limit=0.015, detail="int8 loses little.")
    far = check("accuracy_drop_vs_teacher", "pass", bound=0.01, limit=0.04)
    agree = check("agreement", "pass", bound=0.99, limit=0.9)
    found = reason_of("pass", far, close, agree, check("runtime", "pass"))
    assert "4 checks" in found.lead
    assert [detail.endswith("int8 loses little.") for detail in found.details] == [True]
    nearly = check("agreement", "pass", bound=0.9001, limit=0.9, detail="INT8 agrees.")
    assert reason_of("pass", close, nearly).details[0].endswith(": INT8 agrees."), "names keep their capitals"
    assert reason_of("pass", check("size", "pass")).details == ()


def test_a_fail_names_what_fails() -> None:
    found = reason_of("fail", check("size", "fail"), check("runtime", "pass"), check("parity", "inconclusive"))
    assert found.lead.startswith("1 of 3 checks")
    assert found.lead.endswith("file size.")
    assert (found.details, found.more) == (("size is so.",), 0)
    names = ("size", "agreement", "latency_p95", "parity")
    many = reason_of("fail", *(check(name, "fail", detail=name) for name in names))
    assert many.lead.startswith("4 of 4 checks")
    assert "and ONNX vs" in many.lead, "names keep their capitals"
    assert (many.details, many.more) == (("size", "agreement", "latency_p95"), 1)


def test_an_inconclusive_verdict_names_what_is_open() -> None:
    advisory = check("per_class_drop", "fail", advisory=True)
    found = reason_of("inconclusive", check("agreement", "inconclusive"), check("runtime", "pass"), advisory)
    assert "1 of 2 checks" in found.lead, "an advisory check does not count"
    assert found.lead.endswith("agreement with teacher.")


def test_what_the_images_can_promise() -> None:
    synthetic = " ".join(wording.promise(Dataset(kind="synthetic", n=10, name="x")))
    assert "synthetic" in synthetic
    assert "cannot promise" in synthetic
    holdout = " ".join(wording.promise(Dataset(kind="holdout", n=10, name="x")))
    assert "synthetic" not in holdout


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_has_a_title(name: str) -> None:
    assert wording.title(name)[0].isupper()
    assert "_" not in wording.title(name)
    assert len(wording.title(name)) <= 26, "the table of the terminal has no room for more"


def test_an_unknown_check_is_readable() -> None:
    assert wording.title("battery_life") == "Battery life"
    assert wording.figures(check("battery_life", "pass", observed=2.0)).observed == "2"


def test_a_title_says_how_its_check_counts() -> None:
    assert wording.qualified_title(check("size", "pass")) == "File size"
    both = check("size", "fail", advisory=True, synthetic=True)
    assert wording.qualified_title(both) == "File size (advisory, synthetic)"


@pytest.mark.parametrize(
    ("name", "observed", "bound", "limit", "shown"),
    [
        ("accuracy_drop_vs_fp32", 0.0217, 0.0362, 0.015, ("2.17 points", "3.62 points", "≤ 1.50 points")),
        ("accuracy_drop_vs_fp32", 0.01, 0.014999, 0.015, ("1.0000 points", "1.4999 points", "≤ 1.5000 points")),
        ("agreement", 0.99, 0.95, 0.9, ("99.00 %", "95.00 %", "≥ 90.00 %")),
        ("int8_coverage", 1.0, None, 1.0, ("100.00 %", "–", "≥ 100.00 %")),
        ("latency_p95", 0.2251, None, 5.0, ("0.225 ms", "–", "≤ 5 ms")),
        ("speedup_vs_fp32", 2.5, None, 2.0, ("2.5 ×", "–", "≥ 2 ×")),
        ("size", 100392, None, 200000, ("100,392 B", "–", "≤ 200,000 B")),
        ("parity", 5.722e-06, None, 1e-3, ("5.72e-06", "–", "≤ 0.001")),
        ("parity", 0.00100001, None, 1e-3, ("0.00100001", "–", "≤ 0.001")),
        ("runtime", None, None, None, ("–", "–", "–")),
    ],
)
def test_figures_of_checks(name: str, observed: Any, bound: Any, limit: Any, shown: tuple[str, str, str]) -> None:
    assert wording.figures(check(name, "pass", observed=observed, bound=bound, limit=limit)) == shown


def test_figures() -> None:
    assert [wording.size(n) for n in (None, 999, 118_300, 12_345_678)] == ["–", "999 B", "118.3 kB", "12.35 MB"]
    assert [wording.milliseconds(v) for v in (0.1839, 4.2729, 38.21, 412.4)] == ["0.184", "4.27", "38.2", "412"]
    assert [wording.difference(v) for v in (0.0217, -0.0017, -1e-9)] == ["2.17", "−0.17", "0.00"]
    assert [wording.difference(v, sign=True, digits=1) for v in (0.1, -0.1, 0.0)] == ["+10.0", "−10.0", "0.0"]
    assert [wording.percent(v) for v in (None, 0.98833)] == ["–", "98.83 %"]
