"""The distillation loop (Tran et al., CVPR 2024, Alg. 1). It needs no data set, only a teacher and label embeddings.

An epoch consists of synthesis rounds and, after warm-up, student steps on the memory bank. `Distillation.state` holds
everything needed to continue, and every random number comes from a stream named after its epoch, so a run that was
killed and continued is bit-identical on a CPU.
"""

from __future__ import annotations

import copy
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nayer_edge import generator as generators
from nayer_edge import image_priors, losses
from nayer_edge.batchnorm import BatchNormStatistics, synchronise_batchnorms
from nayer_edge.config import Distill, Synthesis
from nayer_edge.config import Generator as GeneratorConfig
from nayer_edge.errors import IntegrityError, TrainingError, UsageError
from nayer_edge.generator import Generator
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.memory_bank import MemoryBank, to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import weights_digest
from nayer_edge.models.prior import require_prior
from nayer_edge.procedural import procedural_round
from nayer_edge.runtime.compute import Compute, random_stream, seeded
from nayer_edge.runtime.distributed import SINGLE, World, share_problems
from nayer_edge.runtime.process import Deferred
from nayer_edge.runtime.progress import Progress, Silent
from nayer_edge.storage.files import digest_of
from nayer_edge.storage.tensors import load_tensors, save_tensors
from nayer_edge.synthesis import Round, synthesize_round
from nayer_edge.training import health
from nayer_edge.training.augment import crop_and_flip, mixup
from nayer_edge.training.cached_views import ViewCache
from nayer_edge.training.evaluate import agreement, logits_of
from nayer_edge.training.optimizers import make_optimizer, set_rate

LATER_KEYS = ("prior", "pixel_step", "lambda_tv", "lambda_act", "lambda_patch")
"""keys of [synthesis] that came after the first checkpoints"""


@dataclass(frozen=True)
class Length:
    """The length of a run in epochs. With a constant schedule it may change while the run goes on."""

    epochs: int
    warmup_epochs: int
    decay_epochs: int

    @classmethod
    def of(cls, config: Distill) -> Length:
        """The length that a recipe asks for."""
        return cls(config.epochs, config.warmup_epochs, config.decay_epochs)


@dataclass(frozen=True)
class Settings:
    """The parts of a recipe that the loop reads."""

    generator: GeneratorConfig
    synthesis: Synthesis
    distill: Distill
    seed: int
    start: str | None = None
    """digest of the files of another run whose images this run starts with; see `Start`"""

    def digest(self, teacher: Classifier, embeddings: LabelEmbeddings, student: str) -> str:
        """Identifies a run: a checkpoint with another digest is not continued.

        It excludes the length of a run with a constant schedule, which can be extended or shortened.
        """
        length = set(vars(Length.of(self.distill))) if self.distill.schedule == "constant" else set()
        # Keys that came later count only if they are set, so that checkpoints of earlier versions can be continued.
        defaults = Synthesis()
        later = {key for key in LATER_KEYS if getattr(self.synthesis, key) == getattr(defaults, key)}
        return digest_of(
            {
                "generator": self.generator.model_dump(mode="json"),
                "synthesis": self.synthesis.model_dump(mode="json", exclude=later),
                "distill": self.distill.model_dump(mode="json", exclude=length),
                "seed": self.seed,
                "student": student,
                "teacher": weights_digest(teacher),
                "lte": embeddings.digest,
                **({} if self.start is None else {"start": self.start}),
            }
        )


@dataclass
class Epoch:
    """One line of metrics.jsonl. Losses are means over the epoch; null if the epoch did not compute them."""

    epoch: int
    phase: str
    loss_bn: float | None
    loss_ce: float | None
    loss_adv: float | None
    loss_kd: float | None
    agreement: float
    """between student and teacher, on the synthetic hold-out"""
    lr: float | None
    bank_images: int
    images_per_s: float
    """images synthesised or trained on, counted once per step"""
    seconds: float
    memory_mib: float
    """peak device memory, or peak resident memory of the process on a CPU"""
    synthesis_seconds: float = 0.0
    """the part of `seconds` that the rounds took"""
    views_answered: int = 0
    """augmented views whose teacher logits were computed in this epoch, on all ranks"""
    answer_seconds: float = 0.0
    """the part of `seconds` that this took; not measured on a GPU"""
    synthetic_classes: int = 0
    """number of classes that the teacher predicts on the newest images"""
    distinct: float = 1.0
    """fraction of the newest images that are not duplicates"""
    variety: float | None = None
    """share of the pixels' variance of the newest images that lies within classes"""
    student_spread: float | None = None
    """largest difference between the student's logits on two hold-out images"""


