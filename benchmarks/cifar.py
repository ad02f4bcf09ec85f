"""The paper's benchmark on CIFAR-10 and CIFAR-100: one pair over seeds, each run resumable, one JSON per run.

    NAYER_EDGE_DATA=… python benchmarks/cifar.py --recipe cifar10-w402-w162-e100 --seeds 0,1,2
    NAYER_EDGE_DATA=… python benchmarks/cifar.py --recipe cifar10-w402-w161-e100 --protocol cpu --seeds 0

Training images serve only to train the teacher, test images only to measure: after every `--test-every` epochs, beside
the run and without effect on it (`--keep-students` keeps the student of each in `NAME.students/`). Three accuracies of
the student are written, each under its own name: `last`, the last epoch's; `chosen`, of the epoch that agreed best with
the teacher on the synthetic hold-out; `max_over_epochs`, the figure that the paper reports, which is chosen on test
data. The protocols `cpu` and `minutes` are scaled down to what two cores do in an hour or in a few minutes; `own` takes
the recipe's own sizes, as those of `-fast` are small already. Such figures compare only with each other. The run folder
stays, so `nayer-edge export`, `validate` and `gate` can continue from it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from shared import figures, origin

from nayer_edge.data import datasets as data
from nayer_edge.data.datasets import LabelledImages
from nayer_edge.distillation import Distillation, Epoch, distill, save_checkpoint
from nayer_edge.models.load import weights_digest
from nayer_edge.pipelines import distill as steps
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime import provenance
from nayer_edge.storage.tensors import save_tensors
from nayer_edge.training import evaluate

RESULTS = Path(__file__).parent / "results" / "cifar"

TEACHERS: dict[str, float] = {}
"""test accuracy by digest of the weights: all seeds of a pair may have the same"""

PROTOCOLS = {
    "paper": [],
    "own": [],
    # 14 rounds of 15 steps, 420 images, 400 student steps of 64.
    "minutes": [
        "synthesis.batch=30",
        "synthesis.g_steps=15",
        "synthesis.warmup_rounds=3",
        "synthesis.rounds=2",
        "distill.warmup_epochs=2",
        "distill.epochs=6",
        "distill.steps=100",
        "distill.batch=64",
        "distill.lr=0.05",
        "distill.views=4",
    ],
    # 44 rounds of 30 steps, 4,400 images, 3,600 student steps of 128.
    "cpu": [
        "synthesis.batch=100",
        "synthesis.warmup_rounds=8",
        "synthesis.rounds=1",
        "distill.warmup_epochs=4",
        "distill.epochs=16",
        "distill.steps=300",
        "distill.batch=128",
        "distill.lr=0.1",
        "distill.views=16",
        "distill.bank_mib=64",
    ],
}


def main() -> None:
    """Runs the seeds one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10-w402-w162-e100")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="paper")
    parser.add_argument("--variant", default="", help="a name for the settings given with --set")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--test-every", type=int, default=1, metavar="EPOCHS")
    parser.add_argument("--keep-students", action="store_true", help="keep the student of every tested epoch")
    parser.add_argument("--own-teacher", action="store_true", help="train the recipe's teacher, though one is at hand")
    arguments = parser.parse_args()
    for seed in (int(part) for part in arguments.seeds.split(",")):
        one(arguments, seed)


def one(arguments: argparse.Namespace, seed: int) -> None:
    """One seed: continues where it stopped, and writes its JSON at the end."""
    name = "-".join(part for part in (arguments.recipe, arguments.protocol, arguments.variant, f"s{seed}") if part)
    settings = [*PROTOCOLS[arguments.protocol], *arguments.settings, f"seed={seed}"]
    recipe = load_recipe(arguments.recipe, [*settings, *([] if arguments.own_teacher else ready_teacher(arguments))])
    root, result = arguments.runs / name, arguments.results / f"{name}.json"
    if result.is_file():
        print(f"{name}: finished before", flush=True)
        return
    began = time.perf_counter()
    run = run_recipe(recipe, root, last="lte")
    seconds = {"teacher": time.perf_counter() - began}
    test = data.load(str(recipe.validate_.data), "holdout", recipe.teacher.input, recipe.teacher.classes)
    compute = computing.choose(recipe.device, recipe.precision)
    distillation = steps.open_distillation(recipe, run.path(steps.TEACHER), run.path(steps.EMBEDDINGS))
    digest = weights_digest(distillation.teacher)
    if digest not in TEACHERS:
        TEACHERS[digest] = evaluate.top1(evaluate.logits_of(distillation.teacher, test.images, compute), test.labels)
    teacher = TEACHERS[digest]
    print(f"{name}: teacher {100 * teacher:.2f} %, {compute.reason}", flush=True)
    students = root.with_name(f"{root.name}.students") if arguments.keep_students else None
    tested = Tested(distillation, test, root.with_suffix(".tested.json"), arguments.test_every, students)
    checkpoint = run.path(steps.CHECKPOINT)
    checkpoint.parent.mkdir(exist_ok=True)
    distill(distillation, checkpoint, on_epoch=tested.see)
    # The step finds all epochs done, and writes student, generator and bank.
    save_checkpoint(distillation, checkpoint)
    run_recipe(recipe, root, last="student")
    history = distillation.history
    seconds |= {
        phase: sum(epoch.seconds for epoch in history if epoch.phase == phase) for phase in ("warmup", "distill")
    }
    found = {
        "name": name,
        "recipe": arguments.recipe,
        "protocol": arguments.protocol,
        "variant": arguments.variant,
        "settings": settings,
        "sizes": {"steps": recipe.distill.steps, "batch": recipe.distill.batch},
        "seed": seed,
        "teacher": {"model": recipe.teacher.model, "top1": teacher},
        "student": {"model": recipe.student.model, **tested.accuracies(history)},
        "epochs": [vars(epoch) | {"top1": tested.by_epoch.get(str(epoch.epoch))} for epoch in history],
        "seconds": seconds | {"testing": tested.seconds},
        "peak_memory_mib": max(epoch.memory_mib for epoch in history),
        "hardware": provenance.hardware() | {"compute": compute.reason},
        "versions": provenance.versions(),
        "commit": origin.commit(),
        "command": command(arguments, seed),
    }
    figures.keep(result, found)
    print(f"{name}: {json.dumps(found['student'])} {json.dumps(found['seconds'])}", flush=True)


