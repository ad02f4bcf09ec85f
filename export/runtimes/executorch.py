"""ExecuTorch files (.pte) with the XNNPACK backend: build, run, describe.

INT8 is PyTorch's PT2E quantization: `XNNPACKQuantizer` (symmetric per-channel weights, asymmetric activations) through
torchao. The conversions from and to float32 are part of the file. The batch is fixed to 1: with a dynamic batch,
torch.export's range of the batch is lost during lowering (torch 2.15), the reshape before the classifier is not
delegated, and memory is planned for the largest batch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from nayer_edge.errors import MissingError, UsageError, first_line
from nayer_edge.runtime.provenance import usable_cores
from nayer_edge.storage.files import sha256_of, write_atomic

from ..runners import in_batches, wrong_shape
from ..trace import copy_for_export, traced
from .edge_file import (
    INPUT,
    OUTPUT,
    BuiltFile,
    Operator,
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

RUNTIME = "executorch"
BACKEND = "XnnpackBackend"
_METHOD = "forward"
_PROVENANCE = "provenance"
_PACKAGES = ("executorch", "torchao", "torch")
# On x86, the runtime looks for ARM's core types under /sys and says that it found none. It reports every change of
# its number of threads, too.
_HARMLESS = re.compile(r"^\[cpuinfo_utils\.cpp:\d+\]|^\[threadpool\.cpp:\d+\] Resetting threadpool")
_QUANTIZABLE_KINDS = ("Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected", "BatchMatrixMultiply")
_QUANTIZABLE_CALL = re.compile(
    r"aten::(convolution|conv[123]d|conv_transpose[123]d|linear|addmm|mm|bmm|baddbmm)(\.\w+)?"
)
"""kernels of ExecuTorch itself for the same operators"""
_INT8 = ("xnn_datatype_qint8", "xnn_datatype_quint8")
_STANDARD = "Replace that layer with standard operators; `nayer-edge students` lists students that can be exported."
_DTYPES = {"BYTE": "uint8", "CHAR": "int8", "HALF": "float16", "FLOAT": "float32"}


def build(
    network: nn.Module,
    shape: tuple[int, int, int],
    path: Path,
    *,
    precision: Precision,
    calibration: np.ndarray | None = None,
    float_layers: Collection[str] = (),
) -> BuiltFile:
    """Builds a .pte file: float32 images (1, C, H, W) in [0, 1] → float32 logits (1, classes).

    Args:
        network: images (batch, C, H, W) → logits (batch, classes); includes normalisation. It is not changed.
        shape: (C, H, W).
        path: the file to write.
        precision: "fp32" or "int8".
        calibration: images (n, C, H, W), float32 in [0, 1], for INT8.
        float_layers: names of modules (as in `network.named_modules()`) that stay in float.

    Raises:
        UsageError: wrong arguments, or an operator that ExecuTorch does not have (named, with its layer).
        MissingError: executorch or torchao is not installed.
    """
    check_request(network, shape, precision, calibration, float_layers)
    network, image = copy_for_export(network, shape), torch.full((1, *shape), 0.5)
    with quiet():
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
        except (ImportError, OSError) as error:
            raise not_importable(error, RUNTIME, "executorch", "Building .pte files") from error
        program = traced(network, image)
        try:
            if precision == "int8":
                assert calibration is not None  # check_request
                program = traced(_quantized(program, calibration, float_layers), image)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            graph = edge.exported_program().graph_module
            layers, outside = _layers(graph), _not_delegated(graph)
            versions = versions_of(_PACKAGES)
            facts = {"precision": precision, "layers": layers, "float_layers": sorted(float_layers)}
            # The handles of operators, which tie the file's nodes to layers, exist only after lowering.
            edge._config_methods = {_PROVENANCE: provenance(RUNTIME, versions, facts)}
            executable = edge.to_executorch()
        except (UsageError, MissingError):
            raise
        except Exception as error:
            raise _unsupported(error, program) from error
    _require_kernels(executable.executorch_program.execution_plan[0].operators, outside)
    write_atomic(path, lambda temporary: temporary.write_bytes(executable.buffer))
    found = describe(path)
    record = {
        "runtime": RUNTIME,
        "backend": BACKEND,
        "precision": precision,
        "quantizer": "XNNPACKQuantizer, per channel, through torchao's PT2E" if precision == "int8" else None,
        "versions": versions,
        "calibration": {"n": len(calibration)} if precision == "int8" and calibration is not None else None,
        "batch": 1,
        "batch_reason": "ExecuTorch loses the range of a dynamic batch and does not delegate its reshape",
        "float_layers": sorted(float_layers),
        "float_layers_reach": "any module; its input and output are converted in the file",
        "in_float": found["float"] if precision == "int8" else {},
        "not_int8": found["coverage"]["not_int8"] if precision == "int8" else [],
        "delegated": found["delegated"],
        "not_delegated": found["not_delegated"],
    }
    return BuiltFile(path, record, sha256_of(path))


def _quantized(
    program: torch.export.ExportedProgram, calibration: np.ndarray, float_layers: Collection[str]
) -> torch.fx.GraphModule:
    try:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    except (ImportError, OSError) as error:
        raise not_importable(error, "torchao", "executorch", "INT8 for ExecuTorch") from error

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(lambda node: not is_within(_layer(node), float_layers))
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for image in calibration:
            prepared(torch.from_numpy(np.ascontiguousarray(image[None], np.float32)))
    return convert_pt2e(prepared)


def _layer(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def _layers(graph: torch.fx.GraphModule) -> dict[str, str]:
    """Handle of a delegated operator → its layer, for operators that compute (no conversions)."""
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    found = {}
    for _, lowered, _ in get_lowered_submodules(graph):
        for node in lowered.original_module.graph.nodes:
            if node.op == "call_function" and "quantize_per" not in node.name and "debug_handle" in node.meta:
                found[str(node.meta["debug_handle"])] = _layer(node)
    return found


def _not_delegated(graph: torch.fx.GraphModule) -> dict[str, str]:
    """Operator that the runtime's portable kernels compute → the first layer that uses it."""
    found: dict[str, str] = {}
    for node in graph.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and name not in ("executorch_call_delegate", "getitem"):
            found.setdefault(name.split(".")[1] if name.startswith("aten.") else name, _layer(node))
    return found


