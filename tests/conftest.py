"""Shared by all tests: thread limits, a small run that is made once, and tiny text encoders."""

from __future__ import annotations

import argparse
import fcntl
import functools
import gc
import importlib.abc
import importlib.machinery
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from jaxtyping import _decorator, install_import_hook

# One thread here and in what tests start, whatever the machine's settings: workers share the cores, and sums are added
# in one order on every machine. Before torch is imported, which reads this once.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _keep_to_one_core(worker: str) -> None:
    """ONNX Runtime, OpenVINO and LiteRT start a thread for each core that they may use: in every worker, those of all
    would get into each other's way. What a worker starts keeps to its core, too."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _keep_to_one_core(os.environ["PYTEST_XDIST_WORKER"])

# `make test` draws the same examples every time; `--hypothesis-profile random` draws others, and says how to draw a
# failing one again.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", database=None, print_blob=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# In tests, the shape annotations of these modules are checked at run time. The hook ignores modules that do not exist.
SHAPED = ("batchnorm", "generator", "losses", "memory_bank", "synthesis",
          *(f"training.{name}" for name in ("augment", "cached_views", "evaluate", "optimizers")))  # fmt: skip
CORE = Path(__file__).resolve().parents[1] / "nayer_edge"
assert all((CORE / f"{module.replace('.', '/')}.py").is_file() for module in SHAPED), SHAPED
install_import_hook([f"nayer_edge.{module}" for module in SHAPED], "beartype.beartype")
# Else it would import JAX, which takes seconds in every worker, only to leave its own frames out of JAX's tracebacks.
_decorator._tb_flag = False


class _ShortMeasurements(importlib.abc.MetaPathFinder):
    """Shortens what times networks, as soon as it is imported: no test asserts what is fast, and one time of a step is
    as good as the median of five, except for a plan's accuracy."""

    BENCHMARK, STEP_COSTS = "nayer_edge.export.benchmark", "nayer_edge.pipelines.costs.step_costs"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del target
        if fullname not in (self.BENCHMARK, self.STEP_COSTS):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        loader = spec.loader
        assert isinstance(loader, importlib.machinery.SourceFileLoader)
        execute = loader.exec_module

        def shortened(module: ModuleType) -> None:
            execute(module)
            if fullname == self.BENCHMARK:
                # One turn of five calls, and as many more as fit.
                assert "max_seconds" in module.benchmark.__kwdefaults__
                module.benchmark.__kwdefaults__["max_seconds"] = 0.1
            else:
                assert "REPEATS" in vars(module)
                module.REPEATS = 1

        loader.exec_module = shortened  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _ShortMeasurements())

# A terminal of 80 columns without colours, whatever the CI server sets.
os.environ["COLUMNS"] = "80"
os.environ.pop("FORCE_COLOR", None)

# In float32, and with enough steps for the student to tell classes apart: its outputs then depend neither on the
# processor nor on chance, and are not one class everywhere. The teacher is right on 0.98 of the hold-out (three seeds);
# the recipe's WRN-16-2 takes five times as long.
TINY = (
    "precision=fp32",
    "teacher.model=nayer:wrn_10_1",
    "distill.epochs=3",
    "distill.warmup_epochs=1",
    "distill.steps=20",
    "distill.batch=32",
    "distill.holdout_rounds=1",
    "synthesis.batch=20",
    "synthesis.g_steps=3",
    "synthesis.warmup_rounds=2",
    "synthesis.reserve=0",
    "teach.epochs=2",
    "teach.batch=32",
    "export.calibration_images=20",
    "export.calibration_method=minmax",
    "export.sensitivity=false",
    "export.max_drop=1.0",
    "validate.synthetic_images=40",
)
"""the digits recipe, small enough to run in seconds; its student is not meant to be accurate"""


WORDS = ("a", "photo", "of", "cat", "dog", "sea", "bird", "日", "été")
"""vocabulary of the tiny text encoders"""

