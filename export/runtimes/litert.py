"""LiteRT files (.tflite): build, run, describe.

Conversion is `litert_torch.convert`, which moves convolutions to channels-last itself; images stay (1, C, H, W).
INT8 is ai-edge-quantizer's static recipe (8-bit weights per channel, 8-bit activations). Input and output stay float32,
and so does the normalisation before the first convolution, so that pixels are rounded once. The batch is fixed to 1:
the converter cannot lower a dynamic one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from nayer_edge.errors import NayerEdgeError, UsageError, first_line
from nayer_edge.runtime.provenance import usable_cores
from nayer_edge.storage.files import sha256_of, write_atomic

from ..runners import in_batches, wrong_shape
from ..trace import copy_for_export
from .edge_file import (
    INPUT,
    OUTPUT,
    BuiltFile,
    Precision,
    by_kind,
    check_request,
    does_not_load,
    does_not_run,
    is_within,
    not_importable,
    provenance,
    provenance_in,
    quiet,
    read_whole,
    versions_of,
    why_in_float,
)

RUNTIME = "ai-edge-litert"
_NARROWEST = 1e-3
"""narrowest range of an activation; a convolution's result of 1e-4 still loaded, one of 1e-6 did not"""
BACKEND = "XNNPACK"
_SIGNATURE = "serving_default"
_PACKAGES = ("ai-edge-litert", "litert-torch", "ai-edge-quantizer", "torch")
_HARMLESS = re.compile(r"^(INFO|VERBOSE): |^[IW]\d{4} |absl::InitializeLog")
_QUANTIZABLE_KINDS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL")
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
_METHODS = {
    "int8": "ai-edge-quantizer, static_wi8_ai8, minimum and maximum",
    "fp16": "ai-edge-quantizer, float_casting of weights to 16 bits",
}


