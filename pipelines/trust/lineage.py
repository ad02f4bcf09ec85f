"""The lineage of an artifact: the chain of files from the teacher to it, with their hashes."""

from __future__ import annotations

from dataclasses import dataclass

from nayer_edge.export.targets import get_target
from nayer_edge.storage.run_folder import FileRecord, Manifest

from ..deploy import FP16, FP32, int8_file
from ..distill import EMBEDDINGS, GENERATOR, STUDENT, TEACHER
from ..measurements import ArtifactReport
from ..steps import SOURCE, STEPS


@dataclass(frozen=True)
class Link:
    """One file of a chain.

    Attributes:
        role: what the file is, for people.
        name: path inside the run folder.
        record: its entry in the manifest; None if there is none.
        beside: made together with the previous file, not from it.
    """

    role: str
    name: str
    record: FileRecord | None
    beside: bool = False


def chain(manifest: Manifest, artifact: ArtifactReport) -> list[Link]:
    """The files from the teacher to an artifact, in order: each was made from earlier ones or together with the
    previous one."""
    quantized, target = artifact.precision.startswith("int8"), get_target(artifact.target)
    files = {
        TEACHER: "teacher",
        EMBEDDINGS: "label-text embeddings",
        **({SOURCE: "first images of another run"} if SOURCE in manifest.files else {}),
        **({GENERATOR: "generator"} if GENERATOR in manifest.files else {}),
        STUDENT: "student",
        **({FP32: "student as ONNX"} if target.suffix == ".onnx" else {}),
        **({FP16: "in FP16"} if artifact.precision == "fp16" and target.suffix == ".onnx" else {}),
        # Calibrated with images from the generator.
        **({int8_file(artifact.target): "quantized"} if quantized else {}),
    }
    if artifact.file not in files:
        files[artifact.file] = "engine" if artifact.file.endswith(".engine") else artifact.precision
    return [
        Link(role, name, manifest.files.get(name), beside=name in (EMBEDDINGS, STUDENT)) for name, role in files.items()
    ]


def files_by_step(manifest: Manifest, but: str) -> list[tuple[str, str, list[tuple[str, FileRecord]]]]:
    """(step, what it does, its files) for every step with files except `but`, in the order of the steps."""
    found = []
    for step in STEPS:
        files = [(name, record) for name, record in manifest.files.items() if record.step == step.name]
        if files and step.name != but:
            found.append((step.name, step.title, files))
    return found
