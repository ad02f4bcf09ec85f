"""The gate's policy: limits that an artifact must meet before it ships."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from nayer_edge.config import Count, Fraction, Positive, Section
from nayer_edge.errors import UsageError, nearest

from .checking import checked, known_keys


class AccuracyPolicy(Section):
    """Limits on paired accuracy drops, as fractions in [0, 1]; docs/ARCHITECTURE.md explains the statistics."""

    max_drop_vs_fp32: Fraction | None = None
    """largest drop against the FP32 student (the cost of quantization)"""
    max_drop_vs_teacher: Fraction | None = None
    """largest drop against the teacher (the cost of the whole pipeline)"""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """confidence level of the one-sided bounds, in all checks that use them"""


class AgreementPolicy(Section):
    """Limit on the fraction of images on which artifact and teacher predict the same class."""

    min: Fraction | None = None
    """smallest allowed fraction"""


class LatencyPolicy(Section):
    """Limits on latency at batch 1, on the machine that ran `validate`."""

    max_p95_ms: Positive | None = None
    """largest 95th percentile of the latency, in ms"""
    min_speedup_vs_fp32: Positive | None = None
    """smallest speed-up over the FP32 student"""


class SizePolicy(Section):
    """Limit on an artifact's file size."""

    max_bytes: Count | None = None
    """largest size in bytes"""


class Int8Policy(Section):
    """Limit on the fraction of eligible convolutions and matrix products that run in INT8. Without one, layers that the
    export left in float to keep its accuracy do not fail the gate; the verdict states the fraction."""

    min_coverage: Fraction | None = None
    """smallest allowed fraction; 1: all of them"""


class ParityPolicy(Section):
    """Limit on the difference between the logits of the FP32 ONNX model and the torch student."""

    max_abs_diff: Positive | None = None
    """largest absolute difference of a logit"""


class PerClassPolicy(Section):
    """Limit on the accuracy drop of a single class against the FP32 student."""

    max_drop: Fraction | None = None
    """largest drop of any class"""
    advisory: bool = True
    """report violations without failing the gate"""


class BaselinePolicy(Section):
    """Limit on the paired accuracy drop against the same artifact of the baseline run in `gate --references`."""

    max_drop: Fraction | None = None
    """largest drop against the previous release"""


class Policy(Section):
    """Limits that an artifact must meet before it ships. Checks without a limit are skipped."""

    artifacts: Annotated[tuple[str, ...], Field(min_length=1)] = ("int8.cpu",)
    """artifacts to check, by their names in report.json"""
    accept_simulated: bool = False
    """accept graphs for another device, such as int8.arm on an x86 machine, and FP16 files for OpenVINO and LiteRT.
    Their accuracy is that of the graph as written, computed in float32; neither speed nor the device's own kernels are
    measured"""
    accuracy: AccuracyPolicy = AccuracyPolicy(max_drop_vs_fp32=0.015, max_drop_vs_teacher=0.04)
    baseline: BaselinePolicy = BaselinePolicy()
    agreement: AgreementPolicy = AgreementPolicy()
    latency: LatencyPolicy = LatencyPolicy()
    size: SizePolicy = SizePolicy()
    int8: Int8Policy = Int8Policy()
    parity: ParityPolicy = ParityPolicy(max_abs_diff=1e-3)
    per_class: PerClassPolicy = PerClassPolicy()


class Baseline(Section):
    """The release to compare with."""

    run: Annotated[str, Field(min_length=1)]
    """a validated run folder, or a folder with its report.json; relative to this file"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of its report.json; without it, anyone with write access there can lower the bar"""


class References(Section):
    """`references.toml`: runs that `gate` compares with, in addition to the policy's limits."""

    baseline: Baseline
    """the previous release"""


def make_policy(values: dict[str, Any], source: str) -> Policy:
    """Validates a gate policy and reports all problems at once.

    Raises:
        UsageError: it is invalid.
    """
    fix = "Correct these lines. `nayer-edge gate RUN --print-policy` prints the current policy."
    return checked(Policy, values, f"The policy {source} is invalid:", fix)


def limited(policy: Policy, limits: Mapping[str, Any]) -> Policy:
    """A policy with some of its keys changed.

    Args:
        limits: by the name of the key where only one section has it (max_drop_vs_fp32), by section and key
            ("per_class.max_drop"), or a section with several keys, which single keys override; None removes a limit, or
            all limits of a section.

    Raises:
        UsageError: there is no such key, several sections have it, or its value is invalid.
    """
    if not limits:
        return policy
    values = policy.model_dump()
    # Sections first, so that single keys override them, in whatever order they were given.
    for place, name, value in sorted(((_place(n), n, v) for n, v in limits.items()), key=lambda item: len(item[0])):
        if len(place) == 1 and isinstance(values[name], dict) and isinstance(value, Mapping):
            values[name] |= value
        elif len(place) == 1 and isinstance(values[name], dict) and value is None:
            # Without limits; the confidence is that of other checks, too.
            kept = {key: values[name][key] for key in ("confidence",) if key in values[name]}
            values[name] = type(getattr(policy, name))().model_dump() | kept
        elif len(place) == 1:
            values[name] = value
        else:
            values[place[0]][place[1]] = value
    return checked(Policy, values, "Invalid limits:", "Correct them. docs/REFERENCE.md lists the keys of a policy.")


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
    """Validates `references.toml` and reports all problems at once.

    Raises:
        UsageError: it is invalid.
    """
    fix = 'Correct these lines. For example:\n[baseline]\nrun = "runs/last"'
    return checked(References, values, f"The references {source} are invalid:", fix)
