"""The short form of `make faults`: a few tries of each kind, in a separate process, without losses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Other ones belong to `make faults`, which draws a seed and prints it.
SEED = "--seed=0"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_lost() -> None:
    command = [sys.executable, "-m", "tests.faults", "--short", SEED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    found = re.fullmatch(r"(\d+) kinds of fault, (\d+) tries, (\d+) losses", last)
    assert found, done.stdout + done.stderr
    kinds, tries, losses = map(int, found.groups())
    assert losses == 0, done.stdout
    assert kinds >= 15
    assert tries >= kinds
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_lost_without_space_or_memory() -> None:
    command = [sys.executable, "-m", "tests.faults", "--short", SEED, "--tries", "1"]
    command += ["disk", "memory", "quota", "temporary"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.stdout.splitlines()[-1] == "4 kinds of fault, 4 tries, 0 losses", done.stdout + done.stderr


@pytest.mark.slow
def test_a_loss_is_counted_and_ends_with_exit_1() -> None:
    """Losses are counted: without hash checks, every altered byte is one."""
    program = (
        f"import sys; sys.argv = ['faults', '--short', '{SEED}', '--tries', '3', 'byte']\n"
        "from tests.faults import kit, tampering, __main__ as faults\n"
        "kit.Kit.prepare = lambda self, own_process: None\n"
        "tampering._accepted = lambda root, noted: 'it was accepted'\n"
        "sys.exit(faults.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "1 kinds of fault, 3 tries, 3 losses", done.stdout + done.stderr
    assert done.stdout.count("LOST") == 3
    assert done.returncode == 1
