"""How many calibration images, and do synthetic ones suffice? INT8 of a finished run, calibrated in several ways.

    python benchmarks/calibration.py runs/digits --json benchmarks/results/calibration.digits.json
    NAYER_EDGE_DATA=… python benchmarks/calibration.py runs/cifar10-… --sizes 512 --json …

For each seed, images are drawn once: those that the run reserved for calibration, fresh rounds of its generator, the
real training images (for this comparison only; no artifact is made from them), and uniform noise, which is what tools
without images suggest. The first n of them calibrate; everything else, the choice among the four methods by agreement
on one synthetic hold-out included, is what `export --int8` does. Accuracy is measured on the run's real hold-out. A
default may be chosen from the column `synthetic agreement` alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from shared.figures import keep
from shared.origin import origin

from nayer_edge.data import datasets as data
from nayer_edge.export.targets import get_target, is_native
from nayer_edge.export.to_int8 import run_onnx, to_int8
from nayer_edge.pipelines.deploy import FP32, SyntheticSource
from nayer_edge.pipelines.recipes.loading import recipe_of
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.run_folder import RunFolder


def main() -> None:
    """Measures every source, size, seed and target, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sizes", default="64,128,256,512,1024,2048")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", default="cpu,tensorrt")
    parser.add_argument("--sources", default="synthetic,real,noise", help="also: reserved")
    parser.add_argument("--holdout", type=int, default=1000, help="synthetic images on which methods are compared")
    parser.add_argument("--real-holdout", help="labelled images to measure with; the recipe's validate.data by default")
    parser.add_argument("--real-train", help="labelled images to calibrate with; the recipe's teach.data by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = RunFolder.open(arguments.run)
    recipe = recipe_of(run.manifest.recipe, run.root)
    source = SyntheticSource.open(*(run.artifact(name) for name in ("teacher", "lte", "student")), recipe, run)
    rows = measured(arguments, run, recipe, source)
    result = {
        "run": recipe.name,
        "student": recipe.student.model,
        "fp32_top1": rows[0]["fp32_top1"],
        "real_holdout_images": rows[0]["images"],
        "rows": [{key: value for key, value in row.items() if key not in ("fp32_top1", "images")} for row in rows],
        **origin(),
    }
    print(table(result))
    keep(arguments.json, result)


def measured(
    arguments: argparse.Namespace, run: RunFolder, recipe: Recipe, source: SyntheticSource
) -> list[dict[str, Any]]:
    """One row for each source, seed, size and target."""
    spec, classes = recipe.teacher.input, recipe.teacher.classes
    test = data.load(arguments.real_holdout or str(recipe.validate_.data), "holdout", spec, classes)
    images, labels = test.images.numpy().astype(np.float32) / 255, test.labels.numpy()
    fp32 = run_onnx(run.path(FP32), images)
    fp32_top1 = float((fp32.argmax(1) == labels).mean())
    sizes = [int(part) for part in arguments.sizes.split(",")]
    holdout = source.draw("calibration study hold-out", arguments.holdout, Silent())
    rows = []
    for seed in range(arguments.seeds):
        for kind in arguments.sources.split(","):
            pool = _pool(kind, seed, max(sizes), arguments, recipe, source)
            for size in sizes:
                for target in arguments.targets.split(","):
                    with tempfile.TemporaryDirectory() as folder:
                        made = to_int8(
                            run.path(FP32),
                            Path(folder) / "int8.onnx",
                            pool[:size],
                            target,
                            holdout_images=holdout,
                            provenance=kind,
                        )
                        int8 = run_onnx(made.path, images, as_written=not is_native(get_target(target)))
                    rows.append(
                        {
                            "source": kind,
                            "n": size,
                            "target": target,
                            "seed": seed,
                            "method": made.method,
                            "synthetic_agreement": made.record["final"]["top1"],
                            "synthetic_kl": made.record["final"]["mean_kl"],
                            "drop_points": 100 * (fp32_top1 - float((int8.argmax(1) == labels).mean())),
                            "real_agreement": float((int8.argmax(1) == fp32.argmax(1)).mean()),
                            "fp32_top1": fp32_top1,
                            "images": len(labels),
                        }
                    )
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _pool(
    kind: str, seed: int, count: int, arguments: argparse.Namespace, recipe: Recipe, source: SyntheticSource
) -> np.ndarray:
    """Images of one source in random order, (count, C, H, W) in [0, 1]."""
    random = np.random.default_rng(seed)
    spec = recipe.teacher.input
    if kind == "noise":
        return random.random((count, *spec.shape), dtype=np.float32)
    if kind == "reserved":
        images = source.draw("calibration", source.ready("calibration"), Silent())
        assert len(images) >= count, f"the run reserved {len(images)} images for calibration"
        return images[random.permutation(len(images))[:count]]
    if kind == "synthetic":
        return source.draw(f"calibration study {seed}", count, Silent())
    where = arguments.real_train or (recipe.teach.data if recipe.teach else None)
    assert where is not None, "the recipe trains no teacher: say where the real images are, with --real-train"
    images = data.load(where, "train", spec, recipe.teacher.classes).images.numpy()
    return images[random.permutation(len(images))[:count]].astype(np.float32) / 255


def table(result: dict[str, Any]) -> str:
    """Mean ± sd over seeds."""
    lines = [
        f"{result['run']}: {result['student']}, FP32 {100 * result['fp32_top1']:.2f} % "
        f"of {result['real_holdout_images']} real hold-out images",
        "",
        "| target | calibrated with | n | synthetic agreement, % | KL, 1e-3 | drop on real images, points |",
        "|---|---|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["target"], row["source"], row["n"]), []).append(row)
    for (target, kind, size), rows in sorted(groups.items()):
        cells = [
            _spread([100 * row["synthetic_agreement"] for row in rows]),
            _spread([1000 * row["synthetic_kl"] for row in rows]),
            _spread([row["drop_points"] for row in rows]),
        ]
        lines.append(f"| {target} | {kind} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
