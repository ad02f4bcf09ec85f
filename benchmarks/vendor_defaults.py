"""INT8 as this project makes it beside each vendor's default recipe with random images, which is what people without
data do.

    python benchmarks/vendor_defaults.py runs/digits --json benchmarks/results/vendor_defaults.json

For every target of a finished run: the FP32 file, the run's INT8 file, and the file that the vendor's own quantizer
makes with its defaults from as many images of uniform noise. All three run in the target's runtime, on the run's real
hold-out; latencies are taken in turns in one process, at batch 1.

ONNX Runtime: `quantize_static` after `quant_pre_process`. OpenVINO: `nncf.quantize`, if nncf is installed. ExecuTorch:
`XNNPACKQuantizer` as in its documentation. LiteRT: the recipe `static_wi8_ai8`. A row is written as soon as it is
finished, and rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from shared.figures import keep, kept
from shared.origin import origin

from nayer_edge.data import datasets as data
from nayer_edge.errors import IntegrityError, MissingError
from nayer_edge.export.benchmark import benchmark
from nayer_edge.export.runners import OrtRunner, Runner
from nayer_edge.export.runtimes import module_of, open_runner, require
from nayer_edge.export.runtimes.openvino import OpenVinoRunner, import_openvino
from nayer_edge.export.targets import TARGETS
from nayer_edge.models.load import load_classifier
from nayer_edge.pipelines.deploy import FP32, fp32_file, int8_file
from nayer_edge.pipelines.gate.statistics import drop_lower, drop_upper
from nayer_edge.pipelines.measurements import REPORT_PATH
from nayer_edge.pipelines.recipes.loading import recipe_of
from nayer_edge.storage.run_folder import RunFolder

ALPHA = 0.05
NAMES = ("cpu", "openvino", "executorch", "litert")
"""targets whose runtimes execute here"""


def main() -> None:
    """Measures what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--targets", default=",".join(NAMES))
    parser.add_argument("--images", type=int, default=256, help="random images to calibrate with")
    parser.add_argument("--calls", type=int, default=300, help="timed calls of each file")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures = kept(given.json) or {"rows": {}, **origin()}
    for root in given.runs:
        run = RunFolder.open(root)
        for target in given.targets.split(","):
            name = f"{root.name} {target}"
            if name in figures["rows"] or int8_file(target) not in run.manifest.files:
                continue
            figures["rows"][name] = row(run, target, given.images, given.calls)
            keep(given.json, figures)
    print(table(figures["rows"]))


