"""What a student reaches in a given time: whole runs with `--budget`, measured on test images that no choice used.

    NAYER_EDGE_DATA=… python benchmarks/budget.py photos --student nayer:wrn_16_1 --budget 10m --seeds 0,1,2 \\
        --data "$NAYER_EDGE_DATA/cifar10/test.parquet" --runs runs/budget --json benchmarks/results/budget.json

Every run is what `nayer-edge run RECIPE --budget TIME` does, in a process of its own: distillation, export, INT8 and
validation on the test images. The student is that of the last epoch. With `--more`, the finished run then gets that
much more time. A row is written when its run ends; rows that are there are not run again, and an interrupted run
continues.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shared.figures import keep, kept, spread
from shared.origin import commit, origin


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--student", required=True)
    parser.add_argument("--budget", required=True)
    parser.add_argument("--more", action="append", default=[], help="repeatable: more time for the finished run")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--data", required=True, help="labelled test images")
    parser.add_argument("--set", action="append", default=[], help="further settings of the recipe")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures = kept(given.json) or {**origin(), "rows": []}
    for seed in (int(text) for text in given.seeds.split(",")):
        name = f"{Path(given.recipe).stem}-{given.student.partition(':')[2]}-{given.budget}-s{seed}"
        root = given.runs / name
        settings = [f"student.model={given.student}", f"seed={seed}", f"validate.data={given.data}", *given.set]
        first = ["run", given.recipe, *(word for setting in settings for word in ("--set", setting))]
        commands = [[*first, "--budget", given.budget, "--out", str(root)]]
        commands += [["run", str(root), "--more", more] for more in given.more]
        for number, words in enumerate(commands):
            more = "+".join(given.more[:number])
            row = {"recipe": given.recipe, "student": given.student, "budget": given.budget, "more": more, "seed": seed}
            if any(row.items() <= each.items() for each in figures["rows"]):
                continue
            figures["rows"].append(row | made_by(words, root))
            print(json.dumps(figures["rows"][-1]), flush=True)
            figures["summary"] = summary(figures["rows"])
            keep(given.json, figures)


def made_by(words: list[str], root: Path) -> dict[str, Any]:
    """Runs one command, and reads what it measured."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "nayer_edge", *words])
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)
    seconds = time.perf_counter() - began
    report = json.loads((root / "validate" / "report.json").read_text(encoding="utf-8"))
    verdict = json.loads((root / "gate" / "verdict.json").read_text(encoding="utf-8"))
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    distill, numbers = manifest["recipe"]["distill"], manifest["steps"]["student"]["numbers"]
    int8 = next(each for each in report["artifacts"] if each["name"] == "int8.cpu")
    return {
        "commit": commit(),
        "wall_seconds": round(seconds, 1),
        "planned_seconds": manifest["recipe"]["budget"]["seconds"],
        "step_seconds": {name: step["seconds"] for name, step in manifest["steps"].items()},
        "teacher_top1": report["teacher"]["top1"],
        "student_top1": report["student"]["top1"],
        "int8_top1": int8["top1"],
        "int8_coverage": int8["int8_coverage"],
        "int8_vs_fp32": int8["paired"]["vs_fp32"],
        "test_images": report["dataset"]["n"],
        "synthetic_agreement": lines[-1]["agreement"],
        "images": numbers["bank images"],
        "student_steps": distill["steps"] * sum(line["phase"] == "distill" for line in lines),
        "epochs": len(lines),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "verdict": verdict["verdict"],
        "failed_checks": [check["name"] for check in verdict["checks"] if check["verdict"] != "pass"],
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of every student and time."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["student"], row["budget"], row["more"]), []).append(row)
    return [
        {
            **dict(zip(("recipe", "student", "budget", "more"), key, strict=True)),
            "seeds": len(group),
            **{name: spread([row[name] for row in group]) for name in ("student_top1", "int8_top1", "wall_seconds")},
        }
        for key, group in groups.items()
    ]


if __name__ == "__main__":
    main()
