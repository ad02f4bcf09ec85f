"""A folder with one folder of pictures per class, or one such folder for each split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.left_out import LeftOutFiles, files_below, visible
from nayer_edge.data.pictures import SUFFIXES, Mismatches, decode, require_grey_or_colour
from nayer_edge.data.splits import NO_SPLIT, Purpose, choose, split_in
from nayer_edge.data.stream import ImageStream
from nayer_edge.errors import UsageError
from nayer_edge.labels.matching import match_names


def open_folder(
    path: Path,
    spec: InputSpec,
    classes: Sequence[str],
    fit: Fit,
    purpose: Purpose = "holdout",
    asked: str | None = None,
) -> ImageStream:
    """A folder of class folders, as torchvision's ImageFolder reads it, or of one folder of these for each split.

    Class folders are named like the class (see `match_names`). Hidden files and folders are no images.

    Args:
        purpose, asked: see `splits.choose`.

    Raises:
        UsageError: folders that are not classes, several splits and no choice, no pictures, or pictures that do not
            match the model's input.
    """
    left_out = LeftOutFiles(path)
    root, split = _split_folder(path, classes, left_out, purpose, asked)
    entries = visible(root, left_out)
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        raise UsageError(
            f"{root} is empty." if not entries else f"{root} has no class folders.",
            why="A hold-out of pictures is a folder with one folder of pictures per class.",
            fix=f"Name those like the classes: {', '.join(list(classes)[:5])}, …",
        )
    matched = match_names([folder.name for folder in folders], classes, f"The class folders in {root}")
    for entry in entries:
        if not entry.is_dir():
            left_out.add("outside the class folders", entry)
    files = [(file, matched.numbers[folder.name]) for folder in folders for file in sorted(_pictures(folder, left_out))]
    if not files:
        raise UsageError(f"The class folders in {root} hold no images.", fix=f"Known: {', '.join(SUFFIXES)}.")
    require_grey_or_colour(spec, root)
    mismatches = Mismatches(spec, fit)
    for file, _ in files:
        mismatches.check(file, str(file.relative_to(root)))
    mismatches.raise_if_any(len(files), root)

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), size):
            yield np.stack([_decode_file(file, spec, fit) for file, _ in files[start : start + size]])

    labels = np.array([label for _, label in files], dtype=np.int64)
    return ImageStream(path.name, labels, batches, matched_by=matched.by, split=split, left_out=left_out.found())


def _split_folder(
    path: Path, classes: Sequence[str], left_out: LeftOutFiles, purpose: Purpose, asked: str | None
) -> tuple[Path, str | None]:
    """The folder that holds the class folders, and the split that its name states."""
    folders = [entry for entry in visible(path, LeftOutFiles(path)) if entry.is_dir()]
    splits = {folder: split for folder in folders if (split := split_in(folder.name)) != NO_SPLIT}
    others = [folder.name for folder in folders if folder not in splits]
    sure = asked is not None or not others or len(set(splits.values())) > 1
    classes_here = all(folder.name in classes for folder in splits) or any(name in classes for name in others)
    if not splits or classes_here or not sure:
        own = split_in(path.name)
        if asked is not None:
            choose({own}, purpose, asked, path)
        return path, own or None
    twice = [split for split, times in Counter(splits.values()).items() if times > 1]
    chosen = choose(set(splits.values()), purpose, asked, path)
    if chosen in twice:
        names = ", ".join(folder.name for folder, split in splits.items() if split == chosen)
        raise UsageError(f"{path} has several folders of the split '{chosen}': {names}.", fix="Name one of them.")
    (root,) = (folder for folder, split in splits.items() if split == chosen)
    for entry in visible(path, left_out):
        if entry != root:
            left_out.add_all("in another split" if entry in splits else "outside the splits", entry)
    return root, chosen


def _pictures(folder: Path, left_out: LeftOutFiles) -> Iterator[Path]:
    """The pictures in a folder and its subfolders."""
    for file in files_below(folder, left_out):
        if file.suffix.lower() in SUFFIXES:
            yield file
        else:
            left_out.add(f"not a picture ({file.suffix.lower() or 'no suffix'})", file)


def _decode_file(file: Path, spec: InputSpec, fit: Fit) -> np.ndarray:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} is not a readable image.", why=f"{error}", fix="Replace or remove it.") from error
    return decode(data, spec, str(file), fit)