class Distillation:
    """Teacher and embeddings in; student, generator and memory bank out, one epoch at a time.

    Args:
        teacher: trained; it is frozen and set to eval mode.
        embeddings: one per teacher class.
        student: untrained; its input specification must be the teacher's.
        world: ranks that share the work. Each makes its share of every round and keeps it in its part of the bank;
            student and generator are identical on all ranks.

    Raises:
        UsageError: the parts do not match, or the prior cannot make images for this teacher.
        TrainingError: the teacher's outputs are NaN or infinite, or the same for every image.
    """

    def __init__(
        self,
        teacher: Classifier,
        embeddings: LabelEmbeddings,
        student: Classifier,
        settings: Settings,
        compute: Compute,
        world: World = SINGLE,
    ) -> None:
        require_prior(teacher, "The teacher", settings.synthesis.prior)
        image_priors.require_layers(teacher, settings.synthesis)
        _check_fit(teacher, embeddings, student)
        _check_shares(settings, len(teacher.classes), world)
        if settings.start is None and (problem := discard_problem(settings.synthesis, settings.distill)):
            raise UsageError(f"{problem}.", fix="Lower synthesis.discard_rounds, or raise synthesis.warmup_rounds.")
        self.settings, self.compute, self.world = settings, compute, world
        self.asked = Length.of(settings.distill)
        """the length in the recipe; `settings` has the present one"""
        self.share = settings.synthesis.batch // world.size
        """images per round made by this rank"""
        self.digest = settings.digest(teacher, embeddings, student.identity)
        self.teacher = compute.place(teacher).eval().requires_grad_(False)
        synchronise_batchnorms(student, world)
        self.student = compute.place(student)
        world.broadcast(student.state_dict().values())
        self.embeddings = embeddings.embeddings.to(compute.device)
        check_teacher(self.teacher, compute)
        config = settings.synthesis
        self.statistics = None
        """only the prior "batchnorm" has them"""
        if config.prior == "batchnorm":
            self.statistics = BatchNormStatistics(self.teacher, config.bn_momentum, world)
        self.has_generator = config.has_generator
        if self.has_generator:
            self.generator = new_generator(embeddings, teacher.spec.shape, config, settings.generator, world)
            compute.place(self.generator)
        self.bank = self._new_bank()
        self.views = None
        if settings.distill.views:
            of = settings.distill
            order = self._stream("views")
            self.views = ViewCache(self.bank, of.augment, of.views, self.teacher, compute, order, of.mixup)
        self.optimizer = make_optimizer(
            settings.distill.optimizer,
            self.student,
            lr=settings.distill.lr,
            muon_lr=settings.distill.muon_lr,
            momentum=settings.distill.momentum,
            weight_decay=settings.distill.weight_decay,
        )
        self.reserve = self._new_bank()
        """images of the rounds reserved for calibration and as a hold-out"""
        self.rounds_made = 0
        """rounds so far, including discarded and reserved ones"""
        self.holdout = torch.empty(0, *teacher.spec.shape, dtype=torch.uint8, device=compute.device)
        self.best_agreement = -1.0
        self.best_student: dict[str, Tensor] = {}
        self.epoch = 0
        """finished epochs"""
        self.patient_from = 0
        """the epoch with which patience begins: that in which the run last got another length"""
        self.history: list[Epoch] = []

    def _new_bank(self) -> MemoryBank:
        """An empty bank with this rank's share of the memory budget.

        Raises:
            UsageError: the budget is smaller than one round.
        """
        shape, batch = self.teacher.spec.shape, self.settings.synthesis.batch
        bank = MemoryBank(shape, int(self.settings.distill.bank_mib * 2**20), self.compute.device)
        if batch > bank.capacity:
            raise UsageError(
                f"The memory bank holds {bank.capacity} images and one round makes {batch}.",
                fix="Raise distill.bank_mib, or lower synthesis.batch.",
            )
        if self.world.size == 1:
            return bank
        # Whole rounds, so that all ranks hold parts of the same rounds.
        images = bank.capacity // batch * self.share
        return MemoryBank(shape, images * math.prod(shape), self.compute.device)

    def set_length(self, length: Length) -> None:
        """Makes a run with a constant schedule longer or shorter.

        Raises:
            ValueError: the schedule is not constant, or the length is impossible.
        """
        if self.settings.distill.schedule != "constant":
            raise ValueError("only a run with a constant schedule can change its length")
        distill = Distill.model_validate({**self.settings.distill.model_dump(), **vars(length)})
        self.settings = replace(self.settings, distill=distill)

    @property
    def decay_start(self) -> int:
        """The epoch in which the constant schedule starts to decay the rate; after the last epoch with a cosine."""
        return self.settings.distill.epochs - self.settings.distill.decay_epochs

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or, with a cosine, agreement has not improved for `patience` epochs."""
        return self.epoch >= self.settings.distill.epochs or (
            self.settings.distill.schedule == "cosine" and self._out_of_patience
        )

    @property
    def _out_of_patience(self) -> bool:
        return 0 < self.settings.distill.patience <= self.stale_epochs

    def length_by_patience(self) -> Length | None:
        """With a constant schedule, the length with which the learning rate decays now, because agreement has not
        improved for `patience` epochs; None if there is nothing to change."""
        of = self.settings.distill
        if of.schedule != "constant" or not self._out_of_patience or self.epoch >= self.decay_start:
            return None
        return Length(self.epoch + of.decay_epochs, of.warmup_epochs, of.decay_epochs)

    @property
    def stale_epochs(self) -> int:
        """Student epochs since the best agreement on the synthetic hold-out, or since the run was made longer."""
        trained = [number for number, epoch in enumerate(self.history) if epoch.phase == "distill"]
        if not trained:
            return 0
        best = max(trained, key=lambda number: self.history[number].agreement)
        return len(self.history) - max(best + 1, self.patient_from)

    def steps_of(self, epoch: int) -> int:
        """Synthesis and student steps of an epoch, for progress."""
        warm = epoch < self.settings.distill.warmup_epochs
        return self._rounds_of(epoch) * self.settings.synthesis.g_steps + (0 if warm else self.settings.distill.steps)

    def _rounds_of(self, epoch: int) -> int:
        """Synthesis rounds of an epoch: none during the decay, since the student would hardly see the images."""
        if epoch >= self.decay_start:
            return 0
        synthesis = self.settings.synthesis
        return synthesis.warmup_rounds if epoch < self.settings.distill.warmup_epochs else synthesis.rounds

    def run_epoch(self, on_step: Callable[[], None] = lambda: None) -> Epoch:
        """Runs one epoch: synthesis, then (after warm-up) student training.

        Raises:
            TrainingError: a loss is not finite.
        """
        epoch, synthesis, distill = self.epoch, self.settings.synthesis, self.settings.distill
        warm = epoch < distill.warmup_epochs
        began = time.perf_counter()
        count = self._rounds_of(epoch)
        # A run on another run's images goes on with its generator.
        taken_over = epoch == 0 and self.settings.start is not None
        if self.has_generator and count and epoch % synthesis.g_life == 0 and not taken_over:
            generators.initialise(self.generator, self._stream("generator", epoch))
            self.world.broadcast(generators.common_state(self.generator))
        rounds = [self._round(self._stream("round", epoch, number), warm, on_step) for number in range(count)]
        parts = torch.stack([made.losses for made in rounds]).mean(dim=0).tolist() if rounds else [None] * 3
        synthesised = time.perf_counter()
        for made in rounds:
            self._keep(made)
        several, _ = self.bank.newest(health.sample_size(len(self.teacher.classes)))
        newest = rounds[-1].images if rounds else several
        signs = [*health.inspect_images(self.teacher, newest, self.compute)]
        if bool(signs[-1].isnan()) and len(several) > len(newest):
            # With many classes, hardly any two images of one round share theirs.
            signs[-1] = health.inspect_images(self.teacher, several, self.compute)[-1]
        shares, distinct, variety = map(self.world.mean, signs)
        if not len(self.holdout) and epoch >= distill.warmup_epochs - 1:
            self._make_holdout()
        answered, answering = (self.views.computed, self.views.seconds) if self.views else (0, 0.0)
        loss_kd, lr = (None, None) if warm else self._train_student(epoch - distill.warmup_epochs, on_step)
        agreed, spread = self._compare() if len(self.holdout) else (0.0, 0.0)
        # A clock that jumps back must not end the run.
        seconds = max(time.perf_counter() - began, 1e-9)
        images = len(rounds) * synthesis.batch * synthesis.g_steps + (0 if warm else distill.steps * distill.batch)
        loss_bn, loss_ce, loss_adv = parts
        found = Epoch(
            epoch=epoch + 1,
            phase="warmup" if warm else "distill",
            loss_bn=loss_bn if self.statistics else None,
            loss_ce=loss_ce,
            loss_adv=loss_adv,
            loss_kd=None if loss_kd is None else float(loss_kd),
            agreement=agreed,
            lr=lr,
            bank_images=len(self.bank) * self.world.size,
            images_per_s=images / seconds,
            seconds=seconds,
            memory_mib=peak_memory_mib(self.compute),
            synthesis_seconds=max(synthesised - began, 0.0),
            views_answered=(self.views.computed - answered) * self.world.size if self.views else 0,
            answer_seconds=self.views.seconds - answering if self.views else 0.0,
            synthetic_classes=int((shares > 0).sum()),
            distinct=float(distinct),
            variety=None if math.isnan(variety) else float(variety),
            student_spread=None if warm else spread,
        )
        self._check_finite(found)
        if not warm and agreed > self.best_agreement and distill.select == "agreement":
            self.best_agreement = agreed
            self.best_student = {n: t.detach().clone() for n, t in self.student.backbone.state_dict().items()}
        self.epoch += 1
        self.history.append(found)
        return found

    def result(self) -> Classifier:
        """The student to ship: the last, or the one with the best agreement on the synthetic hold-out."""
        if self.settings.distill.select == "agreement" and self.best_student:
            self.student.backbone.load_state_dict(self.best_student)
        return self.student.eval()

    @property
    def shipped_agreement(self) -> float:
        """Agreement of the student that `result` returns, on the synthetic hold-out."""
        best = self.settings.distill.select == "agreement" and self.best_student
        return self.best_agreement if best else self.history[-1].agreement

    def _stream(self, *purpose: str | int) -> torch.Generator:
        return random_stream(self.settings.seed, *purpose, device=self.compute.device)

    def _round(self, random: torch.Generator, warm: bool, on_step: Callable[[], None] = lambda: None) -> Round:
        self.student.eval()
        student = None if warm else self.student
        if not self.has_generator:
            config = self.settings.synthesis
            return procedural_round(self.teacher, student, config, self.compute, random, on_step, self.world)
        return synthesize_round(
            self.generator,
            self.embeddings,
            self.teacher,
            student,
            self.statistics,
            self.settings.synthesis,
            self.compute,
            random,
            on_step,
            self.world,
        )

    def _keep(self, made: Round) -> None:
        """Adds a round's images to the bank or the reserve; the reserved rounds are spread over the whole run."""
        config, number = self.settings.synthesis, self.rounds_made
        self.rounds_made += 1
        if number < config.discard_rounds:
            return
        reserved = self.reserved(number - config.discard_rounds)
        (self.reserve if reserved else self.bank).add(made.images, made.labels)

    def reserved(self, number: int) -> bool:
        """Whether the images of a round, counted from 0 without discarded ones, are reserved."""
        share = self.settings.synthesis.reserve
        return math.floor((number + 1) * share) > math.floor(number * share)

    def _make_holdout(self) -> None:
        """Makes the hold-out with copies of generator and statistics, so that it does not affect training."""
        if self.has_generator:
            kept = self.generator, self.statistics
            self.generator = copy.deepcopy(self.generator)
            self.statistics = self.statistics and self.statistics.copy()
        else:
            kept = None
        rounds = [
            self._round(self._stream("holdout", number), warm=True)
            for number in range(self.settings.distill.holdout_rounds)
        ]
        if kept is not None:
            self.generator, self.statistics = kept
        self.holdout = torch.cat([made.images for made in rounds])

    def _compare(self) -> tuple[float, float]:
        """Agreement of student and teacher on the synthetic hold-out, and the spread of the student's logits."""
        teacher = logits_of(self.teacher, self.holdout, self.compute)
        student = logits_of(self.student, self.holdout, self.compute)
        found = torch.stack((agreement(student, teacher), health.logit_spread(student)))
        agreed, spread = self.world.mean(found).tolist()
        return agreed, spread

    def _train_student(self, epoch: int, on_step: Callable[[], None]) -> tuple[Tensor, float]:
        """Runs student steps on the bank; returns the mean loss, on the device, and the last learning rate."""
        config = self.settings.distill
        total = (config.epochs - config.warmup_epochs) * config.steps
        decay = config.decay_epochs * config.steps
        own = [] if self.world.size == 1 else ["rank", self.world.rank]
        random = self._stream("student", epoch, *own)
        self.student.train()
        loss_sum = torch.zeros((), device=self.compute.device)
        lr = config.lr
        # Dropout and stochastic depth draw from torch's global generator.
        with seeded(random_stream(self.settings.seed, "dropout", epoch, *own).initial_seed()):
            for step in range(config.steps):
                done = epoch * config.steps + step
                if config.schedule == "cosine":
                    lr = cosine(done, total, config.lr, config.lr_min)
                else:
                    lr = constant_then_linear(done, total, decay, config.lr, config.lr_min)
                set_rate(self.optimizer, lr / config.lr)
                loss_sum += self._student_step(*self._draw(random))
                on_step()
        self.student.eval()
        return self.world.mean(loss_sum) / config.steps, lr

    def _student_step(self, images: Float[Tensor, "B C H W"], teacher_logits: Float[Tensor, "B K"]) -> Tensor:
        """One optimizer step on the batch of all ranks; `images` is this rank's share. Returns the share's loss."""
        with self.compute.autocast():
            student_logits = self.student(images)
        loss = losses.distillation_loss(student_logits, teacher_logits, self.settings.distill.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.world.average_gradients(self.student.parameters())
        self.optimizer.step()
        return loss.detach()

    def _draw(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """This rank's share of a batch of augmented images, and the teacher's logits for them."""
        config = self.settings.distill
        count = config.batch // self.world.size
        if self.views is not None:
            return self.views.draw(count, random)
        images = to_unit(crop_and_flip(self.bank.draw(count, random), config.augment, random))
        if config.mixup:
            images = mixup(images, config.mixup, random)
        with torch.no_grad(), self.compute.autocast():
            return images, self.teacher(images)

    def _check_finite(self, epoch: Epoch) -> None:
        for name in ("loss_bn", "loss_ce", "loss_adv", "loss_kd"):
            value = getattr(epoch, name)
            if value is not None and not math.isfinite(value):
                raise TrainingError(
                    f"{name} became {value} in epoch {epoch.epoch}.",
                    why="The last checkpoint is kept; one is written after the first epoch, then once a minute.",
                    fix="Lower distill.lr or synthesis.lr, or use --set precision=fp32.",
                )

    def state(self, images: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to continue the run: tensors, and facts that are not tensors.

        Every rank must call it; only rank 0 gets the complete state. With several ranks, per-rank tensors (bank,
        hold-out, cached views) have a leading rank dimension.

        Args:
            images: include the memory bank and the reserve; False if they are stored in separate files.
        """
        tensors = {f"student.{n}": t for n, t in self.student.backbone.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in self.best_student.items()}
        if self.has_generator:
            tensors |= {f"generator.{n}": t for n, t in generators.whole_state(self.generator, self.world).items()}
            tensors |= generators.memory_tensors(self.statistics and self.statistics.memory)
        own = {"holdout": self.holdout}
        if images:
            own |= {f"bank.{n}": t for n, t in self.bank.tensors().items()}
            own |= {f"reserve.{n}": t for n, t in self.reserve.tensors().items()}
        own |= {f"views.{n}": t for n, t in (self.views.tensors() if self.views else {}).items()}
        if self.world.size > 1:
            gathered = {name: self.world.gather(tensor) for name, tensor in own.items()}
            own = {name: torch.stack(parts) for name, parts in gathered.items() if parts}
        tensors |= own
        for index, parameter in enumerate(self.student.parameters()):
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{index}"] = momentum
        facts = {
            "digest": self.digest,
            "ranks": self.world.size,
            "epoch": self.epoch,
            "patient_from": self.patient_from,
            "rounds_made": self.rounds_made,
            "asked": vars(self.asked),
            "length": vars(Length.of(self.settings.distill)),
            "best_agreement": self.best_agreement,
            "history": [vars(epoch) for epoch in self.history],
        }
        return tensors, facts

    def start_from(self, start: Start) -> None:
        """Takes over another run's images, generator and BatchNorm memory, before the first epoch.

        Raises:
            UsageError: there are several ranks or warm-up epochs, or the generator is of another size.
            IntegrityError: a file is damaged.
        """
        if self.world.size > 1:
            raise UsageError(
                "A run that starts from another run's memory bank cannot use several processes.",
                fix="Start it without torchrun.",
            )
        if self.settings.distill.warmup_epochs:
            raise UsageError(
                "A run that starts with a full memory bank has no warm-up.", fix="Set distill.warmup_epochs to 0."
            )
        device = self.compute.device
        if self.has_generator:
            if start.generator is None:
                raise UsageError("The other run has no generator.", why="Its images are procedural.")
            generator, memory = generators.load(start.generator)
            if generator.arguments != self.generator.arguments:
                before, now = generator.arguments, self.generator.arguments
                differing = [f"{key}: {before[key]} → {now[key]}" for key in now if before.get(key) != now[key]]
                raise UsageError("The generator of the other run is of another size.", why="; ".join(differing) + ".")
            self.generator.load_state_dict(generator.state_dict())
            self._remember(memory)
        for own, path in ((self.bank, start.bank), (self.reserve, start.reserve)):
            if path is not None:
                taken = MemoryBank.load(path, device)
                count = min(len(taken), own.capacity)
                own.refill(*taken.newest(count), count)
        # The reserved images spare this run the rounds of a hold-out. Of every two rounds, export calibrates with the
        # first; the others validate, and must not choose the student.
        rounds = self.reserve.newest(len(self.reserve))[0].split(self.settings.synthesis.batch)[::2]
        if len(rounds) >= self.settings.distill.holdout_rounds:
            self.holdout = torch.cat(rounds[-self.settings.distill.holdout_rounds :])

    def _remember(self, memory: generators.Memory | None) -> None:
        """Takes over a BatchNorm memory."""
        if self.statistics is not None:
            device = self.compute.device
            self.statistics.memory = memory and [(mean.to(device), variance.to(device)) for mean, variance in memory]

    def whole_bank(self) -> MemoryBank:
        """The images of all ranks in single-process order, on rank 0's CPU. Every rank must call it; the others get
        their own bank."""
        return self._whole(self.bank)

    def whole_reserve(self) -> MemoryBank:
        """The reserved images of all ranks; see `whole_bank`."""
        return self._whole(self.reserve)

    def _whole(self, bank: MemoryBank) -> MemoryBank:
        if self.world.size == 1:
            return bank
        images, labels = (self.world.gather_rounds(mine, self.share) for mine in bank.newest(len(bank)))
        if images is None or labels is None:
            return bank
        pixels = math.prod(bank.shape)
        whole = MemoryBank(bank.shape, bank.capacity * self.world.size * pixels, torch.device("cpu"))
        whole.refill(images, labels, bank.added * self.world.size)
        return whole

    def whole_generator(self) -> Generator | None:
        """The generator for one process, on rank 0; None if there is none. Every rank must call it; the others get
        their own."""
        return generators.whole(self.generator, self.world) if self.has_generator else None

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restores what `state` returned on rank 0, with the same number of ranks."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        def own(tensor: Tensor) -> Tensor:
            # Copied, so that the other ranks' parts can be freed.
            return tensor if self.world.size == 1 else tensor[self.world.rank].clone()

        device = self.compute.device
        self.student.backbone.load_state_dict(under("student."))
        self.best_student = {name: tensor.to(device) for name, tensor in under("best.").items()}
        self.bank.restore({name: own(tensor) for name, tensor in under("bank.").items()})
        if reserve := under("reserve."):
            self.reserve.restore({name: own(tensor) for name, tensor in reserve.items()})
        if self.views is not None:
            self.views.restore({name: own(tensor) for name, tensor in under("views.").items()})
        self.holdout = own(tensors["holdout"]).to(device)
        self.rounds_made = int(facts["rounds_made"])
        for index, parameter in enumerate(self.student.parameters()):
            if f"momentum.{index}" in tensors:
                buffer = torch.empty_like(parameter).copy_(tensors[f"momentum.{index}"])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        if self.has_generator:
            generators.load_whole_state(self.generator, under("generator."))
            self._remember(generators.memory_of(tensors))
        if facts.get("asked") == vars(self.asked) != facts["length"]:
            self.set_length(Length(**facts["length"]))
        self.epoch = int(facts["epoch"])
        longer = "asked" in facts and facts["asked"] != vars(self.asked)
        self.patient_from = self.epoch if longer else int(facts.get("patient_from", 0))
        self.best_agreement = float(facts["best_agreement"])
        self.history = [Epoch(**line) for line in facts["history"]]


@dataclass(frozen=True)
class Before:
    """A finished run's state before its learning rate decayed, from which a longer run continues.

    Attributes:
        state: the state of the loop, without images.
        bank: the images of the run.
        reserve: the reserved images; None if the recipe has none.
    """

    state: Path
    bank: Path
    reserve: Path | None


@dataclass(frozen=True)
class Start:
    """Files of another, finished run with the same teacher, whose images a run starts with instead of making them.

    Attributes:
        bank: the images.
        generator: with the BatchNorm memory, as written by `nayer_edge.generator.save`; None if it has none.
        reserve: the reserved images; None if there are none.
    """

    bank: Path
    generator: Path | None
    reserve: Path | None


def distill(
    distillation: Distillation,
    checkpoint: Path | None = None,
    before: Before | None = None,
    start: Start | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
    on_epoch: Callable[[Epoch], None] = lambda _epoch: None,
    adapt: Callable[[Sequence[Epoch], Length], Length | None] = lambda _history, _length: None,
) -> Classifier:
    """Runs all epochs, continuing from a checkpoint of the same run if there is one.

    Args:
        checkpoint: its path (one file, written by rank 0 and read by all); None writes no checkpoint.
        before: state of an earlier, shorter run, to continue from if there is no checkpoint. A run with a constant
            schedule writes its own state next to it when its decay starts; see `next_state`.
        start: another run's images to start with, if there is neither.
        checkpoint_seconds: minimum seconds between two checkpoints, by rank 0's clock; 0 writes one every epoch.
        on_epoch: called after each epoch with its metrics, and first with the earlier epochs of a continued run.
        adapt: called after each epoch with all metrics and the present length; returns another length if this machine
            is slower or faster than planned, else None. Needs a constant schedule.

    Returns:
        The student to ship.

    A first SIGINT or SIGTERM takes effect after the current epoch, once its checkpoint is written; a second one takes
    effect immediately. The first does too without a checkpoint file, if no finished epoch is unsaved, or with several
    ranks.

    Raises:
        TrainingError: a loss is not finite, or the synthetic images or the student have collapsed.
        UsageError: the checkpoint was written by another number of processes, or the images to start with do not
            fit, or are missing.
        IntegrityError: the checkpoint, or a file to start from, is damaged.
    """
    progress = progress or Silent()
    resumed = checkpoint is not None and resume(distillation, checkpoint)
    if not resumed and not (before is not None and resume_before_decay(distillation, before)):
        if start is not None:
            distillation.start_from(start)
        elif distillation.settings.start is not None:
            raise UsageError("The images that this run started with and its checkpoint are missing.")
    compute, world = distillation.compute, distillation.world
    world.require_same([compute.device.type, compute.bf16, distillation.digest], "device, precision or inputs")
    world.require_same(distillation.epoch, "the checkpoint that they read")
    for epoch in distillation.history:
        on_epoch(epoch)

    def show_length() -> None:
        steps = [distillation.steps_of(epoch) for epoch in range(distillation.settings.distill.epochs)]
        progress.start("distill", sum(steps))
        progress.advance(sum(steps[: distillation.epoch]))

    show_length()
    # Always save after the first epoch: failures often occur in the next one.
    written, saved = -math.inf, distillation.epoch
    with Deferred(lambda: checkpoint is not None and world.size == 1 and distillation.epoch > saved) as interrupt:

        def on_step() -> None:
            nonlocal told
            progress.advance()
            if interrupt.asked and not told:
                told = True
                progress.notice(
                    "Interrupted: finishing and saving the current epoch. Interrupt again to stop immediately."
                )

        told = False
        while not distillation.finished:
            if before is not None and distillation.epoch == distillation.decay_start:
                save_checkpoint(distillation, next_state(before.state), images=False)
            epoch = distillation.run_epoch(on_step)
            on_epoch(epoch)
            progress.figures(
                epoch=f"{epoch.epoch}/{distillation.settings.distill.epochs}",
                loss=next(loss for loss in (epoch.loss_kd, epoch.loss_bn, epoch.loss_ce) if loss is not None),
                # An untrained student's agreement would look like a failure.
                **({"bank": epoch.bank_images} if epoch.phase == "warmup" else {"agreement": epoch.agreement}),
                **{"images/s": epoch.images_per_s},
            )
            length = distillation.length_by_patience()
            length = length or adapt(distillation.history, Length.of(distillation.settings.distill))
            if (agreed := world.from_first(length and vars(length))) is not None:
                distillation.set_length(Length(**agreed))
                show_length()
            if notice := health.check_health(distillation.history, distillation.finished, distillation.has_generator):
                progress.notice(notice)
            # Save after the last epoch too: writing the results may be interrupted.
            done = bool(interrupt.asked) or distillation.finished
            # An adapted length too: a run that continues must not decide anew, from other seconds.
            due = done or agreed is not None or time.monotonic() - written >= checkpoint_seconds
            if checkpoint is not None and world.from_first(due):
                save_checkpoint(distillation, checkpoint)
                written, saved = time.monotonic(), distillation.epoch
            interrupt.act()
    progress.finish()
    return distillation.result()


def next_state(state: Path) -> Path:
    """Where a run stores its state before the decay; the earlier run's state is kept until this run finishes."""
    return state.with_name(f"{state.stem}.next{state.suffix}")


def save_checkpoint(distillation: Distillation, path: Path, images: bool = True) -> None:
    """Writes the state. All ranks' tensors and facts go into one file, so they cannot come from different epochs.

    Every rank must call it; rank 0 writes.

    Args:
        images: see `Distillation.state`.
    """
    tensors, facts = distillation.state(images)
    if distillation.world.first:
        save_tensors(path, tensors, {"facts": json.dumps(facts)})


def resume(distillation: Distillation, path: Path) -> bool:
    """Continues from a checkpoint of the same run; False if there is none.

    Raises:
        UsageError: it was written by another number of processes.
        IntegrityError: it is damaged.
    """
    return path.is_file() and _restore_from(distillation, path, {})


def resume_before_decay(distillation: Distillation, before: Before) -> bool:
    """Continues from the state of a shorter run before its decay; False if there is none.

    Raises:
        UsageError: it was written by several processes, or there are several.
        IntegrityError: it is damaged.
    """
    images = {"bank": before.bank, **({"reserve": before.reserve} if before.reserve else {})}
    if not all(path.is_file() for path in (before.state, *images.values())):
        return False
    tensors = {
        f"{name}.{key}": tensor
        for name, path in images.items()
        for key, tensor in load_tensors(path, "synthetic images").items()
    }
    return _restore_from(distillation, before.state, tensors)


def _restore_from(distillation: Distillation, path: Path, images: Mapping[str, Tensor]) -> bool:
    """Restores a state file, with separately stored images; False if it belongs to another run."""
    from safetensors import safe_open

    tensors = {**load_tensors(path, "a checkpoint"), **images}
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
        if facts.get("digest") != distillation.digest:
            return False
        ranks = int(facts.get("ranks", 1))
        if images and max(ranks, distillation.world.size) > 1:
            # These images are those of all ranks, and the rest of the state is in parts.
            raise UsageError(
                "Only a run made by a single process can be extended, and only by a single process.",
                fix="Start another run with its images: nayer-edge run RUN --bank RUN --budget 1h --out DIR",
            )
        _check_ranks(ranks, distillation.world)
        distillation.restore(tensors, facts)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is not a checkpoint of this run.",
            why=f"{error}".splitlines()[0] if f"{error}" else type(error).__name__,
            fix=f"Remove it to restart distillation from the first epoch: rm {shlex.quote(str(path))}",
        ) from error
    return True


def new_generator(
    embeddings: LabelEmbeddings,
    shape: tuple[int, int, int],
    synthesis: Synthesis,
    config: GeneratorConfig,
    world: World = SINGLE,
) -> Generator:
    """A generator of the right size, with uninitialised weights."""
    classes, dimensions = embeddings.embeddings.shape
    return Generator(dimensions, classes, synthesis.batch, shape, config, world)


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Cosine decay from `start` at step 0 to `end` after `total` steps (Loshchilov & Hutter 2017, Eq. 5)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total))


