"""Shared by all tests: thread limits, a small run that is made once, and tiny text encoders."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from nayer_edge.runtime.provenance import usable_cores

# Workers, and their child processes, share the cores. Set before torch is imported, which reads it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    share = usable_cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, share))

# In tests, the shape annotations of these modules are checked at run time.
SHAPED = ("losses", "augment", "batchnorm", "generator", "memory_bank", "synthesis", "evaluate", "cached_views")
SHAPED_MODULES = [f"nayer_edge.{module}" for module in SHAPED]
# The hook ignores modules that do not exist.
assert all(map(find_spec, SHAPED_MODULES)), "a module with shape annotations was renamed"
install_import_hook(SHAPED_MODULES, "beartype.beartype")

# A terminal of 80 columns without colours, whatever the CI server sets.
os.environ["COLUMNS"] = "80"
os.environ.pop("FORCE_COLOR", None)

TINY = (
    "distill.epochs=3",
    "distill.warmup_epochs=1",
    "distill.steps=4",
    "distill.batch=32",
    "distill.holdout_rounds=1",
    "synthesis.batch=20",
    "synthesis.g_steps=3",
    "synthesis.warmup_rounds=2",
    "teach.epochs=2",
    "export.calibration_images=20",
    "export.calibration_method=minmax",
    "export.sensitivity=false",
)
"""the digits recipe, small enough to run in seconds; its student is not meant to be accurate"""


WORDS = ("a", "photo", "of", "cat", "dog", "sea", "bird", "日", "été")
"""vocabulary of the tiny text encoders"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not read or write the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny_settings() -> list[str]:
    """`--set` items that make the digits recipe run in seconds."""
    return list(TINY)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny digits recipe. Read only: copy it before changing anything."""
    from nayer_edge.pipelines.recipes.loading import load_recipe
    from nayer_edge.pipelines.run import run_recipe

    root = tmp_path_factory.mktemp("runs") / "digits"
    run_recipe(load_recipe("digits", list(TINY)), root)
    return root


@pytest.fixture
def sentence_encoder(tmp_path: Path) -> Path:
    """A tiny BERT with random weights and a tokenizer of a few words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "bert"
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
    return folder


@pytest.fixture
def clip_encoder(tmp_path: Path) -> Path:
    """A tiny CLIP text tower with random weights."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizerFast

    folder = tmp_path / "clip"
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
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives slow tests a timeout of an hour, and skips GPU tests if there is no GPU."""
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
