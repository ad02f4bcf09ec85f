"""The Python API of nayer-edge: teachers and runs. `import nayer_edge as ne` exposes these names.

The functions share their code (`nayer_edge.pipelines.actions`) and run folders with the command line. They print
nothing unless called with `progress=True`, and raise subclasses of NayerEdgeError.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from nayer_edge import config
from nayer_edge.errors import NayerEdgeError, UsageError, understood
from nayer_edge.models import in_memory, user_code
from nayer_edge.models.names import BRING_WEIGHTS, MEMORY, located, parse
from nayer_edge.storage.files import expanded
from nayer_edge.storage.run_folder import MANIFEST

from . import actions
from .gate.judgement import Verdict
from .init.parsing import plain_name
from .measurements import Report
from .recipes.checking import checked, problems_of
from .recipes.loading import DESCRIBED, recipe_of, resolved_teacher, with_input
from .recipes.preflight import require_typed
from .recipes.schema import Recipe
from .recipes.settings import set_value
from .sweep.order import SweepOrder

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from nayer_edge.models.classifier import Classifier
    from nayer_edge.storage.run_folder import RunFolder

    from .show import Display
    from .sweep.record import Sweep as SweepRecord

FilePath = str | os.PathLike[str]
Labels = Sequence[str] | FilePath
"""class names in the order of the outputs, or a file of them"""
GIVEN = ("teacher", "teach", "student.model", "student.bank")
"""recipe keys that `distill` takes as arguments or does not accept"""


_ARGUMENTS = {
    **{name: name for name in ("budget", "more", "finish", "bank", "until", "out", "policy", "junit", "summary")},
    **{name: f"{name}=True" for name in ("int8", "qat", "only", "fresh")},
    **{"no-engine": "engines=False", "target": "targets", "set": "settings", "json-out": "json_out"},
    **{"compute-capability": "compute_capability", "trust-code": "trust_code=True"},
}
"""option of the command line → argument"""
_OPTION = re.compile(rf"--({'|'.join(_ARGUMENTS)})\b( \d[\w.]*\w)?")


class InputSpec(config.InputSpec):
    """The input that a model expects: images in [0, 1], channels first, normalised as (x − mean) / std.

    The normalisation becomes part of the model. For a network that normalises its own input, use mean=0, std=1.

    Args:
        channels: 1 for greyscale, 3 for RGB; default: 3.
        height, width: pixels; default: 32.
        mean, std: one value per channel, or one for all; default: 0.5.

    Raises:
        UsageError: a value is out of range, or the number of values differs from the number of channels.
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
            raise UsageError("Invalid input specification:", why=why) from error