class _Named(nn.Module):
    """Gives the file's signature the names of input and output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {OUTPUT: self.network(images)}


def build(
    network: nn.Module,
    shape: tuple[int, int, int],
    path: Path,
    *,
    precision: Precision,
    calibration: np.ndarray | None = None,
    float_layers: Collection[str] = (),
) -> BuiltFile:
    """Builds a .tflite file: float32 images (1, C, H, W) in [0, 1] → float32 logits (1, classes).

    Args:
        network: images (batch, C, H, W) → logits (batch, classes); includes normalisation. It is not changed.
        shape: (C, H, W).
        path: the file to write.
        precision: "fp32", "fp16" (weights only; the device decides how to compute) or "int8".
        calibration: images (n, C, H, W), float32 in [0, 1], for INT8.
        float_layers: names of modules (as in `network.named_modules()`) that stay in float.

    Raises:
        UsageError: wrong arguments, or an operator that the converter does not have (named, with its layer).
        MissingError: litert-torch, ai-edge-quantizer or ai-edge-litert is not installed.
    """
    check_request(network, shape, precision, calibration, float_layers, ("fp32", "fp16", "int8"))
    named = _Named(copy_for_export(network, shape)).eval()
    with quiet():
        content = _converted(named, shape)
        content, layers = _named_after_layers(content, named)
        before = _before_first_quantizable(layers)
        if precision != "fp32":
            _require_quantizer()
        if precision == "int8":
            assert calibration is not None  # check_request
            kept = [name for name, _, layer in layers if is_within(layer, float_layers)]
            content = _quantized(content, calibration, [*before, *kept])
        elif precision == "fp16":
            content = _in_fp16(content, before)
        versions = versions_of(_PACKAGES)
        facts = {
            "precision": precision,
            "layers": {name: layer for name, _, layer in layers},
            "float_layers": sorted(float_layers),
        }
        content = _with_metadata(content, provenance(RUNTIME, versions, facts))
    write_atomic(path, lambda temporary: temporary.write_bytes(content))
    found = describe(path)
    record = {
        "runtime": RUNTIME,
        "backend": BACKEND,
        "precision": precision,
        "quantizer": _METHODS.get(precision),
        "versions": versions,
        "calibration": {"n": len(calibration)} if precision == "int8" and calibration is not None else None,
        "batch": 1,
        "batch_reason": "litert-torch cannot lower a dynamic batch",
        "float_layers": sorted(float_layers),
        "float_layers_reach": "any module whose operators are not fused into another module's",
        "in_float": found["float"] if precision == "int8" else {},
        "in_float_reason": "normalisation: pixels are rounded once, after it" if precision == "int8" else None,
        "not_int8": found["coverage"]["not_int8"] if precision == "int8" else [],
        "delegated": found["delegated"],
        "not_delegated": found["not_delegated"],
    }
    return BuiltFile(path, record, sha256_of(path))


def _converted(network: _Named, shape: tuple[int, int, int]) -> bytes:
    with _without_progress():
        try:
            import litert_torch
        except (ImportError, OSError) as error:
            raise not_importable(error, "litert_torch", "litert", "Building .tflite files") from error
        try:
            with torch.no_grad():
                model = litert_torch.convert(network, sample_kwargs={INPUT: torch.full((1, *shape), 0.5)})
            return bytes(model.model_content())
        except Exception as error:
            raise _unsupported(error, network, shape) from error


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    """The converter prints every stage to standard output unless told not to."""
    name = "LITERT_TORCH_SHOW_PROGRESS"
    before = os.environ.get(name)
    os.environ[name] = "n"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _unsupported(error: Exception, network: _Named, shape: tuple[int, int, int]) -> NayerEdgeError:
    fix = "Replace that layer with standard operators; `nayer-edge students` lists students that can be exported."
    found = re.search(r"aten(?:::|\.)(\w+)", f"{error}")
    if not found:
        return UsageError("LiteRT's converter cannot convert the model.", why=first_line(error), fix=fix)
    name, layer = found.group(1), ""
    with contextlib.suppress(Exception):
        program = torch.export.export(network, (), {INPUT: torch.full((1, *shape), 0.5)}, strict=False)
        for node in (*program.graph.nodes, *program.run_decompositions().graph.nodes):
            if f"aten.{name}." in f"{node.target}." and (stack := node.meta.get("nn_module_stack")):
                layer = str(list(stack.values())[-1][0]).removeprefix("network").removeprefix(".")
                break
    where = f" (layer '{layer}')" if layer else ""
    what = f"LiteRT's converter does not have the operator aten::{name}{where}."
    return UsageError(what, why=first_line(error), fix=fix)


_NamedOperator = tuple[str, str, str]
"""(name of the output tensor, operator, layer)"""


def _named_after_layers(content: bytes, network: _Named) -> tuple[bytes, list[_NamedOperator]]:
    """Names input, output and every operator's result after layers; returns operators in the order of execution."""
    from ai_edge_litert.tools import flatbuffer_utils

    model: Any = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    graph, scopes = model.subgraphs[0], _scopes(network)
    quantizable = {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    }
    uses: Counter[str] = Counter()
    found: list[_NamedOperator] = []
    for operator in graph.operators:
        kind = _kind(flatbuffer_utils, model, operator)
        texts = [graph.tensors[operator.outputs[0]].name]
        if kind in _QUANTIZABLE_KINDS:
            texts.append(graph.tensors[operator.inputs[1]].name)
        layer = _layer_of(texts, scopes, quantizable if kind in _QUANTIZABLE_KINDS else ())
        name = f"{layer}.{kind}" if layer else kind
        uses[name] += 1
        name = name if uses[name] == 1 else f"{name}.{uses[name]}"
        if operator.outputs[0] == graph.outputs[0]:
            name = OUTPUT
        graph.tensors[operator.outputs[0]].name = name.encode()
        found.append((name, kind, layer))
    graph.tensors[graph.inputs[0]].name = INPUT.encode()
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model)), found


