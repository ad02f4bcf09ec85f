"""Students in other places: on several devices of this machine, and on a Ray cluster whose worker is killed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nayer_edge.errors import IntegrityError, MissingError, NayerEdgeError, UsageError, unexpected
from nayer_edge.pipelines import actions
from nayer_edge.pipelines.costs.budget import Costs
from nayer_edge.pipelines.costs.planning import PlanningCosts
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.sweep import on_ray, running, workers
from nayer_edge.pipelines.sweep.record import StudentRecord, Sweep, Target, write_sweep
from nayer_edge.pipelines.sweep.workers import Result, Task
from nayer_edge.storage.run_folder import RunFolder, is_locked

from .conftest import SETTINGS

STUDENTS = ("nayer:resnet8_w6", "nayer:resnet8_w12")
LONG = {"distill": {"epochs": 12, "warmup_epochs": 0, "decay_epochs": 2}}


def planned(source: Path, out: Path) -> Sweep:
    """A sweep of two students and one round, whose plan is smaller than any that `--budget` makes."""
    plan, _ = running.planned(actions.recipe_in(source), source, out, STUDENTS, 1000.0)
    for each in plan.students:
        each.target = Target(round=1, seconds=5, sections=LONG)
    out.mkdir()
    write_sweep(out, plan)
    return plan


def counted_once(sweep: Sweep, out: Path) -> None:
    """Every student has one share, of a complete run whose epochs were each trained once."""
    for each in sweep.students:
        assert [made.round for made in each.shares] == [1], each.reason
        run = RunFolder.open(out / each.folder)
        assert (run.problems(), run.unexpected_files()) == ([], [])
        lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, LONG["distill"]["epochs"] + 1))
        assert each.shares[0].trained_seconds == pytest.approx(sum(line["seconds"] for line in lines))
        assert {artifact.name for artifact in each.artifacts} == {"fp32", "int8.cpu"}, "exported and measured here"
    assert not [path.name for path in out.iterdir() if path.name.endswith((".new", ".former", ".mark"))]


def begun(out: Path) -> bool:
    """Whether a student has a checkpoint."""
    return any(out.glob("*/student/checkpoint.safetensors"))


# ------------------------------------------------------------------ several devices


@pytest.mark.slow
def test_one_student_on_each_device(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed fails its student only, and the repetition resumes it."""
    out = tmp_path / "sweep"
    planned(source, out)
    monkeypatch.setattr(running, "gpus", lambda _device: ["", ""])
    seen: list[str] = []
    start = workers._started

    def started(task: Task, device: str, scratch: Path, name: str) -> Any:
        process = start(task, device, scratch, name)
        seen.append(name)
        if seen == [STUDENTS[0]]:
            threading.Thread(target=lambda: (_until(lambda: begun(out)), process.kill())).start()
        return process

    monkeypatch.setattr(workers, "_started", started)
    first = running.run_sweep(None, None, out)
    killed, other = first.students
    assert (killed.state, len(other.shares)) == ("failed", 1)
    assert "ended by signal 9" in killed.reason
    second = running.run_sweep(None, None, out)
    assert seen == [*STUDENTS, STUDENTS[0]], "no student was trained twice"
    counted_once(second, out)


def test_interrupted_tasks_count(tmp_path: Path) -> None:
    """One task ends, then the sweep is interrupted while a second one runs and a third one waits."""
    sweep = Sweep(name="x", recipe={}, seconds=1000.0, rounds=1, students=[])
    work = running._Work(sweep, load_recipe("digits"), tmp_path, None)

    class Two:
        last, at_once = "student", 2

        def __init__(self) -> None:
            self.started: dict[str, float] = {}

        def run(self, _tasks: Any) -> Any:
            now = time.monotonic()
            self.started = {"one": now - 30, "two": now - 30}
            del self.started["one"]
            yield "one", Result(30.0)
            raise KeyboardInterrupt

    work.__dict__["workers"] = Two()
    with pytest.raises(KeyboardInterrupt):
        list(work.counted({}))
    assert sweep.spent == pytest.approx(60.0, abs=5)
    assert work.workers.started == {}, "nothing counts twice"


