"""Reads TOML, and reports all problems of its values in one error."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nayer_edge.errors import UsageError, nearest
from nayer_edge.storage.files import decoded

Checked = TypeVar("Checked", bound=BaseModel)


def parse_toml(path: Path, what: str) -> dict[str, Any]:
    """Reads a TOML file of at most 1 MiB.

    Raises:
        UsageError: the file is missing, too large or not TOML.
    """
    try:
        if path.stat().st_size > 2**20:
            raise UsageError(f"{path} is larger than {what} can be (1 MiB).")
        return tomllib.loads(decoded(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no {what} at {path}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not readable as {what}.", why=f"{error}", fix="Fix the file.") from error


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence for each validation problem; for an unknown key with the nearest known name."""
    sentences = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = known_keys(model, problem["loc"][:-1])
            hint = nearest(str(problem["loc"][-1]), known)
            section = where.rpartition(".")[0]
            whole = hint.replace("'", f"'{section}.", 1) if section else hint
            sentences.append(f"unknown key '{where}'.{whole}")
        elif problem["type"] == "missing":
            sentences.append(f"'{where}' is missing.")
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            sentences.append(f"{where}: {reason}." if where else f"{reason}.")
    return sentences


def known_keys(model: type[BaseModel], location: tuple[int | str, ...] = ()) -> list[str]:
    """The keys of `model`, or of the section at `location` inside it."""
    current: Any = model
    for part in location:
        current = section_of(field_of(current, part))
        if current is None:
            return []
    return [field.alias or name for name, field in current.model_fields.items()]


def field_of(model: type[BaseModel] | None, key: int | str) -> Any:
    """The field with this name or alias; None where there is none."""
    fields = model.model_fields.items() if model else ()
    return next((field for name, field in fields if key in (name, field.alias)), None)


def section_of(field: Any) -> type[BaseModel] | None:
    """The model of a field that is a section, optional or not; None for a plain value."""
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def checked(kind: type[Checked], values: dict[str, Any], what: str, fix: str) -> Checked:
    """Validates `values`.

    Args:
        what: first line of the error.
        fix: its last line.

    Raises:
        UsageError: they are invalid; lists every problem.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        why = "\n".join(f"  - {sentence}" for sentence in problems_of(error, kind))
        raise UsageError(what, why=why, fix=fix) from error
