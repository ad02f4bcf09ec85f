"""The ordered table of steps, the single source for resuming, `--until`, provenance, the progress display and the docs.

A step is a function `step(*inputs, config, out, progress) -> Artifact`. It takes the artifacts of its input steps, the
resolved recipe, and the run folder that it writes to. Its settings are the parts of the recipe that it reads; if they
or the hashes of its inputs change, it is stale and runs again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nayer_edge.errors import UsageError, nearest
from nayer_edge.storage.run_folder import Artifact


@dataclass(frozen=True)
class Step:
    """One row of the table.

    Attributes:
        name: as in `--until` and the manifest.
        title: what it does, for people.
        function: "module:function" inside pipelines/, imported only when the step runs.
        inputs: steps whose artifacts it takes, in the order of its parameters.
        settings: dotted keys of the recipe that it reads.
        makes: its files, for people.
        writes: its files, as patterns (`*` does not match "/"); while the step is unfinished, they may be in the run
            folder without being in the manifest.
        scratch: files needed to resume an interrupted step; removed when it finishes.
        trains: it takes so long that changed settings never discard its result without `--fresh`.
        retires: steps whose results depend on this one's measurements and are removed when it runs again, so that no
            outdated verdict lies beside a new report.
    """

    name: str
    title: str
    function: str
    inputs: tuple[str, ...]
    settings: tuple[str, ...]
    makes: str
    writes: tuple[str, ...]
    scratch: tuple[str, ...] = ()
    trains: bool = False
    retires: tuple[str, ...] = ()

    def load(self) -> Callable[..., Artifact]:
        """Imports the function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"nayer_edge.pipelines.{module}"), name)


TEACHER_CHECKPOINT = "teacher/checkpoint.safetensors"
BANK = "bank.safetensors"
CHECKPOINT = "student/checkpoint.safetensors"
DECAY_STATE = "student/before_decay.safetensors"
"""the state before the learning rate decayed, from which `--more` continues"""
NEXT_DECAY_STATE = "student/before_decay.next.safetensors"
PENDING = "student/extension.json"
"""length of an extension of a finished student, while it is being trained"""
GIVEN_TIME = "student/given_time.json"
"""the last `--more` or `--finish` of an unfinished student, and the resulting length"""
FINISH_REQUEST = "student/finish_request.json"
"""what `--finish` asks of a process that trains"""
FINISH_ANSWER = "student/finish_answer.json"
NEXT_METRICS = "student/extension.jsonl"
"""metrics of such an extension; the finished student's stay until it is replaced"""

SOURCE = "student/source.json"
"""what a run took over from the run named by `student.bank`: its files and their hashes"""
START_FILES = {
    "bank": "student/source_bank.safetensors",
    "generator": "student/source_generator.safetensors",
    "generator card": "student/source_generator.json",
    "images put aside": "student/source_reserve.safetensors",
}
"""role in that run → where the file lies until the student is finished"""

_TRAINING = ("seed", "device", "precision")

