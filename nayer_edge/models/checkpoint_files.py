"""Reads the content of a checkpoint file: safetensors, or a PyTorch file with `weights_only=True`.

The content decides, not the file's suffix. Values that trainers store beside the weights (paths, arrays, dates) become
placeholders: their constructors are not called. Other programs' files are named in the error.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.files import is_lfs_pointer
from nayer_edge.storage.tensors import load_tensors


class Placeholder:
    """Takes the place of a value that is not a tensor. It ignores its arguments and its state."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def _dictionary(*_factory: object) -> dict[Any, Any]:
    """Takes the place of a defaultdict, whose items follow."""
    return {}


def _list(*_arguments: object) -> list[Any]:
    """Takes the place of a deque, whose items follow."""
    return []


_NUMBERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
VALUE_TYPES = (
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"builtins.{name}" for name in ("bool", "bytes", "complex", "dict", "float", "int", "list", "set", "str",
                                      "tuple")),
    *(f"{core}.{name}" for core in ("numpy._core", "numpy.core")
      for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")),
    *(f"numpy.{name}" for name in ("ndarray", "dtype", "bool_", "bool", "str_", "bytes_", "float16", "float32",
                                   "float64", "complex64", "complex128", *_NUMBERS)),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "argparse.Namespace",
    "decimal.Decimal",
    "fractions.Fraction",
    "types.SimpleNamespace",
    "uuid.UUID",
)  # fmt: skip
"""names of value types in pickles; each is replaced by `Placeholder`"""

HEAD_BYTES = 512
_SIGNATURES = (
    (0, b"\x89HDF\r\n\x1a\n", "a Keras file (HDF5)"),
    (4, b"TFL3", "a TensorFlow Lite file"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x93NUMPY", "a NumPy array (.npy)"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\xfd7zXZ", "an xz archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
)
_ONNX = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]")
"""the first fields of an ONNX file: the version of the format, then a string or the graph"""
_ZIP = b"PK\x03\x04"
SAVE_AGAIN = "Save it again at its source, with torch.save(model.state_dict(), …) or safetensors."


def read_checkpoint(path: Path) -> Any:
    """Reads a checkpoint file.

    Returns:
        Tensors and plain values in dictionaries and lists; `Placeholder` for everything else.

    Raises:
        UsageError: there is no such file, or it is no PyTorch checkpoint (the error says what it is).
        IntegrityError: it is damaged, or a pickle that would run code (which was not run).
    """
    if not path.is_file():
        raise UsageError(f"There are no weights at {path}.", fix="Correct teacher.weights in the recipe.")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if foreign := _foreign(path, head):
        raise foreign
    pickled = head.startswith((_ZIP, b"\x80\x02"))
    if _is_safetensors(path, head) or (path.suffix == ".safetensors" and not pickled):
        return load_tensors(path, "model weights")
    allowed: list[Any] = [(Placeholder, name) for name in VALUE_TYPES]
    allowed += [(_dictionary, "collections.defaultdict"), (_list, "collections.deque")]
    try:
        # Opened here, because torch.load goes by the suffix.
        with path.open("rb") as file, torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged or hostile file
        raise _unsafe(path, head, error) from error


def _is_safetensors(path: Path, head: bytes) -> bool:
    """Whether a file starts with the length of a JSON header that fits into it."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def _foreign(path: Path, head: bytes) -> UsageError | None:
    """The error for a file of another program."""
    if is_lfs_pointer(head):
        return UsageError(
            f"{path} is a Git LFS pointer, not the weights themselves.",
            why="Git stores large files elsewhere, and this checkout has not fetched them.",
            fix="In its repository, type: git lfs pull",
        )
    if re.match(rb"\s*<(!doctype html|html|\?xml)", head, re.IGNORECASE):
        return UsageError(
            f"{path} is a web page, not a checkpoint.",
            why="A download that needs a login or a confirmation often ends like this.",
            fix="Download the file again, in a browser if need be.",
        )
    kind = next((name for place, mark, name in _SIGNATURES if head[place:].startswith(mark)), None)
    if path.suffix == ".onnx" or _ONNX.match(head):
        kind = "an ONNX file"
    elif path.suffix == ".pb":
        kind = "a TensorFlow graph"
    elif head.startswith(_ZIP):
        kind = _foreign_zip(path)
    if kind is None:
        return None
    unpack = "Unpack it first, and give the file inside."
    weights = "Give the PyTorch network's weights, written by torch.save(model.state_dict(), …) or as safetensors."
    return UsageError(
        f"{path} is {kind}, not a PyTorch checkpoint.", fix=unpack if kind.endswith("archive") else weights
    )


def _foreign_zip(path: Path) -> str | None:
    """What a zip file is that PyTorch did not write; None if it did, or if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    return "a Keras file" if "model.weights.h5" in names else "a zip archive"


def _unsafe(path: Path, head: bytes, error: Exception) -> IntegrityError:
    """The error for a file that `torch.load` does not read. Its own text recommends turning off `weights_only`, so it
    is not passed on."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.<>]+)", text) or re.search(r"but got <class '([\w.<>]+)'>", text)
    if not head:
        why = "It is empty."
    elif named:
        why = (
            f"It is a pickle that would have {named[1].rstrip('.')} imported and run; it holds more "
            "than tensors and plain values."
        )
    elif "TorchScript" in text:
        why = "It is a TorchScript archive, which is a program."
    elif head.startswith((_ZIP, b"\x80")) and "weights_only" not in text:
        why = text.splitlines()[0] if text else type(error).__name__
    else:
        why = "It is damaged, or not a PyTorch file."
    return IntegrityError(
        f"{path} is not a state dict that can be read safely; nothing in it was run.", why=why, fix=SAVE_AGAIN
    )
