"""`report.json`: only what `validate` measured. The gate derives the verdict from it (judgement.py).

Rates are fractions in [0, 1], latencies are milliseconds at batch 1, sizes are bytes. Synthetic images have no ground
truth: `top1` and `paired` are null. Agreement with the teacher takes the place of accuracy, and `paired_synthetic`,
where the teacher's prediction counts as right, that of the paired counts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.files import read_json

REPORT_SCHEMA = "nayer-edge/report/1"
REPORT_PATH = "validate/report.json"
PREDICTIONS_PATH = "validate/predictions.npz"
NO_ANSWER = -1
"""in the place of a class in the predictions: the output for this image is not finite"""

Rate = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bits = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]


class _Part(BaseModel):
    # Newer minor versions may add keys, which this version ignores.
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class LeftOut(_Part):
    """Files of the hold-out that were not read, for one reason."""

    reason: str
    count: Annotated[int, Field(ge=1)]
    first: str
    """path of the first one, relative to the hold-out"""


class Dataset(_Part):
    """The images that every artifact was measured on."""

    kind: Literal["holdout", "synthetic"]
    n: Annotated[int, Field(ge=1)]
    name: str
    sha256: Digest | None = None
    """SHA-256 of the network input and the labels, in order; reports with equal digests can be paired image by image"""
    split: str | None = None
    """which part of the data set: "train", "validation", "test" or its own name; null if it has no parts"""
    fit: Literal["exact", "stretch", "center-crop"] | None = None
    """what was done with pictures of another size; null for synthetic images, built-in ones, and in older reports"""
    matched_by: Literal["name", "WordNet id", "number"] | None = None
    """how labels were assigned to the teacher's classes. number: the hold-out has no class names, and its numbers were
    taken in the order of the teacher's classes; null for synthetic images"""
    left_out: tuple[LeftOut, ...] = ()
    duplicates: Annotated[int, Field(ge=0)] | None = None
    """images that are exact copies of others, as the network sees them; null for synthetic images"""
    contradictory: Annotated[int, Field(ge=0)] | None = None
    """images that have an exact copy with another label; null for synthetic images"""
    doubts: tuple[str, ...] = ()
    """signs that labels and images do not belong together, which the user overrode"""


class Network(_Part):
    """The teacher, or the FP32 student in PyTorch."""

    top1: Rate | None = None
    params: Annotated[int, Field(ge=0)]
    agreement: Rate | None = None
    """with the teacher; null for the teacher itself"""


class Paired(_Part):
    """Counts of images by correctness of reference and artifact, measured on the same n images."""

    n: Annotated[int, Field(ge=1)]
    both_right: Annotated[int, Field(ge=0)]
    lost: Annotated[int, Field(ge=0)]
    """the reference was right and the artifact wrong"""
    gained: Annotated[int, Field(ge=0)]
    """the reference was wrong and the artifact right"""
    both_wrong: Annotated[int, Field(ge=0)]


class PairedCounts(_Part):
    """Paired counts against both references; null without ground truth."""

    vs_fp32: Paired | None = None
    vs_teacher: Paired | None = None


class Latency(_Part):
    """Milliseconds at batch 1."""

    p50: Annotated[float, Field(gt=0)]
    p95: Annotated[float, Field(gt=0)]


class ClassCounts(_Part):
    """Paired counts against the FP32 student on the images of one class."""

    label: str
    n: Annotated[int, Field(ge=0)]
    lost: Annotated[int, Field(ge=0)]
    gained: Annotated[int, Field(ge=0)]


class Earlier(_Part):
    """Origin of a measurement that is kept from an earlier report, because this machine cannot measure the file."""

    created: str
    """when it was measured: UTC, ISO 8601"""
    hardware: dict[str, Any] = Field(default_factory=dict)
    """the machine that measured it"""


class ArtifactReport(_Part):
    """One exported file, measured in its runtime."""

    name: str
    """precision and target, for example "fp32" or "int8.cpu" """
    file: str
    """path inside the run folder"""
    target: str
    precision: str
    runtime: str
    status: Literal["measured", "not_run", "unavailable"]
    reason: str | None = None
    """why it was not measured"""
    precision_verified: bool = False
    """the runtime itself reported this precision"""
    simulated: bool = False
    """it is for another device: this machine computed the graph as it is written, without that device's kernels; or it
    is an FP16 file of OpenVINO or LiteRT, computed in float32"""
    top1: Rate | None = None
    agreement: Rate | None = None
    """with the teacher"""
    max_abs_diff: float | None = None
    """largest absolute logit difference from the torch student"""
    latency_ms: Latency | None = None
    threads: int | None = None
    speedup_vs_fp32: float | None = None
    """against FP32 in the same runtime; null for engines, whose FP32 is measured on another device"""
    size_bytes: int | None = None
    sha256: Digest | None = None
    int8_coverage: Rate | None = None
    """fraction of the eligible convolutions and matrix products that actually run in INT8"""
    correct: Bits | None = None
    """one bit per image, in hold-out order: 1 if the top-1 prediction is correct; hexadecimal, the first image in the
    highest bit, padded with zeros to a whole byte (numpy.packbits); null without ground truth"""
    paired: PairedCounts = PairedCounts()
    paired_synthetic: PairedCounts = PairedCounts()
    """on synthetic images: the same counts with the teacher's prediction in the place of the truth; null on a hold-out,
    and in older reports"""
    per_class: tuple[ClassCounts, ...] = ()
    earlier: Earlier | None = None
    """null: measured together with the rest of the report"""


class Report(_Part):
    """The contents of `report.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True, use_attribute_docstrings=True)

    schema_: Literal["nayer-edge/report/1"] = Field(default=REPORT_SCHEMA, alias="schema")
    run: str
    dataset: Dataset
    teacher: Network
    student: Network
    artifacts: tuple[ArtifactReport, ...]
    predictions_sha256: Digest
    hardware: dict[str, Any] = Field(default_factory=dict)
    created: str = ""


def read_report(path: Path, again: str) -> Report:
    """Reads a `report.json`.

    Args:
        again: the fix shown if the report is invalid: the command that makes it again.

    Raises:
        UsageError: a newer version of nayer-edge wrote it.
        IntegrityError: it is missing or damaged.
    """
    values = read_json(path, "a report")
    stated = values.get("schema") if isinstance(values, dict) else None
    family, _, version = REPORT_SCHEMA.rpartition("/")
    match = re.fullmatch(rf"{re.escape(family)}/(\d{{1,9}})", stated) if isinstance(stated, str) else None
    if match and int(match[1]) > int(version):
        raise UsageError(
            f"{path} has the schema {stated}, but this version reads {REPORT_SCHEMA}.",
            "A newer nayer-edge wrote it.",
            "Update this installation of nayer-edge.",
        )
    try:
        return Report.model_validate(values)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        reason = f"{where}: {error.errors()[0]['msg']}."
        raise IntegrityError(f"{path} is not a valid report.", reason, again) from error
