"""What the files of ExecuTorch and LiteRT have in common: the request, provenance inside the file, a quiet terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from nayer_edge import __version__
from nayer_edge.errors import IntegrityError, MissingError, UsageError, first_line, missing_extra

Precision = Literal["fp32", "fp16", "int8"]
INPUT = "images"
OUTPUT = "logits"
ON_REQUEST = "kept in float on request"
Operator = tuple[str, str, bool]
"""kind, layer ("" if unknown), and whether it runs in INT8"""
_MARK = '{"nayer_edge.file": '


@dataclass(frozen=True)
class BuiltFile:
    """A file for an edge runtime and how it was made.

    Attributes:
        path: the file.
        record: JSON-serialisable: quantizer, versions, calibration images, batch, what stays in float and why.
        sha256: of the file.
    """

    path: Path
    record: dict[str, Any]
    sha256: str


def check_request(
    network: nn.Module,
    shape: tuple[int, int, int],
    precision: Precision,
    calibration: np.ndarray | None,
    float_layers: Collection[str],
    offered: Sequence[Precision] = ("fp32", "int8"),
) -> None:
    """Checks the arguments of `build`.

    Args:
        offered: the precisions that the runtime has.

    Raises:
        UsageError: unknown precision or layer, or calibration images that are missing or of another shape.
    """
    if precision not in offered:
        raise UsageError(f"This runtime has no files in '{precision}'.", fix=f"Use {' or '.join(offered)}.")
    if precision == "int8" and (calibration is None or len(calibration) == 0):
        raise UsageError("INT8 needs calibration images.", fix="Pass at least one; a few hundred work well.")
    if precision == "int8" and calibration is not None and calibration.shape[1:] != tuple(shape):
        raise UsageError(
            f"The calibration images have shape {calibration.shape[1:]}; the model takes {tuple(shape)}.",
            fix="Pass an array of shape (n, channels, height, width).",
        )
    known = {name for name, _ in network.named_modules() if name}
    if unknown := sorted(set(float_layers) - known):
        raise UsageError(
            f"The model has no layer {', '.join(unknown)}.", fix="Use the names of the model's named_modules()."
        )


def is_within(layer: str, modules: Collection[str]) -> bool:
    """Whether a layer is one of these modules or inside one."""
    return any(layer == name or layer.startswith(f"{name}.") for name in modules)


def why_in_float(layer: str, origin: Mapping[str, Any]) -> str:
    """Why a convolution or matrix product does not run in INT8, from the provenance of its file."""
    if (precision := origin.get("precision")) in ("fp32", "fp16"):
        return f"the file is {precision.upper()}"
    return ON_REQUEST if is_within(layer, origin.get("float_layers", [])) else "the quantizer left it in float"


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Installed version of each package."""
    return {package: metadata.version(package) for package in packages}


def provenance(runtime: str, versions: dict[str, str], facts: dict[str, Any]) -> str:
    """The line of JSON that is put into a file, so that its origin can be read without its runtime."""
    line = {"runtime": runtime, "nayer_edge": __version__, "versions": versions, **facts}
    return _MARK + json.dumps(line, sort_keys=True) + "}"


def provenance_in(data: bytes) -> dict[str, Any]:
    """The provenance in a file's bytes; empty if there is none."""
    start = data.find(_MARK.encode())
    if start < 0:
        return {}
    # JSON from json.dumps is ASCII; what follows it in the file is not part of it.
    text = data[start : start + 2**20].decode("latin-1")
    try:
        return json.JSONDecoder().raw_decode(text)[0]["nayer_edge.file"]
    except (ValueError, KeyError):
        return {}


def does_not_load(path: Path, runtime: str, target: str, why: str) -> IntegrityError:
    """The error for a file that the runtime refuses; it names the version that built the file, if it is another.

    Args:
        runtime: its package.
        target: the target's name.
    """
    installed, again = versions_of([runtime])[runtime], f"nayer-edge export RUN --int8 --target {target}"
    builder = provenance_in(path.read_bytes()).get("versions", {}).get(runtime)
    if builder and builder != installed:
        return IntegrityError(
            f"{runtime} {installed} does not load {path}.",
            why=f"The file was built by {runtime} {builder}. {why}",
            fix=f"Install {runtime}=={builder}, or build the file again with this version: {again}",
        )
    return IntegrityError(f"{runtime} {installed} does not load {path}.", why=why, fix=f"Export it again with: {again}")


def read_whole(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        IntegrityError: there is no such file.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} does not exist.", fix="Export it with: nayer-edge export RUN") from error


def not_importable(error: ImportError | OSError, package: str, extra: str, purpose: str) -> MissingError:
    """The error for an import that failed: the package is missing, or its native code does not fit another package.

    Args:
        package: the one that was imported.
        extra: what installs it.
        purpose: what needs it.
    """
    if isinstance(error, ModuleNotFoundError):
        return missing_extra((error.name or package).partition(".")[0], extra, purpose)
    return MissingError(
        f"{purpose} needs the Python package '{package}', which is installed but cannot be imported.",
        why=f"{first_line(error)} (torch {metadata.version('torch')})",
        fix="Its version may not fit that of torch. In an environment of its own, type: "
        f"pip install '.[{extra}]'   (in the checkout of nayer-edge)",
    )


def does_not_run(path: Path, runtime: str, error: BaseException) -> IntegrityError:
    """The error for a file that the runtime loads but cannot execute."""
    installed = versions_of([runtime])[runtime]
    return IntegrityError(
        f"{runtime} {installed} does not run {path}.",
        why=first_line(error),
        fix="Export it again with: nayer-edge export RUN",
    )


@contextlib.contextmanager
def quiet(harmless: re.Pattern[str] | None = None) -> Iterator[list[str]]:
    """Hides a runtime's or converter's developer messages: warnings, log lines, and lines that native code prints.

    Native code writes to file descriptor 2. It is redirected while the block runs; afterwards every line is printed
    that does not match `harmless`. With `harmless=None` all lines are hidden (converters). If the block fails, nothing
    is printed: the lines are for the caller's error message.

    Yields:
        a list that holds the native lines, printed or not, after the block.
    """
    lines: list[str] = []
    level = logging.root.manager.disable
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        before = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            # Some bindings print through Python's stderr, which is not always file descriptor 2.
            with open(2, "w", closefd=False) as stream, contextlib.redirect_stderr(stream):
                yield lines
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            logging.disable(level)
            caught.seek(0)
            lines += caught.read().decode(errors="replace").splitlines()
    shown = [line for line in lines if harmless is not None and line.strip() and not harmless.search(line)]
    for line in shown:
        sys.stderr.write(f"{line}\n")


def by_kind(operators: Collection[Operator], *, int8: bool) -> dict[str, Any]:
    """Operators in INT8, or those in float: kind → count and named layers."""
    found: dict[str, Any] = {}
    for kind, layer, quantized in operators:
        if quantized == int8:
            entry = found.setdefault(kind, {"count": 0, "layers": []})
            entry["count"] += 1
            if layer:
                entry["layers"].append(layer)
    return dict(sorted(found.items()))
