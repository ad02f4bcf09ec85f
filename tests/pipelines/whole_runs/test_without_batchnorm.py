"""Teachers without BatchNorm: the whole way from a teacher to its artifacts, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nayer_edge as ne
from nayer_edge.config import InputSpec, Synthesis
from nayer_edge.errors import UsageError
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.prior import require_prior
from nayer_edge.pipelines.costs import budget
from nayer_edge.pipelines.costs.budget import Costs
from nayer_edge.pipelines.costs.planning import with_sections
from nayer_edge.pipelines.recipes import preflight
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.steps import STEPS
from nayer_edge.pipelines.trust.sbom import make_sbom
from nayer_edge.storage.run_folder import RunFolder

Invoke = Callable[..., Any]
CLASSES = ("zero", "one", "two", "three")
SPEC = ne.InputSpec(channels=1, height=8, width=8)
TINY: dict[str, Any] = {
    "synthesis": {
        **{"batch": 8, "g_steps": 2, "warmup_rounds": 2, "rounds": 2, "reserve": 0.3},
        **{"lambda_adv": 1.33, "augment": {"pad": 1}},
    },
    "generator": {"noisy_dim": 8, "channels": 4},
    "distill": {
        **{"epochs": 4, "warmup_epochs": 1, "steps": 2, "batch": 8, "holdout_rounds": 1, "augment": {"pad": 1}},
        **{"optimizer": "muon", "schedule": "constant", "decay_epochs": 1, "views": 2, "mixup": 0.5},
    },
    "lte": {"encoder": "onehot"},
    "export": {"calibration_images": 8, "calibration_method": "minmax", "max_drop": None},
    "validate": {"synthetic_images": 32},
    # A few steps make no good student.
    "gate": {"artifacts": ["int8.cpu"], "accuracy": {"max_drop_vs_fp32": 0.99, "max_drop_vs_teacher": 0.99}},
    "device": "cpu",
    "precision": "fp32",
}


class Grouped(nn.Module):
    """An untrained teacher with GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(72, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


@pytest.fixture
def teacher() -> ne.Teacher:
    return ne.Teacher(Grouped(), classes=CLASSES, input=SPEC)


def tiny(prior: str) -> dict[str, Any]:
    """`TINY` with a prior."""
    return {**TINY, "synthesis": {**TINY["synthesis"], "prior": prior}}


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["generator", "procedural"])
def test_the_whole_way_without_batchnorm(prior: str, teacher: ne.Teacher, tmp_path: Path, invoke: Invoke) -> None:
    generated = prior == "generator"
    settings = tiny(prior)
    run = ne.distill(teacher, "nayer:resnet8", tmp_path / "run", **settings)
    assert (run.path / "generator" / "generator.safetensors").exists() == generated
    run.export(int8=True, targets=["cpu"])
    report = run.validate()
    assert report.dataset.kind == "synthetic"
    names = [each.name for each in report.artifacts if each.status == "measured"]
    assert {"fp32", "int8.cpu"} <= set(names)
    verdict = run.gate()
    assert verdict.verdict == "pass", verdict
    images, made_for = run.draw(40)
    assert images.shape == (40, 1, 8, 8)
    again, _ = run.draw(40)
    assert np.array_equal(images, again)
    with torch.no_grad():
        answers = Grouped().eval()((torch.from_numpy(images) - 0.5) / 0.5).argmax(1)
    if generated:
        assert np.bincount(made_for).tolist() == [10] * len(CLASSES), "the labels are those that were asked for"
    else:
        assert answers.tolist() == made_for.tolist(), "the labels are the teacher's"
    assert invoke("verify", run.path).code == 0
    assert "random numbers" in make_sbom(RunFolder.open(run.path))
    assert invoke("report", run.path).code == 0
    used = (run.path / "report.html").read_text(encoding="utf-8")
    assert ("The generator starts from embeddings" in used) == generated

    # Another student from its bank, and more epochs, bit by bit as resumable as with BatchNorm. The other student's
    # settings are those of the bank's prior, and so are the weights of its losses.
    other = ne.distill(teacher, "nayer:resnet20", tmp_path / "other", bank=run, **{**TINY, "synthesis": {"batch": 8}})
    started = json.loads((other.path / "student" / "source.json").read_text())
    assert "bank.safetensors" in started["files"]
    assert bool([name for name in started["files"] if name.startswith("generator")]) == generated
    taken = other.recipe.synthesis
    assert (taken.prior, taken.lambda_adv, taken.lambda_ce) == (prior, 1.33, 1.0 if generated else 0.0)
    assert (taken.g_steps, taken.rounds) == (2, Synthesis().rounds), "its steps, and as many rounds as the recipe says"
    longer = {**settings, "distill": {**TINY["distill"], "epochs": 6}}
    ne.distill(teacher, "nayer:resnet8", run.path, **longer)
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 6
    ne.distill(teacher, "nayer:resnet8", tmp_path / "whole", **longer)
    student = "student/student.safetensors"
    assert (run.path / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()


def test_the_prior_brings_the_settings_that_were_measured() -> None:
    """`--set synthesis.prior=…` alone must not move the pixels of procedural images (LOG.md)."""
    alone = Synthesis.model_validate({"prior": "procedural"})
    assert (alone.lambda_ce, alone.lambda_adv, alone.g_steps) == (0.0, 0.0, 1)
    generated = Synthesis.model_validate({"prior": "generator"})
    assert (generated.lambda_ce, generated.lambda_adv, generated.g_steps) == (1.0, 1.0, 30)
    assert load_recipe("digits", ["synthesis.prior=generator"]).lte.encoder == "all-MiniLM-L6-v2"
    assert Synthesis.model_validate({"prior": "procedural", "lambda_adv": 1.33}).lambda_adv == 1.33
    assert (Synthesis().lambda_ce, Synthesis().lambda_adv, Synthesis().g_steps) == (0.5, 1.33, 30)
    recipe = load_recipe("digits", ["synthesis.prior=procedural"])
    assert (recipe.synthesis.lambda_adv, recipe.lte.encoder) == (0.0, "onehot")
    # What the recipe itself says stays.
    usual = load_recipe("digits").synthesis
    assert (recipe.synthesis.lambda_ce, recipe.synthesis.g_steps) == (usual.lambda_ce, usual.g_steps)


def test_a_budget_keeps_the_weights_that_were_given() -> None:
    costs = Costs(1e-3, 1e-3, 1e-3, 1e-3, 5.0)
    for prior, chosen in (("generator", "synthesis.lambda_adv=0.3"), ("procedural", "synthesis.lambda_ce=0.3")):
        recipe = load_recipe("digits", [f"synthesis.prior={prior}", chosen])
        made = budget.plan(600, costs, 10, prior=recipe.synthesis.prior)
        sections = budget.settings(600, made, costs, 64, recipe.synthesis.prior)
        planned = with_sections(recipe, sections).synthesis
        assert planned.prior == prior
        assert 0.3 in (planned.lambda_ce, planned.lambda_adv)
        assert planned.g_steps == (10 if prior == "generator" else 1)


def test_the_default_prior_names_the_other_one(teacher: ne.Teacher, tmp_path: Path) -> None:
    settings = tiny("batchnorm")
    with pytest.raises(UsageError, match="has no BatchNorm layers") as caught:
        ne.distill(teacher, "nayer:resnet8", tmp_path / "run", **settings)
    assert "synthesis.prior=generator" in f"{caught.value.why} {caught.value.fix}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{ img_size = 16, patch_size = 5 }", "patches of 5×5, which do not divide images of 16×16"),
        ("{ img_size = 32, patch_size = 4 }", "built for images of 32×32, and it gets images of 16×16"),
    ],
)
@pytest.mark.parametrize("prior", ["generator", "procedural"])
def test_a_transformer_of_another_size_is_refused_before_any_work(prior: str, arguments: str, words: str) -> None:
    pytest.importorskip("timm")
    settings = ["teacher.model=timm:test_vit", f"teacher.arguments={arguments}", f"synthesis.prior={prior}"]
    with pytest.raises(UsageError, match="cannot run here") as caught:
        preflight.check(load_recipe("digits", settings), STEPS)
    assert words in caught.value.why