def constant_then_linear(step: int, total: int, decay: int, start: float, end: float) -> float:
    """`start` until `decay` steps before the end, then linear decay to `end` (Hägele et al., NeurIPS 2024,
    https://arxiv.org/abs/2405.18392: as good as cosine, and the run can be continued from before the decay)."""
    left = total - step
    return start if left >= decay else end + (start - end) * left / decay


def peak_memory_mib(compute: Compute) -> float:
    """Peak memory so far, MiB: allocated on a GPU, resident on a CPU."""
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resident_mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.platform)


def resident_mib(ru_maxrss: int, platform: str) -> float:
    """`ru_maxrss` of getrusage in MiB: Linux counts it in KiB, macOS in bytes (see its getrusage(2))."""
    return ru_maxrss / (2**20 if platform == "darwin" else 2**10)


def _check_fit(teacher: Classifier, embeddings: LabelEmbeddings, student: Classifier) -> None:
    if teacher is student:
        raise UsageError("Teacher and student are the same network.", fix="Choose another student.")
    if len(embeddings.embeddings) != len(teacher.classes):
        raise UsageError(
            f"There are {len(embeddings.embeddings)} label embeddings and the teacher has "
            f"{len(teacher.classes)} classes.",
            fix="Give one class name per teacher output, in the same order.",
        )
    if student.spec != teacher.spec or student.classes != teacher.classes:
        raise UsageError("Teacher and student must have the same input and the same classes.")


