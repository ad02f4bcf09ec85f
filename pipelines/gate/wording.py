"""How the report says things: the verdict in a sentence, what it can promise, checks by title, figures with units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..measurements import Dataset
from .judgement import CHECKS

_TITLES = {
    "runtime": "Runs in the stated precision",
    "accuracy_drop_vs_fp32": "Accuracy drop against the FP32 student",
    "accuracy_drop_vs_teacher": "Accuracy drop against the teacher",
    "accuracy_drop_vs_baseline": "Accuracy drop against the release before",
    "agreement": "Agreement with the teacher",
    "per_class_drop": "Largest drop of any class",
    "int8_coverage": "Share of products in INT8",
    "latency_p95": "Latency, 95th percentile",
    "speedup_vs_fp32": "Speed against FP32",
    "size": "File size",
    "parity": "ONNX against the torch student, largest logit difference",
}
_AT_LEAST = {"agreement", "int8_coverage", "speedup_vs_fp32"}
_SHOWN_REASONS = 3


@dataclass(frozen=True)
class Sentence:
    """The verdict in words.

    Attributes:
        lead: one plain sentence.
        reasons: the checks behind it, each a sentence with what was observed, its bound and its limit.
        more: how many further ones the table of checks holds.
    """

    lead: str
    reasons: tuple[str, ...]
    more: int = 0


def sentence(verdict: Mapping[str, Any]) -> Sentence:
    """The reason of a verdict, as `verdict.json` holds it: what failed or is open, else the closest call."""
    deciding = [check for check in verdict["checks"] if not check.get("advisory")]
    count = len(deciding)
    outcome = verdict["verdict"]
    if outcome == "pass":
        close = min((check for check in deciding if check["bound"] is not None), key=_room, default=None)
        lead = "The one check holds." if count == 1 else f"All {count} checks hold."
        return Sentence(lead, () if close is None else (f"The closest call: {_lowered(close['detail'])}",))
    decisive = [check for check in deciding if check["verdict"] == outcome]
    names = _listed(list(dict.fromkeys(_lowered(title(check["name"])) for check in decisive)))
    which = f"{len(decisive)} of {count} checks"
    if outcome == "fail":
        lead = f"{which} {'fails' if len(decisive) == 1 else 'fail'}: {names}."
    else:
        lead = f"Nothing fails, but {which} {'is' if len(decisive) == 1 else 'are'} not settled: {names}."
    details = [check["detail"] for check in decisive]
    return Sentence(lead, tuple(details[:_SHOWN_REASONS]), max(0, len(details) - _SHOWN_REASONS))


def _room(check: Mapping[str, Any]) -> float:
    """How far the bound lies from its limit, as a part of what the limit leaves."""
    limit, bound = check["limit"], check["bound"]
    if check["name"] in _AT_LEAST:
        return (bound - limit) / max(1 - limit, 1e-9)
    return (limit - bound) / max(limit, 1e-9)


def promise(dataset: Dataset) -> tuple[str, ...]:
    """What the images of this verdict can show, and what not; one sentence each."""
    if dataset.kind == "holdout":
        return (
            "Teacher, student and every artefact saw the same labelled images, which were used to measure and for "
            "nothing else: no image of theirs went into student, calibration or choice of a model.",
            "The bounds hold for images like these; they say nothing about a camera, a site or a class that is not "
            "among them.",
        )
    return (
        "These images are synthetic: fresh draws of the trained generator, in neither memory bank nor calibration. "
        "Nobody knows their true class, so the teacher's answer stands for it.",
        "What such a verdict can promise: the artefact answers as its teacher does on images like these, and export "
        "and quantization have broken nothing that shows there.",
        "What it cannot promise: any accuracy on real images. Teacher and artefact may be wrong together, and real "
        "images may be harder than these. Labelled real images, even a few hundred, would tell.",
    )


def title(name: str) -> str:
    """A check's name for people."""
    return _TITLES.get(name, name.replace("_", " ").capitalize())


def check_figures(check: Mapping[str, Any]) -> dict[str, str]:
    """Observed value, bound and limit of a check with its unit; "–" where there is none.

    Bound and limit get as many decimals as it takes to tell them apart.
    """
    scale, unit, digits, kind = _unit(check["name"])
    limit, compared = check["limit"], check["bound"] if check["bound"] is not None else check["observed"]

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{scale * value:,.{digits}{kind}}{unit}"

    while digits < 9 and limit is not None and compared not in (None, limit) and shown(limit) == shown(compared):
        digits += 1
    relation = "≥ " if check["name"] in _AT_LEAST else "≤ "
    return {
        "observed": shown(check["observed"]),
        "bound": shown(check["bound"]),
        "limit": "–" if limit is None else relation + shown(limit),
    }


def _unit(name: str) -> tuple[float, str, int, str]:
    """Scale, unit, least digits of a check's figures, and whether those are decimals or significant ones."""
    unit = CHECKS.get(name, "")
    if unit == "fraction":
        return 100.0, " points" if "drop" in name else " %", 2, "f"
    return {"bytes": (1.0, " B", 0, "f"), "": (1.0, "", 3, "g")}.get(unit, (1.0, f" {unit}", 3, "g"))


def percent(fraction: float | None) -> str:
    """ "98.83 %", or "–"."""
    return "–" if fraction is None else f"{100 * fraction:.2f} %"


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


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _lowered(text: str) -> str:
    """For the middle of a sentence; names such as INT8 or ONNX keep their capitals."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]
