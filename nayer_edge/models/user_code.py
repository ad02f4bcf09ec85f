"""`python:` models: the user's own code, which runs only with `--trust-code`.

A recipe or run folder may come from anyone, so the code that it names is not imported by default.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, UsageError, nearest
from nayer_edge.models.names import ModelName
from nayer_edge.storage.files import sha256_of

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
    found = None
    if path is not None:
        if not path.is_file():
            raise UsageError(f"The file {path} of {model.portable} is missing.", fix="Restore the file.")
        found = sha256_of(path)
        if digest is not None and found != digest:
            raise IntegrityError(
                f"{path} is not the file that the model was built with.",
                why=f"Its SHA-256 is {found[:16]}…, but it was {digest[:16]}….",
                fix="Restore the file, or start over with --fresh.",
            )
    with _on_path(path.parent if path else Path.cwd()):
        factory = _factory(model, path)
        given = _given(factory, spec, classes) | dict(arguments)
        try:
            return factory(**given), found
        except Exception as error:
            raise UsageError(
                f"{model.portable} failed when called with {_formatted(given)}.",
                why=f"{type(error).__name__}: {error}",
                fix="The factory must return a torch.nn.Module; --debug shows where it failed.",
            ) from error


def _factory(model: ModelName, path: Path | None) -> Callable[..., Any]:
    try:
        module = importlib.import_module(model.name) if path is None else _module_of(path)
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


def _module_of(path: Path) -> Any:
    name = f"nayer_edge_user_code_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    # Registered while it runs, as dataclasses require.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Lets the code import modules beside it, as if it were run from its folder."""
    kept = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = kept


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