class Tested:
    """Accuracy on the test images by epoch, kept beside the run so that a continued run knows what it had."""

    def __init__(
        self, distillation: Distillation, test: LabelledImages, path: Path, every: int, students: Path | None
    ) -> None:
        self._distillation, self._test, self._path, self._every = distillation, test, path, every
        self._students = students
        before = figures.kept(path)
        self.by_epoch: dict[str, float] = before.get("by_epoch", {})
        self.seconds: float = before.get("seconds", 0.0)

    def see(self, epoch: Epoch) -> None:
        """Called after each epoch, and for those of a continued run."""
        run = self._distillation
        last = epoch.epoch == run.settings.distill.epochs
        due = epoch.phase == "distill" and (epoch.epoch % self._every == 0 or last)
        if due and epoch.epoch == run.epoch:
            began = time.perf_counter()
            logits = evaluate.logits_of(run.student, self._test.images, run.compute)
            self.by_epoch[str(epoch.epoch)] = evaluate.top1(logits, self._test.labels)
            self.seconds += time.perf_counter() - began
            figures.keep(self._path, {"by_epoch": self.by_epoch, "seconds": self.seconds})
            if self._students is not None:
                self._students.mkdir(exist_ok=True)
                save_tensors(self._students / f"epoch-{epoch.epoch:03d}.safetensors", run.student.state_dict())
        print(
            f"  epoch {epoch.epoch:3d} {epoch.phase:7s} bn {epoch.loss_bn:7.3f} ce {epoch.loss_ce:6.3f} "
            f"adv {epoch.loss_adv:7.3f} kd {epoch.loss_kd if epoch.loss_kd is not None else float('nan'):8.4f} "
            f"agreement {epoch.agreement:.4f} top-1 {self.by_epoch.get(str(epoch.epoch), float('nan')):.4f} "
            f"{epoch.seconds:6.1f} s {epoch.memory_mib:6.0f} MiB",
            flush=True,
        )

    def accuracies(self, history: list[Epoch]) -> dict[str, float | int | None]:
        """The three figures; where not every epoch was tested, `chosen` is null unless its epoch was."""
        student = [epoch for epoch in history if epoch.phase == "distill"]
        chosen = max(student, key=lambda epoch: (epoch.agreement, epoch.epoch))
        return {
            "last": self.by_epoch.get(str(history[-1].epoch)),
            "chosen": self.by_epoch.get(str(chosen.epoch)),
            "chosen_epoch": chosen.epoch,
            "max_over_epochs": max(self.by_epoch.values()),
        }


def ready_teacher(arguments: argparse.Namespace) -> list[str]:
    """Settings that take the WRN-40-2 of $NAYER_EDGE_DATA where the recipe's teacher is one."""
    folder = Path(os.environ.get("NAYER_EDGE_DATA", "."))
    weights = folder / "teachers" / "wrn40_2_cifar10.safetensors"
    if arguments.recipe.startswith("cifar10-w402-") and weights.is_file():
        return [f"teacher.weights={json.dumps(str(weights))}"]
    return []


def command(arguments: argparse.Namespace, seed: int) -> str:
    """What makes this run again, wherever its folders lie."""
    words = ["--recipe", arguments.recipe, "--protocol", arguments.protocol, "--seeds", str(seed)]
    words += ["--variant", arguments.variant] if arguments.variant else []
    words += [word for setting in arguments.settings for word in ("--set", setting)]
    return origin.command("benchmarks/cifar.py", *words)


if __name__ == "__main__":
    main()
