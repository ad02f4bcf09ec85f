"""The Python API: teachers in memory and in files, runs, and results equal to the command line's."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nayer_edge as ne
from nayer_edge.distillation import Length
from nayer_edge.pipelines import api
from nayer_edge.pipelines.costs import planning
from nayer_edge.pipelines.recipes.policy import limited, make_policy
from nayer_edge.pipelines.recipes.renamed import RenamedWarning
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

CLASSES = ("zero", "one", "two", "three")
SPEC = ne.InputSpec(channels=1, height=8, width=8)
TINY: dict[str, Any] = {
    "generator": {"noisy_dim": 8, "channels": 4},
    "synthesis": {"batch": 8, "g_steps": 2, "warmup_rounds": 1, "augment": {"pad": 1}},
    "distill": {"epochs": 3, "warmup_epochs": 1, "steps": 2, "batch": 8, "holdout_rounds": 1, "augment": {"pad": 1}},
    "export": {"calibration_images": 8, "calibration_method": "minmax", "max_drop": None},
    "validate": {"synthetic_images": 16},
    "device": "cpu",
    "precision": "fp32",
}
STUDENT = "nayer:resnet8"


class Net(nn.Module):
    """An untrained teacher whose outputs differ between images."""

    stop_at: Path | None = None
    """the program is interrupted when this file appears"""

    def __init__(self, seed: int = 0, channels: int = 1, classes: int = len(CLASSES), statistics: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(8, track_running_stats=statistics)
        self.layers = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), norm, nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(72, classes)

    def forward(self, x: Tensor) -> Tensor:
        if Net.stop_at is not None and Net.stop_at.exists():
            raise KeyboardInterrupt
        return self.head(self.layers(x))


@pytest.fixture
def teacher() -> ne.Teacher:
    return ne.Teacher(Net(), classes=CLASSES, input=SPEC)


@pytest.fixture(scope="module")
def made(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A run with an in-memory teacher, exported and validated. Read-only."""

    def make(folder: Path) -> None:
        run = ne.distill(ne.Teacher(Net(), classes=CLASSES, input=SPEC), STUDENT, folder / "mine", **TINY)
        run.export(int8=True)
        run.validate(None)

    return once("api", make) / "mine"


@pytest.fixture
def mine(made: Path, tmp_path: Path) -> Path:
    """A copy of it that tests may alter."""
    return Path(shutil.copytree(made, tmp_path / "mine"))


def manifest(root: Path) -> bytes:
    return (root / MANIFEST).read_bytes()


# The front door


def program(text: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, **options)


def test_importing_is_light_and_shows_every_name() -> None:
    done = program(
        "import sys, nayer_edge as ne\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'rich', 'typer', 'onnx', 'nayer_edge.pipelines'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
        "print(set(ne.__all__) <= set(dir(ne)), all(hasattr(ne, name) for name in ne.__all__))\n"
        "print(sorted({'torch', 'numpy'} & sys.modules.keys()))\n"
    )
    assert done.stdout == "[]\nTrue True\n[]\n", done.stderr


def test_the_names_are_the_functions_of_the_pipelines() -> None:
    shown = {name: getattr(ne, name) for name in ne.__all__ if name != "__version__"}
    of_api = {name for name, value in shown.items() if value.__module__ == api.__name__}
    assert of_api == {"InputSpec", "Run", "Sweep", "Teacher", "distill", "load_teacher", "open", "run", "sweep"}
    returned = {"Recipe", "Report", "Verdict"}
    assert {shown[name].__module__.rpartition(".")[2] for name in returned} == {"schema", "measurements", "judgement"}
    assert all(issubclass(shown[name], ne.NayerEdgeError) for name in shown.keys() - of_api - returned)
    with pytest.raises(AttributeError, match="no attribute 'destill'"):
        _ = ne.destill  # type: ignore[attr-defined]


def test_no_module_of_the_core_takes_the_place_of_a_name() -> None:
    """Importing a submodule sets an attribute of the package, which may hide a public name."""
    core = Path(ne.__file__).parent
    modules = {path.stem for path in core.iterdir()} | {"export", "pipelines"}
    assert not modules & set(ne.__all__)


