"""The recipe that `init` writes: TOML with the reason of every number beside it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.models.names import parse
from nayer_edge.storage.files import write_bytes

from ..model_cost import Cost
from ..recipes import preflight
from ..recipes.as_toml import to_toml
from ..recipes.loading import BUILT_IN_DATA, SUFFIX, load_recipe
from ..steps import until
from .sizes import Device, Effort, Sizes

INLINE = 40
"""class names that a recipe holds itself; more of them go into a file beside it"""


@dataclass(frozen=True)
class Plan:
    """Everything that the recipe says.

    Attributes:
        origins: where input and class names are from, for comments.
        labels: the file of class names; None where the recipe holds them.
    """

    name: str
    checkpoint: Path
    key: str | None
    model: str
    classes: tuple[str, ...]
    labels: Path | None
    spec: InputSpec
    student: str
    data: str | None
    flip: bool
    device: Device
    effort: Effort
    sizes: Sizes
    costs: tuple[Cost, Cost]
    batch_norms: int
    origins: Mapping[str, str] = field(default_factory=dict)


def write(plan: Plan, out: Path, *, force: bool = False) -> list[Path]:
    """Writes the recipe, and class names beside it where there are many; then looks at it as `run` would.

    Raises:
        UsageError: something is there already, or the recipe would not run.
    """
    if out.suffix != SUFFIX:
        raise UsageError(f"A recipe cannot be called '{out.name}'.", fix=f"Let --out end with {SUFFIX}.")
    files: dict[Path, str] = {}
    labels = plan.labels
    if labels is None and len(plan.classes) > INLINE:
        labels = out.with_suffix(".labels.txt")
        files[labels] = "\n".join(plan.classes) + "\n"
    files[out] = recipe_text(plan, out, labels)
    if there := [path for path in files if path.exists() and not force]:
        raise UsageError(f"There is a {there[0]} already.", fix="Choose another with --out, or add --force.")
    before = {path: path.read_bytes() if path.exists() else None for path in files}
    for path, text in files.items():
        write_bytes(path, text.encode())
    try:
        preflight.check(load_recipe(str(out)), until(None))
    except BaseException:
        # The same command, mended, finds no half of its work in its way.
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, content)
        raise
    return list(files)


def recipe_text(plan: Plan, out: Path, labels: Path | None) -> str:
    """The recipe as TOML, every number with its reason."""
    sizes, spec, (teacher, student) = plan.sizes, plan.spec, plan.costs
    why = sizes.reasons
    folder = out.resolve().parent
    weights = {} if plan.checkpoint.is_dir() else {"weights": _near(plan.checkpoint, folder)}
    if plan.key:
        weights["weights_key"] = plan.key
    model = f"hf:{_near(plan.checkpoint, folder)}" if plan.checkpoint.is_dir() else _model(plan.model, folder)
    where = f"{plan.device.name}, {plan.device.free_bytes / 2**30:.0f} GiB free"
    ratio = teacher.parameters / max(student.parameters, 1)
    at_hand = plan.data is None or plan.data in BUILT_IN_DATA or plan.data.startswith("$")
    holdout = plan.data if at_hand or plan.data is None else _near(Path(plan.data).expanduser(), folder)
    data = _entries(data=holdout) if holdout else '# data = "holdout"'
    trial, flip = plan.effort == "trial", str(plan.flip).lower()
    described = f"{plan.model} → {plan.student}, without data" + (" (a trial)" if trial else "")
    return f"""\
# Written by `nayer-edge init` for {where}.
# Run it with: nayer-edge run {shlex.quote(out.name)}
# Every key that is not here has the paper's value; `nayer-edge run … --set a.b=c` overrides one for once.
{_entries(name=plan.name, description=described)}
{_entries(device="cpu") if plan.device.kind == "cpu" else "# device: a GPU where there is one"}

[teacher]
# {_count(teacher.parameters)} parameters, {plan.batch_norms} BatchNorm layers, {_macs(teacher)} for an image.
{_entries(model=model, **weights)}
# Class names, in the order of its outputs, from: {_comment(plan.origins.get("labels", ""))}.
{_entries(classes=_near(labels, folder) if labels else plan.classes)}

