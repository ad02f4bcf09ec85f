"""Quantizes an FP32 ONNX file with calibration images: the INT8 graph that one target needs."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import quant_pre_process

from nayer_edge import __version__
from nayer_edge.errors import UsageError
from nayer_edge.storage.files import sha256_of

from .eligible import EXCLUDED_NODES, eligible_nodes
from .fp16 import beyond_fp16, converted, fp32_metadata
from .int8.calibration import METHODS, Ranges, compute_ranges, largest_values, require_images
from .int8.coverage import Coverage, int8_coverage
from .int8.qdq import calibrated_tensors, with_dead_tensors, with_qdq
from .int8.sensitivity import (
    LayerError,
    LayerSensitivity,
    bias_corrected,
    layer_errors,
    most_sensitive_first,
    search_mixed_precision,
)
from .onnx_file import metadata_of, opset_of, read_onnx, strip, write_onnx
from .parity import Agreement, agreement
from .plain_graph import constants, copy_of, make_plain
from .qat.train import QatTrainer
from .runners import OrtRunner, as_bytes
from .runtimes import open_runner, require
from .targets import FP16_SCALES, Target, get_target, has_module, is_native, quantized_operators

Method = Literal["auto", "minmax", "percentile", "entropy", "mse"]
FP16_IMAGES = 256
"""calibration images that show which activations FP16 cannot hold"""
QAT = "finetuned"
"""method of a file made by QAT, as quantization.json has it"""


@dataclass(frozen=True)
class Int8Result:
    """The INT8 file and how it was made.

    Attributes:
        path: the INT8 file.
        target: its target.
        method: calibration method, or "finetuned" (QAT).
        scores: method → agreement with FP32 on the hold-out; empty if nothing was compared.
        coverage: what runs in INT8.
        excluded_nodes: eligible nodes that were excluded from quantization.
        record: the entry for quantization.json (JSON-serialisable).
        sha256: of the file.
    """

    path: Path
    target: str
    method: str
    scores: Mapping[str, Agreement]
    coverage: Coverage
    excluded_nodes: tuple[str, ...]
    record: dict[str, Any]
    sha256: str


def to_int8(
    fp32_path: Path,
    path: Path,
    calibration_images: np.ndarray,
    target: str | Target,
    *,
    method: Method = "auto",
    holdout_images: np.ndarray | None = None,
    rest: Literal["float32", "float16"] | None = None,
    nodes_to_exclude: Collection[str] = (),
    bias_correction: Literal["auto", "on", "off"] = "auto",
    max_drop: float | None = None,
    sensitivity: bool = False,
    qat: QatTrainer | None = None,
    teacher_logits: np.ndarray | None = None,
    provenance: str = "synthetic",
) -> Int8Result:
    """Quantizes an FP32 classifier for one target.

    Args:
        fp32_path: made by `to_onnx`.
        path: the INT8 file to write.
        calibration_images: (n, C, H, W), float32 in [0, 1] or uint8; they set the ranges of activations.
        target: its rules apply (targets.py).
        method: how ranges are found. "auto" quantizes by every method and keeps the one whose top-1 agrees best with
            FP32 on the hold-out, in the real runtime; ties are broken by mean KL divergence.
        holdout_images: like calibration_images, but disjoint from them; required by "auto", `max_drop` and `qat`.
        rest: type of everything that is not quantized; the target's by default.
        nodes_to_exclude: eligible nodes that stay in float in any case.
        bias_correction: correct biases for the mean error of rounding. "auto" keeps the correction if it raises the
            agreement on the hold-out, and does nothing without a hold-out.
        max_drop: largest drop of INT8 against FP32 on the hold-out, with the teacher's predictions as labels; without
            `teacher_logits`, largest fraction of images on which they predict different classes. The most sensitive
            layers are excluded from quantization until the limit holds in the real runtime.
        sensitivity: record the sensitivity of every layer, even if none has to be excluded.
        qat: trains the calibrated network; the result is kept if it agrees with FP32 better than calibration alone.
        teacher_logits: (n, classes), for the hold-out. `max_drop` then judges as the gate does: an image on which INT8
            is right and FP32 is wrong makes up for one that is lost. QAT also records the agreement with the teacher.
        provenance: origin of the calibration images, for the record.

    Raises:
        UsageError: no or wrong images, an unknown method or target, nothing to quantize, already quantized, or an
            operator that QAT does not support.
        MissingError: the target's runtime is not installed.
        TrainingError: QAT diverged.
        IntegrityError: the FP32 file is damaged.
    """
    target = get_target(target) if isinstance(target, str) else target
    if target.suffix != ".onnx":
        raise UsageError(f"Target '{target.name}' takes no ONNX file: its own quantizer makes its files.")
    rest = rest or target.rest
    if rest == "float16" and target.bias == "int32":
        raise UsageError(f"The target {target.name} has INT32 biases, which need rest='float32'.")
    source = read_onnx(fp32_path, external_data=True)
    if rest == "float16" and opset_of(source) < FP16_SCALES:
        raise UsageError(
            f"{fp32_path.name} is too old for target '{target.name}', whose Q/DQ scales are in FP16.",
            why=f"FP16 scales need opset {FP16_SCALES} or newer.",
            fix=f"Export it with a newer one: --set export.opset={FP16_SCALES}",
        )
    shape = _input_shape(source)
    calibration = require_images(calibration_images, shape, "calibration")
    holdout = None if holdout_images is None else require_images(holdout_images, shape, "hold-out")
    if holdout is None:
        _refuse_without_holdout(method, max_drop, qat)
    with tempfile.TemporaryDirectory(prefix="nayer-edge-") as folder:
        labels = None if teacher_logits is None else teacher_logits.argmax(1)
        search = _Search(
            fp32_path,
            source,
            target,
            rest,
            calibration,
            holdout,
            labels=labels,
            excluded=set(nodes_to_exclude),
            folder=Path(folder),
        )
        search.calibrate(METHODS if method == "auto" else (method,))
        search.correct_bias(bias_correction)
        if qat is not None:
            search.train(qat, teacher_logits)
        rows, trail = [], []
        if sensitivity or (max_drop is not None and not search.holds(max_drop)):
            rows = search.sensitivity()
        if max_drop is not None:
            trail = search.exclude_until(max_drop, most_sensitive_first(rows))
        quantized = search.quantized(search.excluded)
    excluded = sorted(search.excluded)
    _write(
        quantized,
        path,
        source,
        {
            "nayer_edge.precision": "int8",
            "nayer_edge.target": target.name,
            "nayer_edge.calibration": f"{search.method}, {len(calibration)} {provenance} images",
            EXCLUDED_NODES: "\n".join(excluded),
            **fp32_metadata(search.fp32),
        },
    )
    coverage = int8_coverage(path, target)
    digest = sha256_of(path)
    record = {
        "target": target.name,
        "file_sha256": digest,
        "parent_sha256": sha256_of(fp32_path),
        "method": search.method,
        "methods": {m: s.as_record() for m, s in search.scores.items()},
        "measured_in": measured_in(target),
        "calibration": images_record(calibration, provenance),
        "holdout": None if holdout is None else images_record(holdout, provenance),
        "activations": target.activations + (" symmetric" if target.symmetric else " asymmetric"),
        "weights": f"{target.weights} symmetric per channel, at most ±{target.weight_max}",
        "bias": target.bias,
        "rest": rest,
        "coverage": {
            "eligible": coverage.eligible,
            "int8": coverage.int8,
            "fraction": coverage.fraction,
            "verified": coverage.verified,
            "not_int8": [list(entry) for entry in coverage.not_int8],
            "excluded": [list(entry) for entry in coverage.ineligible],
        },
        "float_nodes": excluded,
        "fp32_nodes": [list(entry) for entry in search.fp32.items()],
        "bias_correction": {"applied": bool(search.errors), **search.correction},
        "finetune": search.qat,
        "max_drop": max_drop,
        "drop_held": None if max_drop is None else search.holds(max_drop),
        "fall_back": trail,
        "sensitivity": [row.as_record() for row in rows],
        "final": None if search.agreement is None else search.agreement.as_record(),
        "ranges": {name: list(ends) for name, ends in sorted(search.ranges[search.method].items())},
        "versions": {
            "nayer-edge": __version__,
            "onnx": onnx.__version__,
            "onnxruntime": ort.__version__,
            **{package: metadata.version(package) for package in target.packages},
        },
    }
    return Int8Result(path, target.name, search.method, search.scores, coverage, tuple(excluded), record, digest)


def _refuse_without_holdout(method: str, max_drop: float | None, qat: QatTrainer | None) -> None:
    """Raises UsageError if an option has to compare models."""
    options = (("Calibration method 'auto'", method == "auto"), ("max_drop", max_drop is not None), ("QAT", bool(qat)))
    for name, used in options:
        if used:
            raise UsageError(
                f"{name} needs hold-out images.",
                why="It measures how well INT8 models agree with FP32, on images not used for calibration.",
                fix="Pass hold-out images, or calibrate with minmax, percentile, entropy or mse alone.",
            )


@dataclass
class _Search:
    """The choices behind one INT8 file, made one after the other.

    Attributes:
        labels: classes of the hold-out images, (n,), if they are known.
        excluded: nodes to exclude from quantization.
        fp32: node → why it stays in FP32 where the rest is FP16.
        graph: FP32 graph to quantize.
        method: calibration method chosen so far, a key of `ranges`.
        ranges: method → ranges of activations.
        scores: method → agreement with FP32 on the hold-out.
        errors: layer → error that its bias is corrected for; empty without bias correction.
        correction: agreement before and after bias correction, if it was tried.
        qat: record of QAT, if it was tried.
        agreement: agreement with FP32, on the hold-out, of the choices made so far; None without a hold-out.
    """

    fp32_path: Path
    source: ModelProto
    target: Target
    rest: str
    calibration: np.ndarray
    holdout: np.ndarray | None
    labels: np.ndarray | None
    excluded: set[str]
    folder: Path
    graph: ModelProto = field(init=False)
    fp32: dict[str, str] = field(default_factory=dict)
    method: str = ""
    ranges: dict[str, Ranges] = field(default_factory=dict)
    scores: dict[str, Agreement] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)
    correction: dict[str, Any] = field(default_factory=dict)
    qat: dict[str, Any] | None = None
    agreement: Agreement | None = None

    def __post_init__(self) -> None:
        self.graph = prepared(self.fp32_path, self.folder / "prepared.onnx")
        _require_quantizable(self.graph, self.target, self.fp32_path)
        if self.rest == "float16":
            self.fp32 = beyond_fp16(self.graph, largest_values(self.graph, self.calibration[:FP16_IMAGES]))
            self.excluded |= {node.name for node in eligible_nodes(self.graph, self.target)[0]} & set(self.fp32)

    def quantized(self, excluded: Collection[str]) -> ModelProto:
        """The INT8 graph by the choices made so far, but with these excluded nodes."""
        ranges = self.ranges[self.method]
        excluded = {*excluded, *self.fp32}
        quantized = with_qdq(self._corrected(excluded), ranges, self.target, nodes_to_exclude=excluded)
        return converted(quantized, self.fp32) if self.rest == "float16" else quantized

    def _corrected(self, excluded: Collection[str]) -> ModelProto:
        """The FP32 graph, with biases corrected in layers that are quantized."""
        errors = {name: e for name, e in self.errors.items() if name not in excluded}
        return bias_corrected(self.graph, errors) if errors else self.graph

    def measure(self, excluded: Collection[str]) -> Agreement:
        """Agreement of `quantized` with FP32 on the hold-out, in the target's runtime or, for engines, ONNX Runtime."""
        return agreement(self._fp32_logits, self._logits(excluded), self.labels)

    def holds(self, max_drop: float) -> bool:
        """Whether the choices made so far keep the drop within a limit."""
        return self.agreement is not None and self.agreement.drop <= max_drop

    @functools.cached_property
    def _fp32_logits(self) -> np.ndarray:
        assert self.holdout is not None
        return run_onnx(self.fp32_path, self.holdout)

    def _logits(self, excluded: Collection[str]) -> np.ndarray:
        assert self.holdout is not None
        candidate = self.folder / "candidate.onnx"
        _write(self.quantized(excluded), candidate, self.source, {})
        if has_module(self.target):
            with open_runner(self.target, candidate) as runner:
                return runner.infer(self.holdout)
        return run_onnx(candidate, self.holdout, as_written=not is_native(self.target))

    def calibrate(self, methods: Sequence[str]) -> None:
        """Finds ranges by each method, and chooses the method."""
        found = compute_ranges(
            self.folder / "prepared.onnx",
            self.calibration,
            (*quantized_operators(self.target), "Add"),
            calibrated_tensors(self.graph, self.target),
            methods,
            self.target,
        )
        self.ranges = {method: with_dead_tensors(self.graph, ranges) for method, ranges in found.items()}
        self.method = methods[0]
        if self.holdout is not None:
            for method in methods:
                self.method = method
                self.scores[method] = self.measure(self.excluded)
            self.method = max(methods, key=lambda m: _rank(self.scores[m]))
            self.agreement = self.scores[self.method]

    def correct_bias(self, mode: str) -> None:
        """Corrects biases for the mean error of rounding, if that is asked for or helps."""
        before = self.agreement
        if mode == "off" or (mode == "auto" and before is None):
            return
        self.errors = layer_errors(self.graph, self.ranges[self.method], self.target, self._feed())
        if before is None:
            return
        after = self.measure(self.excluded)
        self.correction = {"before": before.as_record(), "after": after.as_record()}
        if mode == "auto" and _rank(after) <= _rank(before):
            self.errors = {}
        else:
            self.agreement = after

    def train(self, trainer: QatTrainer, teacher_logits: np.ndarray | None) -> None:
        """QAT; its result is kept if it agrees with FP32 better than calibration alone."""
        assert self.agreement is not None
        before, calibrated = self.agreement, self._logits(self.excluded)
        kept = self.graph, self.errors, self.method
        excluded = {*self.excluded, *self.fp32}
        trained = trainer(self._corrected(excluded), self.ranges[self.method], self.target, excluded)
        self.graph, self.errors, self.method = trained.graph, {}, QAT
        self.ranges[QAT] = trained.ranges
        logits = self._logits(self.excluded)
        after = self.scores[QAT] = agreement(self._fp32_logits, logits, self.labels)
        chosen = _rank(after) > _rank(before)
        self.qat = {
            "chosen": chosen,
            "start": kept[2],
            "calibrated": before.as_record(),
            "finetuned": after.as_record(),
            "gain": after.top1 - before.top1,
            **trained.record,
        }
        if teacher_logits is not None:
            versions = {"fp32": self._fp32_logits, "calibrated": calibrated, "finetuned": logits}
            self.qat["vs_teacher"] = {name: agreement(teacher_logits, of).as_record() for name, of in versions.items()}
        if chosen:
            self.agreement = after
        else:
            self.graph, self.errors, self.method = kept

    def sensitivity(self) -> list[LayerSensitivity]:
        """For every eligible layer: its noise, and the model's agreement if only this layer is quantized."""
        errors = layer_errors(self.graph, self.ranges[self.method], self.target, self._feed())
        return [
            LayerSensitivity(name, e.sqnr_db, None if self.holdout is None else self.measure(set(errors) - {name}))
            for name, e in errors.items()
        ]

    def exclude_until(self, max_drop: float, order: Sequence[str]) -> list[dict[str, Any]]:
        """Excludes as many layers, in this order, as it takes to keep the drop within a limit.

        Returns:
            every measurement made.
        """
        fixed = set(self.excluded)
        found, self.agreement, trail = search_mixed_precision(
            lambda layers: self.measure(fixed | set(layers)),
            [name for name in order if name not in fixed],
            max_drop,
        )
        self.excluded |= set(found)
        return trail

    def _feed(self) -> np.ndarray:
        kind = self.source.graph.input[0].type.tensor_type.elem_type
        return as_bytes(self.calibration) if kind == TensorProto.UINT8 else self.calibration


