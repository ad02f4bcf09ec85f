"""Packaging: the wheel's exact files, the base install outside the checkout, pins and extras."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {"nayer_edge": "nayer_edge", "export": "nayer_edge/export", "pipelines": "nayer_edge/pipelines"}
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc")


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="session")
def wheel(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The wheel, built from a copy of the tree, without network access."""
    (found,) = (once("wheel", lambda folder: build_wheel(folder / "tree")) / "tree" / "dist").iterdir()
    return found


def build_wheel(tree: Path) -> None:
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=JUNK)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def base(once: Callable[[str, Callable[[Path], object]], Path], wheel: Path) -> Path:
    """An environment with only the wheel and the requirements of its base install."""
    return once("base", lambda folder: install_base(folder / "venv", wheel)) / "venv" / "bin" / "python"


def install_base(folder: Path, wheel: Path) -> None:
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    for name in requirements("nayer-edge"):
        for file in metadata.files(name) or []:
            source = Path(str(file.locate()))
            if ".." not in file.parts and file.suffix != ".pyc" and source.is_file():
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, site / file)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


def requirements(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The transitive requirements of a distribution without extras."""
    found: set[str] = set()
    for line in metadata.requires(name) or []:
        needed = re.match(r"[A-Za-z0-9._-]+", line)
        marker = line.partition(";")[2]
        if needed is None or "extra" in marker or "sys_platform" in marker or "platform_system" in marker:
            continue
        try:
            metadata.version(needed[0])
        except metadata.PackageNotFoundError:
            continue
        if needed[0] not in seen | found:
            found |= {needed[0]} | requirements(needed[0], seen | found | {needed[0]})
    return found


def expected_files() -> set[str]:
    """All Python files in the three folders, and the package data listed in pyproject.toml."""
    found = set()
    for folder, name in FOLDERS.items():
        found |= {f"{name}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    for package, patterns in SETUPTOOLS["package-data"].items():
        source = package_folder(package)
        for path in (path for pattern in patterns for path in source.glob(pattern)):
            found.add(f"{package.replace('.', '/')}/{path.relative_to(source).as_posix()}")
    return found


def package_folder(package: str) -> Path:
    for name, folder in sorted(SETUPTOOLS["package-dir"].items(), key=lambda entry: -len(entry[0])):
        if package == name or package.startswith(name + "."):
            return ROOT / folder / package[len(name) :].lstrip(".").replace(".", "/")
    raise AssertionError(package)


def test_the_wheel_holds_exactly_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert archive.testzip() is None
    assert names == expected_files()


def test_package_data_is_complete(wheel: Path) -> None:
    """All non-Python files in the packages are shipped, except examples to copy from a checkout."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc" and path.parent != ROOT / "pipelines" / "ci":
                assert f"{name}/{path.relative_to(ROOT / folder).as_posix()}" in names, path


def test_the_wheels_metadata(wheel: Path) -> None:
    assert wheel.name == f"nayer_edge-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "licenses/LICENSE" in held
        facts = archive.read(held["METADATA"]).decode()
        assert "Requires-Python: >=3.11" in facts
        assert "License-Expression: Apache-2.0" in facts
        assert "nayer-edge = nayer_edge.__main__:main" in archive.read(held["entry_points.txt"]).decode()
        assert str(ROOT).encode() not in b"".join(archive.read(name) for name in archive.namelist())


def outside(base: Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return run(base, "-I", "-m", "nayer_edge", *arguments, cwd=cwd, env=environment)


@pytest.mark.slow
def test_the_base_install_outside_the_checkout(base: Path, tiny_run: Path, tmp_path: Path) -> None:
    done = run(base, "-I", "-c", "import nayer_edge; print(nayer_edge.__file__)", cwd=tmp_path)
    assert done.stdout.startswith(str(base.parents[1])), done.stderr
    for heavy in ("torch", "numpy", "onnx", "jinja2"):
        assert run(base, "-I", "-c", f"import {heavy}", cwd=tmp_path).returncode == 1, heavy

    done = outside(base, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "quickstart" in done.stdout
    done = outside(base, "--version", cwd=tmp_path)
    assert done.stdout == f"{VERSION}\n"
    done = outside(base, "recipes", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shipped = {path.stem for path in (ROOT / "pipelines" / "recipes").rglob("[!_]*.toml")}
    assert {recipe["name"] for recipe in json.loads(done.stdout)} == shipped

    root = shutil.copytree(tiny_run, tmp_path / "run")
    done = outside(base, "gate", root, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "gate: fail" in done.stdout
    (tmp_path / "policy.toml").write_text("[accuracy]\nmax_drop_vs_fp32 = 1.0\n")
    done = outside(base, "gate", root, "--policy", "policy.toml", "--junit", "j.xml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "j.xml").is_file()
    assert outside(base, "verify", root, cwd=tmp_path).returncode == 0
    assert outside(base, "doctor", cwd=tmp_path).returncode == 0
    done = outside(base, "quickstart", cwd=tmp_path)
    assert done.returncode == 3
    assert "pip install '.[cpu]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_schemas_are_read_from_the_wheel(base: Path, tmp_path: Path) -> None:
    program = "from nayer_edge.pipelines.schemas import load; print(load('report')['$id'])"
    assert run(base, "-I", "-c", program, cwd=tmp_path).stdout == "nayer-edge/report/1\n"


# Pins and extras


def test_packages_are_the_folders() -> None:
    found = set()
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            relative = path.parent.relative_to(ROOT / folder).as_posix()
            found.add(name.replace("/", ".") + ("" if relative == "." else "." + relative.replace("/", ".")))
    assert set(SETUPTOOLS["packages"]) == found


EXTRAS = {
    "requirements.lock": ("cpu",),
    "requirements-dev.lock": ("cpu", "rtx", "lm", "timm", "sign", "sbom", "tracking", "ray", "dev"),
}
"""what each lock is made for; both hold the base install and the build's needs"""


def lines_of(name: str) -> list[str]:
    """The lines of a requirements file, continued ones joined, without comments."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def lock_entries(lock: str) -> dict[str, frozenset[str]]:
    """The hashes of every pin."""
    lines = lines_of(lock)
    pins = {line.partition("--hash")[0].strip(): frozenset(re.findall(r"--hash=(\S+)", line)) for line in lines}
    assert len(pins) == len(lines), "one line each"
    return pins


def needs(lock: str) -> list[Requirement]:
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in EXTRAS[lock]:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_pins_with_hashes_and_names_no_index(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert not re.search(r"://|index|find-links|trusted-host|\bfile:|@ ", text)
    entries = lock_entries(lock)
    assert len(entries) > 50
    for entry, hashes in entries.items():
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*==[^\s;]+( ;[^;]*)?", entry), entry
        assert hashes, entry
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), entry


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_covers_what_pyproject_asks_for(lock: str) -> None:
    locked = {entry.partition("==")[0] for entry in lock_entries(lock)}
    assert {canonicalize_name(need.name) for need in needs(lock)} <= locked


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_is_complete_and_holds_nothing_else(lock: str) -> None:
    """The locks are installed without looking at dependencies, so a missing one would show only when it is imported."""
    pins = {pin.name: pin for pin in map(Requirement, lock_entries(lock)) if not pin.marker or pin.marker.evaluate()}
    for name, pin in pins.items():
        if metadata.version(name) not in pin.specifier:
            pytest.skip(f"{name} {metadata.version(name)} is installed here, and the lock has {pin}")
    overrides = [Requirement(line) for line in lines_of("requirements.overrides")]
    left_out = {canonicalize_name(each.name) for each in overrides if each.marker and not each.marker.evaluate()}
    found: set[tuple[str, str]] = set()
    todo = needs(lock)
    while todo:
        need = todo.pop()
        if canonicalize_name(need.name) in left_out:
            continue
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(need.name)
        for extra in {"", *need.extras} - {extra for known, extra in found if known == name}:
            found.add((name, extra))
            for line in metadata.requires(name) or []:
                dependency = Requirement(line)
                if not dependency.marker or dependency.marker.evaluate({"extra": extra}):
                    dependency.marker = None
                    todo.append(dependency)
    assert {name for name, _ in found} == set(pins)


def test_the_lock_of_the_quickstart_is_a_part_of_the_other() -> None:
    base, dev = ({entry.partition(" ;")[0]: hashes for entry, hashes in lock_entries(lock).items()} for lock in EXTRAS)
    assert base.items() < dev.items()


def test_the_makefile_resolves_what_the_locks_are_made_for() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    for lock, extras in EXTRAS.items():
        (line,) = [line for line in text.splitlines() if f"--output-file {lock}" in line]
        assert tuple(re.findall(r"--extra (\S+)", line)) == extras


def normalised(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def test_cpu_and_gpu_differ_only_where_they_must() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    cpu, gpu = set(extras["cpu"]), set(extras["gpu"])
    assert {normalised(line) for line in cpu - gpu} == {"onnxruntime"}
    assert {normalised(line) for line in gpu - cpu} == {"onnxruntime-gpu", "tensorrt"}
    assert PROJECT["tool"]["uv"]["conflicts"] == [[{"extra": "cpu"}, {"extra": "gpu"}]]


def test_extras_are_those_that_errors_and_documents_name() -> None:
    from nayer_edge.errors import EXTRA_OF

    extras = set(PROJECT["project"]["optional-dependencies"])
    assert {"cpu", "gpu", "rtx", "lm", "timm", "sign", "sbom", "tracking", "dev"} <= extras
    assert set(EXTRA_OF.values()) <= extras
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *sorted(ROOT.glob("[nep]*/**/*.py"))]:
        for name in re.findall(r"\.\[([a-z,]+)\]", path.read_text(encoding="utf-8")):
            assert set(name.split(",")) <= extras, (path, name)


def test_the_base_install_is_light() -> None:
    assert {normalised(line) for line in PROJECT["project"]["dependencies"]} == {"typer", "rich", "pydantic", "tomli-w"}


def ignored(name: str) -> bool:
    lines = [line.strip() for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    return any(fnmatch.fnmatch(name, line.strip("/")) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", ["uv.lock", ".venv", "runs", "build", "dist", "x.egg-info", "__pycache__"])
def test_what_git_ignores(name: str) -> None:
    assert ignored(name)
    assert not any(ignored(lock) for lock in EXTRAS)


def test_the_version_is_one() -> None:
    import nayer_edge

    assert nayer_edge.__version__ == VERSION == metadata.version("nayer-edge")
