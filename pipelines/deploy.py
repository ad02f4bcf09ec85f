"""Deployment steps: student → FP32 ONNX → one INT8 ONNX per target, calibrated with synthetic images → engines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nayer_edge import generator as generators
from nayer_edge.errors import IntegrityError, MissingError, NayerEdgeError, UsageError
from nayer_edge.export.fp16 import fp32_nodes, to_fp16
from nayer_edge.export.onnx_file import opset_of, read_onnx
from nayer_edge.export.parity import compare, edge_cases
from nayer_edge.export.qat.train import QatTrainer, Schedule
from nayer_edge.export.runners import OrtRunner, TorchRunner
from nayer_edge.export.runtimes import describe, require
from nayer_edge.export.targets import TARGETS, Target, has_module
from nayer_edge.export.to_engine import require_capability, to_engine
from nayer_edge.export.to_int8 import FP16_IMAGES, to_int8
from nayer_edge.export.to_onnx import to_onnx
from nayer_edge.export.to_runtime import to_float_file, to_int8_file
from nayer_edge.labels import embeddings as embeddings_of_labels
from nayer_edge.memory_bank import MemoryBank, to_unit
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import load_classifier
from nayer_edge.procedural import draw_procedural
from nayer_edge.runtime import compute as computing
from nayer_edge.runtime.compute import random_stream
from nayer_edge.runtime.progress import Progress
from nayer_edge.storage.files import read_json, sha256_of, write_json
from nayer_edge.storage.run_folder import Artifact, RunFolder
from nayer_edge.synthesis import draw_images
from nayer_edge.training.augment import crop_and_flip

from .plan import changes_of
from .recipes.schema import Recipe
from .reserved import SHARES, rounds_for
from .steps import STEPS, settings_of

FP32 = "export/student.fp32.onnx"
FP16 = "export/student.fp16.onnx"
ENGINES = "export/engines.json"
RUNTIMES = "export/runtimes.json"
"""the files of runtimes other than ONNX Runtime and TensorRT, and what their runtimes make of them"""
QUANTIZATION = "export/quantization.json"

PARITY_TOLERANCE = 1e-3
"""largest difference of logits between torch and ONNX Runtime, both in FP32, that counts as rounding"""


def int8_file(target: str) -> str:
    """Path of a target's quantized file in the run folder."""
    return f"export/student.int8.{target}{TARGETS[target].suffix}"


def fp32_file(target: str) -> str:
    """Path of a target's FP32 file in the run folder; one ONNX file serves all runtimes that read ONNX."""
    suffix = TARGETS[target].suffix
    return FP32 if suffix == ".onnx" else f"export/student.fp32.{target}{suffix}"


def fp16_file(target: str) -> str:
    """Path of a target's FP16 file, as `fp32_file`."""
    suffix = TARGETS[target].suffix
    return FP16 if suffix == ".onnx" else f"export/student.fp16.{target}{suffix}"


def files_of(target: str, config: Recipe) -> dict[str, str]:
    """Precision → path, of the files that a target with a module in runtimes/ gets; FP16 only where it is wanted."""
    files = {"fp32": fp32_file, "fp16": fp16_file, "int8": int8_file}
    return {p: files[p](target) for p in TARGETS[target].precisions if p != "fp16" or config.export.fp16}


