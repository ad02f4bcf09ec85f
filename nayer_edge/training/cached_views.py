"""Caches teacher logits per augmented view; not in the paper.

With a padding of 4 pixels and flips an image has only 162 views. At E = 100 each bank image is drawn about 128 times,
and every draw needs a forward pass of the teacher. Here each image has `distill.views` fixed views, and the teacher
runs once per view. docs/LOG.md has measurements of this and of mixed views.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nayer_edge.config import Augment
from nayer_edge.memory_bank import MemoryBank, to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.runtime.compute import Compute
from nayer_edge.training.augment import blend, translate

MIXTURES = 4093
"""number of random mixtures before they repeat; a prime, so that it shares no factor with the number of views"""


class ViewCache:
    """Draws augmented images of a memory bank together with the teacher's logits.

    Image i has the views (i + v) mod T, v < `views`, of a fixed random permutation of all T crops and flips, so that
    all crops are equally frequent over the bank. A fraction `mixup` of the views is permanently mixed with the same
    view of an image at a lower index: w x + (1 − w) x', w ~ U(0, 1).

    Args:
        bank: source of the images; the logits of overwritten images are discarded.
        augment: crop and flip.
        views: fixed views per image, at most T.
        order: generator for the permutation and the mixtures, on the bank's device.
        mixup: fraction of the views to mix, from 0 to 1.
    """

    def __init__(
        self,
        bank: MemoryBank,
        augment: Augment,
        views: int,
        teacher: Classifier,
        compute: Compute,
        order: torch.Generator,
        mixup: float = 0.0,
    ) -> None:
        self._bank, self._augment, self._teacher, self._compute = bank, augment, teacher, compute
        side = 2 * augment.pad + 1
        total = side * side * (2 if augment.flip else 1)
        self.views = min(views, total)
        self._order = torch.randperm(total, generator=order, device=compute.device)
        self._mixed = mixup > 0
        chosen, weights, earlier = torch.rand(3, MIXTURES, generator=order, device=compute.device).unbind()
        self._weights, self._earlier = torch.where(chosen < mixup, weights, 1.0), earlier
        kind = torch.bfloat16 if compute.bf16 else torch.float32
        classes = len(teacher.classes)
        self._logits = torch.empty(0, self.views, classes, dtype=kind, device=compute.device)
        self._known = torch.zeros(0, self.views, dtype=torch.bool, device=compute.device)
        self._seen = 0
        self.asked, self.computed = 0, 0
        """views drawn, and how many of them needed a forward pass of the teacher"""
        self.seconds = 0.0
        """that these passes took; not counted on a GPU, which works on while the program goes on"""

    def draw(self, count: int, random: torch.Generator) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Images in [0, 1] and the teacher's logits, drawn uniformly with replacement."""
        device = self._compute.device
        places = torch.randint(0, len(self._bank), (count,), generator=random, device=device)
        return self.at(places, torch.randint(0, self.views, (count,), generator=random, device=device))

    def at(self, places: Int[Tensor, " B"], numbers: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B C H W"], Tensor]:
        """Views `numbers` of the bank's images at `places`, in [0, 1], and the teacher's logits (B × K)."""
        self._follow_bank()
        images = self._view(places, numbers)
        missing = (~self._known[places, numbers]).nonzero().squeeze(1)
        if len(missing):
            began = time.perf_counter()
            with torch.no_grad(), self._compute.autocast():
                found = self._teacher(images[missing])
            self._logits[places[missing], numbers[missing]] = found.to(self._logits.dtype)
            self._known[places[missing], numbers[missing]] = True
            if images.device.type == "cpu":
                self.seconds += time.perf_counter() - began
        self.asked += len(places)
        self.computed += len(missing)
        return images, self._logits[places, numbers].float()

    def _view(self, places: Tensor, numbers: Tensor) -> Tensor:
        images = to_unit(self._crop(places, numbers))
        if not self._mixed:
            return images
        weights, others = self._mixture(places, numbers)
        return blend(images, to_unit(self._crop(others, numbers)), weights)

    def _mixture(self, places: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each view, and the index of the image it is mixed with (the first image only has itself)."""
        drawn = (places * self.views + numbers) % MIXTURES
        return self._weights[drawn], (self._earlier[drawn] * places).long()

    def _crop(self, places: Tensor, numbers: Tensor) -> Tensor:
        code = self._order[(places + numbers) % len(self._order)]
        side = 2 * self._augment.pad + 1
        dy, dx = code % side - self._augment.pad, code // side % side - self._augment.pad
        flips = (code // (side * side)).bool()
        return translate(self._bank.images[places], dy, dx, flips, self._augment.pad)

    def _follow_bank(self) -> None:
        """Grows with the bank, and invalidates the places written since the last draw."""
        added, size = self._bank.added, len(self._bank)
        if size > len(self._known):
            grown = max(size, min(2 * len(self._known), self._bank.capacity))
            logits = self._logits.new_zeros(grown, *self._logits.shape[1:])
            known = self._known.new_zeros(grown, self.views)
            logits[: len(self._known)], known[: len(self._known)] = self._logits, self._known
            self._logits, self._known = logits, known
        if added > self._seen:
            fresh = min(added - self._seen, size)
            places = torch.arange(added - fresh, added, device=self._known.device) % self._bank.capacity
            self._known[places] = False
            if self._mixed and added > self._bank.capacity:
                self._forget_mixtures_with(places)
        self._seen = added

    def _forget_mixtures_with(self, places: Tensor) -> None:
        """Invalidates views of other images that are mixed with an overwritten image."""
        written = torch.zeros(len(self._known), dtype=torch.bool, device=self._known.device)
        written[places] = True
        every = torch.arange(len(self._known), device=self._known.device)
        for number in range(self.views):
            weights, others = self._mixture(every, torch.full_like(every, number))
            self._known[:, number] &= ~(written[others] & (weights < 1))

    def tensors(self) -> dict[str, Tensor]:
        """The cache, for a checkpoint: logits recomputed in other batches could differ in their last bits. Without the
        places beyond the bank's images, which `_follow_bank` allocates again when they are needed."""
        filled = len(self._bank)
        return {"logits": self._logits[:filled], "known": self._known[:filled], "seen": torch.tensor(self._seen)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        device = self._compute.device
        self._logits, self._known = tensors["logits"].to(device), tensors["known"].to(device)
        self._seen = int(tensors["seen"])
