"""nayer-edge from Python: a teacher, and what can be done with its run. `import nayer_edge as ne` shows these names.

The functions are those of the command line (`nayer_edge.pipelines.actions`), over the same run folders. They print
nothing unless asked for progress, and what goes wrong is an exception of the NayerEdgeError family.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from nayer_edge import config
from nayer_edge.errors import UsageError, understood
from nayer_edge.models import in_memory, user_code
from nayer_edge.models.names import BRING_WEIGHTS, MEMORY, parse

from . import actions
from .init.parsing import named_after
from .recipes.checking import checked, problems_of
from .recipes.loading import DESCRIBED, recipe_of, resolved_teacher, with_input
from .recipes.preflight import require_typed
from .recipes.settings import set_value

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from nayer_edge.models.classifier import Classifier
    from nayer_edge.storage.run_folder import RunFolder

    from .gate.judgement import Verdict
    from .measurements import Report
    from .recipes.schema import Recipe
    from .show import Display

FilePath = str | os.PathLike[str]
Labels = Sequence[str] | FilePath
"""class names in the order of the outputs, or a file of them"""
GIVEN = ("teacher", "teach", "student.model")
"""of a recipe, what `distill` is told in other ways"""


class InputSpec(config.InputSpec):
    """The images that a model expects: values in [0, 1], channels first, normalised as (x − mean) / std.

    The normalisation is part of the model from then on. For a network that normalises by itself: mean=0, std=1.

    Args:
        channels: 1 for grey, 3 for red, green, blue; 3 by default.
        height, width: pixels; 32 by default.
        mean, std: one value per channel, or one for all; 0.5 by default.

    Raises:
        UsageError: a value is out of range, or there are not as many as channels.
    """

    def __init__(
        self,
        *,
        channels: int | None = None,
        height: int | None = None,
        width: int | None = None,
        mean: float | Iterable[float] | None = None,
        std: float | Iterable[float] | None = None,
    ) -> None:
        values: dict[str, Any] = {"channels": channels, "height": height, "width": width}
        values |= {"mean": _numbers(mean), "std": _numbers(std)}
        try:
            super().__init__(**{key: value for key, value in values.items() if value is not None})
        except ValidationError as error:
            why = "\n".join(f"  - {sentence}" for sentence in problems_of(error, config.InputSpec))
            raise UsageError("These images cannot be:", why=why) from error


class Teacher:
    """A trained classifier, from an nn.Module in memory. For weights in a file, see `load_teacher`.

    The module is copied, in float32, and stays as it is. A run with such a teacher goes on only from Python, with
    the same teacher (`open`, or `distill` again): no file says how the network is built.

    Args:
        module: normalised images (B, C, H, W) → logits (B, K), or what libraries wrap them in. It has BatchNorm layers.
        classes: the K class names in the order of the logits, or a text, JSON or CSV file of them.
        input: the images that it was trained on.

    Attributes:
        model: its name, as "memory:ResNet@<digest of its weights>" or "torchvision:resnet18".
        classes: class names.
        input: the images.

    Raises:
        UsageError: it is no module, has no BatchNorm layers, cannot take such images, answers with another number of
            classes, or the class names do not hold.
        TrainingError: its answers are not finite, or the same for every image.
        MissingError: torch is not installed.
    """

    def __init__(self, module: nn.Module, *, classes: Labels, input: config.InputSpec) -> None:
        with _at_work():
            from nayer_edge.models.classifier import Classifier
            from nayer_edge.models.load import weights_digest

            network = _copy_of(module)
            values = {"model": MEMORY, "classes": _class_names(classes), "input": _plain(input)}
            section = checked(config.Teacher, values, "This teacher does not hold:", "Mend its classes or input.")
            classifier = Classifier(
                network, f"{MEMORY}:{type(network).__name__}", section.input, section.classes
            ).eval()
            _check(classifier)
            name = in_memory.name_of(network, weights_digest(classifier))
        self._section = section.model_copy(update={"model": name, "input_from": "the program"})
        self._network: nn.Module | None = network

    @property
    def model(self) -> str:
        """Its name in recipes and model cards."""
        return self._section.model

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self._section.classes

    @property
    def input(self) -> config.InputSpec:
        """The images that it expects."""
        return self._section.input

    def __repr__(self) -> str:
        return f"<Teacher {self.model}, {len(self.classes)} classes, {'×'.join(map(str, self.input.shape))}>"


def load_teacher(
    weights: FilePath | None,
    *,
    model: str,
    classes: Labels,
    input: config.InputSpec | None = None,
    weights_key: str | None = None,
    weights_ignore: Sequence[str] = (),
    arguments: Mapping[str, bool | int | float | str] | None = None,
    trust_code: bool = False,
) -> Teacher:
    """A trained classifier from a file, or from weights that a library publishes. Its runs also go on from the
    command line.

    Args:
        weights: a .safetensors file or a state dict, or a name as "torchvision:IMAGENET1K_V1"; None for hf: and
            python: models that bring their own.
        model: "torchvision:resnet18", "timm:…", "nayer:…", "hf:…" or "python:file.py:factory".
        classes: class names in the order of the logits, or a text, JSON or CSV file of them.
        input: the images that it was trained on; what is left open is the library's own description of the weights.
        weights_key: where in the file they are, needed where it holds several ("state_dict_ema").
        weights_ignore: beginnings of names in the file that are no part of the network ("projector.").
        arguments: further arguments of the network.
        trust_code: run the code that a python: model names.

    Raises:
        UsageError: no such file or model, the weights are not this network's, or one of the reasons of `Teacher`.
        IntegrityError: the file is damaged or a pickle that would run code, or a python: model is not trusted.
        MissingError: something is not installed, or a hub cannot be reached.
        TrainingError: its answers are not finite, or the same for every image.
    """
    with _at_work(trust_code=trust_code):
        from nayer_edge.models import load

        source = parse(model).source
        if weights is None and source not in BRING_WEIGHTS:
            raise UsageError(f"{model} brings no weights of its own.", fix="Name the file that holds the teacher's.")
        if input is None and source not in DESCRIBED:
            raise UsageError(
                f"Nobody says what images {model} was trained on.",
                fix="Give input=nayer_edge.InputSpec(channels=…, height=…, width=…, mean=…, std=…).",
            )
        values = {
            "model": model,
            "weights": None if weights is None else os.fspath(weights),
            "weights_key": weights_key,
            "weights_ignore": tuple(weights_ignore),
            "arguments": dict(arguments or {}),
            "classes": _class_names(classes),
            **({} if input is None else {"input": _plain(input)}),
        }
        section = checked(config.Teacher, values, "This teacher does not hold:", "Mend what was given.")
        section = with_input(resolved_teacher(section, lambda _key: Path.cwd()))
        classifier, _ = load.load_teacher(section, load.untrained_teacher(section))
        _check(classifier)
    found = object.__new__(Teacher)
    found._section, found._network = section, None
    return found


class Run:
    """A run folder. `distill`, `run` and `open` return one; `path` is where it lies.

    Every method raises IntegrityError where a file that it needs was altered, UsageError where a step is missing that
    it needs, and MissingError where something is not installed. With `progress=True` it shows what the command line
    shows.
    """

    path: Path

    def __init__(self, path: Path, teacher: Teacher | None = None, *, trust_code: bool = False) -> None:
        self.path = path
        self._teacher, self._trust_code = teacher, trust_code

    def __repr__(self) -> str:
        return f"<Run {self.path}>"

    @property
    def recipe(self) -> Recipe:
        """The whole recipe of the run, as its manifest holds it."""
        with self._at_work():
            return actions.recipe_in(self.path)

    def export(
        self,
        *,
        int8: bool = False,
        fp16: bool | None = None,
        qat: bool | None = None,
        targets: Sequence[str] = (),
        engines: bool | None = None,
        compute_capability: str | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> dict[str, Path]:
        """Writes ONNX: FP32, with `int8` one quantized graph per target, and their engines.

        Args:
            int8: quantize, with images that the run's generator draws.
            fp16: also write an FP16 graph; as the run's recipe says by default, and so the others.
            qat: quantization-aware training on synthetic images; needs `int8`.
            targets: devices, as "cpu", "arm", "tensorrt", "tensorrt-rtx".
            engines: build engines for the targets that have them.
            compute_capability: for TensorRT-RTX, as "sm89".
            settings: further keys of the recipe's [export], as calibration_images=256.

        Returns:
            The exported files by their names in the report, as "fp32" and "int8.cpu".

        Raises:
            UsageError: there is no such target or setting.
            MissingError: an engine cannot be built here; everything else was exported.
        """
        with self._at_work():
            run = actions.export(
                self.path,
                int8=int8,
                fp16=fp16,
                qat=qat,
                targets=(targets,) if isinstance(targets, str) else targets,
                engines=engines,
                compute_capability=compute_capability,
                settings=settings,
                display=_display(progress),
            )
            if int8:
                actions.require_engines(run)
            return _exported(run)

    def validate(
        self, data: FilePath | EllipsisType | None = ..., *, fit: config.Fit | None = None, progress: bool = False
    ) -> Report:
        """Runs every artefact beside the teacher, on the same images.

        Args:
            data: labelled hold-out images: a folder of class folders, a .parquet or .npz file, torchvision's formats,
                or "digits". None: fresh synthetic images, where agreement with the teacher takes the place of accuracy.
                Left out: those of the run's recipe.
            fit: what is done with pictures of another size: "exact" refuses them, "stretch", "center-crop".

        Returns:
            What validate/report.json holds: measurements, no verdict.

        Raises:
            UsageError: there are no such images, or they do not fit the model.
        """
        with self._at_work():
            from .gate.verdict import load_report

            chosen = data if data is None or isinstance(data, EllipsisType) else os.fspath(data)
            return load_report(actions.validate(self.path, chosen, fit=fit, display=_display(progress)))

    def gate(
        self,
        *,
        policy: FilePath | None = None,
        references: FilePath | None = None,
        junit: FilePath | None = None,
        json_out: FilePath | None = None,
        summary: FilePath | None = None,
        **limits: Any,
    ) -> Verdict:
        """Is the validated run good enough to ship? Needs the base install only, and writes only where told.

        Args:
            policy: a policy in TOML; the one of the run's recipe by default.
            references: a references.toml that names the release to compare with.
            junit, json_out, summary: files to write, outside of the run folder; Markdown is added to the last.
            limits: keys of the policy that are to be others than there: by name (max_drop_vs_fp32=0.015), by section
                and key ("per_class.max_drop"), or sections (size={"max_bytes": 200_000}); None lifts a limit.

        Returns:
            `verdict` is "pass", "fail" or "inconclusive"; `checks` says why.

        Raises:
            UsageError: it has not been validated, or policy, limits or references do not hold.
            IntegrityError: a file differs from the manifest, or the report from the files.
        """
        with self._at_work():
            return actions.gate(
                self.path,
                policy=_path(policy),
                limits=limits,
                references=_path(references),
                junit=_path(junit),
                json_out=_path(json_out),
                summary=_path(summary),
            )

    def report(self, *, progress: bool = False) -> Path:
        """Writes the page about the validated run: one self-contained HTML file. Returns its path.

        Raises:
            UsageError: it has not been validated.
        """
        with self._at_work():
            run = actions.report(self.path, display=_display(progress))
            return run.path(run.artifact("report").files["page"])

    def draw(self, count: int = 512, *, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Class-balanced synthetic images from the trained generator, for other tools' calibration as well.

        Returns:
            Images (count, C, H, W), float32 in [0, 1], and the class that each was made for, (count,). The same run
            gives the same images.

        Raises:
            UsageError: `count` is no positive number, or there is no finished student.
        """
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"{count!r} images cannot be drawn.", fix="Ask for one or more.")
        with self._at_work():
            return actions.draw(self.path, count, display=_display(progress))

    def student(self) -> Classifier:
        """The student: an nn.Module, evaluated, on the CPU; images (B, C, H, W) in [0, 1] → logits (B, K). It
        normalises by itself; `classes` and `spec` say the rest.

        Raises:
            UsageError: there is no finished student.
        """
        with self._at_work():
            from nayer_edge.models.load import load_classifier

            run = actions.open_run(self.path)
            files = run.artifact("student").files
            run.require_intact([files["student"], files["student card"]])
            return load_classifier(run.path(files["student"]))

    def _at_work(self) -> contextlib.AbstractContextManager[None]:
        return _at_work(self._teacher, self._trust_code)


