"""Compares every artifact with the teacher on the same images; writes per-image predictions and `report.json`.

It only measures; the gate decides. Every batch of images passes once through all networks, and only each network's top
five classes per image are kept: 50,000 ImageNet-sized images need one batch of pixels and 1 MB per network in memory.

Another machine's measurement stays in the report if this machine cannot repeat it (an engine without its GPU, an ARM
graph on x86) and neither the file nor the images have changed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nayer_edge.data import datasets as data
from nayer_edge.data.stream import ImageStream
from nayer_edge.errors import NayerEdgeError, UsageError
from nayer_edge.export.benchmark import Timing, benchmark
from nayer_edge.export.engine_inspector import confirms
from nayer_edge.export.int8.coverage import int8_coverage
from nayer_edge.export.runners import BATCH, Runner, TensorRtRunner, TorchRunner, as_bytes
from nayer_edge.export.runtimes import describe
from nayer_edge.export.targets import TARGETS, get_target, has_module
from nayer_edge.models.load import load_classifier
from nayer_edge.runtime import provenance
from nayer_edge.runtime.progress import Progress
from nayer_edge.storage.files import read_json, sha256_of, write_atomic, write_json
from nayer_edge.storage.run_folder import Artifact, RunFolder

from ..deploy import SyntheticSource
from ..measurements import (
    NO_ANSWER,
    PREDICTIONS_PATH,
    REPORT_PATH,
    ArtifactReport,
    ClassCounts,
    Dataset,
    Earlier,
    Latency,
    LeftOut,
    Network,
    Paired,
    PairedCounts,
    Report,
    read_report,
)
from ..recipes.loading import BUILT_IN_DATA
from ..recipes.schema import Recipe
from .plausibility import NO_REPEATS, Repeats, doubts, repeats, require_plausible
from .runnable import Candidate, not_graphs, open_all
from .runnable import candidates as candidates_of

TOP = 5
LATENCY_RUNS = 200
FINGERPRINT_BYTES = 16
"""of an image, to find exact copies"""
BATCH_VALUES = 2**23
"""maximum pixel values per batch, 32 MiB as float32; small images use batches of `BATCH`"""


@dataclass(frozen=True)
class Images:
    """The images of one validation.

    Attributes:
        stream: the images with labels.
        truth: the labels are true; otherwise they are the classes that the generator was asked for.
    """

    stream: ImageStream
    truth: bool


@dataclass(frozen=True)
class Seen:
    """The results of one pass over the images.

    Attributes:
        ranks: network → top classes per image, most likely first; (n, min(5, K)), int32.
        max_abs_diff: network → largest absolute logit difference from "student"; None if not finite.
        not_finite: network → number of images with NaN or infinite logits.
        sha256: SHA-256 of the pixels and labels, in order.
        repeats: exact copies among the images.
    """

    ranks: dict[str, np.ndarray]
    max_abs_diff: Mapping[str, float | None]
    not_finite: Mapping[str, int]
    sha256: str
    repeats: Repeats = NO_REPEATS


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
    """Runs all networks and writes `predictions.npz` and `report.json`."""
    del onnx, int8, engine
    images = _images(teacher, lte, student, config, out, progress)
    networks = {
        "teacher": load_classifier(out.path(teacher.files["teacher"])),
        "student": load_classifier(out.path(student.files["student"])),
    }
    classes, shape = networks["student"].classes, networks["student"].spec.shape
    candidates, records = candidates_of(config, out), not_graphs(out)
    with contextlib.ExitStack() as stack:
        opened, refused = open_all(candidates, out, stack)
        candidates = [_inspected(candidate, opened.get(candidate.name)) for candidate in candidates]
        with TorchRunner(networks["teacher"]) as teacher_runner, TorchRunner(networks["student"]) as student_runner:
            runners: dict[str, Runner] = {"teacher": teacher_runner, "student": student_runner, **opened}
            seen = run_over(runners, images.stream, shape, len(classes), progress)
        require_answers(seen, images.stream.name)
        doubted = _doubts(seen, images, out.path(teacher.files["teacher card"]), config) if images.truth else ()
        if not config.validate_.allow_implausible:
            require_plausible(doubted, images.stream.name)
        here = {c.name: c.reference for c in candidates if c.name in opened and c.timed}
        timed = {name: opened[name] for name in here}
        timings = benchmark(timed, shape, runs=LATENCY_RUNS, references=here) if here else []
    labels = images.stream.labels if images.truth else None
    earlier = _earlier(out, [*teacher.files.values(), *student.files.values()], seen)
    reports = []
    for candidate in candidates:
        found = _report(candidate, out, refused.get(candidate.name), seen, labels, classes)
        before = earlier.of(candidate, out)
        if before is not None and _tells_more(before, found, candidate):
            seen.ranks[candidate.name] = earlier.ranks[candidate.name]
            found = before.model_copy(update=_compared(candidate.name, seen, labels, classes))
        reports.append(found)
    for timing in timings:
        reports = [_timed(report, timing) if report.name == timing.runner else report for report in reports]
    arrays = {} if labels is None else {"labels": labels.astype(np.int32)}
    _save_predictions(out.path(PREDICTIONS_PATH), {**arrays, **seen.ranks})
    report = Report(
        run=config.name,
        dataset=_dataset(images, seen, doubted, config),
        teacher=Network(top1=_top1(seen.ranks["teacher"], labels), params=networks["teacher"].parameter_count),
        student=Network(
            top1=_top1(seen.ranks["student"], labels),
            params=networks["student"].parameter_count,
            agreement=same(seen.ranks["student"], seen.ranks["teacher"]),
        ),
        artifacts=(*reports, *_not_built(records)),
        predictions_sha256=sha256_of(out.path(PREDICTIONS_PATH)),
        hardware=provenance.hardware(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    write_json(out.path(REPORT_PATH), report.model_dump(mode="json", by_alias=True))
    return Artifact("validate", {"report": REPORT_PATH, "predictions": PREDICTIONS_PATH}, _numbers(report))


def _doubts(seen: Seen, images: Images, card: Path, config: Recipe) -> tuple[str, ...]:
    """See `plausibility.doubts`; the accuracy to expect is that of published weights, or the recipe's own figure."""
    published = read_json(card, "a model card").get("published_top1")
    if published is None and config.teach is None:
        published = config.measured.teacher_top1
    return doubts(seen.ranks["teacher"][:, 0], images.stream.labels, config.teacher.classes, published)


