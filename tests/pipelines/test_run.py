"""Running the table in a folder: what is finished is kept, whatever happened in between."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.pipelines import steps as step_table
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.pipelines.recipes.settings import apply_settings
from nayer_edge.pipelines.run import StepEvent, run_recipe
from nayer_edge.pipelines.steps import NAMES, STEPS
from nayer_edge.storage.files import digest_of, sha256_of
from nayer_edge.storage.run_folder import MANIFEST, Artifact, Manifest, RunFolder

SAME = ("student/student.safetensors", "bank.safetensors", "generator/generator.safetensors")
ONNX = ("export/student.fp32.onnx", "export/student.int8.cpu.onnx")

# The command line, killed by itself: after so many epochs, before the last one's checkpoint, or after so many steps of
# a task. With a checkpoint after every epoch, so that there is one to continue from.
RUNNER = """
import os, signal, sys
from nayer_edge.pipelines import distill, show
from nayer_edge.pipelines.cli import main

task, number = sys.argv[1], int(sys.argv[2])
distil, advance = distill.distill, show.Lines.advance

def die_at(now, done):
    if now == task and done >= number:
        os.kill(os.getpid(), signal.SIGKILL)

def distilled(*arguments, on_epoch, **named):
    def noted(epoch):
        on_epoch(epoch)
        die_at("epochs", epoch.epoch)
    return distil(*arguments, on_epoch=noted, checkpoint_seconds=0, **named)

def advanced(self, count=1):
    advance(self, count)
    die_at(self._what, self._done)

distill.distill, show.Lines.advance = distilled, advanced
main(sys.argv[3:])
"""


def again(root: Path, *settings: str, **options: Any) -> list[tuple[str, str]]:
    """Runs the folder's own recipe once more; (step, what happened) for each."""
    values = json.loads((root / MANIFEST).read_text())["recipe"]
    if settings:
        values = apply_settings(values, list(settings))
    events: list[tuple[str, str]] = []

    def note(event: StepEvent) -> None:
        events.append((event.step.name, event.state))

    run_recipe(recipe_of(values, root), root, on_event=note, **options)
    return events


def made(events: list[tuple[str, str]]) -> list[str]:
    return [name for name, state in events if state == "finished"]


def manifest(root: Path) -> Manifest:
    return RunFolder.open(root).manifest


