"""Images of any size and channel count; weights that are the same on every device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nayer_edge import generator as generators
from nayer_edge.config import Generator as GeneratorConfig
from nayer_edge.errors import IntegrityError
from nayer_edge.generator import Generator, initialise
from nayer_edge.storage.tensors import load_tensors, save_tensors

Stream = Callable[[int], torch.Generator]
SMALL = GeneratorConfig(noisy_dim=6, channels=2)


def made(shape: tuple[int, int, int] = (3, 8, 8), classes: int = 3, batch: int = 8, seed: int = 0) -> Generator:
    """An initialised generator with five-dimensional embeddings."""
    generator = Generator(5, classes, batch, shape, SMALL)
    initialise(generator, torch.Generator().manual_seed(seed))
    return generator


@pytest.mark.parametrize(
    ("height", "width"), [(4, 4), (5, 7), (28, 28), (33, 17), (64, 64), (65, 4), (224, 160), (97, 224)]
)
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_any_size_and_channel_count(height: int, width: int, channels: int, stream: Stream) -> None:
    generator = made((channels, height, width), classes=2, batch=3)
    images = generator(torch.randn(3, 5, generator=stream(1)))
    assert images.shape == (3, channels, height, width)
    assert images.dtype == torch.float32
    assert float(images.detach().min()) >= 0
    assert float(images.detach().max()) <= 1
    assert float(images.detach().std()) > 0


@pytest.mark.parametrize(("shape", "doublings"), [((3, 64, 64), 2), ((3, 32, 32), 2), ((3, 224, 224), 5)])
def test_bodies_are_the_published_ones(shape: tuple[int, int, int], doublings: int) -> None:
    generator = made(shape)
    assert sum(isinstance(module, torch.nn.Upsample) for module in generator.body) == doublings
    assert generator.grid == (shape[1] >> doublings, shape[2] >> doublings)


@pytest.mark.parametrize(("batch", "classes", "groups"), [(400, 100, 4), (400, 10, 40), (200, 200, 1), (9, 4, 3)])
def test_one_noisy_linear_per_group_of_classes(batch: int, classes: int, groups: int) -> None:
    assert made(classes=classes, batch=batch).noisy.weight.shape == (groups, 5, 6)


def test_fewer_images_than_classes_need_one_group(stream: Stream) -> None:
    generator = made(classes=1000, batch=4)
    assert generator.noisy.weight.shape[0] == 1
    assert generator(torch.randn(4, 5, generator=stream(0))).shape == (4, 3, 8, 8)


def test_a_group_does_not_see_another_groups_weights(stream: Stream) -> None:
    generator = made(classes=3, batch=8).eval()
    embeddings = torch.randn(8, 5, generator=stream(0))
    before = generator(embeddings).detach()
    with torch.no_grad():
        generator.noisy.weight[1].add_(1)
    after = generator(embeddings).detach()
    same = [bool(torch.equal(one, other)) for one, other in zip(before, after, strict=True)]
    assert same == [True] * 3 + [False] * 3 + [True] * 2


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 5, 7), (3, 70, 66)])
def test_it_equals_the_reference(reference: ModuleType, shape: tuple[int, int, int], stream: Stream) -> None:
    generator = made(shape)
    wanted = reference.take_over(reference.ReferenceGenerator(5, 3, 8, shape, 6, 2), generator)
    embeddings = torch.randn(8, 5, generator=stream(0))
    torch.testing.assert_close(generator(embeddings), wanted(embeddings), rtol=1e-4, atol=1e-5)


def test_initialise_uses_its_own_stream_only(reference: ModuleType) -> None:
    one, same, other = made(seed=1), made(seed=1), made(seed=2)
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.add_(1)
    torch.manual_seed(77)
    before = torch.random.get_rng_state()
    initialise(same, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"
    for (name, value), again, another in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(value, again), name
        if value.ndim > 1 and "noisy.bias" not in name:
            assert not torch.equal(value, another), name
    wanted = reference.new_generator(torch.Generator().manual_seed(1), 5, 3, 8, (3, 8, 8), 6, 2)
    torch.testing.assert_close(one.project.weight, wanted.project.weight, rtol=0, atol=0)
    torch.testing.assert_close(one.body[-1].weight, wanted.last.weight, rtol=0, atol=0)


@pytest.mark.parametrize("memory", [None, [(torch.ones(2), torch.ones(2) * 2), (torch.zeros(3), torch.ones(3))]])
def test_round_trip(tmp_path: Path, memory: generators.Memory | None, stream: Stream) -> None:
    generator = made((4, 9, 6))
    path = tmp_path / "generator.safetensors"
    generators.save(generator, memory, path)
    read, remembered = generators.load(path)
    embeddings = torch.randn(8, 5, generator=stream(0))
    assert torch.equal(read.eval()(embeddings), generator.eval()(embeddings))
    assert (remembered is None) is (memory is None)
    for mine, theirs in zip(memory or [], remembered or [], strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def change_card(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    card = json.loads(path.with_suffix(".json").read_text())
    change(card)
    path.with_suffix(".json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.pop("arguments"),
        lambda card: card.update(schema="nayer-edge/generator/9"),
        lambda card: card.update(sha256="0" * 64),
        lambda card: card["arguments"].update(shape=[3, 8]),
        lambda card: card["arguments"].update(shape=None),
        lambda card: card["arguments"].update(classes="many"),
        lambda card: card["arguments"].update(classes=0),
        lambda card: card["arguments"].update(batch=16),
        lambda card: card["arguments"].update(config={"noisy_dim": 6, "chanels": 2}),
        lambda card: card.update(arguments=[1, 2]),
    ],
)
def test_a_damaged_card_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = tmp_path / "generator.safetensors"
    generators.save(made(), None, path)
    change_card(path, change)
    with pytest.raises(IntegrityError, match="not a nayer-edge generator"):
        generators.load(path)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "generator.safetensors"
    with pytest.raises(IntegrityError, match="is missing"):
        generators.load(path)
    generators.save(made(), None, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(IntegrityError, match="not readable as a generator"):
        generators.load(path)
    tensors = load_tensors_of(whole, tmp_path / "copy.safetensors")
    tensors.pop("generator.noisy.weight")
    save_tensors(path, tensors)
    change_card(path, lambda card: card.update(sha256=generators.sha256_of(path)))
    with pytest.raises(IntegrityError, match="not a nayer-edge generator"):
        generators.load(path)
    path.unlink()
    with pytest.raises(IntegrityError, match="not readable as a generator"):
        generators.load(path)
    path.with_suffix(".json").write_text("[1, 2")
    with pytest.raises(IntegrityError, match="not readable as a generator's card"):
        generators.load(path)


def load_tensors_of(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    path.write_bytes(data)
    return load_tensors(path, "a copy")
