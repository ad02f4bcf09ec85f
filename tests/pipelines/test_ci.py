"""action.yml and the worked pipelines: their structure, and every command in them executed as a CI server would."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from xmlschema import XMLSchema

ROOT = Path(__file__).resolve().parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
GITHUB = yaml.safe_load((ROOT / "pipelines" / "ci" / "github.yml").read_text(encoding="utf-8"))
GITLAB = yaml.safe_load((ROOT / "pipelines" / "ci" / "gitlab.yml").read_text(encoding="utf-8"))

INSTALL = re.compile(r'python3 -m pip install "\$\{PACKAGE\}(?:\[(?P<extra>[a-z]+)\])?"')
EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")
GITLAB_KEYWORDS = {"variables", "stages"}
EASY = "[accuracy]\n[int8]\n[parity]\n[size]\nmax_bytes = 100_000_000\n"
IMPOSSIBLE = "[accuracy]\n[int8]\n[parity]\n[size]\nmax_bytes = 1\n"


@dataclass(frozen=True)
class Done:
    """How a script ended."""

    code: int
    text: str


@functools.cache
def junit() -> XMLSchema:
    """The schema of JUnit files. Not read at the top: every worker collects this file, and this takes a second."""
    from xmlschema import XMLSchema

    return XMLSchema(Path(__file__).with_name("junit.xsd"))


def bash(script: str, folder: Path, variables: Mapping[str, str]) -> Done:
    """Runs a script as both servers do: `bash -e -o pipefail` in the checked-out folder."""
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": paths, "CI": "true", **variables},
        capture_output=True,
        text=True,
        timeout=550,
    )
    return Done(done.returncode, done.stdout + done.stderr)


# ------------------------------------------------------------------ action.yml


def steps() -> list[dict[str, Any]]:
    return ACTION["runs"]["steps"]


def gate_step() -> dict[str, Any]:
    (step,) = [step for step in steps() if step.get("id") == "gate"]
    return step


def expressions(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from EXPRESSION.findall(value)
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from expressions(item)


def test_the_action_is_a_composite_one_with_what_github_asks_for() -> None:
    assert {"name", "description", "inputs", "outputs", "runs"} <= ACTION.keys()
    assert ACTION["runs"]["using"] == "composite"
    assert ACTION["inputs"].keys() == {"run", "policy", "references", "junit", "summary"}
    assert [name for name, entry in ACTION["inputs"].items() if entry.get("required")] == ["run"]
    for entry in [*ACTION["inputs"].values(), *ACTION["outputs"].values()]:
        assert entry["description"]
    assert all("default" in entry for entry in ACTION["inputs"].values() if not entry.get("required"))
    for step in steps():
        assert step["shell"] == "bash", "composite steps must name their shell"
        assert "uses" not in step, "nothing of others is run"


def test_every_input_is_used_and_every_name_used_is_declared() -> None:
    used = {text.removeprefix("inputs.") for text in expressions(steps()) if text.startswith("inputs.")}
    assert used == ACTION["inputs"].keys()
    assert all(text.startswith("inputs.") for text in expressions(steps()))
    for entry in ACTION["outputs"].values():
        (source,) = expressions(entry["value"])
        assert re.fullmatch(r"steps\.gate\.outputs\.(verdict|json)", source)
        assert f'echo "{source.rpartition(".")[2]}=$' in gate_step()["run"]


def test_no_input_can_become_a_part_of_a_script() -> None:
    assert not [text for step in steps() for text in expressions(step["run"])]
    assert gate_step()["env"].keys() == set(re.findall(r"NAYER_EDGE_\w+", gate_step()["run"]))


def test_only_the_package_itself_is_installed() -> None:
    (install,) = [step for step in steps() if step is not gate_step()]
    assert install["run"] == 'python3 -P -m pip install --quiet "$GITHUB_ACTION_PATH"'
    assert not re.search(r"curl|wget|https?:", gate_step()["run"])


def act(folder: Path, **inputs: str) -> tuple[Done, dict[str, str], str]:
    """Executes the gate's step with inputs as GitHub would hand them over; (end, outputs, step summary)."""
    values = {name: entry.get("default", "") for name, entry in ACTION["inputs"].items()} | inputs
    variables = {
        name: EXPRESSION.sub(lambda match: values[match[1].removeprefix("inputs.")], text)
        for name, text in gate_step()["env"].items()
    }
    (folder / "temp").mkdir(exist_ok=True)
    files = {name: folder / "temp" / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for path in files.values():
        path.write_text("")
    server = {"GITHUB_ACTIONS": "true", "RUNNER_TEMP": str(folder / "temp"), "GITHUB_ACTION_PATH": str(ROOT)}
    done = bash(
        gate_step()["run"], folder, {**server, **{name: str(path) for name, path in files.items()}, **variables}
    )
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return done, outputs, files["GITHUB_STEP_SUMMARY"].read_text()


def test_the_action_gives_the_verdict(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "easy policy.toml").write_text(EASY)
    done, outputs, summary = act(tmp_path, run="runs/digits", policy="easy policy.toml")
    assert done.code == 0, done.text
    assert outputs["verdict"] == "pass"
    assert json.loads(Path(outputs["json"]).read_text())["verdict"] == "pass"
    assert "nayer-edge gate: ✓ pass" in summary
    junit().validate(tmp_path / "nayer-edge-junit.xml")

    (tmp_path / "policy.toml").write_text(IMPOSSIBLE)
    # A module of the repository that is checked out does not read the verdict in the place of Python's own.
    (tmp_path / "json.py").write_text("def load(file): return {'verdict': 'pass'}\n")
    done, outputs, summary = act(tmp_path, run="runs/digits", policy="policy.toml", junit="a b.xml", summary="s.md")
    assert done.code == 1
    assert outputs["verdict"] == "fail"
    assert summary == ""
    assert "✗ fail" in (tmp_path / "s.md").read_text()
    assert "::error title=nayer-edge gate%3A size of int8.cpu (fail)::" in done.text
    junit().validate(tmp_path / "a b.xml")

    (finished / "export" / "student.int8.cpu.onnx").write_bytes(b"tampered")
    done, outputs, _ = act(tmp_path, run="runs/digits", policy="policy.toml")
    assert done.code == 4
    assert outputs == {}, "no verdict of an earlier step is handed out"


def test_the_action_compares_with_a_baseline(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "last")
    (tmp_path / "references.toml").write_text('[baseline]\nrun = "last"\n')
    (tmp_path / "policy.toml").write_text(EASY + "[baseline]\nmax_drop = 0.01\n")
    done, outputs, summary = act(tmp_path, run="runs/digits", policy="policy.toml", references="references.toml")
    assert done.code == 0, done.text
    assert outputs["verdict"] == "pass"
    assert "Accuracy drop vs baseline" in summary


@pytest.mark.parametrize("name", ["$(touch owned)", "`touch owned`", "x; touch owned", '"; touch owned; "', "--help"])
def test_hostile_inputs_are_only_names(tmp_path: Path, name: str) -> None:
    done, outputs, _ = act(tmp_path, run=name, policy=name, junit=name)
    assert not (tmp_path / "owned").exists()
    assert outputs == {}
    assert done.code == 2 or name == "--help"


# ------------------------------------------------------------------ pipelines/ci


@dataclass(frozen=True)
class Script:
    """One command of a pipeline's job."""

    job: str
    text: str


def github_scripts() -> list[Script]:
    jobs = GITHUB["jobs"].items()
    return [Script(name, step["run"]) for name, job in jobs for step in job["steps"] if "run" in step]


def gitlab_scripts() -> list[Script]:
    jobs = [(name, job) for name, job in GITLAB.items() if name not in GITLAB_KEYWORDS]
    return [Script(name, line) for name, job in jobs for line in job["script"]]


def test_both_pipelines_run_the_same_commands() -> None:
    """Distil or fetch, export, validate, verify, gate; only where the summary goes differs."""

    def commands(scripts: list[Script]) -> list[list[str]]:
        plain = [" ".join(script.text.replace("\\\n", " ").split()) for script in scripts]
        return [re.sub(r"--summary \S+", "--summary", text).split() for text in plain]

    assert commands(github_scripts()) == commands(gitlab_scripts())
    verbs = [words[1] for words in commands(gitlab_scripts()) if words[0] == "nayer-edge"]
    assert verbs == ["run", "export", "validate", "verify", "gate"]
    assert GITHUB["env"] == GITLAB["variables"]


def test_what_is_installed_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = [INSTALL.fullmatch(script.text) for script in github_scripts() if "pip" in script.text]
    assert [match["extra"] for match in found if match] == ["cpu", None]
    assert "cpu" in extras


def test_the_github_workflow_is_whole() -> None:
    assert GITHUB.keys() == {"name", True, "env", "jobs"}, "PyYAML reads the key `on` as True"
    for name, job in GITHUB["jobs"].items():
        assert job["runs-on"]
        assert set(job.get("needs", "make").split()) <= GITHUB["jobs"].keys()
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), name
            assert "${{" not in step.get("run", ""), "values come as variables"
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+(/(restore|save))?@v\d+", step["uses"])
    known = {"env.RUN", "github.run_id", "github.run_attempt", "hashFiles('**/*.toml')"}
    known |= {"steps.fetch.outputs.cache-primary-key"}
    assert set(expressions(GITHUB)) <= known
    names = [s["with"]["name"] for job in GITHUB["jobs"].values() for s in job["steps"] if "-artifact@" in str(s)]
    assert names == ["run", "run", "verdict"], "what one job uploads the other downloads"
    fetch, keep = [step for step in GITHUB["jobs"]["make"]["steps"] if "actions/cache" in step.get("uses", "")]
    assert (fetch["id"], keep["with"]["key"]) == ("fetch", "${{ steps.fetch.outputs.cache-primary-key }}")
    assert fetch["with"]["path"] == keep["with"]["path"]
    assert keep["if"] == "always()", "what was interrupted is kept, too"
    assert fetch["with"]["key"].startswith(fetch["with"]["restore-keys"])