class Teacher:
    """A trained classifier, from an nn.Module in memory. For weights in a file, see `load_teacher`.

    The module is copied, in float32; the original is not changed. A run with such a teacher can be continued only from
    Python, with the same teacher (`open`, or `distill` again), because no file describes the network's architecture.

    Args:
        module: normalised images (B, C, H, W) → logits (B, K), possibly wrapped in a library's output object. Without
            BatchNorm layers, `distill` needs the setting synthesis={"prior": "generator"}.
        classes: the K class names in the order of the logits, or a text, JSON, CSV or YAML file that lists them.
        input: the input specification that it was trained with.
        resize: height and width that the module needs, if it cannot take images of the input's size. The teacher then
            resizes them, and the student sees them as they are.

    Attributes:
        model: its name, such as "memory:ResNet@<digest of its weights>" or "torchvision:resnet18".
        classes: class names.
        input: the input specification.

    Raises:
        UsageError: not a module, it does not accept such images, its answers depend on the other images of the batch,
            the number of outputs differs from the number of class names, or the class names are invalid.
        TrainingError: its outputs are not finite, or the same for every image.
        MissingError: torch is not installed.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        classes: Labels,
        input: config.InputSpec,
        resize: tuple[int, int] | None = None,
    ) -> None:
        with _at_work():
            from nayer_edge.models.classifier import Classifier
            from nayer_edge.models.load import weights_digest

            network = _copy_of(module)
            values = {"model": MEMORY, "classes": _class_names(classes), "input": _plain(input), "resize": resize}
            section = checked(config.Teacher, values, "Invalid teacher:", "Correct its classes or input.")
            rebuild = {} if resize is None else {"resize": list(resize)}
            kind = f"{MEMORY}:{type(network).__name__}"
            classifier = Classifier(network, kind, section.input, section.classes, rebuild).eval()
            _check(classifier)
            name = in_memory.name_of(network, weights_digest(classifier))
        self._section = section.model_copy(update={"model": name, "input_from": "the program"})
        self._network: nn.Module | None = network

    @property
    def model(self) -> str:
        """The name in recipes and model cards."""
        return self._section.model

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self._section.classes

    @property
    def input(self) -> config.InputSpec:
        """The input specification."""
        return self._section.input

    def __repr__(self) -> str:
        return f"<Teacher {self.model}, {len(self.classes)} classes, {'×'.join(map(str, self.input.shape))}>"


def load_teacher(
    weights: FilePath | None,
    *,
    model: str,
    classes: Labels,
    input: config.InputSpec | None = None,
    resize: tuple[int, int] | None = None,
    weights_key: str | None = None,
    weights_ignore: Sequence[str] = (),
    arguments: Mapping[str, bool | int | float | str] | None = None,
    trust_code: bool = False,
) -> Teacher:
    """Loads a trained classifier from a file, or from weights that a library publishes. Its runs can also be
    continued from the command line.

    Args:
        weights: a .safetensors file, a state dict, or a name such as "torchvision:IMAGENET1K_V1"; None for hf: and
            python: models that provide their own.
        model: "torchvision:resnet18", "timm:…", "nayer:…", "hf:…" or "python:file.py:factory".
        classes: class names in the order of the logits, or a text, JSON, CSV or YAML file that lists them.
        input: the input specification that it was trained with; omitted values default to the library's metadata for
            the weights.
        resize: see `Teacher`.
        weights_key: their key in the file, needed if it contains several state dicts ("state_dict_ema").
        weights_ignore: prefixes of parameter names in the file to ignore ("projector.").
        arguments: further arguments for building the network.
        trust_code: allow the code of a python: model to run.

    Raises:
        UsageError: no such file or model, the weights do not match the network, or as for `Teacher`.
        IntegrityError: the file is damaged, is a pickle that would run code, or a python: model is not trusted.
        MissingError: a package is not installed, or a hub cannot be reached.
        TrainingError: its outputs are not finite, or the same for every image.
    """
    with _at_work(trust_code=trust_code):
        from nayer_edge.models import load

        source = parse(model).source
        if weights is None and source not in BRING_WEIGHTS:
            raise UsageError(f"{model} has no weights of its own.", fix="Give the file with the teacher's weights.")
        if input is None and source not in DESCRIBED:
            raise UsageError(
                f"No input specification is known for {model}.",
                fix="Give input=nayer_edge.InputSpec(channels=…, height=…, width=…, mean=…, std=…).",
            )
        values = {
            "model": model,
            "weights": None if weights is None else os.fspath(weights),
            "weights_key": weights_key,
            "weights_ignore": tuple(weights_ignore),
            "arguments": dict(arguments or {}),
            "classes": _class_names(classes),
            "resize": resize,
            **({} if input is None else {"input": _plain(input)}),
        }
        section = checked(config.Teacher, values, "Invalid teacher:", "Correct the arguments.")
        section = with_input(resolved_teacher(section, lambda _key: Path.cwd()))
        untrained = load.untrained_teacher(section)
        classifier, _ = load.load_teacher(section, untrained, _possible_prior(untrained))
        _check(classifier)
    found = object.__new__(Teacher)
    found._section, found._network = section, None
    return found


class Run:
    """A run folder, as returned by `distill`, `run` and `open`; `path` is its location.

    Every method raises IntegrityError if a file that it needs was altered, UsageError if a step that it needs has not
    been run, and MissingError if a package is not installed. `progress=True` shows the command line's progress display.
    """

    path: Path

    def __init__(self, path: Path, teacher: Teacher | None = None, *, trust_code: bool = False) -> None:
        self.path = path
        self._teacher, self._trust_code = teacher, trust_code

    def __repr__(self) -> str:
        return f"<Run {self.path}>"

    @property
    def recipe(self) -> Recipe:
        """The complete recipe of the run, from its manifest."""
        with self._at_work():
            return actions.recipe_in(self.path)

    def export(
        self,
        *,
        int8: bool = False,
        fp16: bool | None = None,
        qat: bool | None = None,
        targets: Sequence[str] = (),
        only: bool = False,
        engines: bool | None = None,
        compute_capability: str | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> dict[str, Path]:
        """Exports FP32 ONNX and, with `int8`, one quantized graph per target and the targets' engines.

        Args:
            int8: quantize, calibrating on images from the run's generator.
            fp16: also export FP16 files: for TensorRT and, with `int8`, OpenVINO and LiteRT. Default, here and below:
                the run's recipe.
            qat: quantization-aware training (QAT) on synthetic images; requires `int8`.
            targets: deployment targets, such as "cpu", "arm", "tensorrt", "tensorrt-rtx". They are added to those of
                the run, whose files and measurements stay. They require `int8`, except for the two of TensorRT.
            only: `targets` replace those of the run, whose files are removed.
            engines: build engines for the targets that use them.
            compute_capability: for TensorRT-RTX, such as "sm89"; requires `int8`.
            settings: further keys of the recipe's [export], such as calibration_images=256.

        Returns:
            Exported files by their names in the report, such as "fp32" and "int8.cpu".

        Raises:
            UsageError: unknown target or setting, or `only` without targets.
            MissingError: an engine cannot be built on this machine; everything else was exported.
        """
        named = (targets,) if isinstance(targets, str) else tuple(targets)
        with self._at_work():
            run = actions.export(
                self.path,
                int8=int8,
                fp16=fp16,
                qat=qat,
                targets=named,
                only=only,
                engines=engines,
                compute_capability=compute_capability,
                settings=settings,
                display=_display(progress),
            )
            if int8:
                actions.require_engines(run, named)
            return _exported(run)

    def validate(
        self,
        data: FilePath | EllipsisType | None = ...,
        *,
        fit: config.Fit | None = None,
        split: str | None = None,
        allow_implausible: bool = False,
        progress: bool = False,
    ) -> Report:
        """Compares every artifact with the teacher on the same images.

        Args:
            data: labelled hold-out images: a folder of class folders, a .parquet or .npz file, torchvision's formats,
                or "digits". None: synthetic images, which measure agreement with the teacher instead of accuracy.
                Default: the run's recipe.
            fit: how images of another size are handled: "exact" (refused), "stretch" or "center-crop".
            split: which part of the hold-out, if it has several: "train", "validation", "test" or its own name.
            allow_implausible: measure although the teacher's predictions do not match the labels.

        Returns:
            The contents of validate/report.json: measurements, no verdict.

        Raises:
            UsageError: the images do not exist or do not match the model, or their labels do not fit the teacher's
                answers.
        """
        with self._at_work():
            from .gate.verdict import load_report

            chosen = data if data is None or isinstance(data, EllipsisType) else os.fspath(data)
            run = actions.validate(
                self.path,
                chosen,
                fit=fit,
                split=split,
                allow_implausible=allow_implausible,
                display=_display(progress),
            )
            return load_report(run)

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
        """Decides whether the validated run is good enough to ship. Needs only the base install.

        Args:
            policy: a TOML policy file; default: the policy in the run's recipe.
            references: a references.toml file with the release to compare with.
            junit, json_out, summary: files to write, outside the run folder; Markdown is appended to `summary`.
                Nothing else is written.
            limits: overrides of the policy: by key (max_drop_vs_fp32=0.015), by section and key
                ("per_class.max_drop"), or by section (size={"max_bytes": 200_000}); None removes a limit.

        Returns:
            The verdict: `verdict` is "pass", "fail" or "inconclusive"; `checks` gives the reasons.

        Raises:
            UsageError: the run has not been validated, or the policy, limits or references are invalid.
            IntegrityError: a file does not match the manifest, or the report does not match the files.
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
        """Writes the HTML report of the validated run, one self-contained file. Returns its path.

        Raises:
            UsageError: the run has not been validated.
        """
        with self._at_work():
            run = actions.report(self.path, display=_display(progress))
            return run.path(run.artifact("report").files["page"])

    def draw(self, count: int = 512, *, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Returns class-balanced synthetic images that the student was not trained on, to calibrate other tools with.

        Returns:
            Images (count, C, H, W), float32 in [0, 1], and the class that each was generated for, (count,). The same
            run gives the same images.

        Raises:
            UsageError: `count` is not a positive integer, or there is no finished student.
        """
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"Cannot draw {count!r} images.", fix="Give a positive whole number.")
        with self._at_work():
            return actions.draw(self.path, count, display=_display(progress))

    def student(self) -> Classifier:
        """The student: an nn.Module in eval mode on the CPU; images (B, C, H, W) in [0, 1] → logits (B, K). It
        normalises its own input; `classes` and `spec` describe its outputs and input.

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
    budget: str | None = None,
    bank: Run | FilePath | None = None,
    fresh: bool = False,
    progress: bool = False,
    trust_code: bool = False,
    **settings: Any,
) -> Run:
    """Distils a student without data, from a teacher and its class names alone.

    A second call with the same teacher, student and settings continues an interrupted run, and does nothing if the run
    is finished.

    Args:
        student: the compact network, such as "nayer:wrn_16_1" or "torchvision:mobilenet_v3_small@32".
        out: the run folder.
        budget: plan the run for this much time on this machine, such as "20m" or "1h". The plan replaces the sizes,
            the student's optimizer and its schedule in `settings`.
        bank: a finished run with the same teacher: start with its images, generator and label embeddings instead of
            filling a memory bank.
        fresh: empty the folder and start over.
        progress: show the command line's progress display.
        trust_code: allow the code of a python: model to run.
        settings: sections of a recipe, such as distill={"epochs": 4}, single keys, such as
            **{"distill.epochs": 4}, and seed, device and precision. Omitted keys default to the paper's values
            (docs/REFERENCE.md).

    Raises:
        UsageError: invalid settings (all problems are listed), or the folder contains a run with another teacher,
            student or settings.
        TrainingError: training failed.
        IntegrityError: a finished file was altered, or a python: model is not trusted.
        MissingError: a package is not installed, or there is not enough memory.
    """
    with _at_work(teacher, trust_code):
        path = expanded(os.fspath(out))
        if not isinstance(teacher, Teacher):
            raise UsageError(
                f"distill() expects a Teacher, not {type(teacher).__name__}.",
                fix="Use nayer_edge.Teacher(module, classes=…, input=…), or nayer_edge.load_teacher(…).",
            )
        name = _name_of(path, fresh=fresh)
        recipe = recipe_of(_values(teacher, student, name, settings), Path.cwd(), "given to distill()")
        require_typed(recipe, ["validate.data"])
        if bank is not None:
            recipe = actions.on_bank(recipe, _folder(bank))
        recipe, _ = actions.timed(recipe, None, path, actions.Time.typed(budget), fresh=fresh)
        actions.make(recipe, path, last="student", fresh=fresh, display=_display(progress))
    return Run(path, teacher, trust_code=trust_code)


