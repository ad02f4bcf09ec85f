"""The 64- and 224-pixel recipes, where no such data is at hand: own networks and sizes, random teachers, few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nayer_edge.models.load import build_classifier
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.runtime.compute import seeded
from nayer_edge.storage.tensors import load_tensors, save_tensors

FEW = [
    "synthesis.batch=4",
    "synthesis.g_steps=2",
    "synthesis.rounds=1",
    "synthesis.warmup_rounds=1",
    "distill.epochs=2",
    "distill.warmup_epochs=1",
    "distill.steps=2",
    "distill.batch=4",
    "distill.holdout_rounds=1",
    "device=cpu",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-imagenet-r34-r18", "imagenet-r50-mobilenet_v2"])
def test_a_large_recipe_runs_to_its_onnx(name: str, tmp_path: Path) -> None:
    weights = tmp_path / "teacher.safetensors"
    recipe = load_recipe(name, [*FEW, f"teacher.weights={json.dumps(str(weights))}"])
    with seeded(0):
        teacher = build_classifier(recipe.teacher.model, recipe.teacher.input, recipe.teacher.classes)
    save_tensors(weights, dict(teacher.backbone.state_dict()))
    run = run_recipe(recipe, tmp_path / "run", last="onnx")
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["warmup", "distill"]
    assert lines[-1]["bank_images"] == 8
    bank = load_tensors(run.path("bank.safetensors"), "a bank")
    assert bank["images"].shape == (8, *recipe.teacher.input.shape)
    assert bank["images"].float().std() > 1, "images, not a plain colour"
    lte = load_tensors(run.path("lte.safetensors"), "embeddings")
    assert lte["embeddings"].shape[0] == len(recipe.teacher.classes), "ready embeddings, no language model"
    untrained = tmp_path / "untrained"
    with seeded(1):
        other = build_classifier(recipe.student.model, recipe.teacher.input, recipe.teacher.classes)
    student = load_tensors(run.path("student/student.safetensors"), "a student")
    assert set(student) == set(other.backbone.state_dict()), untrained
    assert all(bool(torch.isfinite(tensor).all()) for tensor in student.values() if tensor.is_floating_point())
    assert run.path("export/student.fp32.onnx").stat().st_size > 1e6
