"""Losses on pixels that need no BatchNorm: against formulas, scipy, and what a step along their gradients changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from nayer_edge import generator as generators
from nayer_edge import image_priors, procedural
from nayer_edge.config import Augment, Generator, InputSpec, Synthesis
from nayer_edge.errors import UsageError
from nayer_edge.memory_bank import to_unit
from nayer_edge.models.build import build
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.synthesis import synthesize_round

Stream = Callable[[int], torch.Generator]
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def vit() -> Classifier:
    """timm's smallest transformer, untrained: 16 patches and a class token."""
    spec = InputSpec(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build("timm:test_vit", spec, CLASSES, {"img_size": 16, "patch_size": 4})
    return Classifier(built.network, "timm:test_vit", spec, CLASSES).eval().requires_grad_(False)


def test_total_variation_is_the_mean_of_both_differences() -> None:
    images = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    pixels = images.numpy()
    wanted = np.abs(pixels[:, :, 1:] - pixels[:, :, :-1]).mean() + np.abs(pixels[..., 1:] - pixels[..., :-1]).mean()
    assert float(image_priors.total_variation(images)) == pytest.approx(wanted, rel=1e-5)
    assert float(image_priors.total_variation(torch.ones(2, 1, 4, 4))) == 0
    assert float(image_priors.total_variation(torch.tensor([[[[0.0, 1.0, 1.0]]]]))) == 0.5, "one row: no vertical part"


def test_activation_loss_ignores_signs_and_width() -> None:
    features = torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    assert float(image_priors.activation_loss(features)) == -1.5
    assert float(image_priors.activation_loss(torch.cat([features, features], dim=1))) == -1.5


def test_patch_similarity_is_the_entropy_of_scipys_density() -> None:
    tokens = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0))
    unit = (tokens / tokens.norm(dim=2, keepdim=True)).numpy().astype(np.float64)
    entropies = []
    for image in unit:
        pairs = (image @ image.T)[np.triu_indices(9, 1)]
        factor = 1.06 * pairs.std() * len(pairs) ** -0.2 / pairs.std(ddof=1)
        entropies.append(-np.log(stats.gaussian_kde(pairs, bw_method=factor)(pairs)).mean())
    assert float(image_priors.patch_similarity_loss(tokens)) == pytest.approx(-np.mean(entropies), rel=1e-4)


def test_patches_that_are_all_alike_have_the_least_entropy() -> None:
    random = torch.Generator().manual_seed(0)
    alike = torch.ones(2, 16, 8, requires_grad=True)
    various = torch.randn(2, 16, 8, generator=random)
    loss = image_priors.patch_similarity_loss(alike)
    assert float(loss.detach()) > float(image_priors.patch_similarity_loss(various))
    (gradient,) = torch.autograd.grad(loss, alike)
    assert bool(gradient.isfinite().all())


def test_many_patches_stay_affordable() -> None:
    """197 tokens have 19,306 pairs, whose distances would take 1.5 GB for each image."""
    tokens = torch.randn(2, 197, 8, generator=torch.Generator().manual_seed(0))
    few = image_priors.patch_similarity_loss(tokens[:, :23])
    assert float(image_priors.patch_similarity_loss(tokens)) == pytest.approx(float(few), abs=0.3)


def test_what_is_watched(vit: Classifier) -> None:
    images = torch.rand(2, 1, 16, 16)
    with image_priors.watching(vit) as seen:
        logits = vit(images)
    head = [module for module in vit.modules() if isinstance(module, nn.Linear)][-1]
    assert seen.features is not None
    torch.testing.assert_close(F.linear(seen.features, head.weight, head.bias), logits)
    assert len(seen.tokens) == len(image_priors.attention_layers(vit)) > 1
    assert {tokens.shape[:2] for tokens in seen.tokens} == {(2, 17)}
    vit(images)
    assert len(seen.tokens) == len(image_priors.attention_layers(vit)), "it stopped watching"


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_attention_of_other_libraries(library: str) -> None:
    if library == "torch":
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        network: nn.Module = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    else:
        from transformers import ViTConfig, ViTModel

        sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
        network = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))
    assert len(image_priors.attention_layers(network)) == 3, "one for each block, and none of their parts"
    given = torch.rand(2, 5, 8) if library == "torch" else torch.rand(2, 3, 8, 8)
    with image_priors.watching(network.train()) as seen:
        network(given)
    assert [tokens.shape[:2] for tokens in seen.tokens] == [(2, 5)] * 3


def loss_of(weight: str, images: torch.Tensor, network: Classifier) -> float:
    """The loss that a weight belongs to."""
    with torch.no_grad(), image_priors.watching(network) as watched:
        network(images)
    assert watched.features is not None
    return float(
        {
            "lambda_tv": lambda: image_priors.total_variation(images),
            "lambda_act": lambda: image_priors.activation_loss(watched.features),
            "lambda_patch": lambda: sum(map(image_priors.patch_similarity_loss, watched.tokens)),
        }[weight]()
    )


@pytest.mark.parametrize("weight", ["lambda_tv", "lambda_act", "lambda_patch"])
def test_a_step_lowers_its_loss(weight: str, vit: Classifier, compute: Compute, stream: Stream) -> None:
    """Also without a student, as in warm-up."""
    still = Augment(pad=0, flip=False)
    config = Synthesis(prior="procedural", pixel_step=0.003, lambda_ce=0, lambda_adv=0, augment=still, **{weight: 1.0})
    images = 0.1 + 0.8 * procedural.canvases(8, vit.spec.shape, stream(0))
    moved, loss_adv = procedural.ascend(images, torch.zeros(8, dtype=torch.long), vit, None, config, compute, stream(1))

    assert loss_of(weight, moved, vit) < loss_of(weight, images, vit)
    assert float(loss_adv) == 0


@pytest.mark.parametrize("weight", ["lambda_tv", "lambda_act", "lambda_patch"])
def test_a_generator_lowers_it_too(weight: str, vit: Classifier, compute: Compute, stream: Stream) -> None:
    def made(value: float) -> torch.Tensor:
        config = Synthesis(prior="generator", batch=12, g_steps=40, lambda_adv=0, augment=Augment(pad=0, flip=False),
                           **{weight: value})  # fmt: skip
        network = generators.Generator(6, 3, 12, vit.spec.shape, Generator(noisy_dim=10, channels=4))
        generators.initialise(network, stream(0))
        embeddings = torch.randn(3, 6, generator=stream(1))
        return to_unit(synthesize_round(network, embeddings, vit, None, None, config, compute, stream(2)).images)

    assert loss_of(weight, made(10.0), vit) < loss_of(weight, made(0.0), vit)


def test_a_loss_without_its_layers_is_refused(vit: Classifier) -> None:
    convolutions = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for weight, what in (
        ("lambda_patch", "no attention layers"),
        ("lambda_act", "last linear layer, and the teacher has none"),
    ):
        config = Synthesis(prior="procedural", **{weight: 1.0})
        image_priors.require_layers(vit, config)
        with pytest.raises(UsageError, match=what) as caught:
            image_priors.require_layers(convolutions, config)
        assert caught.value.fix == f"Set synthesis.{weight} to 0."