def _rank(score: Agreement) -> tuple[float, float]:
    """Sort key: top-1; the divergence breaks ties."""
    return (score.top1, -score.mean_kl)


def measured_in(target: Target) -> str:
    """How agreement scores are measured, for quantization.json."""
    if has_module(target):
        return f"{target.runtime} {require(target)} on this processor"
    if is_native(target):
        return "ONNX Runtime, CPUExecutionProvider"
    return "ONNX Runtime on this processor, Q/DQ computed in float: the arithmetic of the graph, not of the device"


def run_onnx(path: Path, images: np.ndarray, *, as_written: bool = False) -> np.ndarray:
    """Logits (n, classes) of an ONNX file in ONNX Runtime's CPU provider.

    Args:
        as_written: compute Q/DQ in float, without INT8 kernels. Kernels for signed activations overflow on x86
            processors without VNNI, which does not happen on an ARM or TensorRT device.
    """
    with OrtRunner(path, batch=64, as_written=as_written) as runner:
        return runner.infer(images)


def prepared(fp32_path: Path, path: Path) -> ModelProto:
    """Prepares an FP32 file for quantization: ONNX Runtime's pre-processing (constants folded, shapes inferred), then
    `make_plain`.

    Args:
        path: where the prepared graph is written.

    Returns:
        the prepared graph.

    Raises:
        UsageError: the file is already quantized.
    """
    # Symbolic shape inference is for sequence models; a classifier does not need it.
    quant_pre_process(str(fp32_path), str(path), skip_symbolic_shape=True)
    model = onnx.load(str(path))
    if any(node.op_type in ("QuantizeLinear", "QLinearConv") for node in model.graph.node):
        raise UsageError(f"{fp32_path.name} is quantized already.", fix="Pass the FP32 file: export/student.fp32.onnx")
    make_plain(model)
    onnx.save(model, str(path))
    return model


