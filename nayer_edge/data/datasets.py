"""Labelled images, to train the teacher of a demonstration and to evaluate. Distillation never imports this."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.folders import open_folder
from nayer_edge.data.npz import open_npz
from nayer_edge.data.parquet import open_parquet, parquet_files
from nayer_edge.data.splits import Purpose, choose
from nayer_edge.data.stream import MAX_IMAGES, ImageStream
from nayer_edge.data.torchvision_formats import open_torchvision
from nayer_edge.errors import UsageError, missing_extra
from nayer_edge.labels.matching import match_names
from nayer_edge.storage.files import expanded

DIGITS_HOLDOUT = 600
"""of the 1,797 images; with fewer than 598 no accuracy drop below 0.5 points can be shown"""

_BATCH = 256


@dataclass(frozen=True)
class LabelledImages:
    """Images in memory, each with its class.

    Attributes:
        images: uint8, in the model's shape.
        labels: class numbers in the model's order.
        name: what reports call them.
    """

    images: UInt8[Tensor, "N C H W"]
    labels: Int[Tensor, " N"]
    name: str

    def __len__(self) -> int:
        return len(self.images)


def load(
    source: str, purpose: Purpose, spec: InputSpec, classes: Sequence[str], split: str | None = None
) -> LabelledImages:
    """Reads labelled images into memory, for training; pictures of another size or mode are resized and converted.

    Args:
        source, purpose, split: as `open_images` takes them.

    Raises:
        UsageError: no such images, or they do not match the model.
    """
    stream = open_images(source, purpose, spec, classes, "stretch", split)
    images = torch.from_numpy(np.concatenate(list(stream.batches(_BATCH))))
    return LabelledImages(images, torch.from_numpy(stream.labels), stream.name)


def open_images(
    source: str, purpose: Purpose, spec: InputSpec, classes: Sequence[str], fit: Fit, split: str | None = None
) -> ImageStream:
    """Opens labelled images to be read a batch at a time; checks all labels and sizes first.

    A data set's own class names decide which class a label is; without names, its numbers are the model's.

    Args:
        source: "digits", a folder of class folders, a parquet file or a folder of them (Hugging Face style), an npz
            with `images` and `labels`, or one of the formats in `torchvision_formats`.
        purpose: what the images are read for, which decides between splits if `split` does not.
        fit: what to do with pictures of another size than the model's.
        split: which part of a data set that has several: "train", "validation", "test", or its own name.

    Raises:
        UsageError: no such images, they do not match the model, or there are several splits and none was chosen.
        MissingError: there are WordNet ids to translate, and timm is not installed.
    """
    stream = _open(source, purpose, spec, classes, fit, split)
    if len(stream) == 0:
        raise UsageError(f"{source} holds no images.", fix="Choose a data set that is not empty.")
    if len(stream) > MAX_IMAGES:
        raise UsageError(f"{source} holds {len(stream):,} images, more than {MAX_IMAGES:,}.", fix="Use a part of it.")
    _require_labels(stream, len(stream.names or classes), source)
    if stream.names is not None:
        stream = _renumbered(stream, stream.names, classes, source)
    return stream if stream.matched_by else replace(stream, matched_by="number")


def _require_labels(stream: ImageStream, classes: int, source: str) -> None:
    """Raises UsageError if a label is outside [0, classes)."""
    wrong = (stream.labels < 0) | (stream.labels >= classes)
    if not wrong.any():
        return
    found = ", ".join(str(label) for label in np.unique(stream.labels[wrong])[:5])
    from_one = (int(stream.labels.min()), int(stream.labels.max())) == (1, classes)
    raise UsageError(
        f"{int(wrong.sum())} of {len(stream)} images in {source} have a label outside the {classes} classes.",
        why=f"The labels run from 1 to {classes}: numbering starts at 1." if from_one else f"Found: {found}.",
        fix="Subtract 1 from the labels." if from_one else "Labels are numbers from 0 in the order of the class names.",
    )


def _renumbered(stream: ImageStream, names: Sequence[str], classes: Sequence[str], source: str) -> ImageStream:
    """The same images with labels in the model's order, by the data set's own class names."""
    used = [int(number) for number in np.unique(stream.labels)]
    what = f"The class names in {source}"
    if len({names[number] for number in used}) < len(used):
        raise UsageError(f"{what} are not distinct.", fix="Give every class its own name.")
    matched = match_names([names[number] for number in used], classes, what)
    number_of = np.zeros(len(names), dtype=np.int64)
    number_of[used] = [matched.numbers[names[number]] for number in used]
    return replace(stream, labels=number_of[stream.labels], names=None, matched_by=matched.by)


def _open(
    source: str, purpose: Purpose, spec: InputSpec, classes: Sequence[str], fit: Fit, split: str | None
) -> ImageStream:
    if source == "digits":
        chosen = "train" if purpose == "train" else "test"
        if split is not None:
            chosen = choose(("test", "train"), purpose, split, source)
        images = digits("train" if chosen == "train" else "holdout", spec)
        return ImageStream(
            images.name, images.labels.numpy(), lambda size: _parts(images.images.numpy(), size), split=chosen
        )
    path = expanded(source)
    try:
        if path.is_file() and path.suffix == ".parquet":
            return open_parquet([path], path, spec, fit, purpose, split)
        if path.is_file() and path.suffix == ".npz":
            return open_npz(path, spec, classes, purpose, split).stream(spec, fit)
        if path.exists() and (found := open_torchvision(path, purpose, split)) is not None:
            return found.stream(spec, fit)
        if path.is_dir() and (parts := parquet_files(path)):
            return open_parquet(parts, path, spec, fit, purpose, split)
        if path.is_dir():
            return open_folder(path, spec, classes, fit, purpose, split)
    except PermissionError as error:
        raise UsageError(
            f"{source} cannot be read.", why=f"{error}", fix="Give your user permission to read it."
        ) from error
    variable = re.match(r"\$\{?(\w+)", source)
    if variable and variable[1] not in os.environ:
        raise UsageError(
            f"There are no labelled images at '{source}'.",
            why=f"The environment variable {variable[1]} is not set.",
            fix=f"Type: export {variable[1]}=FOLDER",
        )
    raise UsageError(
        f"There are no labelled images at '{source}'.",
        why="Expected a folder of class folders, a .parquet or .npz file, one of torchvision's formats, or the word "
        "digits.",
        fix="Check the path.",
    )


def _parts(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def digits(purpose: Purpose, spec: InputSpec) -> LabelledImages:
    """scikit-learn's handwritten digits (Alpaydin & Kaynak 1998, UCI): 1,797 real 8×8 images.

    The split is stratified, with a fixed seed: 1,197 train, 600 hold-out. Pixel values 0 … 16 become 0 … 255;
    images are resized bilinearly to the model's input, and its channels all repeat the grey value.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise missing_extra("scikit-learn", "cpu", "The digits data set") from error
    pixels, labels = load_digits(return_X_y=True)
    everything: list[Any] = train_test_split(
        pixels.reshape(-1, 8, 8), labels, test_size=DIGITS_HOLDOUT, stratify=labels, random_state=0
    )
    train, holdout, train_labels, holdout_labels = everything
    chosen, chosen_labels = (train, train_labels) if purpose == "train" else (holdout, holdout_labels)
    images = torch.from_numpy(np.asarray(chosen, dtype=np.float32) / 16).unsqueeze(1)
    images = F.interpolate(images, (spec.height, spec.width), mode="bilinear", align_corners=False)
    images = (images * 255).round().to(torch.uint8).expand(-1, spec.channels, -1, -1).contiguous()
    return LabelledImages(images, torch.from_numpy(np.asarray(chosen_labels)).long(), f"digits ({purpose})")
