"""Plans runs for a time budget: pure functions of the measured cost of each step on this machine.

A run planned for a budget has three phases: it fills the memory bank, trains the student at a constant learning rate
while it makes more images, and then decays the rate. The split between images and student steps was fitted to
measurements (`benchmarks/search.py`, docs/LOG.md); the constants below are the result.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nayer_edge.config import OF_PRIOR, Distill, Prior, Synthesis
from nayer_edge.distillation import Epoch, Length
from nayer_edge.errors import UsageError

from ..recipes.schema import Budget
from ..reserved import missing_rounds
from .durations import duration

IMAGE_TIME = 0.35
"""fraction of the time of distillation in which images are made; the default of the recipe's image_time"""
OWN_TIME = 0.15
"""the same for a run that starts with more images than it needs, so that its own student, too, shapes some of them"""
LEAST_IMAGES, MOST_IMAGES = 2.0, 15.0
"""limits of the synthetic images per student step of BATCH images, in proportion for a smaller batch; the paper has
2 at E = 100"""
FILLED = 0.2
"""fraction of the images made before student training starts"""
DECAY = 0.3
"""fraction of the student steps in which the learning rate decays"""
BATCH = 256
"""images per student step"""
ROUND = 100
"""images per synthesis round; at least one per class"""
VIEWS = 8
"""augmented views per image whose teacher logits are cached"""
G_STEPS = ((20, 10), (100_000, 20))
"""(maximum number of classes, optimisation steps per round); measured with 10 classes only"""
MUON_RATE = 0.025
"""peak learning rate of the student's convolutions"""
RESERVE = 0.05
"""fraction of the rounds reserved for calibration and as a synthetic hold-out"""
EPOCHS = 40
"""student epochs per run; sets the granularity of metrics, checkpoints and `--more` to 1 to 3 % of the run"""
MARGIN = 0.05
"""fraction of the budget left unplanned, for metrics, checkpoints and other load on the machine"""
NEVER = 1_000_000
"""epochs after which the generator is re-initialised"""
LEAST_STEPS = 100
"""minimum student steps for a useful student"""
LEAST_ROUNDS = 10
"""minimum rounds of images, if there are none yet"""
TOLERANCE = 0.04
"""deviation of the projected end from the plan that is accepted shortly before the decay"""
EARLY_TOLERANCE = 0.5
"""additional deviation that is accepted after the first student epoch; it falls linearly to 0 until the decay"""
OTHER_MACHINE = 2.0
"""ratio of measured to planned time of the first epochs above which, or below whose inverse, all phases are rescaled"""
RECENT = 9
"""student epochs whose seconds are the pace of a run: later epochs are faster, because views of images are cached"""
SETTLED = 3
"""student epochs before the length is adapted, unless waiting for them would exceed the budget"""


class TooShortError(UsageError):
    """The time is too short for a useful student.

    Attributes:
        least: seconds that would do.
    """

    def __init__(self, what: str, why: str, fix: str, least: float) -> None:
        super().__init__(what, why, fix)
        self.least = least


