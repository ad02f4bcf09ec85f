"""What the report shows, gathered from a run: key figures, charts, images, embeddings, predictions, calibration."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nayer_edge.labels import embeddings as embeddings_of_labels
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.storage.run_folder import RunFolder

from ..distill import EMBEDDINGS
from ..gate import wording
from ..gate.statistics import binomial_lower, binomial_upper, drop_lower, drop_upper
from ..image_grid import class_strips
from ..measurements import PREDICTIONS_PATH, ArtifactReport, Paired, Report
from ..recipes.loading import last_part
from ..recipes.schema import Recipe
from ..steps import BANK
from . import charts
from .charts import Bar
from .predictions import read_predictions

MATRIX = 40
"""classes up to which a matrix shows all of them"""
REDUCED = 30
"""classes that a similarity picture shows where there are more"""
SHOWN_CLASSES = 20
"""rows of the table of classes where there are more than MATRIX"""
SHOWN_MISTAKES = 12
SHOWN_LAYERS = 20
COMPARED_CLASSES = 4096
"""classes up to which every pair of embeddings is compared"""


def focus_of(config: Recipe, report: Report) -> ArtifactReport | None:
    """The artifact that the page shows in detail: the first in the policy that was measured, else the last measured."""
    measured = [artifact for artifact in report.artifacts if artifact.status == "measured"]
    judged = [artifact for name in config.gate.artifacts for artifact in measured if artifact.name == name]
    return next(iter(judged), measured[-1] if measured else None)


def headline(config: Recipe, report: Report) -> list[dict[str, Any]]:
    """A few figures of each measured artifact in the policy; each names its place in report.json."""
    found = []
    for number, artifact in enumerate(report.artifacts):
        if artifact.name in config.gate.artifacts and artifact.status == "measured":
            found.append({"name": artifact.name, "tiles": list(_tiles(f"/artifacts/{number}", artifact, report))})
    return found[:3]


def _tiles(at: str, artifact: ArtifactReport, report: Report) -> Any:
    if artifact.top1 is not None:
        teacher = f"teacher {wording.percent(report.teacher.top1)}"
        yield {"what": "Top-1", "at": f"{at}/top1", "value": artifact.top1, "note": teacher} | _shown(artifact.top1)
    if artifact.agreement is not None:
        n = f"{report.dataset.n:,}"
        on = f"on {n} synthetic images" if report.dataset.kind == "synthetic" else f"on the same {n} images"
        tile = {"what": "Agrees with the teacher", "at": f"{at}/agreement", "value": artifact.agreement}
        yield tile | {"note": on} | _shown(artifact.agreement)
    if artifact.latency_ms is not None:
        speed = f"{artifact.speedup_vs_fp32:.2f} × the speed of FP32" if artifact.speedup_vs_fp32 else "at batch 1"
        text = f"{wording.milliseconds(artifact.latency_ms.p50)} ms"
        p50 = {"at": f"{at}/latency_ms/p50", "value": artifact.latency_ms.p50}
        yield {"what": "Median latency", **p50, "text": text, "note": speed}
    if artifact.size_bytes is not None:
        fp32 = next((a.size_bytes for a in report.artifacts if a.name == "fp32" and a.size_bytes), None)
        smaller = f"{fp32 / artifact.size_bytes:.1f} × smaller than FP32" if fp32 else "on disk"
        place = {"at": f"{at}/size_bytes", "value": artifact.size_bytes}
        yield {"what": "Size", **place, "text": wording.size(artifact.size_bytes), "note": smaller}


def _shown(rate: float) -> dict[str, str]:
    return {"text": wording.percent(rate)}


def drops(config: Recipe, report: Report) -> dict[str, dict[str, str]]:
    """Per artifact: the bounds of its drops against FP32 and teacher and of its agreement, as text."""
    alpha = round(1 - config.gate.accuracy.confidence, 12)
    found = {}
    for artifact in report.artifacts:
        paired = artifact.paired_synthetic if report.dataset.kind == "synthetic" else artifact.paired
        mine = {"vs_fp32": paired.vs_fp32, "vs_teacher": paired.vs_teacher}
        found[artifact.name] = {key: _drop_bounds(paired, alpha) for key, paired in mine.items()}
        if artifact.agreement is not None:
            n, same = report.dataset.n, round(artifact.agreement * report.dataset.n)
            low, high = binomial_lower(same, n, alpha), binomial_upper(same, n, alpha)
            found[artifact.name]["agreement"] = f"{100 * low:.2f} … {100 * high:.2f}"
    return found


def _drop_bounds(paired: Paired | None, alpha: float) -> str:
    if paired is None or not 0 <= paired.lost + paired.gained <= paired.n:
        return ""
    counts = (paired.lost, paired.gained, paired.n)
    return f"{wording.difference(drop_lower(*counts, alpha))} … {wording.difference(drop_upper(*counts, alpha))}"


def comparison(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Bars of wrong predictions in %, latency in ms and size; empty where nothing was measured."""
    synthetic = report.dataset.kind == "synthetic"
    measured = [artifact for artifact in report.artifacts if artifact.status == "measured"]
    rates = [("student", report.student.agreement if synthetic else report.student.top1, 2)]
    if not synthetic:
        rates.insert(0, ("teacher", report.teacher.top1, 3))
    rates += [(artifact.name, artifact.agreement if synthetic else artifact.top1, 1) for artifact in measured]
    timed = [(artifact.name, artifact.latency_ms) for artifact in measured if artifact.latency_ms is not None]
    return {
        "errors": charts.bars(
            [
                Bar(name, 1 - rate, (wording.percent(1 - rate),), None, series)
                for name, rate, series in rates
                if rate is not None
            ]
        ),
        "latency": charts.bars(
            [Bar(n, t.p50, (wording.milliseconds(t.p50), wording.milliseconds(t.p95)), t.p95) for n, t in timed]
        ),
        "sizes": charts.bars(
            [Bar(a.name, a.size_bytes, (wording.size(a.size_bytes),)) for a in report.artifacts if a.size_bytes]
        ),
    }


