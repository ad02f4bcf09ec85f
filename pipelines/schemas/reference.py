"""Every key of a recipe as a page: `python -m nayer_edge.pipelines.schemas.reference` prints docs/REFERENCE.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from . import load

HEAD = """# Recipe and policy, key by key

`make schemas` writes this page from the recipe's JSON Schema (`pipelines/schemas/recipe.schema.json`), which editors
that check TOML can use too.

A recipe is a TOML file. An unknown key is an error that names the nearest one, and what is not written takes the
default. `extends = "NAME"` at the top takes everything from another recipe first. `--set distill.epochs=40` changes
one key.

A policy (`nayer-edge gate RUN --policy policy.toml`) has the keys of `[gate]`, its sections without `gate.` before
them; `nayer-edge gate RUN --print-policy` prints the one in force as such a file. A section of limits that is not
written has the limits that stand here; one that is written limits what it names, and nothing else.
"""


def page() -> str:
    """The page, as Markdown."""
    schema = load("recipe")
    return "\n".join([HEAD, *_sections(schema, schema["$defs"], "")]).rstrip() + "\n"


def _sections(model: dict[str, Any], known: dict[str, Any], path: str) -> Iterator[str]:
    """A table of the model's own keys, then its sections in turn."""
    rows, inner = [], []
    for key, field in model["properties"].items():
        part = _section(field, known)
        if part is None:
            rows.append(_row(key, field, key in model.get("required", ())))
        else:
            inner.append((f"{path}.{key}" if path else key, field, part))
    if rows:
        yield from ("| key | default | values | |", "|---|---|---|---|", *rows, "")
    for where, field, part in inner:
        yield f"{'#' * (2 + where.count('.'))} `[{where}]`"
        yield ""
        yield " ".join(_words(field, part))
        yield ""
        yield from _sections(_as_default(part, field), known, where)


def _words(field: dict[str, Any], part: dict[str, Any]) -> Iterator[str]:
    """What a section is, and what it is for where it stands."""
    yield " ".join(part["description"].split())
    if own := field.get("description"):
        yield f"Here: {' '.join(own.split())}."
    if {"type": "null"} in field.get("anyOf", ()):
        yield "May be left out."


def _as_default(part: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    """The section with the values that it has where it is not written."""
    given = field.get("default") or {}
    properties = {
        key: own | ({"default": given[key]} if key in given else {}) for key, own in part["properties"].items()
    }
    return part | {"properties": properties}


def _section(field: dict[str, Any], known: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a field holds; None where it holds a value."""
    names = [each.get("$ref", "").rpartition("/")[2] for each in (field, *field.get("anyOf", ()))]
    return next((known[name] for name in names if name and "properties" in known[name]), None)


def _row(key: str, field: dict[str, Any], required: bool) -> str:
    default = field.get("default")
    shown = "required" if required else "" if default is None else f"`{json.dumps(default, ensure_ascii=False)}`"
    meaning = " ".join(field["description"].split())
    return " | ".join(("| " + f"`{key}`", shown, _values(field), meaning.replace("|", "\\|") + " |"))


def _values(field: dict[str, Any]) -> str:
    """What may stand there, in words."""
    kinds = [kind for kind in field.get("anyOf", (field,)) if kind != {"type": "null"}]
    return " or ".join(filter(None, (_kind(kind) for kind in kinds)))


def _kind(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    if kind.get("type") == "array":
        return f"list of {_kind(kind['items']) or 'values'}" if "items" in kind else "list"
    names = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true, false",
        "object": "table",
    }
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {kind[name]}" for name, sign in bounds.items() if name in kind]
    return " ".join([names.get(kind.get("type", ""), ""), ", ".join(limits)]).strip()


if __name__ == "__main__":
    sys.stdout.write(page())
