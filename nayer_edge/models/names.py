"""Parses model names, without building anything.

nayer:wrn_40_2                      nayer-edge's own zoo
torchvision:mobilenet_v3_small      a torchvision classifier; `…@32` lowers its strides for 32-pixel images
timm:resnet18.a1_in1k               a timm classifier; `…@32` likewise
hf:microsoft/resnet-18@<revision>   a classifier of transformers, from the hub or a local folder (hf:./folder)
python:package.module:factory       the user's own code, or python:path/to/file.py:factory
memory:<class>@<digest>             a module in memory; see `nayer_edge.models.in_memory`
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nayer_edge.errors import UsageError, nearest
from nayer_edge.storage.files import expanded

SOURCES = ("nayer", "torchvision", "timm", "hf", "python")
MEMORY = "memory"
"""source of teachers that exist only in memory; not written in recipes by hand"""
BRING_WEIGHTS = ("hf", "python", MEMORY)
"""sources whose models can come with their own weights"""
PUBLISHED = ("torchvision", "timm")
"""sources whose published weights can be named: teacher.weights = "torchvision:IMAGENET1K_V1" """


@dataclass(frozen=True)
class ModelName:
    """A parsed model name.

    Attributes:
        source: one of `SOURCES`.
        name: architecture, folder, hub id, module or file.
        small: image size in pixels for which the strides are lowered; None: the library's strides.
        revision: of a hub model; of a teacher in memory, the digest of its weights.
        factory: of a python model.
    """

    source: str
    name: str
    small: int | None = None
    revision: str | None = None
    factory: str = ""

    @property
    def local(self) -> bool:
        """Whether it names a local file or folder, which need not exist."""
        return (self.source == "python" and self.name.endswith(".py")) or (
            self.source == "hf" and Path(self.name).is_absolute()
        )

    @property
    def path(self) -> Path | None:
        """That file or folder; None if it does not exist."""
        path = Path(self.name)
        return path if self.local and path.exists() else None

    @property
    def whole(self) -> str:
        """The name as `parse` reads it."""
        return self._written(self.name)

    @property
    def portable(self) -> str:
        """The name without local folders."""
        return self._written(Path(self.name).name if self.local else self.name)

    def _written(self, name: str) -> str:
        tail = f"@{self.small or self.revision}" if self.small or self.revision else ""
        return f"{self.source}:{name}{tail}" + (f":{self.factory}" if self.factory else "")


def parse(model: str) -> ModelName:
    """Parses a model name.

    Raises:
        UsageError: there is no such source, or a python model without a factory.
    """
    source, colon, name = model.partition(":")
    if not colon:
        raise UsageError(
            f"The model name '{model}' has no source.",
            fix=f"Write nayer:{model} for nayer-edge's zoo, torchvision:{model}, timm:{model}, hf:{model}, "
            "or python:package.module:factory.",
        )
    if source == MEMORY and (match := re.fullmatch(r"(\w+)@([0-9a-f]{16})", name)):
        return ModelName(source, match[1], revision=match[2])
    if source not in SOURCES:
        raise UsageError(
            f"There is no model source '{source}' (in '{model}').{nearest(source, SOURCES)}",
            fix=f"Sources: {', '.join(SOURCES)}.",
        )
    if source == "python":
        target, _, factory = name.rpartition(":")
        if not target or not factory.isidentifier():
            raise UsageError(
                f"'{model}' does not name a factory.",
                fix="Write python:package.module:factory, or python:path/to/file.py:factory.",
            )
        return ModelName(source, target, factory=factory)
    if source == "hf":
        whole = expanded(name)
        if whole.is_dir() or whole.is_absolute():
            return ModelName(source, str(whole.absolute()))
        identifier, _, revision = name.partition("@")
        return ModelName(source, identifier, revision=revision or None)
    if source in ("torchvision", "timm") and (match := re.fullmatch(r"(.+)@(\d{1,4})", name)):
        return ModelName(source, match[1], small=int(match[2]))
    return ModelName(source, name)


def located(model: str, folder: Path) -> str:
    """The name with its file or folder made absolute, relative to `folder`."""
    source, _, name = model.partition(":")
    if source == "python":
        target, _, factory = name.rpartition(":")
        if target.endswith(".py"):
            return f"python:{(folder / expanded(target)).resolve()}:{factory}"
    elif source == "hf" and (path := folder / expanded(name)).is_dir():
        return f"hf:{path.resolve()}"
    return model


def published_weights(weights: str | None) -> tuple[str, str] | None:
    """(source, name) of weights published by a library, such as "torchvision:IMAGENET1K_V1"; None for a file."""
    source, colon, name = (weights or "").partition(":")
    return (source, name) if colon and source in PUBLISHED else None