def _input_shape(model: ModelProto) -> tuple[int | str, ...]:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return tuple(d.dim_value or d.dim_param for d in dims)


def _require_quantizable(model: ModelProto, target: Target, fp32_path: Path) -> None:
    eligible, ineligible = eligible_nodes(model, target)
    if not eligible:
        raise UsageError(
            f"{fp32_path.name} has nothing that runs in INT8 on target '{target.name}'.",
            why="; ".join(f"{name}: {reason}" for name, reason in ineligible)
            or "It has no convolution and no matrix product.",
            fix="Use the FP32 or FP16 file on this target.",
        )
    known = constants(model)
    if any(known[n.input[1]].data_type != TensorProto.FLOAT for n in eligible if n.input[1] in known):
        raise UsageError(f"{fp32_path.name} is not in FP32.", fix="Pass the FP32 file: export/student.fp32.onnx")


def _write(model: ModelProto, path: Path, source: ModelProto, metadata: Mapping[str, str]) -> None:
    copy = copy_of(model)
    strip(copy, metadata={**metadata_of(source), **{k: v for k, v in metadata.items() if v}})
    write_onnx(copy, path)


def images_record(images: np.ndarray, provenance: str) -> dict[str, Any]:
    """Number, digest and origin of images, for quantization.json."""
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    return {"n": len(images), "sha256": digest, "provenance": provenance}
