"""Writes the JSON Schemas beside this module: `python -m nayer_edge.pipelines.schemas`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from nayer_edge.storage.files import write_json
from nayer_edge.storage.run_folder import MANIFEST_SCHEMA, Manifest

from ..gate.judgement import CHECKS, Outcome
from ..gate.verdict import VERDICT_SCHEMA
from ..measurements import REPORT_SCHEMA, Report
from ..recipes.policy import Policy, References
from ..recipes.schema import Recipe
from ..sweep.record import SWEEP_SCHEMA, Sweep

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> dict[str, dict[str, Any]]:
    """All published schemas by name."""
    return {
        "recipe": _of(Recipe, "nayer-edge/recipe/1"),
        "policy": _of(Policy, "nayer-edge/policy/1"),
        "references": _of(References, "nayer-edge/references/1"),
        "report": _of(Report, REPORT_SCHEMA),
        "manifest": _of(Manifest, MANIFEST_SCHEMA),
        "sweep": _of(Sweep, SWEEP_SCHEMA),
        "verdict": _verdict(),
    }


def _of(model: type[BaseModel], identifier: str) -> dict[str, Any]:
    return {"$schema": DIALECT, "$id": identifier, **model.model_json_schema(by_alias=True)}


def _verdict() -> dict[str, Any]:
    outcome = {"enum": list(get_args(Outcome))}

    def number(description: str) -> dict[str, Any]:
        return {"type": ["number", "null"], "description": description}

    check = {
        "name": {"enum": list(CHECKS)},
        "artifact": {"type": "string", "description": "as in report.json"},
        "observed": number("measured value (fraction, ms, factor or bytes); null if nothing was measured"),
        "bound": number("confidence bound that was compared with the limit; null if the value itself was compared"),
        "limit": number("limit set by the policy; null for runtime"),
        "verdict": outcome,
        "advisory": {"type": "boolean", "description": "reported, but does not affect the verdict"},
        "synthetic": {"type": "boolean", "description": "measured on synthetic images"},
        "detail": {"type": "string", "description": "explanation in one sentence"},
    }
    return {
        "$schema": DIALECT,
        "$id": VERDICT_SCHEMA,
        "title": "Verdict",
        "description": "The decision of the gate, with every check behind it.",
        "type": "object",
        "properties": {
            "schema": {"const": VERDICT_SCHEMA},
            "verdict": outcome,
            "notes": {
                "type": "array",
                "items": {"type": "string"},
                "description": "what the verdict does and does not cover, and what the run was compared with",
            },
            "baseline": {
                "type": ["object", "null"],
                "description": "the previous release that the run was compared with",
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
