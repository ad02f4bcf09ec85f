"""The run folder: its manifest, the hashes of its files, and its lock.

Needs only the base install (no torch, no numpy), because `gate` and `verify` use it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.storage.files import MAX_NAME_BYTES, TEMPORARY, read_json, sha256_of, writable_fix, write_json

MANIFEST = "manifest.json"
LOCK = ".lock"
SIGNATURE = "model.sig"
"""signature over all other files of the run (OpenSSF model signing); not listed in the manifest"""
MANIFEST_SCHEMA = "nayer-edge/manifest/1"
_DIGEST = r"^[0-9a-f]{64}$"


@dataclass(frozen=True)
class Artifact:
    """The result of one step: its files, relative to the run folder.

    Attributes:
        step: the step that made it.
        files: role ("student", "bank", …) → POSIX path inside the run folder. Every file has one role.
        numbers: a few figures to show when the step ends.
        sources: SHA-256 of files outside the run folder that they were made from.
    """

    step: str
    files: Mapping[str, str]
    numbers: Mapping[str, float | int | str | None]
    sources: tuple[str, ...] = ()


class FileRecord(BaseModel):
    """A file's entry in the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    step: str
    sha256: str = Field(pattern=_DIGEST)
    bytes: int = Field(ge=0)
    parents: tuple[str, ...] = Field(default=(), description="SHA-256 of the files that it was made from")


class StepRecord(BaseModel):
    """A finished step's entry in the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = Field(pattern=_DIGEST, description="digest of the step's settings and its inputs' hashes")
    settings: dict[str, Any] = Field(description="the part of the recipe that the step reads")
    seconds: float = Field(ge=0)
    finished: str = Field(description="UTC, ISO 8601")
    numbers: dict[str, float | int | str | None] = Field(default_factory=dict)
    versions: dict[str, str] = Field(
        default_factory=dict, description="package versions that differ from the manifest's, if the run was resumed"
    )
    hardware: dict[str, Any] = Field(default_factory=dict, description="hardware that differs from the manifest's")


@dataclass(frozen=True)
class Forgotten:
    """A step's entries that were removed from the manifest; `record` is None if it had none.

    Attributes:
        before: all steps and files of the manifest before the removal, in order.
    """

    step: str
    record: StepRecord | None
    files: Mapping[str, FileRecord]
    before: tuple[Mapping[str, StepRecord], Mapping[str, FileRecord]]


class Manifest(BaseModel):
    """`manifest.json`: the provenance of the run, and hash and parents of each of its files."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: Literal["nayer-edge/manifest/1"] = Field(default=MANIFEST_SCHEMA, alias="schema")
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
    hardware: dict[str, Any]
    steps: dict[str, StepRecord] = Field(default_factory=dict)
    files: dict[str, FileRecord] = Field(default_factory=dict)


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in now.items() if key not in before or before[key] != value}


def _is_plain(path: Path) -> bool:
    """Whether this is a regular file: not a link, folder, pipe or device."""
    return path.is_file() and not path.is_symlink()