def _dataset(images: Images, seen: Seen, found: Sequence[str], config: Recipe) -> Dataset:
    stream, asked = images.stream, config.validate_
    if not images.truth:
        return Dataset(kind="synthetic", n=len(stream), name=stream.name, sha256=seen.sha256)
    return Dataset(
        kind="holdout",
        n=len(stream),
        name=stream.name,
        sha256=seen.sha256,
        split=stream.split,
        fit=None if asked.data in BUILT_IN_DATA else asked.fit,
        matched_by=stream.matched_by,
        left_out=tuple(LeftOut(reason=each.reason, count=each.count, first=each.first) for each in stream.left_out),
        duplicates=seen.repeats.copies,
        contradictory=seen.repeats.contradictory,
        doubts=tuple(found),
    )


@dataclass(frozen=True)
class _Earlier:
    """What the run's former report measured on the same images of the same networks.

    Attributes:
        reports: name → measured artifact.
        ranks: name → its predictions, as in `Seen`.
    """

    reports: Mapping[str, ArtifactReport]
    ranks: Mapping[str, np.ndarray]

    def of(self, candidate: Candidate, out: RunFolder) -> ArtifactReport | None:
        """The measurement of this very file, if there is one."""
        found = self.reports.get(candidate.name)
        same_file = found is not None and found.sha256 == sha256_of(out.path(candidate.file))
        return found if same_file and candidate.name in self.ranks else None


