"""The documentation is correct: its commands exist and run, and its links resolve."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from nayer_edge.errors import EXIT_INTEGRITY, EXIT_INTERRUPTED, EXIT_TRAINING, EXIT_UNEXPECTED
from nayer_edge.pipelines.cli import app, main
from nayer_edge.pipelines.recipes.loading import load_recipe, shipped
from nayer_edge.storage.run_folder import MANIFEST

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MEASUREMENTS = ROOT / "docs" / "BENCHMARKS.md"
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [README, ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNABLE = {"gate", "verify", "validate", "report", "export", "bench", "calibration-data", "doctor", "recipes", "lte"}
"""commands that take seconds on a finished tiny run"""


def measurement(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


@pytest.mark.parametrize(
    ("name", "page"), [("digits", README), ("budget_table", README), ("cifar_table", MEASUREMENTS)]
)
def test_tables_come_from_committed_figures(name: str, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is in its document exactly as its command writes it."""
    benchmark = measurement(name, monkeypatch)
    if name == "digits":
        wanted = benchmark.table(json.loads((RESULTS / "digits.json").read_text()))
    elif name == "budget_table":
        wanted = benchmark.table(benchmark.read())
    else:
        wanted = benchmark.tables(benchmark.read(benchmark.RESULTS))
    assert f"{benchmark.BEGIN}\n{wanted}\n{benchmark.END}" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_every_result_is_documented_with_its_command(path: Path) -> None:
    text = MEASUREMENTS.read_text(encoding="utf-8")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert f"\n    {result['command']}\n" in text
    assert (
        f"`{result['name'].rpartition('-s')[0]}`"
        if path.parent.name == "cifar"
        else f"`benchmarks/results/{path.name}`"
    ) in text
    assert result.get("commit", "") in text


def test_every_measurement_is_listed() -> None:
    folder = ROOT / "benchmarks"
    listed = set(re.findall(r"`([\w/]+\.py)", (folder / "README.md").read_text(encoding="utf-8")))
    scripts = (path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.name != "__init__.py")
    assert listed == set(scripts)


@dataclass(frozen=True)
class Command:
    """One `$ …` line of a document."""

    document: str
    section: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.words)}"


def blocks(path: Path) -> Iterator[tuple[str, str, str]]:
    """(section, language, text) of every fenced block."""
    section, language, lines = "", None, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if language is None:
                language, lines = line.strip("` "), []
            else:
                yield section, language, "\n".join(lines)
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("#"):
            section = line.lstrip("# ")
    assert language is None, f"{path.name}: a block is not closed"


def commands() -> Iterator[Command]:
    for path in DOCUMENTS:
        for section, language, text in blocks(path):
            if language in ("console", "bash", "sh", "shell"):
                for line in text.replace("\\\n", " ").splitlines():
                    if line.startswith("$ "):
                        words = tuple(shlex.split(line[2:], comments=True))
                        yield Command(path.relative_to(ROOT).as_posix(), section, words)


COMMANDS = list(commands())
OURS = [command for command in COMMANDS if command.words[0] == "nayer-edge"]
OF_README = [command for command in OURS if command.document == "README.md"]


def parse(words: tuple[str, ...]) -> str:
    """The name of a command line's command, after checking its options and arguments."""
    command: Any = typer.main.get_command(app)
    rest, path = list(words), []
    while hasattr(command, "commands"):
        name = rest.pop(0)
        assert name in command.commands, f"there is no command '{name}'"
        command = command.commands[name]
        path.append(name)
    command.make_context(" ".join(path), rest)
    return path[0]


def test_the_readme_shows_commands() -> None:
    assert len(OF_README) >= 10
    assert {"gate", "validate", "run", "verify"} <= {command.words[1] for command in OF_README}


@pytest.mark.parametrize("command", OURS, ids=str)
def test_commands_parse(command: Command) -> None:
    if command.words[1:] in (("--help",), ("--version",)):
        return
    parse(command.words[1:])


def test_a_wrong_command_would_be_noticed() -> None:
    for line in ("gaet runs/digits", "gate runs/digits --polcy p.toml", "gate", "lte shwo digits"):
        with pytest.raises(Exception, match=r"no command|No such option|Missing"):
            parse(tuple(line.split()))