def _require_kernels(operators: Collection[Any], outside: Mapping[str, str]) -> None:
    runtime, _ = _import_runtime()
    known = set(runtime.operator_registry.operator_names)
    for operator in operators:
        full = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        if full in known or operator.name.startswith("executorch_prim::"):
            continue
        layer = outside.get(operator.name.removeprefix("aten::"), "")
        raise _no_operator(operator.name, layer, "Neither XNNPACK nor the portable kernels have it.")


def _unsupported(error: Exception, program: torch.export.ExportedProgram) -> UsageError:
    names = re.findall(r"aten(?:::|\.)(\w+)", f"{error}")
    if not names:
        return UsageError("ExecuTorch cannot convert the model.", why=first_line(error), fix=_STANDARD)
    nodes = list(program.graph.nodes)
    with contextlib.suppress(Exception):
        nodes += program.run_decompositions().graph.nodes
    for node in nodes:
        if node.op == "call_function" and any(f"aten.{name}." in f"{node.target}." for name in names):
            return _no_operator(f"aten::{names[0]}", _layer(node), first_line(error))
    return _no_operator(f"aten::{names[0]}", "", first_line(error))


def _no_operator(name: str, layer: str, why: str) -> UsageError:
    where = f" (layer '{layer}')" if layer else ""
    return UsageError(
        f"ExecuTorch does not have the operator {name}{where}.",
        why=why,
        fix=_STANDARD,
    )