def make_onnx(student: Artifact, *, config: Recipe, out: RunFolder, progress: Progress) -> Artifact:
    """Exports the student and checks that ONNX Runtime computes the same logits as torch.

    Raises:
        IntegrityError: it does not.
    """
    del progress
    network = load_classifier(out.path(student.files["student"]))
    kept = not _changes("onnx", out, config, but=("fp16", "engines", "targets"))
    if not (kept and out.former_file(FP32, "onnx", student.files.values())):
        kept = False
        to_onnx(
            network,
            network.spec.shape,
            out.path(FP32),
            opset=config.export.opset,
            metadata={
                "nayer_edge.model": network.model,
                "nayer_edge.classes": json.dumps(network.classes, ensure_ascii=False),
                "nayer_edge.input": json.dumps(network.spec.model_dump(mode="json")),
            },
        )
    noise = torch.rand(64, *network.spec.shape, generator=random_stream(0, "parity")).numpy()
    images = np.concatenate([noise, *edge_cases(network.spec.shape).values()])
    with TorchRunner(network) as torch_runner, OrtRunner(out.path(FP32)) as onnx_runner:
        parity = compare(torch_runner.infer(images), onnx_runner.infer(images), tolerance=PARITY_TOLERANCE)
    if parity.verdict != "match":
        raise IntegrityError(
            f"The exported ONNX file does not compute the same logits as the student ({parity.verdict}).",
            why=f"Largest difference {parity.max_abs_diff:.3g}, allowed {PARITY_TOLERANCE}; "
            f"{parity.not_finite} inputs with NaN or infinity.",
            fix="Try another opset: --set export.opset=19. If that fails too, please report it with the model's name.",
        )
    files, numbers = {"fp32 onnx": FP32}, {}
    if wants_fp16(config):
        if not (kept and out.former_file(FP16, "onnx", student.files.values())):
            bank = MemoryBank.load(out.path(student.files["bank"]), torch.device("cpu"))
            synthetic = to_unit(bank.newest(FP16_IMAGES)[0]).numpy()
            to_fp16(out.path(FP32), out.path(FP16), np.concatenate([synthetic, images]))
        files["fp16 onnx"] = FP16
        if stay := fp32_nodes(out.path(FP16)):
            numbers["fp16 keeps in fp32"] = "; ".join(f"{node} ({why})" for node, why in stay.items())
    return Artifact(
        "onnx",
        files,
        {
            "opset": opset_of(read_onnx(out.path(FP32))),
            "bytes": out.path(FP32).stat().st_size,
            "max abs diff": _short(parity.max_abs_diff),
            **numbers,
        },
    )


def make_int8(
    teacher: Artifact,
    lte: Artifact,
    student: Artifact,
    onnx: Artifact,
    *,
    config: Recipe,
    out: RunFolder,
    progress: Progress,
) -> Artifact:
    """Quantizes for each target, calibrated with images from the trained generator.

    A target's files stay as they are, with their records, if only the list of targets or FP16 changed: what was
    measured of them holds.
    Files that a runtime cannot build, or lacks a package for, are recorded with the reason; the rest are built.
    """
    needed = [*(name for part in (teacher, lte, student) for name in part.files.values()), onnx.files["fp32 onnx"]]
    kept, runtimes = _kept_targets(needed, config, out)
    missing = [target for target in config.export.targets if target not in kept]
    lacking = {
        f"{precision}.{t}": why for t in missing if (why := _why_not(t, out)) for precision in files_of(t, config)
    }
    possible = [target for target in missing if f"int8.{target}" not in lacking]
    for target in kept:
        listed = {entry["precision"] for entry in runtimes.get(target, ())}
        if has_module(TARGETS[target]) and "fp16" in set(files_of(target, config)) - listed:
            _build_fp16(target, student, lacking, out)
    made = _quantize(teacher, lte, student, onnx, possible, lacking, config, out, progress) if possible else {}
    files, records, numbers = {}, {}, {}
    for target in config.export.targets:
        if has_module(TARGETS[target]):
            before = {entry["precision"]: entry for entry in runtimes.get(target, ())} if target in kept else {}
            runtimes[target] = [
                before.get(precision) or _runtime_record(precision, target, file, lacking, out)
                for precision, file in files_of(target, config).items()
            ]
            for entry in runtimes[target]:
                if entry["status"] != "built":
                    numbers[entry["name"]] = "not built"
                    continue
                numbers[entry["name"]] = f"{out.path(entry['file']).stat().st_size / 1e6:.2f} MB"
                if entry["file"] not in (FP32, FP16):
                    files[f"{entry['precision']} {target}"] = entry["file"]
        else:
            files[f"int8 {target} onnx"] = int8_file(target)
        if f"int8.{target}" in lacking:
            continue
        record = records[target] = {**kept, **made}[target]
        numbers[f"{target} method"] = record["method"]
        if record["finetune"]:
            numbers[f"{target} QAT gain"] = _short(record["finetune"]["gain"])
        numbers[f"{target} int8 coverage"] = _short(record["coverage"]["fraction"])
        if unused := _unused(TARGETS[target], config):
            numbers[f"{target} does not use"] = f"{', '.join(unused)} (it quantizes by itself)"
        if stay := record.get("fp32_nodes"):
            numbers[f"{target} keeps in fp32"] = "; ".join(f"{node} ({why})" for node, why in stay)
    write_json(out.path(QUANTIZATION), records)
    files["quantization"] = QUANTIZATION
    if listed := [entry for target in config.export.targets for entry in runtimes.get(target, ())]:
        write_json(out.path(RUNTIMES), listed)
        files["runtimes"] = RUNTIMES
    return Artifact("int8", files, numbers)