@pytest.mark.parametrize("command", OURS, ids=str)
def test_recipes_that_are_named_are_shipped(command: Command) -> None:
    if command.words[1] in ("run", "teach", "distill") or command.words[1:2] == ("lte",):
        position = 3 if command.words[1] == "lte" else 2
        name = command.words[position]
        assert name.endswith(".toml") or name.startswith("runs/") or name in {recipe.name for recipe in shipped()}


@pytest.fixture(scope="module")
def checkout(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in runs/digits that passes its gate."""
    folder = tmp_path_factory.mktemp("readme")
    root = shutil.copytree(tiny_run, folder / "runs" / "digits")
    values = json.loads((root / MANIFEST).read_text())
    values["recipe"]["gate"]["accuracy"].update(max_drop_vs_teacher=1.0, max_drop_vs_fp32=1.0)
    (root / MANIFEST).write_text(json.dumps(values))
    return folder


def test_the_commands_of_the_readme_run(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page."""
    monkeypatch.chdir(checkout)
    for name in ("NAYER_EDGE_DEBUG", "_TYPER_FORCE_DISABLE_TERMINAL"):
        monkeypatch.setenv(name, "")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ran = set()
    for command in OF_README:
        name = command.words[1]
        # The user's own teacher: see test_your_own_model.py.
        if name not in RUNNABLE or "trial.toml" in command.words:
            continue
        with pytest.raises(SystemExit) as ended:
            main(list(command.words[1:]))
        captured = capfd.readouterr()
        assert ended.value.code == 0, f"{command}\n{captured.out}\n{captured.err}"
        ran.add(name)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert {"gate", "verify", "validate", "report", "export"} <= ran


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        word for command in COMMANDS if command.words[0] == "make" for word in command.words[1:] if "=" not in word
    }
    assert {"quickstart", "test"} <= named
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    named |= set(re.findall(r"`make ([a-z][a-z-]*)", text))
    assert named <= targets


def test_make_help() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    shown = subprocess.run([make, "-s", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    for target in ("quickstart", "test", "check", "clean"):
        assert f"make {target} " in shown
    for target in ("quickstart", "test"):
        plan = subprocess.run([make, "-n", "-C", str(ROOT), target], capture_output=True, text=True, check=True).stdout
        assert {"quickstart": "nayer-edge quickstart", "test": "pytest"}[target] in plan


def test_the_first_screen_holds_the_two_commands() -> None:
    first = README.read_text(encoding="utf-8").splitlines()[:40]
    assert "$ make quickstart" in first
    assert "$ make test" in first


def anchors(path: Path) -> set[str]:
    found = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r' (?:src|srcset|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_the_example_recipe_is_one(tmp_path: Path) -> None:
    page = ROOT / "docs" / "YOUR_OWN_MODEL.md"
    examples = [text for _, language, text in blocks(page) if language == "toml" and "[student]" in text]
    assert examples
    for number, text in enumerate(examples):
        path = tmp_path / f"example{number}.toml"
        path.write_text(text, encoding="utf-8")
        recipe = load_recipe(str(path))
        assert recipe.teacher.weights == str(tmp_path / tomllib.loads(text)["teacher"]["weights"])


def test_exit_codes_are_those_of_the_errors() -> None:
    text = README.read_text(encoding="utf-8")
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert rows == {0, 1, 2, 3, EXIT_INTEGRITY, EXIT_TRAINING, EXIT_UNEXPECTED, EXIT_INTERRUPTED}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_placeholders_are_left(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"@@|\bTODO\b|\bTBD\b|\bFIXME\b|\bXXX\b", text)


def test_a_run_that_was_given_more_time_has_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"recipe": "photos", "student": "nayer:resnet8", "teacher_top1": 0.9, "student_top1": 0.8, "int8_top1": 0.8}
    rows = [{**row, "budget": "60m", "more": ""}, {**row, "budget": "30m", "more": "30m"}]
    table = measurement("budget_table", monkeypatch).table([{"hardware": {"instructions": []}, "rows": rows}])
    assert [line.split(" | ")[1:4] for line in table.splitlines()[2:]] == [
        ["30 min + 30 min", "AVX2", "1"],
        ["60 min", "AVX2", "1"],
    ]