def row(run: RunFolder, name: str, count: int, calls: int) -> dict[str, Any]:
    """One run and target."""
    recipe = recipe_of(run.manifest.recipe, run.root)
    spec = recipe.teacher.input
    test = data.load(str(recipe.validate_.data), "holdout", spec, recipe.teacher.classes)
    images, labels = test.images.numpy().astype(np.float32) / 255, test.labels.numpy()
    noise = np.random.default_rng(0).random((count, *spec.shape), np.float32)
    files = {"fp32": run.path(FP32 if TARGETS[name].suffix == ".onnx" else fp32_file(name))}
    files["ours"] = run.path(int8_file(name))
    report = json.loads(run.path(REPORT_PATH).read_text(encoding="utf-8"))
    coverage = {each["name"]: each["int8_coverage"] for each in report["artifacts"]}
    found: dict[str, Any] = {
        "student": recipe.student.model,
        "input": list(spec.shape),
        "images": len(labels),
        "coverage": coverage[f"int8.{name}"],
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            files["vendor"] = vendor_file(name, run, noise, Path(folder))
            with opened(name, files["vendor"]):
                pass
        except MissingError as error:
            found["vendor_missing"] = f"{error}"
        except IntegrityError as error:
            # The runtime refuses the file.
            found["vendor_missing"] = f"{error}"
            del files["vendor"]
        runners = {label: stack.enter_context(opened(name, path)) for label, path in files.items()}
        right = {label: runner.infer(images).argmax(1) == labels for label, runner in runners.items()}
        timings = benchmark(runners, spec.shape, runs=calls, references=dict.fromkeys(runners, "fp32"))
        for label, timing in zip(runners, timings, strict=True):
            lost, gained = int((right["fp32"] & ~right[label]).sum()), int((~right["fp32"] & right[label]).sum())
            found[label] = {
                "top1": float(right[label].mean()),
                "drop_points": 100 * (lost - gained) / len(labels),
                "drop_lower_points": 100 * drop_lower(lost, gained, len(labels), ALPHA),
                "drop_upper_points": 100 * drop_upper(lost, gained, len(labels), ALPHA),
                "size_bytes": sum(path.stat().st_size for path in parts_of(files[label])),
                "p50_ms": timing.p50,
                "p95_ms": timing.p95,
                "threads": timing.threads,
                "speedup": timing.ratio,
            }
    return found


def parts_of(path: Path) -> list[Path]:
    """The file, and the weights beside an OpenVINO IR."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


class OfIr(OpenVinoRunner):
    """Runs an OpenVINO IR as the project runs ONNX files."""

    def __enter__(self) -> Self:
        self._compile(import_openvino())
        return self


def opened(name: str, path: Path) -> Runner:
    """A runner for a file of a target."""
    if path.suffix == ".xml":
        return OfIr(path)
    return OrtRunner(path) if name == "cpu" else open_runner(TARGETS[name], path)


def vendor_file(name: str, run: RunFolder, noise: np.ndarray, folder: Path) -> Path:
    """The INT8 file that the vendor's quantizer makes with its defaults."""
    if name == "cpu":
        return by_onnxruntime(run.path(FP32), noise, folder)
    if name == "openvino":
        return by_nncf(run.path(FP32), noise, folder)
    network = load_classifier(run.path("student/student.safetensors"))
    shape, path = network.spec.shape, folder / f"vendor{TARGETS[name].suffix}"
    module = module_of(TARGETS[name])
    require(TARGETS[name])
    if name == "executorch":
        module.build(network, shape, path, precision="int8", calibration=noise)
        return path
    module.build(network, shape, folder / "fp32.tflite", precision="fp32")
    return by_ai_edge_quantizer(folder / "fp32.tflite", noise, path)


def by_onnxruntime(fp32: Path, noise: np.ndarray, folder: Path) -> Path:
    """`quantize_static` with its defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[np.ndarray] = iter(noise)

        def get_next(self) -> Any:
            image = next(self._left, None)
            return None if image is None else {"images": image[None]}

    quant_pre_process(str(fp32), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    quantize_static(str(folder / "prepared.onnx"), str(folder / "vendor.onnx"), Reader())
    return folder / "vendor.onnx"


def by_nncf(fp32: Path, noise: np.ndarray, folder: Path) -> Path:
    """`nncf.quantize` with its defaults; the result is an OpenVINO IR."""
    if importlib.util.find_spec("nncf") is None:
        raise MissingError("nncf is not installed.", fix="pip install nncf")
    import nncf  # pyright: ignore[reportMissingImports]
    import openvino

    model = nncf.quantize(openvino.Core().read_model(fp32), nncf.Dataset([image[None] for image in noise]))
    openvino.save_model(model, folder / "vendor.xml")
    return folder / "vendor.xml"


def by_ai_edge_quantizer(fp32: Path, noise: np.ndarray, path: Path) -> Path:
    """The recipe `static_wi8_ai8` with the quantizer's own calibration."""
    from ai_edge_quantizer import quantizer, recipe

    work = quantizer.Quantizer(str(fp32), recipe.static_wi8_ai8())
    ranges = work.calibrate({"serving_default": [{"images": image[None]} for image in noise]})
    path.write_bytes(bytes(work.quantize(ranges).quantized_model))
    return path


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| student | target | FP32, % | ours: drop, points (95 % bounds) | vendor, noise: drop (bounds) "
        "| coverage | speed-up, ours and vendor | FP32 p50, p95, ms | ours p50, p95, ms | kB: FP32, ours, vendor |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in rows.items():
        kinds = [found[label] for label in ("fp32", "ours", "vendor") if label in found]
        cells = [
            f"{found['student']}, {found['input'][1]} px",
            name.rpartition(" ")[2],
            f"{100 * found['fp32']['top1']:.2f}",
            drop(found["ours"]),
            drop(found["vendor"]) if "vendor" in found else "the file does not run",
            "" if found.get("coverage") is None else f"{100 * found['coverage']:.0f} %",
            ", ".join(f"{kind['speedup']:.2f} ×" for kind in kinds[1:]),
            *(f"{kind['p50_ms']:.3f}, {kind['p95_ms']:.3f}" for kind in kinds[:2]),
            ", ".join(f"{kind['size_bytes'] / 1e3:,.0f}" for kind in kinds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def drop(kind: dict[str, Any]) -> str:
    """Points with bounds."""
    low, high = kind["drop_lower_points"], kind["drop_upper_points"]
    return f"{kind['drop_points']:+.2f} ({low:+.2f}, {high:+.2f})"


if __name__ == "__main__":
    main()
