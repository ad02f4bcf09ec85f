"""`init`, the command that starts from the user's own checkpoint."""

from __future__ import annotations

import dataclasses
import enum
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from nayer_edge.errors import NayerEdgeError, UsageError
from nayer_edge.storage.files import expanded
from nayer_edge.text import inert

from .shared import Json, TrustCode, app, example, print_json, stdout

if TYPE_CHECKING:
    from ..init.inspect_checkpoint import Findings
    from ..init.proposal import Given, Question
    from ..init.starter_recipe import Proposal

TRIES = 3
"""how often a question is asked before an invalid answer is an error"""


class DeviceKind(enum.StrEnum):
    """The device that the run will use."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Effort(enum.StrEnum):
    """How long the run should take."""

    TRIAL = "trial"
    NORMAL = "normal"


@app.command(epilog=example("nayer-edge init resnet18.pt --labels names.txt --input 3x224x224 --out mine.toml"))
def init(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Your teacher: a .safetensors file, a state dict, or a transformers folder.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Its network: torchvision:…, timm:…, nayer:…, python:….", show_default="detected"),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="Its class names: a text, JSON, CSV or YAML file.", show_default=False),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--input", metavar="CxHxW", help="Its input size, for example 3x224x224.")
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option("--resize", metavar="HxW", help="Size to resize images to, if the teacher accepts no other."),
    ] = None,
    mean: Annotated[
        str | None, typer.Option("--mean", metavar="X,Y,Z", help="Input normalisation: mean per channel.")
    ] = None,
    std: Annotated[
        str | None, typer.Option("--std", metavar="X,Y,Z", help="Input normalisation: standard deviation per channel.")
    ] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="The student network.", show_default="by teacher and image size")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Key of the weights, if the file holds several.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Labelled hold-out images, as in validate.data.", show_default=False)
    ] = None,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Random horizontal flips; not for digits or text.")
    ] = True,
    device: Annotated[DeviceKind, typer.Option("--device", help="Choose sizes for this device.")] = DeviceKind.AUTO,
    effort: Annotated[
        Effort, typer.Option("--effort", help="trial: a run of minutes, to check the setup.")
    ] = Effort.NORMAL,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="TIME", help="Time for the run on this machine.", show_default="1h; on a GPU 20m"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The recipe's name.", show_default="the file's")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The recipe to write.", show_default="<name>.toml")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing recipe.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Accept the guesses without asking, except for the network.")
    ] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Inspects a checkpoint, reports what it finds, and writes a commented recipe for it.

    On a terminal it asks for missing values; elsewhere it lists the options that set them.
    """
    from ..costs.durations import parse_duration
    from ..init.parsing import checked_name, named_after, parse_shape, require_files

    seconds = None if budget is None else parse_duration(budget)
    if seconds is not None and effort is Effort.TRIAL:
        raise UsageError("A trial has no budget.", fix="Leave out --effort trial, or --budget.")
    # By default, the recipe, its file and the run folder have the same name.
    name = checked_name(name or named_after(out or checkpoint))
    target = out or Path(f"{name}.toml")
    # Report obvious mistakes before importing torch and asking questions.
    if target.exists() and not force:
        raise UsageError(f"{target} already exists.", fix="Choose another file with --out, or add --force.")
    require_files(checkpoint, labels)
    channels = None if size is None else parse_shape(size, 0)[0] or None

    from ..init import proposal as recipes
    from ..init import starter_recipe
    from ..init.inspect_checkpoint import look

    given = recipes.Given(
        model, labels, size, resize, mean, std, student, key, data, flip, name, device.value, effort.value, seconds
    )
    found = look(checkpoint, model, key, channels)
    if not as_json:
        _show_findings(found, given)
    asked = recipes.questions(found, given)
    if asked and sys.stdin.isatty() and not yes:
        given = _ask(asked, given, found)
        if given.model != model:
            found = look(checkpoint, given.model, key, channels)
    else:
        recipes.require_answers(asked, take_guesses=yes)
    plan = recipes.settle(found, given)
    files = starter_recipe.write(plan, target, force=force)
    if as_json:
        print_json({"recipe": str(target), "files": [str(path) for path in files], "found": recipes.summary(found)})
        return
    _show_plan(plan, target)


