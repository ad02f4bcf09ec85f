"""Writes the README's table of students for a given time, from the committed results of `budget.py`.

python benchmarks/budget_table.py --readme README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared.figures import spread

from nayer_edge.pipelines.costs.durations import duration, parse_duration

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- budget -->", "<!-- /budget -->"
NAMES = {"nayer:resnet8": "ResNet-8", "nayer:resnet20": "ResNet-20", "nayer:wrn_16_1": "WRN-16-1"}
TEACHERS = {"photos": "ResNet-20, CIFAR-10"}
"""recipe → teacher and data"""


def main() -> None:
    """Replaces the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, required=True)
    given = parser.parse_args()
    text = given.readme.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    given.readme.write_text(f"{before}{BEGIN}\n{table(read())}\n{END}{after}", encoding="utf-8")


def read() -> list[dict[str, Any]]:
    """All results, by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("budget.*.json"))]


def table(results: list[dict[str, Any]]) -> str:
    """One line for each teacher, student and time."""
    lines = [
        "| photographs, 10,000 real test images | time | two CPU cores | seeds | teacher, % | student, % | INT8, % |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str, float, tuple[float, ...], str], list[dict[str, Any]]] = {}
    for cores, row in ((cores_of(result), row) for result in results for row in result["rows"]):
        # A run that was given more time is no other seed of one long run.
        times = tuple(parse_duration(text) for text in (row["budget"], *row["more"].split("+")) if text)
        groups.setdefault((row["recipe"], row["student"], sum(times), times, cores), []).append(row)
    for (recipe, student, _, times, cores), rows in sorted(groups.items()):
        cells = [
            f"{TEACHERS[recipe]} → {NAMES[student]}",
            " + ".join(duration(seconds) for seconds in times),
            cores,
            str(len(rows)),
            *(_percent([row[key] for row in rows]) for key in ("teacher_top1", "student_top1", "int8_top1")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cores_of(result: dict[str, Any]) -> str:
    """What decides how fast a processor trains: bf16 arithmetic, or the vectors that it has without."""
    has = result["hardware"]["instructions"]
    bf16 = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    return next((name for key, name in bf16.items() if key in has), "AVX512" if "avx512f" in has else "AVX2")


def _percent(values: list[float]) -> str:
    found = spread([100 * value for value in values])
    return f"{found['mean']:.2f}" + (f" ± {found['sd']:.2f}" if found["sd"] else "")


if __name__ == "__main__":
    main()
