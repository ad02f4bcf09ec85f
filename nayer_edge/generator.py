"""The noisy-layer generator (Tran et al., CVPR 2024, §3.2 and Fig. 2).

E[y] → BatchNorm1d → noisy linear → linear → up-sampling convolutions → sigmoid. There is no latent z: all
diversity comes from the noisy layer, which is re-drawn at the start of every round and trained during it.

Shapes: B images, G groups of at most K classes (G = ⌈B/K⌉), D embedding dimensions, Z noisy dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nayer_edge.batchnorm import synchronise_batchnorms
from nayer_edge.config import Generator as GeneratorConfig
from nayer_edge.errors import IntegrityError
from nayer_edge.runtime.compute import seeded
from nayer_edge.runtime.distributed import SINGLE, World
from nayer_edge.storage.files import read_json, sha256_of, write_json
from nayer_edge.storage.tensors import load_tensors, save_tensors

CARD_SCHEMA = "nayer-edge/generator/1"
_NOISY = ("noisy.weight", "noisy.bias")
Memory = list[tuple[Tensor, Tensor]]
"""moving average over rounds of the mean and variance at each of the teacher's BatchNorm layers"""


class NoisyLinear(nn.Module):
    """One linear map D → Z per group of labels, computed as one batched matrix product.

    Args:
        world: ranks, each with its own `groups` groups, all drawn from one random stream.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, world: World = SINGLE) -> None:
        super().__init__()
        self.rank, self.ranks = world.rank, world.size
        self.weight = nn.Parameter(torch.empty(groups, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(groups, 1, outputs))

    @torch.no_grad()
    def redraw(self, random: torch.Generator) -> None:
        """Draws the weights from N(0, 1) and sets the biases to 0."""
        if self.ranks == 1:
            self.weight.normal_(generator=random)
        else:
            groups, *sizes = self.weight.shape
            drawn = self.weight.new_empty(self.ranks * groups, *sizes).normal_(generator=random)
            self.weight.copy_(drawn.chunk(self.ranks)[self.rank])
        self.bias.zero_()

    def forward(self, x: Float[Tensor, "G K D"]) -> Float[Tensor, "G K Z"]:
        return torch.baddbmm(self.bias, x, self.weight)


class Generator(nn.Module):
    """Embeddings of B labels → B images in [0, 1].

    Args:
        embedding_dim: D.
        classes: number of labels that share one noisy linear layer.
        batch: images per round; the noisy layer has ⌈batch/classes⌉ groups.
        shape: (channels, height, width) of the images; any size from 4 pixels.
        config: widths.
        world: ranks that generate equal shares of the batch. Each rank has the groups of its share; with fewer images
            than classes there is one group, shared by all ranks.
    """

    def __init__(
        self,
        embedding_dim: int,
        classes: int,
        batch: int,
        shape: tuple[int, int, int],
        config: GeneratorConfig,
        world: World = SINGLE,
    ) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.arguments = {
            "embedding_dim": embedding_dim,
            "classes": classes,
            "batch": batch,
            "shape": list(shape),
            "config": config.model_dump(mode="json"),
        }
        share = batch // world.size
        self.group = min(classes, share)
        # Two doublings up to 64 pixels, as published; five above (from a 7×7 grid at 224 pixels).
        doublings = 2 if max(self.height, self.width) <= 64 else 5
        self.grid = (math.ceil(self.height / 2**doublings), math.ceil(self.width / 2**doublings))
        wide, narrow = 2 * config.channels, config.channels
        self.embedding_norm = nn.BatchNorm1d(embedding_dim)
        own_groups = world if batch > classes else SINGLE
        self.noisy = NoisyLinear(math.ceil(share / self.group), embedding_dim, config.noisy_dim, own_groups)
        self.project = nn.Linear(config.noisy_dim, wide * self.grid[0] * self.grid[1])
        layers: list[nn.Module] = [nn.BatchNorm2d(wide)]
        for number in range(doublings):
            outputs = narrow if number == doublings - 1 else wide
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(wide, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.2),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(narrow, channels, 3, padding=1))
        synchronise_batchnorms(self, world)

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """Parameters that only this rank has."""
        return list(self.noisy.parameters()) if self.noisy.ranks > 1 else []

    def forward(self, embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B C H W"]:
        count = embeddings.shape[0]
        x = self.embedding_norm(embeddings)
        groups = self.noisy.weight.shape[0]
        x = nn.functional.pad(x, (0, 0, 0, groups * self.group - count))
        x = self.noisy(x.view(groups, self.group, -1)).flatten(0, 1)[:count]
        x = self.project(x).view(count, -1, *self.grid).contiguous(memory_format=torch.channels_last)
        x = self.body(x)
        top, left = (x.shape[2] - self.height) // 2, (x.shape[3] - self.width) // 2
        return torch.sigmoid(x[:, :, top : top + self.height, left : left + self.width].float())


def initialise(generator: Generator, random: torch.Generator) -> None:
    """Re-initialises every weight with PyTorch's default distributions, from one random stream (for `g_life`)."""
    device = generator.noisy.weight.device
    # Drawn on the CPU, so that the weights are the same on every device.
    with seeded(random.initial_seed()):
        generator.to("cpu")
        for module in generator.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()
        generator.to(device)
    generator.noisy.redraw(random)