def assert_same_results(root: Path, other: Path) -> None:
    mine, theirs = manifest(root).files, manifest(other).files
    assert mine.keys() == theirs.keys()
    for name in (*SAME, *ONNX, "teacher/teacher.safetensors", "export/quantization.json", "validate/predictions.npz"):
        assert mine[name].sha256 == theirs[name].sha256, name
    assert RunFolder.open(root).problems() == []
    assert RunFolder.open(root).unexpected_files() == []


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step function that is called fails the test."""

    def refuse(step: step_table.Step) -> None:
        raise AssertionError(f"{step.name} was loaded")

    monkeypatch.setattr(step_table.Step, "load", refuse)


@pytest.mark.usefixtures("no_step")
def test_a_second_run_keeps_every_step(finished: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.rglob("*") if path.is_file()}
    assert again(finished) == [(name, "kept") for name in NAMES]
    for path, (modified, content) in before.items():
        assert path.read_bytes() == content, path
        if path.name != MANIFEST:
            assert path.stat().st_mtime_ns == modified, path


def test_a_changed_limit_makes_only_gate_and_page_anew(finished: Path) -> None:
    before = manifest(finished)
    limits = [f"gate.accuracy.max_drop_vs_{reference}=1.0" for reference in ("fp32", "teacher")]
    assert made(again(finished, *limits)) == ["gate", "report"]
    assert json.loads((finished / "gate" / "verdict.json").read_text())["verdict"] == "pass"
    after = manifest(finished)
    assert after.recipe["gate"]["accuracy"]["max_drop_vs_teacher"] == 1.0
    for name in NAMES[: NAMES.index("gate")]:
        assert after.steps[name] == before.steps[name]


def test_a_run_continued_elsewhere_says_so(finished: Path) -> None:
    """Steps that were made later, with another torch and on another processor, name both; the rest do not."""
    now = manifest(finished)
    assert all(not (step.versions or step.hardware) for step in now.steps.values())
    values = json.loads((finished / MANIFEST).read_text())
    values["versions"]["torch"] = "2.11.0"
    values["hardware"]["cpu"] = "another"
    (finished / MANIFEST).write_text(json.dumps(values))
    assert made(again(finished, "gate.accuracy.max_drop_vs_teacher=1.0")) == ["gate", "report"]
    after = manifest(finished)
    assert after.versions["torch"] == "2.11.0"
    for name, step in after.steps.items():
        later = name in ("gate", "report")
        assert step.versions == ({"torch": now.versions["torch"]} if later else {}), name
        assert step.hardware == ({"cpu": now.hardware["cpu"]} if later else {}), name


def without(root: Path, key: str) -> None:
    """The folder as a version without that key of the recipe would have left it."""
    run = RunFolder.open(root)
    section, _, last = key.partition(".")
    values = json.loads((root / MANIFEST).read_text())
    del values["recipe"][section][last]
    for name, step in values["steps"].items():
        if section in step["settings"]:
            del step["settings"][section][last]
            inputs = next(part.inputs for part in STEPS if part.name == name)
            files = [file for artifact in inputs for file in run.artifact(artifact).files.values()]
            hashes = {file: run.manifest.files[file].sha256 for file in files}
            step["digest"] = digest_of({"step": name, "settings": step["settings"], "inputs": hashes})
    (root / MANIFEST).write_text(json.dumps(values))


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize("key", ["distill.mixup", "validate.fit", "teacher.arguments", "synthesis.lambda_adv"])
def test_a_folder_from_before_a_setting_was_there_is_kept(finished: Path, key: str) -> None:
    without(finished, key)
    assert again(finished) == [(name, "kept") for name in NAMES]


def test_a_setting_that_came_later_counts_once_somebody_uses_it(finished: Path) -> None:
    without(finished, "distill.mixup")
    with pytest.raises(UsageError) as refused:
        again(finished, "distill.mixup=0.5")
    assert "Changed since: distill.mixup: None → 0.5." in str(refused.value.why)
    assert again(finished)[NAMES.index("student")] == ("student", "kept")


def test_a_changed_validation_does_not_touch_training(finished: Path) -> None:
    events = again(finished, "validate.synthetic_images=50", last="validate")
    assert made(events) == ["validate"]
    assert ("student", "kept") in events


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("distill.epochs=4", "distill.epochs: 3 → 4"),
        ("seed=1", "seed: 0 → 1"),
        ("teacher.input.mean=[0.4]", "teacher.input.mean: [0.5] → [0.4]"),
        ("student.model=nayer:resnet20", "student.model: nayer:resnet8 → nayer:resnet20"),
    ],
)
@pytest.mark.usefixtures("no_step")
def test_changed_training_is_refused(finished: Path, setting: str, named: str) -> None:
    before = (finished / MANIFEST).read_bytes()
    with pytest.raises(UsageError) as caught:
        again(finished, setting)
    assert caught.value.exit_code == 2
    assert named in caught.value.why
    assert "--fresh" in caught.value.fix
    assert (finished / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "named"),
    [("distill.steps=3", "distill.steps: 20 → 3"), ("lte.encoder=onehot", "→ onehot")],
)
def test_what_was_begun_with_other_settings_is_not_thrown_away(setting: str, named: str, begun: Path) -> None:
    """An interrupted student is as well protected as a finished one; what comes after it may change."""
    checkpoint = begun / "student" / "checkpoint.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"of an interrupted run")
    with pytest.raises(UsageError, match=r"unfinished step 'student' .* other settings") as caught:
        again(begun, setting)
    assert named in caught.value.why
    assert f"nayer-edge run {shlex.quote(str(begun))}" in caught.value.fix
    assert checkpoint.read_bytes() == b"of an interrupted run"
    for same in ("gate.accuracy.max_drop_vs_teacher=1.0", "export.calibration_images=30"):
        with pytest.raises(IntegrityError, match="checkpoint"):
            again(begun, same)


def test_fresh_discards(finished: Path) -> None:
    (finished / "stray").mkdir()
    (finished / "stray" / "file").write_text("left by someone")
    settings = ("distill.epochs=2", "teacher.model=nayer:wrn_10_1", "teach.epochs=1", "seed=5")
    assert made(again(finished, *settings, fresh=True, last="teacher")) == ["teacher"]
    assert manifest(finished).steps.keys() == {"teacher"}
    assert manifest(finished).seed == 5
    assert RunFolder.open(finished).unexpected_files() == []


@pytest.mark.usefixtures("no_step")
def test_fresh_with_a_recipe_that_cannot_run_discards_nothing(finished: Path) -> None:
    with pytest.raises(UsageError, match="cannot run here"):
        again(finished, "student.model=nayer:nothing", fresh=True)
    assert RunFolder.open(finished).problems() == []
    assert again(finished) == [(name, "kept") for name in NAMES]


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize(
    ("key", "name"),
    [("teacher.weights", "teacher/teacher.safetensors"), ("validate.data", "images"), ("student.model", "net.py")],
)
def test_fresh_does_not_delete_what_the_recipe_reads(
    finished: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    """As one types to keep the teacher and change the student."""
    monkeypatch.setattr("nayer_edge.pipelines.run.preflight.check", lambda *_: None)
    value = f"python:{finished / name}:make" if key == "student.model" else finished / name
    with pytest.raises(UsageError, match=f"--fresh would delete files that the recipe reads: {key}"):
        run_recipe(load_recipe("digits", [f"{key}={value}"]), finished, fresh=True)
    assert RunFolder.open(finished).problems() == []


@pytest.mark.usefixtures("no_step")
def test_a_target_that_could_not_be_made_is_not_tried_by_the_next_command(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before it reads the targets, too, and has run."""
    held = RunFolder.open(finished)
    kept = {step: held.artifact(step) for step in NAMES}
    before = held.manifest.recipe["export"]["targets"]

    def load(step: step_table.Step) -> Any:
        def run(*_inputs: Any, **_named: Any) -> Artifact:
            if step.name == "int8":
                raise MemoryError
            return kept[step.name]

        return run

    monkeypatch.setattr(step_table.Step, "load", load)
    with pytest.raises(MemoryError):
        again(finished, 'export.targets=["cpu", "executorch"]')
    now = manifest(finished)
    assert now.recipe["export"]["targets"] == before != ["cpu", "executorch"]
    assert now.steps["int8"].settings["export.targets"] == before


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize(
    ("stopped", "key", "value"),
    [("engine", "compute_capability", "sm90"), ("validate", "fit", "stretch")],
)
def test_finished_steps_keep_their_settings_when_a_later_one_fails(
    finished: Path, monkeypatch: pytest.MonkeyPatch, stopped: str, key: str, value: str
) -> None:
    """Otherwise the next command would make them anew with the old settings, without being asked."""
    section = "export" if stopped == "engine" else "validate"
    before = manifest(finished).recipe[section][key]
    held = RunFolder.open(finished)
    kept = {step: held.artifact(step) for step in NAMES}

    def load(step: step_table.Step) -> Any:
        def run(*_inputs: Any, **_named: Any) -> Artifact:
            if step.name == stopped:
                raise KeyboardInterrupt
            return kept[step.name]

        return run

    monkeypatch.setattr(step_table.Step, "load", load)
    with pytest.raises(KeyboardInterrupt):
        again(finished, "export.max_drop=0.5", f"{section}.{key}={value}")
    now = manifest(finished)
    assert now.steps["int8"].settings["export.max_drop"] == now.recipe["export"]["max_drop"] == 0.5
    assert now.recipe[section][key] == before != value