# What the teacher was trained on, from: {_comment(plan.origins.get("input", ""))}.
# Wrong values here are the commonest reason for a bad student: check them where they are a guess.
[teacher.input]
channels = {spec.channels}
height = {spec.height}
width = {spec.width}
mean = {_numbers(spec.mean)}
std = {_numbers(spec.std)}

[student]
# {_count(student.parameters)} parameters, {ratio:.0f} times fewer, {_macs(student)}. `nayer-edge students` lists more.
{_entries(model=_model(plan.student, folder))}

[lte]
# Class names become vectors once. `nayer-edge lte show {_comment(out.name)}` shows which of them lie close together.
encoder = "all-MiniLM-L6-v2"
prompt = "a photo of a {{label}}"

{_generator(sizes)}[synthesis]
# Images for each round: {why.get("batch", "")}.
batch = {sizes.batch}
# Optimisation steps for each round, rounds for each epoch, and rounds for each epoch of warm-up.
g_steps = {sizes.g_steps}
rounds = {sizes.rounds}
warmup_rounds = {sizes.warmup_rounds}
# Crop and flip inside the loss. The mirror image of a digit or a letter is none: then flip = false, here and below.
augment = {{ pad = {sizes.pad}, flip = {flip} }}

[distill]
# {_sentence(why.get("epochs", "Few, for a trial"))}.
epochs = {sizes.epochs}
warmup_epochs = {sizes.warmup_epochs}
# Student steps for each epoch{_because(why.get("student_batch"))}.
steps = {sizes.steps}
batch = {sizes.student_batch}
lr = {sizes.lr}
augment = {{ pad = {sizes.pad}, flip = {flip} }}
# MiB of images that are kept to learn from: {why.get("bank_mib", "a few rounds")}.
bank_mib = {sizes.bank_mib}
# Rounds of images that only measure agreement with the teacher.
holdout_rounds = {sizes.holdout_rounds}

[export]
# cpu, arm, tensorrt, tensorrt-rtx; several are possible.
targets = ["cpu"]
calibration_images = {sizes.calibration_images}

[validate]
# Real labelled images, where you have some, only measure: a folder of class folders, a parquet or npz file.
# Without them artefact and teacher are compared on synthetic images, and every number says so.
{data}
synthetic_images = {sizes.synthetic_images}

[gate]
artifacts = ["int8.cpu"]
# What you can bear to lose, as fractions: 0.01 is one image in a hundred. Small limits need many images.
accuracy = {{ max_drop_vs_fp32 = 0.015, max_drop_vs_teacher = 0.04 }}
"""


def _generator(sizes: Sizes) -> str:
    if sizes.generator_channels is None:
        return ""
    return f"""\
[generator]
# Width of its last convolutions: {sizes.reasons["generator"]}.
channels = {sizes.generator_channels}

"""


def _model(name: str, folder: Path) -> str:
    """A model's name for the recipe: files relative to it."""
    parsed = parse(name)
    if parsed.source == "python" and parsed.name.endswith(".py"):
        return f"python:{_near(Path(parsed.name).resolve(), folder)}:{parsed.factory}"
    return name


def _near(path: Path, folder: Path) -> str:
    """Relative to the recipe's folder where it lies in or beside it, so that both can be moved together."""
    absolute = path.resolve()
    for base in (folder, folder.parent):
        if absolute.is_relative_to(base) and base != base.parent:
            return Path(os.path.relpath(absolute, folder)).as_posix()
    return str(absolute)


def _entries(**values: str | Sequence[str]) -> str:
    """Keys and values, a line each, without the last line break."""
    return to_toml(values).removesuffix("\n")


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(repr(float(f"{value:.6g}")) for value in values) + "]"


def _comment(text: str) -> str:
    """Text that cannot end a comment's line."""
    return re.sub(r"[^\x20-\x7e\u00a0-\ufffd]", "?", text)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _because(reason: str | None) -> str:
    return f"; the batch is {reason}" if reason else ""


def _macs(cost: Cost) -> str:
    return f"{cost.macs / 1e6:,.0f} million MACs"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} million" if parameters >= 1e6 else f"{parameters:,}"