STEPS = (
    Step(
        "teacher",
        "trains or loads the teacher",
        "distill:make_teacher",
        (),
        ("teacher", "teach", *_TRAINING),
        "teacher/teacher.safetensors",
        ("teacher/teacher.safetensors", "teacher/teacher.json"),
        scratch=(TEACHER_CHECKPOINT,),
        trains=True,
    ),
    Step(
        "lte",
        "embeds the class names",
        "distill:make_lte",
        (),
        ("teacher.classes", "lte"),
        "lte.safetensors",
        ("lte.safetensors",),
    ),
    Step(
        "student",
        "distils the student without data",
        "distill:make_student",
        ("teacher", "lte"),
        ("student", "generator", "synthesis", "distill", *_TRAINING),
        "student/ generator/ bank.safetensors reserve.safetensors metrics.jsonl",
        (
            "student/student.safetensors",
            "student/student.json",
            DECAY_STATE,
            SOURCE,
            "generator/generator.safetensors",
            "generator/generator.json",
            "generator/synthetic.png",
            "bank.safetensors",
            "reserve.safetensors",
            "metrics.jsonl",
        ),
        scratch=(
            *(CHECKPOINT, NEXT_DECAY_STATE, PENDING, GIVEN_TIME, NEXT_METRICS, FINISH_REQUEST, FINISH_ANSWER),
            *START_FILES.values(),
        ),
        trains=True,
    ),
    Step(
        "onnx",
        "exports FP32 ONNX and checks parity",
        "deploy:make_onnx",
        ("student",),
        ("export.opset", "export.fp16", "export.engines", "export.targets"),
        "export/student.fp32.onnx",
        ("export/student.fp32.onnx", "export/student.fp16.onnx"),
    ),
    Step(
        "int8",
        "quantizes with synthetic images",
        "deploy:make_int8",
        ("teacher", "lte", "student", "onnx"),
        (
            "synthesis",
            "export.targets",
            "export.fp16",
            "export.calibration_images",
            "export.calibration_method",
            "export.max_drop",
            "export.sensitivity",
            "export.qat",
            "export.qat_epochs",
            "export.qat_steps",
            "export.qat_lr",
            "distill",
            *_TRAINING,
        ),
        "export/student.int8.<target>.onnx export/student.<precision>.<target>.<ext> export/quantization.json "
        "export/runtimes.json",
        (
            "export/student.int8.*.onnx",
            "export/student.*.pte",
            "export/student.*.tflite",
            "export/quantization.json",
            "export/runtimes.json",
        ),
    ),
    Step(
        "engine",
        "builds engines for the targets that have them",
        "deploy:make_engines",
        ("onnx", "int8"),
        ("export.targets", "export.engines", "export.compute_capability"),
        "export/student.<precision>.<target>.<sm>.engine export/engines.json",
        ("export/student.*.engine", "export/engines.json"),
    ),
    Step(
        "validate",
        "compares every artifact with the teacher",
        "validation.validate:make_report",
        ("teacher", "lte", "student", "onnx", "int8", "engine"),
        ("validate", "synthesis", "seed", "device", "precision"),
        "validate/report.json validate/predictions.npz",
        ("validate/report.json", "validate/predictions.npz"),
        retires=("gate", "report"),
    ),
    Step(
        "gate",
        "gives the verdict",
        "gate.verdict:make_verdict",
        ("validate",),
        ("gate",),
        "gate/verdict.json",
        ("gate/verdict.json", "gate/junit.xml"),
    ),
    Step(
        "report",
        "writes the page",
        "report.page:make_page",
        ("teacher", "lte", "student", "onnx", "int8", "engine", "validate", "gate"),
        # The page shows the whole recipe.
        (
            *(
                "name",
                "description",
                "measured",
                "budget",
                "image_time",
                "teacher",
                "teach",
                "lte",
                "student",
                "generator",
            ),
            "synthesis",
            *("distill", "export", "validate", "gate", "tracking", *_TRAINING),
        ),
        "report.html",
        ("report.html",),
    ),
)
NAMES = tuple(step.name for step in STEPS)


def until(name: str | None) -> tuple[Step, ...]:
    """The steps up to and including `name`; all steps if it is None.

    Raises:
        UsageError: there is no such step.
    """
    if name is None:
        return STEPS
    if name not in NAMES:
        raise UsageError(f"There is no step '{name}'.{nearest(name, NAMES)}", fix=f"The steps are: {', '.join(NAMES)}.")
    return STEPS[: NAMES.index(name) + 1]


def settings_of(step: Step, recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved recipe that a step reads, by dotted key."""
    found = {}
    for key in step.settings:
        value: Any = recipe
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


def table() -> str:
    """The steps as the Markdown table of README.md and docs/ARCHITECTURE.md."""
    rows = ["| step | what it does | reads | makes |", "|---|---|---|---|"]
    for step in STEPS:
        made = " ".join(f"`{name}`" for name in step.makes.split())
        rows.append(f"| `{step.name}` | {step.title} | {', '.join(step.inputs) or 'the recipe'} | {made} |")
    return "\n".join(rows)