def _unused(target: Target, config: Recipe) -> list[str]:
    """The settings of [export] that were given and that the quantizer of a target's runtime has no use for."""
    if target.suffix == ".onnx":
        return []
    given = {"qat": config.export.qat, "calibration_method": config.export.calibration_method != "auto"}
    return [name for name, is_given in given.items() if is_given]


def _why_not(name: str, out: RunFolder) -> str:
    """Why the runtime of a target cannot take the student at all; empty if it can. Cheap: no image is drawn for it."""
    target = TARGETS[name]
    if not has_module(target):
        return ""
    try:
        require(target)
        if target.suffix == ".onnx":
            describe(target, out.path(FP32))
    except (MissingError, UsageError, IntegrityError) as error:
        return _one_line(error)
    return ""


def _runtime_record(
    precision: str, target: str, file: str, lacking: Mapping[str, str], out: RunFolder
) -> dict[str, Any]:
    """The entry of an artifact in runtimes.json.

    Args:
        lacking: name of an artifact ("int8.openvino") → why it could not be built.
    """
    name = f"{precision}.{target}"
    record = {"name": name, "file": file, "target": target, "precision": precision}
    if name in lacking:
        return {**record, "status": "unavailable", "reason": lacking[name]}
    version, facts = require(TARGETS[target]), describe(TARGETS[target], out.path(file))
    built = {"status": "built", "version": version, "sha256": sha256_of(out.path(file))}
    return {**record, **built, **facts, "runtime": TARGETS[target].runtime}


def _one_line(error: NayerEdgeError) -> str:
    return " ".join(f"{error}".split())


def _changes(step: str, out: RunFolder, config: Recipe, *, but: tuple[str, ...]) -> list[str]:
    """The settings that have changed since the step's former result, except some of [export]."""
    before = out.former.get(step)
    if before is None or before.record is None:
        return []
    row = next(each for each in STEPS if each.name == step)
    now = settings_of(row, config.model_dump(mode="json", by_alias=True))
    skipped = {f"export.{key}" for key in but}
    return changes_of(
        {k: v for k, v in before.record.settings.items() if k not in skipped},
        {k: v for k, v in now.items() if k not in skipped},
    )


