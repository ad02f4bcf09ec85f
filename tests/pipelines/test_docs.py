"""What the documents repeat of the code is what the code says."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nayer_edge.data import datasets as data
from nayer_edge.export.to_int8 import run_onnx
from nayer_edge.pipelines.recipes.checking import known_keys
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.recipes.policy import Policy
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.schemas import reference
from nayer_edge.pipelines.steps import table
from nayer_edge.pipelines.validation.runnable import graphs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("document", ["README.md", "docs/ARCHITECTURE.md"])
def test_the_step_table_is_current(document: str) -> None:
    assert table() in (ROOT / document).read_text(encoding="utf-8")


PAGE = (ROOT / "docs" / "REFERENCE.md").read_text(encoding="utf-8")


def test_the_reference_is_current() -> None:
    assert reference.page() == PAGE, "type: make schemas"


def test_the_reference_names_every_key_and_says_what_it_is() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    assert all(len(row) == 4 and len(row[3].strip(" |")) > 2 for row in rows)
    for section in re.findall(r"^#+ `\[(.+)\]`$", PAGE, re.MULTILINE):
        assert known_keys(Recipe, tuple(section.split("."))), section
    sections = {section for section in known_keys(Recipe) if known_keys(Recipe, (section,))}
    assert sections == set(re.findall(r"^## `\[(.+)\]`$", PAGE, re.MULTILINE))
    nested = {f"gate.{name}" for name in known_keys(Policy) if known_keys(Policy, (name,))}
    assert nested <= set(re.findall(r"^### `\[(.+)\]`$", PAGE, re.MULTILINE))


def test_the_reference_shows_the_limits_that_hold_without_a_word() -> None:
    policy = Policy()
    limit = policy.accuracy.max_drop_vs_teacher
    assert limit is not None
    assert f"| `max_drop_vs_teacher` | `{limit}` |" in PAGE
    assert policy.int8.min_coverage is None
    assert "| `min_coverage` |  |" in PAGE


def test_the_example_of_using_the_onnx_file_runs(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    example: Callable[[str], str],
) -> None:
    code = example("The ONNX file")
    shutil.copytree(tiny_run, tmp_path / "runs" / "digits")
    digits = data.load("digits", "holdout", load_recipe("digits").teacher.input, load_recipe("digits").teacher.classes)
    file = tmp_path / "runs" / "digits" / "export" / "student.int8.cpu.onnx"
    wanted = run_onnx(file, digits.images[:5].numpy().astype(np.float32) / 255).argmax(axis=1)
    monkeypatch.chdir(tmp_path)
    for image, label in zip(digits.images, wanted, strict=False):
        Image.fromarray(image[0].numpy()).save("picture.png")
        exec(compile(code, "DEPLOYING.md", "exec"), {})
        assert capsys.readouterr().out.strip() == load_recipe("digits").teacher.classes[label]


def files_on_the_map(text: str) -> Iterator[str]:
    """The paths of the tree in docs/ARCHITECTURE.md: one name a line, two spaces of indentation for each folder."""
    for block in re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        folders: list[str] = []
        for line in block.splitlines():
            name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
            del folders[depth:]
            if name.endswith("/"):
                folders.append(name)
            else:
                yield "".join(folders) + name


def holds_code(path: Path) -> bool:
    """Whether there is more in a module than its docstring."""
    return any(not isinstance(part, ast.Expr) for part in ast.parse(path.read_text(encoding="utf-8")).body)


def test_the_map_of_the_code_names_every_module() -> None:
    named = list(files_on_the_map((ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")))
    assert len(named) == len(set(named))
    modules = [path for folder in ("nayer_edge", "export", "pipelines") for path in (ROOT / folder).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in modules if holds_code(path)} == set(named)


def test_the_paper_map_names_what_exists() -> None:
    text = (ROOT / "docs" / "PAPER_MAP.md").read_text(encoding="utf-8")
    rows = re.findall(r"`(nayer_edge/[\w/]+\.py): (\w+)`", text)
    assert len(rows) > 10
    for file, name in rows:
        module = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {part.name for part in module.body if isinstance(part, ast.ClassDef | ast.FunctionDef)}
        assert name in defined, f"{file}: {name}"


def test_artifacts_have_the_names_that_are_listed() -> None:
    text = (ROOT / "docs" / "DEPLOYING.md").read_text(encoding="utf-8")
    for candidate in graphs(load_recipe("digits")):
        assert f"`{candidate.name}`" in text
        graph_of_an_engine = candidate.name == "fp16" or candidate.name.startswith("int8.tensorrt")
        assert graph_of_an_engine or f"`{Path(candidate.file).name}`" in text
    for target in ("tensorrt", "tensorrt-rtx"):
        assert all(f"`{precision}.{target}.engine`" in text for precision in ("fp16", "int8"))
