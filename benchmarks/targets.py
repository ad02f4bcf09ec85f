"""Every target of finished runs: coverage, drop, speed-up and size from their reports, engines as they were built.

    T='export.targets=["cpu","arm","tensorrt","tensorrt-rtx"]'
    nayer-edge run digits --set student.model=nayer:resnet18 --set distill.steps=30 --set distill.batch=64 \\
        --set distill.lr=0.05 --set "$T" --out runs/digits-resnet18
    python benchmarks/targets.py runs/digits runs/digits-resnet18 --json benchmarks/results/targets.json

Drops are against the FP32 student, in points, on the run's real hold-out, with their confidence bounds at 95 % (the
gate's own interval). Latency is of the machine on which `validate` ran.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared.figures import keep
from shared.origin import origin

from nayer_edge.pipelines.gate.statistics import drop_lower, drop_upper
from nayer_edge.storage.run_folder import RunFolder

ALPHA = 0.05


def main() -> None:
    """Prints the table, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = {"runs": [of_run(RunFolder.open(root)) for root in arguments.runs], **origin()}
    print(table(result))
    keep(arguments.json, result)


def of_run(run: RunFolder) -> dict[str, Any]:
    """What a run's report and its record of engines say."""
    report = json.loads(run.path("validate/report.json").read_text(encoding="utf-8"))
    steps = run.manifest.steps
    return {
        "run": run.root.name,
        "student": run.manifest.recipe["student"]["model"],
        "student_params": report["student"]["params"],
        "images": report["dataset"]["n"],
        "teacher_top1": report["teacher"]["top1"],
        "engine_seconds": steps["engine"].seconds if "engine" in steps else None,
        "settings": {key: run.manifest.recipe[key] for key in ("synthesis", "distill")},
        "artifacts": [of_artifact(found) for found in report["artifacts"]],
    }


def of_artifact(found: dict[str, Any]) -> dict[str, Any]:
    """Its figures, and the drop against FP32 in points with both one-sided bounds."""
    keys = (
        "name", "status", "reason", "precision_verified", "top1", "agreement", "int8_coverage", "speedup_vs_fp32",
        "latency_ms", "threads", "size_bytes",
    )  # fmt: skip
    kept = {key: found[key] for key in keys}
    pairs = found["paired"]["vs_fp32"]
    if pairs is None or found["name"] == "fp32":
        return kept | {"drop_points": None, "drop_lower_points": None, "drop_upper_points": None}
    lost, gained, n = pairs["lost"], pairs["gained"], pairs["n"]
    return kept | {
        "drop_points": 100 * (lost - gained) / n,
        "drop_lower_points": 100 * drop_lower(lost, gained, n, ALPHA),
        "drop_upper_points": 100 * drop_upper(lost, gained, n, ALPHA),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown; what was not measured stays empty, with the reason in the JSON."""
    lines = [
        "| student | artifact | status | top-1, % | drop, points (95 % bounds) | INT8 coverage, % | speed-up | kB |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for run in result["runs"]:
        for found in run["artifacts"]:
            drop = found["drop_points"]
            bounds = (
                f" ({found['drop_lower_points']:+.2f} … {found['drop_upper_points']:+.2f})" if drop is not None else ""
            )
            cells = [
                run["student"],
                found["name"],
                found["status"],
                figure(found["top1"], 100, ".2f"),
                figure(drop, 1, "+.2f") + bounds,
                figure(found["int8_coverage"], 100, ".0f"),
                figure(found["speedup_vs_fp32"], 1, ".2f"),
                figure(found["size_bytes"], 1e-3, ",.0f"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(value: float | None, scale: float, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{scale * value:{form}}"


if __name__ == "__main__":
    main()
