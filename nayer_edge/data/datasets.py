"""Labelled images, to train the teacher of a demonstration and to evaluate. Distillation never imports this."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.npz import open_npz
from nayer_edge.data.pictures import open_folder, open_parquet
from nayer_edge.data.stream import MAX_IMAGES, ImageStream, Split
from nayer_edge.data.torchvision_formats import open_torchvision
from nayer_edge.errors import UsageError, missing_extra
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


def load(source: str, split: Split, spec: InputSpec, classes: Sequence[str]) -> LabelledImages:
    """Reads labelled images into memory, for training; pictures of another size or mode are resized and converted.

    Args:
        source: as `open_images` takes it.
        split: which part of a set that has parts.

    Raises:
        UsageError: no such images, or they do not match the model.
    """
    stream = open_images(source, split, spec, classes, "stretch")
    images = torch.from_numpy(np.concatenate(list(stream.batches(_BATCH))))
    return LabelledImages(images, torch.from_numpy(stream.labels), stream.name)


def open_images(source: str, split: Split, spec: InputSpec, classes: Sequence[str], fit: Fit) -> ImageStream:
    """Opens labelled images to be read a batch at a time; checks all labels and sizes first.

    Args:
        source: "digits", a folder of class folders, a parquet file or a folder of them (Hugging Face style), an npz
            with `images` and `labels`, or one of the formats in `torchvision_formats`.
        split: which part of "digits" or of torchvision's sets; other files have no parts.
        fit: what to do with pictures of another size than the model's.

    Raises:
        UsageError: no such images, or they do not match the model.
    """
    stream = _open(source, split, spec, classes, fit)
    if len(stream) == 0:
        raise UsageError(f"{source} holds no images.", fix="Choose a data set that is not empty.")
    if len(stream) > MAX_IMAGES:
        raise UsageError(f"{source} holds {len(stream):,} images, more than {MAX_IMAGES:,}.", fix="Use a part of it.")
    wrong = (stream.labels < 0) | (stream.labels >= len(classes))
    if wrong.any():
        found = ", ".join(str(label) for label in np.unique(stream.labels[wrong])[:5])
        raise UsageError(
            f"{int(wrong.sum())} of {len(stream)} images in {source} have a label outside the {len(classes)} classes.",
            why=f"For example: {found}.",
            fix="Labels are numbers from 0 in the order of the class names.",
        )
    return stream


def _open(source: str, split: Split, spec: InputSpec, classes: Sequence[str], fit: Fit) -> ImageStream:
    if source == "digits":
        images = digits(split, spec)
        return ImageStream(images.name, images.labels.numpy(), lambda size: _parts(images.images.numpy(), size))
    path = expanded(source)
    try:
        if path.is_file() and path.suffix == ".parquet":
            return open_parquet([path], f"{path.parent.name}/{path.name}", spec, fit)
        if path.is_file() and path.suffix == ".npz":
            return open_npz(path, spec).stream(spec, fit)
        if path.exists() and (found := open_torchvision(path, split)) is not None:
            return found.stream(spec, fit)
        if path.is_dir() and (parts := sorted(path.glob("*.parquet"))):
            return open_parquet(parts, path.name, spec, fit)
        if path.is_dir():
            return open_folder(path, spec, classes, fit)
    except PermissionError as error:
        raise UsageError(
            f"{source} cannot be read.", why=f"{error}", fix="Make it readable for whoever runs this command."
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


def digits(split: Split, spec: InputSpec) -> LabelledImages:
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
    chosen, chosen_labels = (train, train_labels) if split == "train" else (holdout, holdout_labels)
    images = torch.from_numpy(np.asarray(chosen, dtype=np.float32) / 16).unsqueeze(1)
    images = F.interpolate(images, (spec.height, spec.width), mode="bilinear", align_corners=False)
    images = (images * 255).round().to(torch.uint8).expand(-1, spec.channels, -1, -1).contiguous()
    return LabelledImages(images, torch.from_numpy(np.asarray(chosen_labels)).long(), f"digits ({split})")