def run(
    recipe: Run | FilePath,
    *,
    out: FilePath | None = None,
    until: str | None = None,
    settings: Sequence[str] = (),
    budget: str | None = None,
    more: str | None = None,
    finish: str | None = None,
    bank: Run | FilePath | None = None,
    fresh: bool = False,
    progress: bool = False,
    trust_code: bool = False,
) -> Run:
    """Runs a recipe, or continues it where it stopped. `Run.gate` then gives the verdict.

    Args:
        recipe: a shipped recipe's name, a .toml file, or a run to continue: its folder or, if its teacher is an
            nn.Module in memory, what `distill` or `open` returned.
        out: the run folder; default: runs/<recipe>.
        until: the last step to run: teacher, lte, student, onnx, int8, engine, validate, gate or report.
        settings: overrides of the recipe, such as ["distill.epochs=4"].
        budget, bank: see `distill`.
        more: continue training the student of a run folder for this much time, such as "1h".
        finish: finish the training of a run folder within this time: an interrupted one here; one that another
            process is training, there, and what is returned is then an unfinished run.
        fresh, progress, trust_code: see `distill`.

    Raises:
        UsageError: unknown recipe or step, or an invalid recipe.
        MissingError: a file of another runtime, such as OpenVINO, could not be built here; everything else is done.
        NayerEdgeError: see `distill`.
    """
    teacher = recipe._teacher if isinstance(recipe, Run) else None
    trust_code = trust_code or (isinstance(recipe, Run) and recipe._trust_code)
    with _at_work(teacher, trust_code):
        name = _named(recipe)
        chosen = actions.read_recipe(name, list(settings), None if bank is None else _folder(bank))
        path = actions.default_out(name, chosen) if out is None else expanded(os.fspath(out))
        time = actions.Time.typed(budget, more, finish)
        changed = bool(settings or fresh or until)
        if actions.finished_elsewhere(chosen, name, path, time, changed=changed) is not None:
            return Run(path, teacher, trust_code=trust_code)
        chosen, _ = actions.timed(chosen, name, path, time, fresh=fresh, settings=settings)
        made = actions.make(chosen, path, last=until, fresh=fresh, display=_display(progress))
        actions.require_complete(made, until)
    return Run(path, teacher, trust_code=trust_code)


