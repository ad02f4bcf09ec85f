"""The quickstart over seeds: accuracy, INT8 drop and time, from the runs' own reports.

    python benchmarks/digits.py --json benchmarks/results/digits.json --readme README.md

Each seed trains its own teacher and distils its own student through the command line, as a user would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared.figures import keep
from shared.origin import origin

BEGIN, END = "<!-- digits -->", "<!-- /digits -->"


def main() -> None:
    """Runs the seeds, writes the JSON and the README's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [one(seed, Path(folder) / str(seed)) for seed in range(arguments.seeds)]
    result = {
        "runs": runs,
        "mean": {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key != "seed"},
        "sd": {key: statistics.stdev(run[key] for run in runs) for key in runs[0] if key != "seed"},
        **origin(),
    }
    print(table(result))
    keep(arguments.json, result)
    if arguments.readme:
        text = arguments.readme.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        arguments.readme.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}", encoding="utf-8")


def one(seed: int, folder: Path) -> dict[str, Any]:
    """One quickstart with its own seed."""
    began = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "nayer_edge",
        "quickstart",
        "--out",
        str(folder),
        "--set",
        f"seed={seed}",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    report = json.loads((folder / "validate/report.json").read_text())
    fp32, int8 = report["artifacts"][0], report["artifacts"][1]
    return {
        "seed": seed,
        "gate_exit": done.returncode,
        "teacher_top1": report["teacher"]["top1"],
        "student_top1": report["student"]["top1"],
        "int8_top1": int8["top1"],
        "int8_drop": fp32["top1"] - int8["top1"],
        "int8_coverage": int8["int8_coverage"],
        "teacher_params": report["teacher"]["params"],
        "student_params": report["student"]["params"],
        "int8_bytes": int8["size_bytes"],
        "seconds": seconds,
    }


def table(result: dict[str, Any]) -> str:
    """The table of the README."""
    mean, sd, hardware = result["mean"], result["sd"], result["hardware"]

    def rate(key: str) -> str:
        return f"{100 * mean[key]:.2f} ± {100 * sd[key]:.2f} %"

    instructions = "/".join(hardware["instructions"][:2])
    return "\n".join(
        (
            f"| digits, {len(result['runs'])} seeds (mean ± sd), 600 real hold-out images | |",
            "|---|---|",
            f"| teacher, WRN-16-2, {mean['teacher_params']:,.0f} parameters | {rate('teacher_top1')} |",
            f"| student, ResNet-8, {mean['student_params']:,.0f} parameters, distilled without data "
            f"| {rate('student_top1')} |",
            f"| the same in INT8 (ONNX Runtime, {mean['int8_bytes'] / 1000:.0f} kB), calibrated with synthetic images "
            f"| {rate('int8_top1')} |",
            f"| INT8 drop against FP32, points | {100 * mean['int8_drop']:.2f} ± {100 * sd['int8_drop']:.2f} |",
            f"| whole quickstart, {hardware['cores']} cores of {hardware['cpu']} ({instructions}) "
            f"| {mean['seconds']:.0f} ± {sd['seconds']:.0f} s |",
            "",
            f"(Commit {result['commit']}; `{result['command']}`; figures in `benchmarks/results/digits.json`.)",
        )
    )


if __name__ == "__main__":
    main()