def _import_runtime() -> tuple[Any, Any]:
    """The runtime and its module of native functions; what it prints about /sys is hidden."""
    with quiet(_HARMLESS):
        try:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        except (ImportError, OSError) as error:
            raise not_importable(error, RUNTIME, "executorch", "Running .pte files") from error
        # The first look at the thread pool prints the notes about /sys.
        portable_lib._threadpool_get_thread_count()
        return Runtime.get(), portable_lib


def _use_threads(native: Any, threads: int) -> None:
    """Sets the size of the process's thread pool. Methods that are loaded hold on to the pool, so one of the right size
    is left alone: several runners with as many threads can be open at once."""
    if native._threadpool_get_thread_count() != threads:
        native._unsafe_reset_threadpool(threads)


class ExecuTorchRunner:
    """A .pte file in ExecuTorch's runtime, with XNNPACK. The process's thread pool is restored on exit.

    Args:
        path: the file.
        threads: XNNPACK's threads; by default all that the process may use.

    Raises:
        IntegrityError: the file is missing, truncated, or this version of the runtime does not load it.
        MissingError: executorch is not installed.
    """

    name = RUNTIME
    provider = BACKEND

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path, self.threads = path, threads or usable_cores()
        self._program: Any = None
        self._method: Any = None
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        data = read_whole(self.path)
        runtime, native = _import_runtime()
        before, lines = native._threadpool_get_thread_count(), []
        try:
            with quiet(_HARMLESS) as lines:
                _use_threads(native, self.threads)
                # The program owns the file's bytes, which the method reads: it must live as long.
                self._program = runtime.load_program(data)
                self._method = self._program.load_method(_METHOD)
        except (RuntimeError, KeyError, ValueError) as error:
            with quiet(_HARMLESS):
                _use_threads(native, before)
            # The exception says only a number; the reason was printed.
            said = [line for line in lines if line.strip() and not _HARMLESS.search(line)]
            why = said[-1] if said else first_line(error)
            raise does_not_load(self.path, RUNTIME, "executorch", why) from error
        self._restore = functools.partial(_use_threads, native, before)
        self._shape = tuple(self._method.metadata.input_tensor_meta(0).sizes())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._method = self._program = None
        if self._restore:
            with quiet(_HARMLESS):
                self._restore()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes), float32."""
        return in_batches(self._run, images, self._shape[0])

    def _run(self, images: np.ndarray) -> np.ndarray:
        if images.shape[1:] != self._shape[1:]:
            raise wrong_shape(self.path, images, f"It takes images of shape {self._shape[1:]}.")
        try:
            outputs = self._method.execute([torch.from_numpy(images.astype(np.float32, copy=False))])
        except RuntimeError as error:
            raise does_not_run(self.path, RUNTIME, error) from error
        return outputs[0].numpy().copy()


def describe(path: Path) -> dict[str, Any]:
    """Reads a .pte file: input, output, operators in INT8 and in float, delegated and not.

    Returns:
        `inputs`, `outputs` (name, dtype, shape), `conversions` (scale, to six decimals, and zero point where the file
        quantizes and dequantizes), `int8` and `float` (operator → count and layers), `delegated` and `not_delegated`
        (operator → count), `coverage` of convolutions and matrix products, `built_with` (versions), `batch`.

    Raises:
        IntegrityError: the file is damaged.
        MissingError: executorch is not installed.
    """
    data = read_whole(path)
    with quiet():
        try:
            from executorch.exir._serialize._program import deserialize_pte_binary
        except (ImportError, OSError) as error:
            raise not_importable(error, RUNTIME, "executorch", "Reading .pte files") from error
        try:
            program: Any = deserialize_pte_binary(data).program
            plan = next(plan for plan in program.execution_plan if plan.name == _METHOD)
            graphs = [
                _xnnpack_graph(program.backend_delegate_data[delegate.processed.index].data)
                for delegate in plan.delegates
                if delegate.id == BACKEND
            ]
        except Exception as error:
            raise does_not_load(path, RUNTIME, "executorch", first_line(error)) from error
    origin = provenance_in(data)
    operators, conversions = _operators(graphs, origin.get("layers", {}))
    calls = Counter(
        plan.operators[step.instr_args.op_index].name
        for chain in plan.chains
        for step in chain.instructions
        if type(step.instr_args).__name__ == "KernelCall"
    )
    ends = {
        key: [
            {
                "name": name,
                "dtype": _DTYPES.get(tensor.scalar_type.name, tensor.scalar_type.name.lower()),
                "shape": list(tensor.sizes),
                "scale": None,
                "zero_point": None,
            }
            for tensor in (plan.values[index].val for index in indices)
        ]
        for key, name, indices in (("inputs", INPUT, plan.inputs), ("outputs", OUTPUT, plan.outputs))
    }
    return {
        "runtime": RUNTIME,
        "built_with": origin.get("versions", {}),
        "batch": ends["inputs"][0]["shape"][0],
        **ends,
        "conversions": conversions,
        "int8": by_kind(operators, int8=True),
        "float": by_kind(operators, int8=False),
        "delegated": dict(sorted(Counter(kind for kind, _, _ in operators).items())),
        "not_delegated": dict(sorted(calls.items())),
        "coverage": _coverage(operators, calls, origin),
    }


def _xnnpack_graph(blob: bytes) -> dict[str, Any]:
    """XNNPACK's graph inside a delegate, through the schema and the compiler that the package brings."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory(prefix="nayer-edge-") as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = (Path(folder) / "graph.json").read_text(encoding="utf-8")
    # flatc writes the bounds of a ReLU as "inf", which is not JSON.
    return json.loads(re.sub(r":\s*(-?)inf\b", r": \1Infinity", text))


