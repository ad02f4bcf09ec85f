"""Chooses the student and the crop for an image size, and the sizes of a trial."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

from nayer_edge.config import InputSpec
from nayer_edge.errors import NayerEdgeError

from ..costs.fitting import LARGE
from ..costs.model_cost import Cost, cost_of

Effort = Literal["trial", "normal"]

TRIAL: dict[str, dict[str, Any]] = {
    "synthesis": {"batch": 32, "g_steps": 3, "rounds": 1, "warmup_rounds": 2},
    "distill": {
        **{"epochs": 2, "warmup_epochs": 1, "steps": 3, "batch": 32},
        **{"lr": 0.1, "bank_mib": 64, "holdout_rounds": 1},
    },
    "export": {"calibration_images": 32},
    "validate": {"synthetic_images": 64},
}
"""a run that checks in minutes that everything works; its student is not meant to be accurate"""


def pad_for(spec: InputSpec) -> int:
    """Padding in pixels before the random crop: 4 at 32, as published; 2 at 16, 16 at 224."""
    return max(1, min(min(spec.height, spec.width) // 8, 16))


def student_for(spec: InputSpec, classes: int, teacher: Cost, own: str) -> str:
    """Proposes a student: the largest of the usual ones for the image size that has at most a third of the teacher's
    parameters and no more operations than the teacher; if there is none, the one with the fewest parameters."""
    small = ("nayer:wrn_16_2", "nayer:wrn_16_1", "nayer:resnet8")
    large = ("torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5")
    names = [name for name in (large if max(spec.height, spec.width) > LARGE else small) if name != own]
    costs: dict[str, Cost] = {}
    for name in names:
        with contextlib.suppress(NayerEdgeError):
            costs[name] = cost_of(name, spec, classes)
    fit = [n for n, cost in costs.items() if cost.parameters <= teacher.parameters / 3 and cost.flop <= teacher.flop]
    return fit[0] if fit else min(costs, key=lambda name: costs[name].parameters, default=names[-1])