LONGEST = (
    "tests/test_python.py::test_the_page_runs",
    "tests/test_readme.py::test_the_commands_of_the_readme_run",
    "tests/test_packaging.py::test_the_wheel",
)
"""how the names of the longest tests begin; they come first, so that no worker is left alone with one at the end"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not read or write the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_settings() -> list[str]:
    """`--set` items that make the digits recipe run in seconds."""
    return list(TINY)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: a folder that `make` has filled, one for all workers. Read only."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        folder.mkdir(exist_ok=True)
        finished = folder / "finished"
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                make(folder)
                finished.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_run(once: Callable[[str, Callable[[Path], object]], Path]) -> Iterator[Path]:
    """A finished run of the tiny digits recipe. Read only: copy it before changing anything."""
    from nayer_edge.pipelines.recipes.loading import load_recipe
    from nayer_edge.pipelines.run import run_recipe
    from nayer_edge.storage.run_folder import RunFolder

    root = once("tiny-run", lambda folder: run_recipe(load_recipe("digits", list(TINY)), folder / "digits")) / "digits"
    yield root
    run = RunFolder.open(root)
    assert (run.problems(), run.unexpected_files()) == ([], []), "a test changed the run that all share"


@pytest.fixture
def sentence_encoder(once: Callable[[str, Callable[[Path], object]], Path], tmp_path: Path) -> Path:
    """A tiny BERT with random weights and a tokenizer of a few words."""
    return Path(shutil.copytree(once("sentence-encoder", _make_bert) / "bert", tmp_path / "bert"))


def _make_bert(parent: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = parent / "bert"
    folder.mkdir()
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), strip_accents=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=20,
    )
    BertModel(config).eval().save_pretrained(folder)


@pytest.fixture
def clip_encoder(once: Callable[[str, Callable[[Path], object]], Path], tmp_path: Path) -> Path:
    """A tiny CLIP text tower with random weights."""
    return Path(shutil.copytree(once("clip-encoder", _make_clip) / "clip", tmp_path / "clip"))


def _make_clip(parent: Path) -> None:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizerFast

    folder = parent / "clip"
    folder.mkdir()
    letters = [*"acdefghijklmnopqrstuvwxyzb"]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=24
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModelWithProjection(config).eval().save_pretrained(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow-part`."""
    parser.addoption(
        "--slow-part",
        metavar="K/N",
        type=_part,
        help="of the slow tests, which must be asked for with -m, the K-th of N parts; K counts on from any number, "
        "so that the number of a day takes them in turn",
    )


def _part(text: str) -> tuple[int, int]:
    """`9/4` → (1, 4)."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(parts) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not of the form K/N, for example 0/4")
    return int(number) % int(parts), int(parts)


def pytest_configure() -> None:
    """Until the tests begin, everything that is imported stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Takes what was imported out of garbage collection, which would visit it again and again and free none of it."""
    if "nayer_edge.export.to_onnx" in sys.modules:
        _read_torchlib_once()
    gc.collect()
    gc.freeze()
    gc.enable()


def _read_torchlib_once() -> None:
    """For every graph, torch's exporter parses the source of its 500 operators anew: a third of a small export."""
    from torch.onnx._internal.exporter import _registration

    registry = _registration.ONNXRegistry
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


def pytest_unconfigure() -> None:
    """Puts it back: at the interpreter's end, extensions report as leaked what is still frozen."""
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest tests first, chooses a part of the slow ones, gives each an hour, and skips GPU tests with the
    reason where there is no GPU."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    if config.option.slow_part:
        part, parts = config.option.slow_part
        slow = [item for item in items if item.get_closest_marker("slow")]
        # Those with a time limit of their own take minutes: at most one a part, if there are enough parts.
        long = [item for item in slow if item.get_closest_marker("timeout")]
        # Every N-th: neighbours take about as long as each other, files do not.
        chosen = [item for item in slow if item not in long][part::parts]
        chosen += [item for number, item in enumerate(long) if number * parts // len(long) == part]
        left = {item.nodeid for item in slow} - {item.nodeid for item in chosen}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left])
        items[:] = [item for item in items if item.nodeid not in left]
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
