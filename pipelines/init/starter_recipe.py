"""Writes the recipe of `init`: TOML, with a comment that explains each choice."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.models.names import parse
from nayer_edge.models.prior import EXPECTED
from nayer_edge.models.published import may_transform_input
from nayer_edge.storage.files import expanded, write_bytes

from ..costs.fitting import Device
from ..costs.model_cost import Cost
from ..recipes import preflight
from ..recipes.as_toml import to_toml
from ..recipes.loading import BUILT_IN_DATA, SUFFIX, load_recipe
from ..steps import until
from .sizes import Effort, pad_for

INLINE = 40
"""up to this many class names are written into the recipe; more go into a file beside it"""


@dataclass(frozen=True)
class Proposal:
    """The values of a proposed recipe.

    Attributes:
        sections: values of the recipe's other sections.
        words: the plan for a time budget, as (heading, text); empty for a trial.
        kind: what the teacher has instead of BatchNorm, for people; empty if it has BatchNorm.
        arguments: of the teacher's network.
        origins: where input and class names come from, for comments.
        labels: the user's file of class names; None if they did not name one.
    """

    name: str
    checkpoint: Path
    key: str | None
    model: str
    classes: tuple[str, ...]
    labels: Path | None
    spec: InputSpec
    resize: tuple[int, int] | None
    student: str
    data: str | None
    flip: bool
    device: Device
    effort: Effort
    sections: Mapping[str, Mapping[str, Any]]
    words: Sequence[tuple[str, str]]
    costs: tuple[Cost, Cost]
    batch_norms: int
    kind: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)


def write(proposal: Proposal, out: Path, *, force: bool = False) -> list[Path]:
    """Writes the recipe, with a file of class names if there are many, then checks it as `run` would.

    Raises:
        UsageError: a file already exists, or the recipe would not run.
    """
    if out.suffix != SUFFIX:
        raise UsageError(f"'{out.name}' is not a recipe file name.", fix=f"Give --out a name that ends with {SUFFIX}.")
    files: dict[Path, str] = {}
    labels = proposal.labels
    if labels is None and len(proposal.classes) > INLINE:
        labels = out.with_suffix(".labels.txt")
        files[labels] = "\n".join(proposal.classes) + "\n"
    files[out] = recipe_text(proposal, out, labels)
    if there := [path for path in files if path.exists() and not force]:
        raise UsageError(f"{there[0]} already exists.", fix="Choose another file with --out, or add --force.")
    before = {path: path.read_bytes() if path.exists() else None for path in files}
    for path, text in files.items():
        write_bytes(path, text.encode())
    try:
        preflight.check(load_recipe(str(out)), until(None))
    except BaseException:
        # Leave nothing behind, so that the corrected command is not refused.
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, content)
        raise
    return list(files)


def recipe_text(proposal: Proposal, out: Path, labels: Path | None) -> str:
    """The recipe as TOML, with comments."""
    sections, spec, (teacher, student) = proposal.sections, proposal.spec, proposal.costs
    folder = out.resolve().parent
    weights = {} if proposal.checkpoint.is_dir() else {"weights": _near(proposal.checkpoint, folder)}
    if proposal.key:
        weights["weights_key"] = proposal.key
    model = (
        f"hf:{_near(proposal.checkpoint, folder)}" if proposal.checkpoint.is_dir() else _model(proposal.model, folder)
    )
    where = f"{proposal.device.name}, {proposal.device.free_bytes / 2**30:.0f} GiB free"
    ratio = teacher.parameters / max(student.parameters, 1)
    at_hand = proposal.data is None or proposal.data in BUILT_IN_DATA or proposal.data.startswith("$")
    holdout = proposal.data if at_hand or proposal.data is None else _near(expanded(proposal.data), folder)
    data = _entries(data=holdout) if holdout else '# data = "holdout"'
    trial = proposal.effort == "trial"
    augment = f"{{ pad = {pad_for(spec)}, flip = {str(proposal.flip).lower()} }}"
    typed = shlex.quote(out.name)
    layers = (
        f"{proposal.batch_norms} BatchNorm layers" if not proposal.kind else f"no BatchNorm layers ({proposal.kind})"
    )
    described = f"{proposal.model} → {proposal.student}, without data" + (" (a trial)" if trial else "")
    return f"""\
# Written by `nayer-edge init` for {where}.
# Run it with: nayer-edge run {typed}
# Omitted keys default to the paper's values; `nayer-edge run … --set a.b=c` overrides a key for one run.
{_entries(name=proposal.name, description=described)}
{_entries(device="cpu") if proposal.device.kind == "cpu" else "# device: a GPU if there is one"}

[teacher]
# {_count(teacher.parameters)} parameters, {layers}, {_macs(teacher)} per image.
{_entries(model=model, **weights)}{_arguments(proposal, model)}
# Class names, in the order of the outputs, from: {_comment(proposal.origins.get("labels", ""))}.
{_entries(classes=_near(labels, folder) if labels else proposal.classes)}
{_resize(proposal.resize)}
# The input that the teacher was trained with, from: {_comment(proposal.origins.get("input", ""))}.
# Wrong values here are a common cause of a poor student: verify every value marked as a guess.
[teacher.input]
channels = {spec.channels}
height = {spec.height}
width = {spec.width}
mean = {_numbers(spec.mean)}
std = {_numbers(spec.std)}

[student]
# {_count(student.parameters)} parameters, {ratio:.0f} times fewer, {_macs(student)}. `nayer-edge students` lists more.
{_entries(model=_model(proposal.student, folder))}

[lte]
{_embeddings(proposal, typed)}

