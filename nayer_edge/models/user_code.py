"""`python:` models: the user's own code, which runs only where the user said that it is trusted.

A recipe or a run folder may come from anybody, so what it names is not imported unless `--trust-code` was typed.
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
"""how a factory may call them; those that it takes are given to it"""


@contextlib.contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """A context in which `python:` models may run; the command line enters it for `--trust-code`."""
    token = _trusted.set(trust)
    try:
        yield
    finally:
        _trusted.reset(token)


def require_trust(model: ModelName) -> None:
    """Refuses a `python:` model outside of `trusting`.

    Raises:
        IntegrityError: nobody said that its code is trusted.
    """
    if not _trusted.get():
        raise IntegrityError(
            f"A `python:` model from a recipe file runs only with --trust-code ({model.portable}).",
            why="It is a program of whoever wrote it, and can do whatever you can.",
            fix="Read it; if you trust it, type the same command again with --trust-code.",
        )


def build(
    model: ModelName, spec: InputSpec, classes: int, arguments: Mapping[str, Any], digest: str | None = None
) -> tuple[Any, str | None]:
    """Calls the factory.

    Args:
        arguments: keyword arguments beside those for classes and channels.
        digest: SHA-256 that the file must have, where a saved model is rebuilt.

    Returns:
        What the factory returned, and the SHA-256 of its file (None for a module's).

    Raises:
        IntegrityError: nobody said that the code is trusted, or the file is not the one that a saved model was made by.
        UsageError: there is no such code, or it does not work.
    """
    require_trust(model)
    path = Path(model.name) if model.local else None
    found = None
    if path is not None:
        if not path.is_file():
            raise UsageError(f"There is no file {path}, which {model.portable} names.", fix="Put it there again.")
        found = sha256_of(path)
        if digest is not None and found != digest:
            raise IntegrityError(
                f"{path} is not the file that the model was made with.",
                why=f"Its SHA-256 is {found[:16]}…, then it was {digest[:16]}….",
                fix="Restore the file, or start over with --fresh.",
            )
    with _on_path(path.parent if path else Path.cwd()):
        factory = _factory(model, path)
        given = _given(factory, spec, classes) | dict(arguments)
        try:
            return factory(**given), found
        except Exception as error:
            raise UsageError(
                f"{model.portable} failed when it was called with {_written(given)}.",
                why=f"{type(error).__name__}: {error}",
                fix="A factory returns a torch.nn.Module; --debug shows where it failed.",
            ) from error


def _factory(model: ModelName, path: Path | None) -> Callable[..., Any]:
    try:
        module = importlib.import_module(model.name) if path is None else _module_of(path)
    except ModuleNotFoundError as error:
        if error.name and model.name.startswith(error.name):
            raise UsageError(
                f"There is no module '{model.name}'.",
                fix="Install it, or start from the folder that it lies in, or name its file: python:path/to/file.py:…",
            ) from error
        raise UsageError(f"{model.portable} needs a module that is not installed.", why=f"{error}") from error
    except Exception as error:
        raise UsageError(
            f"{model.portable} cannot be imported.", why=f"{type(error).__name__}: {error}", fix="Mend the file."
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
    # Known by name while it runs, as dataclasses expect.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The code finds what lies beside it, as if it were started from there."""
    kept = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = kept


def _given(factory: Callable[..., Any], spec: InputSpec, classes: int) -> dict[str, Any]:
    """The number of classes and channels, under the names that the factory has for them."""
    try:
        taken = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    given: dict[str, Any] = {}
    for keywords, value in ((CLASSES_KEYWORDS, classes), (CHANNELS_KEYWORDS, spec.channels)):
        given |= {keyword: value for keyword in keywords if keyword in taken}
    return given


def _written(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"
