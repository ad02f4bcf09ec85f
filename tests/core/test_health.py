"""Numbers that lie are named while the run goes on, and healthy runs have nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from nayer_edge import health
from nayer_edge.distillation import Distillation, distill, resume
from nayer_edge.errors import TrainingError
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.runtime.progress import Silent

Start = Callable[..., Distillation]


@dataclass
class Line:
    """An epoch's signs; a healthy one."""

    phase: str = "distill"
    synthetic_classes: int = 3
    distinct: float = 1.0
    student_spread: float | None = 4.0


def warmup(**signs: float) -> Line:
    return Line(phase="warmup", student_spread=None, **signs)  # pyright: ignore[reportArgumentType]


class Notices(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)


def judged(lines: list[Line]) -> list[str]:
    """What is said epoch by epoch."""
    said = [health.judge(lines[: count + 1], finished=False) for count in range(len(lines))]
    return [text for text in said if text]


def test_a_healthy_history_is_silent() -> None:
    assert judged([warmup(), *[Line() for _ in range(40)]]) == []
    assert health.judge([Line()], finished=True) is None


def test_one_class_is_said_once_and_stops_a_run_that_knew_nothing_else() -> None:
    collapsed = [warmup(synthetic_classes=1) for _ in range(health.STOP_AFTER)]
    (said,) = judged(collapsed[:-1])
    assert f"For {health.NOTICE_AFTER} epochs" in said
    assert "lambda_ce" in said
    with pytest.raises(TrainingError, match="one and the same class") as caught:
        judged(collapsed)
    assert "lambda_ce" in caught.value.fix
    # One good epoch anywhere: there is something in the bank to learn from.
    assert len(judged([warmup(), *collapsed, *collapsed])) == 1


def test_copies_are_said_once_and_stop_a_run_that_knew_nothing_else() -> None:
    copies = [warmup(distinct=0.1) for _ in range(health.STOP_AFTER)]
    (said,) = judged(copies[:-1])
    assert "copies" in said
    with pytest.raises(TrainingError, match="copies of each other") as caught:
        judged(copies)
    assert "noisy_dim" in caught.value.fix


def test_a_dead_student_stops_the_run_after_three_epochs_or_at_its_end() -> None:
    dead = Line(student_spread=0.0)
    assert judged([Line(), dead, dead, Line(), dead, dead]) == []
    with pytest.raises(TrainingError, match="dead: for 3 epochs") as caught:
        judged([Line(), dead, dead, dead])
    assert "distill.lr" in caught.value.fix
    with pytest.raises(TrainingError, match="dead: for 1 epoch "):
        health.judge([Line(), dead], finished=True)


def test_signs_of_images(teacher: Classifier, compute: Compute) -> None:
    images = torch.randint(0, 256, (40, *teacher.spec.shape), generator=torch.manual_seed(0)).to(torch.uint8)
    shares, distinct = health.look_at_images(teacher, images, compute)
    with torch.no_grad():
        seen = teacher(images.float() / 255).argmax(dim=1)
    assert shares.tolist() == pytest.approx([float((seen == c).float().mean()) for c in range(3)])
    assert float(distinct) == 1.0
    shares, distinct = health.look_at_images(teacher, images[:4].repeat(10, 1, 1, 1), compute)
    assert float(distinct) == pytest.approx(0.1)
    assert float(shares.sum()) == pytest.approx(1.0)
    # Only the newest are looked at.
    many = torch.cat((images[:1].expand(500, -1, -1, -1), images[:1].expand(health.SAMPLE, -1, -1, -1)))
    assert float(health.look_at_images(teacher, many, compute)[1]) == pytest.approx(1 / health.SAMPLE)


def test_spread_of_logits() -> None:
    assert float(health.spread(torch.tensor([[1.0, 2.0], [1.0, 2.0]]))) == 0.0
    assert float(health.spread(torch.tensor([[1.0, 2.0], [0.5, 5.0]]))) == 3.0


def test_an_ordinary_run_has_its_signs_in_the_metrics_and_nothing_to_say(start: Start) -> None:
    run, notices = start(distill_epochs=8), Notices()
    distill(run, progress=notices)
    assert notices.said == []
    for epoch in run.history:
        assert 1 <= epoch.synthetic_classes <= 3
        assert epoch.distinct > 0.9
        assert (epoch.student_spread is None) == (epoch.phase == "warmup")
    assert run.history[-1].student_spread is not None
    assert run.history[-1].student_spread > 1e-3


class Same(nn.Module):
    """Says nearly the same of every image, and can be trained to say nothing else."""

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
    assert path.is_file(), "what there was before is kept"


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
    assert len(notices.said) == 1


def test_a_checkpoint_that_fits_by_its_digest_and_not_by_its_content(start: Start, tmp_path: Path) -> None:
    from nayer_edge.distillation import save_checkpoint
    from nayer_edge.errors import IntegrityError

    run, path = start(), tmp_path / "checkpoint.safetensors"
    run.run_epoch()
    state = run.state()

    def spoilt(tensors: dict[str, torch.Tensor], facts: dict[str, object]) -> None:
        run.state = lambda: (tensors, facts)  # pyright: ignore[reportAttributeAccessIssue]
        save_checkpoint(run, path)
        with pytest.raises(IntegrityError, match="not a checkpoint of this run") as caught:
            resume(start(), path)
        assert f"rm {path}" in caught.value.fix

    for name in ("bank.images", "holdout", "memory.0.mean", next(n for n in state[0] if n.startswith("student."))):
        spoilt({n: t for n, t in state[0].items() if n != name}, state[1])
    spoilt(state[0], {**state[1], "history": [{"epoch": 1}]})
    spoilt(state[0], {**state[1], "epoch": "one"})
    spoilt({n: t.flatten()[:1] if n == "holdout" else t for n, t in state[0].items()}, {**state[1], "epoch": None})
