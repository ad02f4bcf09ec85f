"""What students cost, against published figures, a formula by hand, and the files that are really written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchvision.models import EfficientNet_B0_Weights, MobileNet_V2_Weights, MobileNet_V3_Small_Weights

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.models.load import build_classifier, check_forward
from nayer_edge.pipelines.costs.model_cost import cost_of_network
from nayer_edge.pipelines.costs.students import LIBRARY, int8_bytes_of, measure, students_for
from nayer_edge.pipelines.recipes.loading import load_recipe, shipped

Invoke = Callable[..., Any]
SPEC = InputSpec(height=32, width=32)
LABELS = tuple(map(str, range(10)))


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("torchvision:mobilenet_v2", MobileNet_V2_Weights.IMAGENET1K_V1),
        ("torchvision:mobilenet_v3_small", MobileNet_V3_Small_Weights.IMAGENET1K_V1),
        ("torchvision:efficientnet_b0", EfficientNet_B0_Weights.IMAGENET1K_V1),
    ],
)
def test_costs_are_those_that_torchvision_publishes(model: str, weights: Any) -> None:
    with torch.device("meta"):
        network = build_classifier(model, InputSpec(height=224, width=224), tuple(map(str, range(1000)))).eval()
        macs = cost_of_network(network).macs
    assert network.parameter_count == weights.meta["num_params"]
    # "_ops" are billions of multiply-accumulates, to three decimals; torchvision rounds up its own count.
    assert macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=2e-3)


def test_multiply_accumulates_by_hand() -> None:
    """CIFAR ResNet-8 at 32 pixels: kernel² · inputs · outputs · positions of each convolution, and the linear layer."""
    stem = 9 * 3 * 16 * 32**2
    first = 2 * 9 * 16 * 16 * 32**2
    second = (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32) * 16**2
    third = (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64) * 8**2
    network = build_classifier("nayer:resnet8", SPEC, LABELS).eval()
    assert cost_of_network(network).macs == stem + first + second + third + 64 * 10
    assert not any(module._forward_hooks for module in network.modules()), "nothing stays in the network"


@pytest.mark.slow
def test_a_student_that_is_exported_and_timed() -> None:
    (cost,) = measure(["nayer:resnet8"], SPEC, 10, runs=5, threads=1)
    assert cost.int8_measured
    assert cost.int8_bytes == pytest.approx(int8_bytes_of(build_classifier("nayer:resnet8", SPEC, LABELS)), rel=0.1)
    assert cost.fp32_ms is not None
    assert cost.int8_ms is not None
    assert min(cost.fp32_ms, cost.int8_ms) > 0
    assert cost.threads == 1


@pytest.mark.slow
def test_computed_sizes_are_those_of_the_files() -> None:
    models = students_for(SPEC)
    for cost in measure(models, SPEC, 10, runs=5, threads=1):
        network = build_classifier(cost.model, SPEC, LABELS)
        assert int8_bytes_of(network) == pytest.approx(cost.int8_bytes, rel=0.1), cost.model


@pytest.mark.slow
def test_the_students_of_a_size() -> None:
    small, large = students_for(SPEC), students_for(InputSpec(height=224, width=224))
    assert {model for model in small if "@" in model} == {f"{model}@32" for model in LIBRARY}
    assert not [model for model in large if "@" in model]
    assert {"nayer:resnet8", "nayer:resnet20"} <= set(small) & set(large)
    for spec, models in ((SPEC, small), (InputSpec(height=224, width=224), large)):
        with torch.device("meta"):
            for model in models:
                check_forward(build_classifier(model, spec, LABELS))
    assert [cost.model for cost in measure(small[:2], SPEC, 10, latency=False)] == small[:2]


@pytest.mark.parametrize("teacher", ["cifar10-r34", "imagenet-r50"])
def test_every_edge_student_has_a_recipe(teacher: str) -> None:
    names = {entry.name for entry in shipped()}
    for student in ("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2", "efficientnet_b0", "resnet8", "resnet20"):
        assert f"{teacher}-{student}" in names
        recipe = load_recipe(f"{teacher}-{student}")
        assert student in recipe.student.model
        assert recipe.student.model in students_for(recipe.teacher.input)
        assert (
            recipe.teacher.model == {"cifar10-r34": "nayer:resnet34", "imagenet-r50": "torchvision:resnet50"}[teacher]
        )


# ------------------------------------------------------------------ the command


def test_the_table_fits_eighty_columns(invoke: Invoke) -> None:
    longest = [max(students_for(SPEC), key=len), "torchvision:shufflenet_v2_x0_5@32"]
    assert longest[1] in students_for(SPEC)
    answer = invoke("students", *longest, "--no-latency", "--classes", "1000")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 80
    # On a slow machine signs of life stand before the table.
    header = next(line for line in lines if line.startswith("student"))
    assert header.split() == ["student", "params", "MACs", "INT8", "size"]
    row = next(line for line in lines if line.startswith("torchvision:shufflenet_v2_x0_5@32"))
    assert row.count("≈") == 1, "a computed size is marked"
    assert "computed from the weights" in answer.out


def test_json_for_one_student(invoke: Invoke) -> None:
    answer = invoke("students", "nayer:resnet8", "--input", "1x16x16", "--json", "--threads", "1")
    assert answer.code == 0, answer.err
    (cost,) = json.loads(answer.out)
    assert cost["model"] == "nayer:resnet8"
    assert cost["int8_measured"]
    assert cost["params"] == build_classifier("nayer:resnet8", InputSpec(channels=1), LABELS).parameter_count


@pytest.mark.parametrize(
    ("size", "channels"), [("1x16x16", 1), ("16x16x1", 1), ("1, 16, 16", 1), ("16x16", 3), ("16", 3), ("8×16×16", 8)]
)
def test_sizes_are_spelt_as_for_init(size: str, channels: int, invoke: Invoke) -> None:
    answer = invoke("students", "nayer:resnet8", "--input", size, "--no-latency", "--json")
    assert answer.code == 0, answer.err
    (cost,) = json.loads(answer.out)
    network = build_classifier("nayer:resnet8", InputSpec(channels=channels, height=16, width=16), LABELS).eval()
    assert (cost["params"], cost["macs"]) == (network.parameter_count, cost_of_network(network).macs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "1x2x3x4"), "not an image size"),
        (("--input", "3x32xwide"), "not an image size"),
        (("--input", "3x2x2"), "Invalid input specification --input 3x2x2"),
        (("--classes", "1"), "at least 2 classes"),
        (("nayer:resnet9",), "Did you mean 'resnet8'"),
        (("torchvision:inception_v3",), "cannot take images of 3×32×32"),
        (("python:nets:make",), "runs only with --trust-code"),
    ],
)
def test_what_it_refuses(invoke: Invoke, arguments: tuple[str, ...], message: str) -> None:
    answer = invoke("students", "--no-latency", *arguments)
    assert answer.code in (2, 4)
    assert message in answer.err


def test_all_names_are_tried_first() -> None:
    done: list[str] = []
    with pytest.raises(UsageError):
        measure(["nayer:resnet8", "nayer:resnet9"], SPEC, 10, latency=False, on_student=done.append)
    assert not done