class RunFolder:
    """A run on disk. Paths are relative POSIX paths that cannot leave the folder."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self.former: dict[str, Forgotten] = {}
        """step → the result that it had before it began to run again in this process; its files were checked then"""

    @classmethod
    def create(
        cls, root: Path, recipe: dict[str, Any], seed: int, versions: dict[str, str], hardware: dict[str, Any]
    ) -> RunFolder:
        """Creates a run folder with an empty manifest.

        Raises:
            UsageError: the folder is not writable.
        """
        run = cls(root, Manifest(recipe=recipe, seed=seed, versions=versions, hardware=hardware))
        run.save()
        return run

    @classmethod
    def open(cls, root: Path) -> RunFolder:
        """Opens an existing run.

        Raises:
            UsageError: this is not a run folder.
            IntegrityError: its manifest is damaged.
        """
        if not (root / MANIFEST).is_file():
            raise UsageError(
                f"{root} is not a run folder.",
                why=f"It has no {MANIFEST}.",
                fix="Type: nayer-edge run RECIPE --out DIR   (nayer-edge recipes lists them)",
            )
        if (root / MANIFEST).is_symlink():
            raise IntegrityError(
                f"{root / MANIFEST} is a link.",
                why="What it points to is not part of the run.",
                fix="Do not use this folder: it was altered. Copy it again from its source.",
            )
        try:
            manifest = Manifest.model_validate(read_json(root / MANIFEST, "the manifest"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise IntegrityError(
                f"{root / MANIFEST} is not a manifest of this version.",
                why=f"{where}: {first['msg']}.",
                fix="Copy the run folder again from its source.",
            ) from error
        return cls(root, manifest)

    @property
    def typed(self) -> str:
        """The folder as a command-line argument that cannot be mistaken for a recipe's name."""
        name = str(self.root)
        return shlex.quote(name if "/" in name else f"./{name}")

    def save(self) -> None:
        """Writes the manifest."""
        write_json(self.root / MANIFEST, self.manifest.model_dump(mode="json", by_alias=True))

    def path(self, relative: str) -> Path:
        """The path of a file of this run.

        Raises:
            IntegrityError: the path is outside the run folder, also through a link, or is not a valid path.
        """
        pure = PurePosixPath(relative)
        path = self.root / pure
        try:
            inside = (
                not pure.is_absolute()
                and ".." not in pure.parts
                and "\0" not in relative
                and "\\" not in relative
                and all(len(os.fsencode(part)) <= MAX_NAME_BYTES for part in pure.parts)
                and path.resolve().is_relative_to(self.root.resolve())
            )
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.lstat()
        except PermissionError as error:
            raise UsageError(
                f"{self.root / relative} cannot be accessed: permission denied.",
                fix="Make the run folder readable for your user.",
            ) from error
        except (OSError, ValueError, RuntimeError):  # a cycle of links, or an invalid name
            inside = False
        if not inside:
            raise IntegrityError(
                f"'{relative[:200]}' points outside the run folder {self.root}, or is not a valid path.",
                fix="Do not use this folder: it was altered. Copy it again from its source.",
            )
        return path

    def record(
        self,
        artifact: Artifact,
        *,
        digest: str,
        settings: dict[str, Any],
        parents: Sequence[Artifact],
        seconds: float,
        finished: str,
        versions: Mapping[str, str] | None = None,
        hardware: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds a finished step and its files, with their hashes, to the manifest, and saves it.

        Args:
            versions, hardware: of the machine that ran the step; by default those at the run's start.
        """
        inputs = (self.manifest.files[name].sha256 for parent in parents for name in sorted(parent.files.values()))
        hashes = tuple(dict.fromkeys((*inputs, *artifact.sources)))
        files = {name: entry for name, entry in self.manifest.files.items() if entry.step != artifact.step}
        for role, name in artifact.files.items():
            path = self.path(name)
            files[name] = FileRecord(
                kind=role,
                step=artifact.step,
                sha256=sha256_of(path),
                bytes=path.stat().st_size,
                parents=hashes,
            )
        self.manifest.files = files
        self.manifest.steps[artifact.step] = StepRecord(
            digest=digest,
            settings=settings,
            seconds=round(seconds, 3),
            finished=finished,
            numbers=dict(artifact.numbers),
            versions=_changed(versions or {}, self.manifest.versions),
            hardware=_changed(hardware or {}, self.manifest.hardware),
        )
        self.save()

    def remember(self, step: str) -> Forgotten:
        """A step's entries, which `restore` can put back later."""
        files = {name: entry for name, entry in self.manifest.files.items() if entry.step == step}
        before = dict(self.manifest.steps), dict(self.manifest.files)
        return Forgotten(step, self.manifest.steps.get(step), files, before)

    def forget(self, step: str, anew: Collection[str] = ()) -> Forgotten:
        """Removes a step and its files from the manifest; the files themselves stay until they are overwritten.

        Args:
            anew: files that `former_file` must not find.
        """
        forgotten = self.remember(step)
        self.manifest.steps.pop(step, None)
        self.manifest.files = {n: f for n, f in self.manifest.files.items() if f.step != step}
        kept = {name: record for name, record in forgotten.files.items() if name not in anew}
        self.former[step] = replace(forgotten, files=kept)
        self.save()
        return forgotten

    def former_file(self, name: str, step: str, made_from: Iterable[str]) -> bool:
        """Whether a file of the step's former result is still up to date.

        Args:
            made_from: the files that it depends on; they must not have changed since it was made.
        """
        before = self.former.get(step)
        if before is None or before.record is None or name not in before.files:
            return False
        return {self.manifest.files[needed].sha256 for needed in made_from} <= set(before.files[name].parents)

    def restore(self, forgotten: Forgotten) -> bool:
        """Puts a step back into the manifest and returns True, unless one of its files was changed."""
        if forgotten.record is None:
            return False
        files = {**self.manifest.files, **forgotten.files}
        if RunFolder(self.root, self.manifest.model_copy(update={"files": files})).problems(list(forgotten.files)):
            return False
        # In the old order, so that a signature over the manifest is valid again.
        steps, files = forgotten.before
        self.manifest.steps, self.manifest.files = dict(steps), dict(files)
        self.save()
        return True

    def remove_leftovers(self, forgotten: Forgotten) -> list[str]:
        """Deletes files of a step's earlier result that the manifest no longer lists. Returns their names."""
        removed = [name for name in forgotten.files if name not in self.manifest.files]
        for name in removed:
            self.path(name).unlink(missing_ok=True)
        return removed

    def artifact(self, step: str) -> Artifact:
        """The artifact of a finished step, according to the manifest.

        Raises:
            UsageError: the step is not finished.
        """
        if step not in self.manifest.steps:
            raise UsageError(
                f"{self.root} has no finished step '{step}'.",
                fix=f"Type: nayer-edge run {self.typed} --until {step}",
            )
        files = {entry.kind: name for name, entry in self.manifest.files.items() if entry.step == step}
        return Artifact(step, files, self.manifest.steps[step].numbers)

    def problems(self, names: Iterator[str] | Sequence[str] | None = None) -> list[str]:
        """Compares files with the manifest's hashes; one sentence for each file that differs or is missing.

        Args:
            names: the files to compare; by default all in the manifest.
        """
        found = []
        for name in sorted(self.manifest.files if names is None else names):
            path, record = self.path(name), self.manifest.files[name]
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.is_symlink():
                found.append(f"{name} was altered: it is a link")
            elif path.stat().st_size != record.bytes or sha256_of(path) != record.sha256:
                found.append(f"{name} was altered: its SHA-256 differs from the manifest's")
        return found

    def unexpected_files(self) -> list[str]:
        """Files in the folder that the manifest does not list."""
        known = {MANIFEST, LOCK, SIGNATURE, *self.manifest.files}
        found = []
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            known_here = name in known and (name not in (LOCK, SIGNATURE) or _is_plain(path))
            if not known_here and (path.is_symlink() or not path.is_dir()):
                found.append(name)
        return found

    def require_intact(self, names: Sequence[str] | None = None) -> None:
        """Raises IntegrityError if a file differs from the manifest."""
        if found := self.problems(names):
            raise IntegrityError(
                f"{self.root} does not match its manifest.",
                why="; ".join(found) + ".",
                fix=f"Copy the folder again from its source, or start over: nayer-edge run {self.typed} --fresh",
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock, so that two processes cannot write to the same run.

        Raises:
            UsageError: another process holds it.
        """
        with lock_folder(self.root):
            yield


@contextlib.contextmanager
def lock_folder(root: Path) -> Iterator[None]:
    """Holds an advisory lock on a folder; the kernel releases it when the process ends for any reason.

    Raises:
        UsageError: another process holds it, or the folder is not writable.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Never through a link: the lock file must be in the folder itself.
        file = os.fdopen(os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "rb+")
    except OSError as error:
        raise UsageError(
            f"Cannot write to {root}.",
            why=f"System error: {error.strerror or error}.",
            fix=writable_fix(root, error),
        ) from error
    with file:
        _lock(file, fcntl.LOCK_EX, root)
        yield


def require_unlocked(root: Path) -> None:
    """Raises UsageError if another process holds the lock of a folder. For commands that plan before they lock it: the
    lock may still be taken meanwhile."""
    path = root / LOCK
    if _is_plain(path) and os.access(path, os.R_OK):
        with path.open("rb") as file:
            # Shared, so that two processes that only look do not see each other.
            _lock(file, fcntl.LOCK_SH, root)


def is_locked(root: Path) -> bool:
    """Whether another process holds the lock of a folder."""
    try:
        require_unlocked(root)
    except UsageError:
        return True
    return False


def _lock(file: IO[bytes], kind: int, root: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(
            f"Another process is working in {root}.",
            fix="Press Ctrl-C there, or wait until it ends. Then repeat this command here.",
        ) from error


def remove_temporaries(root: Path) -> None:
    """Removes temporary files left by killed processes. Call it only with the folder's lock held."""
    for path in root.rglob("*.tmp"):
        if TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def require_outside(path: Path, option: str, run: Path | None = None) -> None:
    """Refuses to write into a run folder.

    Args:
        path: the file or folder to write.
        option: the option that names it.
        run: the run folder that it must not lie in; by default any.

    Raises:
        UsageError: it lies in one.
    """
    place = path.resolve()
    if run is None:
        run = next((folder for folder in (place, *place.parents) if (folder / MANIFEST).is_file()), None)
    if run is not None and place.is_relative_to(run.resolve()):
        raise UsageError(
            f"{option} {path} lies inside the run folder {run}, where the manifest lists every file.",
            why="A file written there would make the run look altered.",
            fix=f"Choose a path outside {run}.",
        )


def is_vacant(root: Path) -> bool:
    """Whether a run can start here: the folder does not exist, or has only a lock or temporary files in it."""
    if not root.is_dir():
        return not root.exists()
    return all(path.name == LOCK or TEMPORARY.fullmatch(path.name) for path in root.iterdir())


def clear_folder(root: Path) -> None:
    """Empties a run folder for `--fresh`.

    Raises:
        UsageError: the folder has files but no manifest, so it is not a run folder.
    """
    if not root.exists():
        return
    # The manifest goes last, so that after an interruption the folder is still recognised as a run.
    inside = sorted((path for path in root.iterdir() if path.name != LOCK), key=lambda path: path.name == MANIFEST)
    if inside and not (root / MANIFEST).is_file():
        raise UsageError(
            f"{root} is not empty and not a run folder, so --fresh will not empty it.",
            fix="Choose another folder with --out, or empty this one yourself.",
        )
    for path in inside:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