class Sweep:
    """A finished sweep; `path` is its folder, `record` the contents of its sweep.json.

    `record.verdict` is "pass" if a student passes, `record.answer` names it, `record.sentence` says it in words, and
    `record.students` has the measurements of every student.
    """

    def __init__(self, path: Path, record: SweepRecord, teacher: Teacher | None, *, trust_code: bool) -> None:
        self.path, self.record = path, record
        self._teacher, self._trust_code = teacher, trust_code

    def __repr__(self) -> str:
        return f"<Sweep {self.path}: {self.record.sentence}>"

    def run(self, model: str) -> Run:
        """The run of a student.

        Raises:
            UsageError: it is not one of the sweep, or has no run.
        """
        folder = next(
            (
                self.path / each.folder
                for each in self.record.students
                if each.model == model or each.located(self.path) == located(model, Path.cwd())
            ),
            None,
        )
        if folder is None or not folder.is_dir():
            names = ", ".join(each.model for each in self.record.students)
            raise UsageError(f"The sweep has no run of '{model}'.", fix=f"Its students are {names}.")
        return Run(folder, self._teacher, trust_code=self._trust_code)

    @property
    def best(self) -> Run | None:
        """The run of the smallest student that passes; None if none does."""
        return None if self.record.answer is None else self.run(self.record.answer)


