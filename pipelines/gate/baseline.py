"""The release before: a run is paired with it image by image, in the standard library, because the gate has no numpy.

Two reports whose hold-outs have the same digest speak of the same images in the same order, so the stored predictions
of both say which images were lost and gained since. Reports of different images are refused and not compared loosely:
how much harder one set of images is than another is in no bound that could be computed from their counts.
"""

from __future__ import annotations

import os
import shlex
import sys
import zipfile
from array import array
from collections.abc import Iterable
from pathlib import Path

from nayer_edge.data.npy import DAMAGED, open_member
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.files import sha256_of
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

from ..measurements import PREDICTIONS_PATH, REPORT_PATH, Paired, Report, read_report
from ..recipes.checking import parse_toml
from .judgement import Baseline
from .policy import make_references

LABELS = "labels"


def load_baseline(references: Path, run: RunFolder, report: Report, artifacts: Iterable[str]) -> Baseline:
    """Pairs artefacts of a run with those of the run that a references file names.

    Args:
        references: `references.toml`.
        run: the run to judge; its files are known to be intact.
        report: its report.
        artifacts: names of those that the policy judges; one that either side has not measured is left out.

    Raises:
        UsageError: the references do not hold, there is no such baseline, or it was measured on other images (exit 2).
        IntegrityError: the baseline is damaged, or not the one that the references' digest names (exit 4).
    """
    named = make_references(parse_toml(references, "references"), str(references)).baseline
    folder = references.parent / Path(os.path.expandvars(named.run)).expanduser()
    path = _report_path(folder, references)
    _require_untouched(folder, path, named.sha256, references)
    before = read_report(path, f"Type: nayer-edge validate {shlex.quote(str(folder))}")
    predictions = path.with_name(Path(PREDICTIONS_PATH).name)
    if not predictions.is_file() or sha256_of(predictions) != before.predictions_sha256:
        change = "differs from" if predictions.is_file() else "is missing beside"
        raise IntegrityError(
            f"{predictions} {change} the baseline's report.",
            why="Its SHA-256 is in the report, and is another.",
            fix="Fetch the baseline again from where it was made.",
        )
    _require_same_images(run, report, folder, before)
    both = {artifact.name for artifact in before.artifacts if artifact.status == "measured"}
    both &= {artifact.name for artifact in report.artifacts if artifact.status == "measured"}
    wanted = [name for name in dict.fromkeys(artifacts) if name in both]
    now_first = first_choices(run.path(PREDICTIONS_PATH), [LABELS, *wanted], report.dataset.n)
    before_first = first_choices(predictions, [LABELS, *wanted], report.dataset.n)
    if now_first[LABELS] != before_first[LABELS]:
        raise IntegrityError(
            f"{predictions} holds other labels than {run.path(PREDICTIONS_PATH)}, though both name the same images.",
            fix="Validate both runs again.",
        )
    labels = now_first[LABELS]
    counts = {name: _counts(labels, before_first[name], now_first[name]) for name in wanted}
    return Baseline(folder.resolve().name, sha256_of(path), counts)


def _report_path(folder: Path, references: Path) -> Path:
    for name in (REPORT_PATH, Path(REPORT_PATH).name):
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        raise UsageError(
            f"There is no baseline at {folder}.",
            why=f"{references} names it; relative paths start at the folder of that file.",
            fix="Fetch the last release's run folder there, or mend [baseline] run.",
        )
    raise UsageError(
        f"The baseline {folder} has not been validated.",
        why=f"It holds neither {REPORT_PATH} nor {Path(REPORT_PATH).name}.",
        fix=f"Type: nayer-edge validate {shlex.quote(str(folder))}",
    )


def _require_untouched(folder: Path, path: Path, expected: str | None, references: Path) -> None:
    """The report is the one that the references name, and, in a run folder, the one that the manifest names."""
    if expected is not None and (actual := sha256_of(path)) != expected:
        raise IntegrityError(
            f"{path} is not the baseline that {references} names.",
            why=f"Its SHA-256 is {actual}, expected is {expected}.",
            fix="Fetch the baseline again, or, if it was replaced on purpose, write the new SHA-256 there.",
        )
    if (folder / MANIFEST).is_file():
        held = RunFolder.open(folder)
        held.require_intact([name for name in (REPORT_PATH, PREDICTIONS_PATH) if name in held.manifest.files])
        if REPORT_PATH not in held.manifest.files:
            raise IntegrityError(
                f"{path} is not in the manifest of {folder}, so nobody answers for it.",
                fix=f"Type: nayer-edge validate {shlex.quote(str(folder))}",
            )


def _require_same_images(run: RunFolder, report: Report, folder: Path, before: Report) -> None:
    again = (
        f"Validate both on the same labelled images: nayer-edge validate {shlex.quote(str(run.root))} --data HOLDOUT, "
        f"and nayer-edge validate {shlex.quote(str(folder))} --data HOLDOUT"
    )
    for place, each in ((run.root, report), (folder, before)):
        if each.dataset.kind == "synthetic":
            raise UsageError(
                f"{place} was measured on synthetic images, so a release cannot be compared with the one before.",
                why="Every run draws images of its own, and nobody knows what they truly show.",
                fix=again,
            )
    if report.dataset.sha256 is None or report.dataset.sha256 != before.dataset.sha256:
        raise UsageError(
            f"{run.root} and its baseline {folder} were measured on different images.",
            why=f"{report.dataset.n:,} of {report.dataset.name} here, {before.dataset.n:,} of {before.dataset.name} "
            "there, and their digests differ. A drop between different images cannot be told from their difficulty.",
            fix=again,
        )


def first_choices(path: Path, names: Iterable[str], n: int) -> dict[str, array[int]]:
    """The likeliest class of each of n images, for labels as for ranks, from `predictions.npz`.

    Raises:
        IntegrityError: an array is missing or is not n rows of int32.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                stream, header = open_member(archive, name)
                with stream:
                    if header.dtype != "<i4" or header.fortran or not header.shape or header.shape[0] != n:
                        raise ValueError(f"'{name}' is {header.dtype} of shape {header.shape}, not {n} rows of int32")
                    width = header.data_bytes // (4 * n)
                    if not 1 <= width <= 5:
                        raise ValueError(f"'{name}' has the shape {header.shape}")
                    values = array("i")
                    values.frombytes(stream.read())
                if sys.byteorder == "big":
                    values.byteswap()
                found[name] = values[::width]
    except DAMAGED as error:
        raise IntegrityError(
            f"{path} is not readable as predictions.", why=f"{error}", fix="Validate the run again."
        ) from error
    return found


def _counts(labels: array[int], before: array[int], now: array[int]) -> Paired:
    """Who was right, image by image; the baseline is the reference."""
    both_right = lost = gained = 0
    for label, old, new in zip(labels, before, now, strict=True):
        both_right += old == label == new
        lost += old == label != new
        gained += old != label == new
    n = len(labels)
    return Paired(n=n, both_right=both_right, lost=lost, gained=gained, both_wrong=n - both_right - lost - gained)