def test_the_gate_needs_no_torch(made: Path, without: Callable[..., dict[str, str]]) -> None:
    text = f"""
import nayer_edge as ne
verdict = ne.open({str(made)!r}).gate(accuracy={{}}, int8={{"min_coverage": None}})
print([check.name for check in verdict.checks])
try:
    ne.load_teacher("w.pt", model="nayer:resnet8", classes=["a", "b"], input=ne.InputSpec())
except ne.MissingError as error:
    print(error)
"""
    done = program(text, env={**os.environ, **without()})
    assert "runtime" in done.stdout, done.stderr
    assert "pip install '.[cpu]'" in done.stdout


# Teachers in memory


def test_a_module_stays_as_it_is(tmp_path: Path) -> None:
    network = Net().double().train()
    before = copy.deepcopy(network.state_dict())
    teacher = ne.Teacher(network, classes=CLASSES, input=SPEC)
    run = ne.distill(teacher, STUDENT, tmp_path / "run", **TINY)
    assert network.training
    assert all(parameter.requires_grad and parameter.dtype == torch.double for parameter in network.parameters())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    with torch.no_grad():
        network.head.weight.zero_()
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        wanted = Net().eval()((images - 0.5) / 0.5)
        again = ne.open(run.path, teacher=teacher)._teacher
        assert again is teacher
        assert teacher._network is not None
        assert torch.equal(teacher._network((images - 0.5) / 0.5), wanted), (
            "what was given counts, not what became of it"
        )


def test_wrappers_of_training_are_taken_off() -> None:
    plain = ne.Teacher(Net(), classes=CLASSES, input=SPEC)
    for wrapped in (nn.DataParallel(Net()), torch.compile(Net())):
        assert ne.Teacher(wrapped, classes=CLASSES, input=SPEC).model == plain.model
    assert ne.Teacher(Net(1), classes=CLASSES, input=SPEC).model != plain.model


