"""Where an artefact comes from: the chain of files from the teacher to it, with their hashes."""

from __future__ import annotations

from dataclasses import dataclass

from nayer_edge.storage.run_folder import FileRecord, Manifest

from ..deploy import FP16, FP32, int8_file
from ..distill import EMBEDDINGS, GENERATOR, STUDENT, TEACHER
from ..measurements import ArtifactReport
from ..steps import STEPS


@dataclass(frozen=True)
class Link:
    """One file of a chain.

    Attributes:
        role: what it is, for people.
        name: path inside the run folder.
        record: its entry in the manifest; None where the manifest has none.
        beside: made alongside the file before it, not from it.
    """

    role: str
    name: str
    record: FileRecord | None
    beside: bool = False


def chain(manifest: Manifest, artefact: ArtifactReport) -> list[Link]:
    """The files from the teacher to an artefact, each made from those before it or alongside the last."""
    quantized = artefact.precision.startswith("int8")
    files = {
        TEACHER: "teacher",
        EMBEDDINGS: "label-text embeddings",
        GENERATOR: "generator",
        STUDENT: "student",
        FP32: "student as ONNX",
        **({FP16: "in FP16"} if artefact.precision == "fp16" else {}),
        # Calibrated with images from the generator.
        **({int8_file(artefact.target): "quantized"} if quantized else {}),
    }
    if artefact.file not in files:
        files[artefact.file] = "engine" if artefact.file.endswith(".engine") else artefact.precision
    return [
        Link(role, name, manifest.files.get(name), beside=name in (EMBEDDINGS, STUDENT)) for name, role in files.items()
    ]


def files_by_step(manifest: Manifest, but: str) -> list[tuple[str, str, list[tuple[str, FileRecord]]]]:
    """(step, what it does, its files) in the order of the steps, without those of the step `but`."""
    found = []
    for step in STEPS:
        files = [(name, record) for name, record in manifest.files.items() if record.step == step.name]
        if files and step.name != but:
            found.append((step.name, step.title, files))
    return found
