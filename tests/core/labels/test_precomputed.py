"""Precomputed embeddings: file formats, matching of rows to classes, and invalid files."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nayer_edge.config import LTE
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.labels.embeddings import build, check, mean_cosine
from nayer_edge.labels.precomputed import read, rows_by_name
from nayer_edge.pipelines.recipes.loading import load_recipe

NAMES = ("cat", "dog", "sea_bird")
VALUES = np.arange(12, dtype=np.float32).reshape(3, 4) + 1


def take(path: Path, names: tuple[str, ...] = NAMES) -> torch.Tensor:
    config = LTE(encoder=str(path))
    check(names, config)
    return build(names, config).embeddings


def clip_like(path: Path, labels: list[str], values: np.ndarray = VALUES) -> Path:
    """In the format of the CLIP embeddings published with the NAYER code: no revision, labels one per line."""
    facts = {"labels": "\n".join(labels), "prompt": "a image of {label}", "encoder": "CLIP ViT-B/32 text tower"}
    save_file({"embeddings": torch.from_numpy(values)}, path, {**facts, "normalized": "no", "source": "elsewhere"})
    return path


def test_the_format_of_the_published_clip_embeddings(tmp_path: Path) -> None:
    path = clip_like(tmp_path / "clip.safetensors", ["dog", "sea bird, Aves", "Cat"])
    found = build(NAMES, LTE(encoder=str(path)))
    assert found.embeddings.tolist() == VALUES[[2, 0, 1]].tolist()
    assert (found.encoder, found.prompt, found.labels) == ("CLIP ViT-B/32 text tower", "a image of {label}", NAMES)
    assert len(found.revision) == 64, "of the file"
    other = clip_like(tmp_path / "clip.safetensors", ["dog", "sea bird, Aves", "Cat"], VALUES * 1.0001)
    assert build(NAMES, LTE(encoder=str(other))).digest != found.digest


@pytest.mark.skipif(not os.environ.get("NAYER_EDGE_DATA"), reason="needs the measuring data (NAYER_EDGE_DATA)")
@pytest.mark.parametrize(
    ("file", "recipe", "classes", "cosine"),
    [
        ("cifar10", "cifar10-w402-w161-e100", 10, 0.87),
        ("cifar100", "cifar100-w402-w161-e300", 100, 0.79),
        ("tiny-imagenet", "tiny-imagenet-r34-r18", 200, 0.70),
        ("imagenet", "imagenet-r50-mobilenet_v2", 1000, 0.61),
    ],
)
def test_the_published_clip_embeddings(file: str, recipe: str, classes: int, cosine: float) -> None:
    """The mean cosines are those measured by the provider of the data."""
    path = Path(os.environ["NAYER_EDGE_DATA"]) / "lte" / f"clip-vit-b32-{file}.safetensors"
    found = build(load_recipe(recipe).teacher.classes, LTE(encoder=str(path)))
    assert found.embeddings.shape == (classes, 512)
    assert mean_cosine(found.embeddings) == pytest.approx(cosine, abs=0.006)


def test_imagenet_by_name_whatever_the_order(tmp_path: Path) -> None:
    """Its published lists differ (whole synsets or first synonyms), and two classes are named crane."""
    published = ["tench, Tinca tinca", "crane", "goldfish, Carassius auratus", "crane", "maillot", "maillot, tank suit"]
    ours = ["tench", "crane (bird)", "goldfish", "crane (machine)", "maillot", "maillot, tank suit"]
    torchvision = ["tench", "crane", "goldfish", "crane (machine)", "maillot", "tank_suit"]
    values = np.eye(6, dtype=np.float32)
    path = clip_like(tmp_path / "clip.safetensors", published, values)
    for names in (ours, torchvision):
        assert torch.equal(take(path, tuple(names)), torch.eye(6))
    assert torch.equal(take(path, ("tank suit", "goldfish", "Tench")), torch.eye(6)[[5, 2, 0]])
    with pytest.raises(UsageError, match=r"2 embeddings for the class 'crane' \(rows 1, 3\)"):
        take(path, ("tench", "crane"))
    with pytest.raises(UsageError, match=r"no embedding for 1 of 2 classes: goldfisch\. Did you mean 'goldfish'"):
        rows_by_name(["goldfisch", "tench"], ["tench, Tinca tinca", "goldfish"], path)


def test_exact_names_come_first(tmp_path: Path) -> None:
    path = clip_like(tmp_path / "e.safetensors", ["dog, cat", "cat, dog", "cat"])
    assert rows_by_name(["cat", "cat, dog"], ["dog, cat", "cat, dog", "cat"], path) == [2, 1]
    assert rows_by_name(["cat, dog", "dog, cat"], ["dog, cat", "cat, dog"], path) == [1, 0]
    assert rows_by_name(["Cat", "dog, cat"], ["dog, cat", "cat, dog", "cat"], path) == [2, 0]


def test_npy_has_labels_beside_it_or_the_order_of_the_classes(tmp_path: Path) -> None:
    path = tmp_path / "clip.npy"
    np.save(path, VALUES.astype(np.float64))
    assert take(path).tolist() == VALUES.tolist()
    with pytest.raises(UsageError, match="3 embeddings for 2 classes") as caught:
        take(path, ("cat", "dog"))
    assert "clip.labels.txt" in caught.value.fix
    (tmp_path / "clip.labels.txt").write_text("dog\ncat\nsea bird\n")
    assert take(path).tolist() == VALUES[[1, 0, 2]].tolist()
    assert take(path, ("cat", "dog")).tolist() == VALUES[[1, 0]].tolist()
    (tmp_path / "clip.labels.txt").write_text("dog\ncat\n")
    with pytest.raises(IntegrityError, match=r"shape \(3, 4\) for 2 labels"):
        take(path)


def test_npz_has_labels_inside(tmp_path: Path) -> None:
    path = tmp_path / "clip.npz"
    np.savez(path, embeddings=VALUES.astype(np.float16), labels=np.array(["sea_bird", "cat", "dog"]))
    assert take(path).tolist() == VALUES[[1, 2, 0]].tolist()
    np.savez_compressed(path, whatever=VALUES, classes=np.array([b"sea_bird", b"cat", b"dog"]))
    assert take(path).tolist() == VALUES[[1, 2, 0]].tolist()
    np.savez(path, VALUES)
    assert take(path).tolist() == VALUES.tolist()


def test_half_precision_and_other_names_in_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_file({"text_features": torch.from_numpy(VALUES).bfloat16(), "scale": torch.ones(1)}, path)
    found = read(path)
    assert found.values.dtype == torch.float32
    assert found.labels is None
    assert take(path).tolist() == torch.from_numpy(VALUES).bfloat16().float().tolist()
    save_file({"x": torch.ones(3, 4)}, path, {"classes": json.dumps(["dog", "cat", "sea_bird"])})
    assert read(path).labels == ("dog", "cat", "sea_bird")
    save_file({"x": torch.ones(3, 4), "y": torch.ones(3, 4)}, path)
    with pytest.raises(UsageError, match="2 matrices, none of them named 'embeddings'"):
        read(path)
    save_file({"x": torch.ones(3)}, path)
    with pytest.raises(UsageError, match="0 matrices"):
        read(path)
    save_file({"x": torch.ones(3, 4)}, path, {"labels": "3"})
    with pytest.raises(IntegrityError, match="not a list of names"):
        read(path)


class Hostile:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_python_objects_are_not_unpickled(tmp_path: Path, suffix: str) -> None:
    path, trap = tmp_path / f"e{suffix}", tmp_path / "ran"
    (np.save if suffix == ".npy" else np.savez)(path, np.array([[Hostile(trap)]], dtype=object), allow_pickle=True)
    with pytest.raises(IntegrityError, match="not readable as an embedding file"):
        read(path)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"e{suffix}"
    if suffix == ".safetensors":
        clip_like(path, list(NAMES))
    else:
        (np.save if suffix == ".npy" else np.savez)(path, VALUES)
    whole = path.read_bytes()
    for data in (b"", b"no", whole[:20], whole[:-8]):
        path.write_bytes(data)
        with pytest.raises(IntegrityError):
            read(path)
    path.unlink()
    with pytest.raises(UsageError, match="no embedding file"):
        read(path)


@pytest.mark.parametrize("values", [np.full((3, 4), np.nan), np.full((3, 4), np.inf), np.ones((3, 4), dtype=np.int64)])
def test_values_that_are_not_embeddings(tmp_path: Path, values: np.ndarray) -> None:
    for suffix in (".npy", ".safetensors"):
        path = tmp_path / f"e{suffix}"
        np.save(path, values) if suffix == ".npy" else save_file({"embeddings": torch.from_numpy(values)}, path)
        with pytest.raises(IntegrityError):
            read(path)


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nayer_edge.labels import precomputed

    path = tmp_path / "e.npz"
    np.savez_compressed(path, embeddings=np.zeros((1000, 100), dtype=np.float32))
    monkeypatch.setattr(precomputed, "MAX_BYTES", 2**16)
    with zipfile.ZipFile(path) as archive:
        assert path.stat().st_size < 2**16 < archive.infolist()[0].file_size
    with pytest.raises(IntegrityError, match="not readable"):
        read(path)
