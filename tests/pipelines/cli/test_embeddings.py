"""`lte build` and `lte show`: any labels, any encoder, a picture, and no language model the second time."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nayer_edge.config import LTE
from nayer_edge.errors import UsageError
from nayer_edge.labels import embeddings as lte
from nayer_edge.labels.embeddings import LabelEmbeddings
from nayer_edge.pipelines.recipes.loading import load_recipe
from nayer_edge.pipelines.report.similarity import heat_map, neighbours
from nayer_edge.pipelines.run import run_recipe

Invoke = Callable[..., Any]
WORDS = "cat\ndog, hound\nsea_bird\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text(WORDS, encoding="utf-8")
    return tmp_path


def test_labels_and_encoder_without_a_recipe(here: Path, invoke: Invoke, sentence_encoder: Path) -> None:
    told = ["--labels", "labels.txt", "--encoder", str(sentence_encoder), "--prompt", "a photo of a {label}"]
    answer = invoke("lte", "build", *told, "--out", "mine.safetensors", "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert (facts["classes"], facts["dimensions"], facts["prompt"]) == (3, 16, ["a photo of a {label}"])
    made = lte.build(("cat", "dog, hound", "sea_bird"), LTE(encoder=str(sentence_encoder)))
    assert facts["digest"] == made.digest
    assert torch.equal(lte.load(here / "mine.safetensors").embeddings, made.embeddings)
    answer = invoke("lte", "show", "--encoder", "mine.safetensors", "--json")
    assert [row["label"] for row in json.loads(answer.out)["labels"]] == ["cat", "dog, hound", "sea_bird"]


def test_the_second_build_takes_no_language_model(
    here: Path, invoke: Invoke, sentence_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["lte", "build", "--labels", "labels.txt", "--encoder", str(sentence_encoder), "--json"]
    told += ["--prompt", "a {label}", "--prompt", "the {label} here"]
    first = invoke(*told)
    assert first.code == 0, first.err
    for name in ("transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    again = invoke(*told)
    assert (again.code, again.err) == (0, "")
    assert json.loads(again.out) == json.loads(first.out)
    (here / "labels.txt").write_text(WORDS + "one more\n")
    answer = invoke(*told)
    assert answer.code == 3, "new labels need it"
    assert "pip install '.[cpu]'" in answer.err


def test_what_is_typed_counts_more_than_the_recipe(here: Path, invoke: Invoke) -> None:
    answer = invoke("lte", "show", "digits", "--encoder", "onehot", "--json")
    facts = json.loads(answer.out)
    assert (facts["encoder"], facts["classes"], facts["mean_cosine"]) == ("onehot", 10, 0.0)
    answer = invoke("lte", "show", "digits", "--labels", "labels.txt", "--encoder", "random", "--json")
    assert json.loads(answer.out)["classes"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either a recipe nor a file of class names"),
        (["--set", "lte.encoder=onehot"], "no recipe is given"),
        (["digits", "--prompt", "no label"], "must contain {label}"),
        (["digits", "--synonyms", "second"], "synonyms"),
        (["--labels", "absent.txt"], "no file of class names"),
        (["--labels", "labels.txt", "--encoder", "absent.npy"], "no embedding file"),
    ],
)
def test_wrong_usage(here: Path, invoke: Invoke, arguments: list[str], words: str) -> None:
    answer = invoke("lte", "show", *arguments)
    assert answer.code == 2
    assert words in " ".join(answer.err.split())


def test_files_that_it_will_not_write(here: Path, invoke: Invoke) -> None:
    assert invoke("lte", "build", "digits", "--out", "e.npy").code == 2
    assert invoke("lte", "show", "digits", "--picture", "e.jpg").code == 2
    (here / "run").mkdir()
    (here / "run" / "manifest.json").write_text("{}")
    answer = invoke("lte", "show", "digits", "--picture", "run/e.png")
    assert (answer.code, "lies inside the run folder" in answer.err) == (2, True), answer.err
    assert not list(here.glob("e.*"))


def test_a_table_of_80_columns(here: Path, invoke: Invoke) -> None:
    labels = ["a label that is much longer than a column can ever be, \x1b[2J", *(f"class {n}" for n in range(999))]
    (here / "many.json").write_text(json.dumps(labels))
    answer = invoke("lte", "show", "--labels", "many.json", "--encoder", "random")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 60, "the closest of a thousand, not all"
    assert "\x1b" not in answer.out
    cosines = [float(line.split()[-2]) for line in lines if line.endswith("█")]
    assert cosines == sorted(cosines, reverse=True)


# ------------------------------------------------------------------ picture


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("classes", [2, 10, 61, 1000])
def test_the_picture_of_any_labels(tmp_path: Path, classes: int) -> None:
    values = torch.eye(classes)
    labels = tuple("$x_2$" if n == 0 else f"猫 {n}" if n % 2 else f"class {n}" for n in range(classes))
    values[-1] = values[0] + 0.1
    apart = LabelEmbeddings(torch.eye(classes), "onehot", "1", "{label}", labels)
    near = LabelEmbeddings(values, "onehot", "1", "{label}", labels)
    for name, made in (("apart", apart), ("near", near), ("again", near)):
        heat_map(made, tmp_path / f"{name}.png")
        heat_map(made, tmp_path / f"{name}.svg")
    for suffix in ("png", "svg"):
        files = [(tmp_path / f"{name}.{suffix}").read_bytes() for name in ("apart", "near", "again")]
        assert files[1] == files[2], "equal embeddings, equal bytes"
        assert files[0] != files[1]
    assert pixels(tmp_path / "near.png").shape[0] >= 400
    text = (tmp_path / "near.svg").read_text(encoding="utf-8")
    assert "cosine similarity" in text
    assert f"{classes} classes" in text
    assert re.search(r">猫 \d*[13579]<", text)
    assert ">$x_2$<" in text


def test_the_closest_pair_is_the_fullest(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    found = LabelEmbeddings(values, "e", "1", "{label}", tuple("abcd"))
    heat_map(found, tmp_path / "map.png")
    heat_map(found, tmp_path / "map.svg")
    data = re.search(r"base64,([^\"]+)", (tmp_path / "map.svg").read_text(encoding="utf-8"))
    assert data
    with Image.open(io.BytesIO(base64.b64decode(data[1]))) as image:
        cells = np.asarray(image.convert("RGB")).astype(int)
    assert cells.shape == (4, 4, 3)
    assert (cells[0, 1] == cells[1, 0]).all()
    assert (cells[0, 1] == (43, 95, 199)).all()
    assert cells[2, 3, 0] in range(44, 255), "the second closest"
    assert (np.diagonal(cells) == 255).all()
    drawn = pixels(tmp_path / "map.png")
    middle = drawn[round(drawn.shape[0] * 0.3)]
    assert (middle == (43, 95, 199)).all(axis=1).any(), "the file shows these cells"


def test_more_classes_than_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nayer_edge.pipelines.report import similarity

    monkeypatch.setattr(similarity, "MAX_SIDE", 4)
    table = np.arange(49.0).reshape(7, 7)
    assert similarity._reduced(table).tolist() == [
        [8, 10, 12, 13],
        [22, 24, 26, 27],
        [36, 38, 40, 41],
        [43, 45, 47, 48],
    ]
    heat_map(LabelEmbeddings(torch.eye(7), "e", "1", "{label}", tuple("abcdefg")), tmp_path / "e.png")


def test_neighbours() -> None:
    values = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    found = neighbours(LabelEmbeddings(values, "e", "1", "{label}", ("a", "b", "c")))
    assert [(pair["label"], pair["nearest"]) for pair in found] == [("a", "b"), ("b", "a"), ("c", "b")]
    assert found[0]["cosine"] == pytest.approx(0.9 / 0.82**0.5, abs=1e-4)


# ------------------------------------------------------------------ in a recipe

RECIPE = """
[teacher]
model = "nayer:resnet8"
weights = "teacher.safetensors"
classes = "names/labels.txt"

