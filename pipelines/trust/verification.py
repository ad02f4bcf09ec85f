"""Verifies the integrity of a run: files against the manifest; separates leftovers of interrupted steps from unknown
files."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from nayer_edge.errors import IntegrityError
from nayer_edge.storage.files import TEMPORARY, sha256_of
from nayer_edge.storage.run_folder import MANIFEST, SIGNATURE, RunFolder

from ..steps import STEPS


@dataclass(frozen=True)
class Findings:
    """The result of checking a run folder.

    Attributes:
        files: number of files in the manifest.
        manifest_sha256: SHA-256 of `manifest.json`, for a later `--expect`.
        signed: there is a signature (not checked here).
        problems: one sentence for each altered, missing or unknown file.
        unfinished: steps that were interrupted.
        left: their leftover files, which are not in the manifest.
    """

    files: int
    manifest_sha256: str
    signed: bool
    problems: tuple[str, ...]
    unfinished: tuple[str, ...]
    left: tuple[str, ...]


def examine(run: RunFolder) -> Findings:
    """Hashes every file of the manifest again, and looks for files that are not in it.

    Raises:
        IntegrityError: the manifest names a path outside the folder.
    """
    problems, left, unfinished = run.problems(), [], set()
    for name in run.unexpected_files():
        step = _left_by(name, run)
        if step is None:
            problems.append(f"{name} is not in the manifest")
        else:
            left.append(name)
            unfinished.add(step)
    return Findings(
        files=len(run.manifest.files),
        manifest_sha256=sha256_of(run.root / MANIFEST),
        signed=(run.root / SIGNATURE).is_file(),
        problems=tuple(problems),
        unfinished=tuple(sorted(unfinished)),
        left=tuple(left),
    )


def require_expected(findings: Findings, digest: str) -> None:
    """Raises IntegrityError if the manifest does not have the expected SHA-256."""
    if findings.manifest_sha256 != digest.strip().lower():
        raise IntegrityError(
            "The manifest is not the expected one.",
            why=f"Its SHA-256 is {findings.manifest_sha256}; expected was {digest.strip().lower()}.",
            fix="Fetch the folder again from where it was made. If the run was repeated since, use its new digest.",
        )


def continuation(run: RunFolder) -> str:
    """What to type to finish an interrupted run."""
    return f"nayer-edge run {run.typed}"


def _left_by(name: str, run: RunFolder) -> str | None:
    """The step that may have left this file when it was interrupted; None if there is none."""
    path = run.root / name
    if path.is_symlink() or not path.is_file():
        return None
    pure = PurePosixPath(name)
    killed_write = TEMPORARY.fullmatch(pure.name)
    if killed_write:
        # ".student.json.ab12cd34.tmp" is an interrupted write of "student.json".
        name = str(pure.with_name(pure.name[1:].rsplit(".", 2)[0]))
        if name in (MANIFEST, SIGNATURE):
            return "manifest"
    for step in STEPS:
        patterns = (*step.writes, *step.scratch) if step.name not in run.manifest.steps else step.scratch
        if _matches(name, patterns) or (killed_write and _matches(name, (*step.writes, *step.scratch))):
            return step.name
    return None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path matches one of the patterns; `*` does not match "/"."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)
