"""OpenVINO on the processor. It reads our ONNX files as they are; the quantized one is the Q/DQ graph of its target."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from onnx import ModelProto

from nayer_edge.errors import IntegrityError, UsageError, missing_extra
from nayer_edge.runtime.provenance import usable_cores

from ..eligible import eligible_nodes, excluded_nodes
from ..onnx_file import read_onnx
from ..runners import BATCH, as_bytes, in_batches, wrong_shape
from ..targets import get_target

QUANTIZABLE_KINDS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell", "RNNSeq")
"""layer types of the compiled model that multiply and accumulate"""
BYTES = ("u8", "i8")
DEVICE = "CPU"
TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """The package `openvino`, without its telemetry, which reports every import and needs a home directory.

    Raises:
        MissingError: it is not installed.
    """
    modules: dict[str, Any] = sys.modules
    hide = TELEMETRY not in modules
    if hide:
        # OpenVINO goes on without the package that sends the reports.
        modules[TELEMETRY] = None
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise missing_extra("openvino", "openvino", "Target 'openvino'") from error
    finally:
        if hide:
            del modules[TELEMETRY]


class OpenVinoRunner:
    """An ONNX file in OpenVINO's CPU plugin. The batch is dynamic, and everything in float is computed in FP32.

    Args:
        path: the file.
        threads: by default all that the process may use.
        batch: images per pass.

    Raises:
        MissingError: OpenVINO is not installed.
        UsageError: it lacks an operator of the file.
        IntegrityError: the file is not ONNX, is truncated, or does not load.
    """

    name = "openvino"
    provider = DEVICE

    def __init__(self, path: Path, *, threads: int | None = None, batch: int = BATCH) -> None:
        self.path, self.threads, self._batch = path, threads or usable_cores(), batch
        self._compiled: Any = None

    def __enter__(self) -> Self:
        graph, vino = read_onnx(self.path), import_openvino()
        try:
            self._compile(vino)
        except Exception as error:
            raise _refusal(self.path, graph, f"{error}", _version(vino)) from error
        return self

    def _compile(self, vino: Any) -> None:
        core = vino.Core()
        # Processors with bf16 instructions would otherwise compute an FP32 graph in bf16.
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._compiled = core.compile_model(core.read_model(str(self.path)), DEVICE, options)
        self._request = self._compiled.create_infer_request()
        self._bytes = self._compiled.input(0).get_element_type() == vino.Type.u8

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request = self._compiled = None

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes), float32."""
        return in_batches(self._run, images, self._batch)

    def _run(self, images: np.ndarray) -> np.ndarray:
        if self._request is None:
            raise RuntimeError("OpenVinoRunner is a context manager: use it in a with statement")
        pixels = as_bytes(images) if self._bytes else images.astype(np.float32, copy=False)
        try:
            # The result lies in the request's memory, which the next call overwrites.
            return np.array(self._request.infer([pixels], share_inputs=True)[0])
        except Exception as error:
            raise wrong_shape(self.path, images, _last_line(f"{error}")) from error

    def operators(self) -> list[tuple[str, list[str], str]]:
        """(kind, names in the ONNX file of what was fused into it, type in which it computes: "u8", "i8", "f32", …) for
        every operator of the compiled model."""
        found = []
        for operator in self._compiled.get_runtime_model().get_ops():
            facts = operator.get_rt_info()
            kind, names, computes = (
                facts[key].astype(str) for key in ("layerType", "originalLayersNames", "runtimePrecision")
            )
            if kind not in ("Const", "Input", "Output"):
                found.append((kind, names.split(","), computes))
        return found

    def ends(self) -> dict[str, list[dict[str, Any]]]:
        """Name, type and shape of inputs and outputs; -1 is a dimension of any size."""
        return {
            key: [
                {
                    "name": port.get_any_name(),
                    "dtype": port.get_element_type().to_dtype().name,
                    "shape": [dim.get_length() if dim.is_static else -1 for dim in port.get_partial_shape()],
                    "scale": None,
                    "zero_point": None,
                }
                for port in ports
            ]
            for key, ports in (("inputs", self._compiled.inputs), ("outputs", self._compiled.outputs))
        }


def describe(path: Path) -> dict[str, Any]:
    """What OpenVINO makes of an ONNX file: `describe` in runtimes/__init__.py lists the keys.

    A layer of the file counts as INT8 where the operator that it became part of multiplies bytes.

    Raises:
        MissingError: OpenVINO is not installed.
        UsageError: it lacks an operator of the file.
        IntegrityError: the file is damaged.
    """
    model = read_onnx(path)
    names = {name: node.name for node in model.graph.node for name in (*node.output, node.name)}
    with OpenVinoRunner(path, threads=1) as runner:
        operators, ends = runner.operators(), runner.ends()
    by_type: dict[str, dict[str, dict[str, Any]]] = {"int8": {}, "float": {}}
    running = set()
    for kind, fused, computes in operators:
        layers = sorted({names[name] for name in fused if name in names})
        where = by_type["int8" if computes in BYTES else "float"].setdefault(kind, {"count": 0, "layers": []})
        where["count"] += 1
        where["layers"] += layers
        if kind in QUANTIZABLE_KINDS and computes in BYTES:
            running.update(layers)
    eligible, ineligible = eligible_nodes(model, get_target("openvino"))
    excluded = excluded_nodes(model)
    not_int8 = [
        [node.name, excluded.get(node.name, "OpenVINO computes it in float")]
        for node in eligible
        if node.name not in running
    ]
    int8 = len(eligible) - len(not_int8)
    return {
        "runtime": "openvino",
        "batch": "any" if ends["inputs"][0]["shape"][0] == -1 else ends["inputs"][0]["shape"][0],
        **ends,
        **by_type,
        "coverage": {
            "eligible": len(eligible),
            "int8": int8,
            "fraction": int8 / len(eligible) if eligible else 0.0,
            "not_int8": not_int8,
            "excluded": [list(entry) for entry in ineligible],
        },
    }


def _refusal(path: Path, graph: ModelProto, message: str, version: str) -> UsageError | IntegrityError:
    """The error for a file that OpenVINO does not load; it names operators that it lacks, with their layers."""
    unknown = re.search(r"No conversion rule found for operations: (.+)", message)
    if unknown:
        lacking = {re.sub(r"-\d+$", "", each.strip()).rpartition(".")[2] for each in unknown[1].split(",")}
        nodes = [node for node in graph.graph.node if node.op_type in lacking]
        layers = ", ".join(f"{node.op_type} (layer '{node.name or node.output[0]}')" for node in nodes[:5])
        return UsageError(
            f"OpenVINO {version} lacks an operator of {path.name}: {layers or unknown[1]}.",
            fix="Replace that layer with standard operators, or leave out the target 'openvino'.",
        )
    return IntegrityError(
        f"OpenVINO {version} does not load {path}.",
        why=_last_line(message),
        fix="Export it again with: nayer-edge export RUN --int8 --target openvino",
    )


def _version(vino: Any) -> str:
    return str(vino.__version__).partition("-")[0]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.strip().splitlines()) if line.strip()), "")
