"""The header of an .npy array, and the arrays inside an .npz, in the standard library: the gate has no numpy.

Format: numpy's NEP 1 (a magic word, a version, the length of the header, a Python literal). Nothing is unpickled.
"""

from __future__ import annotations

import ast
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from typing import IO

MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000
"""bytes; numpy's own limit for files that one does not trust"""

DAMAGED = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""what reading a damaged, compressed or encrypted file raises (a way that zipfile does not know: a RuntimeError)"""

_PLAIN = re.compile(r"[<>|=](b1|[iu][1248]|f(2|4|8|16)|c(8|16|32))")


@dataclass(frozen=True)
class ArrayHeader:
    """What an .npy file says of its array.

    Attributes:
        dtype: numpy's name of a plain type with its byte order ("<i4", "|u1").
        shape: of the array.
        fortran: the first index runs fastest.
        item_bytes: of one element.
    """

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    item_bytes: int

    @property
    def data_bytes(self) -> int:
        """Bytes that follow the header."""
        return math.prod(self.shape) * self.item_bytes


def read_header(stream: IO[bytes]) -> ArrayHeader:
    """Reads a header; the stream then stands at the array's first byte.

    Raises:
        ValueError: it is none, or of an array whose elements are not plain numbers.
    """
    start = stream.read(8)
    if len(start) < 8 or not start.startswith(MAGIC) or start[6] not in (1, 2, 3):
        raise ValueError("this is no .npy array")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if not 0 < length <= MAX_HEADER:
        raise ValueError(f"the header of the array claims {length} bytes")
    text = stream.read(length).decode("utf-8" if start[6] == 3 else "latin-1")
    try:
        values = ast.literal_eval(text.strip())
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("the header of the array is no literal") from error
    if not isinstance(values, dict) or values.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("the header of the array lacks a part")
    dtype, shape, fortran = values["descr"], values["shape"], values["fortran_order"]
    match = _PLAIN.fullmatch(dtype) if isinstance(dtype, str) else None
    if match is None:
        raise ValueError(f"the array holds {dtype!r}, not plain numbers")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"the array has the shape {shape!r}")
    return ArrayHeader(dtype, shape, fortran is True, int(match[0][2:]))


def open_member(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], ArrayHeader]:
    """Opens the array `name` of an .npz, after its header.

    Raises:
        ValueError: it is not there, or its size is not what its header says.
        RuntimeError: compressed or encrypted in a way that zipfile does not read.
    """
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError as error:
        raise ValueError(f"there is no array '{name}'") from error
    stream = archive.open(entry)
    try:
        header = read_header(stream)
        if stream.tell() + header.data_bytes != entry.file_size:
            raise ValueError(f"array '{name}' is {entry.file_size} bytes long, its header says something else")
    except BaseException:
        stream.close()
        raise
    return stream, header