def _kind(flatbuffer_utils: Any, model: Any, operator: Any) -> str:
    code = flatbuffer_utils.get_builtin_code_from_operator_code(model.operatorCodes[operator.opcodeIndex])
    names = {value: name for name, value in vars(flatbuffer_utils.schema_fb.BuiltinOperator).items()}
    return str(names.get(code, code))


def _scopes(network: nn.Module) -> dict[str, str]:
    """The converter's name of every module ("package.Class/package.Class_attribute/…") → its name in torch."""
    found = {}
    for name, _ in network.named_modules():
        parts, walked = name.split(".") if name else [], network
        scope = f"{type(walked).__module__}.{type(walked).__qualname__}"
        for part in parts:
            walked = walked.get_submodule(part)
            scope += f"/{type(walked).__module__}.{type(walked).__qualname__}_{part}"
        found[scope] = name
    return found


def _layer_of(texts: list[bytes], scopes: Mapping[str, str], preferred: Collection[str]) -> str:
    """The layer among the modules that a fused tensor's name lists; the last one has the operator itself."""
    names = [scopes[part] for text in texts for part in re.sub(r"\d+$", "", text.decode()).split(";") if part in scopes]
    chosen = [name for name in names if name in preferred] or names
    return chosen[-1].removeprefix("network").removeprefix(".") if chosen else ""


def _before_first_quantizable(operators: Collection[_NamedOperator]) -> list[str]:
    names = []
    for name, kind, _ in operators:
        if kind in _QUANTIZABLE_KINDS:
            break
        names.append(name)
    return names


def _require_quantizer() -> None:
    """Raises MissingError where the quantizer cannot be imported."""
    try:
        importlib.import_module("ai_edge_quantizer.quantizer")
    except (ImportError, OSError) as error:
        raise not_importable(error, "ai_edge_quantizer", "litert", "INT8 and FP16 for LiteRT") from error


def _in_fp16(content: bytes, in_fp32: Collection[str]) -> bytes:
    """The file with its weights in FP16, except those of some operators."""
    from ai_edge_quantizer import qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    work = quantizer.Quantizer(content)
    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    casting = qtyping.OpQuantizationConfig(
        weight_tensor_config=weights, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
    )
    work.update_quantization_recipe(".*", qtyping.TFLOperationName.ALL_SUPPORTED, casting, AlgorithmName.FLOAT_CASTING)
    _leave_out(work, in_fp32)
    try:
        result: Any = work.quantize(enable_progress_report=False, enable_progress_bar=False)
    except Exception as error:
        raise UsageError(
            "LiteRT's quantizer cannot convert the model to FP16.",
            why=first_line(error),
            fix="Leave out FP16: nayer-edge export RUN --int8 --no-fp16",
        ) from error
    return bytes(result.quantized_model)


