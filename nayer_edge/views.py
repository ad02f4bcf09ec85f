"""Teacher logits computed once per view: a lever that the published loop leaves unused.

With a pad of 4 pixels and flips there are only 162 views of an image, and at E = 100 each image of the bank is drawn
some 128 times, every time through the teacher. Here each image is seen in `distill.views` fixed views, and the teacher
answers each of them once. What that costs in accuracy is in docs/LOG.md.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nayer_edge.augment import translate
from nayer_edge.bank import MemoryBank, to_unit
from nayer_edge.classifier import Classifier
from nayer_edge.compute import Compute
from nayer_edge.config import Augment


class ViewCache:
    """Draws augmented images of a memory bank together with the teacher's logits.

    Image i has views (i + v) mod T of a fixed random order of all T crops and flips, v < `views`: over the bank all
    crops are equally frequent.

    Args:
        bank: where images come from; what it overwrites is forgotten here.
        augment: crop and flip.
        views: fixed views per image, at most all T.
        classes: logits per image.
        order: stream that shuffles the views, on the bank's device.
    """

    def __init__(
        self,
        bank: MemoryBank,
        augment: Augment,
        views: int,
        teacher: Classifier,
        compute: Compute,
        order: torch.Generator,
    ) -> None:
        self._bank, self._augment, self._teacher, self._compute = bank, augment, teacher, compute
        side = 2 * augment.pad + 1
        total = side * side * (2 if augment.flip else 1)
        self.views = min(views, total)
        self._order = torch.randperm(total, generator=order, device=compute.device)
        kind = torch.bfloat16 if compute.bf16 else torch.float32
        classes = len(teacher.classes)
        self._logits = torch.empty(0, self.views, classes, dtype=kind, device=compute.device)
        self._known = torch.zeros(0, self.views, dtype=torch.bool, device=compute.device)
        self._seen = 0
        self.asked, self.computed = 0, 0
        """views drawn, and those of them that went through the teacher"""

    def draw(self, count: int, random: torch.Generator) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Images in [0, 1] and the teacher's logits, drawn uniformly with replacement."""
        device = self._compute.device
        places = torch.randint(0, len(self._bank), (count,), generator=random, device=device)
        return self.at(places, torch.randint(0, self.views, (count,), generator=random, device=device))

    def at(self, places: Int[Tensor, " B"], numbers: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B C H W"], Tensor]:
        """Views `numbers` of the bank's images at `places`, in [0, 1], and the teacher's logits (B × K)."""
        self._follow_bank()
        images = to_unit(self._view(places, numbers))
        missing = (~self._known[places, numbers]).nonzero().squeeze(1)
        if len(missing):
            with torch.no_grad(), self._compute.autocast():
                found = self._teacher(images[missing])
            self._logits[places[missing], numbers[missing]] = found.to(self._logits.dtype)
            self._known[places[missing], numbers[missing]] = True
        self.asked += len(places)
        self.computed += len(missing)
        return images, self._logits[places, numbers].float()

    def _view(self, places: Tensor, numbers: Tensor) -> Tensor:
        code = self._order[(places + numbers) % len(self._order)]
        side = 2 * self._augment.pad + 1
        dy, dx = code % side - self._augment.pad, code // side % side - self._augment.pad
        flips = (code // (side * side)).bool()
        return translate(self._bank.images[places], dy, dx, flips, self._augment.pad)

    def _follow_bank(self) -> None:
        """Grows with the bank, and forgets the places that it has written since the last draw."""
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
        self._seen = added

    def tensors(self) -> dict[str, Tensor]:
        """The cache, for a checkpoint: logits computed again in other batches could differ in their last bits."""
        return {"logits": self._logits, "known": self._known, "seen": torch.tensor(self._seen)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` returned."""
        device = self._compute.device
        self._logits, self._known = tensors["logits"].to(device), tensors["known"].to(device)
        self._seen = int(tensors["seen"])
