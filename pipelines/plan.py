"""Plans a run: determines which steps are stale and why, before anything is written."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nayer_edge.data.digest import digest_of_data
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.labels.class_names import labels_beside
from nayer_edge.models.names import parse, published_weights
from nayer_edge.storage.files import digest_of
from nayer_edge.storage.run_folder import RunFolder, StepRecord

from .recipes.loading import BUILT_IN_DATA, recipe_of
from .recipes.renamed import with_current_keys
from .recipes.schema import Recipe
from .recipes.settings import is_default
from .steps import DECAY_STATE, STEPS, Step, settings_of

NAMED_FILES = {"teacher.weights": True, "teach.data": False, "validate.data": True}
"""recipe keys that name the user's files, and whether to hash the contents of a folder (training images may be too many
to read every time)"""

BANK_DIGEST = "student.bank.sha256"
"""setting of a step that takes over another run's files: `bank_digest`"""
TAKEN = ("bank", "generator", "generator card", "images put aside")
"""roles of the files that a run takes over from the run that `student.bank` names"""

LENGTH = ("epochs", "warmup_epochs", "decay_epochs")
"""keys of [distill] that a run with a constant schedule may change"""

Digest: TypeAlias = Callable[[Path, bool], str | None]
"""(path, whether to hash the contents of a folder) → SHA-256; None if there is no such file"""


@dataclass(frozen=True)
class Plan:
    """The plan for one step of a run.

    Attributes:
        step: its row of the table.
        settings: the recipe values that it reads, as they will be recorded.
        record: the record of its finished result; None if there is none.
        changes: "key: old → new" for each setting that has changed since its result or checkpoint was made.
        extends: the only change is that the distillation becomes longer; its finished result is continued.
    """

    step: Step
    settings: dict[str, Any]
    record: StepRecord | None
    changes: tuple[str, ...]
    extends: bool = False

    @property
    def stale(self) -> bool:
        """Whether the settings require a run. If not, an input that changes during the run still may."""
        return self.record is None or bool(self.changes)


def read_once() -> Digest:
    """A cached function for the digests of the user's files, so that each file is read only once."""

    @functools.cache
    def digest(path: Path, contents: bool) -> str | None:
        return digest_of_data(path, contents=contents) if path.exists() else None

    return digest


def bank_digest(root: Path) -> str | None:
    """Identifies what a run takes over from a finished run; None if there is no such run."""
    try:
        run = RunFolder.open(root)
        files = run.artifact("student").files
    except (UsageError, IntegrityError):
        return None
    return digest_of({role: run.manifest.files[name].sha256 for role, name in files.items() if role in TAKEN})


def plan_steps(recipe: Recipe, steps: tuple[Step, ...], run: RunFolder | None, digest: Digest) -> tuple[Plan, ...]:
    """One plan for each step.

    Args:
        run: the existing run; None if there is none or nothing is kept.
        digest: computes the digests of the files named in the recipe.

    Raises:
        UsageError: a file named in the recipe cannot be read.
    """
    values = _values(recipe)
    held = recipe_of(run.manifest.recipe, run.root).student.bank if run and recipe.student.bank else None
    plans = []
    for step in steps:
        record = run.manifest.steps.get(step.name) if run else None
        settings = _settings(step, values, record, digest, held)
        changes: list[str] = []
        extends = False
        if record is not None:
            # If nothing changed, keep the recorded settings: they may lack a key that was added later.
            changes = changes_of(record.settings, settings)
            continuable = run is not None and DECAY_STATE in run.manifest.files
            extends = bool(changes) and step.trains and continuable and _only_longer(record, settings)
            settings = settings if changes else record.settings
        elif run is not None and any(run.path(name).is_file() for name in step.scratch):
            changes = _changes_since_begun(step, values, run, digest)
        plans.append(Plan(step, settings, record, tuple(changes), extends))
    return tuple(plans)


def _values(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", by_alias=True)


def _changes_since_begun(step: Step, values: dict[str, Any], run: RunFolder, digest: Digest) -> list[str]:
    """The changes since an interrupted step started that make its checkpoint unusable."""
    before = _values(recipe_of(run.manifest.recipe, run.root))
    decisive = [part for part in STEPS if part.name in (*step.inputs, step.name)]
    changed = []
    for part in decisive:
        old, new = _settings(part, before, None, digest), _settings(part, values, None, digest)
        if old.get(BANK_DIGEST, "") is None and new.get(BANK_DIGEST) is not None:
            # The folder that the run started with is elsewhere now. The checkpoint identifies its images.
            old[BANK_DIGEST] = new[BANK_DIGEST]
        # A run with a constant schedule can be made longer or shorter at any time.
        changed += [] if _without_length(old) == _without_length(new) else changes_of(old, new)
    return list(dict.fromkeys(changed))


def _only_longer(record: StepRecord, now: dict[str, Any]) -> bool:
    """Whether the length is the only change, and the finished run has fewer epochs before its decay.

    A run that was adapted to its machine has another length than its settings ask for; its numbers say which.
    """
    before = record.settings
    if "distill" not in now or changes_of(_without_length(before), _without_length(now)):
        return False
    length = {key: int(record.numbers.get(key.replace("_", " ")) or before["distill"][key]) for key in LENGTH}
    return now["distill"]["epochs"] - now["distill"]["decay_epochs"] > length["epochs"] - length["decay_epochs"]


def _without_length(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the length of a distillation with a constant schedule."""
    distill = settings.get("distill")
    if not distill or distill.get("schedule") != "constant":
        return settings
    return {**settings, "distill": {key: value for key, value in distill.items() if key not in LENGTH}}


def _settings(
    step: Step, values: dict[str, Any], record: StepRecord | None, digest: Digest, held: str | None = None
) -> dict[str, Any]:
    """The recipe values that a step reads. Files are identified by their digest, not their path; if a file is missing,
    for example on another machine, the digest recorded by the finished step is used.

    Args:
        held: the run that the step's result started from: its bank may have grown since.
    """
    found = copy.deepcopy(settings_of(step, values))

    def count(name: str, path: Path | None, contents: bool = True) -> None:
        now = digest(path, contents) if path else None
        before = record.settings.get(f"{name}.sha256") if record else None
        found[f"{name}.sha256"] = before if now is None else now

    for name, contents in NAMED_FILES.items():
        section, _, key = name.partition(".")
        value = (found.get(section) or {}).get(key)
        if value is not None and value not in BUILT_IN_DATA and published_weights(value) is None:
            del found[section][key]
            count(name, Path(value), contents)
    encoder = Path(str((found.get("lte") or {}).get("encoder") or ""))
    if encoder.is_absolute():
        del found["lte"]["encoder"]
        count("lte.encoder", encoder)
        if names := labels_beside(encoder):
            count("lte.labels", names)
    for section in ("teacher", "student"):
        if section in found and (model := parse(found[section]["model"])).local:
            found[section]["model"] = model.portable
            count(f"{section}.model", model.path)
    if "student" in found and (bank := found["student"].pop("bank")) is not None:
        before = record.settings.get(BANK_DIGEST) if record else None
        found[BANK_DIGEST] = before if before and bank == held else bank_digest(Path(bank)) or before
    return found


def changes_of(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """ "key: old → new" for every difference between nested settings. A key that was added to recipes later does not
    count while it has its default value, and neither does a renamed key."""
    found, before = [], with_current_keys(before, prefix=prefix)
    for key in sorted(set(before) | set(now)):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes_of(old, new, f"{name}.")
        elif old != new and (key in before or not is_default(name, new)):
            found.append(f"{name}: {old} → {new}")
    return found