{_section("budget", sections, _BUDGET, proposal.words)}{_section("generator", sections)}\
{_section("synthesis", sections, _SYNTHESIS)}\
# Random crop and flip inside the loss. For digits and text, set flip = false here and in [distill].
augment = {augment}

{_section("distill", sections, _DISTILL)}\
augment = {augment}

[export]
# One or more of cpu, arm, openvino, executorch, litert, tensorrt, tensorrt-rtx.
targets = ["cpu"]
calibration_images = {sections["export"]["calibration_images"]}
# The most sensitive layers stay in float until the drop of INT8 against FP32 on synthetic images is at most this.
max_drop = 0.01

[validate]
# Real labelled images, if you have some: a folder of class folders, a parquet or npz file.
# They are used only for measuring. Without them, artifacts and teacher are compared on synthetic images, and every
# number says so.
{data}
synthetic_images = {sections["validate"]["synthetic_images"]}

[gate]
artifacts = ["int8.cpu"]
# Accepted loss of accuracy, as fractions: 0.01 is one image in a hundred. Small limits need many images.
accuracy = {{ max_drop_vs_fp32 = 0.015, max_drop_vs_teacher = 0.04 }}
# The export leaves layers in float where INT8 costs too much accuracy. To insist on INT8 everywhere:
# int8 = {{ min_coverage = 1.0 }}
"""


_BUDGET = {"seconds": "Planned for this time on this machine; `nayer-edge run … --budget 2h` plans again"}
_SYNTHESIS = {
    "prior": f"The teacher stores no BatchNorm statistics, so the generator works without L_bn. {EXPECTED.rstrip('.')}",
    "batch": "Images per round, optimisation steps per round, rounds per epoch, and rounds per warm-up epoch",
    "g_life": "Epochs after which the generator is re-initialised: never, because its first rounds are poor",
    "reserve": "Fraction of the rounds reserved for calibration and as a synthetic hold-out",
}
_DISTILL = {
    "epochs": "Warm-up epochs only make images",
    "steps": "Student steps per epoch",
    "schedule": "The learning rate is constant, then falls; so the run can be continued with --more",
    "views": "Augmented views per image, for which the teacher's logits are computed once",
    "bank_mib": "Limit of the memory bank of synthetic images, MiB",
    "holdout_rounds": "Rounds of images held out to measure agreement with the teacher",
}
"""a comment above each of these keys"""


def _embeddings(proposal: Proposal, typed: str) -> str:
    return f"""\
# Class names are embedded once. `nayer-edge lte show {_comment(typed)}` shows which of them are similar.
encoder = "all-MiniLM-L6-v2"
prompt = "a photo of a {{label}}\""""


def _section(
    name: str,
    sections: Mapping[str, Mapping[str, Any]],
    comments: Mapping[str, str] | None = None,
    words: Sequence[tuple[str, str]] = (),
) -> str:
    """A section as TOML with comments; empty if there is none."""
    if name not in sections:
        return ""
    lines = [f"[{name}]", *(f"# {_sentence(text)}." for _, text in words)]
    for key, value in sections[name].items():
        if text := (comments or {}).get(key):
            lines.append(f"# {text}.")
        lines.append(_entries(**{key: value}))
    end = "" if name in ("synthesis", "distill") else "\n"
    return "\n".join(lines) + "\n" + end


def _model(name: str, folder: Path) -> str:
    """A model name for the recipe, with the path of a Python file relative to the recipe."""
    parsed = parse(name)
    if parsed.source == "python" and parsed.name.endswith(".py"):
        return f"python:{_near(Path(parsed.name).resolve(), folder)}:{parsed.factory}"
    return name


def _near(path: Path, folder: Path) -> str:
    """The path relative to the recipe if it lies in the recipe's folder or its parent, so that both can be moved
    together; otherwise the absolute path."""
    absolute = path.resolve()
    for base in (folder, folder.parent):
        if absolute.is_relative_to(base) and base != base.parent:
            return Path(os.path.relpath(absolute, folder)).as_posix()
    return str(absolute)


def _entries(**values: Any) -> str:
    """Keys and values as TOML lines, without the last line break."""
    return to_toml(values).removesuffix("\n")


def _arguments(proposal: Proposal, model: str) -> str:
    if proposal.arguments:
        return "\n" + _dotted(proposal.arguments, "arguments.")
    if not may_transform_input(model, str(proposal.checkpoint)):
        return ""
    return (
        "\n# Uncomment this if it was trained from torchvision's published weights: torchvision then sets it silently."
        "\n# arguments = { transform_input = true }"
    )


def _dotted(values: Mapping[str, Any], prefix: str) -> str:
    """Keys and values as TOML lines with dotted keys, which need no section of their own."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            name = to_toml({key: 0}).partition(" = ")[0]
            lines.append(_dotted(value, f"{prefix}{name}."))
        else:
            lines.append(prefix + _entries(**{key: value}))
    return "\n".join(lines)


def _resize(size: tuple[int, int] | None) -> str:
    if size is None:
        return ""
    comment = "# Height and width that the network needs: the teacher resizes its images."
    return f"{comment}\n{_entries(resize=size)}\n"


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(repr(float(f"{value:.6g}")) for value in values) + "]"


def _comment(text: str) -> str:
    """The text without characters that could end a comment."""
    return re.sub(r"[^\x20-\x7e\u00a0-\ufffd]", "?", text)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _macs(cost: Cost) -> str:
    return f"{cost.macs / 1e6:,.0f} million MACs"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} million" if parameters >= 1e6 else f"{parameters:,}"
