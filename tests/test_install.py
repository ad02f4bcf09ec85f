"""`make install` with pip alone: two locks, and everything that can go wrong on a stranger's machine. No network."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "nayer-edge"
version = "0.1.0"
license = "Apache-2.0"
[tool.setuptools]
py-modules = []
"""
SITE = Path(".venv/lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
STAMP, STAMP_DEV = ".venv/.installed", ".venv/.installed-dev"

# `.ci/pip-alone` installs a part of the real lock every time.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")]


def make(tree: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), cwd=tree, env=environment(tree, **variables), capture_output=True, text=True, timeout=300
    )


def command(*words: str) -> list[str]:
    python = [] if any(word.startswith("PYTHON=") for word in words) else [f"PYTHON={sys.executable}"]
    return ["make", "UV=", *python, *words]


def environment(tree: Path, **variables: str) -> dict[str, str]:
    """Without the settings of whoever runs the tests; packages come from the tree's folder `wheels` alone."""
    theirs = ("MAKE", "MFLAGS", "PIP_", "PYTHON", "UV_", "VIRTUAL_ENV", "XDG_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "wheels"}
    return {**kept, "HOME": str(tree), **pip, **variables}


def pin(wheel: Path) -> str:
    name, version, *_ = wheel.name.split("-")
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def write_wheel(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    facts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    held = {**facts, **files}
    held[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*held, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in held.items():
            archive.writestr(zipfile.ZipInfo(file), content)  # dated 1980, so that the same content has the same hash
    return path


@pytest.fixture(scope="session")
def installed(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A tree with this Makefile and small locks, after `make install` and `make install-dev`."""
    return once("installed", lambda folder: install(folder / "tree")) / "tree"


def install(tree: Path) -> None:
    tree.mkdir()
    shutil.copy(ROOT / "Makefile", tree)
    (tree / "pyproject.toml").write_text(PROJECT)
    wheels = tree / "wheels"
    wheels.mkdir()
    builder = {
        file.as_posix(): Path(str(file.locate())).read_bytes()
        for file in metadata.files("setuptools") or []
        if ".." not in file.parts and file.suffix != ".pyc" and file.name not in ("RECORD", "INSTALLER", "REQUESTED")
    }
    setuptools = write_wheel(wheels, "setuptools", builder, metadata.version("setuptools"))
    base = pin(setuptools) + pin(write_wheel(wheels, "needed", {"needed.py": b""}))
    (tree / "requirements.lock").write_text(base)
    (tree / "requirements-dev.lock").write_text(base + pin(write_wheel(wheels, "tested", {"tested.py": b""})))

    done = make(tree, "install")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tree / STAMP).is_file()
    assert not (tree / STAMP_DEV).exists()
    assert imports(tree, "needed, setuptools")
    assert not imports(tree, "tested")
    done = make(tree, "install-dev")
    assert done.returncode == 0, done.stdout + done.stderr
    assert imports(tree, "tested")


def imports(tree: Path, names: str) -> bool:
    return (
        subprocess.run([tree / ".venv/bin/python", "-I", "-c", f"import {names}"], capture_output=True).returncode == 0
    )


@pytest.fixture
def tree(installed: Path, tmp_path: Path) -> Path:
    """A copy whose environment is whole and whose packages are not marked as installed."""
    copy = shutil.copytree(installed, tmp_path / "a folder", symlinks=True)
    (copy / STAMP).unlink()
    (copy / STAMP_DEV).unlink()
    (copy / ".venv/old").touch()
    return copy


def test_the_second_time_nothing_is_done(installed: Path) -> None:
    for target in ("install", "install-dev"):
        assert "Nothing to be done" in make(installed, target).stdout


def test_an_environment_of_ones_own_is_used(tree: Path) -> None:
    done = make(tree, "install-dev")
    assert done.returncode == 0, done.stderr
    assert (tree / ".venv/old").exists()
    assert (tree / STAMP_DEV).exists()


@pytest.mark.parametrize("wrong", ["missing", "altered"])
def test_a_package_that_cannot_be_had(tree: Path, wrong: str) -> None:
    lock = tree / "requirements-dev.lock"
    good = lock.read_text()
    if wrong == "missing":
        lock.write_text(good + f"absent==1.0 --hash=sha256:{'0' * 64}\n")
    else:
        (tree / SITE / "tested.py").unlink()
        shutil.rmtree(tree / SITE / "tested-1.0.dist-info")
        write_wheel(tree / "wheels", "tested", {"tested.py": b"altered = True"})
    done = make(tree, "install-dev")
    assert done.returncode == 2
    assert "Error 1" in done.stderr, "pip's exit code"
    assert {"missing": "absent==1.0", "altered": "DO NOT MATCH THE HASHES"}[wrong] in done.stderr
    assert "check the network" in done.stderr
    assert "Then type: make install-dev " in done.stderr
    assert f" PYTHON={sys.executable}" in done.stderr
    assert (tree / STAMP).exists()
    assert not (tree / STAMP_DEV).exists()
    if wrong == "altered":
        return

    lock.write_text(good)
    done = make(tree, "install-dev")
    assert done.returncode == 0, done.stderr
    assert (tree / STAMP_DEV).exists()
    assert (tree / ".venv/old").exists(), "what was there is kept"


def unfinish(tree: Path, damage: str) -> None:
    if damage == "python":
        (tree / ".venv/bin/python").unlink()
    elif damage == "pip":
        (held,) = (tree / SITE).glob("pip-*.dist-info")
        shutil.rmtree(held)
    else:  # killed while the tests' packages were being installed
        (tree / SITE / "tested-1.0.dist-info/INSTALLER").unlink()
        (tree / SITE / "tested.py").unlink()
        (tree / STAMP).touch()


@pytest.mark.parametrize("damage", ["python", "pip", "package"])
def test_an_environment_that_was_not_finished_is_removed(tree: Path, damage: str) -> None:
    """By a Python that creates nothing: what follows takes long, and is the same for all."""
    unfinish(tree, damage)
    other = tree / "python"
    other.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit 3\nexec "{sys.executable}" "$@"\n')
    other.chmod(0o755)
    done = make(tree, "install-dev", "PYTHON=./python")
    assert (done.returncode, "could not be created" in done.stderr) == (2, True), done.stderr
    assert "Creating a new one" in done.stdout
    assert not (tree / ".venv").exists()


def test_an_environment_that_was_not_finished_is_created_anew(tree: Path) -> None:
    unfinish(tree, "package")
    done = make(tree, "install-dev")
    assert done.returncode == 0, done.stderr
    assert "Creating a new one" in done.stdout
    assert not (tree / ".venv/old").exists()
    assert imports(tree, "pip, needed, tested")
    assert "Nothing to be done" in make(tree, "install-dev").stdout


def test_a_folder_that_is_no_environment_keeps_its_files(tree: Path) -> None:
    (tree / "mine").mkdir()
    (tree / "mine/notes.txt").write_text("kept")
    assert make(tree, "install", "VENV=mine").returncode == 0
    assert (tree / "mine/notes.txt").read_text() == "kept"


def test_a_place_where_no_environment_can_be(tree: Path) -> None:
    done = make(tree, "install", "VENV=Makefile/.venv")
    assert done.returncode == 2
    assert "Makefile/.venv could not be created" in done.stderr
    assert "Then type: make install" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_old_python(tree: Path) -> None:
    """It cannot make an environment, and is not needed where there is one."""
    old = tree / "python3.10"
    old.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.10.13; exit; fi\nshift\n'
        f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 10, 13); exec(sys.argv[1])" "$@"\n'
    )
    old.chmod(0o755)
    (tree / STAMP).unlink(missing_ok=True)
    done = make(tree, "install", "PYTHON=./python3.10")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tree / ".venv")
    done = make(tree, "quickstart", "PYTHON=./python3.10")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer, and ./python3.10 is Python 3.10.13" in done.stderr
    assert "Type: make PYTHON=python3.12 quickstart" in done.stderr
    assert not (tree / ".venv").exists()


def test_a_python_without_ensurepip(tree: Path) -> None:
    shutil.rmtree(tree / ".venv")
    (tree / "without").mkdir()
    (tree / "without/ensurepip.py").write_text("raise ModuleNotFoundError('No module named ensurepip')")
    done = make(tree, "install", PYTHONPATH=str(tree / "without"))
    assert done.returncode == 2
    assert "apt install python3-venv" in done.stderr
    assert not (tree / ".venv").exists()


@pytest.fixture
def silent_index() -> Iterator[socket.socket]:
    """An index that takes a question and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        yield server


@pytest.fixture
def children_take_sigint() -> Iterator[None]:
    """A suite that was started in the background ignores SIGINT, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("children_take_sigint")
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_ctrl_c(tree: Path, silent_index: socket.socket, shell: str) -> None:
    if not Path(shell).exists():
        pytest.skip(f"there is no {shell}")
    lock = tree / "requirements-dev.lock"
    good = lock.read_text()
    lock.write_text(good + f"absent==1.0 --hash=sha256:{'0' * 64}\n")
    index = f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple"
    variables = environment(tree, PIP_INDEX_URL=index, PIP_NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    del variables["PIP_NO_INDEX"]
    process = subprocess.Popen(
        command("install-dev", f"SHELL={shell}"),
        cwd=tree,
        env=variables,
        text=True,
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    with silent_index.accept()[0]:
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "The installation failed" not in said
    assert "Traceback" not in said
    assert not (tree / STAMP_DEV).exists()

    lock.write_text(good)
    assert make(tree, "install-dev").returncode == 0
