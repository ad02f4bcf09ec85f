"""Plans a run for a time budget: a pure function of the measured cost of each step on this machine.

A run with schedule `fast` has three phases: it fills the memory bank, trains the student at a constant learning rate
while it makes more images, and then decays the rate. The split between images and student steps was fitted to
measurements (`benchmarks/search.py`, docs/LOG.md); the constants below are the result.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from nayer_edge.errors import UsageError

IMAGES_PER_STEP = 15.0
"""synthetic images per student step of BATCH images"""
FILLED = 0.2
"""fraction of the images made before student training starts"""
DECAY = 0.25
"""fraction of the student steps in which the learning rate decays"""
BATCH = 256
"""images per student step"""
ROUND = 100
"""images per synthesis round; at least one per class"""
VIEWS = 4
"""augmented views per image whose teacher logits are cached"""
G_STEPS = ((20, 5), (400, 10), (100_000, 20))
"""(maximum number of classes, optimisation steps per round)"""
RESERVE = 0.05
"""fraction of the rounds reserved for calibration and as a synthetic hold-out"""
EPOCHS = 40
"""student epochs per run; sets the granularity of metrics, checkpoints and `--more` to 1 to 3 % of the run"""
MARGIN = 0.05
"""fraction of the budget left unplanned, for metrics, checkpoints and other load on the machine"""
LEAST_STEPS = 100
"""minimum student steps for a useful student"""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Costs:
    """Costs in seconds on this machine, medians of a short measurement.

    Attributes:
        synthesis_step: one optimisation step on a round of `batch` images, without L_adv.
        adversary: additional cost of L_adv per step.
        student_step: one step on `student_batch` images whose teacher logits are cached.
        teacher_batch: one teacher forward pass on `student_batch` images.
        rest: everything after the student: export, quantization, validation, report.
    """

    synthesis_step: float
    adversary: float
    student_step: float
    teacher_batch: float
    rest: float
    batch: int = ROUND
    student_batch: int = BATCH


@dataclass(frozen=True)
class BudgetPlan:
    """The sizes of a run and its expected duration.

    Attributes:
        seconds: expected seconds per phase: fill, train, decay, rest.
        images: number of images from all rounds, including the reserved ones.
        steps_in_all: total student steps.
    """

    g_steps: int
    rounds: int
    warmup_rounds: int
    warmup_epochs: int
    epochs: int
    decay_epochs: int
    steps: int
    images: int
    steps_in_all: int
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Expected seconds of the whole run."""
        return sum(self.seconds.values())


def parse_budget(text: str) -> float:
    """Parses a duration into seconds: "90s", "20m", "1h", "1h30m", "1.5h" or "2d".

    Raises:
        UsageError: not such a duration, zero, or 366 days and more.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip().lower())
    whole = "".join(number + unit for number, unit in parts)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not parts or whole != re.sub(r"\s", "", text.strip().lower()) or not 0 < seconds < 366 * _UNITS["d"]:
        raise UsageError(f"'{text}' is not a time budget.", fix="For example: --budget 20m, --budget 1h30m")
    return seconds


def duration(seconds: float) -> str:
    """A rounded, readable duration: "50 s", "12 min", "1 h 30 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 and minutes < 600 else f"{round(minutes / 60)} h"


def g_steps_for(classes: int) -> int:
    """Optimisation steps per round: with more classes, images need more steps to show their class."""
    return next(steps for most, steps in G_STEPS if classes <= most)


def plan(budget: float, costs: Costs, classes: int) -> BudgetPlan:
    """Plans the run that fills a budget.

    Args:
        budget: seconds for the whole run, export and validation included.
        classes: the teacher's number of classes.

    Raises:
        UsageError: the budget is too small for a useful student; the message gives the minimum.
    """
    g_steps = g_steps_for(classes)
    image = g_steps * costs.synthesis_step / costs.batch
    later_image = g_steps * (costs.synthesis_step + costs.adversary) / costs.batch
    views = min(VIEWS * IMAGES_PER_STEP * (1 - RESERVE), costs.student_batch) / costs.student_batch
    images = IMAGES_PER_STEP * (FILLED * image + (1 - FILLED) * later_image)
    step = costs.student_step + views * costs.teacher_batch + images
    available = budget * (1 - MARGIN) - costs.rest
    wanted = available / step
    if wanted < LEAST_STEPS:
        least = (LEAST_STEPS * step + costs.rest) / (1 - MARGIN)
        raise UsageError(
            f"A budget of {duration(budget)} is too small for this teacher, student and machine.",
            why=f"Export and validation take about {duration(costs.rest)}, and the minimum of {LEAST_STEPS} student "
            f"steps with their images about {duration(LEAST_STEPS * step)}.",
            fix=f"Use at least {duration(least * 1.05)}: --budget {math.ceil(least * 1.05 / 60)}m",
        )
    student_step = costs.student_step + views * costs.teacher_batch
    # Enough steps per epoch to match at least one full round of images.
    steps = max(math.ceil(costs.batch / IMAGES_PER_STEP), round(wanted / EPOCHS))
    rounds = max(1, round((1 - FILLED) / (1 - DECAY) * IMAGES_PER_STEP * steps / costs.batch))
    fill = max(2, round(FILLED * IMAGES_PER_STEP * wanted / costs.batch))
    warmup_epochs = min(10, fill // 2)
    warmup_rounds = round(fill / warmup_epochs)
    fill_seconds = warmup_epochs * warmup_rounds * costs.batch * image
    train_epoch = steps * student_step + rounds * costs.batch * later_image
    # Split the remaining time so that DECAY of the epochs decay the learning rate.
    whole = (available - fill_seconds) / ((1 - DECAY) * train_epoch + DECAY * steps * student_step)
    decay = max(1, round(DECAY * whole))
    trained = max(1, round((available - fill_seconds - decay * steps * student_step) / train_epoch))
    images_made = (warmup_epochs * warmup_rounds + rounds * trained) * costs.batch
    student_epochs = trained + decay
    seconds = {
        "fill": fill_seconds,
        "train": trained * train_epoch,
        "decay": decay * steps * student_step,
        "rest": costs.rest,
    }
    return BudgetPlan(
        g_steps=g_steps,
        rounds=rounds,
        warmup_rounds=warmup_rounds,
        warmup_epochs=warmup_epochs,
        epochs=warmup_epochs + student_epochs,
        decay_epochs=decay,
        steps=steps,
        images=images_made,
        steps_in_all=steps * student_epochs,
        seconds=seconds,
    )


def settings(made: BudgetPlan, costs: Costs, image_bytes: int) -> dict[str, dict[str, Any]]:
    """The plan as recipe sections: schedule `fast` with the planned sizes."""
    bank = made.images * image_bytes
    return {
        "synthesis": {
            "batch": costs.batch,
            "g_steps": made.g_steps,
            "rounds": made.rounds,
            "warmup_rounds": made.warmup_rounds,
            # One generator for the whole run: after each re-initialisation about forty rounds are poor.
            "g_life": made.epochs,
            "reserve": RESERVE,
        },
        "distill": {
            "epochs": made.epochs,
            "warmup_epochs": made.warmup_epochs,
            "steps": made.steps,
            "batch": costs.student_batch,
            "optimizer": "muon",
            "lr": 0.1,
            "muon_lr": 0.05,
            "schedule": "constant",
            "decay_epochs": made.decay_epochs,
            "weight_decay": 5e-4,
            "views": VIEWS,
            "bank_mib": max(1, math.ceil(bank / 2**20)),
            "holdout_rounds": 1,
        },
    }
