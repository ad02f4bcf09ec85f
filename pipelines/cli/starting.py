"""The command that begins with the user's own checkpoint: `init`."""

from __future__ import annotations

import dataclasses
import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from nayer_edge.errors import NayerEdgeError, UsageError
from nayer_edge.text import inert

from .shared import Json, TrustCode, app, example, print_json, stdout

if TYPE_CHECKING:
    from ..init.inspect_checkpoint import Findings
    from ..init.proposal import Given, Question
    from ..init.starter_recipe import Proposal

TRIES = 3
"""times that a question is asked again"""


class DeviceKind(enum.StrEnum):
    """Where the run is to be."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Effort(enum.StrEnum):
    """How long the run may take."""

    TRIAL = "trial"
    NORMAL = "normal"


@app.command(epilog=example("nayer-edge init resnet18.pt --labels names.txt --input 3x224x224 --out mine.toml"))
def init(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Your teacher: a .safetensors file, a state dict, or a folder of transformers.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Its network: torchvision:…, timm:…, nayer:…, python:….", show_default="looked for"
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Its class names: a text, JSON or CSV file.", show_default=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option("--input", metavar="CxHxW", help="Its images, for example 3x224x224.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option("--mean", metavar="X,Y,Z", help="Its normalisation of pixels in [0, 1].")
    ] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="X,Y,Z", help="The same, standard deviations.")] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="The network to train.", show_default="by image size")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="Where in the file the weights are, where it holds several.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Labelled hold-out images, as in validate.data.", show_default=False)
    ] = None,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Mirror images in training; wrong for digits and text.")
    ] = True,
    device: Annotated[DeviceKind, typer.Option("--device", help="Sizes for this device.")] = DeviceKind.AUTO,
    effort: Annotated[
        Effort, typer.Option("--effort", help="trial: minutes, to see that everything fits.")
    ] = Effort.NORMAL,
    name: Annotated[str | None, typer.Option("--name", help="The recipe's name.", show_default="the file's")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The recipe to write.", show_default="<name>.toml")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take the guesses.")] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Looks at a checkpoint, says what it found, and writes a commented recipe for it.

    Asks for what it cannot know on a terminal; elsewhere it names the options that answer it.
    """
    from ..init.parsing import checked_name, named_after, parse_shape, require_files

    # The recipe, its file and the run folder have one name unless told otherwise.
    name = checked_name(name or named_after(out or checkpoint))
    target = out or Path(f"{name}.toml")
    # What is wrong at first sight is said at once: what comes next imports torch, and asks questions.
    if target.exists() and not force:
        raise UsageError(f"There is a {target} already.", fix="Choose another with --out, or add --force.")
    require_files(checkpoint, labels)
    channels = None if size is None else parse_shape(size, 0)[0] or None

    from ..init import proposal as recipes
    from ..init import starter_recipe
    from ..init.inspect_checkpoint import look

    given = recipes.Given(model, labels, size, mean, std, student, key, data, flip, name, device.value, effort.value)
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
        f"{found.parameters:,} parameters, {found.batch_norms} BatchNorm layers, {found.classes} classes, "
        f"{found.channels} channel{'s' if found.channels != 1 else ''}",
    )
    for match in found.exact:
        _line("network", f"{match.model}: every tensor fits")
    if not found.exact:
        for match in found.matches:
            _line(
                "nearest", f"{match.model}: {match.fitting} of {match.wanted} tensors fit; {'; '.join(match.differing)}"
            )
    # What the options say is not guessed; the plan shows it.
    if found.input is not None and given.input is None:
        spec = found.input.value
        guess = "" if found.input.sure else "a guess: "
        _line("input", f"{spec.channels}×{spec.height}×{spec.width} ({guess}{found.input.origin})")
    if found.labels is not None and given.labels is None:
        _line("classes", f"{'' if found.labels.sure else 'a guess: '}{found.labels.origin}")


def _show_plan(plan: Proposal, target: Path) -> None:
    from ..init.sizes import duration

    spec = plan.spec
    pixels = f"{spec.channels}×{spec.height}×{spec.width}"
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
    _line("images", f"{pixels}, mean {mean}, std {std} ({plan.origins['input']})")
    first = ", ".join(plan.classes[:4]) + (", …" if len(plan.classes) > 4 else "")
    _line("classes", f"{first} ({plan.origins['labels']})")
    teacher, student = plan.costs
    _line("student", f"{plan.student}, {student.parameters:,} parameters")
    _line("", f"{student.flop / 2e6:,.1f} million MACs for an image, the teacher's are {teacher.flop / 2e6:,.1f}")
    if student.flop > teacher.flop or student.parameters > teacher.parameters:
        _line("", "larger or slower than the teacher: name another with --student (nayer-edge students)")
    _line("device", f"{plan.device.name}, {plan.device.free_bytes / 2**30:.0f} GiB free")
    if plan.sizes.seconds:
        _line("time", f"{duration(plan.sizes.seconds)}, by the speed at which the teacher ran here just now")
    _line("recipe", str(target))
    stdout().print(f"\nNext: nayer-edge run {inert(str(target))}", style="bold", highlight=False, soft_wrap=True)


def _line(head: str, text: str) -> None:
    line = Text(f"{head:<12}", style="dim").append(inert(text), style="default")
    stdout().print(line, soft_wrap=True)


def _ask(asked: list[Question], given: Given, found: Findings) -> Given:
    """The options with a person's answers; each is checked before the next question."""
    for question in asked:
        name = question.flag.removeprefix("--")
        given = dataclasses.replace(given, **{name: _answer(question, name, found)})
    return given


def _answer(question: Question, name: str, found: Findings) -> Any:
    """A person's answer; one that does not hold is asked for again."""
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
        path = Path(answer).expanduser()
        if len(names := read_labels(path)) != found.classes:
            raise UsageError(f"{path} holds {len(names)} class names, and the classifier has {found.classes} outputs.")
        return path
    if name == "input":
        parse_shape(answer, found.channels)
    elif name in ("mean", "std"):
        parse_values(answer, question.flag)
    elif name == "model":
        parse(answer)
    return answer
