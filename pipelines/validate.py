"""Every artefact beside the teacher, on the same images: per-image predictions and `report.json`, measurements only."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nayer_edge import data, provenance
from nayer_edge.artefacts import Artifact, RunFolder, read_json, sha256_of, write_atomic, write_json
from nayer_edge.config import Recipe
from nayer_edge.errors import MissingError
from nayer_edge.export.benchmark import benchmark
from nayer_edge.export.coverage import int8_coverage
from nayer_edge.export.runners import OrtRunner, Runner, TorchRunner
from nayer_edge.export.targets import TARGETS, Target, get_target
from nayer_edge.models import load_classifier
from nayer_edge.progress import Progress

from .deploy import FP16, FP32, SyntheticSource, int8_file, wants_fp16
from .measurements import (
    PREDICTIONS_PATH,
    REPORT_PATH,
    ArtifactReport,
    ClassCounts,
    Dataset,
    Latency,
    Network,
    Paired,
    PairedCounts,
    Report,
)

TOP = 5
LATENCY_RUNS = 200


@dataclass(frozen=True)
class Images:
    """The images of one validation; labels are null where nobody knows the truth."""

    pixels: np.ndarray
    labels: np.ndarray | None
    dataset: Dataset


@dataclass(frozen=True)
class Candidate:
    """An exported file to measure."""

    name: str
    file: str
    target: str
    precision: str


def candidates(config: Recipe) -> list[Candidate]:
    """The graphs that a recipe makes."""
    half = [Candidate("fp16", FP16, "tensorrt", "fp16")] if wants_fp16(config) else []
    return [
        Candidate("fp32", FP32, "cpu", "fp32"),
        *half,
        *(Candidate(f"int8.{target}", int8_file(target), target, "int8") for target in config.export.targets),
    ]


def make_report(
    teacher: Artifact,
    lte: Artifact,
    student: Artifact,
    onnx: Artifact,
    int8: Artifact,
    engine: Artifact,
    *,
    config: Recipe,
    out: RunFolder,
    progress: Progress,
) -> Artifact:
    """Runs everything and writes `predictions.npz` and `report.json`."""
    del onnx, int8
    images = _images(teacher, lte, student, config, out, progress)
    teacher_network = load_classifier(out.path(teacher.files["teacher"]))
    student_network = load_classifier(out.path(student.files["student"]))
    progress.start("validate", 2 + len(candidates(config)))
    with TorchRunner(teacher_network) as runner:
        teacher_logits = runner.infer(images.pixels)
    progress.advance()
    with TorchRunner(student_network) as runner:
        student_logits = runner.infer(images.pixels)
    progress.advance()
    predictions = {"teacher": ranked(teacher_logits), "student": ranked(student_logits)}
    reports: list[ArtifactReport] = []
    with contextlib.ExitStack() as open_runners:
        runners: dict[str, Runner] = {}
        for candidate in candidates(config):
            found = _measure(candidate, out, images, student_logits, predictions, runners, open_runners)
            reports.append(found)
            progress.advance()
        timings = (
            {timing.runner: timing for timing in benchmark(runners, student_network.spec.shape, runs=LATENCY_RUNS)}
            if runners
            else {}
        )
    reports = [
        report.model_copy(
            update={
                "latency_ms": Latency(p50=timings[report.name].p50, p95=timings[report.name].p95),
                "threads": timings[report.name].threads,
                "speedup_vs_fp32": timings[report.name].ratio,
            }
        )
        if report.name in timings
        else report
        for report in reports
    ]
    reports += _engines(engine, out)
    reports = [_paired(report, predictions, images, student_network.classes) for report in reports]
    labels = {} if images.labels is None else {"labels": images.labels.astype(np.int32)}
    _save_predictions(out.path(PREDICTIONS_PATH), {**labels, **predictions})
    report = Report(
        run=config.name,
        dataset=images.dataset,
        teacher=Network(top1=_top1(predictions["teacher"], images.labels), params=teacher_network.parameter_count),
        student=Network(
            top1=_top1(predictions["student"], images.labels),
            params=student_network.parameter_count,
            agreement=same(predictions["student"], predictions["teacher"]),
        ),
        artifacts=tuple(reports),
        predictions_sha256=sha256_of(out.path(PREDICTIONS_PATH)),
        hardware=provenance.hardware(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    write_json(out.path(REPORT_PATH), report.model_dump(mode="json", by_alias=True))
    progress.finish()
    return Artifact("validate", {"report": REPORT_PATH, "predictions": PREDICTIONS_PATH}, _numbers(report))


def _images(
    teacher: Artifact, lte: Artifact, student: Artifact, config: Recipe, out: RunFolder, progress: Progress
) -> Images:
    """The recipe's labelled hold-out, or fresh rounds of the generator that nothing was trained or calibrated on."""
    if config.validate_.data is not None:
        spec = config.teacher.input
        found = data.load(config.validate_.data, "holdout", spec, config.teacher.classes)
        pixels = found.images.numpy().astype(np.float32) / 255
        return Images(pixels, found.labels.numpy(), Dataset(kind="holdout", n=len(found), name=found.name))
    count = config.validate_.synthetic_images
    source = SyntheticSource.open(teacher, lte, student, config, out)
    progress.start("draw hold-out images", -(-count // config.synthesis.batch) * config.synthesis.g_steps)
    pixels = source.draw("validate", count, progress)
    progress.finish()
    return Images(pixels, None, Dataset(kind="synthetic", n=count, name="drawn from the trained generator"))


def _measure(
    candidate: Candidate,
    out: RunFolder,
    images: Images,
    student_logits: np.ndarray,
    predictions: dict[str, np.ndarray],
    runners: dict[str, Runner],
    open_runners: contextlib.ExitStack,
) -> ArtifactReport:
    """Predictions and static facts of one file; its runner stays open for the timing."""
    path = out.path(candidate.file)
    target = get_target(candidate.target)
    facts: dict[str, Any] = {
        "name": candidate.name,
        "file": candidate.file,
        "target": candidate.target,
        "precision": candidate.precision,
        "runtime": "onnxruntime",
        "size_bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }
    try:
        runner = open_runners.enter_context(OrtRunner(path, target=target))
    except MissingError as error:
        return ArtifactReport(**facts, status="unavailable", reason=str(error))
    logits = runner.infer(images.pixels)
    predictions[candidate.name] = ranked(logits)
    # A graph made for another device runs here, and says nothing about that device's speed.
    if native(target):
        runners[candidate.name] = runner
    coverage = int8_coverage(path, target) if candidate.precision == "int8" else None
    return ArtifactReport(
        **facts,
        status="measured",
        precision_verified=coverage.verified and coverage.int8 > 0 if coverage else candidate.precision == "fp32",
        top1=_top1(predictions[candidate.name], images.labels),
        agreement=same(predictions[candidate.name], predictions["teacher"]),
        max_abs_diff=float(np.abs(logits - student_logits).max()),
        int8_coverage=coverage.fraction if coverage else None,
    )


def native(target: Target) -> bool:
    """This machine is such a device."""
    machine = platform.machine().lower()
    return target.name == "cpu" or (target.name == "arm" and machine in ("aarch64", "arm64"))


def _engines(engine: Artifact, out: RunFolder) -> list[ArtifactReport]:
    """Engines are built here and run on their GPU; the report says which is which."""
    reports = []
    for record in read_json(out.path(engine.files["engines"]), "the list of engines"):
        facts = {key: record[key] for key in ("name", "file", "target", "precision")}
        facts["runtime"] = TARGETS[record["target"]].runtime
        if record["status"] == "built":
            path = out.path(record["file"])
            reports.append(
                ArtifactReport(
                    **facts,
                    status="not_run",
                    reason=f"Built for {record['compute_capability']}; validate does not run engines.",
                    precision_verified=record["precision_verified"],
                    size_bytes=path.stat().st_size,
                    sha256=sha256_of(path),
                )
            )
        else:
            reports.append(ArtifactReport(**facts, status="unavailable", reason=record["reason"]))
    return reports


def _paired(
    report: ArtifactReport, predictions: Mapping[str, np.ndarray], images: Images, classes: Sequence[str]
) -> ArtifactReport:
    """Adds the paired counts, where there is a truth to count against."""
    if report.status != "measured" or images.labels is None:
        return report
    labels = images.labels
    right = {name: ranks[:, 0] == labels for name, ranks in predictions.items()}
    mine, fp32 = right[report.name], right["fp32"]
    per_class = tuple(
        ClassCounts(
            label=label,
            n=int((labels == number).sum()),
            lost=int((fp32 & ~mine)[labels == number].sum()),
            gained=int((mine & ~fp32)[labels == number].sum()),
        )
        for number, label in enumerate(classes)
    )
    paired = PairedCounts(vs_fp32=count_pairs(fp32, mine), vs_teacher=count_pairs(right["teacher"], mine))
    return report.model_copy(update={"paired": paired, "per_class": per_class})


def count_pairs(reference: np.ndarray, artefact: np.ndarray) -> Paired:
    """The four counts of two boolean arrays "was right", image by image."""
    return Paired(
        n=len(reference),
        both_right=int((reference & artefact).sum()),
        lost=int((reference & ~artefact).sum()),
        gained=int((~reference & artefact).sum()),
        both_wrong=int((~reference & ~artefact).sum()),
    )


def ranked(logits: np.ndarray) -> np.ndarray:
    """The five likeliest classes per image, likeliest first; (n, min(5, K)), int32. Ties go to the lower class."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :TOP].astype(np.int32)


def same(a: np.ndarray, b: np.ndarray) -> float:
    """Fraction of images with the same likeliest class."""
    return float((a[:, 0] == b[:, 0]).mean())


def _top1(ranks: np.ndarray, labels: np.ndarray | None) -> float | None:
    return None if labels is None else float((ranks[:, 0] == labels).mean())


def _save_predictions(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]

    write_atomic(path, write)


def _numbers(report: Report) -> dict[str, float | int | str | None]:
    numbers: dict[str, float | int | str | None] = {"images": report.dataset.n, "kind": report.dataset.kind}
    if report.teacher.top1 is not None:
        numbers["teacher top-1"] = round(report.teacher.top1, 4)
    for artefact in report.artifacts:
        value = artefact.top1 if artefact.top1 is not None else artefact.agreement
        what = "top-1" if artefact.top1 is not None else "synthetic agreement"
        numbers[f"{artefact.name} {what}"] = None if value is None else round(value, 4)
    return numbers
