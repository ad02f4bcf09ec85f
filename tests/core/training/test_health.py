"""Silent training failures are reported during the run; healthy runs give no warnings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from nayer_edge.distillation import Distillation, Epoch, distill, resume
from nayer_edge.errors import TrainingError
from nayer_edge.memory_bank import to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.runtime.progress import Silent
from nayer_edge.training import health

Start = Callable[..., Distillation]


@dataclass
class Line:
    """The metrics of a healthy epoch."""

    phase: str = "distill"
    synthetic_classes: int = 3
    distinct: float = 1.0
    variety: float | None = 0.9
    student_spread: float | None = 4.0


def warmup(**metrics: float | None) -> Line:
    return Line(phase="warmup", student_spread=None, **metrics)  # pyright: ignore[reportArgumentType]


class Notices(Silent):
    """Collects the warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)


def warnings_of(lines: list[Line], generated: bool = True) -> list[str]:
    """The warnings, epoch by epoch."""
    warnings = [health.check_health(lines[: count + 1], False, generated) for count in range(len(lines))]
    return [text for text in warnings if text]


def test_a_healthy_history_gives_no_warning() -> None:
    assert warnings_of([warmup(), *[Line() for _ in range(40)]]) == []
    assert health.check_health([Line()], finished=True) is None


def test_one_class_gives_one_warning_and_stops_a_run_that_had_nothing_else() -> None:
    collapsed = [warmup(synthetic_classes=1) for _ in range(health.STOP_AFTER)]
    (warning,) = warnings_of(collapsed[:-1])
    assert f"For {health.NOTICE_AFTER} epochs" in warning
    assert "lambda_ce" in warning
    with pytest.raises(TrainingError, match="one and the same class") as caught:
        warnings_of(collapsed)
    assert "lambda_ce" in caught.value.fix
    # After one good epoch, the bank has something to learn from.
    assert len(warnings_of([warmup(), *collapsed, *collapsed])) == 1


@pytest.mark.parametrize("bad", [{"synthetic_classes": 1}, {"distinct": 0.1}, {"variety": 0.1}])
def test_procedural_images_get_advice_without_a_generator(bad: dict[str, float]) -> None:
    lines = [warmup(**bad) for _ in range(health.NOTICE_AFTER)]
    (warning,) = warnings_of(lines, generated=False)
    assert "generator" not in warning
    assert "synthesis." in warning
    (warning,) = warnings_of([warmup(**bad) for _ in range(health.NOTICE_AFTER)])
    assert "generator" in warning


def test_copies_give_one_warning_and_stop_a_run_that_had_nothing_else() -> None:
    copies = [warmup(distinct=0.1) for _ in range(health.STOP_AFTER)]
    (warning,) = warnings_of(copies[:-1])
    assert "copies" in warning
    with pytest.raises(TrainingError, match="copies of each other") as caught:
        warnings_of(copies)
    assert "noisy_dim" in caught.value.fix


def test_a_dead_student_stops_the_run_after_three_epochs_or_at_its_end() -> None:
    dead = Line(student_spread=0.0)
    assert warnings_of([Line(), dead, dead, Line(), dead, dead]) == []
    with pytest.raises(TrainingError, match="dead: for 3 epochs") as caught:
        warnings_of([Line(), dead, dead, dead])
    assert "distill.lr" in caught.value.fix
    with pytest.raises(TrainingError, match="dead: for 1 epoch "):
        health.check_health([Line(), dead], finished=True)


def test_inspected_images(teacher: Classifier, compute: Compute) -> None:
    images = torch.randint(0, 256, (40, *teacher.spec.shape), generator=torch.manual_seed(0)).to(torch.uint8)
    shares, distinct, _ = health.inspect_images(teacher, images, compute)
    with torch.no_grad():
        seen = teacher(images.float() / 255).argmax(dim=1)
    assert shares.tolist() == pytest.approx([float((seen == c).float().mean()) for c in range(3)])
    assert float(distinct) == 1.0
    shares, distinct, _ = health.inspect_images(teacher, images[:4].repeat(10, 1, 1, 1), compute)
    assert float(distinct) == pytest.approx(0.1)
    assert float(shares.sum()) == pytest.approx(1.0)
    # Only the newest are inspected.
    many = torch.cat((images[:1].expand(500, -1, -1, -1), images[:1].expand(health.SAMPLE, -1, -1, -1)))
    assert float(health.inspect_images(teacher, many, compute)[1]) == pytest.approx(1 / health.SAMPLE)


def test_logit_spread() -> None:
    assert float(health.logit_spread(torch.tensor([[1.0, 2.0], [1.0, 2.0]]))) == 0.0
    assert float(health.logit_spread(torch.tensor([[1.0, 2.0], [0.5, 5.0]]))) == 3.0


def test_an_ordinary_run_has_health_metrics_and_no_warnings(start: Start) -> None:
    run, notices = start(distill_epochs=8), Notices()
    seen: list[int] = []

    def count_classes(_epoch: Epoch) -> None:
        newest, _ = run.bank.newest(run.settings.synthesis.batch)
        with torch.no_grad():
            seen.append(len(run.teacher(to_unit(newest)).argmax(1).unique()))

    distill(run, progress=notices, on_epoch=count_classes)
    assert notices.texts == []
    assert [epoch.synthetic_classes for epoch in run.history] == seen
    for epoch in run.history:
        assert 1 <= epoch.synthetic_classes <= 3
        assert epoch.distinct > 0.9
        assert (epoch.student_spread is None) == (epoch.phase == "warmup")
    assert run.history[-1].student_spread is not None
    assert run.history[-1].student_spread > 1e-3