def _show_findings(found: Findings, given: Given) -> None:
    where = f" (under '{inert(found.key)}')" if found.key else ""
    _line("checkpoint", f"{found.path.name}: {found.tensors} tensors{where}")
    _line(
        "",
        f"{found.parameters:,} parameters, {found.batch_norms or 'no'} BatchNorm layers"
        f"{f' ({found.kind})' if found.kind else ''}, {found.classes} classes, "
        f"{found.channels} channel{'s' if found.channels != 1 else ''}",
    )
    from nayer_edge.models.published import may_transform_input

    from ..init.architectures import variants

    for match in found.exact:
        _line("network", f"{match.model}: every tensor fits")
        if others := [name for name in variants(match.model) if name not in {each.model for each in found.exact}]:
            _line("", f"({', '.join(others)}: the same tensors. If it is one of them, name it with --model.)")
        if may_transform_input(match.model, str(found.path)):
            _line("", "(If it was fine-tuned from torchvision's weights, enable transform_input in the recipe.)")
    if found.outside:
        starts = ", ".join(sorted({f"{name.partition('.')[0]}.*" if "." in name else name for name in found.outside}))
        _line("left out", f"{len(found.outside)} other tensors in the file ({starts})")
    if not found.exact:
        for match in found.matches:
            _line(
                "nearest", f"{match.model}: {match.fitting} of {match.wanted} tensors fit; {'; '.join(match.differing)}"
            )
    # Values from options are not guesses; the proposal shows them.
    if found.input is not None and given.input is None:
        spec = found.input.value
        guess = "" if found.input.sure else "a guess: "
        _line("input", f"{spec.channels}×{spec.height}×{spec.width} ({guess}{found.input.origin})")
    if found.labels is not None and given.labels is None:
        _line("classes", f"{'' if found.labels.sure else 'a guess: '}{found.labels.origin}")


def _show_plan(plan: Proposal, target: Path) -> None:
    from nayer_edge.models.prior import EXPECTED

    from ..init.inspect_checkpoint import advice_for

    spec = plan.spec
    pixels = f"{spec.channels}×{spec.height}×{spec.width}"
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
    _line("images", f"{pixels}, mean {mean}, std {std} ({plan.origins['input']})")
    if plan.resize is not None:
        _line("", f"resized to {plan.resize[0]}×{plan.resize[1]} in the teacher, which was built for that size")
    first = ", ".join(plan.classes[:4]) + (", …" if len(plan.classes) > 4 else "")
    _line("classes", f"{first} ({plan.origins['labels']})")
    teacher, student = plan.costs
    _line("student", f"{plan.student}, {student.parameters:,} parameters")
    _line("", f"{student.flop / 2e6:,.1f} million MACs per image (teacher: {teacher.flop / 2e6:,.1f} million)")
    if student.flop > teacher.flop or student.parameters > teacher.parameters:
        _line("", "larger or slower than the teacher: choose another with --student (see nayer-edge students)")
    _line("device", f"{plan.device.name}, {plan.device.free_bytes / 2**30:.0f} GiB free")
    for head, text in plan.words:
        _line(head, text)
    if plan.kind:
        _line("prior", f"generator without L_bn, since the teacher stores no BatchNorm statistics. {EXPECTED}")
        if advice := advice_for(plan.kind):
            _line("", advice)
    _line("recipe", str(target))
    stdout().print(
        f"\nNext: nayer-edge run {inert(shlex.quote(str(target)))}", style="bold", highlight=False, soft_wrap=True
    )


def _line(head: str, text: str) -> None:
    line = Text(f"{head:<12}", style="dim").append(inert(text), style="default")
    stdout().print(line, soft_wrap=True)


def _ask(asked: list[Question], given: Given, found: Findings) -> Given:
    """The options with the user's answers; each answer is checked before the next question."""
    for question in asked:
        name = question.flag.removeprefix("--")
        given = dataclasses.replace(given, **{name: _answer(question, name, found)})
    return given


def _answer(question: Question, name: str, found: Findings) -> Any:
    """The user's answer; an invalid one is asked for again."""
    for left in reversed(range(TRIES)):
        # On standard error: standard output is for results.
        answer = typer.prompt(inert(question.text), default=question.guess, err=True)
        try:
            return _checked(name, str(answer), question, found)
        except NayerEdgeError as error:
            if left == 0:
                raise
            typer.echo(inert(f"{error.what} {error.fix}"), err=True)
    return None


def _checked(name: str, answer: str, question: Question, found: Findings) -> Any:
    from nayer_edge.labels.class_names import read_labels
    from nayer_edge.models.names import parse

    from ..init.parsing import parse_shape, parse_values

    if name == "labels":
        if answer == question.guess:
            return None
        path = expanded(answer)
        if len(names := read_labels(path)) != found.classes:
            raise UsageError(f"{path} holds {len(names)} class names, but the classifier has {found.classes} outputs.")
        return path
    if name == "input":
        parse_shape(answer, found.channels)
    elif name in ("mean", "std"):
        parse_values(answer, question.flag)
    elif name == "model":
        parse(answer)
    return answer