@pytest.mark.parametrize(
    ("size", "patch", "words"),
    [
        (32, 4, "built for images of 32×32, and it gets images of 16×16"),
        (16, 5, "patches of 5×5, which do not divide images of 16×16"),
    ],
)
def test_transformers_that_would_interpolate_or_leave_out_pixels(size: int, patch: int, words: str) -> None:
    """As those of transformers' library do, without an error (DINOv2; ViT with a patch that does not divide)."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(image_size=size, patch_size=patch, num_channels=1, hidden_size=16, num_hidden_layers=1,
                          num_attention_heads=2, num_labels=3)  # fmt: skip
    spec = InputSpec(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))
    network = Classifier(Dinov2ForImageClassification(config), "hf:dino", spec, ("a", "b", "c"))
    with pytest.raises(UsageError, match=words) as caught:
        require_prior(network, "The teacher", "generator")
    assert "teacher.resize = [" in caught.value.fix


@pytest.mark.parametrize(
    "settings",
    [
        ["teacher.arguments={ img_size = 16, patch_size = 4 }"],
        ["teacher.arguments={ img_size = 32, patch_size = 4 }", "teacher.resize=[32, 32]"],
    ],
)
def test_a_transformer_that_fits_is_accepted(settings: list[str]) -> None:
    pytest.importorskip("timm")
    chosen = ["teacher.model=timm:test_vit", "synthesis.prior=generator", *settings]
    preflight.check(load_recipe("digits", chosen), STEPS)
