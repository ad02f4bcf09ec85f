"""The policy: what an artifact must satisfy before it ships."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    Field,
)

from nayer_edge.config import Count, Fraction, Positive, Section
from nayer_edge.errors import UsageError, nearest

from ..recipes.checking import checked, known_keys


class AccuracyPolicy(Section):
    """Paired accuracy drops, fractions in [0, 1]; see docs/ARCHITECTURE.md for the statistics."""

    max_drop_vs_fp32: Fraction | None = None
    """against the FP32 student: what quantization may cost"""
    max_drop_vs_teacher: Fraction | None = None
    """against the teacher: what the whole way may cost"""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """of the one-sided bounds of every check that has one"""


class AgreementPolicy(Section):
    """Fraction of images on which artefact and teacher choose the same class."""

    min: Fraction | None = None
    """at least so many"""


class LatencyPolicy(Section):
    """At batch 1, on the machine that ran `validate`."""

    max_p95_ms: Positive | None = None
    """19 of 20 runs take no longer, in ms"""
    min_speedup_vs_fp32: Positive | None = None
    """how many times as fast as the FP32 student"""


class SizePolicy(Section):
    """Of one artefact's file."""

    max_bytes: Count | None = None
    """bytes"""


class Int8Policy(Section):
    """Fraction of eligible convolutions and matrix products that run in INT8."""

    min_coverage: Fraction | None = None
    """at least so many; 1: all of them"""


class ParityPolicy(Section):
    """Largest absolute logit difference between FP32 ONNX and the torch student."""

    max_abs_diff: Positive | None = None
    """of a logit"""


class PerClassPolicy(Section):
    """Drop of any single class against the FP32 student."""

    max_drop: Fraction | None = None
    """no class loses more"""
    advisory: bool = True
    """report, but do not fail"""


class BaselinePolicy(Section):
    """Paired accuracy drop against the same artefact of the baseline run that `gate --references` names."""

    max_drop: Fraction | None = None
    """against the release before"""


class Policy(Section):
    """What an artefact must satisfy before it ships. A check whose limit is absent is not made."""

    artifacts: Annotated[tuple[str, ...], Field(min_length=1)] = ("int8.cpu",)
    """names as in report.json"""
    accuracy: AccuracyPolicy = AccuracyPolicy(max_drop_vs_fp32=0.015, max_drop_vs_teacher=0.04)
    baseline: BaselinePolicy = BaselinePolicy()
    agreement: AgreementPolicy = AgreementPolicy()
    latency: LatencyPolicy = LatencyPolicy()
    size: SizePolicy = SizePolicy()
    int8: Int8Policy = Int8Policy(min_coverage=1.0)
    parity: ParityPolicy = ParityPolicy(max_abs_diff=1e-3)
    per_class: PerClassPolicy = PerClassPolicy()


class Baseline(Section):
    """The release to compare with."""

    run: Annotated[str, Field(min_length=1)]
    """a validated run folder, or a folder with its report.json and predictions.npz; relative to this file"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """of its report.json; without it, whoever can write there can lower the bar"""


class References(Section):
    """`references.toml`: what `gate` compares a run with, beside the limits of the policy."""

    baseline: Baseline
    """the release before"""


def make_policy(values: dict[str, Any], source: str) -> Policy:
    """Checks a gate policy; all its problems are reported at once.

    Raises:
        UsageError: it does not hold.
    """
    fix = "Mend these lines. `nayer-edge gate RUN --print-policy` shows the one in force."
    return checked(Policy, values, f"The policy {source} does not hold:", fix)


def limited(policy: Policy, limits: Mapping[str, Any]) -> Policy:
    """A policy with some of its keys changed.

    Args:
        limits: by the name of the key where only one section has it (max_drop_vs_fp32), by section and key
            ("per_class.max_drop"), or a section with several keys; None lifts a limit.

    Raises:
        UsageError: there is no such key, several sections have it, or its value does not hold.
    """
    if not limits:
        return policy
    values = policy.model_dump()
    for name, value in limits.items():
        place = _place(name)
        if isinstance(value, Mapping) and len(place) == 1:
            values[name] |= value
        elif len(place) == 1:
            values[name] = value
        else:
            values[place[0]][place[1]] = value
    return checked(Policy, values, "These limits do not hold:", "Mend them: docs/REFERENCE.md lists the policy's keys.")


def _place(name: str) -> tuple[str, ...]:
    """Where a key lies in a policy: its section, and itself."""
    sections = known_keys(Policy)
    keys = [(section, key) for section in sections for key in known_keys(Policy, (section,))]
    if name in sections:
        return (name,)
    found = [place for place in keys if name in (place[1], ".".join(place))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"The key '{name}' of a policy is ambiguous.",
            fix=f"Write one of: {', '.join('.'.join(place) for place in found)}.",
        )
    raise UsageError(f"A policy has no key '{name}'.{nearest(name, [*sections, *(key for _, key in keys)])}")


def make_references(values: dict[str, Any], source: str) -> References:
    """Checks what a run is to be compared with; all problems are reported at once.

    Raises:
        UsageError: it does not hold.
    """
    fix = 'Mend these lines. For example: [baseline] run = "runs/last"'
    return checked(References, values, f"The references {source} do not hold:", fix)
