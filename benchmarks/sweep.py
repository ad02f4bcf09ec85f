"""What a sweep costs and finds, beside the same students in runs of their own.

    python benchmarks/sweep.py digits --students nayer:resnet8_w2,nayer:resnet8_w4,nayer:resnet8_w8 \\
        --alone recipe,share --runs runs/sweep --json benchmarks/results/sweep.alone.json

For every seed, `nayer-edge run RECIPE` and a sweep from its bank; with `--budget`, a sweep that makes its own bank.
Then every student alone, as often as `--alone` names a way:

- share: `run --budget`, with the sweep's time divided by the number of students;
- recipe: `run`, with the sizes of the recipe;
- all: `run --budget`, with all of the sweep's time.

The steps teacher and lte do not count, because a sweep shares them. Rows that are there are not run again, and an
interrupted sweep or run continues. Each command is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shared.figures import keep, kept
from shared.origin import commit, origin

SHARED = ("teacher", "lte")


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--students", required=True, help="A,B,C")
    parser.add_argument("--budget", help="time of a sweep that makes its own bank")
    parser.add_argument("--alone", default="", help="ways, from share, recipe and all")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], help="further settings of the recipe")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures = kept(given.json) or {**origin(), "sweeps": [], "alone": []}
    students = given.students.split(",")
    for seed in (int(text) for text in given.seeds.split(",")):
        settings = [word for each in (f"seed={seed}", *given.set) for word in ("--set", each)]
        begun = [row for row in figures["sweeps"] if row["seed"] == seed]
        if not begun:
            begun = [{"seed": seed, **swept(given, students, settings, given.runs / f"s{seed}")}]
            figures["sweeps"] += begun
            keep(given.json, figures)
        print(begun[0]["sentence"], flush=True)
        total = begun[0]["seconds"]
        budgets = {"share": [f"{round(total / len(students))}s"], "all": [f"{round(total)}s"], "recipe": []}
        for way in filter(None, given.alone.split(",")):
            for student in students:
                row = {"seed": seed, "way": way, "student": student}
                if any(row.items() <= each.items() for each in figures["alone"]):
                    continue
                root = given.runs / f"s{seed}-{way}-{student.partition(':')[2]}"
                words = ["run", given.recipe, *settings, "--set", f"student.model={student}", "--out", str(root)]
                figures["alone"].append(
                    row | alone([*words, *(("--budget", *budgets[way]) if budgets[way] else ())], root)
                )
                print(json.dumps(figures["alone"][-1]), flush=True)
                keep(given.json, figures)
    figures["cost"] = cost(figures)
    keep(given.json, figures)


def swept(given: argparse.Namespace, students: list[str], settings: list[str], root: Path) -> dict[str, Any]:
    """A sweep, with the run that makes its bank where it makes none itself."""
    first, folder, seconds = root / "run", root / "sweep", 0.0
    if given.budget is None:
        called("run", given.recipe, *settings, "--out", str(first))
        seconds = spent(first)
        words = ["sweep", str(first)]
    else:
        words = ["sweep", given.recipe, *settings, "--budget", given.budget]
    wall = called(*words, "--students", ",".join(students), "--out", str(folder))
    found = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return {
        "commit": commit(),
        "run_seconds": round(seconds, 1),
        "seconds": round(wall, 1),
        "planned_seconds": found["seconds"],
        "rounds": found["rounds"],
        "images": found["bank"]["images"],
        "answer": found["answer"],
        "sentence": found["sentence"],
        "students": [
            {
                **{key: each[key] for key in ("model", "params", "int8_bytes", "state", "reason")},
                "trained_seconds": each["shares"][-1]["trained_seconds"] if each["shares"] else None,
                **measured(folder / each["folder"]),
            }
            for each in found["students"]
        ],
    }


def alone(words: list[str], root: Path) -> dict[str, Any]:
    """One student in a run of its own."""
    called(*words)
    return {"commit": commit(), "seconds": round(spent(root), 1), **measured(root)}


def called(*words: str) -> float:
    """Runs a command of nayer-edge; the seconds it took. A failed gate (exit code 1) is a result."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "nayer_edge", *words])
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)
    return time.perf_counter() - began


def spent(root: Path) -> float:
    """Seconds of a run's own steps."""
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    return sum(step["seconds"] for name, step in manifest["steps"].items() if name not in SHARED)


def measured(root: Path) -> dict[str, Any]:
    """Accuracy of a run's student and of its first INT8 artifact, and the verdict; empty if not measured."""
    if not (root / "gate" / "verdict.json").is_file():
        return {}
    report = json.loads((root / "validate" / "report.json").read_text(encoding="utf-8"))
    verdict = json.loads((root / "gate" / "verdict.json").read_text(encoding="utf-8"))
    int8 = next(each for each in report["artifacts"] if each["name"].startswith("int8"))
    timing = int8["latency_ms"] or {}
    return {
        "teacher_top1": report["teacher"]["top1"],
        "student_top1": report["student"]["top1"],
        "int8_top1": int8["top1"],
        "int8_file_bytes": int8["size_bytes"],
        "int8_p95_ms": timing.get("p95"),
        "verdict": verdict["verdict"],
    }


def cost(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """For every seed: seconds of the sweep, with and without its first run, over those of the runs alone."""
    found = []
    for sweep in figures["sweeps"]:
        for way in ("share", "recipe", "all"):
            rows = [row["seconds"] for row in figures["alone"] if (row["seed"], row["way"]) == (sweep["seed"], way)]
            if rows:
                whole = sweep["seconds"] + sweep["run_seconds"]
                of = {"seed": sweep["seed"], "way": way, "alone_seconds": round(sum(rows), 1)}
                found.append(of | {"sweep": sweep["seconds"] / sum(rows), "with_run": whole / sum(rows)})
    return found


if __name__ == "__main__":
    main()
