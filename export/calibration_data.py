"""Writes calibration images in the formats that quantizers read."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nayer_edge.errors import UsageError, nearest
from nayer_edge.storage.files import read_json, write_atomic, write_bytes, write_json

from .runners import as_bytes
from .to_onnx import INPUT

FORMATS = ("npz", "npy", "png", "polygraphy")
WRITTEN = "written.json"
"""lists the pictures of a folder: the next call removes those that it does not write, and nothing else"""


def write_calibration_data(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    folder: Path,
    formats: Sequence[str] = FORMATS,
    *,
    input_name: str = INPUT,
) -> dict[str, Path]:
    """Writes images in one or more formats.

    - npz: `calibration.npz`, one array named after the model's input, for ONNX quantizers (Model Optimizer's
      --calibration_data_path).
    - npy: `calibration.npy` and `calibration.labels.npy`.
    - png: a folder per class, 8 bits per channel, for torchvision's ImageFolder. Pictures of an earlier call are
      removed.
    - polygraphy: `calibration.polygraphy.json`, one image per iteration, for `polygraphy run --load-inputs`.

    Args:
        images: (n, C, H, W), float32 in [0, 1].
        labels: (n,), class of each image.
        classes: class names.
        folder: to write to.
        formats: of FORMATS.
        input_name: of the model's input.

    Returns:
        format → the file written (png: the folder).

    Raises:
        UsageError: an unknown format, images and labels that do not match, values outside [0, 1], or a folder that
            cannot be written to.
    """
    images, labels = np.ascontiguousarray(images, np.float32), np.asarray(labels, np.int64)
    if images.ndim != 4 or images.size == 0 or labels.shape != (len(images),):
        raise UsageError(
            f"Images of shape {images.shape} and labels of shape {labels.shape} do not match, or are empty.",
            fix="Give images of shape (n, C, H, W) and n labels.",
        )
    require_formats(formats, images.shape[1])
    if not (images.min() >= 0 and images.max() <= 1):
        raise UsageError(
            "The images have values outside [0, 1], or NaN.",
            fix="Divide 8-bit images by 255, and do not normalise them.",
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UsageError(f"A label lies outside the {len(classes)} classes.")
    writers: dict[str, Callable[[], Path]] = {
        "npz": lambda: _npz(images, folder / "calibration.npz", input_name),
        "npy": lambda: _npy(images, labels, folder / "calibration.npy"),
        "png": lambda: _png(images, labels, classes, folder / "png"),
        "polygraphy": lambda: _polygraphy(images, folder / "calibration.polygraphy.json", input_name),
    }
    return {name: writers[name]() for name in formats}


def require_formats(formats: Sequence[str], channels: int) -> None:
    """Raises UsageError if no format is named, one is unknown, or one cannot hold images of so many channels."""
    for name in formats or [""]:
        if name not in FORMATS:
            raise UsageError(
                f"There is no calibration format '{name}'.{nearest(name, FORMATS)}" if name else "No format is named.",
                fix=f"The formats are {', '.join(FORMATS)}.",
            )
    if "png" in formats and channels not in (1, 3, 4):
        raise UsageError(
            f"PNG supports 1, 3 or 4 channels, and these images have {channels}.",
            fix="Choose another format: npz, npy or polygraphy.",
        )


def _array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _npz(images: np.ndarray, path: Path, input_name: str) -> Path:
    buffer = io.BytesIO()
    np.savez(buffer, **{input_name: images})  # pyright: ignore[reportArgumentType]
    write_bytes(path, buffer.getvalue())
    return path


def _npy(images: np.ndarray, labels: np.ndarray, path: Path) -> Path:
    write_bytes(path, _array_bytes(images))
    write_bytes(path.with_suffix(".labels.npy"), _array_bytes(labels))
    return path


def _png(images: np.ndarray, labels: np.ndarray, classes: Sequence[str], folder: Path) -> Path:
    pixels = as_bytes(images).transpose(0, 2, 3, 1)
    width, digits = len(str(len(classes) - 1)), max(5, len(str(len(images) - 1)))
    written = []
    _remove_earlier(folder)
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        # The number keeps the order of classes for readers that sort folders. Labels may contain characters that
        # paths cannot.
        name = re.sub(r"[^\w.-]+", "_", str(classes[label])).strip("._") or "class"
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "PNG")
        path = f"{label:0{width}d}_{name[:60]}/{index:0{digits}d}.png"
        write_bytes(folder / path, buffer.getvalue())
        written.append(path)
    write_json(folder / WRITTEN, written)
    return folder


def _remove_earlier(folder: Path) -> None:
    """Removes the pictures that an earlier call left, and their folders: calibration would use those, too."""
    if not (folder / WRITTEN).is_file():
        return
    for name in read_json(folder / WRITTEN, "a list of pictures"):
        # Only what such a list can hold, and through no link.
        if not isinstance(name, str) or not re.fullmatch(r"\d+_[\w.-]+/\d{5,}\.png", name):
            continue
        path = folder / name
        if path.parent.is_symlink() or not path.is_file():
            continue
        try:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
        except OSError as error:
            raise UsageError(
                f"Cannot remove {path}, which an earlier call wrote.",
                why=f"System error: {error.strerror or error}.",
                fix="Choose another folder.",
            ) from error


def _polygraphy(images: np.ndarray, path: Path, input_name: str) -> Path:
    def write(temporary: Path) -> None:
        # One image at a time: base64 of the whole set would take several times its memory.
        with temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            for index in range(len(images)):
                array = base64.b64encode(_array_bytes(images[index : index + 1])).decode()
                feed = {input_name: {"array": array, "polygraphy_class": "ndarray"}}
                file.write((",\n" if index else "\n") + json.dumps(feed))
            file.write("\n]\n")

    write_atomic(path, write)
    return path