class Same(nn.Module):
    """A network whose output stays the same for every image, whatever its training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 0


def test_a_student_that_is_dead_ends_a_real_run(start: Start, tmp_path: Path) -> None:
    run = start(distill_epochs=8)
    run.student.backbone = Same(run.student.backbone)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(TrainingError, match="dead: for 3 epochs"):
        distill(run, path, checkpoint_seconds=0)
    assert run.epoch == 2 + health.DEAD_AFTER
    assert path.is_file(), "the checkpoint from before is kept"


@pytest.mark.slow
def test_a_generator_that_makes_one_image_ends_a_real_run(start: Start) -> None:
    run, notices = start(distill_epochs=health.STOP_AFTER + 2, distill_warmup_epochs=health.STOP_AFTER + 1), Notices()
    made = run._round

    def collapsed(*arguments: object) -> object:
        found = made(*arguments)  # pyright: ignore[reportArgumentType]
        found.images[:] = found.images[:1]
        return found

    run._round = collapsed  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TrainingError, match="one and the same class"):
        distill(run, progress=notices)
    assert run.epoch == health.STOP_AFTER
    assert len(notices.texts) == 1


def test_a_checkpoint_that_fits_by_its_digest_and_not_by_its_content(start: Start, tmp_path: Path) -> None:
    from nayer_edge.distillation import save_checkpoint
    from nayer_edge.errors import IntegrityError

    run, path = start(), tmp_path / "checkpoint.safetensors"
    run.run_epoch()
    state = run.state()

    def spoilt(tensors: dict[str, torch.Tensor], facts: dict[str, object]) -> None:
        run.state = lambda _images=True: (tensors, facts)  # pyright: ignore[reportAttributeAccessIssue]
        save_checkpoint(run, path)
        with pytest.raises(IntegrityError, match="not a checkpoint of this run") as caught:
            resume(start(), path)
        assert f"rm {path}" in caught.value.fix

    for name in ("bank.images", "holdout", "memory.0.mean", next(n for n in state[0] if n.startswith("student."))):
        spoilt({n: t for n, t in state[0].items() if n != name}, state[1])
    spoilt(state[0], {**state[1], "history": [{"epoch": 1}]})
    spoilt(state[0], {**state[1], "epoch": "one"})
    spoilt({n: t.flatten()[:1] if n == "holdout" else t for n, t in state[0].items()}, {**state[1], "epoch": None})


@pytest.mark.parametrize("at_once", [5, 4096])
def test_variety_is_the_share_of_variance_within_classes(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(health, "PIXELS_AT_ONCE", at_once)
    random = torch.Generator().manual_seed(0)
    centres = torch.randint(0, 256, (4, 1, 6, 6), generator=random)
    classes = torch.arange(4).repeat(25)
    free = torch.randint(0, 256, (100, 1, 6, 6), generator=random).to(torch.uint8)
    assert float(health.variety(free, classes)) == pytest.approx(1, abs=0.05)
    assert float(health.variety(centres[classes].to(torch.uint8), classes)) == 0
    # Noise of variance 100 around centres: by the law of total variance.
    noisy = (centres * 0.8 + 25)[classes] + 10 * torch.randn(100, 1, 6, 6, generator=random)
    pixels = noisy.round().to(torch.uint8)
    between = pixels.view(25, 4, 36).float().mean(0).var(0, correction=0).sum()
    wanted = 36 * 100 / (36 * 100 + between)
    assert float(health.variety(pixels, classes)) == pytest.approx(float(wanted), rel=0.08)


@pytest.mark.parametrize("classes", [10, 224, 225, 1000])
def test_any_number_of_classes_leaves_a_variety(classes: int) -> None:
    """Even if the teacher predicts every class once."""
    count = health.sample_size(classes)
    assert (count == health.SAMPLE) == (classes < 225)
    images = torch.randint(256, (count, 1, 2, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert not bool(health.variety(images, torch.arange(count) % classes).isnan())


def test_a_run_with_small_rounds_has_a_variety(start: Start) -> None:
    """Rounds of eight images cannot have one; it is that of the bank's newest images."""
    run = start()
    first, second = run.run_epoch(), run.run_epoch()
    assert run.settings.synthesis.batch == 8
    assert (first.variety, len(run.bank)) == (None, 48)
    assert second.variety is not None
    assert 0.2 < second.variety < 1.2


def test_variety_needs_images_of_one_class() -> None:
    images = torch.zeros(40, 1, 4, 4, dtype=torch.uint8)
    assert bool(health.variety(images, torch.arange(40)).isnan())
    assert not bool(health.variety(images, torch.arange(40) % 4).isnan())


def test_images_that_are_alike_give_one_warning_and_no_stop() -> None:
    (warning,) = warnings_of([Line(variety=0.1) for _ in range(3 * health.STOP_AFTER)])
    assert "nearly alike" in warning
    assert warnings_of([Line(variety=None) for _ in range(40)]) == []
    assert warnings_of([Line(variety=0.1 if n % 4 else 0.6) for n in range(40)]) == []