def sweep(
    recipe: Run | FilePath,
    students: Sequence[str] = (),
    *,
    budget: str | None = None,
    out: FilePath | None = None,
    settings: Sequence[str] = (),
    ray: str | None = None,
    fresh: bool = False,
    progress: bool = False,
    trust_code: bool = False,
) -> Sweep:
    """Finds the smallest student that passes the policy, of several that start with the same images.

    A second call with the same arguments continues an interrupted sweep.

    Args:
        recipe: a finished run, whose bank, teacher and policy are taken; a recipe, which makes a bank first; or the
            folder of a sweep to continue.
        students: models; default: up to five that suit the teacher.
        budget: time for all students, such as "3h"; default: 40 % of the time that separate
            runs of all students would take.
        out: the folder of the sweep; default: runs/<recipe>-sweep.
        ray: address of a Ray cluster, whose workers train the students, such as "auto"; default: this machine.
        settings, fresh, progress, trust_code: see `run`.

    Raises:
        UsageError: a student is listed twice, none can be built, the folder holds something else, or the time is too
            short.
        NayerEdgeError: see `distill`.
    """
    teacher = recipe._teacher if isinstance(recipe, Run) else None
    with _at_work(teacher, trust_code):
        order = SweepOrder.typed(
            _named(recipe),
            [students] if isinstance(students, str) else students,
            budget,
            _path(out),
            list(settings),
            fresh=fresh,
        )
        record = order.execute(ray=ray, fresh=fresh, display=_display(progress))
    return Sweep(order.out, record, teacher, trust_code=trust_code)


