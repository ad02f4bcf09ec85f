"""The CIFAR tables of docs/BENCHMARKS.md: what benchmarks/cifar.py measured, beside what was published.

    python benchmarks/cifar_table.py --page docs/BENCHMARKS.md

The figures come from the committed JSON; a cell without a run stays empty. Published figures are the maximum of test
accuracy over epochs, as their authors report it; ours of that kind has its own column.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cifar"
BEGIN, END = "<!-- cifar -->", "<!-- /cifar -->"

PAIRS = {
    "r34-r18": "ResNet-34 → ResNet-18",
    "v11-r18": "VGG-11-BN → ResNet-18",
    "w402-w161": "WRN-40-2 → WRN-16-1",
    "w402-w401": "WRN-40-2 → WRN-40-1",
    "w402-w162": "WRN-40-2 → WRN-16-2",
}
EPOCHS = (100, 200, 300)

# Teachers, and students trained on the real images: README of zju-vipa/Fast-Datafree (2022), whose teachers NAYER uses.
REAL = {
    "cifar10": {
        "r34-r18": (95.70, 95.20),
        "v11-r18": (92.25, 95.20),
        "w402-w161": (94.87, 91.12),
        "w402-w401": (94.87, 93.94),
        "w402-w162": (94.87, 93.95),
    },
    "cifar100": {
        "r34-r18": (78.05, 77.10),
        "v11-r18": (71.32, 77.10),
        "w402-w161": (75.83, 65.31),
        "w402-w401": (75.83, 72.19),
        "w402-w162": (75.83, 73.56),
    },
}
# NAYER where a figure could be established: Tran et al., CVPR 2024 (their figure of accuracy over hours), and logs that
# others published of its code.
PUBLISHED = {
    ("cifar100", "w402-w162", 100): "70.20 (paper)",
    ("cifar100", "w402-w162", 200): "71.23 (paper)",
    ("cifar100", "w402-w162", 300): "71.72 (paper)",
    ("cifar10", "r34-r18", 100): "93.88 (third-party log)",
    ("cifar10", "w402-w162", 300): "94.16 (third-party log)",
}


def main() -> None:
    """Prints the tables; with `--page` also writes them between the marks of that file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    text = tables(read(arguments.results))
    print(text)
    if arguments.page:
        before, _, rest = arguments.page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        arguments.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def read(folder: Path) -> list[dict[str, Any]]:
    """The committed runs, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def tables(runs: list[dict[str, Any]]) -> str:
    """Both tables as Markdown: the paper's protocol, and those scaled down."""
    whole = [run for run in runs if run["protocol"] == "paper" and not run["variant"]]
    scaled = [run for run in runs if run["protocol"] != "paper" or run["variant"]]
    return "\n".join([*as_published(whole), "", *scaled_down(scaled)])


def as_published(runs: list[dict[str, Any]]) -> list[str]:
    """One line per pair and number of epochs that was run or published; the rest is named as not run."""
    lines = [
        "| top-1, % | E | published: teacher, student trained on real images | published: NAYER "
        "| ours, last epoch | ours, maximum over epochs | seeds | hardware, commit |",
        "|---|--:|---|---|---|---|--:|---|",
    ]
    absent = []
    for dataset, pairs in REAL.items():
        for pair, (teacher, student) in pairs.items():
            for epochs in EPOCHS:
                recipe = f"{dataset}-{pair}-e{epochs}"
                of_recipe = [run for run in runs if run["recipe"] == recipe]
                published = PUBLISHED.get((dataset, pair, epochs), "")
                if not of_recipe:
                    absent.append(recipe)
                if not (of_recipe or published):
                    continue
                name = f"{'CIFAR-10' if dataset == 'cifar10' else 'CIFAR-100'}, {PAIRS[pair]}"
                ours = " | ".join(
                    spread([run["student"][key] for run in of_recipe]) if of_recipe else "not run"
                    for key in ("last", "max_over_epochs")
                )
                lines.append(
                    f"| {name} | {epochs} | {teacher:.2f}, {student:.2f} | {published} | {ours} "
                    f"| {len(of_recipe) or ''} | {origin(of_recipe)} |"
                )
    if absent:
        lines += [
            "",
            f"Not run: {len(absent)} of {len(EPOCHS) * sum(map(len, REAL.values()))} recipes of the paper's tables.",
        ]
    return lines


def scaled_down(runs: list[dict[str, Any]]) -> list[str]:
    """Runs under another protocol: they are comparable only with each other."""
    if not runs:
        return []
    lines = [
        "| scaled down, top-1 in % | student epochs × steps × batch | images made | teacher | last epoch "
        "| agreement with the teacher (synthetic) | seeds | hardware, commit |",
        "|---|---|--:|---|---|---|--:|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["name"].rpartition("-s")[0], []).append(run)
    for name, group in groups.items():
        epochs = [epoch for epoch in group[0]["epochs"] if epoch["phase"] == "distill"]
        # Runs of before this was written down say it in their settings.
        values = dict(setting.removeprefix("distill.").split("=", 1) for setting in group[0]["settings"])
        values |= group[0].get("sizes", {})
        size = f"{len(epochs)} × {values['steps']} × {values['batch']}"
        teacher, last, agreement = (
            spread([value(run) for run in group])
            for value in (
                lambda run: run["teacher"]["top1"],
                lambda run: run["student"]["last"],
                lambda run: run["epochs"][-1]["agreement"],
            )
        )
        made = group[0]["epochs"][-1]["bank_images"]
        lines.append(
            f"| `{name}` | {size} | {made:,} | {teacher} | {last} | {agreement} | {len(group)} | {origin(group)} |"
        )
    return lines


def spread(values: list[float]) -> str:
    """Mean ± standard deviation in per cent; a single run has no spread, nor has one teacher of several."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(set(values)) > 1 else mean


def origin(runs: list[dict[str, Any]]) -> str:
    """Where and by which commits."""
    found = {(run["hardware"]["compute"].partition(",")[0], run["commit"]) for run in runs}
    return "; ".join(f"{hardware}, {commit}" for hardware, commit in sorted(found))


if __name__ == "__main__":
    main()