def discard_problem(synthesis: Synthesis, distill: Distill) -> str:
    """Why discarded rounds leave nothing to train the student on; empty if they leave something."""
    rounds = distill.warmup_epochs * synthesis.warmup_rounds
    if distill.warmup_epochs < distill.epochs - distill.decay_epochs:
        rounds += synthesis.rounds
    left = rounds - synthesis.discard_rounds
    if not synthesis.discard_rounds or left - math.floor(max(left, 0) * synthesis.reserve) > 0:
        return ""
    return (
        f"synthesis.discard_rounds: {synthesis.discard_rounds} of the {rounds} rounds before the first student step "
        "are discarded, so the student has no images"
    )


def _check_shares(settings: Settings, classes: int, world: World) -> None:
    if problems := share_problems(settings.synthesis, settings.distill, classes, world.size):
        raise UsageError(
            f"The batches cannot be divided between {world.size} processes:",
            why="\n".join(f"  - {problem}" for problem in problems),
            fix="Override these with --set, or start a different number of processes.",
        )


def _check_ranks(before: int, world: World) -> None:
    if before == world.size:
        return
    start = "nayer-edge" if before == 1 else f"torchrun --nproc-per-node={before} -m nayer_edge"
    raise UsageError(
        f"This run was started with {_processes(before)} and cannot be continued with {_processes(world.size)}.",
        why="Each process keeps its own part of the memory bank, and a checkpoint cannot be redistributed.",
        fix=f"Continue with the same number: {start} distill RUN\n"
        f"Or discard it and start over with {_processes(world.size)}: add --fresh.",
    )


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count != 1)}"


