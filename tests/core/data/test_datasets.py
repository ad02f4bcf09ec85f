"""Reading labelled images: the split of the digits, and files that are not what they should be."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from nayer_edge.config import InputSpec
from nayer_edge.data.datasets import digits, load
from nayer_edge.data.pictures import decode
from nayer_edge.errors import UsageError

GREY = InputSpec(channels=1, height=8, width=6)
COLOUR = InputSpec(channels=3, height=8, width=6)
CLASSES = ("cat", "dog")


def picture(shape: tuple[int, ...], seed: int = 0, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pixels_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ------------------------------------------------------------------ digits


def test_the_split_of_the_digits_is_stratified_disjoint_and_fixed() -> None:
    spec = InputSpec(channels=1, height=8, width=8)
    train, holdout = digits("train", spec), digits("holdout", spec)
    assert (len(train), len(holdout)) == (1197, 600)
    both = torch.bincount(torch.cat((train.labels, holdout.labels)))
    held = torch.bincount(holdout.labels)
    assert float((held / both - 600 / 1797).abs().max()) < 0.005
    seen = {bytes(image.numpy().tobytes()) for image in train.images}
    assert not any(bytes(image.numpy().tobytes()) in seen for image in holdout.images)
    assert holdout.labels[:12].tolist() == [5, 4, 7, 9, 2, 8, 5, 9, 7, 4, 3, 1]
    assert torch.equal(digits("holdout", spec).images, holdout.images)
    assert int(train.images.max()) == 255
    assert int(train.images.min()) == 0


def test_digits_of_another_size_and_more_channels() -> None:
    spec = InputSpec(channels=4, height=20, width=13)
    found = load("digits", "holdout", spec, [str(number) for number in range(10)])
    assert found.images.shape == (600, 4, 20, 13)
    assert bool((found.images == found.images[:, :1]).all())
    assert found.images.is_contiguous()
    with pytest.raises(UsageError, match="label outside the 9 classes"):
        load("digits", "train", spec, [str(number) for number in range(9)])


# ------------------------------------------------------------------ a folder


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    for number, name in enumerate(("dog", "cat", "dog")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{number}.png").write_bytes(picture((8, 6, 3), number))
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    found = load(str(tmp_path), "holdout", COLOUR, ("dog", "mouse", "cat"))  # the teacher's order, not the alphabet's
    assert found.labels.tolist() == [2, 0, 0]
    for image, number in zip(found.images, (1, 0, 2), strict=True):
        assert torch.equal(image, torch.from_numpy(pixels_of((8, 6, 3), number).transpose(2, 0, 1).copy()))
    assert found.name == tmp_path.name


def test_folders_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is empty") as caught:
        load(str(tmp_path), "holdout", COLOUR, CLASSES)
    assert "Name those like the classes" in caught.value.fix
    (tmp_path / "a.png").write_bytes(picture((8, 6, 3)))
    with pytest.raises(UsageError, match="has no class folders"):
        load(str(tmp_path), "holdout", COLOUR, CLASSES)
    (tmp_path / "a.png").unlink()
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="hold no images"):
        load(str(tmp_path), "holdout", COLOUR, CLASSES)
    (tmp_path / "cat" / "broken.png").write_bytes(picture((8, 6, 3))[:60])
    with pytest.raises(UsageError, match=r"broken\.png is not a readable image"):
        load(str(tmp_path), "holdout", COLOUR, CLASSES)
    (tmp_path / "cow").mkdir()
    with pytest.raises(UsageError, match="not the teacher's classes") as caught:
        load(str(tmp_path), "holdout", COLOUR, CLASSES)
    assert "cow" in caught.value.why


# ------------------------------------------------------------------ parquet


def write_parquet(path: Path, **columns: Any) -> str:
    parquet.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("image", "labels")])
@pytest.mark.parametrize("nested", [True, False])
def test_parquet(tmp_path: Path, image: str, label: str, nested: bool) -> None:
    encoded = [picture((8, 6), seed) for seed in range(3)]
    cells: list[Any] = [{"bytes": data, "path": None} for data in encoded] if nested else encoded
    source = write_parquet(tmp_path / "x.parquet", **{image: cells, label: [1, 0, 1]})
    found = load(source, "holdout", GREY, CLASSES)
    assert found.labels.tolist() == [1, 0, 1]
    for index in range(3):
        assert torch.equal(found.images[index, 0], torch.from_numpy(pixels_of((8, 6), index)))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"], "label": [0]}, "lacks a column of images or one of labels"),
        ({"image": [b"x"], "class": [0]}, "lacks a column of images or one of labels"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "holds no images"),
        ({"image": [picture((8, 6))], "label": ["cow"]}, "The class names in .* are not the teacher's classes"),
        ({"image": [picture((8, 6))], "label": [0.5]}, "does not hold"),
        ({"image": [picture((8, 6))], "label": pa.array([None], pa.int64())}, "does not hold"),
        ({"image": pa.array([None], pa.binary()), "label": [0]}, "does not hold"),
        ({"image": [7], "label": [0]}, "does not hold"),
        ({"image": [{"path": "x.png"}], "label": [0]}, "does not hold"),
        ({"image": [b"not an image"], "label": [0]}, "1 × not readable as an image, first x.parquet, row 0"),
        ({"image": [picture((8, 6))], "label": [2]}, "1 of 1 images .* label outside the 2 classes"),
        ({"image": [picture((8, 6))], "label": [-1]}, "label outside"),
    ],
)
def test_parquet_that_is_wrong(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(write_parquet(tmp_path / "x.parquet", **columns), "holdout", GREY, CLASSES)


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([pa.array([picture((8, 6))]), pa.array([0]), pa.array([1])], names=["image", "label", "label"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="several columns named 'label'"):
        load(str(tmp_path / "x.parquet"), "holdout", GREY, CLASSES)


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, image=[picture((8, 6))], label=[0])
    for data in (b"", b"PAR1", path.read_bytes()[:-9]):
        path.write_bytes(data)
        with pytest.raises(UsageError, match="not readable as parquet"):
            load(str(path), "holdout", GREY, CLASSES)


# ------------------------------------------------------------------ npz


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 8, 6), GREY),
        ((2, 8, 6, 1), GREY),
        ((2, 1, 8, 6), GREY),
        ((2, 8, 6, 3), COLOUR),
        ((2, 3, 8, 6), COLOUR),
        ((2, 13, 8, 6), InputSpec(channels=13, height=8, width=6)),
    ],
)
@pytest.mark.parametrize("kind", ["int64", "uint16", ">i4"])
def test_npz(tmp_path: Path, shape: tuple[int, ...], spec: InputSpec, kind: str) -> None:
    pixels = pixels_of(shape)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.array([1, 0], dtype=kind))
    found = load(str(tmp_path / "x.npz"), "holdout", spec, CLASSES)
    assert found.labels.tolist() == [1, 0]
    assert found.images.shape == (2, *spec.shape)
    wanted = pixels.reshape(2, *spec.shape) if shape[1] == spec.channels or pixels.ndim == 3 else None
    if wanted is None:
        wanted = pixels.transpose(0, 3, 1, 2)
    assert torch.equal(found.images, torch.from_numpy(np.ascontiguousarray(wanted)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 6), np.uint8)}, "not readable as labelled images"),
        ({"images": np.zeros((2, 8, 6), np.float32), "labels": np.zeros(2, int)}, "type float32"),
        (
            {"images": np.zeros((2, 8, 6, 2), np.uint8), "labels": np.zeros(2, int)},
            "2 images of shape .* model expects",
        ),
        ({"images": np.zeros((2, 8), np.uint8), "labels": np.zeros(2, int)}, "model expects"),
        ({"images": np.zeros((2, 8, 6), np.uint8), "labels": np.zeros(3, int)}, "2 images and 3 labels"),
        ({"images": np.zeros((2, 8, 6), np.uint8), "labels": np.zeros((2, 2), int)}, "2 of 2 rows are not one-hot"),
        ({"images": np.zeros((2, 8, 6), np.uint8), "labels": np.array(0)}, "model expects"),
        ({"images": np.zeros((2, 8, 6), np.uint8), "labels": np.array(["cat", "cow"])}, "not the teacher's classes"),
        ({"images": np.zeros((2, 8, 6), np.uint8), "labels": np.array([0.5, 1.0])}, "labels .* are of type float64"),
        ({"images": np.zeros((2, 8, 6), np.uint8), "labels": np.array([{}, {}], object)}, "type object|not readable"),
        ({"images": np.zeros((0, 8, 6), np.uint8), "labels": np.zeros(0, int)}, "holds no images"),
        ({"images": np.zeros((2, 8, 6), np.uint8), "labels": np.array([0, 2])}, "1 of 2 images"),
    ],
)
def test_npz_that_is_wrong(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=message):
        load(str(tmp_path / "x.npz"), "holdout", GREY, CLASSES)


def test_npz_with_class_names_under_another_key(tmp_path: Path) -> None:
    """scikit-learn's names; numbers that were saved as text count in the order of the names beside them."""
    pixels = np.zeros((2, 8, 6), np.uint8)
    for labels in (np.array([0, 1]), np.array(["0", "1"]), np.array([b"0", b"1"])):
        np.savez(tmp_path / "x.npz", images=pixels, target=labels, target_names=np.array(CLASSES[::-1]))
        assert load(str(tmp_path / "x.npz"), "holdout", GREY, CLASSES).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array(["ant", "bee"], dtype=object), "array 'labels' holds Python objects"),
        (np.array(["été".encode("latin-1"), b"bee"]), "not readable as labelled images"),
    ],
)
def test_npz_with_labels_of_other_kinds(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 6), np.uint8), labels=labels)
    with pytest.raises(UsageError) as caught:
        load(str(tmp_path / "x.npz"), "holdout", GREY, CLASSES)
    assert message in f"{caught.value.what} {caught.value.why}"


