"""From an FP32 ONNX file and calibration images to the INT8 graph that one target wants."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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

from .calibration import METHODS, Ranges, compute_ranges, require_images
from .coverage import FLOAT_NODES, Coverage, eligible_products, int8_coverage
from .fp16 import converted
from .onnx_file import metadata_of, opset_of, read_onnx, strip, write_onnx
from .parity import Agreement, agreement
from .plain_graph import make_plain
from .qat.finetune import FineTuner
from .qdq import calibrated_tensors, with_qdq
from .runners import OrtRunner, as_bytes
from .sensitivity import (
    LayerError,
    LayerSensitivity,
    bias_corrected,
    fall_back,
    layer_errors,
    most_sensitive_first,
)
from .targets import FP16_SCALES, Target, get_target, is_native, quantized_operators

Method = Literal["auto", "minmax", "percentile", "entropy", "mse"]
FINETUNED = "finetuned"
"""in the place of a method: ranges and weights learnt by fine-tuning"""


@dataclass(frozen=True)
class Int8Result:
    """What was written and why it is so.

    Attributes:
        path: the INT8 file.
        target: its target.
        method: calibration method used, or "finetuned".
        scores: method → agreement with FP32 on the hold-out; empty where nothing was compared.
        coverage: what runs in INT8.
        float_nodes: eligible products left in float.
        record: the entry for quantization.json (JSON-serialisable).
        sha256: of the file.
    """

    path: Path
    target: str
    method: str
    scores: Mapping[str, Agreement]
    coverage: Coverage
    float_nodes: tuple[str, ...]
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
    reference_logits: np.ndarray | None = None,
    rest: Literal["float32", "float16"] | None = None,
    float_nodes: Collection[str] = (),
    bias_correction: Literal["auto", "on", "off"] = "auto",
    max_drop: float | None = None,
    sensitivity: bool = False,
    finetune: FineTuner | None = None,
    teacher_logits: np.ndarray | None = None,
    provenance: str = "synthetic",
) -> Int8Result:
    """Quantizes an FP32 classifier for one target.

    Args:
        fp32_path: made by `to_onnx`.
        path: the INT8 file to write.
        calibration_images: (n, C, H, W), float32 in [0, 1] or uint8; they set the ranges of activations.
        target: whose rules (targets.py).
        method: how ranges are found; "auto" builds a graph by every method and keeps the one whose top-1
            agrees best with FP32 on the hold-out (mean KL divergence breaks ties), run in ONNX Runtime.
        holdout_images: images like calibration_images, disjoint from them; needed by "auto".
        reference_logits: (n, classes), FP32 logits of the hold-out; computed where not given.
        rest: what everything else computes in; as the target wants it by default.
        float_nodes: eligible products to leave in float whatever is measured.
        bias_correction: add back what rounding takes from each channel's mean; "auto" keeps it where it
            raises agreement on the hold-out (without a hold-out: off).
        max_drop: largest fraction of hold-out images on which INT8 may choose another class than FP32; the
            most sensitive layers return to float until it holds in the real runtime. Needs hold-out images.
        sensitivity: measure every layer alone for the record, even where nothing has to fall back.
        finetune: fine-tunes the calibrated network; what it finds is kept where it agrees with FP32 better than
            calibration alone does. Needs hold-out images.
        teacher_logits: (n, classes), of the hold-out, for the record of fine-tuning.
        provenance: where the calibration images came from, for the record.

    Raises:
        UsageError: no or wrong images, an unknown method or target, nothing to quantize, already quantized, an
            operator that cannot be fine-tuned.
        TrainingError: fine-tuning diverged.
        IntegrityError: the FP32 file is damaged.
    """
    target = get_target(target) if isinstance(target, str) else target
    rest = rest or target.rest
    source = read_onnx(fp32_path, external_data=True)
    if rest == "float16" and opset_of(source) < FP16_SCALES:
        raise UsageError(
            f"{fp32_path.name} is too old for target '{target.name}', whose Q/DQ scales are in FP16.",
            why=f"They are defined from opset {FP16_SCALES} on.",
            fix=f"Export it with a newer one: --set export.opset={FP16_SCALES}",
        )
    shape = _input_shape(source)
    calibration = require_images(calibration_images, shape, "calibration")
    holdout = None if holdout_images is None else require_images(holdout_images, shape, "hold-out")
    if method == "auto" and holdout is None:
        raise UsageError(
            "Calibration method 'auto' needs hold-out images.",
            why="It compares methods by how well their INT8 models agree with FP32 on images not used for calibration.",
            fix="Give hold-out images, or choose minmax, percentile, entropy or mse.",
        )
    if max_drop is not None and holdout is None:
        raise UsageError("A largest drop can only be held where it is measured.", fix="Give hold-out images.")
    if finetune is not None and holdout is None:
        raise UsageError("Fine-tuning is kept only where it is measured to help.", fix="Give hold-out images.")
    with tempfile.TemporaryDirectory(prefix="nayer-edge-") as name:
        search = _Search(fp32_path, source, target, rest, calibration, holdout, reference_logits, Path(name))
        search.calibrate(METHODS if method == "auto" else (method,), float_nodes)
        search.correct_bias(bias_correction, float_nodes)
        if finetune is not None:
            search.finetune(finetune, float_nodes, teacher_logits)
        rows, trail = [], []
        if sensitivity or (max_drop is not None and search.best().top1 < 1 - max_drop):
            rows = search.sensitivity(float_nodes)
        if max_drop is not None:
            order = [node for node in most_sensitive_first(rows) if node not in float_nodes]
            kept = set(float_nodes)
            extra, search.measured, trail = fall_back(
                lambda layers: search.measure(kept | set(layers)), order, 1 - max_drop
            )
            float_nodes = kept | set(extra)
        quantized = search.quantized(float_nodes)
        chosen, scores, ranges = search.method, search.scores, search.ranges[search.method]
    _write(
        quantized,
        path,
        source,
        {
            "nayer_edge.precision": "int8",
            "nayer_edge.target": target.name,
            "nayer_edge.calibration": f"{chosen}, {len(calibration)} {provenance} images",
            FLOAT_NODES: "\n".join(sorted(float_nodes)),
        },
    )
    coverage = int8_coverage(path, target)
    digest = sha256_of(path)
    record = {
        "target": target.name,
        "file_sha256": digest,
        "parent_sha256": sha256_of(fp32_path),
        "method": chosen,
        "methods": {m: s.as_record() for m, s in scores.items()},
        "measured_in": measured_in(target),
        "calibration": _images_record(calibration, provenance),
        "holdout": None if holdout is None else _images_record(holdout, provenance),
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
            "excluded": [list(entry) for entry in coverage.excluded],
        },
        "float_nodes": sorted(float_nodes),
        "bias_correction": search.correction,
        "finetune": search.finetuning,
        "max_drop": max_drop,
        "drop_held": None if max_drop is None else search.best().top1 >= 1 - max_drop,
        "fall_back": trail,
        "sensitivity": [row.as_record() for row in rows],
        "final": None if holdout is None else search.best().as_record(),
        "ranges": {name: list(ends) for name, ends in sorted(ranges.items())},
        "versions": {"nayer-edge": __version__, "onnx": onnx.__version__, "onnxruntime": ort.__version__},
    }
    return Int8Result(path, target.name, chosen, scores, coverage, tuple(sorted(float_nodes)), record, digest)


class _Search:
    """The choices behind one INT8 file: calibration method, bias correction, layers left in float."""

    def __init__(
        self,
        fp32_path: Path,
        source: ModelProto,
        target: Target,
        rest: str,
        calibration: np.ndarray,
        holdout: np.ndarray | None,
        reference: np.ndarray | None,
        folder: Path,
    ) -> None:
        self._fp32_path, self._source, self._target, self._folder = fp32_path, source, target, folder
        self._rest = rest
        self._calibration, self._holdout, self._reference = calibration, holdout, reference
        self.graph = prepared(fp32_path, folder / "prepared.onnx")
        _require_quantizable(self.graph, target, fp32_path)
        self.method = ""
        self.ranges: dict[str, Ranges] = {}
        self.scores: dict[str, Agreement] = {}
        self._errors: dict[str, LayerError] = {}
        self.correction: dict[str, Any] = {"applied": False}
        self.finetuning: dict[str, Any] | None = None
        self.measured: Agreement | None = None

    def quantized(self, float_nodes: Collection[str], method: str = "") -> ModelProto:
        """The graph as it would be shipped: Q/DQ, biases corrected where the layer is quantized and correction was
        chosen, the rest in the type that was asked for."""
        graph = self._corrected(float_nodes)
        quantized = with_qdq(graph, self.ranges[method or self.method], self._target, float_nodes=float_nodes)
        return converted(quantized) if self._rest == "float16" else quantized

    def _corrected(self, float_nodes: Collection[str]) -> ModelProto:
        errors = {name: e for name, e in self._errors.items() if name not in float_nodes}
        return bias_corrected(self.graph, errors) if errors else self.graph

    def measure(self, float_nodes: Collection[str], method: str = "") -> Agreement:
        """Agreement with FP32 on the hold-out of `quantized`, in ONNX Runtime."""
        self.measured = agreement(self._fp32_logits(), self._logits(float_nodes, method))
        return self.measured

    def _fp32_logits(self) -> np.ndarray:
        assert self._holdout is not None
        if self._reference is None:
            self._reference = run_onnx(self._fp32_path, self._holdout)
        return self._reference

    def _logits(self, float_nodes: Collection[str], method: str = "") -> np.ndarray:
        assert self._holdout is not None
        candidate = self._folder / "candidate.onnx"
        _write(self.quantized(float_nodes, method), candidate, self._source, {})
        return run_onnx(candidate, self._holdout, as_written=not is_native(self._target))

    def best(self) -> Agreement:
        """Agreement of what has been chosen so far."""
        assert self.measured is not None
        return self.measured

    def calibrate(self, methods: Sequence[str], float_nodes: Collection[str]) -> None:
        self.ranges = compute_ranges(
            self._folder / "prepared.onnx",
            self._calibration,
            (*quantized_operators(self._target), "Add"),
            calibrated_tensors(self.graph, self._target),
            methods,
            self._target,
        )
        if self._holdout is not None:
            self.scores = {m: self.measure(float_nodes, m) for m in methods}
        self.method = max(methods, key=lambda m: _rank(self.scores[m])) if self.scores else methods[0]
        self.measured = self.scores.get(self.method)

    def correct_bias(self, mode: str, float_nodes: Collection[str]) -> None:
        if mode == "off" or (mode == "auto" and self._holdout is None):
            return
        before = self.measured
        self._errors = layer_errors(self.graph, self.ranges[self.method], self._target, self._feed())
        self.correction = {"applied": True}
        if before is not None:
            after = self.measure(float_nodes)
            self.correction |= {"before": before.as_record(), "after": after.as_record()}
            if mode == "auto" and _rank(after) <= _rank(before):
                self._errors, self.measured = {}, before
                self.correction["applied"] = False

    def finetune(self, tuner: FineTuner, float_nodes: Collection[str], teacher: np.ndarray | None) -> None:
        """Takes over what fine-tuning finds if it agrees with FP32 better than what was chosen before."""
        before, calibrated = self.best(), self._logits(float_nodes)
        tuned = tuner(self._corrected(float_nodes), self.ranges[self.method], self._target, float_nodes)
        kept = self.graph, self._errors
        self.graph, self._errors, self.ranges[FINETUNED] = tuned.graph, {}, tuned.ranges
        logits = self._logits(float_nodes, FINETUNED)
        after = agreement(self._fp32_logits(), logits)
        chosen = _rank(after) > _rank(before)
        self.scores[FINETUNED] = after
        self.finetuning = {
            "chosen": chosen,
            "start": self.method,
            "calibrated": before.as_record(),
            "finetuned": after.as_record(),
            "gain": after.top1 - before.top1,
            **tuned.record,
        }
        if teacher is not None:
            versions = {"fp32": self._fp32_logits(), "calibrated": calibrated, "finetuned": logits}
            self.finetuning["vs_teacher"] = {name: agreement(teacher, of).as_record() for name, of in versions.items()}
        if chosen:
            self.method, self.measured, self.correction["applied"] = FINETUNED, after, False
        else:
            self.graph, self._errors = kept

    def sensitivity(self, float_nodes: Collection[str]) -> list[LayerSensitivity]:
        """Every eligible layer alone: its noise, and the whole model's agreement where there is a
        hold-out."""
        errors = layer_errors(self.graph, self.ranges[self.method], self._target, self._feed())
        rows, kept = [], self.measured
        for name, error in errors.items():
            others = set(errors) - {name}
            alone = None if self._holdout is None else self.measure(others)
            rows.append(LayerSensitivity(name, error.sqnr_db, alone))
        self.measured = kept
        return rows

    def _feed(self) -> np.ndarray:
        kind = self._source.graph.input[0].type.tensor_type.elem_type
        return as_bytes(self._calibration) if kind == TensorProto.UINT8 else self._calibration


def _rank(score: Agreement) -> tuple[float, float]:
    """Top-1 first; the divergence breaks ties."""
    return (score.top1, -score.mean_kl)


def measured_in(target: Target) -> str:
    """Where this module's agreement scores are measured, in words."""
    if is_native(target):
        return "ONNX Runtime, CPUExecutionProvider"
    return "ONNX Runtime on this processor, Q/DQ computed in float: the arithmetic of the graph, not of the device"


