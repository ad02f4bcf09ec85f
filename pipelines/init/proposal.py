"""From a checkpoint to a proposal: combines findings, options and answers, and asks for what is still unknown."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nayer_edge.config import Augment, InputSpec, Teacher
from nayer_edge.errors import UsageError
from nayer_edge.labels.class_names import read_labels
from nayer_edge.models import published
from nayer_edge.models.adapt import TRACE_PIXELS
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, check_forward, load_teacher, untrained_teacher
from nayer_edge.models.names import parse
from nayer_edge.models.prior import EXPECTED, MOST_PIXELS

from ..costs.fitting import device_at_hand
from ..costs.model_cost import cost_of, cost_of_network
from ..costs.planning import measured
from ..recipes.checking import checked
from ..reserved import wanted_images
from .inspect_checkpoint import Findings, Guess, advice_for
from .parsing import checked_name, named_after, parse_shape, parse_size, parse_values
from .sizes import TRIAL, Effort, pad_for, student_for
from .starter_recipe import Proposal

DEFAULT_BUDGET = {"cpu": 3600.0, "cuda": 1200.0}
"""seconds for a run, by kind of device"""
IMAGES = {"export": {"calibration_images": 512}, "validate": {"synthetic_images": 2000}}


@dataclass(frozen=True)
class Question:
    """A question that only the user can answer for certain.

    Attributes:
        flag: the option that answers it.
        text: the question.
        guess: a plausible answer; None if there is none.
        firm: `--yes` accepts the guess.
    """

    flag: str
    text: str
    guess: str | None = None
    firm: bool = True


@dataclass(frozen=True)
class Given:
    """The options of `init`; None if not given."""

    model: str | None = None
    labels: Path | None = None
    input: str | None = None
    resize: str | None = None
    mean: str | None = None
    std: str | None = None
    student: str | None = None
    key: str | None = None
    data: str | None = None
    flip: bool = True
    name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    effort: Effort = "normal"
    budget: float | None = None


# ------------------------------------------------------------------ open questions


def questions(found: Findings, given: Given) -> list[Question]:
    """The questions that neither the checkpoint nor the options answer for certain.

    Raises:
        UsageError: the weights do not fit the network given with `--model`.
    """
    asked: list[Question] = []
    if given.model is None and len(found.exact) != 1:
        asked.append(_which_network(found))
    elif not found.exact and parse(given.model or "nayer:").source != "python":
        raise UsageError(
            f"The weights in {found.path} do not fit {given.model} with {found.classes} classes.",
            why="; ".join(found.matches[0].differing) + "." if found.matches else "It cannot be built.",
            fix=_other_network(found, given.model or ""),
        )
    if given.labels is None and (found.labels is None or not found.labels.sure):
        usual = found.labels and f"those of {found.labels.origin}"
        asked.append(
            Question("--labels", f"A file with the {found.classes} class names, in the classifier's order", usual)
        )
    spec: InputSpec | None = found.input.value if found.input else None
    if found.input is None or not found.input.sure:
        if given.input is None:
            guess = None if spec is None else f"{spec.channels}x{spec.height}x{spec.width}"
            asked.append(Question("--input", "The size of its training images, as channels x height x width", guess))
        for name in ("mean", "std"):
            if getattr(given, name) is None:
                guess = None if spec is None else ",".join(f"{value:g}" for value in getattr(spec, name))
                asked.append(Question(f"--{name}", f"The {name} per channel for pixels in [0, 1]", guess))
    return asked


def _other_network(found: Findings, model: str) -> str:
    """What to try where the weights do not fit the network that was named."""
    nearest = found.matches[0] if found.matches else None
    if nearest is not None and nearest.fitting >= nearest.wanted // 2:
        return f"Most tensors fit {model}. If its code was changed, name that code: --model python:file.py:factory"
    return f"To search for the network, omit --model: nayer-edge init {shlex.quote(str(found.path))}"


def _which_network(found: Findings) -> Question:
    if len(found.exact) > 1:
        names = [match.model for match in found.exact]
        text = (
            f"{len(names)} networks have these tensors, but may compute different results: {', '.join(names[:6])}"
            + (", …" if len(names) > 6 else "")
            + ". Choose one"
        )
        return Question("--model", text, names[0], firm=False)
    text = "The network was not recognised"
    if found.matches:
        near = found.matches[0]
        text += f" (nearest: {near.model}, {near.fitting} of {near.wanted} tensors fit; {'; '.join(near.differing)})"
    return Question("--model", text + ". Give its name, or your own code as python:file.py:factory", firm=False)


def require_answers(asked: Sequence[Question], *, take_guesses: bool) -> None:
    """Checks that every question is answered, or guessed where `take_guesses` allows it.

    Raises:
        UsageError: answers are missing; lists the option for each.
    """
    missing = [q for q in asked if not (take_guesses and q.firm and q.guess is not None)]
    if not missing:
        return
    lines = [f"  {q.flag}: {q.text}." + (f" Guess: {q.guess}" if q.guess else "") for q in missing]
    guesses = not take_guesses and any(question.guess and question.firm for question in missing)
    raise UsageError(
        f"{len(missing)} value{'s are' if len(missing) > 1 else ' is'} missing and cannot be asked for here:",
        why="\n".join(lines),
        fix=f"Add {', '.join(question.flag for question in missing)}"
        + ("; or --yes, which accepts the guesses." if guesses else "."),
    )


# ------------------------------------------------------------------ from answers to a proposal


def settle(found: Findings, given: Given) -> Proposal:
    """Combines findings, options and guesses, and loads the weights into the teacher's network.

    Raises:
        UsageError: an answer is invalid, or does not fit the checkpoint.
    """
    model = given.model or found.exact[0].model
    spec, spec_origin = _spec(found, given)
    classes, labels, labels_origin = _class_names(found, given)
    weights = None if found.path.is_dir() else str(found.path.resolve())
    teacher = Teacher(
        model=model,
        weights=weights,
        weights_key=given.key,
        classes=classes,
        input=spec,
        arguments=dict(found.arguments),
        resize=found.resize if given.resize is None else parse_size(given.resize, "--resize"),
    )
    # The same checks as `run`: the weights load and are finite, and a forward pass works.
    network, _ = load_teacher(teacher, _that_runs(teacher), found.prior)
    if found.prior != "batchnorm":
        _require_measured(found, network)
    cost = cost_of_network(network)
    device = device_at_hand(given.device)
    student = given.student or student_for(spec, len(classes), cost, model)
    if student == model:
        raise UsageError(f"Teacher and student are both {model}.", fix="Name a smaller network with --student.")
    student_cost = cost_of(student, spec, len(classes))
    sections, words = TRIAL, []
    if found.prior != "batchnorm":
        sections = {**TRIAL, "synthesis": {"prior": found.prior, **TRIAL["synthesis"]}}
    if given.effort == "normal":
        seconds = given.budget or DEFAULT_BUDGET[device.kind]
        augment = Augment(pad=pad_for(spec), flip=given.flip)
        built = build_classifier(student, spec, classes)
        holdout = 0 if given.data is not None else IMAGES["validate"]["synthetic_images"]
        wanted = wanted_images(IMAGES["export"]["calibration_images"], holdout)
        planned = measured(network, built, augment, device, prior=found.prior, wanted=wanted).planned(seconds)
        sections, words = {**planned.sections, **IMAGES}, planned.words
    return Proposal(
        name=checked_name(given.name or named_after(found.path)),
        checkpoint=found.path.resolve(),
        key=given.key,
        model=model,
        classes=classes,
        labels=labels,
        spec=spec,
        resize=network.resize,
        student=student,
        data=given.data,
        flip=given.flip,
        device=device,
        effort=given.effort,
        sections=sections,
        words=words,
        costs=(cost, student_cost),
        batch_norms=found.batch_norms,
        kind=found.kind,
        arguments=found.arguments,
        origins={"input": spec_origin, "labels": labels_origin},
    )


def _that_runs(teacher: Teacher) -> Classifier:
    """The untrained network; one that cannot take images of the given size gets them in its library's size."""
    network = untrained_teacher(teacher)
    try:
        check_forward(network)
    except UsageError:
        size = _size_in_library(teacher)
        if teacher.resize is not None or size in (None, teacher.input.shape[1:]):
            raise
        network = untrained_teacher(teacher.model_copy(update={"resize": size}))
        check_forward(network)
    return network


