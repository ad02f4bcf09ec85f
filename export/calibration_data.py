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
from nayer_edge.storage.files import write_atomic, write_bytes

from .runners import as_bytes
from .to_onnx import INPUT

FORMATS = ("npz", "npy", "png", "polygraphy")


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
    - png: a folder per class, 8 bits per channel, for torchvision's ImageFolder.
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
        UsageError: an unknown format, images and labels that do not match, or a folder that cannot be written to.
    """
    for name in formats:
        if name not in FORMATS:
            raise UsageError(
                f"There is no calibration format '{name}'.{nearest(name, FORMATS)}",
                why=f"The formats are {', '.join(FORMATS)}.",
            )
    images, labels = np.ascontiguousarray(images, np.float32), np.asarray(labels, np.int64)
    if images.ndim != 4 or len(images) == 0 or labels.shape != (len(images),):
        raise UsageError(f"Images of shape {images.shape} and labels of shape {labels.shape} do not match.")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UsageError(f"A label lies outside the {len(classes)} classes.")
    writers: dict[str, Callable[[], Path]] = {
        "npz": lambda: _npz(images, folder / "calibration.npz", input_name),
        "npy": lambda: _npy(images, labels, folder / "calibration.npy"),
        "png": lambda: _png(images, labels, classes, folder / "png"),
        "polygraphy": lambda: _polygraphy(images, folder / "calibration.polygraphy.json", input_name),
    }
    return {name: writers[name]() for name in formats}


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
    if images.shape[1] not in (1, 3, 4):
        raise UsageError(
            f"PNG supports 1, 3 or 4 channels, and these images have {images.shape[1]}.",
            fix="Choose another format: npz, npy or polygraphy.",
        )
    pixels = as_bytes(images).transpose(0, 2, 3, 1)
    width = len(str(len(classes) - 1))
    written = set()
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        # The number keeps the order of classes for readers that sort folders. Labels may contain characters that
        # paths cannot.
        name = re.sub(r"[^\w.-]+", "_", str(classes[label])).strip("._") or "class"
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "PNG")
        path = folder / f"{label:0{width}d}_{name[:60]}" / f"{index:05d}.png"
        write_bytes(path, buffer.getvalue())
        written.add(path)
    # Calibration would also use images that an earlier call left here.
    for path in folder.glob("*_*/*.png"):
        if path not in written and re.fullmatch(r"\d+_.+/\d{5,}\.png", path.relative_to(folder).as_posix()):
            path.unlink()
    return folder


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