def test_a_process_that_dies_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def dies(*_: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import sys, time; time.sleep(0.5); sys.exit(1)"])

    monkeypatch.setattr(workers, "_started", dies)
    monkeypatch.setattr(workers, "_file", lambda *_: Path(os.devnull) if _[2] == "log" else tmp_path / "none")
    ((name, result),) = workers.OnDevices(["0"]).run({"one": Task(load_recipe("digits"), tmp_path)})
    assert (name, type(result.error)) == ("one", MissingError)
    assert result.seconds >= 0.5


@pytest.mark.parametrize(("taught", "counts"), [(False, False), (True, True)])
def test_the_teachers_training_does_not_count(
    taught: bool, counts: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is for distillation. Interrupted before that, a sweep has spent nothing of it."""

    def interrupted(_recipe: Any, root: Path, **_: Any) -> None:
        if taught:
            # As if these steps had just been made, in 0.1 s each.
            run = RunFolder.open(Path(shutil.copytree(source, root)))
            run.forget("student")
            for name in ("teacher", "lte"):
                run.manifest.steps[name] = run.manifest.steps[name].model_copy(update={"seconds": 0.1})
            run.save()
            time.sleep(0.2)
        time.sleep(0.3)
        raise KeyboardInterrupt

    students = [StudentRecord(model="nayer:resnet8", folder="resnet8")]
    sweep = Sweep(name="x", recipe={}, seconds=1000.0, rounds=1, students=students)
    work = running._Work(sweep, load_recipe("digits", [*SETTINGS]), tmp_path, None)
    monkeypatch.setattr(actions, "timed", lambda recipe, *_: (recipe, []))
    monkeypatch.setattr(actions, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.bank()
    assert (sweep.spent >= 0.3) == counts


def test_devices_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers.gpus("auto") == ["0", "1", "2"]
    assert workers.gpus("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-8, 6")
    assert workers.gpus("cuda") == ["4", "GPU-8", "6"]


@pytest.mark.parametrize(
    "error",
    [UsageError("a", "b", "c"), MissingError("a"), IntegrityError("a", fix="c"), unexpected(KeyError("a"))],
)
def test_errors_travel(error: Any) -> None:
    costs = Costs(0.1, 0.2, 0.3, 0.4, 5.0, 50, 64)
    measured = PlanningCosts(costs, 10, "batchnorm", 32, 400, 768, 64, {"validate": 2000}, 8, ("little memory",))
    packed = json.loads(json.dumps(Result(1.5, measured, error, "where").packed()))
    found = Result.unpacked(packed)
    assert type(found.error) is type(error)
    assert str(found.error) == str(error)
    assert (found.seconds, found.measured, found.traceback) == (1.5, measured, "where")


def test_an_unexpected_error_ends_one_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(workers, "measured_for", broken)
    result = Task(load_recipe("digits"), tmp_path, measure=True).do()
    assert result.error is not None
    assert (type(result.error), result.error.why) == (NayerEdgeError, "ZeroDivisionError: a bug")
    assert "--debug" in result.error.fix
    student = StudentRecord(model="nayer:resnet8", folder="resnet8")
    sweep = Sweep(name="x", recipe={}, students=[student])
    work = running._Work(sweep, load_recipe("digits"), tmp_path, None)
    for debug in ("", "1"):
        monkeypatch.setenv("NAYER_EDGE_DEBUG", debug)
        work.fail(student, result.error, result.traceback)
        assert ("in broken" in capsys.readouterr().err) == bool(debug)
    assert student.state == "failed"
    assert "ZeroDivisionError: a bug" in student.reason


def test_a_retry_counts_with_what_was_lost(tmp_path: Path) -> None:
    """The worker's seconds are those of its last attempt."""
    task = Task(load_recipe("digits"), tmp_path, seconds=100.0)
    assert on_ray.timed_here(Result(20.0), task, 90.0).seconds == 90.0
    assert on_ray.timed_here(Result(20.0), task, 5000.0).seconds == 100.0, "it waited for others"
    assert on_ray.timed_here(Result(120.0), task, 125.0).seconds == 120.0
    assert on_ray.timed_here(Result(20.0), Task(load_recipe("digits"), tmp_path, measure=True), 90.0).seconds == 20.0


def test_tasks_travel(tmp_path: Path) -> None:
    task = Task(
        load_recipe("digits", ["student.model=nayer:resnet8_w8", "teach.epochs=2", "export.max_drop=1.0"]),
        tmp_path,
        measure=True,
        trust_code=True,
        seconds=12.5,
    )
    assert Task.unpacked(json.loads(json.dumps(task.packed()))) == task


# ------------------------------------------------------------------ Ray


def node(name: str, cpus: int, gpus: int = 0, gib: float = 8.0) -> on_ray.Node:
    return on_ray.Node(name, name, cpus, gpus, gib * 2**30)


@pytest.mark.parametrize(
    ("nodes", "students", "device", "needs", "at_once"),
    [
        ([node("a", 4), node("b", 4)], 4, "auto", (2, 0), 4),
        ([node("a", 4), node("b", 4)], 2, "auto", (4, 0), 2),
        ([node("a", 2), node("b", 1)], 5, "auto", (1, 0), 3),
        ([node("a", 16, 4), node("b", 8)], 5, "auto", (4, 1), 4),
        ([node("a", 16, 4), node("b", 8)], 3, "cpu", (8, 0), 3),
        ([node("small", 8, gib=0.5), node("b", 2)], 2, "auto", (1, 0), 2),
    ],
)
def test_what_a_student_declares(
    nodes: list[on_ray.Node], students: int, device: Any, needs: tuple[int, int], at_once: int
) -> None:
    found, fitting = on_ray.needs_of(nodes, students, 2**30, device)
    assert ((found.cpus, found.gpus), fitting, found.memory) == (needs, at_once, 2**30)
    assert any(found.met_by(each) for each in nodes), "else a task would wait for ever"


def test_a_cluster_that_cannot_train_is_refused() -> None:
    with pytest.raises(UsageError, match="No machine") as caught:
        on_ray.needs_of([node("a", 8, gib=0.5)], 2, 2**30, "auto")
    assert "a: 8 cores, 0 GPUs, 0.5 GiB" in caught.value.why
    with pytest.raises(UsageError, match="No machine"):
        on_ray.needs_of([node("a", 8)], 2, 2**30, "cuda")


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ({"version": None, "torch": False}, MissingError, "nayer-edge is not installed on a"),
        ({"version": "0.1.0", "torch": False}, MissingError, "PyTorch is not installed on a"),
        ({"version": "0.0.1", "torch": True}, UsageError, "another version of nayer-edge"),
    ],
)
def test_a_worker_without_the_project_is_named(answer: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        on_ray._require_installed(node("a", 1), answer)
    assert "pip install" in caught.value.fix


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Version mismatch: The cluster was started with: Ray: 2.9.0"), "another version of Ray"),
        (NotADirectoryError(20, "Not a directory", "/dev/null/.ray"), "cannot write to the home folder"),
        (PermissionError(13, "Permission denied", "/tmp/ray/session"), "cannot write to /tmp/ray/session"),
        (ConnectionError("Could not find any running Ray instance."), "no connection"),
    ],
)
def test_why_there_is_no_connection(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    found = on_ray._explained(error, "auto", "2.60.0")
    assert message in found.what
    assert found.fix


@pytest.mark.slow
def test_a_missing_ray_is_said(without: Callable[..., dict[str, str]], spawn: Callable[..., Any], source: Path) -> None:
    answer = spawn("sweep", source, "--ray", "auto", "--out", source.parent / "no-ray", env=without("ray"))
    assert (answer.code, "pip install '.[ray]'" in answer.err) == (3, True), answer.err


def test_workers_get_absolute_paths(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have another working directory."""
    monkeypatch.chdir(source.parent)
    recipe = actions.on_bank(actions.recipe_in(source), Path(source.name))
    packed = Task(recipe, Path("sweep/student")).packed()
    assert packed["root"] == str(source.parent / "sweep/student")
    assert packed["recipe"]["student"]["bank"] == str(source)


def test_long_names_with_one_end_have_files_of_their_own(tmp_path: Path) -> None:
    ends = "/experiments/networks_for_the_device.py:small_student"
    files = {workers._file(tmp_path, f"python:../{folder}{ends}", "task").name for folder in ("first", "other")}
    assert len(files) == 2


def test_a_worker_plans_with_the_teacher_of_the_bank(source: Path, tmp_path: Path) -> None:
    """The file that the recipe names may not be on that machine."""
    recipe = actions.on_bank(actions.recipe_in(source), source)
    teacher = recipe.teacher.model_copy(update={"weights": str(tmp_path / "elsewhere.safetensors")})
    recipe = recipe.model_copy(update={"teacher": teacher, "teach": None})
    result = Task(recipe, tmp_path / "student", measure=True).do()
    assert result.error is None
    assert result.measured is not None
    assert result.measured.planned(600.0).sections["budget"]["seconds"] == 600.0
    # What the teacher costs is not measured for every student; the file is found all the same.
    again = Task(recipe, tmp_path / "student", measure=True).do(known=result.measured.costs)
    assert again.measured is not None
    assert again.measured.costs.teacher_batch == result.measured.costs.teacher_batch
    assert again.measured.costs.student_step != result.measured.costs.student_step


def test_the_sweep_keeps_its_name_on_the_workers(tmp_path: Path) -> None:
    token = on_ray._token(tmp_path)
    assert on_ray._token(tmp_path) == token
    (tmp_path / on_ray.WORKERS).write_text("../../etc")
    assert re.fullmatch("[0-9a-f]{32}", on_ray._token(tmp_path))


def test_the_run_that_made_the_bank_needs_none(source: Path) -> None:
    """On a worker that does not see the folder, too."""
    import numpy as np

    files = {f"run/{name}": np.fromfile(path, dtype=np.uint8) for name, path in on_ray._files_in(source).items()}
    files |= {name.replace("run/", f"{on_ray.BANK_COPY}/"): content for name, content in files.items()}
    packed = Task(actions.recipe_in(source), source.parent / "run").packed()
    answer, made = on_ray.do_with_files(packed, files, "bankless", lambda reference: reference)
    assert answer["error"] is None, answer["error"]
    assert made is not None
    assert bytes(made["bank.safetensors"]) == (source / "bank.safetensors").read_bytes()


def test_files_come_back_all_or_none(tmp_path: Path) -> None:
    import numpy as np

    root = tmp_path / "run"
    root.mkdir()
    (root / "old").write_text("old")
    on_ray._replace(root, {"a/b": np.frombuffer(b"new", dtype=np.uint8)})
    assert [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()] == ["a/b"]
    with pytest.raises(UsageError, match="outside"):
        on_ray._replace(root, {"../c": np.frombuffer(b"new", dtype=np.uint8)})
    assert (root / "a/b").read_bytes() == b"new"
    # Interrupted between the two renames: what came back is complete, and is kept.
    root.rename(tmp_path / "run.former")
    (tmp_path / "run.new").mkdir()
    (tmp_path / "run.new" / "b").write_text("newer")
    on_ray.recover(root)
    assert [path.name for path in root.iterdir()] == ["b"]
    # After them, but before the former folder was removed.
    (tmp_path / "run.former").mkdir()
    on_ray.recover(root)
    assert [path.name for path in root.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


ray_only = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: the extra 'ray'")


@pytest.fixture
def address() -> str:
    """A Ray cluster on this machine: NAYER_EDGE_TEST_RAY names one with two cores, else one is started."""
    return os.environ.get("NAYER_EDGE_TEST_RAY", "local")


@ray_only
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_the_clusters_queue_costs_no_time(source: Path, tmp_path: Path, address: str) -> None:
    """Somebody else's task has all cores of the cluster."""
    root, mark, queued = Path(shutil.copytree(source, tmp_path / "student")), tmp_path / "busy", 6.0

    def busy() -> None:
        mark.touch()
        time.sleep(queued)

    with on_ray.connected(address) as ray:
        place = on_ray.OnRay(ray, tmp_path, source, "cpu", 1)
        other = ray.remote(busy).options(num_cpus=place.needs.cpus).remote()
        _until(mark.exists)
        began = time.monotonic()
        # Its student is trained already.
        ((_, result),) = place.run({"one": Task(actions.recipe_in(root), root, seconds=1000.0)})
        took = time.monotonic() - began
        ray.get(other)
    assert result.error is None
    assert 0 < result.seconds < took - 0.8 * queued
    assert place.started == {}


@ray_only
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_an_interrupted_sweep_waits_for_its_workers(source: Path, tmp_path: Path, address: str) -> None:
    """They save their work, and the time of the one that had begun counts."""
    recipe = actions.on_bank(actions.recipe_in(source), source)
    length = recipe.distill.model_copy(update={"epochs": 500, "warmup_epochs": 0})
    recipe = recipe.model_copy(update={"distill": length})
    tasks = {name: Task(recipe, tmp_path / name, seconds=1000.0) for name in ("one", "two")}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = threading.Thread(target=lambda: (_until(lambda: begun(tmp_path)), os.kill(os.getpid(), signal.SIGINT)))
    with on_ray.connected(address) as ray:
        # One at a time, with all cores.
        place = on_ray.OnRay(ray, tmp_path, source, "cpu", 1)
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            list(place.run(tasks))
        interrupt.join()
        assert not is_locked(tmp_path / "one")
        assert begun(tmp_path)
        assert place.started.keys() == {"one"}, "the other one waited"


@ray_only
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize("shared", [True, False])
def test_a_killed_worker_loses_nothing(
    shared: bool, source: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, of which one is killed at its first checkpoint: Ray starts its task again, which resumes."""
    out = tmp_path / "sweep"
    planned(source, out)
    # Where the runs of workers that do not see this folder lie.
    scratch = out if shared else Path(f"/tmp/nayer-edge-{'0' * 32}")
    monkeypatch.setattr(on_ray.secrets, "token_hex", lambda _n: "0" * 32)
    examine = on_ray.OnRay._examine
    monkeypatch.setattr(on_ray.OnRay, "_examine", lambda self, nodes: examine(self, nodes) and shared)
    killed: list[int] = []

    def kill() -> None:
        _until(lambda: any(scratch.rglob("student/checkpoint.safetensors")))
        killed.extend(_worker_of(scratch))
        for process in killed:
            os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    sweep = running.run_sweep(None, None, out, ray=address)
    killer.join()
    assert killed, "a worker was killed"
    counted_once(sweep, out)
    if not shared:
        assert not list(scratch.glob("*")), "nothing is left on the workers"


def _until(true: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)


def _worker_of(folder: Path) -> list[int]:
    """The process that holds the lock of a run in a folder that has a checkpoint."""
    (checkpoint, *_) = folder.rglob("student/checkpoint.safetensors")
    lock = checkpoint.parents[1] / ".lock"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(link.readlink() == lock for link in (process / "fd").iterdir()):
                return [int(process.name)]
    return []