def run_onnx(path: Path, images: np.ndarray, *, as_written: bool = False) -> np.ndarray:
    """Logits (n, classes) of an ONNX file in ONNX Runtime's CPU provider.

    Args:
        as_written: computes Q/DQ in float, without kernels for bytes. Those for signed activations overflow on x86
            processors without VNNI, which says nothing about an ARM or TensorRT device.
    """
    with OrtRunner(path, batch=64, as_written=as_written) as runner:
        return runner.infer(images)


def prepared(fp32_path: Path, path: Path) -> ModelProto:
    """ONNX Runtime's pre-processing (constants folded, shapes inferred), and `make_plain`.

    Written and returned.

    Raises:
        UsageError: the file is quantized already.
    """
    # Symbolic shapes are for sequence models; plain inference knows every shape of a classifier.
    quant_pre_process(str(fp32_path), str(path), skip_symbolic_shape=True)
    model = onnx.load(str(path))
    if any(node.op_type in ("QuantizeLinear", "QLinearConv") for node in model.graph.node):
        raise UsageError(f"{fp32_path.name} is quantized already.", fix="Give the FP32 file: export/student.fp32.onnx")
    make_plain(model)
    onnx.save(model, str(path))
    return model


def _input_shape(model: ModelProto) -> tuple[int | str, ...]:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return tuple(d.dim_value or d.dim_param for d in dims)


def _require_quantizable(model: ModelProto, target: Target, fp32_path: Path) -> None:
    eligible, excluded = eligible_products(model, target)
    if not eligible:
        raise UsageError(
            f"{fp32_path.name} has nothing that runs in INT8 on target '{target.name}'.",
            why="; ".join(f"{name}: {reason}" for name, reason in excluded)
            or "It has no convolution and no matrix product.",
            fix="Ship the FP32 or FP16 file for this target.",
        )
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    if any(kinds.get(node.input[1]) not in (None, TensorProto.FLOAT) for node in eligible):
        raise UsageError(f"{fp32_path.name} is not in FP32.", fix="Give the FP32 file: export/student.fp32.onnx")


def _write(model: ModelProto, path: Path, source: ModelProto, metadata: Mapping[str, str]) -> None:
    copy = ModelProto()
    copy.CopyFrom(model)
    strip(copy, metadata={**metadata_of(source), **{k: v for k, v in metadata.items() if v}})
    write_onnx(copy, path)


def _images_record(images: np.ndarray, provenance: str) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    return {"n": len(images), "sha256": digest, "provenance": provenance}


__all__: Sequence[str] = ["Coverage", "Int8Result", "int8_coverage", "to_int8"]