@torch.no_grad()
def check_teacher(teacher: Classifier, compute: Compute) -> None:
    """Checks a teacher's outputs on noise, black and white images before any work.

    Raises:
        TrainingError: NaN or infinite logits, or the same logits for every image.
        UsageError: the number of outputs differs from the number of class names.
    """
    noise = torch.rand(30, *teacher.spec.shape, generator=random_stream(0, "check"))
    images = torch.cat((noise, torch.zeros(1, *teacher.spec.shape), torch.ones(1, *teacher.spec.shape)))
    images = images.to(compute.device)
    logits = teacher(images).float()
    if logits.shape != (len(images), len(teacher.classes)):
        raise UsageError(
            f"The teacher's output shape per image is {tuple(logits.shape[1:])}, but there are "
            f"{len(teacher.classes)} class names.",
            fix="Give one class name per output, in the same order.",
        )
    if not bool(torch.isfinite(logits).all()):
        raise TrainingError(
            "The teacher's outputs are not finite.",
            why=f"{int((~torch.isfinite(logits)).any(dim=1).sum())} of {len(images)} test images gave NaN or infinity.",
            fix="Check its weights and its input specification (mean, std).",
        )
    if bool((logits - logits[0]).abs().max() < 1e-6):
        raise TrainingError(
            "The teacher gives the same output for every image.",
            fix="Check that its weights were loaded, and check its input specification (mean, std).",
        )
    if bool((logits >= 0).all()) and bool(((logits.sum(dim=1) - 1).abs() < 1e-3).all()):
        raise UsageError(
            "The teacher returns probabilities, not logits.",
            why="They are positive and add up to 1 for every image.",
            fix="Use the network without the softmax at its end.",
        )
    if bool((logits - teacher(images).float()).abs().max() > 0.01 * logits.abs().max()):
        raise UsageError(
            "The teacher is not deterministic: the same images give different outputs.",
            why="It draws random numbers, or changes, in eval mode.",
            fix="Switch that off. F.dropout, for example, needs training=self.training.",
        )