def _earlier(out: RunFolder, networks: Sequence[str], seen: Seen) -> _Earlier:
    """The former report's measurements, if its images and networks are the current ones."""
    if not all(out.former_file(name, "validate", networks) for name in (REPORT_PATH, PREDICTIONS_PATH)):
        return _Earlier({}, {})
    report = read_report(out.path(REPORT_PATH), f"Type: nayer-edge validate {out.typed}")
    if report.dataset.sha256 != seen.sha256:
        return _Earlier({}, {})
    with np.load(out.path(PREDICTIONS_PATH), allow_pickle=False) as held:
        ranks = {name: held[name] for name in held.files if held[name].shape == seen.ranks["teacher"].shape}
    when = Earlier(created=report.created, hardware=report.hardware)
    measured = [artifact for artifact in report.artifacts if artifact.status == "measured"]
    return _Earlier({a.name: a if a.earlier else a.model_copy(update={"earlier": when}) for a in measured}, ranks)


def _tells_more(before: ArtifactReport, now: ArtifactReport, candidate: Candidate) -> bool:
    """Whether only the earlier measurement was made on the device that the file is for."""
    verified = before.precision_verified and not now.precision_verified
    return now.status != "measured" or (verified and not candidate.timed)


def _images(
    teacher: Artifact, lte: Artifact, student: Artifact, config: Recipe, out: RunFolder, progress: Progress
) -> Images:
    """The recipe's labelled hold-out, or fresh generator images, not used in training or calibration."""
    chosen = config.validate_
    if chosen.data is not None:
        spec, classes = config.teacher.input, config.teacher.classes
        found = data.open_images(chosen.data, "holdout", spec, classes, chosen.fit, chosen.split)
        return Images(found, truth=True)
    source = SyntheticSource.open(teacher, lte, student, config, out)
    steps = source.steps("validate", chosen.synthetic_images)
    progress.start("draw hold-out images", steps)
    drawn, labels = source.draw_labelled("validate", chosen.synthetic_images, progress)
    progress.finish()
    pixels = as_bytes(drawn)

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(pixels), size):
            yield pixels[start : start + size]

    reserved = min(source.ready("validate"), chosen.synthetic_images)
    name = origin_of(reserved, chosen.synthetic_images - reserved, generator=source.generator is not None)
    return Images(ImageStream(name, labels.astype(np.int64), batches), truth=False)


def origin_of(reserved: int, drawn: int, *, generator: bool) -> str:
    """Where synthetic images come from, for people.

    Args:
        reserved: number of images put aside during distillation.
        drawn: number of images made now, from the generator if there is one.
    """
    how = "drawn from the trained generator" if generator else "drawn procedurally"
    if reserved and drawn:
        return f"{reserved:,} reserved during distillation, {drawn:,} {how}"
    return how if drawn else "reserved during distillation"


