"""Files in float and INT8 of runtimes that quantize PyTorch networks themselves, and the layers to leave in float."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from nayer_edge import __version__
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.runtime.progress import Progress, Silent
from nayer_edge.storage.files import write_bytes

from .int8.calibration import require_images
from .int8.sensitivity import LayerSensitivity, most_sensitive_first, search_mixed_precision
from .parity import Agreement, agreement, compare, edge_cases
from .runners import TorchRunner
from .runtimes import describe, module_of, open_runner, require
from .runtimes.edge_file import BuiltFile
from .targets import Target
from .to_int8 import images_record

PARITY_TOLERANCE = 1e-3
"""largest difference of logits between torch and the FP32 file that counts as rounding"""
FP16_TOLERANCE = 2**-6
"""the same for FP16, relative to the largest logit; weights have 11 significant bits"""
SILENT = Silent()
QUANTIZABLE_MODULES = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def to_float_file(
    network: nn.Module,
    shape: tuple[int, int, int],
    path: Path,
    target: Target,
    precision: Literal["fp32", "fp16"] = "fp32",
) -> BuiltFile:
    """Builds the FP32 or FP16 file of a target and compares it with the network on noise and edge cases.

    Args:
        network: images (n, C, H, W) in [0, 1] → logits.
        shape: (C, H, W).
        path: the file to write.

    Raises:
        UsageError: the runtime lacks an operator (named, with its layer), does not run the file, or computes other
            logits.
        MissingError: a package that the target needs is not installed.
    """
    noise = np.random.default_rng(0).random((8, *shape), np.float32)
    images = np.concatenate([noise, *edge_cases(shape).values()])
    with _new_file(target):
        built = module_of(target).build(network, shape, path, precision=precision)
    with _new_file(target), TorchRunner(network) as reference, open_runner(target, path) as runner:
        logits = reference.infer(images)
        tolerance = PARITY_TOLERANCE if precision == "fp32" else FP16_TOLERANCE * float(np.abs(logits).max())
        parity = compare(logits, runner.infer(images), tolerance=tolerance)
    if parity.verdict != "match":
        path.unlink()
        raise UsageError(
            f"{path.name} does not compute the same logits as the student ({parity.verdict}).",
            why=f"Largest difference {parity.max_abs_diff:.3g}, allowed {tolerance:.3g}; "
            f"{parity.not_finite} inputs with NaN or infinity.",
            fix=_without(target, precision),
        )
    return built


def _without(target: Target, precision: str) -> str:
    if precision == "fp16":
        return "Leave out FP16: nayer-edge export RUN --int8 --no-fp16"
    return f"Leave out the target '{target.name}', and please report it with the model's name."


@contextlib.contextmanager
def _new_file(target: Target) -> Iterator[None]:
    """Raises UsageError where the runtime refuses a file that was built a moment ago: it is not damaged, so exporting
    it again would not help."""
    try:
        yield
    except IntegrityError as error:
        raise UsageError(
            f"The file that was built for '{target.name}' does not run: {error.what}",
            why=error.why,
            fix=f"Leave out the target '{target.name}', and please report it with the model's name.",
        ) from error


def to_int8_file(
    network: nn.Module,
    shape: tuple[int, int, int],
    path: Path,
    target: Target,
    calibration_images: np.ndarray,
    holdout_images: np.ndarray,
    *,
    teacher_logits: np.ndarray | None = None,
    max_drop: float | None = None,
    sensitivity: bool = False,
    parent_sha256: str,
    provenance: str = "synthetic",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Quantizes a network with the runtime's own quantizer.

    Args:
        network: images (n, C, H, W) in [0, 1] → logits.
        shape: (C, H, W).
        path: the file to write.
        calibration_images: (n, C, H, W), float32 in [0, 1].
        holdout_images: like calibration_images, but disjoint from them.
        teacher_logits: (n, classes), for the hold-out; its answers are the labels by which `max_drop` judges.
        max_drop: largest drop of INT8 against FP32 on the hold-out (`Agreement.drop`). The most sensitive layers are
            left in float until the limit holds in the runtime, as far as its quantizer allows. Choices of layers with
            which it fails are skipped.
        sensitivity: measure the agreement with each layer alone in INT8, even if none has to stay in float. (Costs one
            file per layer.)
        parent_sha256: of the network's weights, for the record.
        provenance: origin of the images, for the record.
        progress: is told of every layer that is measured.

    Returns:
        the entry for quantization.json.

    Raises:
        UsageError: wrong images, or an operator that the runtime or its quantizer lacks.
        MissingError: a package that the target needs is not installed.
    """
    expected: tuple[int | str, ...] = ("batch", *shape)
    calibration = require_images(calibration_images, expected, "calibration")
    holdout = require_images(holdout_images, expected, "hold-out")
    layers = [name for name, module in network.named_modules() if isinstance(module, QUANTIZABLE_MODULES)]
    with tempfile.TemporaryDirectory(prefix="nayer-edge-") as folder:
        labels = None if teacher_logits is None else teacher_logits.argmax(1)
        search = _Search(network, shape, target, calibration, holdout, labels, Path(folder))
        search.build(frozenset())
        final, found, trail = search.agreements[frozenset()], [], []
        rows: list[LayerSensitivity] = []
        if sensitivity or (max_drop is not None and final.drop > max_drop):
            progress.start(f"measure the layers for {target.name}", len(layers))
            for name in layers:
                rows.append(LayerSensitivity(name, math.inf, search.measure(set(layers) - {name})))
                progress.advance()
            progress.finish()
        if max_drop is not None:
            order = most_sensitive_first(rows)
            found, final, trail = search_mixed_precision(search.measure, order, max_drop)
        built = search.built[frozenset(found)]
        write_bytes(path, built.path.read_bytes())
    coverage, quantizer = describe(target, path)["coverage"], str(built.record["quantizer"])
    return {
        "target": target.name,
        "file_sha256": built.sha256,
        "parent_sha256": parent_sha256,
        "method": quantizer,
        "methods": {quantizer: search.agreements[frozenset()].as_record()},
        "measured_in": f"{target.runtime} {require(target)} on this processor",
        "calibration": images_record(calibration, provenance),
        "holdout": images_record(holdout, provenance),
        "activations": target.activations + (" symmetric" if target.symmetric else " asymmetric"),
        "weights": f"{target.weights} symmetric per channel, at most ±{target.weight_max}",
        "bias": target.bias,
        "rest": target.rest,
        "coverage": {**coverage, "verified": True, "excluded": []},
        "float_nodes": sorted(found),
        "fp32_nodes": [],
        "bias_correction": {"applied": False},
        "finetune": None,
        "max_drop": max_drop,
        "drop_held": None if max_drop is None else final.drop <= max_drop,
        "fall_back": trail,
        "sensitivity": [row.as_record() for row in rows],
        "final": final.as_record(),
        "ranges": {},
        "versions": {"nayer-edge": __version__, **{name: metadata.version(name) for name in target.packages}},
        "build": built.record,
        **({"failed": search.failures} if search.failed else {}),
    }


