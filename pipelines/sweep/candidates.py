"""The students of a sweep: which ones are proposed, which can be built, and which no training can make pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from nayer_edge.config import InputSpec
from nayer_edge.errors import NayerEdgeError, UsageError

from ..costs.students import StudentCost, measure, students_for
from ..recipes.policy import Policy

NARROW = (
    *("nayer:resnet8_w4", "nayer:resnet8_w8", "nayer:resnet20_w4", "nayer:resnet20_w8"),
    *("nayer:mobilenet_w4", "nayer:mobilenet_w8"),
)
"""students below the usual ones, from a few thousand parameters"""
LEAST = 2_000
"""parameters of the smallest proposal"""
PART = 3
"""the largest proposal has at most a third of the teacher's parameters"""
FEW = 5
"""number of proposals"""
CLEARLY = {"latency": 1.25, "size": 1.05}
"""a student is stopped before it is trained only if it exceeds a limit by this factor: latencies vary, and the file of
untrained weights differs a little from the final one"""


def proposed(teacher_params: int, spec: InputSpec, classes: Sequence[str]) -> list[str]:
    """Up to `FEW` students for a teacher, evenly spread in the logarithm of their parameters, smallest first.

    Raises:
        UsageError: there is no such student.
    """
    sizes = {}
    for model in dict.fromkeys((*NARROW, *students_for(spec))):
        try:
            params = measure([model], spec, len(classes), latency=False)[0].params
        except NayerEdgeError:
            # It does not accept this input, or its library is not installed.
            continue
        if LEAST <= params <= teacher_params / PART:
            sizes[model] = params
    if not sizes:
        raise UsageError(
            f"No student is proposed for a teacher of {teacher_params:,} parameters.",
            fix="Name the students: --students nayer:resnet8,nayer:wrn_16_1",
        )
    return spread(sizes)


def spread(sizes: dict[str, int], count: int = FEW) -> list[str]:
    """Names whose sizes differ as much as possible on a logarithmic scale, with the smallest and the largest; smallest
    first. The others are added one by one, each the farthest from those that were chosen.

    Args:
        sizes: name → parameters.
    """
    order = sorted(sizes, key=lambda name: (sizes[name], name))
    if len(order) <= count:
        return order
    chosen = [order[0], order[-1]]

    def gap(name: str) -> float:
        return min(abs(math.log(sizes[name] / sizes[other])) for other in chosen)

    while len(chosen) < count:
        chosen.append(max(order, key=gap))
    return sorted(chosen, key=order.index)


def require_distinct(models: Iterable[str]) -> list[str]:
    """The students as given, at least one.

    Raises:
        UsageError: one is listed twice, or there is none.
    """
    found = [name.strip() for name in models if name.strip()]
    twice = [name for name in dict.fromkeys(found) if found.count(name) > 1]
    if twice:
        raise UsageError(
            f"Listed twice: {', '.join(twice)}.", fix="Name every student once: --students nayer:resnet8,nayer:wrn_16_1"
        )
    if not found:
        raise UsageError("No students are named.", fix="For example: --students nayer:resnet8,nayer:wrn_16_1")
    return found


def student_cost(model: str, spec: InputSpec, classes: Sequence[str], policy: Policy) -> StudentCost:
    """What a student costs, measured if the policy limits its latency or size, else computed from its layers.

    Raises:
        NayerEdgeError: it cannot be built for this input, or its library is missing.
    """
    timed = policy.latency.max_p95_ms is not None or policy.size.max_bytes is not None
    return measure([model], spec, len(classes), latency=timed)[0]


def cannot_pass(cost: StudentCost, policy: Policy) -> str:
    """The limit that a student clearly exceeds whatever its weights; empty if there is none."""
    most = policy.latency.max_p95_ms
    for artifact, p95 in (("fp32", cost.fp32_p95_ms), ("int8.cpu", cost.int8_p95_ms)):
        if artifact in policy.artifacts and most is not None and p95 is not None and p95 > CLEARLY["latency"] * most:
            return f"its {artifact} takes {p95:.3g} ms (95th percentile), the limit is {most:.3g} ms"
    limit = policy.size.max_bytes
    if "int8.cpu" in policy.artifacts and cost.int8_measured and limit and cost.int8_bytes > CLEARLY["size"] * limit:
        return f"its int8.cpu has {cost.int8_bytes:,} bytes, the limit is {limit:,}"
    return ""