[student]
model = "nayer:wrn_16_1"
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_of_labels_is_relative_to_the_recipe(here: Path) -> None:
    path = write(here / "project" / "mine.toml", RECIPE)
    write(here / "project" / "names" / "labels.txt", WORDS)
    assert load_recipe(str(path)).teacher.classes == ("cat", "dog, hound", "sea_bird")
    write(here / "other.csv", "0,x\n1,y\n")
    assert load_recipe(str(path), ["teacher.classes=other.csv"]).teacher.classes == ("x", "y"), "typed: from here"
    write(here / "project" / "names" / "labels.txt", "cat\n\ndog\n")
    with pytest.raises(UsageError, match=r"Line 2 of .* is empty"):
        load_recipe(str(path))
    write(here / "project" / "extending.toml", 'extends = "mine"\n[teacher]\nclasses = "../other.csv"\n')
    assert load_recipe(str(here / "project" / "extending.toml")).teacher.classes == ("x", "y")


def test_a_file_of_embeddings_counts_by_what_is_in_it(here: Path) -> None:
    """Relative to the recipe; the manifest names nobody's folder; another file of the same name is another step."""
    write(here / "names" / "labels.txt", WORDS)
    path = write(here / "mine.toml", RECIPE + '[lte]\nencoder = "emb.npy"\n')
    np.save(here / "emb.npy", np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32))
    from nayer_edge.models.load import build_classifier
    from nayer_edge.storage.tensors import save_tensors

    recipe = load_recipe(str(path))
    assert recipe.lte.encoder == str(here / "emb.npy")
    network = build_classifier(recipe.teacher.model, recipe.teacher.input, recipe.teacher.classes)
    save_tensors(here / "teacher.safetensors", network.backbone.state_dict())
    root = here / "runs" / "mine"
    first = run_recipe(recipe, root, last="lte").manifest.files["lte.safetensors"].sha256
    states: list[str] = []
    run_recipe(load_recipe(str(path)), root, last="lte", on_event=lambda event: states.append(event.state))
    assert states == ["kept", "kept"]
    assert str(here) not in (root / "manifest.json").read_text()
    np.save(here / "emb.npy", np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32))
    assert run_recipe(load_recipe(str(path)), root, last="lte").manifest.files["lte.safetensors"].sha256 != first
    np.save(here / "emb.npy", np.ones((4, 6), dtype=np.float32))
    with pytest.raises(UsageError, match="cannot run here") as caught:
        run_recipe(load_recipe(str(path)), root, last="lte")
    assert "lte.encoder: " in caught.value.why
    assert "4 embeddings for 3 classes" in caught.value.why


def test_a_folder_of_an_encoder_is_relative_to_the_recipe(here: Path, sentence_encoder: Path) -> None:
    write(here / "names" / "labels.txt", WORDS)
    path = write(here / "mine.toml", RECIPE + f'[lte]\nencoder = "{sentence_encoder.name}"\n')
    assert load_recipe(str(path)).lte.encoder == str(sentence_encoder)
    hub = write(here / "hub.toml", RECIPE + '[lte]\nencoder = "openai/clip-vit-base-patch32"\n')
    assert load_recipe(str(hub)).lte.encoder == "openai/clip-vit-base-patch32"