@pytest.mark.slow
def test_stopped_between_steps_and_continued(tiny_run: Path, begun: Path) -> None:
    recipe = recipe_of(manifest(tiny_run).recipe, tiny_run)
    run_recipe(recipe, begun, last="student")
    assert tuple(manifest(begun).steps) == NAMES[: NAMES.index("student") + 1]
    assert not (begun / "export").exists()
    kept = manifest(begun).steps["student"].finished
    run_recipe(recipe, begun)
    assert manifest(begun).steps["student"].finished == kept
    assert_same_results(begun, tiny_run)


def run_killed(tiny_run: Path, root: Path, task: str, number: int) -> None:
    """Runs the tiny recipe in a process that dies there."""
    settings = [f"--set={key}={toml(value)}" for key, value in leaves(manifest(tiny_run).recipe)]
    command = [sys.executable, "-c", RUNNER, task, str(number), "run", "digits", *settings, "--out", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


def leaves(values: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The settings that make the digits recipe the tiny one."""
    yield "precision", values["precision"]
    yield "teacher.model", values["teacher"]["model"]
    for section in ("teach", "synthesis", "distill", "export", "validate"):
        for key, value in values[section].items():
            if isinstance(value, int | float | str):
                yield f"{section}.{key}", value


def toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.slow
def test_killed_inside_a_step_and_continued(tiny_run: Path, begun: Path) -> None:
    """The process dies while it distils, after a checkpoint."""
    run_killed(tiny_run, begun, "epochs", 3)
    assert (begun / "student" / "checkpoint.safetensors").is_file()
    assert "student" not in manifest(begun).steps
    run = run_recipe(recipe_of(manifest(tiny_run).recipe, tiny_run), begun, last="student")
    for name in SAME:
        assert run.manifest.files[name].sha256 == manifest(tiny_run).files[name].sha256, name
    assert (run.problems(), run.unexpected_files()) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "number", "step"),
    [("teach", 60, "teacher"), ("distill", 2, "student"), ("draw calibration images", 2, "int8"),
     ("validate", 1, "validate")],
)  # fmt: skip
def test_killed_in_any_step_and_continued(tiny_run: Path, tmp_path: Path, task: str, number: int, step: str) -> None:
    """`make faults` kills smaller runs at random moments."""
    root = tmp_path / "run"
    run_killed(tiny_run, root, task, number)
    assert tuple(manifest(root).steps) == NAMES[: NAMES.index(step)]
    run_recipe(recipe_of(manifest(tiny_run).recipe, tiny_run), root)
    assert_same_results(root, tiny_run)


def test_what_a_killed_write_leaves_is_removed(finished: Path) -> None:
    left = finished / "student" / ".student.safetensors.ab12cd_9.tmp"
    left.write_bytes(b"half")
    mine = finished / "student" / "notes.tmp"
    mine.write_bytes(b"not ours")
    again(finished)
    assert not left.exists()
    assert mine.exists()


def test_a_killed_start_is_no_foreign_folder(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / ".manifest.json.ab12cd_9.tmp").write_bytes(b"{")
    (root / ".lock").touch()
    run_recipe(load_recipe("digits", ["teacher.model=nayer:wrn_10_1", "teach.epochs=1"]), root, last="teacher")
    assert RunFolder.open(root).unexpected_files() == []


def test_a_step_that_fails_loses_nothing(finished: Path) -> None:
    """A hold-out that is found unreadable only while the step runs."""
    broken = finished.parent / "held.npz"
    broken.write_bytes(b"no npz")
    before = manifest(finished)
    with pytest.raises(UsageError):
        again(finished, f"validate.data={broken}", last="validate")
    assert manifest(finished) == before
    assert RunFolder.open(finished).problems() == []


@pytest.mark.usefixtures("no_step")
def test_a_hold_out_that_is_not_there_is_refused_before_any_work(finished: Path) -> None:
    before = (finished / MANIFEST).read_bytes()
    with pytest.raises(UsageError, match="cannot run here"):
        again(finished, "validate.data=/nowhere/held.npz", last="validate")
    assert (finished / MANIFEST).read_bytes() == before


def test_files_of_an_earlier_result_do_not_stay(finished: Path) -> None:
    again(finished, "export.targets=['cpu', 'arm']", last="int8")
    assert (finished / "export" / "student.int8.arm.onnx").is_file()
    again(finished, "export.targets=['cpu']", last="int8")
    assert not (finished / "export" / "student.int8.arm.onnx").exists()
    assert RunFolder.open(finished).unexpected_files() == []


@pytest.mark.usefixtures("no_step")
def test_the_folder_of_another_recipe(finished: Path) -> None:
    with pytest.raises(UsageError) as caught:
        again(finished, "name=letters")
    assert "belongs to the recipe 'digits', not to 'letters'" in caught.value.what


@pytest.mark.usefixtures("no_step")
def test_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UsageError, match=r"(nor|not) a run folder"):
            run_recipe(load_recipe("digits"), tmp_path, fresh=fresh)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nayer-edge", "/proc/self/nayer-edge/run"])
def test_an_unwritable_folder(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UsageError) as caught:
        run_recipe(load_recipe("digits"), tmp_path / where)
    assert "Cannot write" in caught.value.what
    assert "--out" in caught.value.fix
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.usefixtures("no_step")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Cannot write"):
        run_recipe(load_recipe("digits"), tmp_path / "run")


@pytest.mark.usefixtures("no_step")
def test_the_lock_of_another_process(finished: Path) -> None:
    holder = (
        "import sys; from pathlib import Path; from nayer_edge.storage.run_folder import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(finished)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="Another process is working"):
            again(finished)
        process.kill()
    assert again(finished) == [(name, "kept") for name in NAMES], "the lock ends with its process"


@pytest.mark.parametrize("name", ["teacher/teacher.safetensors", "bank.safetensors", "gate/junit.xml", *ONNX])
@pytest.mark.parametrize("change", ["flipped", "missing"])
@pytest.mark.usefixtures("no_step")
def test_an_altered_file_is_refused(finished: Path, name: str, change: str) -> None:
    path = finished / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if change == "missing" else path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        again(finished)
    assert caught.value.exit_code == 4
    assert name in caught.value.why


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "nayer-edge/manifest/2"}', "NaN"])
def test_a_damaged_manifest(finished: Path, text: str) -> None:
    (finished / MANIFEST).write_text(text)
    with pytest.raises(IntegrityError):
        run_recipe(load_recipe("digits"), finished)


def test_parents_are_the_lineage_of_the_table(tiny_run: Path) -> None:
    held = manifest(tiny_run)
    assert tuple(held.steps) == NAMES
    of_step = {step.name: {f.sha256 for f in held.files.values() if f.step == step.name} for step in STEPS}
    for name, entry in held.files.items():
        step = STEPS[NAMES.index(entry.step)]
        wanted = set().union(*(of_step[parent] for parent in step.inputs)) if step.inputs else set()
        assert set(entry.parents) == wanted, name
        assert entry.sha256 == sha256_of(tiny_run / name)
        assert entry.bytes == (tiny_run / name).stat().st_size
    assert {entry.step for entry in held.files.values()} == set(NAMES)


def test_a_digest_states_settings_and_inputs(tiny_run: Path) -> None:
    held = manifest(tiny_run)
    record = held.steps["onnx"]
    inputs = {name: entry.sha256 for name, entry in held.files.items() if entry.step == "student"}
    assert record.digest == digest_of({"step": "onnx", "settings": record.settings, "inputs": inputs})


def own_teacher(tiny_run: Path, folder: Path) -> Path:
    """A recipe whose teacher is the finished run's, by its weights."""
    folder.mkdir(parents=True)
    shutil.copy(tiny_run / "teacher" / "teacher.safetensors", folder / "w.safetensors")
    text = """
[teacher]
model = "nayer:wrn_10_1"
weights = "w.safetensors"
classes = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
input = { channels = 1, height = 16, width = 16 }
[student]
model = "nayer:resnet8"
"""
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_run_travels_without_its_teacher_weights(tiny_run: Path, tmp_path: Path) -> None:
    recipe = own_teacher(tiny_run, tmp_path / "here")
    root = tmp_path / "run"
    run_recipe(load_recipe(str(recipe)), root, last="lte")
    shutil.move(tmp_path / "here", tmp_path / "moved")
    moved = load_recipe(str(tmp_path / "moved" / "mine.toml"))
    events: list[StepEvent] = []
    run_recipe(moved, root, last="lte", on_event=events.append)
    assert [event.state for event in events] == ["kept", "kept"], "the same weights at another place"
    shutil.rmtree(tmp_path / "moved")
    assert [state for _, state in again(root, last="lte")] == ["kept", "kept"], "weights that are not at hand"


def test_other_weights_under_the_same_name_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    recipe = own_teacher(tiny_run, tmp_path / "here")
    root = tmp_path / "run"
    run_recipe(load_recipe(str(recipe)), root, last="lte")
    (tmp_path / "here" / "w.safetensors").write_bytes(b"other")
    with pytest.raises(UsageError) as caught:
        again(root, last="lte")
    assert "teacher.weights.sha256" in caught.value.why