def batch_size(shape: tuple[int, int, int]) -> int:
    """Number of images of this shape per batch."""
    return max(1, min(BATCH, BATCH_VALUES // math.prod(shape)))


def run_over(
    runners: Mapping[str, Runner], images: ImageStream, shape: tuple[int, int, int], classes: int, progress: Progress
) -> Seen:
    """Passes all images once through all networks.

    Args:
        runners: opened runners; all logits are compared with those of "student".
        shape: (C, H, W) of the images.
        classes: the networks' number of classes.

    Raises:
        UsageError: the number of images in the stream differs from its number of labels.
    """
    count, done = len(images), 0
    ranks = {name: np.empty((count, min(TOP, classes)), np.int32) for name in runners}
    furthest, not_finite = dict.fromkeys(runners, 0.0), dict.fromkeys(runners, 0)
    digest = hashlib.sha256(repr((count, *shape)).encode())
    prints = np.empty(count, f"S{FINGERPRINT_BYTES}")
    progress.start("validate", count)
    for pixels in images.batches(batch_size(shape)):
        place = slice(done, done + len(pixels))
        done += len(pixels)
        if done > count:
            break
        digest.update(pixels.tobytes())
        prints[place] = [hashlib.blake2b(image.tobytes(), digest_size=FINGERPRINT_BYTES).digest() for image in pixels]
        unit = pixels.astype(np.float32) / 255
        logits = {name: runner.infer(unit) for name, runner in runners.items()}
        for name, found in logits.items():
            ranks[name][place] = ranked(found)
            not_finite[name] += int((~np.isfinite(found)).any(axis=1).sum())
            # Unlike max(), np.maximum propagates NaN.
            furthest[name] = float(np.maximum(furthest[name], np.abs(found - logits["student"]).max()))
        progress.advance(len(pixels))
        progress.figures(images=f"{done:,}/{count:,}")
    progress.finish()
    if done != count:
        raise UsageError(
            f"{images.name} changed while it was read: expected {count:,} images, read {done:,}.",
            fix="Repeat the command when nothing is writing to it.",
        )
    digest.update(images.labels.astype("<i8").tobytes())
    differences = {name: value if math.isfinite(value) else None for name, value in furthest.items()}
    return Seen(ranks, differences, not_finite, digest.hexdigest(), repeats(prints, images.labels))


def _inspected(candidate: Candidate, runner: Runner | None) -> Candidate:
    """An engine that runs here says itself in what precision: where it was built, there may have been no GPU."""
    if not isinstance(runner, TensorRtRunner):
        return candidate
    return replace(candidate, verified=confirms(runner.layers(), candidate.precision))


def require_answers(seen: Seen, name: str) -> None:
    """Raises UsageError if the teacher's output is not finite on some images: they would count as its errors and hide
    the losses of other networks there."""
    if broken := seen.not_finite["teacher"]:
        raise UsageError(
            f"The teacher's output is not finite on {broken:,} of {len(seen.ranks['teacher']):,} images of {name}.",
            fix="Check these images and the teacher's input specification, its normalisation in particular.",
        )


def _report(
    candidate: Candidate,
    out: RunFolder,
    refused: NayerEdgeError | None,
    seen: Seen,
    labels: np.ndarray | None,
    classes: Sequence[str],
) -> ArtifactReport:
    """The measurements of one exported file, except latency."""
    path, name = out.path(candidate.file), candidate.name
    facts: dict[str, Any] = {
        "name": name,
        "file": candidate.file,
        "target": candidate.target,
        "precision": candidate.precision,
        "runtime": candidate.runtime,
        "size_bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }
    if refused is not None:
        # A built engine only lacks its GPU, or a file its runtime; a graph lacks ONNX Runtime.
        status = "unavailable" if candidate.runtime == "onnxruntime" else "not_run"
        reason = " ".join(f"{refused}".split())
        return ArtifactReport(**facts, status=status, reason=reason, precision_verified=candidate.verified)
    target = get_target(candidate.target)
    reads = candidate.runtime == "onnxruntime" or has_module(target)
    coverage = int8_coverage(path, target) if reads and candidate.precision == "int8" else None
    if coverage is not None:
        verified = coverage.verified and coverage.int8 > 0
    elif reads and candidate.precision == "fp32":
        verified = not (has_module(target) and describe(target, path)["int8"])
    else:
        verified = candidate.verified
    broken = seen.not_finite[name]
    return ArtifactReport(
        **facts,
        **_compared(name, seen, labels, classes),
        status="measured",
        reason=f"its output is not finite on {broken:,} of {len(seen.ranks[name]):,} images" if broken else None,
        precision_verified=verified and not broken,
        simulated=not candidate.timed,
        max_abs_diff=seen.max_abs_diff[name],
        int8_coverage=coverage.fraction if coverage else None,
    )


def _compared(name: str, seen: Seen, labels: np.ndarray | None, classes: Sequence[str]) -> dict[str, Any]:
    """The parts of an artifact's report that follow from predictions alone."""
    truth = seen.ranks["teacher"][:, 0] if labels is None else labels
    right = {network: ranks[:, 0] == truth for network, ranks in seen.ranks.items()}
    # Images with non-finite FP32 output would count as FP32 errors and hide losses there.
    unpaired = "fp32" not in right or seen.not_finite["fp32"] > 0
    paired = PairedCounts(
        vs_fp32=None if unpaired else count_pairs(right["fp32"], right[name]),
        vs_teacher=count_pairs(right["teacher"], right[name]),
    )
    agreement = same(seen.ranks[name], seen.ranks["teacher"])
    if labels is None:
        return {"agreement": agreement, "paired_synthetic": paired}
    return {
        "top1": _top1(seen.ranks[name], labels),
        "agreement": agreement,
        "paired": paired,
        "correct": np.packbits(right[name]).tobytes().hex(),
        "per_class": () if unpaired else _per_class(right["fp32"], right[name], labels, classes),
    }


def _per_class(
    fp32: np.ndarray, mine: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> tuple[ClassCounts, ...]:
    """Per class: number of images, and how many were lost and gained relative to FP32."""

    def counts(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(labels[chosen], minlength=len(classes))

    every = np.ones(len(labels), bool)
    rows = zip(classes, counts(every), counts(fp32 & ~mine), counts(mine & ~fp32), strict=True)
    return tuple(
        ClassCounts(label=label, n=int(n), lost=int(lost), gained=int(gained)) for label, n, lost, gained in rows
    )


def _not_built(records: Sequence[Mapping[str, Any]]) -> list[ArtifactReport]:
    """The requested engines and files of other runtimes that could not be built on this machine, with reasons."""
    return [
        ArtifactReport(
            **{key: record[key] for key in ("name", "file", "target", "precision", "reason")},
            runtime=TARGETS[record["target"]].runtime,
            status="unavailable",
        )
        for record in records
        if record["status"] != "built"
    ]


def _timed(report: ArtifactReport, timing: Timing) -> ArtifactReport:
    return report.model_copy(
        update={
            "latency_ms": Latency(p50=timing.p50, p95=timing.p95),
            "threads": timing.threads,
            # FP32 runs on the CPU, so there is no comparable baseline for a GPU engine.
            "speedup_vs_fp32": None
            if get_target(report.target).engine and report.runtime != "onnxruntime"
            else timing.ratio,
        }
    )


def count_pairs(reference: np.ndarray, artifact: np.ndarray) -> Paired:
    """The four paired counts of two boolean arrays "correct per image"."""
    return Paired(
        n=len(reference),
        both_right=int((reference & artifact).sum()),
        lost=int((reference & ~artifact).sum()),
        gained=int((~reference & artifact).sum()),
        both_wrong=int((~reference & ~artifact).sum()),
    )


def ranked(logits: np.ndarray) -> np.ndarray:
    """The top five classes per image, most likely first; (n, min(5, K)), int32. Ties go to the lower class index.

    An image whose logits are not all finite has no answer: `NO_ANSWER`, which equals no class.
    """
    ranks = np.argsort(-logits, axis=1, kind="stable")[:, :TOP].astype(np.int32)
    ranks[~np.isfinite(logits).all(axis=1)] = NO_ANSWER
    return ranks


def same(a: np.ndarray, b: np.ndarray) -> float:
    """Fraction of images with the same top-1 class."""
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
    dataset = report.dataset
    numbers |= {"split": dataset.split, "fit": dataset.fit, "labels by": dataset.matched_by}
    if dataset.left_out:
        numbers["left out"] = "; ".join(f"{each.count:,} {each.reason} ({each.first}, …)" for each in dataset.left_out)
    if dataset.duplicates:
        numbers |= {"exact copies": dataset.duplicates, "with conflicting labels": dataset.contradictory or None}
    if dataset.doubts:
        numbers["doubts"] = " ".join(dataset.doubts)
    if report.teacher.top1 is not None:
        numbers["teacher top-1"] = round(report.teacher.top1, 4)
    for artifact in report.artifacts:
        value = artifact.top1 if artifact.top1 is not None else artifact.agreement
        what = "top-1" if artifact.top1 is not None else "synthetic agreement"
        numbers[f"{artifact.name} {what}"] = None if value is None else round(value, 4)
    return numbers
