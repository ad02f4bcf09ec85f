"""Writes the JSON Schemas beside this module: `python -m nayer_edge.pipelines.schemas`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nayer_edge.storage.files import write_json
from nayer_edge.storage.run_folder import MANIFEST_SCHEMA, Manifest

from ..gate.judgement import CHECKS
from ..gate.policy import Policy, References
from ..gate.verdict import VERDICT_SCHEMA
from ..measurements import REPORT_SCHEMA, Report
from ..recipes.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> dict[str, dict[str, Any]]:
    """Every published schema by its name."""
    return {
        "recipe": _of(Recipe, "nayer-edge/recipe/1"),
        "policy": _of(Policy, "nayer-edge/policy/1"),
        "references": _of(References, "nayer-edge/references/1"),
        "report": _of(Report, REPORT_SCHEMA),
        "manifest": _of(Manifest, MANIFEST_SCHEMA),
        "verdict": _verdict(),
    }


def _of(model: type[BaseModel], identifier: str) -> dict[str, Any]:
    return {"$schema": DIALECT, "$id": identifier, **model.model_json_schema(by_alias=True)}


def _verdict() -> dict[str, Any]:
    outcome = {"enum": ["pass", "fail", "inconclusive"]}

    def number(description: str) -> dict[str, Any]:
        return {"type": ["number", "null"], "description": description}

    check = {
        "name": {"enum": list(CHECKS)},
        "artifact": {"type": "string", "description": "as in report.json"},
        "observed": number("what was measured (fraction, ms, times or bytes); null where nothing was"),
        "bound": number("the confidence bound that decided; null where plain numbers are compared"),
        "limit": number("what the policy asks for; null for runtime"),
        "verdict": outcome,
        "advisory": {"type": "boolean", "description": "reported, without influence on the verdict"},
        "synthetic": {"type": "boolean", "description": "measured on synthetic images"},
        "detail": {"type": "string", "description": "one sentence for whoever releases"},
    }
    return {
        "$schema": DIALECT,
        "$id": VERDICT_SCHEMA,
        "title": "Verdict",
        "description": "What the gate decided, and every check behind it.",
        "type": "object",
        "properties": {
            "schema": {"const": VERDICT_SCHEMA},
            "verdict": outcome,
            "notes": {
                "type": "array",
                "items": {"type": "string"},
                "description": "what a verdict on such images can and cannot promise, and what it was compared with",
            },
            "baseline": {
                "type": ["object", "null"],
                "description": "the release that this one was compared with",
                "properties": {"name": {"type": "string"}, "report_sha256": {"type": "string"}},
                "required": ["name", "report_sha256"],
            },
            "checks": {
                "type": "array",
                "items": {"type": "object", "properties": check, "required": list(check)},
            },
        },
        "required": ["schema", "verdict", "notes", "baseline", "checks"],
    }


def write(folder: Path) -> None:
    """Writes `<name>.schema.json` for every schema."""
    for name, schema in schemas().items():
        write_json(folder / f"{name}.schema.json", schema)


if __name__ == "__main__":
    write(Path(__file__).parent)
