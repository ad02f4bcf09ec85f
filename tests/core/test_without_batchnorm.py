"""Runs with the priors for teachers without BatchNorm, from the first epoch to a continued one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nayer_edge.distillation import Distillation, Settings, distill, resume, save_checkpoint
from nayer_edge.errors import UsageError
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import weights_digest
from nayer_edge.models.prior import EXPECTED
from nayer_edge.runtime.compute import Compute
from nayer_edge.storage.files import digest_of

Start = Callable[..., Distillation]
PROCEDURAL = {
    "synthesis_prior": "procedural",
    "synthesis_g_steps": 3,
    "synthesis_lambda_ce": 0.5,
    "synthesis_lambda_adv": 1.33,
}
GENERATOR = {"synthesis_prior": "generator"}
PRIORS = pytest.mark.parametrize("prior", [PROCEDURAL, GENERATOR], ids=["procedural", "generator"])
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def begin(
    plain: Classifier,
    label_embeddings: LabelEmbeddings,
    settings: Callable[..., Settings],
    compute: Compute,
    start: Start,
) -> Start:
    """`begin(PROCEDURAL, distill_views=2)`: a new run with a teacher without BatchNorm."""

    def run(prior: dict[str, object], **changes: object) -> Distillation:
        student = start().student
        return Distillation(plain, label_embeddings, student, settings(**{**prior, **changes}), compute)

    return run


@PRIORS
def test_a_run_without_batchnorm(begin: Start, prior: dict[str, object]) -> None:
    still = {"synthesis_lambda_adv": 0.0, "synthesis_lambda_ce": 0.0} if prior is PROCEDURAL else {}
    run = begin(prior, distill_epochs=8, distill_steps=30, distill_lr=0.1, synthesis_batch=30, **still)
    distill(run)
    first, last = run.history[2], run.history[-1]
    assert first.loss_kd is not None
    assert last.loss_kd is not None
    assert last.loss_kd < 0.75 * first.loss_kd
    assert last.loss_bn is None
    assert (run.whole_generator() is None) == (prior is PROCEDURAL)
    names = run.state()[0]
    assert any(name.startswith("generator.") for name in names) == (prior is GENERATOR)
    assert not [name for name in names if name.startswith("memory.")]


def test_the_generator_alone_is_nayer_without_its_loss(start: Start) -> None:
    """A teacher with BatchNorm and lambda_bn = 0 makes the same images, bit for bit."""
    weights = {"synthesis_lambda_ce": 1.0, "synthesis_lambda_adv": 1.0}
    one, other = start(**weights, synthesis_lambda_bn=0.0), start(**weights, **GENERATOR)
    with_it = start(**weights)
    for run in (one, other, with_it):
        distill(run)
    (images, labels), (same, same_labels) = (run.bank.newest(len(run.bank)) for run in (one, other))
    assert torch.equal(images, same)
    assert torch.equal(labels, same_labels)
    assert not torch.equal(images, with_it.bank.newest(len(with_it.bank))[0])
    assert one.history[-1].loss_bn is not None
    assert other.history[-1].loss_bn is None
    assert other.history[-1].loss_ce == one.history[-1].loss_ce
    assert other.history[-1].loss_adv == one.history[-1].loss_adv != 0


def test_the_generator_learns_the_class_of_its_labels(begin: Start) -> None:
    run = begin(GENERATOR, synthesis_g_steps=60, synthesis_batch=30, synthesis_warmup_rounds=1)
    untrained = begin(GENERATOR, synthesis_g_steps=1, synthesis_batch=30, synthesis_warmup_rounds=1)
    found, before = run.run_epoch().loss_ce, untrained.run_epoch().loss_ce
    assert found is not None
    assert before is not None
    assert found < 0.7 * before


@PRIORS
@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.slow), {"distill_views": 3, "distill_mixup": 0.5, "synthesis_reserve": 0.4}],
)
def test_a_continued_run_ends_with_the_same_bits(
    begin: Start, tmp_path: Path, prior: dict[str, object], changes: dict[str, object]
) -> None:
    whole, path = begin(prior, **changes), tmp_path / "state.safetensors"
    distill(whole)
    for stop in range(1, 4):
        part = begin(prior, **changes)
        if stop > 1:
            assert resume(part, path)
            assert part.epoch == stop - 1
        part.run_epoch()

        save_checkpoint(part, path)
    last = begin(prior, **changes)
    assert resume(last, path)
    distill(last)
    assert [epoch.loss_adv == 0 for epoch in whole.history] == [True, True, False, False]
    (one, _), (other, _) = whole.state(), last.state()
    for state in (one, other):
        if "views.logits" in state:  # what is not cached yet is uninitialised memory
            state["views.logits"] = state["views.logits"][state["views.known"]]
    assert sorted(one) == sorted(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_default_prior_does_not_change_a_digest(
    teacher: Classifier, label_embeddings: LabelEmbeddings, settings: Callable[..., Settings]
) -> None:
    """The keys that checkpoints of 953f887, the last commit without `prior`, count."""
    chosen = settings()
    keys = (
        *("batch", "g_steps", "rounds", "warmup_rounds", "g_life", "lr", "lambda_bn", "lambda_ce", "lambda_adv"),
        *("bn_momentum", "reserve", "discard_rounds", "augment"),
    )
    synthesis = chosen.synthesis.model_dump(mode="json")
    former = {
        "generator": chosen.generator.model_dump(mode="json"),
        "synthesis": {key: synthesis[key] for key in keys},
        "distill": chosen.distill.model_dump(mode="json"),
        "seed": 0,
        "student": "a student",
        "teacher": weights_digest(teacher),
        "lte": label_embeddings.digest,
    }
    now = chosen.digest(teacher, label_embeddings, "a student")
    assert now == digest_of(former)
    for change in (PROCEDURAL, GENERATOR, {"synthesis_pixel_step": 0.2}, {"synthesis_lambda_tv": 0.1}):
        assert settings(**change).digest(teacher, label_embeddings, "a student") != now


@pytest.mark.parametrize(("prior", "other"), list(itertools.permutations([{}, PROCEDURAL, GENERATOR], 2)))
def test_a_checkpoint_of_another_prior_is_not_continued(
    start: Start, tmp_path: Path, prior: dict[str, object], other: dict[str, object]
) -> None:
    run = start(**prior)
    run.run_epoch()
    save_checkpoint(run, tmp_path / "state.safetensors")
    assert not resume(start(**other), tmp_path / "state.safetensors")
    assert resume(start(**prior), tmp_path / "state.safetensors")


@PRIORS
def test_a_teacher_that_looks_at_the_whole_batch_is_refused(
    prior: dict[str, object],
    teacher: Classifier,
    label_embeddings: LabelEmbeddings,
    student: Classifier,
    settings: Callable[..., Settings],
    compute: Compute,
) -> None:
    for norm in [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.running_mean = norm.running_var = None
    with pytest.raises(UsageError, match="4 BatchNorm layers without running statistics"):
        Distillation(teacher, label_embeddings, student, settings(**prior), compute)


def test_what_init_promises_is_what_was_measured() -> None:
    found = json.loads((RESULTS / "without_batchnorm.generator.json").read_text(encoding="utf-8"))
    words = {"GroupNorm ResNet-20": "teacher with GroupNorm", "ConvNeXt": "ConvNeXt", "ViT": "ViT"}
    for kind, name in words.items():
        measured, teacher = found["summary"][kind]["generator"], found["teachers"][kind]["top1"]
        assert measured["seeds"] == 3
        assert f"{100 * measured['mean']:.1f} % ({name}, {100 * teacher:.1f} %)" in EXPECTED
    found = json.loads((RESULTS / "without_batchnorm.cifar10.json").read_text(encoding="utf-8"))
    measured, teacher = found["summary"]["GroupNorm ResNet-20"]["generator"], found["teachers"]["GroupNorm ResNet-20"]
    assert measured["seeds"] == 3
    assert f"reached {100 * measured['mean']:.1f} % (GroupNorm, {100 * teacher['top1']:.1f} %)" in EXPECTED