def _kept_targets(
    needed: Sequence[str], config: Recipe, out: RunFolder
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """For the wanted targets whose files need not be made again: target → its entry in quantization.json, and target →
    its entries in runtimes.json."""
    if _changes("int8", out, config, but=("targets", "fp16")):
        return {}, {}
    held = [
        name
        for name in config.export.targets
        if all(out.former_file(file, "int8", needed) for file in {fp32_file(name), int8_file(name)} - {FP32})
    ]
    records = read_json(out.path(QUANTIZATION), "the record of quantization") if held else {}
    runtimes: dict[str, list[dict[str, Any]]] = {}
    if out.former_file(RUNTIMES, "int8", needed):
        for entry in read_json(out.path(RUNTIMES), "the list of runtimes' files"):
            # An FP16 file that is missing or out of date is made anew; the others stay.
            if entry["precision"] != "fp16" or _is_current(entry, needed, out):
                runtimes.setdefault(entry["target"], []).append(entry)
    kept = {
        name: records[name] for name in held if name in records and (name in runtimes or not has_module(TARGETS[name]))
    }
    return kept, runtimes


def _is_current(entry: Mapping[str, Any], needed: Sequence[str], out: RunFolder) -> bool:
    """Whether an FP16 file in runtimes.json was built, and is still that of the student."""
    if entry["status"] != "built":
        return False
    if entry["file"] == FP16:
        return out.path(FP16).is_file() and sha256_of(out.path(FP16)) == entry["sha256"]
    return out.former_file(entry["file"], "int8", needed)


def _build_fp16(name: str, student: Artifact, lacking: dict[str, str], out: RunFolder) -> None:
    """Builds a target's FP16 file, unless it is the ONNX file; `lacking` gets the reason if that is impossible."""
    target = TARGETS[name]
    if why := _why_not(name, out):
        lacking[f"fp16.{name}"] = why
    elif target.suffix != ".onnx":
        network = load_classifier(out.path(student.files["student"]))
        try:
            to_float_file(network, network.spec.shape, out.path(fp16_file(name)), target, "fp16")
        except (MissingError, UsageError) as error:
            lacking[f"fp16.{name}"] = _one_line(error)


def _quantize(
    teacher: Artifact,
    lte: Artifact,
    student: Artifact,
    onnx: Artifact,
    targets: Sequence[str],
    lacking: dict[str, str],
    config: Recipe,
    out: RunFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Quantizes for these targets; returns their entries of quantization.json.

    Args:
        lacking: artifact → why it could not be built; gets what a runtime refuses.
    """
    source = SyntheticSource.open(teacher, lte, student, config, out)
    wanted = config.export.calibration_images
    purposes = ("calibration", "calibration hold-out")
    progress.start("draw calibration images", sum(source.steps(purpose, wanted) for purpose in purposes))
    calibration = source.draw("calibration", wanted, progress)
    holdout = source.draw("calibration hold-out", wanted, progress)
    progress.finish()
    trainer = _qat_trainer(source, student, config, out, progress) if config.export.qat else None
    teacher_logits = source.teacher_logits(holdout)
    records = {}
    for target in targets:
        try:
            if TARGETS[target].suffix != ".onnx":
                records[target] = _built_by_runtime(
                    target, student, calibration, holdout, teacher_logits, lacking, config, out, progress
                )
                continue
            records[target] = to_int8(
                out.path(onnx.files["fp32 onnx"]),
                out.path(int8_file(target)),
                calibration,
                target,
                method=config.export.calibration_method,
                holdout_images=holdout,
                max_drop=config.export.max_drop,
                sensitivity=config.export.sensitivity,
                qat=trainer,
                teacher_logits=teacher_logits,
            ).record
        except (MissingError, UsageError) as error:
            if not has_module(TARGETS[target]):
                raise
            lacking[f"int8.{target}"] = _one_line(error)
    return records


def _built_by_runtime(
    name: str,
    student: Artifact,
    calibration: np.ndarray,
    holdout: np.ndarray,
    teacher_logits: np.ndarray,
    lacking: dict[str, str],
    config: Recipe,
    out: RunFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Builds a target's files with the tools of its runtime; returns its entry of quantization.json."""
    target, weights = TARGETS[name], out.path(student.files["student"])
    network = load_classifier(weights)
    shape = network.spec.shape
    try:
        to_float_file(network, shape, out.path(fp32_file(name)), target)
    except (MissingError, UsageError) as error:
        lacking[f"fp32.{name}"] = _one_line(error)
        lacking[f"fp16.{name}"] = _one_line(error)
        raise
    if "fp16" in files_of(name, config):
        _build_fp16(name, student, lacking, out)
    return to_int8_file(
        network,
        shape,
        out.path(int8_file(name)),
        target,
        calibration,
        holdout,
        teacher_logits=teacher_logits,
        max_drop=config.export.max_drop,
        sensitivity=config.export.sensitivity,
        parent_sha256=sha256_of(weights),
        progress=progress,
    )


def _qat_trainer(
    source: SyntheticSource, student: Artifact, config: Recipe, out: RunFolder, progress: Progress
) -> QatTrainer:
    """QAT on augmented images of the run's memory bank, against the teacher's logits."""
    device, settings = source.compute.device, config.export
    bank = MemoryBank.load(out.path(student.files["bank"]), device)

    def draw(random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images = to_unit(crop_and_flip(bank.draw(config.distill.batch, random), config.distill.augment, random))
        with torch.no_grad(), source.compute.autocast():
            return images, source.teacher(images)

    def stream(epoch: int) -> torch.Generator:
        # The stream keeps its old name: a new one would change the results.
        return random_stream(config.seed, "finetune", epoch, device=device)

    schedule = Schedule(settings.qat_epochs, settings.qat_steps, settings.qat_lr, config.distill.temperature)
    return QatTrainer(draw, schedule, stream, device, progress)


def wants_fp16(config: Recipe) -> bool:
    """Whether an FP16 graph was requested or is needed for an engine."""
    return config.export.fp16 or (config.export.engines and any(TARGETS[t].engine for t in config.export.targets))


def engine_file(precision: str, target: str, capability: str) -> str:
    """Path of an engine in the run folder."""
    return f"export/student.{precision}.{target}.{capability}.engine"


def make_engines(onnx: Artifact, int8: Artifact, *, config: Recipe, out: RunFolder, progress: Progress) -> Artifact:
    """Builds FP16 and INT8 engines. One that cannot be built here is recorded with the reason.

    An existing engine that was built from the current graph is kept: no two builds are alike, and this machine may not
    be able to build it.
    """
    before = out.former.get("engine")
    earlier = read_json(out.path(ENGINES), "the list of engines") if before and before.record else []
    wanted = [name for name in config.export.targets if TARGETS[name].engine] if config.export.engines else []
    progress.start("build engines", 2 * len(wanted))
    files, records, numbers = {}, [], {}
    for target in wanted:
        sources = {"fp16": onnx.files["fp16 onnx"], "int8": int8.files[f"int8 {target} onnx"]}
        ahead = TARGETS[target].runtime == "tensorrt_rtx"
        capability = config.export.compute_capability if ahead else "local"
        for precision, source in sources.items():
            name = engine_file(precision, target, capability)
            record = {"name": f"{precision}.{target}.engine", "file": name, "target": target, "precision": precision}
            built = [each for each in earlier if each["file"] == name and each["status"] == "built"]
            if built and out.former_file(name, "engine", [source]):
                files[f"{precision} {target} engine"] = name
                records.append(built[0])
                numbers[record["name"]] = f"{out.path(name).stat().st_size / 1e6:.2f} MB"
                progress.advance()
                continue
            require_capability(target, config.export.compute_capability)
            try:
                info = to_engine(
                    out.path(source), out.path(name), target, compute_capability=capability if ahead else None
                )
            except (MissingError, UsageError) as error:
                records.append({**record, "status": "unavailable", "reason": str(error).replace("\n", " ")})
                numbers[record["name"]] = "not built"
            else:
                files[f"{precision} {target} engine"] = name
                records.append(
                    {
                        **record,
                        "status": "built",
                        "runtime": info.runtime,
                        "version": info.version,
                        "compute_capability": info.compute_capability,
                        "batch": list(info.batch),
                        "network_types": dict(info.network_types),
                        "layers": dict(info.layers),
                        "precision_verified": info.precision_verified,
                        "notes": list(info.notes),
                    }
                )
                numbers[record["name"]] = f"{info.size_bytes / 1e6:.2f} MB"
            progress.advance()
    progress.finish()
    write_json(out.path(ENGINES), records)
    return Artifact("engine", {**files, "engines": ENGINES}, numbers)


@dataclass(frozen=True)
class SyntheticSource:
    """Images for calibration and validation that the student was not trained on.

    Those reserved during distillation come first: they come from all stages of training. The rest is drawn from
    the trained generator, or is procedural if there is none, with a separate random stream for every purpose.
    """

    put_aside: MemoryBank | None
    generator: generators.Generator | None
    memory: generators.Memory | None
    embeddings: torch.Tensor
    teacher: Classifier
    config: Recipe
    compute: computing.Compute

    @classmethod
    def open(
        cls, teacher: Artifact, lte: Artifact, student: Artifact, config: Recipe, out: RunFolder
    ) -> SyntheticSource:
        """Loads generator, embeddings and teacher onto the recipe's device."""
        compute = computing.choose(config.device, config.precision)
        generator, memory = None, None
        if config.synthesis.has_generator:
            generator, memory = generators.load(out.path(student.files["generator"]))
            compute.place(generator)
        network = load_classifier(out.path(teacher.files["teacher"])).requires_grad_(False)
        embeddings = embeddings_of_labels.load(out.path(lte.files["lte"])).embeddings.to(compute.device)
        compute.place(network)
        moved = [(mean.to(compute.device), variance.to(compute.device)) for mean, variance in memory or []]
        kept = student.files.get("images put aside")
        put_aside = MemoryBank.load(out.path(kept), compute.device) if kept else None
        return cls(put_aside, generator, moved or None, embeddings, network, config, compute)

    def draw(self, purpose: str, count: int, progress: Progress) -> np.ndarray:
        """Class-balanced images, (count, C, H, W), float32 in [0, 1]; exactly representable as uint8."""
        return self.draw_labelled(purpose, count, progress)[0]

    def draw_labelled(self, purpose: str, count: int, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """Images as from `draw`, and the class that each was generated for, (count,)."""
        parts = [self._put_aside(purpose, count)]
        if (missing := count - len(parts[0][1])) > 0:
            parts.append(self._drawn(purpose, missing, progress))
        images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return to_unit(images).cpu().numpy(), labels.cpu().numpy()

    def steps(self, purpose: str, count: int) -> int:
        """Optimisation steps that `draw` needs for so many images."""
        missing = count - len(self._put_aside(purpose, count)[1])
        return -(-missing // self.config.synthesis.batch) * self.config.synthesis.g_steps

    def ready(self, purpose: str) -> int:
        """Number of images reserved for a purpose."""
        return 0 if self.put_aside is None else len(self._put_aside(purpose, len(self.put_aside))[1])

    def _put_aside(self, purpose: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Up to `count` images from the rounds reserved for a purpose, spread evenly over training."""
        batch, device = self.config.synthesis.batch, self.compute.device
        if self.put_aside is None or purpose not in SHARES:
            empty = torch.empty(0, *self.teacher.spec.shape, dtype=torch.uint8, device=device)
            return empty, torch.empty(0, dtype=torch.long, device=device)
        images, labels = self.put_aside.newest(len(self.put_aside))
        rounds = rounds_for(purpose, len(images) // batch)
        wanted = min(-(-count // batch), len(rounds))
        chosen = [rounds[number * len(rounds) // wanted] for number in range(wanted)]
        places = [torch.arange(number * batch, (number + 1) * batch, device=device) for number in chosen]
        kept = torch.cat([torch.empty(0, dtype=torch.long, device=device), *places])[:count]
        return images[kept], labels[kept]

    def _drawn(self, purpose: str, count: int, progress: Progress) -> tuple[torch.Tensor, torch.Tensor]:
        def stream(number: int) -> torch.Generator:
            return random_stream(self.config.seed, purpose, number, device=self.compute.device)

        settings, compute = self.config.synthesis, self.compute
        if self.generator is None:
            return draw_procedural(self.teacher, settings, compute, stream, count, progress.advance)
        return draw_images(
            self.generator,
            self.embeddings,
            self.teacher,
            self.memory,
            settings,
            compute,
            stream,
            count,
            progress.advance,
        )

    def teacher_logits(self, images: np.ndarray) -> np.ndarray:
        """The teacher's logits (n, classes) for images (n, C, H, W) in [0, 1]."""
        with torch.no_grad():
            batches = torch.from_numpy(images).split(256)
            return torch.cat([self.teacher(part.to(self.compute.device)).float().cpu() for part in batches]).numpy()


def _short(value: float) -> float:
    return float(f"{value:.3g}")
