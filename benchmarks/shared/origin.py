"""Where a figure comes from: hardware, versions, commit and command, as every committed result states them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from nayer_edge.runtime import provenance


def origin() -> dict[str, Any]:
    """Of the program that is running."""
    return {
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "commit": commit(),
        "command": command(f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]),
    }


def commit() -> str:
    """The commit that is checked out, "+" where files differ from it."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()


def command(*words: str) -> str:
    """A Python command line that works elsewhere too: the folder of the data goes by its variable's name."""
    line = shlex.join(["python", *words])
    folder = os.environ.get("NAYER_EDGE_DATA")
    return line.replace(folder.rstrip("/"), "$NAYER_EDGE_DATA") if folder else line
