"""The command line as a person and a CI server meet it. Exit codes are the contract."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

import nayer_edge
from nayer_edge.errors import UsageError
from nayer_edge.pipelines.cli import app
from nayer_edge.pipelines.recipes.loading import recipe_of, shipped
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.pipelines.schemas import load
from nayer_edge.storage.files import sha256_of, write_json
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

ONNX = "export/student.fp32.onnx"
REPORT = "validate/report.json"
HOSTILE = "\x1b[2J<script>alert(1)</script>\x1b]0;owned\x07 ::error::owned [x](http://evil.example) $x_2$"
CLASSES = (HOSTILE, "нуль", "zwölf", "três", "猫", "שש", "🎱", "<b>&amp;", "'\"`|", "9")

HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "transformers", "tensorrt", "scipy", "jinja2"}
ONLY_BASE = """
import sys
base = {"typer", "click", "rich", "pydantic", "pydantic_core", "annotated_types", "annotated_doc", "typing_extensions",
        "typing_inspection", "pygments", "markdown_it", "mdurl", "shellingham", "tomli_w", "nayer_edge"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in base and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""

Invoke = Callable[..., Any]
SpawnEach = Callable[..., list[Any]]


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(name, command) of every command, those of groups included."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())
NAMES = [" ".join(name) for name in COMMANDS]


def settings_of(root: Path) -> list[str]:
    """What makes the digits recipe the one of a finished run."""
    values = json.loads((root / MANIFEST).read_text())["recipe"]
    return [
        f"--set=precision={values['precision']}",
        f"--set=teacher.model={values['teacher']['model']}",
        *(
            f"--set={section}.{key}={str(value).lower() if isinstance(value, bool) else value}"
            for section in ("teach", "synthesis", "distill", "export", "validate")
            for key, value in values[section].items()
            if isinstance(value, int | float | str)
        ),
    ]


def test_what_a_message_says_to_type_goes_on_with_the_run(
    tiny_run: Path, begun: Path, tmp_path: Path, invoke: Invoke
) -> None:
    """Whatever the recipe was, and with its own settings."""
    answer = invoke("calibration-data", begun, "--out", tmp_path / "c")
    assert answer.code == 2
    typed = re.search(r"Type: nayer-edge (run .* --until student)$", answer.err, re.MULTILINE)
    assert typed is not None, answer.err
    assert invoke(*shlex.split(typed[1])).code == 0
    assert list(RunFolder.open(begun).manifest.steps) == ["teacher", "lte", "student"]
    theirs = RunFolder.open(tiny_run).manifest.files["student/student.safetensors"]
    assert RunFolder.open(begun).manifest.files["student/student.safetensors"].sha256 == theirs.sha256


def record_again(root: Path, name: str) -> None:
    """Enters a file into the manifest as it now is."""
    run = RunFolder.open(root)
    path = run.path(name)
    update = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    run.manifest.files[name] = run.manifest.files[name].model_copy(update=update)
    run.save()


def policy(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text)
    return path


LENIENT = "[accuracy]\nmax_drop_vs_fp32 = 1.0\nmax_drop_vs_teacher = 1.0\n"


# What the commands offer


@pytest.mark.parametrize("name", ["", "lte", *NAMES])
def test_help_fits_80_columns_and_shows_an_example(invoke: Invoke, name: str) -> None:
    answer = invoke(*name.split(), "--help")
    assert answer.code == 0
    assert answer.err == ""
    assert max(map(len, answer.out.splitlines())) <= 80
    if name in NAMES:
        assert "Example" in answer.out
        assert f"nayer-edge {name}" in answer.out.split("Example")[1]


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_commands_that_exist(invoke: Invoke, name: str) -> None:
    command = COMMANDS[tuple(name.split())]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    text = re.sub(r"\s+", " ", invoke(*name.split(), "--help").out.split("Example")[1])
    for example in text.split("nayer-edge ")[1:]:
        assert example.startswith(name)
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", example)) <= options


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_json(name: str) -> None:
    assert any("--json" in parameter.opts for parameter in COMMANDS[tuple(name.split())].params)


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").out == f"{nayer_edge.__version__}\n"


def test_no_command_shows_help(invoke: Invoke) -> None:
    assert "Usage: nayer-edge" in invoke().out
    assert "show" in invoke("lte").out


# The base install


def test_help_gate_and_verify_need_nothing_but_the_base_install(spawn_each: SpawnEach, finished: Path) -> None:
    """In a process where importing anything but the base install's packages fails."""
    path = policy(finished.parent, LENIENT)
    commands: list[tuple[int, list[str | Path]]] = [
        (0, ["--help"]),
        (0, ["run", "--help"]),
        (0, ["recipes"]),
        (0, ["gate", finished, "--policy", path]),
        # By the policy of its recipe, which a student that was hardly trained does not pass.
        (1, ["gate", finished]),
        (0, ["verify", finished]),
        (0, ["doctor"]),
    ]
    answers = spawn_each(*(arguments for _, arguments in commands), before=ONLY_BASE)
    for (code, arguments), answer in zip(commands, answers, strict=True):
        assert (answer.code, answer.err) == (code, ""), arguments


def test_nothing_heavy_is_imported(spawn_each: SpawnEach, finished: Path) -> None:
    """Where it could be, and by commands that would go on without it."""
    commands = (["--help"], ["gate", finished], ["verify", finished], ["recipes"], ["doctor"])
    answers = spawn_each(*commands)
    for arguments, answer in zip(commands, answers, strict=True):
        assert not HEAVY & answer.packages, arguments
    assert "pydantic" not in answers[0].packages, "help is there at once"


def test_help_lists_the_steps() -> None:
    from nayer_edge.pipelines.cli.training import STOP_AFTER
    from nayer_edge.pipelines.steps import NAMES

    assert f"{', '.join(NAMES[:-1])} or {NAMES[-1]}." in STOP_AFTER


@pytest.mark.parametrize(
    ("blocked", "arguments"),
    [
        ("torch", ["run", "digits", "--out", "out"]),
        ("torch", ["lte", "show", "digits"]),
        ("onnxruntime", ["bench", "RUN"]),
        pytest.param("jinja2", ["report", "RUN"], marks=pytest.mark.slow),
        pytest.param("sklearn", ["validate", "RUN", "--data", "digits"], marks=pytest.mark.slow),
    ],
)
def test_missing_extra(
    spawn: Invoke,
    without: Callable[..., dict[str, str]],
    finished: Path,
    tmp_path: Path,
    blocked: str,
    arguments: list[str],
) -> None:
    run = RunFolder.open(finished)
    run.forget("report")
    run.forget("validate" if blocked == "sklearn" else "report")
    before = run.manifest
    answer = spawn(*[str(finished) if a == "RUN" else a for a in arguments], env=without(blocked), cwd=tmp_path)
    assert answer.code == 3
    assert "pip install '.[cpu]'" in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "out").exists(), "nothing is begun that cannot go on"
    assert RunFolder.open(finished).manifest == before


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gaet"], ["Did you mean 'gate'?"]),
        (["run", "digts"], ["There is no recipe 'digts'. Did you mean 'digits'?", "nayer-edge recipes"]),
        (["run", "nowhere.toml"], ["There is no recipe file nowhere.toml."]),
        (["run"], ["Missing argument"]),
        (["run", "digits", "--nutil", "lte"], ["--nutil", "--until"]),
        (["run", "digits", "--until", "studnet"], ["Did you mean 'student'?", "The steps are: teacher"]),
        (
            ["run", "digits", "--set", "distill.epoch=3"],
            [
                "Invalid recipe digits after --set distill.epoch=3",
                "unknown key 'distill.epoch'. Did you mean 'distill.epochs'?",
                "Fix the --set values.",
            ],
        ),
        (["run", "digits", "--set", "x"], ["'x' is not of the form a.b=c.", "For example: --set"]),
        (["lte", "show", "digts"], ["Did you mean 'digits'?"]),
        (["gate", "nowhere"], ["nowhere is not a run folder.", "nayer-edge run"]),
        (["verify", "nowhere"], ["nowhere is not a run folder."]),
        (["report", "nowhere"], ["nowhere is not a run folder."]),
        (["export", "nowhere"], ["nowhere is not a run folder."]),
        (["validate", "nowhere"], ["nowhere is not a run folder."]),
        (["bench", "nowhere"], ["nowhere is not a run folder."]),
        (["validate", "nowhere", "--data", "digits", "--synthetic"], ["mutually exclusive"]),
        (["teach", "own.toml"], ["There is no recipe file own.toml."]),
    ],
)
def test_wrong_usage(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = invoke(*arguments)
    assert answer.code == 2
    for word in words:
        assert word in answer.err
    assert "Traceback" not in answer.err
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_several_problems_at_once(invoke: Invoke, tmp_path: Path) -> None:
    answer = invoke(
        "run", "digits", "--out", tmp_path / "run",
        "--set", "distil.epochs=3", "--set", "teach.lr=-1", "--set", "synthesis.g_step=3", "--set", "seed=x",
    )  # fmt: skip
    assert answer.code == 2
    for word in ("'distil'. Did you mean 'distill'?", "teach.lr", "Did you mean 'synthesis.g_steps'?", "seed"):
        assert word in answer.err
    assert answer.err.count("\n  - ") == 4
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_trained_here(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[teacher]\nmodel = "nayer:resnet20"\nweights = "w.safetensors"\nclasses = ["a", "b"]\n'
        '[student]\nmodel = "nayer:resnet8"\n'
    )
    answer = invoke("teach", path)
    assert answer.code == 2
    assert "has no [teach] section" in answer.err
    answer = invoke("run", path, "--out", tmp_path / "run")
    assert answer.code == 2
    assert "teacher.weights: there is no" in answer.err


def test_a_file_in_the_way(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    answer = invoke("run", "digits", "--out", tmp_path / "file" / "run")
    assert answer.code == 2
    assert "Cannot write" in answer.err


def test_changed_training_settings(invoke: Invoke, finished: Path) -> None:
    answer = invoke("run", "digits", *settings_of(finished), "--set", "distill.epochs=9", "--out", finished)
    assert answer.code == 2
    assert "Changed since: distill.epochs: 3 → 9." in answer.err
    assert "--fresh" in answer.err


# The gate


def test_gate_exit_codes(invoke: Invoke, finished: Path) -> None:
    folder = finished.parent
    assert invoke("gate", finished, "--policy", policy(folder, LENIENT)).code == 0
    assert invoke("gate", finished, "--policy", policy(folder, LENIENT + "[size]\nmax_bytes = 1\n")).code == 1
    answer = invoke("gate", finished, "--policy", policy(folder, LENIENT + "[size]\nmax_byte = 1\n"))
    assert answer.code == 2
    assert "unknown key 'size.max_byte'. Did you mean 'size.max_bytes'?" in answer.err
    assert invoke("gate", finished, "--policy", folder / "nowhere.toml").code == 2
    content = bytearray((finished / ONNX).read_bytes())
    content[100] ^= 1
    (finished / ONNX).write_bytes(content)
    answer = invoke("gate", finished, "--policy", policy(folder, LENIENT))
    assert answer.code == 4
    assert ONNX in answer.err


def test_gate_without_a_report(invoke: Invoke, tiny_run: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    RunFolder.create(root, json.loads((tiny_run / MANIFEST).read_text())["recipe"], 0, {}, {})
    answer = invoke("gate", root)
    assert answer.code == 2
    assert f"It has no student yet.\nType: nayer-edge run {root}\n" in answer.err


@pytest.mark.parametrize("command", ["gate", "report"])
def test_a_report_older_than_the_artifacts(invoke: Invoke, finished: Path, command: str) -> None:
    with (finished / ONNX).open("ab") as file:
        file.write(b"\0")
    record_again(finished, ONNX)
    answer = invoke(command, finished)
    assert answer.code == 4
    assert "stale" in answer.err
    assert f"nayer-edge validate {finished}" in answer.err


def test_gate_writes_where_it_is_told(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    answer = invoke(
        "gate", finished, "--policy", policy(tmp_path, LENIENT),
        "--junit", tmp_path / "out" / "j.xml", "--json-out", tmp_path / "v.json", "--summary", tmp_path / "s.md",
    )  # fmt: skip
    assert answer.code == 0
    assert ET.parse(tmp_path / "out" / "j.xml").getroot().get("failures") == "0"
    assert json.loads((tmp_path / "v.json").read_text())["verdict"] == "pass"
    assert (tmp_path / "s.md").read_text().startswith("### nayer-edge gate: ✓ pass")
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert invoke("gate", finished, "--junit", tmp_path).code == 2


def test_printed_policy_is_a_policy(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    answer = invoke("gate", finished, "--print-policy")
    assert answer.code == 0
    path = policy(tmp_path, answer.out)
    assert invoke("gate", finished, "--policy", path, "--print-policy").out == answer.out


def test_report_ends_well_whatever_the_verdict(invoke: Invoke, finished: Path) -> None:
    assert invoke("gate", finished).code == 1
    answer = invoke("report", finished)
    assert answer.code == 0
    assert "gate: fail" in answer.out
    assert str(finished / "report.html") in answer.out


# Integrity


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("flipped", f"{ONNX} was altered"),
        ("missing", f"{ONNX} is missing"),
        ("added", "export/extra.onnx is not in the manifest"),
        ("link", "export/extra.onnx is not in the manifest"),
    ],
)
def test_verify(invoke: Invoke, finished: Path, change: str, sentence: str) -> None:
    answer = invoke("verify", finished)
    assert answer.code == 0
    assert "files match the manifest" in answer.out
    path = finished / ONNX
    if change == "flipped":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif change == "missing":
        path.unlink()
    elif change == "added":
        (finished / "export" / "extra.onnx").write_bytes(b"x")
    else:
        (finished / "export" / "extra.onnx").symlink_to("/etc/hostname")
    answer = invoke("verify", finished)
    assert answer.code == 4
    assert f"✗ {sentence}" in answer.out
    assert answer.out.count("✗") == 1
    answer = invoke("verify", finished, "--json")
    assert answer.code == 4
    assert sentence in json.loads(answer.out)["problems"][0]


def test_a_manifest_that_points_outside(invoke: Invoke, finished: Path) -> None:
    values = json.loads((finished / MANIFEST).read_text())
    values["files"]["../../../etc/hostname"] = values["files"].pop(ONNX)
    (finished / MANIFEST).write_text(json.dumps(values))
    for command in ("verify", "gate", "validate", "report"):
        answer = invoke(command, finished)
        assert answer.code == 4, command
        assert "Traceback" not in answer.err


# For machines


def private_key(folder: Path) -> Path:
    path = folder / "key.pem"
    command = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def json_commands(root: Path, folder: Path) -> dict[str, list[str | Path]]:
    same: list[str | Path] = [*settings_of(root), "--out", root]
    return {
        "quickstart": same,
        "run": ["digits", *same],
        "teach": ["digits", *same],
        "distill": ["digits", *same],
        "export": [root, "--int8"],
        "calibration-data": [root, "-n", "20", "--format", "npz,png", "--out", folder / "calibration"],
        "validate": [root],
        "gate": [root],
        "report": [root],
        "bench": [root, "--batch", "1", "--runs", "5"],
        "verify": [root],
        "sign": [root, "--key", private_key(folder)],
        "sbom": [root],
        "recipes": [],
        "students": ["--input", "1x16x16", "--no-latency"],
        "sweep": [root, "--students", "nayer:resnet8_w4", "--out", folder / "sweep", "--dry-run"],
        "doctor": [],
        "lte build": ["digits"],
        "lte show": ["digits"],
        # The run's own teacher has a card beside it, which answers everything.
        "init": [root / "teacher" / "teacher.safetensors", "--out", folder / "own.toml", "--effort", "trial"],
    }


def test_json_is_all_that_stands_on_standard_output(
    invoke: Invoke, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three small students instead of all ten for the size, which a slow test in test_students.py builds.
    suited = ["nayer:resnet8", "nayer:resnet20", "nayer:wrn_16_1"]
    monkeypatch.setattr("nayer_edge.pipelines.costs.students.students_for", lambda _spec: suited)
    table = json_commands(finished, tmp_path)
    assert set(table) == set(NAMES), "a new command has --json, and stands in this table"
    answers = {}
    for name, arguments in table.items():
        answer = invoke(*name.split(), *arguments, "--json")
        assert answer.code in (0, 1), (name, answer.err)
        answers[name] = json.loads(answer.out)
    assert answers["run"]["verdict"] == answers["gate"]
    assert answers["gate"]["schema"] == "nayer-edge/verdict/1"
    assert answers["teach"]["verdict"] is None
    assert answers["verify"]["files"] == len(RunFolder.open(finished).manifest.files)
    assert [answers["verify"][key] for key in ("problems", "unfinished", "left")] == [[], [], []]
    assert answers["sign"]["manifest_sha256"] == answers["verify"]["manifest_sha256"]
    assert answers["sbom"]["bomFormat"] == "CycloneDX"
    assert "digits" in [recipe["name"] for recipe in answers["recipes"]]
    assert {line["what"] for line in answers["doctor"]} >= {"processor", "torch", "onnxruntime"}
    assert [row["label"] for row in answers["lte show"]["labels"]][:2] == ["zero", "one"]
    assert answers["lte build"] == answers["lte show"]
    assert [row["model"] for row in answers["students"]] == suited


def test_each_recipe_has_one_line_of_eighty_columns(invoke: Invoke) -> None:
    lines = invoke("recipes").out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in lines if " → " in line}
    assert rows.pop("recipe") == ["teacher", "→", "student", "top-1"]
    assert set(rows) == {recipe.name for recipe in shipped()}
    assert rows["digits"] == ["wrn_16_2", "→", "resnet8", "98.94", "±", "0.25", "%"]
    assert rows["photos"] == ["resnet20", "→", "wrn_16_1", "88.68", "±", "0.19", "%"]
    assert rows["imagenet-r50-mobilenet_v3_small"] == ["resnet50", "→", "mobilenet_v3_small"]


def test_json_of_an_error_is_empty(invoke: Invoke) -> None:
    answer = invoke("gate", "nowhere", "--json")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("Error: ")


COLOURFUL = {"GITHUB_ACTIONS": "true", "FORCE_COLOR": "1", "CI": "true", "PY_COLORS": "1", "TERM": "xterm-256color"}


def test_no_colour_codes_off_a_terminal(spawn_each: SpawnEach, finished: Path) -> None:
    commands = (["gate", "--help"], ["gate", finished], ["gaet"], ["recipes"], ["doctor"])
    answers = spawn_each(*commands, env=COLOURFUL)
    assert [answer.code for answer in answers] == [0, 1, 2, 0, 0]
    for arguments, answer in zip(commands, answers, strict=True):
        assert "\x1b" not in answer.out + answer.err, arguments
    assert any(line.startswith("::error ") for line in answers[1].out.splitlines())


@pytest.mark.slow
def test_no_colour_codes_off_a_terminal_from_the_others(spawn_each: SpawnEach, finished: Path) -> None:
    commands = (["--help"], ["gate", "nowhere"], ["verify", finished], ["report", finished])
    for arguments, answer in zip(commands, spawn_each(*commands, env=COLOURFUL), strict=True):
        assert "\x1b" not in answer.out + answer.err, arguments


# Interruption and failure


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_what_is_finished(tiny_run: Path, begun: Path, number: signal.Signals) -> None:
    """In test_run.py, a killed run is continued to the same student."""
    command = [sys.executable, "-m", "nayer_edge", "run", "digits", *settings_of(tiny_run), "--out", str(begun)]
    with subprocess.Popen(
        [*command, "--set", "distill.epochs=100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (begun / "metrics.jsonl").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "\nInterrupted. Finished work is kept; run the same command to continue (without --fresh).\n"
    recipe = recipe_of(json.loads((tiny_run / MANIFEST).read_text())["recipe"], tiny_run)
    with pytest.raises(UsageError, match=r"unfinished step 'student' .* other settings"):
        run_recipe(recipe, begun, last="student")
    assert (begun / "student" / "checkpoint.safetensors").is_file()
    assert RunFolder.open(begun).problems() == []


@pytest.mark.parametrize(("size", "shape"), [("20x24", (3, 20, 24)), ("24", (3, 24, 24)), ("1x20x24", (1, 20, 24))])
def test_students_for_an_image_size(invoke: Invoke, size: str, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    answer = invoke("students", "nayer:resnet8", "--input", size, "--no-latency", "--json")
    assert answer.code == 0, answer.err
    (cost,) = json.loads(answer.out)
    (other,) = json.loads(
        invoke("students", "nayer:resnet8", "--input", f"{channels}x{width}x{height}", "--no-latency", "--json").out
    )
    assert cost["macs"] == other["macs"] > 0
    # Added up by hand: the first convolution and its BatchNorm, three stages, the head.
    assert cost["params"] == 16 * 9 * channels + 32 + 4_672 + 14_528 + 57_728 + 650


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_run_that_is_read_only(finished: Path, tmp_path: Path) -> None:
    """The advice is a command that works here; `validate` has no --out."""
    root = tmp_path / "a run"
    shutil.copytree(finished, root)
    for path in (root, *root.parents):
        if path.owner() == "root" and path != Path(path.anchor):
            path.chmod(path.stat().st_mode | 0o055)
    user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    if subprocess.run([*user, sys.executable, "-c", "import nayer_edge"], check=False, capture_output=True).returncode:
        pytest.skip("another user cannot read this checkout")
    command = [*user, sys.executable, "-m", "nayer_edge", "validate", str(root), "--synthetic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": "/tmp"})
    assert done.returncode == 2, done.stderr
    assert f"cp -r {shlex.quote(str(root))} COPY" in done.stderr


def test_tracebacks_are_for_those_who_ask(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = invoke("run", "digts")
    assert answer.code == 2
    assert "Traceback" not in answer.err
    answer = invoke("--debug", "run", "digts")
    assert answer.code == 2, "the exit code is the same"
    assert "Traceback" in answer.err
    assert "There is no recipe 'digts'." in answer.err


def fails(error: BaseException) -> Callable[..., NoReturn]:
    """A function that raises it."""

    def raising(*_: object) -> NoReturn:
        raise error

    return raising


def test_what_nobody_expected_has_no_traceback_either(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "open", fails(RuntimeError("boom")))
    answer = invoke("verify", tmp_path)
    assert answer.code == 70, "1 means that the gate failed"
    assert "RuntimeError: boom" in answer.err
    assert "--debug" in answer.err
    assert "Traceback" not in answer.err
    assert "Traceback" in invoke("--debug", "verify", tmp_path).err


# Names in any script, and names that would act


@pytest.fixture(scope="module")
def named(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a finished run whose classes have such names."""
    folder = tmp_path_factory.mktemp("named")
    values = json.loads((tiny_run / MANIFEST).read_text())["recipe"]
    text = f"""
description = {json.dumps(HOSTILE)}
[teacher]
model = "nayer:wrn_10_1"
classes = {json.dumps(CLASSES, ensure_ascii=False)}
input = {{ channels = 1, height = 16, width = 16 }}
[teach]
data = "digits"
epochs = 2
batch = 32
[lte]
encoder = "random"
prompt = "{{label}}"
[student]
model = "nayer:resnet8"
[generator]
noisy_dim = 32
channels = 8
[synthesis]
batch = 20
g_steps = 1
warmup_rounds = 1
rounds = 1
[distill]
epochs = 2
warmup_epochs = 1
steps = 2
batch = 16
bank_mib = 1
holdout_rounds = 1
[export]
calibration_images = 20
calibration_method = "minmax"
max_drop = 1.0
[validate]
data = {json.dumps(values["validate"]["data"])}
[gate.per_class]
max_drop = 0.01
advisory = false
"""
    (folder / "named.toml").write_text(text, encoding="utf-8")
    return folder


def assert_inert(text: str) -> None:
    assert not any(ord(character) < 32 and character not in "\n\t" for character in text)
    assert "\x7f" not in text
    assert "<script" not in text
    assert "\n::" not in text


@pytest.mark.slow
def test_any_class_names_from_recipe_to_gate(invoke: Invoke, named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(named)
    answer = invoke("run", "named.toml")
    assert answer.code == 1, answer.err
    assert "Report: runs/named/report.html" in answer.out
    root = named / "runs" / "named"
    card = json.loads((root / "student" / "student.json").read_text(encoding="utf-8"))
    assert tuple(card["classes"]) == CLASSES
    assert_inert(answer.out.replace("<script", "script"))
    assert "\x1b" not in answer.out

    # One image of every class lost, so that the gate has something to say about each.
    report = json.loads((root / REPORT).read_text(encoding="utf-8"))
    assert [each["label"] for each in report["artifacts"][-1]["per_class"]] == list(CLASSES)
    (int8,) = [artifact for artifact in report["artifacts"] if artifact["name"] == "int8.cpu"]
    for each in int8["per_class"]:
        each["lost"], each["gained"] = each["n"], 0
    write_json(root / REPORT, report)
    record_again(root, REPORT)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    answer = invoke("gate", root, "--junit", "j.xml", "--summary", "s.md", "--json-out", "v.json")
    assert answer.code == 1
    assert "script" in answer.out, "the name is shown"
    assert "\x1b" not in answer.out
    assert "\x07" not in answer.out
    assert all(line.startswith("::error ") for line in answer.out.splitlines() if line.startswith("::"))
    junit = (named / "j.xml").read_text(encoding="utf-8")
    assert_inert(junit)
    assert "script" in junit
    assert_inert((named / "s.md").read_text(encoding="utf-8"))
    assert "\\u001b" not in (named / "v.json").read_text(encoding="utf-8")

    answer = invoke("report", root)
    assert answer.code == 0
    page = (root / "report.html").read_text(encoding="utf-8")
    assert_inert(page)
    assert "&lt;script&gt;" in page

    answer = invoke("lte", "show", "named.toml")
    assert answer.code == 0
    assert "\x1b" not in answer.out
    assert {"нуль", "猫", "🎱", "zwölf"} <= set(re.findall(r"\S+", answer.out))
    answer = invoke("lte", "show", "named.toml", "--json")
    assert [row["label"] for row in json.loads(answer.out)["labels"]] == list(CLASSES)


@pytest.mark.parametrize(
    ("encoding", "locale"),
    [
        ("cp1252", {}),
        # Nothing on this machine knows more than ASCII.
        ("ascii", {"PYTHONUTF8": "0", "LC_ALL": "C"}),
        pytest.param("latin-1", {}, marks=pytest.mark.slow),
    ],
)
def test_marks_differ_in_every_encoding(finished: Path, tmp_path: Path, encoding: str, locale: dict[str, str]) -> None:
    limits = "[accuracy]\nmax_drop_vs_teacher = 0.0\n[int8]\nmin_coverage = 0.1\n[size]\nmax_bytes = 10\n"
    command = [sys.executable, "-m", "nayer_edge", "gate", str(finished), "--policy", str(policy(tmp_path, limits))]
    env = {**os.environ, **locale, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, encoding=encoding, env=env, check=False)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert {"pass", "FAIL"} <= {line.split()[0] for line in lines if " int8.cpu " in line}
    assert lines[-1] == "gate: fail", "'? gate' would read as inconclusive"


@pytest.mark.slow
def test_json_in_an_encoding_without_its_characters(spawn: Invoke, tmp_path: Path) -> None:
    """Names are escaped as JSON has it, not replaced by question marks."""
    names = tmp_path / "names.txt"
    names.write_text("猫\n🦆\nété\n", encoding="utf-8")
    answer = spawn(
        "lte", "show", "--labels", names, "--encoder", "onehot", "--json", env={"PYTHONIOENCODING": "cp1252"}
    )
    assert answer.code == 0, answer.err
    assert [row["label"] for row in json.loads(answer.out)["labels"]] == ["猫", "🦆", "été"]


@pytest.mark.parametrize(
    ("streams", "code"),
    [
        ("| head -c 1 >/dev/null", 1),
        pytest.param(">&-", 1, marks=pytest.mark.slow),
        ("<&- >&- 2>&-", 1),
        # Not 1: nobody has seen the verdict.
        (">/dev/full", 2),
    ],
)
def test_a_verdict_whatever_becomes_of_the_streams(finished: Path, streams: str, code: int) -> None:
    command = f"{sys.executable} -m nayer_edge gate {shlex.quote(str(finished))} {streams}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize(
    ("end", "code"), [(typer.Abort(), 130), (SystemExit(1), 70), (SystemExit("text"), 70), (ValueError(), 70)], ids=repr
)
def test_exit_code_1_is_the_gates(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException, code: int
) -> None:
    monkeypatch.setattr(RunFolder, "open", fails(end))
    assert invoke("verify", tmp_path).code == code


def test_schemas_name_what_the_files_hold(finished: Path) -> None:
    assert load("manifest")["$id"] == json.loads((finished / MANIFEST).read_text())["schema"]