class _Search:
    """Files that differ in the layers left in float, each built and measured once.

    Attributes:
        built: layers in float → the file.
        agreements: layers in float → its agreement with FP32 on the hold-out.
        failed: layers in float with which the quantizer failed → the reason.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, int, int],
        target: Target,
        calibration: np.ndarray,
        holdout: np.ndarray,
        labels: np.ndarray | None,
        folder: Path,
    ) -> None:
        self._network, self._shape, self._target, self._folder = network, shape, target, folder
        self._calibration, self._holdout, self._labels = calibration, holdout, labels
        self.built: dict[frozenset[str], BuiltFile] = {}
        self.agreements: dict[frozenset[str], Agreement] = {}
        self.failed: dict[frozenset[str], str] = {}
        with TorchRunner(network) as runner:
            self._fp32_logits = runner.infer(holdout)

    def measure(self, in_float: Collection[str]) -> Agreement | None:
        """Agreement with FP32 on the hold-out, in the runtime, with these layers in float; None if the quantizer
        fails."""
        key = frozenset(in_float)
        if key not in self.built and key not in self.failed:
            try:
                self.build(key)
            except UsageError as error:
                self.failed[key] = f"{error.what} {error.why}".strip()
        return self.agreements.get(key)

    @property
    def failures(self) -> list[dict[str, Any]]:
        """`failed` for quantization.json."""
        return [{"float_layers": sorted(layers), "reason": reason} for layers, reason in self.failed.items()]

    def build(self, in_float: frozenset[str]) -> None:
        """Builds and measures one file.

        Raises:
            UsageError: the runtime or its quantizer lacks an operator, or fails, or does not run the file.
        """
        path = self._folder / f"{len(self.built)}{self._target.suffix}"
        with _new_file(self._target):
            built = module_of(self._target).build(
                self._network,
                self._shape,
                path,
                precision="int8",
                calibration=self._calibration,
                float_layers=sorted(in_float),
            )
            with open_runner(self._target, path) as runner:
                logits = runner.infer(self._holdout)
        self.agreements[in_float] = agreement(self._fp32_logits, logits, self._labels)
        self.built[in_float] = built