def _leave_out(work: Any, names: Collection[str]) -> None:
    """Tells the quantizer to leave operators as they are."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    for name in names:
        # The quantizer's scope of an operator is the name of its result and a semicolon.
        work.update_quantization_recipe(
            f"^{re.escape(name)};$", qtyping.TFLOperationName.ALL_SUPPORTED, algorithm_key=AlgorithmName.NO_QUANTIZE
        )


def _quantized(content: bytes, calibration: np.ndarray, in_float: Collection[str]) -> bytes:
    from ai_edge_quantizer import calibrator, qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.utils import qsv_utils

    operation = qtyping.TFLOperationName
    work = quantizer.Quantizer(content)
    work.add_static_config(".*", operation.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    for end in (operation.INPUT, operation.OUTPUT):
        work.update_quantization_recipe(".*", end, algorithm_key=AlgorithmName.NO_QUANTIZE)
    _leave_out(work, in_float)
    images = [{INPUT: np.ascontiguousarray(image[None], np.float32)} for image in calibration]
    # By default, ranges are a moving average over the images, which clips values and depends on their order.
    ranges = calibrator.Calibrator(content, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    try:
        ranges.calibrate({_SIGNATURE: images}, work._recipe_manager)
        found: Any = _widened(ranges.get_model_qsvs())
        result: Any = work.quantize(found, enable_progress_report=False, enable_progress_bar=False)
    except Exception as error:
        raise UsageError(
            "LiteRT's quantizer cannot quantize the model"
            + (f" with {', '.join(in_float)} in float." if in_float else "."),
            why=first_line(error),
            fix="Leave out the target litert; `nayer-edge students` lists students that can be exported.",
        ) from error
    return bytes(result.quantized_model)


def _widened(ranges: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """The ranges, none narrower than `_NARROWEST`; [−1, 1] for tensors that are 0 on every calibration image, such as a
    ReLU that never fires.

    XNNPACK refuses a product of scales that is much larger than the scale of the result. The quantizer gives a tensor
    that is always 0 a scale of 4e-12.
    """
    return {name: _widened_range(each) for name, each in ranges.items()}


def _widened_range(limits: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    low, high = limits["min"], limits["max"]
    width = float(np.max(high) - np.min(low))
    if low.size > 1 or width >= _NARROWEST:
        return dict(limits)
    if width == 0 and not low.any():
        return {"min": np.full_like(low, -1), "max": np.full_like(high, 1)}
    # The quantizer includes 0 by itself.
    return {"min": np.minimum(low, 0) - _NARROWEST / 2, "max": np.maximum(high, 0) + _NARROWEST / 2}


def _with_metadata(content: bytes, line: str) -> bytes:
    from ai_edge_litert.tools import flatbuffer_utils

    model: Any = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    schema: Any = flatbuffer_utils.schema_fb
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(line.encode(), np.uint8)
    model.buffers.append(buffer)
    entry.name, entry.buffer = b"nayer_edge", len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _open(path: Path, threads: int) -> Any:
    """An interpreter with allocated tensors.

    Raises:
        IntegrityError, MissingError: see `LiteRtRunner`.
    """
    data = read_whole(path)
    with quiet(_HARMLESS):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except (ImportError, OSError) as error:
            raise not_importable(error, "ai_edge_litert", "litert", "Running .tflite files") from error
        try:
            interpreter = Interpreter(model_content=data, num_threads=threads)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise does_not_load(path, RUNTIME, "litert", first_line(error)) from error
    return interpreter


class LiteRtRunner:
    """A .tflite file in LiteRT's interpreter, with its XNNPACK delegate.

    Args:
        path: the file; a file whose input or output is INT8 is converted with its scale and zero point.
        threads: the interpreter's threads; by default all that the process may use.

    Raises:
        IntegrityError: the file is missing, truncated, or this version of the runtime does not load it.
        MissingError: ai-edge-litert is not installed.
    """

    name = "litert"
    provider = BACKEND

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path, self.threads = path, threads or usable_cores()
        self._interpreter: Any = None

    def __enter__(self) -> Self:
        self._interpreter = _open(self.path, self.threads)
        self._input, self._output = (
            self._interpreter.get_input_details()[0],
            self._interpreter.get_output_details()[0],
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interpreter = None

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes), float32."""
        return in_batches(self._run, images, int(self._input["shape"][0]))

    def _run(self, images: np.ndarray) -> np.ndarray:
        shape = tuple(int(size) for size in self._input["shape"][1:])
        if images.shape[1:] != shape:
            raise wrong_shape(self.path, images, f"It takes images of shape {shape}.")
        pixels = images.astype(np.float32, copy=False)
        if self._input["dtype"] != np.float32:
            scale, zero = self._input["quantization"]
            limits = np.iinfo(self._input["dtype"])
            pixels = np.clip(np.rint(pixels / scale) + zero, limits.min, limits.max).astype(self._input["dtype"])
        self._interpreter.set_tensor(self._input["index"], pixels)
        try:
            self._interpreter.invoke()
        except RuntimeError as error:
            raise does_not_run(self.path, RUNTIME, error) from error
        logits = self._interpreter.get_tensor(self._output["index"])
        if self._output["dtype"] != np.float32:
            scale, zero = self._output["quantization"]
            logits = (logits.astype(np.float32) - zero) * scale
        return logits


