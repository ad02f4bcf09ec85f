"""Files that lie in a data set and are not read: each reason with its count and its first file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HIDDEN = "hidden"
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""made by macOS, Synology, Windows and Linux; the first two hold copies of images or thumbnails of them"""


@dataclass(frozen=True)
class LeftOut:
    """Files that were not read for one reason.

    Attributes:
        reason: for example "hidden".
        count: number of files.
        first: path of the first one, relative to the data set.
    """

    reason: str
    count: int
    first: str


@dataclass
class LeftOutFiles:
    """Counts the files of a data set that are not read."""

    root: Path
    _counts: Counter[str] = field(default_factory=Counter)
    _first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, path: Path) -> None:
        """Counts one file."""
        self._counts[reason] += 1
        self._first.setdefault(reason, path.relative_to(self.root).as_posix())

    def add_all(self, reason: str, path: Path) -> None:
        """Counts a file, or all files of a folder and its subfolders."""
        if not path.is_dir():
            self.add(reason, path)
            return
        for place, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                self.add(reason, Path(place) / name)

    def found(self) -> tuple[LeftOut, ...]:
        """Everything counted so far."""
        return tuple(LeftOut(reason, count, self._first[reason]) for reason, count in sorted(self._counts.items()))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the system or to a program, not to the data set."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def visible(folder: Path, left_out: LeftOutFiles) -> list[Path]:
    """The files and folders in a folder, sorted by name; hidden ones are counted instead."""
    entries = sorted(folder.iterdir())
    for entry in entries:
        if is_hidden(entry.name):
            left_out.add_all(HIDDEN, entry)
    return [entry for entry in entries if not is_hidden(entry.name)]


def files_below(folder: Path, left_out: LeftOutFiles) -> Iterator[Path]:
    """The files in a folder and its subfolders, sorted by name. Links to folders are followed, each folder once."""
    waiting, seen = [folder], {os.path.realpath(folder)}
    while waiting:
        for entry in visible(waiting.pop(), left_out):
            if not entry.is_dir():
                yield entry
            elif (real := os.path.realpath(entry)) not in seen:
                seen.add(real)
                waiting.append(entry)
