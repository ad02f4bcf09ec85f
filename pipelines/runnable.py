"""Lists the exported files of a run and opens those that this machine can run: ONNX graphs, and engines on their
GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nayer_edge.errors import IntegrityError, MissingError, NayerEdgeError
from nayer_edge.export.runners import OrtRunner, Runner, TensorRtRunner
from nayer_edge.export.targets import TARGETS, get_target, is_native
from nayer_edge.storage.run_folder import RunFolder

from .deploy import FP16, FP32, int8_file, wants_fp16
from .recipes.schema import Recipe


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
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"] = "onnxruntime"
    verified: bool = False

    @property
    def timed(self) -> bool:
        """Whether its speed is meaningful: a graph made for another device runs here, but not at that device's
        speed."""
        return self.runtime != "onnxruntime" or is_native(get_target(self.target))


def graphs(config: Recipe) -> list[Candidate]:
    """The ONNX files that a recipe makes."""
    half = [Candidate("fp16", FP16, "tensorrt", "fp16")] if wants_fp16(config) else []
    return [
        Candidate("fp32", FP32, "cpu", "fp32"),
        *half,
        *(Candidate(f"int8.{target}", int8_file(target), target, "int8") for target in config.export.targets),
    ]


def engines(records: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    """The engines that were built.

    Args:
        records: the list in export/engines.json.
    """
    return [
        Candidate(
            record["name"],
            record["file"],
            record["target"],
            record["precision"],
            TARGETS[record["target"]].runtime,
            record["precision_verified"],
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
        IntegrityError: a graph is damaged. (An engine that does not load was built for another device.)
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
            else:
                runner = TensorRtRunner(path, flavour=candidate.runtime)
            opened[candidate.name] = stack.enter_context(runner)
        except MissingError as error:
            refused[candidate.name] = error
        except IntegrityError as error:
            if candidate.runtime == "onnxruntime":
                raise
            refused[candidate.name] = error
    return opened, refused