def distill(
    teacher: Teacher,
    student: str,
    out: FilePath,
    *,
    fresh: bool = False,
    progress: bool = False,
    trust_code: bool = False,
    **settings: Any,
) -> Run:
    """Distils a student without data: teacher and class names are all that it takes.

    Called again with the same teacher, student and settings, it continues where it was interrupted, and does nothing
    where it was finished.

    Args:
        student: the compact network, as "nayer:wrn_16_1" or "torchvision:mobilenet_v3_small@32".
        out: the run folder.
        fresh: start over: empties the folder first.
        progress: show what the command line shows.
        trust_code: run the code that a python: model names.
        settings: sections of a recipe, as distill={"epochs": 4}, single keys, as **{"distill.epochs": 4}, and seed,
            device and precision. Omitted keys default to the paper's values (docs/REFERENCE.md).

    Raises:
        UsageError: the settings do not hold (all problems at once), or the folder holds a run with another teacher,
            student or settings.
        TrainingError: training went wrong.
        IntegrityError: a finished file was altered, or a python: model is not trusted.
        MissingError: something is not installed, or there is not enough memory.
    """
    path = Path(out)
    with _at_work(teacher, trust_code):
        if not isinstance(teacher, Teacher):
            raise UsageError(
                f"distill() takes a Teacher, and this is a {type(teacher).__name__}.",
                fix="Write nayer_edge.Teacher(module, classes=…, input=…), or nayer_edge.load_teacher(…).",
            )
        recipe = recipe_of(_values(teacher, student, path, settings), Path.cwd(), "given to distill()")
        require_typed(recipe, ["validate.data"])
        actions.make(recipe, path, last="student", fresh=fresh, display=_display(progress))
    return Run(path, teacher, trust_code=trust_code)


