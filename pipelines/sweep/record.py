"""`sweep.json`: the plan of a sweep, what became of every student, and the answer."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models.names import located, parse
from nayer_edge.storage.files import read_json, write_json

from ..gate.judgement import FP32, Outcome

SWEEP_SCHEMA = "nayer-edge/sweep/1"
RECORD = "sweep.json"
PAGE = "sweep.html"
BANK = "bank"
"""folder of the run that makes the bank, where neither an existing run nor a student does"""

Rate = Annotated[float, Field(ge=0, le=1)]
Way = Literal["time", "larger", "limit", "quantization", "images"]
State = Literal["waiting", "training", "stopped", "passes", "refused", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)


class Bounds(_Part):
    """A rate with its two-sided Clopper–Pearson interval at the policy's confidence."""

    value: Rate
    low: Rate
    high: Rate
    n: Annotated[int, Field(ge=1)]
    """number of images"""


class Share(_Part):
    """One share of the time that a student got."""

    round: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(ge=0)]
    """what it got"""
    spent: Annotated[float, Field(ge=0)]
    """what it took: training (of the student that makes the bank: after that), export, validation"""
    trained_seconds: Annotated[float, Field(ge=0)]
    """seconds of training in all shares so far, after the bank was filled"""
    agreement: Bounds
    """of the FP32 student with the teacher, on the images that all students share"""
    verdict: Outcome
    """of the gate"""
    finished: str
    """UTC, ISO 8601"""


class Measured(_Part):
    """An artifact of a student, from its report.json."""

    name: str
    accuracy: Bounds | None = None
    """top-1 on the labelled hold-out; null without one"""
    agreement: Bounds | None = None
    """with the teacher, on the images of the report"""
    p95_ms: float | None = None
    size_bytes: int | None = None
    verdict: Outcome | None = None
    """null: the policy does not name this artifact"""


class Missed(_Part):
    """A check of the gate that did not pass."""

    check: str
    artifact: str
    observed: float | None
    bound: float | None
    limit: float | None
    verdict: Literal["fail", "inconclusive"]
    detail: str


class Target(_Part):
    """The planned sizes of a student's run, saved before the share starts, so that a repeated command grants no time
    twice."""

    round: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(ge=0)]
    sections: dict[str, dict[str, Any]]
    """sections of its recipe"""


class StudentRecord(_Part):
    """One student of the sweep."""

    model: str
    """as student.model"""
    folder: str
    """its run folder, inside the sweep's"""
    state: State = "waiting"
    """refused: it cannot be built for this input; failed: an error ended its run, or this machine lacks what it needs.
    The next call tries both again"""
    reason: str = ""
    """why it was stopped, refused, or failed"""
    ended: str = ""
    """when it was stopped or passed: UTC, ISO 8601"""
    params: int | None = None
    macs: int | None = None
    int8_bytes: int | None = None
    """size of its INT8 graph, measured with untrained weights or computed from them; the sweep sorts by it until the
    student is exported"""
    target: Target | None = None
    shares: list[Share] = []
    artifacts: list[Measured] = []
    missed: list[Missed] = []
    way: Way | None = None
    """what would help a student that does not pass: more time, a larger student, another limit, less loss in INT8, or
    more images to decide; null: unknown"""

    def located(self, root: Path) -> str:
        """Its model with an absolute path, if it is a file or folder.

        Args:
            root: the sweep's folder. Former versions wrote names relative to the current folder.
        """
        found = located(self.model, root)
        typed = located(self.model, Path.cwd())
        return typed if parse(found).path is None and parse(typed).path is not None else found

    @property
    def open(self) -> bool:
        """Whether it may still get time."""
        return self.state in ("waiting", "training")

    @property
    def shipped(self) -> Measured | None:
        """The artifact that the policy is about: the first one that it names, but FP32 only if it names no other; the
        first one of all if it names none."""
        named = [each for each in self.artifacts if each.verdict is not None]
        others = [each for each in named if each.name != FP32]
        return next(iter([*others, *named, *self.artifacts]), None)

    @property
    def size(self) -> float:
        """What the sweep minimises: the bytes of that artifact; before it is exported, those that are expected."""
        measured = self.shipped.size_bytes if self.shipped else None
        return float(measured or self.int8_bytes or "inf")

    @property
    def order(self) -> tuple[float, str]:
        """Sorts students by size."""
        return self.size, self.model


class Maker(_Part):
    """The student whose run makes the bank of a sweep that has none, and its plan."""

    model: str
    folder: str
    seconds: Annotated[float, Field(gt=0)]
    """time of that run, which is the student's first share"""
    image_time: Rate
    """fraction of that time for images"""


class Bank(_Part):
    """The run whose images all students start with."""

    run: str
    """its folder, relative to the sweep's"""
    name: str
    digest: str
    """identifies its images and generator"""
    images: int | None = None
    changed: bool = False
    """whether it has changed since the first student began: those that began later started with other images"""


class Sweep(_Part):
    """The contents of `sweep.json`."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True, use_attribute_docstrings=True)

    schema_: Literal["nayer-edge/sweep/1"] = Field(default=SWEEP_SCHEMA, alias="schema")
    name: str
    recipe: dict[str, Any]
    """the recipe that all students share, except for the model and the time"""
    bank: Bank | None = None
    maker: Maker | None = None
    """null: another run makes the bank"""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """time for the students; null until the bank is there and none was given"""
    rounds: Annotated[int, Field(ge=1)] = 1
    """rounds of successive halving"""
    done: Annotated[int, Field(ge=0)] = 0
    """finished rounds"""
    spent: Annotated[float, Field(ge=0)] = 0.0
    """seconds that the students took"""
    students: list[StudentRecord]
    images: str = ""
    """what the artifacts were measured on"""
    kind: Literal["holdout", "synthetic"] | None = None
    teacher_params: int | None = None
    teacher_accuracy: Rate | None = None
    verdict: Outcome | None = None
    """pass: a student passes; null: the sweep is not finished"""
    answer: str | None = None
    """the smallest student that passes"""
    sentence: str = ""
    """the answer in words"""
    command: str = ""
    """what to type next"""
    hardware: dict[str, Any] = {}
    created: str = ""

    def student(self, model: str) -> StudentRecord:
        """The student of this name."""
        return next(each for each in self.students if each.model == model)


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_sweep(folder: Path) -> Sweep:
    """Reads the record of a sweep.

    Raises:
        UsageError: there is none.
        IntegrityError: it is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UsageError(f"{folder} is not the folder of a sweep: it has no {RECORD}.")
    try:
        return Sweep.model_validate(read_json(path, "the record of a sweep"))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise IntegrityError(
            f"{path} is not a valid record of a sweep.",
            why=f"{where}: {error.errors()[0]['msg']}.",
            fix="Choose another --out, or start over with --fresh.",
        ) from error


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Writes the record of a sweep."""
    write_json(folder / RECORD, sweep.model_dump(mode="json", by_alias=True))
