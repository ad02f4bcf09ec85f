"""Pairs a run with the previous release, image by image.

Two reports whose hold-outs have the same digest saw the same images in the same order, and each states which of them
its artifacts classified correctly, one bit per image. Reports of different images are refused rather than compared
loosely: no bound computed from their counts says how much harder one set of images is than another.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.files import expanded, sha256_of, unix_digest
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

from ..measurements import REPORT_PATH, ArtifactReport, Paired, Report, read_report
from ..recipes.checking import parse_toml
from ..recipes.policy import make_references
from .judgement import Baseline


def load_baseline(references: Path, run: RunFolder, report: Report, artifacts: Iterable[str]) -> Baseline:
    """Pairs artifacts of a run with those of the run that a references file names.

    Args:
        references: `references.toml`.
        run: the run to judge; its files are known to be intact.
        report: its report.
        artifacts: names of those that the policy judges; one that either side has not measured is left out.

    Raises:
        UsageError: invalid references, no such baseline, or one measured on other images or by a version that did not
            store which images were classified correctly (exit 2).
        IntegrityError: the baseline is damaged, or not the one whose digest the references state (exit 4).
    """
    named = make_references(parse_toml(references, "references"), str(references)).baseline
    folder = references.parent / expanded(os.path.expandvars(named.run))
    path = _report_path(folder, references)
    _require_untouched(folder, path, named.sha256, references)
    before = read_report(path, f"Type: nayer-edge validate {shlex.quote(str(folder))}")
    _require_same_images(run, report, folder, before)
    measured_before, measured_now = _measured(before), _measured(report)
    counts = {
        name: _paired(
            _correct(measured_before[name], before, folder), _correct(measured_now[name], report, run.root), report
        )
        for name in dict.fromkeys(artifacts)
        if name in measured_before and name in measured_now
    }
    return Baseline(folder.resolve().name, unix_digest(path), counts)


def _report_path(folder: Path, references: Path) -> Path:
    for name in (REPORT_PATH, Path(REPORT_PATH).name):
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        raise UsageError(
            f"There is no baseline at {folder}.",
            why=f"{references} names it; relative paths start at the folder of that file.",
            fix="Fetch the last release's run folder there, or correct [baseline] run.",
        )
    raise UsageError(
        f"The baseline {folder} has not been validated.",
        why=f"It holds neither {REPORT_PATH} nor {Path(REPORT_PATH).name}.",
        fix=f"Type: nayer-edge validate {shlex.quote(str(folder))}",
    )


def _require_untouched(folder: Path, path: Path, expected: str | None, references: Path) -> None:
    """The report is the one that the references name, and, in a run folder, the one that the manifest names."""
    actual = sha256_of(path)
    # A report in a repository may have been checked out with Windows' line ends.
    if expected is not None and expected not in (actual, unix_digest(path)):
        raise IntegrityError(
            f"{path} is not the baseline that {references} names.",
            why=f"Its SHA-256 is {actual}, expected is {expected}.",
            fix="Fetch the baseline again, or, if it was replaced on purpose, write the new SHA-256 there.",
        )
    if (folder / MANIFEST).is_file():
        held = RunFolder.open(folder)
        if REPORT_PATH not in held.manifest.files:
            raise IntegrityError(
                f"{path} is not listed in the manifest of {folder} and cannot be trusted.",
                fix=f"Type: nayer-edge validate {shlex.quote(str(folder))}",
            )
        if path != folder / REPORT_PATH or held.manifest.files[REPORT_PATH].sha256 != unix_digest(path):
            held.require_intact([REPORT_PATH])


def _require_same_images(run: RunFolder, report: Report, folder: Path, before: Report) -> None:
    again = (
        f"Validate both on the same labelled images: nayer-edge validate {shlex.quote(str(run.root))} --data HOLDOUT, "
        f"and nayer-edge validate {shlex.quote(str(folder))} --data HOLDOUT"
    )
    for place, each in ((run.root, report), (folder, before)):
        if each.dataset.kind == "synthetic":
            raise UsageError(
                f"{place} was measured on synthetic images, so releases cannot be compared on it.",
                why="Every run generates its own images, and they have no true labels.",
                fix=again,
            )
    fits = report.dataset.fit, before.dataset.fit
    resized = (
        f" Pictures of other sizes: {fits[0]} here, {fits[1]} there." if None not in fits and fits[0] != fits[1] else ""
    )
    if report.dataset.sha256 is None or report.dataset.sha256 != before.dataset.sha256:
        raise UsageError(
            f"{run.root} and its baseline {folder} were measured on different images.",
            why=f"{report.dataset.n:,} of {report.dataset.name} here, {before.dataset.n:,} of {before.dataset.name} "
            f"there, and their digests differ.{resized} A drop between different images may only mean that one set is "
            "harder.",
            fix=again,
        )


def _measured(report: Report) -> dict[str, ArtifactReport]:
    return {artifact.name: artifact for artifact in report.artifacts if artifact.status == "measured"}


def _correct(artifact: ArtifactReport, report: Report, folder: Path) -> int:
    """The images that an artifact classified correctly, as the bits of one number; the first image is the highest.

    Raises:
        UsageError: an older version wrote the report, without them.
        IntegrityError: they are not one bit per image, or contradict the accuracy beside them.
    """
    if artifact.correct is None:
        raise UsageError(
            f"The report of {folder} does not say which images {artifact.name} classified correctly.",
            why="An older version of nayer-edge wrote it, or another tool.",
            fix=_measure_again(folder),
        )
    n, bits = report.dataset.n, int(artifact.correct, 16)
    unused = -n % 8
    whole = 4 * len(artifact.correct) == n + unused and bits % 2**unused == 0
    if not whole or (artifact.top1 is not None and bits.bit_count() != round(artifact.top1 * n)):
        raise IntegrityError(
            f"The report of {folder} contradicts itself.",
            why=f"Its results per image for {artifact.name} do not match its {n:,} images and its accuracy.",
            fix=_measure_again(folder),
        )
    return bits


def _measure_again(folder: Path) -> str:
    """What to type; a step whose settings have not changed is kept, so they have to change in between."""
    if not (folder / MANIFEST).is_file():
        return f"Validate its run with this version, and copy {REPORT_PATH} to {folder}."
    command = f"nayer-edge validate {shlex.quote(str(folder))}"
    return f"Measure it again. Type: {command} --synthetic   and then: {command} --data HOLDOUT"


def _paired(before: int, now: int, report: Report) -> Paired:
    """Counts of images by who was right; the baseline is the reference."""
    both, either, n = (before & now).bit_count(), (before | now).bit_count(), report.dataset.n
    lost, gained = before.bit_count() - both, now.bit_count() - both
    return Paired(n=n, both_right=both, lost=lost, gained=gained, both_wrong=n - either)