def _size_in_library(teacher: Teacher) -> tuple[int, int] | None:
    """The image size that the network's library builds it for; None if it is unknown."""
    source = parse(teacher.model).source
    if source not in ("torchvision", "timm", "hf"):
        return None
    found, _ = published.input_of(teacher.model, teacher.weights)
    return found.get("height", TRACE_PIXELS), found.get("width", TRACE_PIXELS)


def _require_measured(found: Findings, network: Classifier) -> None:
    """Raises UsageError for image sizes at which no prior without BatchNorm has been measured."""
    height, width = network.resize or network.spec.shape[1:]
    if max(height, width) > MOST_PIXELS:
        raise UsageError(
            f"The network in {found.path} has no BatchNorm layers: {found.kind}.",
            why="NAYER matches statistics that BatchNorm stores. The generator can be trained without them: "
            f"{EXPECTED} This has not been measured at {height}×{width}.",
            fix=f"{advice_for(found.kind) or 'Use a teacher with BatchNorm.'} To try it nevertheless, "
            'write a recipe by hand, with [synthesis] prior = "generator" (docs/REFERENCE.md).',
        )


def _spec(found: Findings, given: Given) -> tuple[InputSpec, str]:
    base: InputSpec = found.input.value if found.input else InputSpec(channels=found.channels)
    channels, height, width = parse_shape(given.input, found.channels) if given.input else base.shape
    if channels != found.channels:
        raise UsageError(
            f"The network expects {found.channels}-channel images, but --input is {channels}x{height}x{width}.",
            fix=f"Type: --input {found.channels}x{height}x{width}",
        )
    mean = parse_values(given.mean, "--mean") if given.mean is not None else base.mean
    std = parse_values(given.std, "--std") if given.std is not None else base.std
    values = {"channels": channels, "height": height, "width": width, "mean": mean, "std": std}
    spec = checked(InputSpec, values, "Invalid input specification:", "Fix --input, --mean or --std.")
    told = [flag for flag in ("input", "mean", "std") if getattr(given, flag) is not None]
    origin = found.input.origin if found.input else "defaults"
    guessed = "" if found.input is not None and found.input.sure else " (a guess)"
    if len(told) == 3:
        return spec, "the options"
    return spec, f"{origin}{guessed}" + (f"; {', '.join(told)} from the options" if told else "")


def _class_names(found: Findings, given: Given) -> tuple[tuple[str, ...], Path | None, str]:
    if given.labels is not None:
        names = read_labels(given.labels)
        if len(names) != found.classes:
            raise UsageError(
                f"{given.labels} holds {len(names)} class names, but the classifier has {found.classes} outputs.",
                fix="Give one name per output, in the same order.",
            )
        return names, given.labels.resolve(), given.labels.name
    guess: Guess | None = found.labels
    assert guess is not None
    return tuple(guess.value), None, guess.origin + ("" if guess.sure else " (a guess)")


def summary(found: Findings) -> dict[str, Any]:
    """The findings as values for `--json`."""
    return {
        "checkpoint": str(found.path),
        "key": found.key,
        "tensors": found.tensors,
        "parameters": found.parameters,
        "batch_norms": found.batch_norms,
        "kind": found.kind,
        "prior": found.prior,
        "classes": found.classes,
        "channels": found.channels,
        "networks": [vars(match) for match in found.matches],
        "input": found.input and {**found.input.value.model_dump(mode="json"), "from": found.input.origin,
                                  "sure": found.input.sure},
        "labels": found.labels and {"from": found.labels.origin, "sure": found.labels.sure},
    }  # fmt: skip
