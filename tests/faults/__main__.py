"""Injects every kind of fault many times and prints the numbers of tries and losses; exits with 1 if there are losses.

python -m tests.faults              the full form (`make faults`)
python -m tests.faults --short      a few tries of each kind (part of `make test-slow`)
python -m tests.faults KIND …       some kinds only
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# One thread, set before any import: a forked child has only the thread that called fork.
os.environ.update(
    OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", ARROW_DEFAULT_MEMORY_POOL="system"
)
os.environ.pop("GITHUB_ACTIONS", None)

import torch

from nayer_edge.runtime.provenance import usable_cores

from . import fuzz, hostile, interruptions, lies, processes, resource_errors, tampering
from .kit import Kit, Tally

KINDS: dict[str, tuple[Callable[[Kit, int], Tally], int, int]] = {
    "killed": (interruptions.killed, 20, 0),
    "again": (interruptions.killed_again_and_again, 20, 1),
    "writing": (interruptions.killed_while_writing, 10, 1),
    "asked": (interruptions.asked_to_end, 10, 0),
    "clock": (interruptions.clock_jumps, 2, 0),
    "lock": (interruptions.two_at_once, 4, 1),
    "cache": (interruptions.one_cache, 20, 2),
    "disk": (resource_errors.full_disk, 10, 0),
    "quota": (resource_errors.file_size_limit, 6, 0),
    "temporary": (resource_errors.full_temporary_folder, 3, 0),
    "read-only": (resource_errors.read_only, 14, 2),
    "memory": (resource_errors.no_memory, 6, 0),
    "byte": (tampering.every_byte, 10**6, 200),
    "altered": (tampering.altered_folder, 60, 5),
    "signature": (tampering.signatures, 60, 4),
    "paths": (tampering.hostile_paths, 50, 4),
    "pickles": (hostile.pickles, 24, 3),
    "safetensors": (hostile.safetensors_files, 60, 4),
    "onnx": (hostile.onnx_files, 28, 2),
    "bombs": (hostile.bombs, 10, 2),
    "json": (hostile.mutated_json, 40, 1),
    "names": (hostile.class_names, 4, 0),
    "fuzz": (fuzz.fuzzed, 60_000, 0),
    "lies": (lies.lies, 9, 1),
    "healthy": (lies.healthy, 6, 0),
}
"""name → function, number of tries in the full form, and in the short form"""

BEGINS, ENDS = "<!-- faults -->", "<!-- /faults -->"
"""markers around the table in docs/SECURITY.md"""


def main() -> int:
    """Runs the requested kinds; returns 1 if there are losses."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults, tried and counted.")
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="some kinds only")
    parser.add_argument("--short", action="store_true", help="a few tries of each kind")
    parser.add_argument(
        "--seed", type=int, default=None, help="of every random choice; printed, so that it can be given"
    )
    parser.add_argument("--tries", type=int, default=None, help="of each kind, instead of its own number")
    parser.add_argument("--write", type=Path, default=None, help="put the table into this document, between its marks")
    given = parser.parse_args()
    seed = secrets.randbelow(2**31) if given.seed is None else given.seed
    torch.set_num_threads(1)
    began = time.monotonic()
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="nayer-edge-faults-") as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        kit = Kit(Path(folder), seed)
        kit.prepare(own_process=not given.short)
        print(f"{'kind':<62} | {'tries':>6} | {'losses':>6} | seconds", flush=True)
        print(f"{'-' * 62} | {'-' * 6} | {'-' * 6} | -------", flush=True)
        wanted = {
            name: given.tries or (short if given.short else full)
            for name, (_, full, short) in KINDS.items()
            if name in (given.kinds or KINDS)
        }
        tallies = []
        for tally, seconds in _tried(kit, {name: tries for name, tries in wanted.items() if tries}):
            tallies.append(tally)
            shown = f"{tally.kind} ({tally.note})" if tally.note else tally.kind
            print(f"{shown:<62} | {tally.tries:>6} | {len(tally.losses):>6} | {seconds:7.1f}", flush=True)
            for loss in tally.losses:
                print(f"  LOST {loss}", flush=True)
    tries, losses = (sum(t.tries for t in tallies), sum(len(t.losses) for t in tallies))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(usage.ru_utime + usage.ru_stime for usage in used)
    print(f"{time.monotonic() - began:.0f} seconds, {processor:.0f} of a processor's; seed {seed}")
    if given.write:
        _write(given.write, tallies)
    print(f"{len(tallies)} kinds of fault, {tries} tries, {losses} losses")
    return 1 if losses else 0


def _tried(kit: Kit, wanted: dict[str, int]) -> Iterator[tuple[Tally, float]]:
    """Runs each kind in its own process, as many at a time as there are cores; yields tallies and seconds."""
    waiting, working = list(wanted), {}
    while waiting or working:
        while waiting and len(working) < usable_cores():
            name = waiting.pop(0)
            working[processes.begin(lambda name=name: _try(kit, name, wanted[name]), quiet=False)] = name
        child, status = os.waitpid(-1, 0)
        name = working.pop(child)
        found = kit.folder / f"{name}.tally.json"
        if found.is_file():
            values = json.loads(found.read_text())
            seconds = values.pop("seconds")
            yield Tally(**values), seconds
        else:
            yield (
                Tally(
                    name, 1, name=name, losses=[f"the try itself ended with exit {os.waitstatus_to_exitcode(status)}"]
                ),
                0.0,
            )


def _write(document: Path, tallies: list[Tally]) -> None:
    """Replaces the text between the markers by the table."""
    order = {name: place for place, name in enumerate(KINDS)}
    rows = [f"| {t.kind} | {t.tries:,} | {len(t.losses)} |" for t in sorted(tallies, key=lambda t: order[t.name])]
    tries, losses = (sum(t.tries for t in tallies), sum(len(t.losses) for t in tallies))
    total = f"| **{len(tallies)} kinds** | **{tries:,}** | **{losses}** |"
    table = "\n".join(["| kind of fault | tries | losses |", "|---|--:|--:|", *rows, total])
    head, _, rest = document.read_text(encoding="utf-8").partition(BEGINS)
    _, _, tail = rest.partition(ENDS)
    document.write_text(f"{head}{BEGINS}\n{table}\n{ENDS}{tail}", encoding="utf-8")


def _try(kit: Kit, name: str, tries: int) -> None:
    """Runs one kind in its own process, and writes its tally."""
    kit.kind = name
    began = time.monotonic()
    tally = KINDS[name][0](kit, tries)
    tally.name = name
    values = {**vars(tally), "seconds": time.monotonic() - began}
    (kit.folder / f"{name}.tally.json").write_text(json.dumps(values))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Exit at once: at Python's normal exit, extensions would print their own leak reports after the last line.
    os._exit(code)
