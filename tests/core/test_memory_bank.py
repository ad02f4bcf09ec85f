"""The memory bank against a plain list."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy import stats

from nayer_edge import memory_bank as banks
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.memory_bank import MemoryBank, to_uint8, to_unit
from nayer_edge.storage.tensors import save_tensors

CPU = torch.device("cpu")
SHAPE = (2, 3, 4)
BYTES = 24
Stream = Callable[[int], torch.Generator]


def images_of(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that encode their number, with labels."""
    numbers = torch.arange(first, first + count)
    images = (numbers % 251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
    return images, numbers % 7


def numbers(bank: MemoryBank) -> list[int]:
    return bank.images[:, 0, 0, 0].tolist()


def test_it_begins_empty() -> None:
    bank = MemoryBank(SHAPE, 10 * BYTES, CPU)
    assert len(bank) == 0
    assert bank.bytes == 0
    assert bank.images.shape == (0, *SHAPE)


@pytest.mark.parametrize("capacity", [5, 8, 17, 40])
@pytest.mark.parametrize("rounds", [(5, 5, 5, 5), (1, 4, 2, 5, 3, 5, 5), (5,)])
def test_the_ring_overwrites_the_oldest(capacity: int, rounds: tuple[int, ...]) -> None:
    bank = MemoryBank(SHAPE, capacity * BYTES, CPU)
    plain: deque[int] = deque(maxlen=capacity)
    first = 0
    for count in rounds:
        images, labels = images_of(first, count)
        bank.add(images, labels)
        plain.extend(range(first, first + count))
        first += count
        assert len(bank) == len(plain)
        assert sorted(numbers(bank)) == sorted(plain)
        assert bank.labels.tolist() == [number % 7 for number in numbers(bank)]
        newest, labels = bank.newest(len(plain))
        assert newest[:, 0, 0, 0].tolist() == list(plain)
        assert labels.tolist() == [number % 7 for number in plain]
        assert bank.newest(2)[0][:, 0, 0, 0].tolist() == list(plain)[-2:]
        assert bank.bytes <= capacity * BYTES
        assert bank._images.numel() <= capacity * BYTES
    assert bank.added == first


@pytest.mark.parametrize(("budget", "capacity"), [(24, 1), (47, 1), (48, 2), (2400, 100)])
def test_the_byte_budget_is_respected(budget: int, capacity: int) -> None:
    assert MemoryBank(SHAPE, budget, CPU).capacity == capacity


def test_budgets_below_one_image_are_refused() -> None:
    with pytest.raises(UsageError, match="too small for one image") as caught:
        MemoryBank(SHAPE, BYTES - 1, CPU)
    assert "bank_mib" in caught.value.fix
    bank = MemoryBank(SHAPE, 3 * BYTES, CPU)
    with pytest.raises(UsageError, match="room for 3 images, but one round makes 4"):
        bank.add(*images_of(0, 4))
    assert len(bank) == 0


def test_growth_keeps_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks, "_FIRST_ALLOCATION", 4)
    bank = MemoryBank(SHAPE, 50 * BYTES, CPU)
    sizes = set()
    for first in range(0, 45, 3):
        bank.add(*images_of(first, 3))
        sizes.add(len(bank._images))
        assert numbers(bank) == list(range(first + 3))
    assert sizes == {4, 8, 16, 32, 50}


def test_draws_are_uniform_with_replacement(stream: Stream) -> None:
    bank = MemoryBank(SHAPE, 10 * BYTES, CPU)
    bank.add(*images_of(0, 10))
    bank.add(*images_of(10, 4))
    drawn = bank.draw(5000, stream(0))[:, 0, 0, 0]
    counts = torch.bincount(drawn.long(), minlength=14)
    assert counts[:4].tolist() == [0, 0, 0, 0]
    assert stats.chisquare(counts[4:].numpy()).pvalue > 0.01
    assert torch.equal(bank.draw(20, stream(1)), bank.draw(20, stream(1)))


def test_a_bank_that_is_not_full_draws_only_what_was_added(stream: Stream) -> None:
    bank = MemoryBank(SHAPE, 1000 * BYTES, CPU)
    bank.add(*images_of(100, 3))
    assert set(bank.draw(100, stream(0))[:, 0, 0, 0].tolist()) == {100, 101, 102}


@pytest.mark.parametrize("added", [(4,), (5, 5, 3)])
def test_round_trip(tmp_path: Path, added: tuple[int, ...]) -> None:
    bank = MemoryBank(SHAPE, 7 * BYTES, CPU)
    first = 0
    for count in added:
        bank.add(*images_of(first, count))
        first += count
    bank.save(tmp_path / "bank.safetensors")
    read = MemoryBank.load(tmp_path / "bank.safetensors", CPU)
    assert torch.equal(read.images, bank.images)
    assert torch.equal(read.labels, bank.labels)
    assert read.added == bank.added
    assert torch.equal(read.newest(3)[0], bank.newest(3)[0])
    again = MemoryBank(SHAPE, 7 * BYTES, CPU)
    again.restore(bank.tensors())
    for one in (bank, again):
        one.add(*images_of(50, 5))
    assert torch.equal(bank.newest(7)[0], again.newest(7)[0])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    good = {
        "images": torch.zeros((2, *SHAPE), dtype=torch.uint8),
        "labels": torch.zeros(2, dtype=torch.long),
        "added": torch.tensor(2),
    }
    wrong: list[dict[str, torch.Tensor]] = [
        {name: tensor for name, tensor in good.items() if name != missing} for missing in good
    ]
    wrong += [
        good | {"images": torch.zeros(2, *SHAPE)},
        good | {"images": torch.zeros((2, 24), dtype=torch.uint8)},
        good | {"images": torch.zeros((0, *SHAPE), dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.long)},
        good | {"labels": torch.zeros(3, dtype=torch.long)},
        good | {"labels": torch.zeros(2)},
        good | {"added": torch.tensor(1)},
        good | {"added": torch.tensor([2, 2])},
    ]
    for tensors in wrong:
        save_tensors(path, tensors)
        with pytest.raises(IntegrityError, match="is not a memory bank"):
            MemoryBank.load(path, CPU)
    save_tensors(path, good)
    assert len(MemoryBank.load(path, CPU)) == 2
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="not readable as a memory bank"):
        MemoryBank.load(path, CPU)


def test_bytes_and_units() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(levels)), levels)
    values = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0, 1.1])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert float(to_unit(levels).max()) == 1