def describe(path: Path) -> dict[str, Any]:
    """Reads a .tflite file and how this machine's interpreter runs it; see `executorch.describe` for the keys.

    Raises:
        IntegrityError: the file is damaged.
        MissingError: ai-edge-litert is not installed.
    """
    interpreter = _open(path, 1)
    origin = provenance_in(path.read_bytes())
    layers = origin.get("layers", {})
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    steps = interpreter._get_ops_details()
    operators = [step for step in steps if step["op_name"] != "DELEGATE"]
    delegated = _delegated(steps)
    rows: list[tuple[str, str, bool]] = []
    conversions, inside, outside = [], Counter(), Counter()
    for step in operators:
        kind, result = step["op_name"], tensors[step["outputs"][0]]
        (inside if step["index"] in delegated else outside)[kind] += 1
        if kind in _CONVERSIONS:
            scaled = result if kind == "QUANTIZE" else tensors[step["inputs"][0]]
            scale, zero = scaled["quantization"]
            conversions.append(
                {
                    "to": "int8" if kind == "QUANTIZE" else "float32",
                    "scale": float(scale),
                    "zero_point": int(zero),
                }
            )
            continue
        # Not the first input: that of TRANSPOSE_CONV is a shape, that of SPLIT an axis.
        floats = [source for source in step["inputs"] if source >= 0 and tensors[source]["dtype"] == np.float32]
        int8 = result["dtype"] == np.int8 and not floats
        rows.append((kind, _written_layer(result["name"], layers), int8))
    quantizable = [row for row in rows if row[0] in _QUANTIZABLE_KINDS]
    in_int8 = sum(int8 for _, _, int8 in quantizable)
    return {
        "runtime": RUNTIME,
        "built_with": origin.get("versions", {}),
        "batch": int(interpreter.get_input_details()[0]["shape"][0]),
        "inputs": [_end(INPUT, tensor) for tensor in interpreter.get_input_details()],
        "outputs": [_end(OUTPUT, tensor) for tensor in interpreter.get_output_details()],
        "conversions": conversions,
        "int8": by_kind(rows, int8=True),
        "float": by_kind(rows, int8=False),
        "delegated": dict(sorted(inside.items())),
        "not_delegated": dict(sorted(outside.items())),
        "coverage": {
            "eligible": len(quantizable),
            "int8": in_int8,
            "fraction": in_int8 / len(quantizable) if quantizable else 0.0,
            "not_int8": [[layer or kind, why_in_float(layer, origin)] for kind, layer, int8 in quantizable if not int8],
        },
    }


def _end(name: str, tensor: Mapping[str, Any]) -> dict[str, Any]:
    scale, zero = tensor["quantization"]
    quantized = bool(scale)
    return {
        "name": name,
        "dtype": np.dtype(tensor["dtype"]).name,
        "shape": [int(size) for size in tensor["shape"]],
        "scale": float(scale) if quantized else None,
        "zero_point": int(zero) if quantized else None,
    }


def _written_layer(tensor: str, layers: Mapping[str, str]) -> str:
    """The layer of a tensor; the quantizer adds a suffix to the names of some."""
    known = [name for name in layers if tensor.startswith(name)]
    return layers[max(known, key=len)] if known else ""


def _delegated(steps: Collection[Mapping[str, Any]]) -> set[int]:
    """Operators that a delegate replaces: those between its results and its inputs."""
    makers = {result: step for step in steps if step["op_name"] != "DELEGATE" for result in step["outputs"]}
    found: set[int] = set()
    for delegate in (step for step in steps if step["op_name"] == "DELEGATE"):
        given = set(delegate["inputs"])
        waiting = list(delegate["outputs"])
        while waiting:
            tensor = waiting.pop()
            if tensor not in makers or tensor in given or makers[tensor]["index"] in found:
                continue
            found.add(makers[tensor]["index"])
            waiting += [source for source in makers[tensor]["inputs"] if source >= 0]
    return found