def open(path: FilePath, *, teacher: Teacher | None = None, trust_code: bool = False) -> Run:
    """Opens a run folder.

    Args:
        teacher: the teacher of the run, if it was an nn.Module in memory. Without it, only methods that do not need
            the network work: gate, report, student.
        trust_code: allow the code of a python: model to run.

    Raises:
        UsageError: not a run folder, or the run has another teacher.
        IntegrityError: its manifest is damaged.
    """
    with _at_work(trust_code=trust_code):
        root = expanded(os.fspath(path))
        recipe = actions.recipe_in(root)
        if teacher is not None:
            _require_same(teacher, recipe, root)
    return Run(root, teacher, trust_code=trust_code)


def _require_same(teacher: Teacher, recipe: Recipe, root: Path) -> None:
    held = recipe.teacher
    if parse(held.model).source != MEMORY:
        raise UsageError(
            f"The teacher of {root} is {held.model}, which is loaded by its name.", fix="Leave out teacher=…"
        )
    same = teacher._section
    if differing := [
        key for key in ("model", "classes", "input", "resize") if getattr(held, key) != getattr(same, key)
    ]:
        raise UsageError(
            f"{root} was made with another teacher.",
            why=f"Expected {held.model}, got {teacher.model}; {', '.join(differing)} differ.",
            fix="Give the teacher with the same weights, classes, input and resize.",
        )


def _name_of(path: Path, *, fresh: bool) -> str:
    """The name of the recipe in a run folder: as it was when the run began, or that of the folder."""
    if (path / MANIFEST).is_file() and not fresh:
        return str(actions.open_run(path).manifest.recipe.get("name"))
    return plain_name(path.resolve().name)


def _named(recipe: Run | FilePath) -> str:
    """A recipe, or a folder, as it would be typed. A Run is a folder, also if a shipped recipe has its name."""
    path = recipe.path if isinstance(recipe, Run) else expanded(os.fspath(recipe))
    if not isinstance(recipe, str) and (path / MANIFEST).is_file():
        return os.path.join(os.curdir, path) if len(path.parts) == 1 else str(path)  # noqa: PTH118
    text = str(path) if isinstance(recipe, Run) else os.fspath(recipe)
    # "./digits" is a folder, and a path without the point would be the shipped recipe.
    return str(expanded(text)) if text.startswith("~") else text


