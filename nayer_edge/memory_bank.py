"""The memory bank: synthesised images as uint8 on the training device, within a byte budget."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.tensors import load_tensors, save_tensors

_FIRST_ALLOCATION = 4096


class MemoryBank:
    """Images with the labels that they were generated for; initially empty.

    When the bank is full, new images replace the oldest ones (ring buffer), which were generated against the least
    trained student. The published bank is unbounded.

    Args:
        shape: (channels, height, width).
        budget_bytes: maximum size of the images.
        device: where they are stored.

    Raises:
        UsageError: the budget is smaller than one image.
    """

    def __init__(self, shape: tuple[int, int, int], budget_bytes: int, device: torch.device) -> None:
        self.shape = shape
        self.capacity = budget_bytes // (shape[0] * shape[1] * shape[2])
        if self.capacity < 1:
            raise UsageError(
                f"A bank of {budget_bytes} bytes is too small for one image of {shape[0]}×{shape[1]}×{shape[2]}.",
                fix="Raise distill.bank_mib.",
            )
        self.added = 0
        """total number of images added, including those that were replaced"""
        self._images = torch.empty((0, *shape), dtype=torch.uint8, device=device)
        self._labels = torch.empty(0, dtype=torch.long, device=device)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def images(self) -> UInt8[Tensor, "N C H W"]:
        """The stored images."""
        return self._images[: len(self)]

    @property
    def labels(self) -> Int[Tensor, " N"]:
        """The class that each image was generated for."""
        return self._labels[: len(self)]

    @property
    def bytes(self) -> int:
        """Size of the stored images."""
        return self.images.numel()

    def add(self, images: UInt8[Tensor, "B C H W"], labels: Int[Tensor, " B"]) -> None:
        """Adds a round of images, at most the capacity.

        Raises:
            UsageError: the round is larger than the whole bank.
        """
        count = images.shape[0]
        if count > self.capacity:
            raise UsageError(
                f"The memory bank has room for {self.capacity} images, but one round makes {count}.",
                fix="Raise distill.bank_mib, or lower synthesis.batch.",
            )
        self._reserve(min(self.added + count, self.capacity))
        places = (torch.arange(count, device=images.device) + self.added) % self.capacity
        self._images[places] = images
        self._labels[places] = labels
        self.added += count

    def _reserve(self, count: int) -> None:
        """Grows the storage by doubling, so that adding takes amortised constant time."""
        have = self._images.shape[0]
        if count <= have:
            return
        size = min(max(count, 2 * have, _FIRST_ALLOCATION), self.capacity)
        images = self._images.new_empty((size, *self.shape))
        labels = self._labels.new_empty(size)
        images[:have], labels[:have] = self._images, self._labels
        self._images, self._labels = images, labels

    def draw(self, count: int, random: torch.Generator) -> UInt8[Tensor, "B C H W"]:
        """Draws images uniformly with replacement."""
        places = torch.randint(0, len(self), (count,), generator=random, device=self._images.device)
        return self._images[places]

    def newest(self, count: int) -> tuple[UInt8[Tensor, "B C H W"], Int[Tensor, " B"]]:
        """The `count` newest images, oldest first, and their labels."""
        count = min(count, len(self))
        places = torch.arange(self.added - count, self.added, device=self._images.device) % self.capacity
        return self._images[places], self._labels[places]

    def tensors(self) -> dict[str, Tensor]:
        """The bank as tensors, for a checkpoint or a file."""
        return {"images": self.images, "labels": self.labels, "added": torch.tensor(self.added)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        device = self._images.device
        self._images, self._labels = tensors["images"].to(device), tensors["labels"].to(device)
        self.added = int(tensors["added"])

    def refill(self, images: UInt8[Tensor, "N C H W"], labels: Int[Tensor, " N"], added: int) -> None:
        """Replaces the content: `added` images were added in total, and these (oldest first) are the newest of them."""
        device = self._images.device
        self._images, self._labels = self._images[:0], self._labels[:0]
        self.added = added - len(images)
        self.add(images.to(device), labels.to(device))

    def save(self, path: Path) -> None:
        """Writes the bank as one safetensors file."""
        save_tensors(path, self.tensors())

    @classmethod
    def load(cls, path: Path, device: torch.device) -> MemoryBank:
        """Reads a bank written by `save`.

        Raises:
            IntegrityError: the file is damaged.
        """
        return cls.of(load_tensors(path, "a memory bank"), device, path)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], device: torch.device, source: Path | str) -> MemoryBank:
        """A bank of what `tensors` returned, with a capacity of exactly its images.

        Raises:
            IntegrityError: the tensors are not those of a bank.
        """
        images, labels, added = (tensors.get(name) for name in ("images", "labels", "added"))
        if (
            images is None
            or labels is None
            or added is None
            or added.numel() != 1
            or images.ndim != 4
            or images.dtype != torch.uint8
            or labels.shape != images.shape[:1]
            or labels.dtype != torch.long
            or images.shape[0] == 0
            or int(added) < images.shape[0]
        ):
            raise IntegrityError(f"{source} is not a memory bank.")
        bank = cls((images.shape[1], images.shape[2], images.shape[3]), images.numel(), device)
        bank.restore(tensors)
        return bank


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[0, 1] → 0 … 255, rounded to the nearest."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def to_unit(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0 … 255 → [0, 1]."""
    return images.float() / 255
