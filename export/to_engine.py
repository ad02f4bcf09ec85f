"""TensorRT engines from ONNX: one code path for `tensorrt` (10.12 and newer, 11.x) and `tensorrt_rtx`.

The two share an API. Networks are strongly typed: every layer runs in the type given in the graph, and no builder flag
can silently change it. TensorRT-RTX builds ahead of time for a named compute capability, without a GPU; TensorRT builds
on the GPU that the engine is for.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto, TensorProto

from nayer_edge.errors import MissingError, UsageError, nearest
from nayer_edge.storage.files import sha256_of, write_bytes

from .engine_inspector import confirms, layers_of
from .onnx_file import read_onnx
from .plain_graph import constants
from .runners import import_tensorrt
from .targets import Target, get_target


@dataclass(frozen=True)
class EngineInfo:
    """Description of a built engine.

    Attributes:
        path: the engine file.
        runtime: "tensorrt" or "tensorrt_rtx".
        version: of that package; TensorRT loads an engine only with the same version.
        compute_capability: "sm89", …: the GPUs that it runs on.
        batch: (smallest, best, largest) batch of the optimisation profile.
        network_types: type of layer outputs in the parsed, strongly typed network → number of layers.
        layers: type that the layers of the engine compute in → number of layers; empty without a GPU to load it.
        precision_verified: some of `layers`, which were read from the engine itself, compute in the graph's precision.
        notes: for the user.
        seconds: build time.
        size_bytes: of the file.
        sha256: of the file.
    """

    path: Path
    runtime: str
    version: str
    compute_capability: str
    batch: tuple[int, int, int]
    network_types: Mapping[str, int]
    layers: Mapping[str, int]
    precision_verified: bool
    notes: tuple[str, ...]
    seconds: float
    size_bytes: int
    sha256: str


def compute_capabilities(target: str | Target) -> tuple[str, ...]:
    """GPUs that this target can be built for without having one ("sm75", …); none for TensorRT.

    Raises:
        MissingError: the package is not installed.
    """
    target = get_target(target) if isinstance(target, str) else target
    if target.runtime != "tensorrt_rtx":
        return ()
    members = import_tensorrt(target.runtime).ComputeCapability.__members__
    return tuple(sorted((name.lower() for name in members if name.startswith("SM")), key=lambda n: int(n[2:])))


@dataclass
class _Log:
    """Collects the builder's messages instead of printing them."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def logger(self, trt: Any) -> Any:
        log = self

        class Logger(trt.ILogger):
            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    log.errors.append(message)
                elif severity == trt.ILogger.WARNING:
                    log.warnings.append(message)

        return Logger()


def to_engine(
    onnx_path: Path,
    path: Path,
    target: str | Target,
    *,
    compute_capability: str | None = None,
    batch: tuple[int, int, int] = (1, 1, 64),
    workspace_bytes: int = 2**30,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
) -> EngineInfo:
    """Builds an engine.

    Args:
        onnx_path: FP32, FP16 or symmetric INT8 Q/DQ; the engine computes in its types.
        path: the engine file to write.
        target: "tensorrt" or "tensorrt-rtx".
        compute_capability: for TensorRT-RTX: "sm89", …; the GPU of this machine by default.
        batch: (smallest, best, largest) batch size of the optimisation profile.
        workspace_bytes: GPU memory that a layer may use while it runs.
        timing_cache: file with measured kernel timings, read if it exists and written back (TensorRT only).
        version_compatible: the engine also loads in later versions (TensorRT only).
        hardware_compatible: the engine also runs on other GPUs from Ampere on (TensorRT only).

    Raises:
        MissingError: the package is not installed, or the target needs a GPU and there is none.
        UsageError: TensorRT rejects the graph (the message says why), or an argument is wrong.
        IntegrityError: the ONNX file is damaged.
    """
    target = get_target(target) if isinstance(target, str) else target
    if not target.engine:
        raise UsageError(f"Target '{target.name}' runs ONNX files and needs no engine.")
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise UsageError(f"The batch sizes {batch} are not a valid profile.", fix="Use 1 ≤ smallest ≤ best ≤ largest.")
    trt = import_tensorrt(target.runtime)
    rtx = target.runtime == "tensorrt_rtx"
    capability, notes = _capability(trt, rtx, compute_capability), []
    model = read_onnx(onnx_path)
    log = _Log()
    logger = log.logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise MissingError("The TensorRT builder does not start.", why="; ".join(log.errors))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        raise _refusal(onnx_path, target, [parser.get_error(i) for i in range(parser.num_errors)], log)
    _refuse_unsigned(model, onnx_path, target)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if rtx:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[capability.upper()], 0)
        if timing_cache or version_compatible or hardware_compatible:
            notes.append(
                "TensorRT-RTX compiles kernels on the device, so timing cache, version and hardware compatibility do "
                "not apply and were ignored."
            )
    else:
        if version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if timing_cache:
            known = timing_cache.read_bytes() if timing_cache.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(known), False)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        source = network.get_input(index)
        image = tuple(source.shape)[1:]
        profile.set_shape(source.name, *((n, *image) for n in batch))
    config.add_optimization_profile(profile)
    start = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if serialized is None:
        raise _refusal(onnx_path, target, [], log)
    write_bytes(path, bytes(serialized))
    if timing_cache and not rtx:
        write_bytes(timing_cache, bytes(config.get_timing_cache().serialize()))
    layers, types = _inspected(trt, logger, path), _network_types(trt, network)
    quantized = any(n.op_type == "QuantizeLinear" for n in model.graph.node)
    precision = "int8" if quantized else "fp16" if "half" in types else "fp32"
    if rtx and quantized:
        notes.append(
            "TensorRT-RTX documents INT8 only for the weights of matrix products: a successful build does not show "
            "that convolutions run in INT8."
        )
    if not layers:
        notes.append("The precision of the layers is not verified: there is no GPU here to load the engine.")
    elif not confirms(layers, precision):
        notes.append(f"No layer computes in {precision}: {', '.join(layers)}.")
    return EngineInfo(
        path=path,
        runtime=target.runtime,
        version=str(trt.__version__),
        compute_capability=capability,
        batch=batch,
        network_types=types,
        layers=layers,
        precision_verified=confirms(layers, precision),
        notes=tuple(notes),
        seconds=seconds,
        size_bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )


def require_capability(target: str, wanted: str | None) -> None:
    """Raises UsageError for a compute capability that the target cannot be built for; nothing if its package is not
    installed, or if it needs a GPU and there is none."""
    runtime = get_target(target).runtime
    rtx = runtime == "tensorrt_rtx"
    with contextlib.suppress(MissingError):
        _capability(import_tensorrt(runtime), rtx, wanted if rtx else None)


def _capability(trt: Any, rtx: bool, wanted: str | None) -> str:
    gpu = torch.cuda.is_available()
    here = "sm{}{}".format(*torch.cuda.get_device_capability()) if gpu else None
    if not rtx:
        if here is None:
            raise MissingError(
                "TensorRT builds an engine on the GPU that it is for, and there is none here.",
                fix="Run this command on the device, or write only its ONNX file with --no-engine.",
            )
        if wanted and wanted.lower() != here:
            raise UsageError(f"TensorRT builds for the GPU of this machine, {here}, not for {wanted}.")
        return here
    known = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    chosen = (wanted or here or "").lower()
    if not chosen:
        raise UsageError(
            "TensorRT-RTX needs to know which GPU to build for.",
            why="This machine has no GPU to take as the default.",
            fix=f"Pass a compute capability: {', '.join(known)}.",
        )
    if chosen not in known:
        raise UsageError(
            f"TensorRT-RTX {trt.__version__} does not build for '{chosen}'.{nearest(chosen, known)}",
            why=f"It builds for {', '.join(known)}.",
        )
    return chosen


def _refuse_unsigned(model: ModelProto, onnx_path: Path, target: Target) -> None:
    # The parser only warns, and reads UINT8 as INT8: with zero points of 0, values above 127 would be clipped.
    known = constants(model)
    for node in model.graph.node:
        quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2
        if quantizes and known[node.input[2]].data_type == TensorProto.UINT8:
            raise UsageError(
                f"{target.name} rejects {onnx_path.name}: '{node.name}' is quantized to UINT8.",
                why="TensorRT would read these bytes as signed and silently compute wrong results.",
                fix=f"Quantize for this target: nayer-edge export RUN --int8 --target {target.name}",
            )


# (message of the parser or builder, what it means, what to do); the first match counts.
_OTHER_FILE = "Use the file made for it: nayer-edge export RUN --int8 --target {target}"
_FP16_FILE = "Build from the FP16 file instead: nayer-edge export RUN --fp16 --target {target}"
_EXPLANATIONS = (
    (
        r"DequantizeLinear.*has type Int32",
        "'{node}' is a bias quantized to INT32, which TensorRT does not support",
        _OTHER_FILE,
    ),
    (
        r"shiftIsAllZeros|[Zz]ero.?point.*(?:zero|0)|non-zero",
        "'{node}' has a zero point other than 0, but TensorRT supports only symmetric quantization",
        _OTHER_FILE,
    ),
    (r"(FP32 \w+) is not supported", "the requested GPU has no {group} kernels", _FP16_FILE),
    (
        r"[Nn]o importer registered|[Uu]nsupported operator|[Pp]lugin not found",
        "it does not support the operator {operator} (node '{node}')",
        "Replace that layer with standard operators.",
    ),
    (r"[Cc]ould not find any implementation for node (\S+)", "it has no kernel for {group}", _FP16_FILE),
)


def _refusal(onnx_path: Path, target: Target, errors: list[Any], log: _Log) -> UsageError:
    text = "\n".join([*(str(e.desc()) for e in errors), *log.errors])
    node = errors[0].node_name() if errors else ""
    operator = errors[0].node_operator() if errors else ""
    meaning, fix = f"node '{node}' ({operator}) is not accepted" if node else "the build failed", _OTHER_FILE
    for pattern, explanation, remedy in _EXPLANATIONS:
        if match := re.search(pattern, text, re.DOTALL):
            group = match.group(1) if match.groups() else ""
            meaning, fix = explanation.format(node=node, operator=operator, group=group), remedy
            break
    says = next((line.strip() for line in text.splitlines() if "rror" in line), text.strip()[:300])
    return UsageError(
        f"{target.name} rejects {onnx_path.name}: {meaning}.",
        why=f"Its message: {says}" if says else "",
        fix=fix.format(target=target.name),
    )


def _network_types(trt: Any, network: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs and layer.type != trt.LayerType.CONSTANT:
            found[str(layer.get_output(0).dtype).rsplit(".", 1)[-1].lower()] += 1
    return dict(sorted(found.items()))


def _inspected(trt: Any, logger: Any, path: Path) -> dict[str, int]:
    """Type → number of layers, from the engine inspector; empty if this machine cannot load the engine."""
    if not torch.cuda.is_available():
        return {}
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    return {} if engine is None else layers_of(trt, engine)
