"""Runs an artifact on images: torch, ONNX Runtime with a named provider, TensorRT."""

from __future__ import annotations

import contextlib
import importlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import ModelProto
from torch import nn

from nayer_edge.errors import IntegrityError, MissingError, UsageError, missing_extra
from nayer_edge.runtime.provenance import usable_cores

from .engine_inspector import layers_of
from .onnx_file import read_onnx
from .targets import Target

BATCH = 256
_QUIET = 3  # ONNX Runtime's severity "error"


class Runner(Protocol):
    """A context manager with one `infer`.

    Attributes:
        name: the runtime ("torch", "onnxruntime", "tensorrt", …).
        provider: the requested device or execution provider. The runner checks that it is the one in use.
        threads: number of processor threads.
    """

    name: str
    provider: str
    threads: int

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes), float32, of float32 images (n, C, H, W) in [0, 1]; any n ≥ 1."""
        ...


def wrong_shape(path: Path, images: np.ndarray, why: str) -> UsageError:
    """The error for images that a file does not accept."""
    return UsageError(
        f"{path.name} does not run on images of shape {images.shape[1:]}.",
        why=why,
        fix="Compare this shape with the model's input specification.",
    )


def in_batches(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch: int) -> np.ndarray:
    """Logits (n, classes), float32, of images (n, C, H, W), passed to `run` in batches.

    Raises:
        UsageError: the array does not hold images, or is empty.
    """
    if images.ndim != 4 or len(images) == 0:
        raise UsageError(
            f"Images of shape {images.shape} cannot be run.",
            fix="Pass an array of shape (n, channels, height, width) with n of at least 1.",
        )
    parts = [run(np.ascontiguousarray(images[start : start + batch])) for start in range(0, len(images), batch)]
    return np.concatenate(parts).astype(np.float32, copy=False)


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as uint8 pixels."""
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


class TorchRunner:
    """A torch module in evaluation mode. Its training flags and torch's thread count are restored on exit.

    Args:
        model: images (batch, C, H, W) → logits.
        device: "cpu", "cuda", …; the device that the model is on.
        threads: processor threads; torch's setting by default.
        batch: images per pass.
    """

    name = "torch"

    def __init__(
        self, model: nn.Module, *, device: str = "cpu", threads: int | None = None, batch: int = BATCH
    ) -> None:
        self.provider = device
        self.threads = threads or torch.get_num_threads()
        self._model, self._batch = model, batch
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Self:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self._restore.callback(torch.set_num_threads, before)
        for module in self._model.modules():
            self._restore.callback(setattr, module, "training", module.training)
        self._model.eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore.close()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes), float32."""
        return in_batches(self._run, images, self._batch)

    def _run(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = self._model(torch.from_numpy(images.astype(np.float32, copy=False)).to(self.provider))
            return logits.float().cpu().numpy()


_INSTALL = {
    "CUDAExecutionProvider": "In an environment of its own, type: pip install '.[gpu]'",
    "TensorrtExecutionProvider": "In an environment of its own, type: pip install '.[gpu]'",
    "OpenVINOExecutionProvider": "In an environment of its own, type: pip install onnxruntime-openvino",
}


class OrtRunner:
    """An ONNX file in ONNX Runtime, with the requested provider and no other.

    Args:
        path: the file; if its input is uint8, images are converted.
        provider: execution provider. It is an error if ONNX Runtime silently replaces it.
        threads: intra-operator threads; by default all that the process may use.
        batch: images per pass.
        target: sets the session options that emulate this target's device.
        as_written: computes Q/DQ pairs in float instead of fusing them into INT8 kernels.

    Raises:
        IntegrityError: the file is not ONNX, is truncated, does not load, or reads outside its folder.
        MissingError: the provider is not installed, or did not start.
    """

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        *,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
        batch: int = BATCH,
        target: Target | None = None,
        as_written: bool = False,
    ) -> None:
        self.path, self.provider, self.threads = path, provider, threads or usable_cores()
        self._batch, self._target, self.as_written = batch, target, as_written
        self._session: ort.InferenceSession | None = None

    def __enter__(self) -> Self:
        read_onnx(self.path)
        self._session = self._open(self._options())
        source = self._session.get_inputs()[0]
        self._input, self._bytes = source.name, source.type == "tensor(uint8)"
        # A graph with a fixed batch size gets exactly that many images.
        self._fixed = source.shape[0] if isinstance(source.shape[0], int) else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes), float32."""
        return in_batches(self._run, images, self._fixed or self._batch)

    def _run(self, images: np.ndarray) -> np.ndarray:
        if self._session is None:
            raise RuntimeError("OrtRunner is a context manager: use it in a with statement")
        n = len(images)
        if self._fixed and n < self._fixed:
            images = np.concatenate([images, np.repeat(images[-1:], self._fixed - n, axis=0)])
        pixels = as_bytes(images) if self._bytes else images.astype(np.float32, copy=False)
        try:
            return np.asarray(self._session.run(None, {self._input: pixels})[0])[:n]
        except Exception as error:
            why = str(error).strip().splitlines()[0]
            if "invalid dimensions" in why or "Invalid rank" in why:
                raise wrong_shape(self.path, images, why) from error
            raise UsageError(
                f"ONNX Runtime loads {self.path.name} but cannot run it.",
                why=why,
                fix="Try another version of onnxruntime, and please report the line above with the model's name.",
            ) from error

    def optimised_graph(self) -> ModelProto:
        """The graph that ONNX Runtime executes on this provider, after all fusions."""
        with tempfile.TemporaryDirectory(prefix="nayer-edge-") as folder:
            options = self._options()
            options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
            self._open(options)
            return onnx.load(options.optimized_model_filepath)

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _QUIET
        # Idle threads of one session must not slow down another that is being timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.as_written:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        for key, value in self._target.session_options if self._target else ():
            options.add_session_config_entry(key, value)
        return options

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        available = ort.get_available_providers()
        if self.provider not in available:
            raise MissingError(
                f"ONNX Runtime here has no {self.provider}.",
                why=f"It has {', '.join(available)}.",
                fix=_INSTALL.get(self.provider, "Install the ONNX Runtime package that has this provider."),
            )
        try:
            session = ort.InferenceSession(str(self.path), options, providers=[self.provider])
        except Exception as error:
            raise IntegrityError(
                f"ONNX Runtime does not load {self.path}.",
                why=str(error).strip().splitlines()[0],
                fix="Export it again with: nayer-edge export RUN",
            ) from error
        session.disable_fallback()
        if session.get_providers()[0] != self.provider:
            raise MissingError(
                f"ONNX Runtime runs {self.path.name} with {session.get_providers()[0]} instead of {self.provider}.",
                why="The provider is installed but did not start: its libraries or its device are missing.",
                fix="Type: nayer-edge doctor",
            )
        return session


