"""`python:` models: the user's own code, which runs only with `--trust-code`.

A recipe or run folder may come from anyone, so the code that it names is not imported by default.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    BuiltinImporter,
    ExtensionFileLoader,
    FileFinder,
    FrozenImporter,
    PathFinder,
    SourceFileLoader,
)
from pathlib import Path
from typing import Any

from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, UsageError, nearest
from nayer_edge.models.names import ModelName

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)

CLASSES_KEYWORDS = ("classes", "num_classes", "n_classes", "num_labels")
CHANNELS_KEYWORDS = ("channels", "in_channels", "in_chans", "num_channels")
"""parameter names of factories for classes and channels; a factory gets those that it accepts"""


@contextlib.contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Context manager in which `python:` models may run; the CLI enters it for `--trust-code`."""
    token = _trusted.set(trust)
    try:
        yield
    finally:
        _trusted.reset(token)


def is_trusted() -> bool:
    """Whether `python:` models may run here."""
    return _trusted.get()


def require_trust(model: ModelName) -> None:
    """Raises an error for a `python:` model outside of `trusting`.

    Raises:
        IntegrityError: the code is not trusted.
    """
    if not _trusted.get():
        raise IntegrityError(
            f"A `python:` model from a recipe file runs only with --trust-code ({model.portable}).",
            why="Its code runs with your permissions.",
            fix="Read the code; if you trust it, repeat the command with --trust-code.",
        )


def build(
    model: ModelName, spec: InputSpec, classes: int, arguments: Mapping[str, Any], digest: str | None = None
) -> tuple[Any, str | None]:
    """Calls the factory.

    Args:
        arguments: keyword arguments in addition to classes and channels.
        digest: expected SHA-256 of the file, if a saved model is rebuilt.

    Returns:
        The factory's return value, and the SHA-256 of its file (None for a module).

    Raises:
        IntegrityError: the code is not trusted, or the file changed since the model was saved.
        UsageError: there is no such code, or it fails.
    """
    require_trust(model)
    path = Path(model.name) if model.local else None
    found = source = None
    if path is not None:
        if not path.is_file():
            raise UsageError(f"The file {path} of {model.portable} is missing.", fix="Restore the file.")
        source = path.read_bytes()
        found = hashlib.sha256(source).hexdigest()
        if digest is not None and found != digest:
            raise IntegrityError(
                f"{path} is not the file that the model was built with.",
                why=f"Its SHA-256 is {found[:16]}…, but it was {digest[:16]}….",
                fix="Restore the file, or start over with --fresh.",
            )
    with _on_path(path.parent, _Beside(path.parent)) if path else _on_path(Path.cwd()):
        factory = _factory(model, path, source)
        given = _given(factory, spec, classes) | dict(arguments)
        try:
            return factory(**given), found
        except Exception as error:
            raise UsageError(
                f"{model.portable} failed when called with {_formatted(given)}.",
                why=f"{type(error).__name__}: {error}",
                fix="The factory must return a torch.nn.Module; --debug shows where it failed.",
            ) from error


def _factory(model: ModelName, path: Path | None, source: bytes | None) -> Callable[..., Any]:
    try:
        module = importlib.import_module(model.name) if path is None or source is None else _module_of(path, source)
    except ModuleNotFoundError as error:
        if error.name and model.name.startswith(error.name):
            raise UsageError(
                f"There is no module '{model.name}'.",
                fix="Install it, run from the folder that contains it, or name its file: python:path/to/file.py:…",
            ) from error
        raise UsageError(f"{model.portable} needs a module that is not installed.", why=f"{error}") from error
    except Exception as error:
        raise UsageError(
            f"{model.portable} cannot be imported.", why=f"{type(error).__name__}: {error}", fix="Correct the file."
        ) from error
    factory = getattr(module, model.factory, None)
    if not callable(factory):
        own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UsageError(
            f"{model.portable}: there is no function '{model.factory}'.{nearest(model.factory, own)}",
            fix=f"It has: {', '.join(own[:8]) or 'none'}.",
        )
    return factory


class _Source(SourceFileLoader):
    """Compiles the source that is there; a file in __pycache__ may be of another one."""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


class _Held(_Source):
    """Compiles source that was read before."""

    def __init__(self, fullname: str, path: str, source: bytes) -> None:
        super().__init__(fullname, path)
        self.source = source

    def get_data(self, path: str) -> bytes:
        return self.source


def _module_of(path: Path, source: bytes) -> Any:
    """The module that these bytes are the source of: those that were hashed, whatever __pycache__ holds."""
    name = f"nayer_edge_user_code_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    loader = _Held(name, str(path), source)
    specification = importlib.util.spec_from_file_location(name, path, loader=loader)
    if specification is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    # Registered while it runs, as dataclasses require.
    sys.modules[name] = module
    loader.exec_module(module)
    return module


class _Beside:
    """Finds the modules beside a file before those of the same name elsewhere.

    Attributes:
        found: names of the modules and packages that lie in the folder itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.found = {name for name, other in _beside.items() if other == self.folder}

    def find_spec(self, name: str, path: Sequence[str] | None, _target: object = None) -> Any:
        # A package elsewhere may lie below the folder, too: in an environment, for example.
        if path is not None and name.partition(".")[0] not in self.found:
            return None
        for place in [str(self.folder)] if path is None else path:
            finder = FileFinder(place, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_Source, SOURCE_SUFFIXES))
            specification = finder.find_spec(name)
            if specification is not None and specification.loader is None:
                # A folder without __init__.py yields to a module elsewhere, as everywhere in Python.
                whole = PathFinder.find_spec(name, path)
                specification = whole if whole is not None and whole.loader is None else None
            if specification is not None:
                self.found.add(name)
                return specification
        return None


_beside: dict[str, Path] = {}
"""modules that were found beside the code of a model → folder of that code"""


@contextlib.contextmanager
def _on_path(folder: Path, finder: _Beside | None = None) -> Iterator[None]:
    """Lets the code import modules from a folder, as if it were run there; with a finder, as their source has them."""
    kept = list(sys.path)
    sys.path.insert(0, str(folder))
    if finder is not None:
        for name, other in list(_beside.items()):
            first = finder.folder / name.partition(".")[0]
            if other != finder.folder and (first.is_dir() or first.with_suffix(".py").is_file()):
                # Another model's helper, which is not this one's.
                sys.modules.pop(name, None)
                del _beside[name]
        after = sum(each in (BuiltinImporter, FrozenImporter) for each in sys.meta_path)
        sys.meta_path.insert(after, finder)
    try:
        yield
    finally:
        sys.path[:] = kept
        if finder is not None:
            sys.meta_path.remove(finder)
            _beside.update(dict.fromkeys(finder.found, finder.folder))


def _given(factory: Callable[..., Any], spec: InputSpec, classes: int) -> dict[str, Any]:
    """The numbers of classes and channels, under the factory's own parameter names."""
    try:
        taken = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    given: dict[str, Any] = {}
    for keywords, value in ((CLASSES_KEYWORDS, classes), (CHANNELS_KEYWORDS, spec.channels)):
        given |= {keyword: value for keyword in keywords if keyword in taken}
    return given


def _formatted(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"