"""(kind, layer, runs in INT8)"""


def _operators(
    graphs: Collection[Mapping[str, Any]], layers: Mapping[str, str]
) -> tuple[list[Operator], list[dict[str, Any]]]:
    operators: list[Operator] = []
    conversions: list[dict[str, Any]] = []
    for graph in graphs:
        types, scales = {}, {}
        for value in graph["xvalues"]:
            inner = value["xvalue_union"]
            tensor = inner.get("tensor_value", inner)
            types[tensor["id_out"]] = tensor["datatype"]
            scales[tensor["id_out"]] = inner.get("quant_params", {})
        for node in graph["xnodes"]:
            kind, fields = node["xnode_union_type"].removeprefix("XNN"), node["xnode_union"]
            source, target = fields.get("input_id", fields.get("input1_id")), fields["output_id"]
            if kind == "Convert":
                quantizes = types[target] in _INT8
                scale = scales[target if quantizes else source]
                conversions.append(
                    {
                        "to": "int8" if quantizes else "float32",
                        "scale": scale.get("scale"),
                        "zero_point": scale.get("zero_point"),
                    }
                )
                continue
            int8 = types[target] in _INT8 and types.get(source) in _INT8
            operators.append((kind, layers.get(str(node["debug_handle"]), ""), int8))
    return operators, conversions


def _coverage(operators: Collection[Operator], calls: Mapping[str, int], origin: Mapping[str, Any]) -> dict[str, Any]:
    """Of the delegated convolutions and matrix products, and of those that ExecuTorch's own kernels compute in float
    (`calls`: kernel → count)."""
    quantizable = [operator for operator in operators if operator[0] in _QUANTIZABLE_KINDS]
    outside = [name for name, count in calls.items() for _ in range(count) if _QUANTIZABLE_CALL.fullmatch(name)]
    int8, eligible = sum(quantized for _, _, quantized in quantizable), len(quantizable) + len(outside)
    return {
        "eligible": eligible,
        "int8": int8,
        "fraction": int8 / eligible if eligible else 0.0,
        "not_int8": [
            *([layer or kind, why_in_float(layer, origin)] for kind, layer, quantized in quantizable if not quantized),
            *([name, "not delegated to XNNPACK"] for name in outside),
        ],
    }
