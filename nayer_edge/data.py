"""Labelled images: for training a demonstration's teacher, and for measuring. Distillation never imports this."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError, missing_extra

DIGITS_HOLDOUT = 600
"""of the 1,797 images; DESIGN asks for at least 598"""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class LabelledImages:
    """Images with the class that each shows.

    Attributes:
        images: uint8, of the model's size.
        labels: class numbers in the model's order.
        name: how a report calls them.
    """

    images: UInt8[Tensor, "N C H W"]
    labels: Int[Tensor, " N"]
    name: str

    def __len__(self) -> int:
        return len(self.images)


def load(source: str, split: Literal["train", "holdout"], spec: InputSpec, classes: Sequence[str]) -> LabelledImages:
    """Reads labelled images.

    Args:
        source: "digits", a folder of class folders, a parquet file (Hugging Face style), or an npz
            with `images` (N, H, W[, C]) or (N, C, H, W) uint8 and `labels` (N).
        split: which part of "digits"; files are one part each.

    Raises:
        UsageError: there is nothing there, or it does not fit the model.
    """
    if source == "digits":
        found = digits(split, spec)
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            found = _folder(path, spec, classes)
        elif path.suffix == ".parquet" and path.is_file():
            found = _parquet(path, spec)
        elif path.suffix == ".npz" and path.is_file():
            found = _npz(path, spec)
        else:
            raise UsageError(
                f"There are no labelled images at '{source}'.",
                why="It is neither a folder of class folders, nor a .parquet or .npz file, nor the word digits.",
                fix="Check the path.",
            )
    if len(found) == 0:
        raise UsageError(f"{source} holds no images.")
    wrong = (found.labels < 0) | (found.labels >= len(classes))
    if bool(wrong.any()):
        raise UsageError(
            f"{int(wrong.sum())} of {len(found)} images in {source} have a label outside the {len(classes)} classes.",
            fix="Labels are numbers from 0 in the order of the class names.",
        )
    return found


def digits(split: Literal["train", "holdout"], spec: InputSpec) -> LabelledImages:
    """scikit-learn's handwritten digits (Alpaydin & Kaynak 1998, UCI): 1,797 real 8×8 images.

    Split once, stratified, with a fixed seed: 1,197 train, 600 hold-out. Pixels 0 … 16 become 0 … 255 and are
    resized bilinearly to the model's input; more than one channel repeats the grey value.
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


def _folder(path: Path, spec: InputSpec, classes: Sequence[str]) -> LabelledImages:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    unknown = [entry.name for entry in folders if entry.name not in classes]
    if unknown or not folders:
        raise UsageError(
            f"The class folders in {path} are not the teacher's classes.",
            why=f"Unknown: {', '.join(unknown[:5])}." if unknown else "There are none.",
            fix=f"Name them like the classes: {', '.join(list(classes)[:5])}, …",
        )
    images, labels = [], []
    for entry in folders:
        for file in sorted(entry.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                images.append(decode(file.read_bytes(), spec, str(file)))
                labels.append(list(classes).index(entry.name))
    if not images:
        raise UsageError(f"The class folders in {path} hold no images.", fix=f"Known: {', '.join(IMAGE_SUFFIXES)}.")
    return LabelledImages(torch.stack(images), torch.tensor(labels), path.name)


def _parquet(path: Path, spec: InputSpec) -> LabelledImages:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "cpu", "Reading parquet") from error
    try:
        table = parquet.read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is not readable as parquet.", why=f"{error}") from error
    names = table.column_names
    image_column = next((name for name in ("image", "img") if name in names), None)
    label_column = next((name for name in ("label", "fine_label", "labels") if name in names), None)
    if image_column is None or label_column is None:
        raise UsageError(
            f"{path} has no column of images and of labels.",
            why=f"Its columns: {', '.join(names)}.",
            fix="Name them image (with encoded bytes) and label.",
        )
    cells = table.column(image_column).to_pylist()
    cells = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
    encoded = [data for data in cells if isinstance(data, bytes)]
    numbers = table.column(label_column).to_pylist()
    if not cells:
        raise UsageError(f"{path} holds no images.")
    if len(encoded) < len(cells) or not all(isinstance(number, int) for number in numbers):
        raise UsageError(
            f"{path} holds something else than encoded images and class numbers.",
            why=f"Column {image_column} is {table.schema.field(image_column).type}, "
            f"column {label_column} is {table.schema.field(label_column).type}.",
            fix="Images are the bytes of PNG, JPEG or WebP files; labels are numbers in the order of the class names.",
        )
    images = [decode(data, spec, f"{path}, row {row}") for row, data in enumerate(encoded)]
    return LabelledImages(torch.stack(images), torch.tensor(numbers), path.parent.name + "/" + path.name)


def _npz(path: Path, spec: InputSpec) -> LabelledImages:
    try:
        # Opened here, because np.load leaves a file that is no archive open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{path} is not readable as labelled images.",
            why=f"{error}",
            fix="Save it with numpy.savez(path, images=…, labels=…), images as uint8.",
        ) from error
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] != spec.channels:
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.shape[1:] != spec.shape or labels.shape != images.shape[:1]:
        raise UsageError(
            f"{path} holds images of shape {images.shape[1:]} and type {images.dtype}; "
            f"the model eats {spec.shape} and uint8.",
            fix="Resize them, and store values 0 … 255 as uint8.",
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"The labels in {path} are of type {labels.dtype}.",
            fix="Labels are integers from 0 in the order of the class names.",
        )
    numbers = torch.from_numpy(labels.astype(np.int64))
    return LabelledImages(torch.from_numpy(np.ascontiguousarray(images)), numbers, path.name)


def decode(data: bytes, spec: InputSpec, where: str) -> UInt8[Tensor, "C H W"]:
    """An encoded image as uint8 of the model's size; another size is resized bilinearly.

    Raises:
        UsageError: it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    if spec.channels not in (1, 3):
        raise UsageError(
            f"{where} is an encoded image, and the model eats {spec.channels} channels.",
            why="Encoded images are read as grey (1 channel) or RGB (3).",
            fix="Store the images as an npz with arrays of the model's shape.",
        )
    try:
        with Image.open(io.BytesIO(data)) as file:
            picture = file.convert("L" if spec.channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{where} is not a readable image.", why=f"{error}") from error
    if picture.size != (spec.width, spec.height):
        picture = picture.resize((spec.width, spec.height), Image.Resampling.BILINEAR)
    pixels = np.array(picture, dtype=np.uint8)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