class Alien(nn.Module):
    """A network with one chosen defect."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.head = how, nn.BatchNorm2d(1), nn.Linear(64, len(CLASSES))
        if how == "uncopyable":
            self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Any:
        logits = self.head(self.norm(x).flatten(1))
        match self.how:
            case "nan":
                return logits * float("nan")
            case "constant":
                return torch.zeros_like(logits)
            case "no logits":
                return {"boxes": logits}
            case "memory":
                raise MemoryError("no more")
        return logits


def broken() -> nn.Module:
    network = Net()
    with torch.no_grad():
        network.head.bias[0] = float("nan")
    return network


BAD = {
    "batchnorm of the batch": (lambda: Net(statistics=False), {}, ne.UsageError, "without running statistics"),
    "another count": (Net, {"classes": CLASSES[:3]}, ne.UsageError, r"\(2, 4\).*\(2, 3\)"),
    "other channels": (lambda: Net(channels=3), {}, ne.UsageError, "cannot take images of 1×8×8"),
    "other size": (Net, {"input": ne.InputSpec(channels=1, height=16, width=16)}, ne.UsageError, "1×16×16"),
    "nan weights": (broken, {}, ne.TrainingError, "not finite"),
    "nan": (lambda: Alien("nan"), {}, ne.TrainingError, "not finite"),
    "constant": (lambda: Alien("constant"), {}, ne.TrainingError, "the same output"),
    "no logits": (lambda: Alien("no logits"), {}, ne.UsageError, "without logits"),
    "uncopyable": (lambda: Alien("uncopyable"), {}, ne.UsageError, "cannot be copied"),
    "no memory": (lambda: Alien("memory"), {}, ne.MissingError, "Out of memory"),
    "no module": (lambda: {"weight": 1}, {}, ne.UsageError, "must be a torch.nn.Module, not dict"),
    "a class": (lambda: Net, {}, ne.UsageError, "must be a torch.nn.Module, not type"),
    "doubled names": (Net, {"classes": ["a", "b", "a", "c"]}, ne.UsageError, "must be unique"),
    "numbers for names": (Net, {"classes": range(4)}, ne.UsageError, "classes.0"),
    "no file of names": (Net, {"classes": "nowhere.txt"}, ne.UsageError, "nowhere.txt"),
    "no input": (Net, {"input": "8x8"}, ne.UsageError, "input"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_teach_is_refused_at_once(case: str) -> None:
    make, changes, kind, text = BAD[case]
    with pytest.raises(kind, match=text) as raised:
        ne.Teacher(make(), **{"classes": CLASSES, "input": SPEC, **changes})
    assert isinstance(raised.value, ne.NayerEdgeError)


def test_input_specs() -> None:
    values = (0.25, 0.5, 0.75)
    for given in (values, list(values), np.array(values), torch.tensor(values)):
        assert ne.InputSpec(mean=given, std=1).mean == values
    assert ne.InputSpec(mean=0, std=1).shape == (3, 32, 32)
    for wrong, text in (
        ({"mean": [0.1, 0.2]}, "2 values for 3 channels"),
        ({"height": 2}, "height"),
        ({"std": 0}, "std"),
        ({"mean": "grey"}, "neither a number"),
        ({"mean": [None]}, "neither a number"),
    ):
        with pytest.raises(ne.UsageError, match=text):
            ne.InputSpec(**wrong)


def test_class_names_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(CLASSES))
    assert ne.Teacher(Net(), classes=path, input=SPEC).classes == CLASSES
    assert ne.Teacher(Net(), classes=str(path), input=SPEC).classes == CLASSES


# Distilling


def test_the_card_says_that_the_teacher_was_in_memory(made: Path, teacher: ne.Teacher) -> None:
    card = json.loads((made / "teacher" / "teacher.json").read_text())
    assert (card["model"], card["source"]) == ("memory:Net", "memory")
    assert card["rebuild"] == {"origin": teacher.model, "available": False}
    assert card["classes"] == list(CLASSES)
    recipe = json.loads(manifest(made))["recipe"]
    assert recipe["teacher"]["model"] == teacher.model
    assert recipe["name"] == "mine"
    assert RunFolder.open(made).problems() == []


def test_again_it_changes_nothing(mine: Path, teacher: ne.Teacher) -> None:
    before = manifest(mine)
    assert ne.distill(teacher, STUDENT, mine, **TINY).path == mine
    assert manifest(mine) == before


def test_a_home_folder_is_found(mine: Path, teacher: ne.Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(mine.parent))
    before = manifest(mine)
    assert ne.distill(teacher, STUDENT, f"~/{mine.name}", **TINY).path == mine
    assert ne.open(f"~/{mine.name}").path == mine
    assert manifest(mine) == before


def test_a_run_keeps_its_name(mine: Path, teacher: ne.Teacher) -> None:
    """Whatever its folder is called, now or later."""
    for name in ("lr0.1", "digits"):
        mine = mine.rename(mine.parent / name)
        before = manifest(mine)
        assert ne.distill(teacher, STUDENT, mine, **TINY).path == mine
        assert manifest(mine) == before


def test_a_run_is_a_folder_whatever_its_name(mine: Path, teacher: ne.Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the shipped recipe of that name."""
    monkeypatch.chdir(mine.rename(mine.parent / "photos").parent)
    run = ne.open("photos", teacher=teacher)
    orders: list[Any] = []
    monkeypatch.setattr(api.SweepOrder, "execute", lambda order, **_: orders.append(order))
    ne.sweep(run, ["nayer:resnet8_w4"], budget="5m")
    ne.sweep(Path("photos"), ["nayer:resnet8_w4"], budget="5m")
    assert [order.recipe.teacher.model for order in orders] == [teacher.model] * 2
    assert [order.bank.resolve() for order in orders] == [Path("photos").resolve()] * 2
    for named in (Path("photos"), "./photos"):
        assert ne.run(named, until="lte").path.resolve() == Path("photos").resolve()


@pytest.mark.parametrize(("settings", "message"), [({"fit": "crop"}, "validate.fit"), ({"split": 1}, "validate.split")])
def test_settings_of_a_validation_are_checked(
    settings: dict[str, Any], message: str, mine: Path, teacher: ne.Teacher
) -> None:
    before = manifest(mine)
    with pytest.raises(ne.UsageError) as caught:
        ne.open(mine, teacher=teacher).validate(None, **settings)
    assert message.partition(".")[2] in caught.value.why
    assert manifest(mine) == before