def test_a_damaged_npz_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=pixels_of((2, 8, 6)), labels=np.zeros(2, int))
    whole = path.read_bytes()
    np.save(tmp_path / "x.npy", np.zeros(3))
    flipped = bytearray(whole)
    flipped[150] ^= 0xFF
    for data in (b"", b"PK", whole[:-30], whole[:80], bytes(flipped), (tmp_path / "x.npy").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=r"not readable as labelled images|is damaged"):
            load(str(path), "holdout", GREY, CLASSES)


# ------------------------------------------------------------------ single images


def test_nothing_there(tmp_path: Path) -> None:
    for source in (tmp_path / "absent", tmp_path / "absent.npz", tmp_path / "absent.parquet", "digit"):
        with pytest.raises(UsageError, match="no labelled images at"):
            load(str(source), "holdout", GREY, CLASSES)


@pytest.mark.parametrize("source", ["$NO_SUCH_VARIABLE/test.parquet", "${NO_SUCH_VARIABLE}/test"])
def test_a_variable_that_is_not_set_is_named(source: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(source, "holdout", GREY, CLASSES)
    assert caught.value.why == "The environment variable NO_SUCH_VARIABLE is not set."
    assert caught.value.fix == "Type: export NO_SUCH_VARIABLE=FOLDER"


def test_decoding_converts_and_resizes() -> None:
    assert decode(picture((8, 6, 3)), GREY, "x").shape == (1, 8, 6)
    assert decode(picture((8, 6)), COLOUR, "x").shape == (3, 8, 6)
    assert decode(picture((16, 12, 4)), COLOUR, "x").shape == (3, 8, 6)
    flat = io.BytesIO()
    Image.new("RGB", (30, 50), (10, 20, 30)).save(flat, "PNG")
    assert decode(flat.getvalue(), COLOUR, "x")[:, 4, 3].tolist() == [10, 20, 30]


def test_encoded_images_have_one_or_three_channels() -> None:
    with pytest.raises(UsageError, match="model expects 13 channels") as caught:
        decode(picture((8, 6, 3)), InputSpec(channels=13, height=8, width=6), "a.png")
    assert "npz" in caught.value.fix


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
def test_damaged_images_are_errors_that_a_person_can_read(kind: str) -> None:
    chance = random.Random(0)
    whole = picture((12, 12, 3), kind=kind)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 3, 10))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            decode(bytes(data[: chance.randrange(len(data))] if chance.random() < 0.3 else data), COLOUR, "x")
        except UsageError:
            refused += 1
    assert refused > 0