def _values(teacher: Teacher, student: str, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a distillation, in TOML values."""
    if wrong := [key for key in settings if key in GIVEN or key.partition(".")[0] in GIVEN]:
        raise UsageError(
            f"'{wrong[0]}' is not a setting of distill().", fix="Use the arguments teacher, student and bank."
        )
    values: dict[str, Any] = {
        "name": name,
        "teacher": teacher._section.model_dump(mode="json"),
        "student": {"model": student},
    }
    # Sections first, so that single keys override them.
    for key, value in sorted(settings.items(), key=lambda item: "." in item[0]):
        set_value(values, key.split("."), _plain(value), f"'{key}'")
    return values


def _plain(value: Any) -> Any:
    """A value in TOML types."""
    if isinstance(value, config.Section):
        return {key: _plain(getattr(value, key)) for key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _folder(run: Run | FilePath) -> Path:
    return run.path if isinstance(run, Run) else expanded(os.fspath(run))


def _path(value: FilePath | None) -> Path | None:
    return None if value is None else expanded(os.fspath(value))


def _numbers(value: float | Iterable[float] | None) -> tuple[float, ...] | None:
    """One number, or a list, array or tensor of numbers, as a tuple."""
    if value is None:
        return None
    try:
        return tuple(float(item) for item in value) if isinstance(value, Iterable) else (float(value),)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{value!r} is neither a number nor a sequence of numbers.", fix="Give one number per channel."
        ) from error


def _class_names(classes: Labels) -> tuple[str, ...]:
    if isinstance(classes, str | os.PathLike):
        from nayer_edge.labels.class_names import read_labels

        return read_labels(expanded(os.fspath(classes)))
    return tuple(classes)


def _copy_of(module: Any) -> nn.Module:
    """A float32 copy of the module on the CPU, without data-parallel and torch.compile wrappers."""
    from torch import nn

    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"A teacher must be a torch.nn.Module, not {type(module).__name__}.",
            fix="For weights in a file, use nayer_edge.load_teacher(file, model=…, classes=…).",
        )
    try:
        return copy.deepcopy(module).cpu().float().eval()
    except Exception as error:  # a user's module can raise anything
        raise UsageError(
            f"The module {type(module).__name__} cannot be copied.",
            why=f"{type(error).__name__}: {error}",
            fix="Build a new one without hooks or open handles, and load its state dict.",
        ) from error


def _possible_prior(network: Classifier) -> str:
    """A prior that suits this teacher. The run's prior is not known yet; those without BatchNorm need the same."""
    from nayer_edge.models.prior import batch_norms

    return "batchnorm" if batch_norms(network) else "generator"


def _check(classifier: Classifier) -> None:
    """Raises an error for a teacher that cannot be distilled."""
    from nayer_edge.distillation import check_teacher
    from nayer_edge.models.load import check_forward
    from nayer_edge.models.prior import require_prior
    from nayer_edge.runtime import compute

    require_prior(classifier, f"The teacher {classifier.model}", _possible_prior(classifier))
    check_forward(classifier)
    check_teacher(classifier, compute.choose("cpu", "fp32"))


def _exported(run: RunFolder) -> dict[str, Path]:
    """The exported files by their names in a report."""
    from .validation.runnable import candidates

    listed, held = candidates(recipe_of(run.manifest.recipe, run.root), run), run.manifest.files
    return {candidate.name: run.path(candidate.file) for candidate in listed if candidate.file in held}


def _display(progress: bool) -> Display | None:
    if not progress:
        return None
    from rich.console import Console

    from .show import Display

    return Display(Console(force_terminal=sys.stdout.isatty()))


def _argument(option: re.Match[str]) -> str:
    name, value = _ARGUMENTS[option[1]], option[2]
    return f'{name}="{value.strip()}"' if value else f"`{name}`"


@contextlib.contextmanager
def _at_work(teacher: Teacher | None = None, trust_code: bool = False) -> Iterator[None]:
    """A context that provides the teacher's network, permits trusted code, and turns a missing package or a lack of
    memory or disk space into a NayerEdgeError."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(user_code.trusting(trust_code))
        if "torch" in sys.modules:
            # Only if torch is loaded: some calls do not need it.
            from nayer_edge.runtime.compute import usual_settings

            stack.enter_context(usual_settings())
        network = getattr(teacher, "_network", None)
        if teacher is not None and network is not None:
            stack.enter_context(in_memory.holding(teacher.model, network))
        try:
            yield
        except Exception as error:
            found = understood(error, "This")
            if found is None:
                raise
            _in_python(found)
            if found is error:
                raise
            raise found from error


def _in_python(error: NayerEdgeError) -> None:
    """Turns options of the command line in an error's text, but not those of whole commands, into arguments: "`out`",
    'budget="20m"'."""
    for part in ("what", "why", "fix"):
        lines = [
            line if "nayer-edge " in line else _OPTION.sub(_argument, line) for line in getattr(error, part).split("\n")
        ]
        setattr(error, part, "\n".join(lines))