def synthetic_images(config: Recipe, run: RunFolder) -> dict[str, Any]:
    """The newest images of the memory bank, a strip (data URI) per class, and how many classes there are."""
    bank = MemoryBank.load(run.path(BANK), torch.device("cpu"))
    images, labels = bank.newest(config.synthesis.batch * config.synthesis.rounds)
    classes = config.teacher.classes
    strips = [
        {"label": classes[strip.number], "images": strip.images, "uri": _data_uri(strip.png)}
        for strip in class_strips(images.numpy(), labels.numpy())
        if strip.number < len(classes)
    ]
    return {"strips": strips, "classes": len(classes), "shape": bank.shape, "bank": len(bank)}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def label_embeddings(run: RunFolder) -> dict[str, Any]:
    """Encoder, prompt, the closest pairs of class names, and a matrix of all similarities, or of the closest."""
    found = embeddings_of_labels.load(run.path(EMBEDDINGS))
    labels = found.labels
    facts: dict[str, Any] = {
        "encoder": last_part(found.encoder),
        "prompts": found.prompt.split("\n"),
        "dimensions": found.embeddings.shape[1],
        "classes": len(labels),
        "matrix": None,
        "pairs": [],
        "mean": embeddings_of_labels.mean_cosine(found.embeddings),
    }
    if len(labels) > COMPARED_CLASSES:
        return facts
    cosines = embeddings_of_labels.cosines(found.embeddings).numpy().astype(np.float64)
    rows, columns = np.triu_indices(len(labels), 1)
    order = np.argsort(-cosines[rows, columns], kind="stable")
    pairs = [(int(rows[place]), int(columns[place])) for place in order]
    shown = list(range(len(labels))) if len(labels) <= MATRIX else _members(pairs, REDUCED)
    facts["pairs"] = [(labels[a], labels[b], float(cosines[a, b])) for a, b in pairs[:5]]
    facts["matrix"] = charts.similarity(cosines[np.ix_(shown, shown)], [labels[number] for number in shown])
    return facts


