"""A coverage-guided fuzzer (atheris) against every reader: `python -m tests.faults.fuzz light|torch FOLDER …`.

A reader must return a value or raise a nayer-edge error. Anything else, or more than a gigabyte or ten seconds, is a
crash, which libFuzzer reports and saves in the folder. The first byte of an input selects the reader.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .kit import ROOT, Kit, Tally


def fuzzed(kit: Kit, tries: int) -> Tally:
    """Fuzzes each group of readers, starting from the files of the finished run."""
    tally = Tally("mutated input, coverage-guided")
    notes = []
    for group, share in (("light", 0.75), ("torch", 0.25)):
        folder = kit.room()
        corpus = folder / "corpus"
        corpus.mkdir(parents=True)
        for number, content in enumerate(seeds(kit, group)):
            (corpus / f"seed{number}").write_bytes(content)
        runs = int(tries * share)
        command = [sys.executable, "-m", "tests.faults.fuzz", group, str(folder), str(corpus), f"-runs={runs}"]
        limits = [f"-seed={kit.seed % 2**31 + 1}", "-max_len=65536", "-timeout=10", "-rss_limit_mb=4096"]
        limits += ["-max_total_time=60", f"-artifact_prefix={folder}/", "-print_final_stats=1"]
        done = subprocess.run(
            [*command, *limits], cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=1800, check=False
        )
        found = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        executed = int(found[1]) if found else 0
        tally.tries += executed
        notes.append(f"{group} {executed}")
        if done.returncode or not executed:
            lines = [line for line in done.stderr.splitlines() if "INFO" not in line]
            tally.losses.append(f"{group}: " + " | ".join(lines[-25:]))
    tally.note = ", ".join(notes)
    return tally


def seeds(kit: Kit, group: str) -> list[bytes]:
    """Valid inputs, each after the byte that selects its reader."""
    run = kit.finished
    policy = b'artifacts = ["int8.cpu"]\n[accuracy]\nmax_drop_vs_fp32 = 0.01\n[latency]\nmax_p95_ms = 3.5\n'
    files = {
        "light": (
            kit.recipe.read_bytes(),
            policy,
            (run / "manifest.json").read_bytes(),
            (run / "validate" / "report.json").read_bytes(),
        ),
        "torch": (
            (run / "student" / "student.json").read_bytes(),
            (run / "lte.safetensors").read_bytes(),
            (run / "lte.safetensors").read_bytes(),
            (run / "lte.safetensors").read_bytes(),
        ),
    }[group]
    return [bytes([number]) + content for number, content in enumerate(files)]


def readers(group: str, folder: Path) -> list[Callable[[bytes], object]]:
    """The readers; each reads from a file in the folder, as the product does."""
    from nayer_edge.pipelines.measurements import Report
    from nayer_edge.pipelines.recipes.checking import parse_toml
    from nayer_edge.pipelines.recipes.policy import make_policy
    from nayer_edge.pipelines.recipes.settings import make_recipe
    from nayer_edge.pipelines.trust.verification import examine
    from nayer_edge.storage.files import read_json
    from nayer_edge.storage.run_folder import MANIFEST, RunFolder

    def written(content: bytes, name: str) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    def recipe(content: bytes) -> object:
        return make_recipe(parse_toml(written(content, "recipe.toml"), "a recipe"), "of the fuzzer")

    def policy(content: bytes) -> object:
        return make_policy(parse_toml(written(content, "policy.toml"), "a policy"), "of the fuzzer")

    def manifest(content: bytes) -> object:
        return examine(RunFolder.open(written(content, MANIFEST).parent))

    def report(content: bytes) -> object:
        from pydantic import ValidationError

        try:
            return Report.model_validate(read_json(written(content, "report.json"), "a report"))
        except ValidationError:
            return None

    if group == "light":
        return [recipe, policy, manifest, report]

    from nayer_edge.labels import embeddings as lte
    from nayer_edge.models.load import load_classifier, load_tensors

    (folder / "net.safetensors").write_bytes(b"")

    def card(content: bytes) -> object:
        written(content, "net.json")
        return load_classifier(folder / "net.safetensors")

    def embeddings(content: bytes) -> object:
        return lte.load(written(content, "lte.safetensors"))

    def weights(content: bytes) -> object:
        return load_tensors(written(content, "weights.safetensors"), "weights")

    def bank(content: bytes) -> object:
        import torch

        from nayer_edge.memory_bank import MemoryBank

        return MemoryBank.load(written(content, "bank.safetensors"), torch.device("cpu"))

    return [card, embeddings, weights, bank]


def main(group: str, folder: Path, arguments: list[str]) -> None:
    """Fuzzes until libFuzzer's limits are reached."""
    import atheris

    with atheris.instrument_imports(include=["nayer_edge"]):
        import nayer_edge.config
        import nayer_edge.pipelines.measurements
        import nayer_edge.pipelines.trust.verification
        import nayer_edge.storage.run_folder

        if group == "torch":
            import nayer_edge.labels.embeddings
            import nayer_edge.models.load  # noqa: F401
    from nayer_edge.errors import NayerEdgeError

    known = readers(group, folder)

    def one(data: bytes) -> None:
        if data:
            try:
                known[data[0] % len(known)](data[1:])
            except NayerEdgeError:
                return

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