def run(
    recipe: FilePath,
    *,
    out: FilePath | None = None,
    until: str | None = None,
    settings: Sequence[str] = (),
    fresh: bool = False,
    progress: bool = False,
    trust_code: bool = False,
) -> Run:
    """Runs a recipe, continuing where it stopped. `Run.gate` then says whether it is good enough.

    Args:
        recipe: a shipped recipe's name, a .toml file, or a run folder to go on with.
        out: the run folder; runs/<recipe> by default.
        until: the last step to run: teacher, lte, student, onnx, int8, engine, validate, gate or report.
        settings: overrides of the recipe, as ["distill.epochs=4"].
        fresh, progress, trust_code: see `distill`.

    Raises:
        UsageError: there is no such recipe or step, or it does not hold; and as `distill`.
    """
    with _at_work(trust_code=trust_code):
        chosen = actions.read_recipe(os.fspath(recipe), list(settings))
        path = actions.default_out(os.fspath(recipe), chosen) if out is None else Path(out)
        actions.make(chosen, path, last=until, fresh=fresh, display=_display(progress))
    return Run(path, trust_code=trust_code)


def open(path: FilePath, *, teacher: Teacher | None = None, trust_code: bool = False) -> Run:
    """Opens a run folder.

    Args:
        teacher: the one that the run was made with, where it was an nn.Module in memory. What does not need the network
            works without it: gate, report, student.
        trust_code: run the code that a python: model names.

    Raises:
        UsageError: there is no run here, or it was made with another teacher.
        IntegrityError: its manifest is damaged.
    """
    root = Path(path)
    with _at_work(trust_code=trust_code):
        recipe = actions.recipe_in(root)
        if teacher is not None:
            _require_same(teacher, recipe, root)
    return Run(root, teacher, trust_code=trust_code)