def test_the_gitlab_pipeline_is_whole() -> None:
    for name, job in GITLAB.items():
        if name not in GITLAB_KEYWORDS:
            assert job["stage"] in GITLAB["stages"]
            assert set(job.get("needs", [])) <= GITLAB.keys()
    assert GITLAB["gate"]["artifacts"]["reports"]["junit"] in GITLAB["gate"]["script"][-1]


def tiny_recipe(folder: Path, settings: list[str]) -> str:
    """The digits recipe with a few settings changed, as a file of the user's."""
    shutil.copy(str(resources.files("nayer_edge.pipelines.recipes") / "digits.toml"), folder / "base.toml")
    lines = []
    for setting in settings:
        key, _, value = setting.partition("=")
        lines.append(f"{key} = {value if value[0].isdigit() else json.dumps(value)}")
    (folder / "tiny.toml").write_text('extends = "base"\nname = "digits"\n' + "\n".join(lines) + "\n")
    return "tiny.toml"


def run_pipeline(server: str, folder: Path, settings: list[str]) -> None:
    """Executes every command; of the installations it makes sure that they are what they should be."""
    scripts = github_scripts() if server == "github" else gitlab_scripts()
    (folder / "policy.toml").write_text(EASY)
    variables = {**GITLAB["variables"], "RECIPE": tiny_recipe(folder, settings), "POLICY": "policy.toml"}
    summary = folder / ("step-summary.md" if server == "github" else "summary.md")
    if server == "github":
        variables |= {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary), "RUNNER_TEMP": str(folder)}
    else:
        variables |= {"GITLAB_CI": "true", "CI_PROJECT_DIR": str(folder)}
    for script in scripts:
        if "pip" in script.text:
            assert INSTALL.fullmatch(script.text)
            continue
        done = bash(script.text, folder, variables)
        assert done.code == 0, f"{script.text}\n{done.text}"
    assert (folder / variables["RUN"] / "manifest.json").is_file()
    assert json.loads((folder / "verdict.json").read_text())["verdict"] == "pass"
    junit().validate(folder / "junit.xml")
    assert "nayer-edge gate: ✓ pass" in summary.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["github", "gitlab"])
def test_a_fetched_run(server: str, tiny_run: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    """The run is in the cache, finished: its steps are kept, and every command is executed.

    Both servers run the same commands: see test_both_pipelines_run_the_same_commands.
    """
    shutil.copytree(tiny_run, tmp_path / "runs" / "release")
    run_pipeline(server, tmp_path, tiny_settings)
    kept = json.loads((tmp_path / "runs" / "release" / "manifest.json").read_text())["steps"]
    before = json.loads((tiny_run / "manifest.json").read_text())["steps"]
    assert kept["student"] == before["student"], "nothing is distilled again"


@pytest.mark.slow
@pytest.mark.parametrize("server", ["github", "gitlab"])
def test_a_run_from_nothing(server: str, tiny_settings: list[str], tmp_path: Path) -> None:
    run_pipeline(server, tmp_path, tiny_settings)