def _members(pairs: Sequence[tuple[int, int]], most: int) -> list[int]:
    """The classes of the first pairs, until there are `most` of them, in the order of the classes."""
    members: set[int] = set()
    for pair in pairs:
        if len(members | set(pair)) > most:
            break
        members |= set(pair)
    return sorted(members)


def predictions_of(run: RunFolder, config: Recipe, report: Report, focus: ArtifactReport | None) -> dict[str, Any]:
    """Confusion of student and artifact, their most frequent mistakes, and every class from teacher to artifact."""
    found = read_predictions(run.path(PREDICTIONS_PATH), config.teacher.classes)
    artifact = focus.name if focus is not None and focus.name in found.answers else None
    models = ["student", *([artifact] if artifact else [])]
    truth = "label" if found.labelled else "teacher's prediction"
    few = len(found.classes) <= MATRIX
    on = "synthetic images" if report.dataset.kind == "synthetic" else "hold-out images"
    compared = [*(["teacher"] if found.labelled else []), *models]
    rows = found.per_class(compared)
    return {
        "truth": truth,
        "models": models,
        "matrices": [
            (name, charts.confusion(found.confusion(name), found.classes, f"{name} on {on}")) for name in models
        ]
        if few
        else [],
        "mistakes": found.mistakes(models[-1], SHOWN_MISTAKES),
        "wrong": int((found.answers[models[-1]] != found.truth).sum()),
        "compared": compared,
        "rows": rows if few else rows[:SHOWN_CLASSES],
        "classes": len(found.classes),
    }


def calibrations(records: Mapping[str, Any], focus: ArtifactReport | None) -> list[dict[str, Any]]:
    """Per target of quantization.json: method, scores, ranges and layers; the target of the focus comes first."""
    names = sorted(records, key=lambda name: focus is None or name != focus.target)
    return [_calibration(name, records[name]) for name in names]


def _calibration(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    ranges = sorted(record.get("ranges", {}).items(), key=lambda item: _natural(item[0]))
    layers = sorted(record.get("sensitivity") or (), key=lambda row: (_noise(row["sqnr_db"]), -_changed(row)))
    # A runtime's own quantizer tells no SQNR, only what a layer alone changes.
    noisy = [row for row in layers if row["sqnr_db"] is not None]
    bars = [Bar(row["node"], _noise(row["sqnr_db"]), _layer_texts(row)) for row in noisy[:SHOWN_LAYERS]]
    changing = [row for row in layers if row["alone"]] if not noisy else []
    bars += [Bar(row["node"], _changed(row), _layer_texts(row)[1:]) for row in changing[:SHOWN_LAYERS]]
    return {
        "name": name,
        "record": record,
        "methods": record.get("methods") or {},
        "ranges": charts.ranges(ranges),
        "layers": layers,
        "bars": charts.bars(bars),
        "sqnr": bool(noisy),
    }


def _layer_texts(row: Mapping[str, Any]) -> tuple[str, str]:
    alone, sqnr = row.get("alone"), row["sqnr_db"]
    return "" if sqnr is None else f"{sqnr:.1f} dB", wording.percent(alone["top1"] if alone else None)


def _changed(row: Mapping[str, Any]) -> float:
    """Fraction of the answers that the layer alone changes; 0 where it was not measured."""
    return 1 - row["alone"]["top1"] if row["alone"] else 0.0


def _noise(sqnr_db: float | None) -> float:
    """A layer without any noise has null in the record."""
    return float("inf") if sqnr_db is None else sqnr_db


def _natural(name: str) -> list[tuple[int, int | str]]:
    """conv2 before conv10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]