@dataclass(frozen=True)
class Costs:
    """Costs in seconds on this machine, medians of a short measurement.

    Attributes:
        synthesis_step: one optimisation step on a round of `batch` images, without L_adv.
        adversary: additional cost of L_adv per step.
        student_step: one step on `student_batch` images whose teacher logits are cached.
        teacher_batch: one teacher forward pass on `student_batch` images.
        rest: everything after the student: export, quantization, validation, report; without the drawing of images.
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


def g_steps_for(classes: int) -> int:
    """Optimisation steps per round: with more classes, images need more steps to show their class."""
    return next(steps for most, steps in G_STEPS if classes <= most)


def images_per_step(image: float, costs: Costs, image_time: float = IMAGE_TIME) -> float:
    """Images per student step, so that making them takes this fraction of the time, within the limits above.

    Args:
        image: seconds per image.
    """
    ratio = image_time / (1 - image_time)
    # x · image = ratio · (student_step + fresh_views(x) · teacher_batch), where fresh_views is linear up to 1.
    answers = ratio * VIEWS * (1 - RESERVE) * costs.teacher_batch / costs.student_batch
    found = ratio * costs.student_step / (image - answers) if image > answers else math.inf
    if VIEWS * found * (1 - RESERVE) > costs.student_batch:
        found = ratio * (costs.student_step + costs.teacher_batch) / image
    return min(max(found, LEAST_IMAGES * costs.student_batch / BATCH), MOST_IMAGES * costs.student_batch / BATCH)


def own_images(steps: float, available: float, image: float, bank: int, costs: Costs, image_time: float) -> float:
    """Images that a run makes if it starts with another run's: as if it had made those itself, too.

    They then take a fraction of the time of both, within the same limits per student step; in any case a few are made.

    Args:
        steps: student steps of the run.
        available: seconds for its images and its steps.
        image: seconds per image.
        bank: number of images that it starts with.
        image_time: fraction of the time for images.
    """
    samples = steps * costs.student_batch / BATCH
    balanced = image_time * available / image - (1 - image_time) * bank
    within = min(max(balanced, LEAST_IMAGES * samples - bank), MOST_IMAGES * samples - bank)
    return max(within, min(OWN_TIME * available / image, LEAST_IMAGES * samples), 2 * costs.batch)


def fresh_views(per_step: float, costs: Costs) -> float:
    """Fraction of a student batch whose teacher logits are not cached yet."""
    return min(VIEWS * per_step * (1 - RESERVE) / costs.student_batch, 1.0)


def fresh_views_of(bank: int, per_step: float, steps: float, costs: Costs) -> float:
    """The same, on average over so many steps, if the run starts with a bank of images that no teacher has answered.

    Of V views, n uniform draws reach V · (1 − e^(−n/V)); see `answers_left`.
    """
    draws = steps * costs.student_batch
    views = VIEWS * (bank + per_step * steps * (1 - RESERVE))
    return views * -math.expm1(-draws / views) / draws


def plan(
    budget: float,
    costs: Costs,
    classes: int,
    *,
    bank: int | None = None,
    prior: Prior = "batchnorm",
    wanted: Mapping[str, int] | None = None,
    reserved: int = 0,
    image_time: float = IMAGE_TIME,
) -> BudgetPlan:
    """Plans the run that fills a budget.

    Args:
        budget: seconds for the whole run, export and validation included.
        classes: the teacher's number of classes.
        bank: number of images that a run starts with if it takes over another run's. It makes none before its student
            is trained, and then the fewer, the more there are; see `own_images`.
        prior: what makes images.
        wanted: purpose of `pipelines.reserved` → number of images. Those that the run does not reserve are drawn after
            the student is trained.
        reserved: number of rounds that the run with the bank has reserved.
        image_time: fraction of the time of distillation in which images are made.

    Raises:
        TooShortError: the budget is too small for a useful student; the message gives the minimum.
    """
    g_steps = OF_PRIOR.get(prior, {}).get("g_steps") or g_steps_for(classes)

    def fitting(budget: float) -> BudgetPlan:
        drawing = 0.0
        while True:
            made = _plan(budget, costs, g_steps, bank, drawing, image_time)
            held = reserved + math.floor(RESERVE * made.images / costs.batch)
            needed = missing_rounds(wanted or {}, held, costs.batch) * g_steps * costs.synthesis_step
            if needed <= drawing:
                return made
            # More time for drawing leaves less for rounds, so that this grows until it suffices.
            drawing = needed

    try:
        return fitting(budget)
    except TooShortError as error:
        what, last = error.what, error
    # What would do: the less time there is, the more images must be drawn.
    while True:
        try:
            fitting(last.least)
        except TooShortError as error:
            last = error
        else:
            raise TooShortError(what, last.why, last.fix, last.least)


def _plan(budget: float, costs: Costs, g_steps: int, bank: int | None, drawing: float, image_time: float) -> BudgetPlan:
    """As `plan`.

    Args:
        g_steps: optimisation steps per round.
        drawing: seconds for the calibration and hold-out images that are not reserved.
    """
    rest = costs.rest + drawing
    image = g_steps * costs.synthesis_step / costs.batch
    later_image = g_steps * (costs.synthesis_step + costs.adversary) / costs.batch
    available = budget * (1 - MARGIN) - rest
    filled = FILLED if bank is None else 0.0
    mean_image = filled * image + (1 - filled) * later_image
    per_step = images_per_step(mean_image, costs, image_time)
    if bank is None and image_time > IMAGE_TIME:
        # While the student is trained, no more are made than usual, so that the run can be continued like any other.
        filled = 1 - (1 - FILLED) * images_per_step(mean_image, costs) / per_step
        mean_image = filled * image + (1 - filled) * later_image
    fewest = LEAST_STEPS
    if bank is None:
        fewest = max(fewest, math.ceil(LEAST_ROUNDS * costs.batch / per_step))

    def images_of(steps: float) -> float:
        if bank is None:
            return per_step * steps
        return own_images(steps, max(available, 0.0), later_image, bank, costs, image_time)

    def views_of(steps: float) -> float:
        if bank is None:
            return fresh_views(per_step, costs)
        return fresh_views_of(bank, images_of(steps) / steps, steps, costs)

    def seconds_of(steps: float) -> float:
        student = costs.student_step + views_of(steps) * costs.teacher_batch
        return steps * student + images_of(steps) * mean_image

    needed = seconds_of(fewest)
    if available < needed:
        least = (needed + rest) / (1 - MARGIN)
        drawn = f", {duration(drawing)} of it for calibration and hold-out images" if drawing > rest / 2 else ""
        raise TooShortError(
            f"A budget of {duration(budget)} is too small for this teacher, student and machine.",
            why=f"Export and validation take about {duration(rest)}{drawn}; the minimum of {fewest} student "
            f"steps with their images takes about {duration(needed)}.",
            fix=f"Use at least {duration(least * 1.05)}: --budget {math.ceil(least * 1.05 / 60)}m"
            + (", or set export.calibration_images and validate.synthetic_images lower" if drawn else ""),
            least=least * 1.05,
        )
    wanted = available / (needed / fewest)
    if bank is not None:
        # The more steps, the fewer of their views are new.
        most = math.ceil(available / costs.student_step)
        wanted = bisect.bisect_right(range(1, most + 1), available, key=seconds_of)
        # Epochs with at least one round of images each, before the learning rate falls.
        one_round = math.ceil((1 - DECAY) * costs.batch * wanted / images_of(wanted))
        later_rounds = images_of(wanted) / wanted / (1 - DECAY) / costs.batch
    else:
        one_round = math.ceil(costs.batch / per_step)
        later_rounds = (1 - filled) / (1 - DECAY) * per_step / costs.batch
    student_step = costs.student_step + views_of(wanted) * costs.teacher_batch
    # Enough steps per epoch to match at least one full round of images.
    steps = max(one_round, round(wanted / EPOCHS))
    rounds = max(1, round(later_rounds * steps))
    fill_rounds = max(2, round(filled * per_step * wanted / costs.batch))
    warmup_epochs = min(10, fill_rounds // 2) if bank is None else 0
    warmup_rounds = round(fill_rounds / warmup_epochs) if bank is None else 1
    fill_seconds = warmup_epochs * warmup_rounds * costs.batch * image
    train_epoch = steps * student_step + rounds * costs.batch * later_image
    # Split the remaining time so that DECAY of the epochs decay the learning rate.
    whole = (available - fill_seconds) / ((1 - DECAY) * train_epoch + DECAY * steps * student_step)
    decay = max(1, round(DECAY * whole))
    exact = (available - fill_seconds - decay * steps * student_step) / train_epoch
    # Rounded up only if the margin has room for the rest of that epoch.
    trained = max(1, math.floor(exact + min(0.5, budget * MARGIN / train_epoch)))
    # Of few epochs, one is a large part of the time: what is left makes all of them longer.
    unused = available - fill_seconds - trained * train_epoch - decay * steps * student_step
    more = max(0, math.floor(unused / ((trained + decay) * student_step)))
    steps, train_epoch = steps + more, train_epoch + more * student_step
    images_made = (warmup_epochs * warmup_rounds + rounds * trained) * costs.batch
    student_epochs = trained + decay
    seconds = {
        "fill": fill_seconds,
        "train": trained * train_epoch,
        "decay": decay * steps * student_step,
        "rest": rest,
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


def planned_keys() -> frozenset[str]:
    """The keys of a recipe that a plan sets, such as "distill.steps"."""
    no_plan = BudgetPlan(0, 0, 0, 0, 0, 0, 0, images=0, steps_in_all=0, seconds={"fill": 0.0, "rest": 0.0})
    sections = settings(0.0, no_plan, Costs(0, 0, 0, 0, 0), bank_mib=0)
    keys = {f"{name}.{key}" for name, section in sections.items() for key in section}
    return frozenset({*keys, "generator.channels"})


def seconds_of(synthesis: Synthesis, distill: Distill, costs: Costs) -> float:
    """Expected seconds of a distillation with these sizes, without export; costs grow in proportion to the batch."""
    warm = distill.warmup_epochs * synthesis.warmup_rounds
    later = (distill.epochs - distill.warmup_epochs - distill.decay_epochs) * synthesis.rounds
    rounds = warm * costs.synthesis_step + later * (costs.synthesis_step + costs.adversary)
    steps = (distill.epochs - distill.warmup_epochs) * distill.steps
    images = (warm + later) * synthesis.batch
    fresh = min(1.0, images * distill.views / (steps * distill.batch)) if distill.views else 1.0
    return (
        rounds * synthesis.g_steps * synthesis.batch / costs.batch
        + steps * (costs.student_step + fresh * costs.teacher_batch) * distill.batch / costs.student_batch
    )


def settings(
    budget: float, made: BudgetPlan, costs: Costs, bank_mib: int, prior: Prior = "batchnorm"
) -> dict[str, dict[str, Any]]:
    """The plan as recipe sections: the budget schedule with the planned sizes.

    Args:
        budget: seconds for the whole run.
        bank_mib: limit of the memory bank; larger than the run needs, so that it can be continued.
        prior: what makes images.
    """
    images: dict[str, Any] = {} if prior == "batchnorm" else {"prior": prior}
    if prior != "procedural":
        # After each re-initialisation of a generator about forty rounds are poor.
        images["g_life"] = NEVER
    return {
        "budget": {
            "seconds": budget,
            "fill_seconds": round(made.seconds["fill"], 1),
            "rest_seconds": round(made.seconds["rest"], 1),
        },
        "synthesis": {
            "batch": costs.batch,
            **images,
            "g_steps": made.g_steps,
            "rounds": made.rounds,
            "warmup_rounds": made.warmup_rounds,
            "reserve": RESERVE,
        },
        "distill": {
            "epochs": made.epochs,
            "warmup_epochs": made.warmup_epochs,
            "steps": made.steps,
            "batch": costs.student_batch,
            "optimizer": "muon",
            "lr": 0.1,
            "muon_lr": MUON_RATE,
            "schedule": "constant",
            "decay_epochs": made.decay_epochs,
            "weight_decay": 5e-4,
            "views": VIEWS,
            "bank_mib": bank_mib,
            "holdout_rounds": 1,
        },
    }


def described(made: BudgetPlan, costs: Costs, image_bytes: int) -> list[tuple[str, str]]:
    """The plan in words, as (heading, text)."""
    phases = {"fill": "of images", "train": "of training", "decay": "of learning-rate decay"}
    parts = [f"{duration(made.seconds[name])} {what}" for name, what in phases.items() if made.seconds[name]]
    bank = made.images * image_bytes / 2**20
    return [
        (
            "time",
            f"{duration(made.total)}: {', '.join(parts)}, {duration(made.seconds['rest'])} of export and validation",
        ),
        ("images", f"{made.images:,} from rounds of {costs.batch} with {made.g_steps} steps each; {bank:,.0f} MiB"),
        ("student", f"{made.steps_in_all:,} steps of {costs.student_batch} images"),
    ]


@dataclass(frozen=True)
class Pace:
    """Seconds per student epoch of a run, measured while it ran.

    Attributes:
        train: an epoch with synthesis rounds.
        decay: an epoch of the learning-rate decay, which has none.
    """

    train: float
    decay: float

    @classmethod
    def of(
        cls,
        history: Sequence[Epoch],
        typical: Callable[[Sequence[float]], float] = statistics.median,
        answers: bool = True,
    ) -> Pace:
        """Typical seconds of the last `RECENT` student epochs with synthesis rounds.

        Args:
            answers: include the seconds in which the teacher answered new views.

        Raises:
            ValueError: there is no such epoch.
        """
        epochs = [epoch for epoch in history if epoch.phase == "distill" and epoch.loss_ce is not None][-RECENT:]
        if not epochs:
            raise ValueError("no student epoch has been trained")
        seconds = [epoch.seconds - (0.0 if answers else epoch.answer_seconds) for epoch in epochs]
        decaying = [took - epoch.synthesis_seconds for took, epoch in zip(seconds, epochs, strict=True)]
        return cls(*(typical([max(took, 1e-3) for took in each]) for each in (seconds, decaying)))


@dataclass(frozen=True)
class Drawing:
    """How the student draws images: views of each image, and draws per epoch."""

    views: int
    draws: int


def answers_left(history: Sequence[Epoch], length: Length, drawing: Drawing | None) -> float:
    """Expected seconds in which the teacher will answer views for the first time; 0 if that was not measured.

    Of V views, n uniform draws reach a given one with probability 1 − (1 − 1/V)ⁿ ≈ 1 − e^(−n/V).
    """
    answered, took = sum(e.views_answered for e in history), sum(e.answer_seconds for e in history)
    if drawing is None or not answered or not took:
        return 0.0
    done = len(history)
    bank = history[-1].bank_images
    grown = bank - history[-2].bank_images if done > 1 else 0
    views = drawing.views * (bank + max(grown, 0) * max(length.epochs - length.decay_epochs - done, 0))
    reached = 1 - math.exp(-drawing.draws * max(length.epochs - done, 0) / max(views, 1))
    return took / answered * max(views - answered, 0) * reached


def undisturbed(seconds: Sequence[float]) -> float:
    """The lower quartile: other work on the machine makes epochs slower, never faster."""
    return sorted(seconds)[len(seconds) // 4]


def extended(length: Length, seconds: float, pace: Pace, rest: float, finished: bool = True) -> Length:
    """The length of a run that gets so much more time.

    Args:
        length: of the run so far.
        rest: seconds of export and validation.
        finished: its learning rate has decayed and must decay again, and the export is repeated; otherwise both are
            still to come and planned already.

    Raises:
        UsageError: the time is too short for a single further epoch; the message gives the minimum.
    """
    trained = length.epochs - length.warmup_epochs - length.decay_epochs
    share = DECAY / (1 - DECAY)
    again = rest + share * trained * pace.decay if finished else 0.0
    further = math.floor((seconds - again) / (pace.train + share * pace.decay))
    if further < 1:
        least = again + share * pace.decay + pace.train
        raise UsageError(
            f"{duration(seconds)} is too short to improve this run.",
            why=f"Repeating the learning-rate decay and the export takes {duration(again)}; "
            f"an epoch takes {duration(pace.train)}.",
            fix=f"Use at least: --more {math.ceil(least * 1.1 / 60)}m",
        )
    decay = max(1, round(share * (trained + further)))
    return Length(length.warmup_epochs + trained + further + decay, length.warmup_epochs, decay)


def finishing(length: Length, done: int, seconds: float, pace: Pace, rest: float) -> Length:
    """The length of a run that decays its learning rate from now on and ends within so much time.

    Args:
        done: epochs that the run has finished.

    Raises:
        UsageError: there is no student to finish, or the time is too short for one epoch.
    """
    trained = done - length.warmup_epochs
    if trained < 1:
        raise UsageError(
            "This run has not begun to train its student.",
            fix="Let it train at least one epoch after warm-up, then use --finish.",
        )
    if done > length.epochs - length.decay_epochs:
        raise UsageError(
            "This run's learning rate is decaying already.",
            fix=f"Continue without --finish; {length.epochs - done} epochs are left, about "
            f"{duration((length.epochs - done) * pace.decay)}.",
        )
    affordable = math.floor((seconds - rest) / pace.decay)
    if affordable < 1:
        raise UsageError(
            f"{duration(seconds)} is too short: export and validation alone take about {duration(rest)}.",
            fix=f"Use at least: --finish {math.ceil((rest + pace.decay) * 1.1 / 60)}m",
        )
    decay = min(affordable, max(1, trained))
    return Length(done + decay, length.warmup_epochs, decay)


def adapted(
    history: Sequence[Epoch], length: Length, budget: Budget, drawing: Drawing | None = None, since: int = 0
) -> Length | None:
    """Another length for a run that is slower or faster than planned; None if it keeps its budget.

    After two epochs, a machine of another kind than planned is noticed. From the third student epoch on, the end is
    projected; the deviation that is accepted falls to `TOLERANCE` at the start of the decay, so that a short
    disturbance of the machine does not shorten the run.

    Args:
        history: metrics of all finished epochs.
        drawing: None if the teacher answers every image anew.
        since: epochs that were finished when this process continued the run, perhaps on another machine.
    """
    done = len(history)
    if done == 2 and length.warmup_epochs > 2 and budget.fill_seconds > 0:
        ratio = min(epoch.seconds for epoch in history) * length.warmup_epochs / budget.fill_seconds
        if 1 / OTHER_MACHINE < ratio < OTHER_MACHINE:
            return None
        warmup = max(done, round(length.warmup_epochs / ratio))
        student = max(3, round((length.epochs - length.warmup_epochs) / ratio))
        decay = max(1, round(DECAY * student))
        return Length(warmup + student, warmup, decay)
    trained, training = done - length.warmup_epochs, length.epochs - length.decay_epochs - done
    if trained < 1 or training < 1:
        return None
    apart = drawing is not None and any(epoch.answer_seconds for epoch in history)
    pace, elapsed = _pace_here(history, since, answers=not apart), sum(epoch.seconds for epoch in history)
    target = budget.seconds * (1 - MARGIN)
    # What happened before does not excuse a deviation in the time that is left.
    trained_here = done - max(since, length.warmup_epochs)
    time_here = target - sum(epoch.seconds for epoch in history[:since])

    def end(length: Length) -> float:
        training = length.epochs - length.decay_epochs - done
        ahead = training * pace.train + length.decay_epochs * pace.decay + answers_left(history, length, drawing)
        return elapsed + ahead + budget.rest_seconds

    def of(further: int) -> Length:
        decay = max(1, round(DECAY / (1 - DECAY) * (trained + further)))
        return Length(done + further + decay, length.warmup_epochs, decay)

    if trained_here < SETTLED <= trained_here + training and end(of(SETTLED - trained_here)) <= target:
        return None
    accepted = TOLERANCE + EARLY_TOLERANCE * training / (trained_here + training)
    if abs(end(length) - target) <= accepted * time_here:
        return None
    most = int(max(target - elapsed, 0) / pace.train) + 1
    # The last number of further epochs that ends in time; none may.
    found = of(max(bisect.bisect_right(range(most + 1), target, key=lambda further: end(of(further))) - 1, 0))
    if (over := end(found) - target - MARGIN * time_here) > 0:
        # Not even a decay fits. A third of it still does most of its work.
        shorter = max(found.decay_epochs - math.ceil(over / pace.decay), math.ceil(found.decay_epochs / 3))
        found = Length(done + shorter, length.warmup_epochs, shorter)
    return None if found == length else found


def _pace_here(history: Sequence[Epoch], since: int, *, answers: bool) -> Pace:
    """The pace of this process as soon as it is known, else that of the whole run; see `Pace.of`."""
    whole = Pace.of(history, undisturbed, answers)
    try:
        here = Pace.of(history[since:], undisturbed, answers)
    except ValueError:
        return whole
    several = sum(epoch.phase == "distill" for epoch in history[since:]) >= 2
    another_machine = not 1 / OTHER_MACHINE < here.train / whole.train < OTHER_MACHINE
    return here if several or another_machine else whole
