"""From a checkpoint to an artifact with exactly the commands of docs/YOUR_OWN_MODEL.md, on a small example."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nayer_edge.pipelines.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "YOUR_OWN_MODEL.md"
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def documents() -> ModuleType:
    """The module `test_readme.py`, which parses documents."""
    path = Path(__file__).with_name("test_readme.py")
    specification = importlib.util.spec_from_file_location("nayer_edge_documents", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


OURS = documents().OURS
README = [c.words for c in OURS if c.document == "README.md" and c.section == "Your own teacher"]
COMMANDS = [c.words for c in OURS if c.document == "docs/YOUR_OWN_MODEL.md"]
LONG = [words for words in COMMANDS if (words[1] == "run" and "mine.toml" in words) or "runs/mine" in words]
"""the commands of the real run"""


@pytest.fixture
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a briefly trained teacher of real digits, saved as a usual checkpoint.

    The trial measures no accuracy, so two epochs are enough for it.
    """
    from nayer_edge import train_teacher as teaching
    from nayer_edge.config import Augment, InputSpec, Teach
    from nayer_edge.data import datasets as data
    from nayer_edge.models.load import build_classifier
    from nayer_edge.runtime import compute
    from nayer_edge.training.evaluate import logits_of, top1

    epochs = 6 if request.node.get_closest_marker("slow") else 2
    spec = InputSpec(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))
    torch.manual_seed(0)
    network = build_classifier("nayer:resnet20", spec, CLASSES)
    settings = Teach(data="digits", epochs=epochs, batch=64, lr=0.1, augment=Augment(pad=1, flip=False))
    here = compute.choose("cpu", "fp32")
    teaching.teach(network, data.load("digits", "train", spec, CLASSES), settings, here, 0)
    held = data.load("digits", "holdout", spec, CLASSES)
    assert epochs == 2 or top1(logits_of(network, held.images, here), held.labels) > 0.9
    weights = {f"module.{name}": value for name, value in network.backbone.state_dict().items()}
    torch.save({"epoch": epochs, "state_dict": weights, "optimizer": {"state": {}}}, tmp_path / "teacher.pt")
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES) + "\n")
    return tmp_path


@pytest.fixture
def type_in(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[tuple[str, ...]], tuple[int, str]]]:
    """Runs a command in the teacher's folder: (exit code, output)."""
    monkeypatch.chdir(teacher)
    for name in ("NAYER_EDGE_DEBUG", "_TYPER_FORCE_DISABLE_TERMINAL"):
        monkeypatch.setenv(name, "")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def command(words: tuple[str, ...]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(words[1:]))
        shown = capfd.readouterr()
        return int(str(ended.value.code)), shown.out + shown.err

    yield command
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_page_covers_the_whole_pipeline() -> None:
    assert {words[1] for words in COMMANDS} >= {"doctor", "init", "lte", "run", "verify", "gate", "bench"}
    assert len(LONG) == 9
    assert len(README) == 3
    assert set(README) <= set(COMMANDS), "the README shows commands of this page"


@pytest.mark.slow
def test_the_commands_up_to_the_trial(type_in: Callable[[tuple[str, ...]], tuple[int, str]], teacher: Path) -> None:
    for words in COMMANDS:
        if words not in LONG:
            code, shown = type_in(words)
            assert code == 0, f"{' '.join(words)}\n{shown}"
    assert (teacher / "labels.png").read_bytes().startswith(b"\x89PNG")
    assert (teacher / "runs" / "trial" / "export" / "student.int8.cpu.onnx").is_file()
    report = json.loads((teacher / "runs" / "trial" / "validate" / "report.json").read_text())
    assert report["dataset"]["kind"] == "synthetic"


@pytest.mark.timeout(2400)
@pytest.mark.slow
def test_the_commands_of_the_real_run(type_in: Callable[[tuple[str, ...]], tuple[int, str]], teacher: Path) -> None:
    """From a checkpoint with other keys to a gated INT8 artifact."""
    for words in COMMANDS:
        if words[1] == "init":
            type_in((*words, "--force"))
        elif words in LONG:
            code, shown = type_in(words)
            assert code == 0, f"{' '.join(words)}\n{shown}"
    verdict = json.loads((teacher / "runs" / "mine" / "gate" / "verdict.json").read_text())
    assert verdict["verdict"] == "pass"
    report = json.loads((teacher / "runs" / "mine" / "validate" / "report.json").read_text())
    assert report["dataset"]["kind"] == "holdout"
    assert (teacher / "junit.xml").is_file()
