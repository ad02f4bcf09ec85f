"""Lists the exported files of a run and opens those that this machine can run: ONNX graphs, engines on their GPU, and
files of other runtimes where these are installed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nayer_edge.errors import IntegrityError, MissingError, NayerEdgeError, UsageError
from nayer_edge.export.runners import OrtRunner, Runner, TensorRtRunner
from nayer_edge.export.runtimes import open_runner
from nayer_edge.export.targets import TARGETS, Runtime, get_target, has_module, is_native
from nayer_edge.storage.files import read_json
from nayer_edge.storage.run_folder import RunFolder

from ..deploy import ENGINES, FP16, FP32, RUNTIMES, int8_file, wants_fp16
from ..recipes.schema import Recipe


@dataclass(frozen=True)
class Candidate:
    """An exported file to measure.

    Attributes:
        name: as in the report.
        file: path in the run folder.
        target: the target that it was made for.
        precision: fp32, fp16 or int8.
        runtime: the runtime used on this machine.
        verified: the precision of the layers was read from the engine itself.
    """

    name: str
    file: str
    target: str
    precision: str
    runtime: Runtime = "onnxruntime"
    verified: bool = False

    @property
    def timed(self) -> bool:
        """Whether its speed is meaningful: a graph made for another device runs here, but not at that device's speed.
        OpenVINO and LiteRT compute FP16 files in float32 here."""
        if self.precision == "fp16" and has_module(get_target(self.target)):
            return False
        return self.runtime != "onnxruntime" or is_native(get_target(self.target))

    @property
    def reference(self) -> str:
        """The artifact that its speed is compared with: FP32 in the same runtime on the processor."""
        return f"fp32.{self.target}" if has_module(get_target(self.target)) else "fp32"


def candidates(config: Recipe, run: RunFolder) -> list[Candidate]:
    """The exported files of a run."""
    return [*graphs(config), *engines(not_graphs(run))]


def not_graphs(run: RunFolder) -> list[dict[str, Any]]:
    """The entries of engines.json and runtimes.json: the files that were built, and those that could not be."""
    held = run.manifest.files
    return [
        record
        for name, what in ((RUNTIMES, "the list of runtimes' files"), (ENGINES, "the list of engines"))
        if name in held
        for record in read_json(run.path(name), what)
    ]


def graphs(config: Recipe) -> list[Candidate]:
    """The ONNX files that a recipe makes for ONNX Runtime and TensorRT."""
    half = [Candidate("fp16", FP16, "tensorrt", "fp16")] if wants_fp16(config) else []
    return [
        Candidate("fp32", FP32, "cpu", "fp32"),
        *half,
        *(
            Candidate(f"int8.{target}", int8_file(target), target, "int8")
            for target in config.export.targets
            if not has_module(get_target(target))
        ),
    ]


def engines(records: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    """The engines and files of other runtimes that were built.

    Args:
        records: the list in export/engines.json or export/runtimes.json.
    """
    return [
        Candidate(
            record["name"],
            record["file"],
            record["target"],
            record["precision"],
            TARGETS[record["target"]].runtime,
            record.get("precision_verified", False),
        )
        for record in records
        if record["status"] == "built"
    ]


def open_all(
    candidates: Sequence[Candidate], run: RunFolder, stack: contextlib.ExitStack, threads: int | None = None
) -> tuple[dict[str, Runner], dict[str, NayerEdgeError]]:
    """Opens runners.

    Returns:
        The open runners by name, which `stack` closes, and the error for each candidate that cannot be opened.

    Raises:
        IntegrityError: a graph is damaged. (An engine that does not load was built for another device, a file of
            another runtime for another version of it.)
    """
    opened: dict[str, Runner] = {}
    refused: dict[str, NayerEdgeError] = {}
    for candidate in candidates:
        path = run.path(candidate.file)
        try:
            if candidate.runtime == "onnxruntime":
                target = get_target(candidate.target)
                # For another device, Q/DQ pairs run as written instead of fused into this CPU's INT8 kernels.
                runner: Any = OrtRunner(path, threads=threads, target=target, as_written=not is_native(target))
            elif has_module(get_target(candidate.target)):
                runner = open_runner(get_target(candidate.target), path, threads)
            else:
                runner = TensorRtRunner(path, flavour=candidate.runtime)
            opened[candidate.name] = stack.enter_context(runner)
        except MissingError as error:
            refused[candidate.name] = error
        except (IntegrityError, UsageError) as error:
            if candidate.runtime == "onnxruntime":
                raise
            refused[candidate.name] = error
    return opened, refused