class TensorRtRunner:
    """A serialized engine on a GPU, through TensorRT or TensorRT-RTX (the same API).

    Args:
        path: the engine.
        flavour: "tensorrt" or "tensorrt_rtx".

    Raises:
        MissingError: the package is not installed, or there is no GPU.
        IntegrityError: this runtime does not load the engine.
    """

    threads = 1

    def __init__(self, path: Path, *, flavour: str = "tensorrt") -> None:
        self.path, self.name, self.provider = path, flavour, "cuda"

    def __enter__(self) -> Self:
        trt = import_tensorrt(self.name)
        if not torch.cuda.is_available():
            raise MissingError(
                f"{self.path.name} needs a GPU to run.",
                why="torch sees no CUDA device.",
                fix="Run this command on the device that the engine was built for.",
            )
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(self.path.read_bytes())
        if engine is None:
            raise IntegrityError(
                f"{self.name} {trt.__version__} does not load {self.path}.",
                why="An engine runs only with the TensorRT version and kind of GPU that it was built for.",
                fix="Build the engines of the run again here: nayer-edge export RUN --int8 --no-engine, then "
                "nayer-edge export RUN --int8 --engine",
            )
        self._engine: Any = engine
        self._context: Any = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._input, self._output = inputs[0], next(n for n in names if n not in inputs)
        self._bytes = engine.get_tensor_dtype(self._input) == trt.uint8
        self._largest = int(engine.get_tensor_profile_shape(self._input, 0)[2][0])
        self._stream = torch.cuda.Stream()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context = self._engine = None

    def layers(self) -> dict[str, int]:
        """Type in which they compute → number of layers, from the engine's inspector."""
        return layers_of(import_tensorrt(self.name), self._engine)

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes), float32."""
        return in_batches(self._run, images, self._largest)

    def _run(self, images: np.ndarray) -> np.ndarray:
        pixels = as_bytes(images) if self._bytes else images.astype(np.float32, copy=False)
        source = torch.from_numpy(pixels).cuda()
        if not self._context.set_input_shape(self._input, tuple(source.shape)):
            raise UsageError(f"{self.path.name} takes no images of shape {tuple(source.shape)}.")
        logits = torch.empty(tuple(self._context.get_tensor_shape(self._output)), device="cuda")
        self._context.set_tensor_address(self._input, source.data_ptr())
        self._context.set_tensor_address(self._output, logits.data_ptr())
        self._stream.wait_stream(torch.cuda.current_stream())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise IntegrityError(f"{self.path.name} failed with an error.", fix="Rebuild the engine.")
        self._stream.synchronize()
        return logits.cpu().numpy()


_EXTRA = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}
_OLDEST = (10, 12)


def import_tensorrt(runtime: str) -> Any:
    """The Python module "tensorrt" or "tensorrt_rtx".

    Raises:
        MissingError: it is not installed, or too old for strongly typed networks with explicit Q/DQ.
    """
    try:
        trt = importlib.import_module(runtime)
    except ImportError as error:
        raise missing_extra(runtime, _EXTRA[runtime], "Building and running engines") from error
    numbers = re.findall(r"\d+", str(getattr(trt, "__version__", "")))[:2]
    if runtime == "tensorrt" and tuple(map(int, numbers)) < _OLDEST:
        raise MissingError(
            f"TensorRT {trt.__version__} is too old.",
            why="Strongly typed networks with explicit Q/DQ need 10.12 or newer.",
            fix="Type: pip install --upgrade tensorrt",
        )
    return trt
