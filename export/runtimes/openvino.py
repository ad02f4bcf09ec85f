"""OpenVINO on the processor. It reads our ONNX files as they are; the quantized one is the Q/DQ graph of its target."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from onnx import ModelProto

from nayer_edge.errors import IntegrityError, UsageError, missing_extra
from nayer_edge.runtime.provenance import usable_cores

from ..onnx_file import read_onnx
from ..runners import BATCH, as_bytes, in_batches

MULTIPLIES = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell", "RNNSeq")
"""layer types of the compiled model that multiply and accumulate"""
BYTES = ("u8", "i8")
DEVICE = "CPU"


def import_openvino() -> Any:
    """The package `openvino`.

    Raises:
        MissingError: it is not installed.
    """
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise missing_extra("openvino", "openvino", "Target 'openvino'") from error


def require() -> str:
    """The version of OpenVINO, without its build number.

    Raises:
        MissingError: it is not installed.
    """
    return str(import_openvino().__version__).partition("-")[0]


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
        core = vino.Core()
        # Processors with bf16 instructions would otherwise compute an FP32 graph in bf16.
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            self._compiled = core.compile_model(core.read_model(str(self.path)), DEVICE, options)
        except Exception as error:
            raise _refusal(self.path, graph, f"{error}", require()) from error
        self._request = self._compiled.create_infer_request()
        self._bytes = self._compiled.input(0).get_element_type() == vino.Type.u8
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request = self._compiled = None

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes), float32."""
        return in_batches(self._run, images, self._batch)

    def _run(self, images: np.ndarray) -> np.ndarray:
        if self._compiled is None:
            raise RuntimeError("OpenVinoRunner is a context manager: use it in a with statement")
        pixels = as_bytes(images) if self._bytes else images.astype(np.float32, copy=False)
        try:
            # The result lies in the request's memory, which the next call overwrites.
            return np.array(self._request.infer([pixels], share_inputs=True)[0])
        except Exception as error:
            raise UsageError(
                f"{self.path.name} does not run in OpenVINO on images of shape {images.shape[1:]}.",
                why=_last_line(f"{error}"),
                fix="Compare this shape with the model's input specification.",
            ) from error

    def precisions(self) -> dict[str, str]:
        """Layer of the ONNX file → type in which OpenVINO multiplies it ("u8", "i8", "f32", …), by its compiled model.

        A layer that was fused with others has the type of the whole.
        """
        found = {}
        for layer in self._compiled.get_runtime_model().get_ops():
            facts = layer.get_rt_info()
            if facts["layerType"].astype(str) in MULTIPLIES:
                for name in facts["originalLayersNames"].astype(str).split(","):
                    found[name] = facts["runtimePrecision"].astype(str)
        return found

    def interface(self) -> dict[str, Any]:
        """Name, type and shape of the input and the output; -1 is a dimension of any size."""
        ends = {"input": self._compiled.input(0), "output": self._compiled.output(0)}
        return {
            end: {
                "name": port.get_any_name(),
                "type": port.get_element_type().to_dtype().name,
                "shape": [dim.get_length() if dim.is_static else -1 for dim in port.get_partial_shape()],
            }
            for end, port in ends.items()
        }


def open_runner(path: Path, *, threads: int | None = None) -> OpenVinoRunner:
    """A runner, not yet entered."""
    return OpenVinoRunner(path, threads=threads)


def describe(path: Path) -> dict[str, Any]:
    """What OpenVINO makes of an ONNX file: its interface, and the layers that it multiplies in INT8 and in float.

    Raises:
        MissingError: OpenVINO is not installed.
        UsageError: it lacks an operator of the file.
        IntegrityError: the file is damaged.
    """
    names = {name: node.name for node in read_onnx(path).graph.node for name in (*node.output, node.name)}
    with OpenVinoRunner(path, threads=1) as runner:
        layers = {names[name]: kind for name, kind in runner.precisions().items() if name in names}
        interface = runner.interface()
    return {
        **interface,
        "batch": "any" if interface["input"]["shape"][0] == -1 else interface["input"]["shape"][0],
        "int8": sorted(name for name, kind in layers.items() if kind in BYTES),
        "float": sorted(name for name, kind in layers.items() if kind not in BYTES),
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


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.strip().splitlines()) if line.strip()), "")
