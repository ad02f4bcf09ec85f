"""Prints docs/REFERENCE.md, the reference of recipe keys: `python -m nayer_edge.pipelines.schemas.reference`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from . import load

HEAD = """# Recipe and policy, key by key

`make schemas` generates this page from the recipe's JSON Schema (`pipelines/schemas/recipe.schema.json`). Editors that
validate TOML can use the schema, too.

A recipe is a TOML file. Omitted keys have their default; an unknown key is an error that suggests the nearest one.
`extends = "NAME"` at the top inherits from another recipe file, named without `.toml` and by its path from this file's
folder. `--set distill.epochs=40` overrides one key. Keys that `--budget`, `--bank` or a sweep set themselves cannot be
overridden (exit 2).

A policy (`nayer-edge gate RUN --policy policy.toml`) has the keys of `[gate]`, with section names without `gate.`;
`nayer-edge gate RUN --print-policy` prints the current policy in this format. If a section of limits
is absent, its default limits below apply. If it is present, only the limits written in it apply; its other defaults do
not. Sections do not affect each other.
"""


def page() -> str:
    """The page, as Markdown."""
    schema = load("recipe")
    return "\n".join([HEAD, *_sections(schema, schema["$defs"], "")]).rstrip() + "\n"


def _sections(model: dict[str, Any], known: dict[str, Any], path: str) -> Iterator[str]:
    """A table of the model's own keys, followed by its sections."""
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
    """The description of a section, and its purpose in this place."""
    yield " ".join(part["description"].split())
    if own := field.get("description"):
        yield f"Here: {' '.join(own.split())}."
    if {"type": "null"} in field.get("anyOf", ()):
        yield "Optional."


def _as_default(part: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    """The section with the default values of the field that holds it."""
    given = field.get("default") or {}
    properties = {
        key: own | ({"default": given[key]} if key in given else {}) for key, own in part["properties"].items()
    }
    return part | {"properties": properties}


def _section(field: dict[str, Any], known: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a field holds; None if it holds a value."""
    names = [each.get("$ref", "").rpartition("/")[2] for each in (field, *field.get("anyOf", ()))]
    return next((known[name] for name in names if name and "properties" in known[name]), None)


def _row(key: str, field: dict[str, Any], required: bool) -> str:
    default = field.get("default")
    shown = "required" if required else "" if default is None else f"`{json.dumps(default, ensure_ascii=False)}`"
    meaning = " ".join(field["description"].split())
    return " | ".join(("| " + f"`{key}`", shown, _values(field), meaning.replace("|", "\\|") + " |"))


def _values(field: dict[str, Any]) -> str:
    """The allowed values of a field, in words."""
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
