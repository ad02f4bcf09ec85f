"""What it costs that a bank was made with another student as the adversary.

    python benchmarks/adversary.py --runs runs/adversary --json benchmarks/results/adversary.digits.json

NAYER's generator looks for images on which teacher and student disagree. A student that starts from the bank of another
run gets images that were difficult for that run's student. For every seed:

- `source`: `nayer-edge run digits` with the student of `--first`, whose bank the next two start from;
- `own`: the same recipe with the student of `--second`, which makes all images itself;
- `other, equal steps`: that student from the bank of `source`, with as many epochs and steps as `own`;
- `other, equal time`: the same, with as many epochs more as take the time in which `own` fills its bank.

All of them continue to make images with their own student as the adversary after the bank is filled. The steps teacher
and lte do not count in a row's seconds. Rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared.figures import keep, kept, spread
from shared.origin import origin
from sweep import called, measured, spent

WAYS = ("own", "other, equal steps", "other, equal time")


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", default="nayer:resnet8", help="student of the run that makes the bank")
    parser.add_argument("--second", default="nayer:resnet8_w4", help="student that is trained on it")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures = kept(given.json) or {"first": given.first, "second": given.second, "rows": []}
    for seed in map(int, given.seeds.split(",")):
        roots = {way: given.runs / f"s{seed}-{way.replace(', ', '-').replace(' ', '-')}" for way in ("source", *WAYS)}
        settings = ["--set", f"seed={seed}"]
        called("run", "digits", *settings, "--set", f"student.model={given.first}", "--out", str(roots["source"]))
        settings += ["--set", f"student.model={given.second}"]
        bank = ["--set", f"student.bank={roots['source'].resolve()}"]
        for way in WAYS:
            if any((row["seed"], row["way"]) == (seed, way) for row in figures["rows"]):
                continue
            more = [] if way == "own" else bank
            if way == "other, equal time":
                more = [*more, "--set", f"distill.epochs={equal_time(roots['own'], roots['other, equal steps'])}"]
            called("run", "digits", *settings, *more, "--out", str(roots[way]))
            figures["rows"].append({"seed": seed, "way": way, **figures_of(roots[way])})
            figures["summary"] = {
                way: spread([row["student_top1"] for row in figures["rows"] if row["way"] == way]) for way in WAYS
            }
            figures |= origin()
            keep(given.json, figures)
            print(json.dumps(figures["rows"][-1]), flush=True)


def epochs(root: Path) -> list[dict[str, Any]]:
    """A run's epochs."""
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def equal_time(own: Path, other: Path) -> int:
    """`distill.epochs` for which the second student, from the bank, takes as long as `own` with its filling.

    A run from a bank takes the recipe's warm-up epochs off its length.
    """
    filling = sum(each["seconds"] for each in epochs(own) if each["phase"] == "warmup")
    trained = [each["seconds"] for each in epochs(other)]
    return len(epochs(own)) + round(filling / (sum(trained) / len(trained)))


def figures_of(root: Path) -> dict[str, Any]:
    """Of one run."""
    found = epochs(root)
    steps = json.loads((root / "manifest.json").read_text(encoding="utf-8"))["recipe"]["distill"]["steps"]
    student = [each for each in found if each["phase"] == "distill"]
    return {
        "epochs": len(student),
        "steps": len(student) * steps,
        "images": found[-1]["bank_images"],
        "distillation_seconds": round(sum(each["seconds"] for each in found), 1),
        "seconds": round(spent(root), 1),
        **measured(root),
    }


if __name__ == "__main__":
    main()