def test_the_callers_torch_settings_do_not_matter(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.no_grad():
            with torch.device("cpu"):
                network = Net().float()
            run = ne.distill(ne.Teacher(network, classes=CLASSES, input=SPEC), STUDENT, tmp_path / "run", **TINY)
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 3


def test_limits_in_any_order() -> None:
    policy = make_policy({"accuracy": {"max_drop_vs_fp32": 0.01, "confidence": 0.99}}, "here")
    for limits in ({"min": 0.9, "agreement": None}, {"agreement": {"min": 0.1}, "min": 0.9}):
        assert limited(policy, limits).agreement.min == 0.9
        assert limited(policy, dict(reversed(limits.items()))).agreement.min == 0.9
    without = limited(policy, {"accuracy": None}).accuracy
    assert (without.max_drop_vs_fp32, without.confidence) == (None, 0.99)


def test_old_names_of_settings_are_warned_of(mine: Path, teacher: ne.Teacher) -> None:
    with (
        pytest.warns(RenamedWarning, match=r"export\.finetune is deprecated"),
        pytest.raises(ne.UsageError, match="qat"),
    ):
        ne.distill(teacher, STUDENT, mine, **{**TINY, "export": {"finetune": "often"}})


def test_another_teacher_or_student_is_refused(mine: Path, teacher: ne.Teacher) -> None:
    before = manifest(mine)
    another = ne.Teacher(Net(1), classes=CLASSES, input=SPEC)
    with pytest.raises(ne.UsageError, match=rf"teacher\.model: {teacher.model} → {another.model}"):
        ne.distill(another, STUDENT, mine, **TINY)
    with pytest.raises(ne.UsageError, match=r"teacher\.classes"):
        ne.distill(ne.Teacher(Net(), classes=CLASSES[::-1], input=SPEC), STUDENT, mine, **TINY)
    with pytest.raises(ne.UsageError, match=r"student\.model"):
        ne.distill(teacher, "nayer:resnet20", mine, **TINY)
    assert manifest(mine) == before


@pytest.fixture
def interrupting() -> Iterator[None]:
    yield
    Net.stop_at = None


def test_interrupted_it_goes_on_from_python_alone(
    made: Path, tmp_path: Path, teacher: ne.Teacher, interrupting: None, invoke: Callable[..., Any]
) -> None:
    root = tmp_path / "mine"
    Net.stop_at = root / "student" / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        ne.distill(teacher, STUDENT, root, **TINY)
    Net.stop_at = None
    assert "student" not in json.loads(manifest(root))["steps"]

    before = manifest(root)
    answer = invoke("run", root)
    assert answer.code == 2
    assert "nayer_edge.run(run)" in answer.err
    with pytest.raises(ne.UsageError, match="is not available"):
        ne.run(root)
    with pytest.raises(ne.UsageError, match="with other settings"):
        ne.distill(ne.Teacher(Net(1), classes=CLASSES, input=SPEC), STUDENT, root, **TINY)
    assert manifest(root) == before

    run = ne.distill(teacher, STUDENT, root, **TINY)
    name = "student/student.safetensors"
    assert (root / name).read_bytes() == (made / name).read_bytes(), "bit by bit that of a run without interruption"
    assert run.student().classes == CLASSES


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"distill": {"epoch": 4}}, "Did you mean 'distill.epochs'"),
        ({"distil": {}}, "unknown key 'distil'"),
        ({"distill.epochs": "many", "synthesis.batch": 0}, r"(?s)(?=.*distill\.epochs).*synthesis\.batch"),
        ({"seed.x": 1}, "is a value, not a section"),
        ({"teach": {"data": "digits"}}, "not a setting of distill"),
        ({"teacher.model": "nayer:resnet8"}, "not a setting of distill"),
        ({"validate": {"data": "nowhere/"}}, "there is no .*nowhere"),
        ({"student": nn.Linear(1, 1)}, r"student\.model"),
        ({"student": "nayer:resnet9"}, "resnet9"),
        ({"teacher": Net()}, "expects a Teacher, not Net"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(
    settings: dict[str, Any], text: str, teacher: ne.Teacher, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    with pytest.raises(ne.UsageError, match=text):
        ne.distill(**{"teacher": teacher, "student": STUDENT, "out": root, **TINY, "seed": 1, **settings})
    assert not root.exists()


def test_single_keys_change_one_thing(teacher: ne.Teacher, tmp_path: Path) -> None:
    def recipe(**settings: Any) -> Any:
        values = api._values(teacher, STUDENT, api._name_of(tmp_path / "a b", fresh=False), settings)
        return api.recipe_of(values, tmp_path, "of a test")

    plain = recipe()
    assert plain.name == "a-b"
    limited = recipe(**{"gate.accuracy.max_drop_vs_fp32": 0.01})
    assert limited.gate.accuracy.max_drop_vs_fp32 == 0.01
    assert limited.gate.accuracy.max_drop_vs_teacher == plain.gate.accuracy.max_drop_vs_teacher
    assert recipe(gate={"accuracy": {"max_drop_vs_fp32": 0.01}}).gate.accuracy.max_drop_vs_teacher is None
    both = recipe(**{"distill.epochs": 30, "distill": {"steps": 7}})
    assert (both.distill.epochs, both.distill.steps) == (30, 7)
    data = recipe(validate={"data": Path("held") / "out.npz"}).validate_.data
    assert data == str(tmp_path / "held" / "out.npz")


# Runs


def test_what_a_run_gives(mine: Path, teacher: ne.Teacher, capfd: pytest.CaptureFixture[str]) -> None:
    run = ne.open(mine, teacher=teacher)
    files = run.export(int8=True, targets=["cpu", "arm"], calibration_images=16)
    assert set(files) == {"fp32", "int8.cpu", "int8.arm"}
    assert all(path.is_file() for path in files.values())
    report = run.validate()
    assert (report.dataset.kind, report.dataset.n) == ("synthetic", 16)
    assert {artifact.name for artifact in report.artifacts} == set(files)
    images, made_for = run.draw(20)
    assert (images.shape, images.dtype) == ((20, 1, 8, 8), np.float32)
    assert np.array_equal(np.round(images * 255) / np.float32(255), images)
    assert np.bincount(made_for).tolist() == [5, 5, 5, 5]
    labels = np.arange(20) % 4
    np.savez(mine.parent / "holdout.npz", images=np.round(images * 255).astype(np.uint8), labels=labels)
    # The teacher is untrained.
    report = run.validate(mine.parent / "holdout.npz", allow_implausible=True)
    assert (report.dataset.kind, report.dataset.n, report.teacher.top1 is None) == ("holdout", 20, False)
    with pytest.raises(ne.UsageError, match="has no splits"):
        run.validate(mine.parent / "holdout.npz", split="test")
    student = run.student()
    assert not student.training
    with torch.no_grad():
        assert student(torch.from_numpy(images)).shape == (20, 4)
    assert run.report() == mine / "report.html"
    assert run.recipe.export.targets == ("cpu", "arm")
    assert str(mine) in repr(run)
    assert capfd.readouterr() == ("", ""), "silent unless asked"
    run.report(progress=True)
    assert "= report    already finished" in capfd.readouterr().out


def test_without_its_teacher(mine: Path, invoke: Callable[..., Any]) -> None:
    run = ne.open(mine)
    verdict = run.gate()
    assert invoke("gate", mine).code == (0 if verdict.verdict == "pass" else 1)
    assert invoke("verify", mine).code == 0
    assert invoke("bench", mine, "--batch", "1", "--runs", "5").code == 0
    assert invoke("export", mine).code == 0, "FP32 ONNX is made of the student"
    assert invoke("report", mine).code == 0
    assert run.report().is_file()
    assert run.student().classes == CLASSES

    before = manifest(mine)
    for act in (
        lambda: run.export(int8=True, targets=["arm"]),
        lambda: run.validate("digits"),
        lambda: run.draw(4),
        lambda: ne.run(mine, settings=["export.targets=['arm']"]),
    ):
        with pytest.raises(ne.UsageError, match="is not available") as raised:
            act()
        assert "nayer_edge.open(RUN, teacher=teacher)" in raised.value.fix
    for words in (("export", mine, "--int8", "--target", "arm"), ("calibration-data", mine), ("run", mine, "--fresh")):
        answer = invoke(*words)
        assert answer.code == 2, words
        assert "nayer_edge.open(RUN, teacher=teacher)" in answer.err
    assert manifest(mine) == before
    assert invoke("verify", mine).code == 0


def test_open_takes_the_teacher_of_the_run_alone(mine: Path, teacher: ne.Teacher, tiny_run: Path) -> None:
    assert ne.open(mine, teacher=teacher).path == mine
    with pytest.raises(ne.UsageError, match="another teacher"):
        ne.open(mine, teacher=ne.Teacher(Net(1), classes=CLASSES, input=SPEC))
    with pytest.raises(ne.UsageError, match="resize differ"):
        ne.open(mine, teacher=ne.Teacher(Net(), classes=CLASSES, input=SPEC, resize=(8, 8)))
    with pytest.raises(ne.UsageError, match="input differ"):
        ne.open(
            mine, teacher=ne.Teacher(Net(), classes=CLASSES, input=ne.InputSpec(channels=1, height=8, width=8, std=1))
        )
    with pytest.raises(ne.UsageError, match="Leave out teacher"):
        ne.open(tiny_run, teacher=teacher)
    with pytest.raises(ne.UsageError, match="not a run folder"):
        ne.open(mine.parent)


def test_steps_that_are_missing_and_files_that_were_altered(made: Path, mine: Path, teacher: ne.Teacher) -> None:
    run = ne.open(mine, teacher=teacher)
    for count in (0, -1, 2.5):
        with pytest.raises(ne.UsageError, match="Cannot draw"):
            run.draw(count)  # type: ignore[arg-type]
    for settings, text in (
        ({"targets": ["toaster"]}, "toaster"),
        ({"calibration_image": 3}, "Did you mean 'calibration_images'"),
        ({"fp16": "perhaps"}, "fp16"),
        ({"qat": True}, "without `int8=True`"),
    ):
        with pytest.raises(ne.UsageError, match=text):
            run.export(**settings)
    with pytest.raises(ne.UsageError, match="nowhere"):
        run.validate("nowhere/")
    assert manifest(mine) == manifest(made)
    (mine / "student" / "student.safetensors").write_bytes(b"")
    for act in (run.student, run.draw, run.gate, run.report, run.validate):
        with pytest.raises(ne.IntegrityError):
            act()


def test_an_engine_that_cannot_be_built_is_said_when_the_rest_is_there(mine: Path, teacher: ne.Teacher) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may build it")
    run = ne.open(mine, teacher=teacher)
    with pytest.raises(ne.MissingError, match=r"int8\.tensorrt\.engine"):
        run.export(int8=True, targets="tensorrt")
    files = run.export(int8=True, targets=["tensorrt"], engines=False)
    assert set(files) == {"fp32", "int8.cpu", "int8.tensorrt"}
    assert set(run.export(int8=True, targets=["tensorrt"], only=True)) == {"fp32", "int8.tensorrt"}
    with pytest.raises(ne.UsageError, match="`only=True` removes"):
        run.export(int8=True, only=True)


# The gate


def test_limits_are_those_of_the_policy(finished: Path, invoke: Callable[..., Any], tmp_path: Path) -> None:
    run = ne.open(finished)

    def limits(**given: Any) -> dict[str, float | None]:
        return {check.name: check.limit for check in run.gate(**given).checks}

    assert limits()["accuracy_drop_vs_fp32"] == 0.015
    assert limits(max_drop_vs_fp32=0.25)["accuracy_drop_vs_fp32"] == 0.25
    assert limits(max_drop_vs_fp32=0.25)["accuracy_drop_vs_teacher"] == 0.04, "the others stay"
    assert "accuracy_drop_vs_teacher" not in limits(max_drop_vs_teacher=None)
    assert limits(size={"max_bytes": 9})["size"] == 9
    assert limits(**{"agreement.min": 0.5})["agreement"] == 0.5
    assert not {"accuracy_drop_vs_fp32", "accuracy_drop_vs_teacher"} & limits(accuracy=None).keys()
    (tmp_path / "policy.toml").write_text("[agreement]\nmin = 0.5\n[accuracy]\nmax_drop_vs_teacher = 0.5\n")
    of_file = limits(policy=tmp_path / "policy.toml", min=0.25)
    assert (of_file["agreement"], of_file["accuracy_drop_vs_teacher"]) == (0.25, 0.5)
    for wrong, text in (
        ({"max_drop": 0.1}, r"baseline\.max_drop, per_class\.max_drop"),
        ({"max_drop_vs_fp31": 0.1}, "Did you mean 'max_drop_vs_fp32'"),
        ({"max_drop_vs_fp32": 2}, "less than or equal to 1"),
        ({"size": {"bytes": 1}}, "unknown key 'size.bytes'"),
        ({"size": 1}, "size"),
        ({"artifacts": {"int8.cpu": 1}}, "artifacts"),
        ({"policy": "nowhere.toml"}, "nowhere.toml"),
        ({"junit": finished / "junit.xml"}, "inside the run folder"),
    ):
        with pytest.raises(ne.UsageError, match=text):
            run.gate(**wrong)


def test_the_verdict_is_the_command_lines(finished: Path, invoke: Callable[..., Any], tmp_path: Path) -> None:
    from nayer_edge.pipelines.gate.verdict import verdict_json

    outputs = {name: tmp_path / name for name in ("junit", "json_out", "summary")}
    verdict = ne.open(finished).gate(**outputs)
    typed = invoke(
        *(
            "gate",
            finished,
            "--junit",
            tmp_path / "j",
            "--json-out",
            tmp_path / "o",
            "--summary",
            tmp_path / "s",
            "--json",
        )
    )
    assert json.loads(typed.out) == verdict_json(verdict)
    for mine, theirs in zip(outputs.values(), (tmp_path / "j", tmp_path / "o", tmp_path / "s"), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()


def test_drawn_images_are_the_command_lines(finished: Path, invoke: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    assert invoke("calibration-data", finished, "-n", "12", "--format", "npy", "--out", folder).code == 0
    images, labels = ne.open(finished).draw(12)
    assert np.array_equal(np.load(folder / "calibration.npy", allow_pickle=False), images)
    assert np.array_equal(np.load(folder / "calibration.labels.npy", allow_pickle=False), labels)


def test_more_time_with_a_teacher_in_memory(
    teacher: ne.Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.budget, "extended", lambda *_: Length(4, 1, 1))
    sizes = {**TINY["distill"], "schedule": "constant", "decay_epochs": 1}
    run = ne.distill(teacher, STUDENT, tmp_path / "run", **{**TINY, "distill": sizes})
    again = ne.run(run, more="1h", until="student")
    assert again.recipe.distill.epochs == 4
    assert len(again.draw(4)[0]) == 4, "it has its teacher"
    with pytest.raises(ne.UsageError, match=r'nayer_edge\.run\(run, more="1h"\)'):
        ne.run(run.path, until="student", fresh=True)


def test_messages_name_arguments_and_leave_commands_alone(mine: Path, teacher: ne.Teacher, tmp_path: Path) -> None:
    with pytest.raises(ne.UsageError, match=r"^`budget` and `more` cannot be combined") as caught:
        ne.run(ne.open(mine, teacher=teacher), budget="1h", more="1h")
    assert "--" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(ne.UsageError, match=r"another folder with `out`"):
        ne.run("digits", out=tmp_path)
    with pytest.raises(ne.UsageError, match=r"^`more` continues the run[\s\S]*nayer-edge run \S+ --more 1h$"):
        ne.run(mine, more="1h", out=tmp_path / "other")


# Teachers in files, other people's code, recipes


def test_a_teacher_from_a_file(tiny_run: Path, tmp_path: Path, invoke: Callable[..., Any]) -> None:
    recipe = ne.open(tiny_run).recipe
    weights = shutil.copy(tiny_run / "teacher" / "teacher.safetensors", tmp_path / "w.safetensors")
    given = {"model": recipe.teacher.model, "classes": recipe.teacher.classes, "input": recipe.teacher.input}
    teacher = ne.load_teacher(weights, **given)
    assert teacher.model == recipe.teacher.model
    assert str(teacher) == f"<Teacher {teacher.model}, 10 classes, 1×16×16>"
    run = ne.distill(teacher, STUDENT, tmp_path / "run", **TINY)
    card = json.loads((run.path / "teacher" / "teacher.json").read_text())
    assert card["source"] == "w.safetensors"
    assert (run.path / "teacher" / "teacher.safetensors").read_bytes() == Path(weights).read_bytes()
    answer = invoke("run", run.path, "--until", "student")
    assert (answer.code, answer.out.count("already finished")) == (0, 3), "the command line goes on with it"
    for wrong, kind, text in (
        ({"weights": "nowhere.pt"}, ne.UsageError, "nowhere.pt"),
        ({"weights": None}, ne.UsageError, "no weights of its own"),
        ({"input": None}, ne.UsageError, "No input specification is known for"),
        ({"input": None, "model": "torchvision:resnet18"}, ne.UsageError, "No normalisation"),
        ({"model": "nayer:resnet8"}, ne.UsageError, "do not match nayer:resnet8"),
        ({"model": "resnet8"}, ne.UsageError, "has no source"),
        ({"classes": recipe.teacher.classes[:9]}, ne.UsageError, "10 outputs"),
        ({"weights_key": "ema"}, ne.UsageError, "under 'ema'"),
        ({"arguments": {"depth": 3}}, ne.UsageError, "takes no arguments"),
    ):
        with pytest.raises(kind, match=text):
            ne.load_teacher(**{"weights": weights, **given, **wrong})


CODE = """
from torch import nn

def make(num_classes, in_channels):
    layers = nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, num_classes))
"""


def test_code_runs_where_it_is_trusted(teacher: ne.Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(CODE)
    with pytest.raises(ne.IntegrityError, match="trust_code=True"):
        ne.distill(teacher, "python:mine.py:make", "run", **TINY)
    run = ne.distill(teacher, "python:mine.py:make", "run", trust_code=True, **TINY)
    assert run.student().model == "python:mine.py:make"
    assert ne.open("run", trust_code=True).student().model == "python:mine.py:make"
    with pytest.raises(ne.IntegrityError, match="trust_code=True"):
        ne.open("run").student()

    from safetensors.torch import save_file

    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    save_file(namespace["make"](4, 1).state_dict(), "w.safetensors")
    given: dict[str, Any] = {"model": "python:mine.py:make", "classes": CLASSES, "input": SPEC}
    with pytest.raises(ne.IntegrityError, match="trust_code=True"):
        ne.load_teacher("w.safetensors", **given)
    assert ne.load_teacher("w.safetensors", trust_code=True, **given).model.endswith("mine.py:make")


def test_recipes(tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [*tiny_settings, "teacher.model=nayer:wrn_10_1", "teach.epochs=1"]
    run = ne.run("digits", until="lte", settings=settings)
    assert run.path == Path("runs/digits")
    assert set(json.loads(manifest(run.path))["steps"]) == {"teacher", "lte"}
    again = ne.run(run.path, until="teacher")
    assert (again.path, again.recipe.teach.epochs) == (run.path, 1)
    elsewhere = ne.run("digits", out="elsewhere", until="lte", settings=settings, fresh=True)
    assert elsewhere.path == Path("elsewhere")
    for wrong, text in (
        ({"recipe": "digit"}, "Did you mean 'digits'"),
        ({"until": "bank"}, "no step 'bank'"),
        ({"settings": ["distill.epoch=3"]}, "Did you mean 'distill.epochs'"),
        ({"settings": ["validate.data=nowhere"]}, "nowhere"),
    ):
        with pytest.raises(ne.UsageError, match=text):
            ne.run(**{"recipe": "digits", "out": "third", **wrong})
    assert not Path("third").exists()