def balanced_labels(count: int, classes: int, random: torch.Generator) -> Int[Tensor, " B"]:
    """`count` labels that cycle through the classes; with fewer images than classes, distinct random classes.

    Group g of the noisy layer then covers images g·K … g·K + K − 1, one of each class.
    """
    if count < classes:
        return torch.randperm(classes, generator=random, device=random.device)[:count]
    return torch.arange(count, device=random.device) % classes


def common_state(generator: Generator) -> list[Tensor]:
    """Parameters and buffers that all ranks share."""
    state = generator.state_dict()
    return [state[name] for name in state if generator.noisy.ranks == 1 or name not in _NOISY]


def whole_state(generator: Generator, world: World) -> dict[str, Tensor]:
    """The state dict of the equivalent single-process generator, with the groups of all ranks in order.

    Every rank must call it; only rank 0 gets the complete state.
    """
    state = generator.state_dict()
    if generator.noisy.ranks > 1:
        for name in _NOISY:
            state[name] = torch.cat(world.gather(state[name]) or [state[name]])
    return state


def load_whole_state(generator: Generator, state: Mapping[str, Tensor]) -> None:
    """Loads what `whole_state` returned, for any number of ranks."""
    noisy = generator.noisy
    own = {name: state[name].chunk(noisy.ranks)[noisy.rank] for name in _NOISY}
    generator.load_state_dict({**state, **own})


def whole(generator: Generator, world: World) -> Generator:
    """The equivalent single-process generator, on rank 0. Every rank must call it; the others get their own back."""
    state = whole_state(generator, world)
    if world.size == 1 or not world.first:
        return generator
    found = _built(generator.arguments)
    found.load_state_dict(state)
    return found


def _built(arguments: Mapping[str, Any]) -> Generator:
    return Generator(
        int(arguments["embedding_dim"]),
        int(arguments["classes"]),
        int(arguments["batch"]),
        tuple(arguments["shape"]),
        GeneratorConfig.model_validate(arguments["config"]),
    )


def memory_tensors(memory: Memory | None) -> dict[str, Tensor]:
    """The BatchNorm memory of a run, by names for a file."""
    found = {}
    for index, (mean, variance) in enumerate(memory or []):
        found[f"memory.{index}.mean"], found[f"memory.{index}.var"] = mean, variance
    return found


def memory_of(tensors: Mapping[str, Tensor]) -> Memory | None:
    """What `memory_tensors` was given, from among the tensors of a file."""
    layers = sum(name.startswith("memory.") and name.endswith(".mean") for name in tensors)
    return [(tensors[f"memory.{i}.mean"], tensors[f"memory.{i}.var"]) for i in range(layers)] or None


def save(generator: Generator, memory: Memory | None, weights: Path) -> None:
    """Writes a generator and the BatchNorm memory of its run, with a JSON card to rebuild it."""
    tensors = {f"generator.{name}": tensor for name, tensor in generator.state_dict().items()}
    tensors |= memory_tensors(memory)
    save_tensors(weights, tensors)
    write_json(
        weights.with_suffix(".json"),
        {"schema": CARD_SCHEMA, "sha256": sha256_of(weights), "arguments": generator.arguments},
    )


def load(weights: Path) -> tuple[Generator, Memory | None]:
    """Reads what `save` wrote.

    Raises:
        IntegrityError: card or weights are missing, damaged or do not match.
    """
    card = read_json(weights.with_suffix(".json"), "a generator's card")
    tensors = load_tensors(weights, "a generator")
    try:
        if card["schema"] != CARD_SCHEMA or card["sha256"] != sha256_of(weights):
            raise ValueError("the card describes another file")
        generator = _built(card["arguments"])
        prefix = "generator."
        generator.load_state_dict(
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        )
        memory = memory_of(tensors)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise IntegrityError(f"{weights} is not a nayer-edge generator.", why=f"{error}") from error
    return generator, memory