def _require_same(teacher: Teacher, recipe: Recipe, root: Path) -> None:
    held = recipe.teacher
    if parse(held.model).source != MEMORY:
        raise UsageError(
            f"The teacher of {root} is {held.model}, which is built from its name.", fix="Leave out teacher=…"
        )
    if differing := [key for key in ("model", "classes", "input") if getattr(held, key) != getattr(teacher, key)]:
        raise UsageError(
            f"{root} was made with another teacher.",
            why=f"It was {held.model}, and {teacher.model} was given; {', '.join(differing)} differ.",
            fix="Give the teacher with the same weights, classes and input.",
        )


def _values(teacher: Teacher, student: str, path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a distillation, as TOML would hold it."""
    if wrong := [key for key in settings if key in GIVEN or key.partition(".")[0] in GIVEN]:
        raise UsageError(
            f"'{wrong[0]}' is no setting of distill().", fix="Teacher and student are arguments of their own."
        )
    values: dict[str, Any] = {
        "name": named_after(path.resolve()),
        "teacher": teacher._section.model_dump(mode="json"),
        "student": {"model": student},
    }
    # Sections first: a single key changes what they say.
    for key, value in sorted(settings.items(), key=lambda item: "." in item[0]):
        set_value(values, key.split("."), _plain(value), f"'{key}'")
    return values


def _plain(value: Any) -> Any:
    """A value as TOML would hold it."""
    if isinstance(value, config.Section):
        return {key: _plain(getattr(value, key)) for key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _path(value: FilePath | None) -> Path | None:
    return None if value is None else Path(value)


def _numbers(value: float | Iterable[float] | None) -> tuple[float, ...] | None:
    """One number or several, in a list, an array or a tensor."""
    if value is None:
        return None
    try:
        return tuple(float(item) for item in value) if isinstance(value, Iterable) else (float(value),)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{value!r} is neither a number nor several.", fix="Give one number per channel.") from error


def _class_names(classes: Labels) -> tuple[str, ...]:
    if isinstance(classes, str | os.PathLike):
        from nayer_edge.labels.class_names import read_labels

        return read_labels(Path(classes).expanduser())
    return tuple(classes)


def _copy_of(module: Any) -> nn.Module:
    """The module itself, out of what trains it on several devices or compiles it; in float32 on the CPU."""
    from torch import nn

    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"A teacher is a torch.nn.Module, and this is a {type(module).__name__}.",
            fix="For weights in a file: nayer_edge.load_teacher(file, model=…, classes=…).",
        )
    try:
        return copy.deepcopy(module).cpu().float().eval()
    except Exception as error:  # whatever a user's module holds
        raise UsageError(
            f"This {type(module).__name__} cannot be copied.",
            why=f"{type(error).__name__}: {error}",
            fix="Build it anew and load its state dict, without hooks and handles.",
        ) from error


def _check(classifier: Classifier) -> None:
    """Refuses a teacher that nothing can be learnt from."""
    from nayer_edge.batchnorm import require_batch_norms
    from nayer_edge.distillation import check_teacher
    from nayer_edge.models.load import check_forward
    from nayer_edge.runtime import compute

    require_batch_norms(classifier, f"The teacher {classifier.model}")
    check_forward(classifier)
    check_teacher(classifier, compute.choose("cpu", "fp32"))


def _exported(run: RunFolder) -> dict[str, Path]:
    """The exported files by their names in a report."""
    from nayer_edge.storage.files import read_json

    from .deploy import ENGINES
    from .runnable import engines, graphs

    held = run.manifest.files
    records = read_json(run.path(ENGINES), "the list of engines") if ENGINES in held else []
    candidates = [*graphs(recipe_of(run.manifest.recipe, run.root)), *engines(records)]
    return {candidate.name: run.path(candidate.file) for candidate in candidates if candidate.file in held}


def _display(progress: bool) -> Display | None:
    if not progress:
        return None
    from rich.console import Console

    from .show import Display

    return Display(Console(force_terminal=sys.stdout.isatty()))


@contextlib.contextmanager
def _at_work(teacher: Teacher | None = None, trust_code: bool = False) -> Iterator[None]:
    """A context in which the teacher's network can be built and trusted code runs, and in which a missing package and a
    lack of memory or disk are said in words."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(user_code.trusting(trust_code))
        network = getattr(teacher, "_network", None)
        if teacher is not None and network is not None:
            stack.enter_context(in_memory.holding(teacher.model, network))
        try:
            yield
        except Exception as error:
            found = understood(error, "This")
            if found is None or found is error:
                raise
            raise found from error
