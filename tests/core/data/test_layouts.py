"""Hold-outs as people have them: class names in another order, several splits, hidden files, arrays of other names."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from nayer_edge.config import InputSpec
from nayer_edge.data.datasets import load, open_images
from nayer_edge.data.left_out import SYSTEM_FOLDERS
from nayer_edge.data.splits import missing_shards, split_in
from nayer_edge.data.stream import ImageStream
from nayer_edge.errors import UsageError

SPEC = InputSpec(channels=1, height=4, width=4)
CLASSES = ("cat", "dog", "sea lion")


def pixels(count: int) -> np.ndarray:
    """Images whose value says which one it is."""
    return np.repeat(np.arange(count, dtype=np.uint8), 16).reshape(count, 4, 4)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def opened(path: Path, split: str | None = None, classes: tuple[str, ...] = CLASSES) -> ImageStream:
    return open_images(str(path), "holdout", SPEC, classes, "exact", split)


def values(stream: ImageStream) -> list[int]:
    """The value of each image, in order."""
    return np.concatenate(list(stream.batches(2)))[:, 0, 0, 0].tolist()


def refused(path: Path, split: str | None = None, classes: tuple[str, ...] = CLASSES) -> UsageError:
    with pytest.raises(UsageError) as caught:
        opened(path, split, classes)
    assert caught.value.fix, "an error says what to type or change next"
    return caught.value


def left_out(stream: ImageStream) -> dict[str, tuple[int, str]]:
    return {each.reason: (each.count, each.first) for each in stream.left_out}


def write_png(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))


def write_parquet(
    path: Path, labels: list[Any], names: list[str] | None = None, first: int = 0, **columns: list[Any]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(first + number), "path": None} for number in range(len(labels))]
    table = pa.table({"image": images, "label": labels, **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path)


# ------------------------------------------------------------------ class names of a parquet file


def test_class_labels_in_another_order_are_mapped(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [0, 1, 2, 0], ["sea_lion", "Dog", "cat"])
    stream = opened(tmp_path / "x.parquet")
    assert stream.labels.tolist() == [2, 1, 0, 2]
    assert stream.matched_by == "name"


def test_class_labels_that_differ_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [0, 1], ["cat", "cow"])
    error = refused(tmp_path / "x.parquet")
    assert "Only in the data (1): cow." in error.why
    assert "Only among the teacher's classes (2): dog, sea lion." in error.why


def test_class_labels_that_do_not_occur_need_no_class(tmp_path: Path) -> None:
    """A part of a larger data set keeps all its class names."""
    write_parquet(tmp_path / "x.parquet", [3, 1], ["ant", "dog", "eel", "cat"])
    assert opened(tmp_path / "x.parquet").labels.tolist() == [0, 1]


@pytest.mark.parametrize("names", [None, ["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_numbers_alone_are_numbers_and_the_stream_says_so(tmp_path: Path, names: list[str] | None) -> None:
    write_parquet(tmp_path / "x.parquet", [2, 0], names)
    stream = opened(tmp_path / "x.parquet")
    assert (stream.labels.tolist(), stream.matched_by) == ([2, 0], "number")


@pytest.mark.parametrize("dictionary", [True, False])
def test_labels_that_are_names(tmp_path: Path, dictionary: bool) -> None:
    labels: Any = pa.array(["dog", "sea_lion", "dog"])
    write_parquet(tmp_path / "x.parquet", labels.dictionary_encode() if dictionary else labels)
    stream = opened(tmp_path / "x.parquet")
    assert (stream.labels.tolist(), stream.matched_by) == ([1, 2, 1], "name")


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_name_is_outside(tmp_path: Path, label: int) -> None:
    """-1 marks labels that a benchmark withholds, and must not count from the end."""
    write_parquet(tmp_path / "x.parquet", [0, label], ["dog", "cat", "sea lion"])
    assert "1 of 2 images" in refused(tmp_path / "x.parquet").what


def test_files_with_different_class_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [0], ["dog", "cat"])
    write_parquet(tmp_path / "b.parquet", [0], ["cat", "dog"])
    assert "state different class names" in refused(tmp_path).what


@pytest.mark.parametrize("text", ["{", "[]", '{"info": 3}', '{"info": {"features": {"label": {"names": [1, 2]}}}}'])
def test_metadata_of_another_kind_are_no_names(tmp_path: Path, text: str) -> None:
    table = pa.table({"image": [png(0)], "label": [1]}).replace_schema_metadata({"huggingface": text})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert opened(tmp_path / "x.parquet").matched_by == "number"


# ------------------------------------------------------------------ splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001", "train"),
        ("test-00001-of-00004-0a1b2c3d4e5f6071", "test"),
        ("cifar10_Valid", "validation"),
        ("val2017", "validation"),
        ("dev", "validation"),
        ("evaluation.set", "test"),
        ("extra-00000-of-00001", "extra"),
        ("contest", ""),
        ("train_and_test", ""),
        ("trained", ""),
    ],
)
def test_the_split_in_a_name(name: str, split: str) -> None:
    assert split_in(name) == split


def test_several_splits_are_told_apart(tmp_path: Path) -> None:
    for first, split in ((0, "train"), (10, "validation"), (20, "test")):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [0, 1], first=first)
    error = refused(tmp_path)
    assert "several splits: test, train, validation" in error.what
    assert "--split test" in error.fix
    for split, first in (("test", 20), ("val", 10), ("train", 0)):
        stream = opened(tmp_path, split)
        assert values(stream) == [first, first + 1]
        assert left_out(stream)["in another split"][0] == 2
    assert opened(tmp_path, "dev").split == "validation"
    error = refused(tmp_path, "tests")
    assert "Did you mean 'test'?" in error.what
    assert len(load(str(tmp_path), "train", SPEC, CLASSES)) == 2, "training takes its own split unasked"


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001", "{}/0000", "default/{}/0000"])
def test_splits_in_folders_below(tmp_path: Path, layout: str) -> None:
    for first, split in ((0, "train"), (10, "test")):
        write_parquet(tmp_path / f"{layout.format(split)}.parquet", [0, 1, 2], first=first)
    assert "several splits: test, train" in refused(tmp_path).what
    assert values(opened(tmp_path, "test")) == [10, 11, 12]


def test_a_column_of_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [0, 1, 2, 1], split=["train", "test", "train", "Test"])
    assert "several splits: test, train" in refused(tmp_path / "x.parquet").what
    stream = opened(tmp_path / "x.parquet", "test")
    assert (values(stream), stream.labels.tolist(), stream.split) == ([1, 3], [1, 1], "test")


def test_a_file_named_by_the_user_is_that_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [0])
    stream = opened(tmp_path / "train-00000-of-00002.parquet")
    assert (len(stream), stream.split) == (1, "train")
    assert "has no split 'test'" in refused(tmp_path / "train-00000-of-00002.parquet", "test").what


def test_parts_that_are_missing(tmp_path: Path) -> None:
    for number in (0, 2):
        write_parquet(tmp_path / f"test-{number:05}-of-00003.parquet", [0])
    assert "test-00001-of-00003.parquet" in refused(tmp_path).what
    assert missing_shards(["a-00000-of-00001", "b"]) == []


def test_two_configurations_are_not_mixed(tmp_path: Path) -> None:
    for name in ("plain", "augmented"):
        write_parquet(tmp_path / name / "test-00000-of-00001.parquet", [0])
    assert "in 2 folders: augmented, plain" in refused(tmp_path).what


def test_files_beside_a_split_that_name_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [0])
    write_parquet(tmp_path / "more.parquet", [1])
    assert "files that name none" in refused(tmp_path).what
    assert opened(tmp_path, "test").labels.tolist() == [0]


def test_split_folders_of_class_folders(tmp_path: Path) -> None:
    for first, split in ((0, "train"), (10, "val")):
        for number, name in enumerate(("cat", "dog")):
            write_png(tmp_path / split / name / "x.png", first + number)
    write_png(tmp_path / "readme.png")
    assert "several splits: train, validation" in refused(tmp_path).what
    stream = opened(tmp_path, "validation")
    assert (values(stream), stream.labels.tolist(), stream.split) == ([10, 11], [0, 1], "validation")
    assert left_out(stream) == {
        "in another split": (2, "train/cat/x.png"),
        "outside the splits": (1, "readme.png"),
    }
    assert opened(tmp_path / "val").split == "validation"
    assert "has no split 'test'" in refused(tmp_path, "test").what


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    classes = ("car", "train")
    for number, name in enumerate(classes):
        write_png(tmp_path / "held" / name / "x.png", number)
    assert opened(tmp_path / "held", classes=classes).labels.tolist() == [0, 1]
    assert "has no splits" in refused(tmp_path / "held", "test", classes).what


def test_a_folder_called_test_among_class_folders_is_no_split(tmp_path: Path) -> None:
    for name in ("cat", "test"):
        write_png(tmp_path / name / "x.png")
    assert "Only in the data (1): test." in refused(tmp_path).why
    write_png(tmp_path / "held" / "val" / "cat" / "x.png", 5)
    write_png(tmp_path / "held" / "annotations" / "x.png")
    assert "annotations, val" in refused(tmp_path / "held").why
    assert values(opened(tmp_path / "held", "val")) == [5]


def test_digits_and_published_sets_have_a_test_split() -> None:
    spec, names = InputSpec(channels=1, height=8, width=8), [str(number) for number in range(10)]
    assert len(open_images("digits", "holdout", spec, names, "exact")) == 600
    assert len(open_images("digits", "holdout", spec, names, "exact", "train")) == 1197
    with pytest.raises(UsageError, match="has no split 'validation'"):
        open_images("digits", "holdout", spec, names, "exact", "validation")


def test_mnist_by_split(tmp_path: Path) -> None:
    for part, count in (("t10k", 3), ("train", 5)):
        for name, array in (("images-idx3", pixels(count)), ("labels-idx1", np.zeros(count, np.uint8))):
            head = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (tmp_path / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())
    assert (len(opened(tmp_path)), opened(tmp_path).split) == (3, "test")
    assert len(opened(tmp_path, "train")) == 5
    assert "has no split 'validation'" in refused(tmp_path, "validation").what
    assert "has no split 'test'" in refused(tmp_path / "train-images-idx3-ubyte", "test").what


# ------------------------------------------------------------------ files that are no images


@pytest.mark.parametrize(
    "hidden",
    [
        "cat/.ipynb_checkpoints/x-checkpoint.png",
        "cat/._x.png",
        ".ipynb_checkpoints/x.png",
        "cat/deeper/.cache/x.png",
        ".x.png",
        *(f"cat/{name}/x.png" for name in SYSTEM_FOLDERS),
        "__MACOSX/cat/._x.png",
    ],
)
def test_hidden_files_and_folders_are_no_images(tmp_path: Path, hidden: str) -> None:
    write_png(tmp_path / "cat" / "x.png", 7)
    write_png(tmp_path / hidden, 9)
    stream = opened(tmp_path)
    assert values(stream) == [7]
    assert left_out(stream) == {"hidden": (1, hidden)}


def test_a_hidden_folder_above_hides_nothing(tmp_path: Path) -> None:
    write_png(tmp_path / ".data" / "cat" / "x.png")
    assert len(opened(tmp_path / ".data")) == 1


def test_hidden_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [0])
    (tmp_path / "._x.parquet").write_bytes(b"\0\5\x16\7")
    stream = opened(tmp_path)
    assert (len(stream), left_out(stream)) == (1, {"hidden": (1, "._x.parquet")})


def test_files_left_out_are_counted_and_named(tmp_path: Path) -> None:
    write_png(tmp_path / "cat" / "x.png")
    for name in ("cat/a.gif", "cat/b.GIF", "dog/notes", "loose.png", "labels.csv"):
        write_png(tmp_path / name)
    assert left_out(opened(tmp_path)) == {
        "not a picture (.gif)": (2, "cat/a.gif"),
        "not a picture (no suffix)": (1, "dog/notes"),
        "outside the class folders": (2, "labels.csv"),
    }


def test_a_parquet_file_among_pictures_is_left_out(tmp_path: Path) -> None:
    write_png(tmp_path / "cat" / "x.png")
    write_parquet(tmp_path / "cat" / "table.parquet", [0])
    assert left_out(opened(tmp_path)) == {"not a picture (.parquet)": (1, "cat/table.parquet")}


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write_png(tmp_path / "elsewhere" / "x.png", 5)
    (tmp_path / "held" / "cat").mkdir(parents=True)
    (tmp_path / "held" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "held" / "cat")
    assert values(opened(tmp_path / "held")) == [5]


# ------------------------------------------------------------------ class folders


def test_class_folders_in_any_unicode_form(tmp_path: Path) -> None:
    classes = ("été", "hiver")
    write_png(tmp_path / unicodedata.normalize("NFD", "été") / "x.png", 3)
    write_png(tmp_path / "Hiver" / "x.png", 4)
    stream = opened(tmp_path, classes=classes)
    assert dict(zip(values(stream), stream.labels.tolist(), strict=True)) == {3: 0, 4: 1}


def test_imagenets_validation_layout(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    for number, name in enumerate(("n01443537", "n01440764")):
        write_png(tmp_path / "val" / name / f"ILSVRC2012_val_{number:08}.JPEG", number)
    stream = opened(tmp_path / "val", classes=("tench, Tinca tinca", "goldfish, Carassius auratus"))
    assert dict(zip(values(stream), stream.labels.tolist(), strict=True)) == {0: 1, 1: 0}
    assert (stream.matched_by, stream.split) == ("WordNet id", "validation")
    assert opened(tmp_path / "val", classes=("n01440764", "n01443537")).matched_by == "name"


def test_numbered_class_folders(tmp_path: Path) -> None:
    for number in range(3):
        write_png(tmp_path / f"{number:03}" / "x.png", number)
    stream = opened(tmp_path)
    assert (stream.labels.tolist(), stream.matched_by) == ([0, 1, 2], "number")
    write_png(tmp_path / "003" / "x.png")
    assert "3 is not one of the 3 classes" in refused(tmp_path).what


# ------------------------------------------------------------------ class names beside binary files


def test_cifars_own_class_names_decide(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    spec = InputSpec(channels=3, height=32, width=32)
    (folder / "test_batch.bin").write_bytes(b"".join(bytes([label]) + bytes(3072) for label in (0, 2, 1)))
    (folder / "batches.meta.txt").write_text("sea lion\ncat\ndog\n\n")
    stream = open_images(str(folder), "holdout", spec, CLASSES, "exact")
    assert (stream.labels.tolist(), stream.matched_by, stream.split) == ([2, 1, 0], "name", "test")
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n")
    with pytest.raises(UsageError, match="are not the teacher's classes"):
        open_images(str(folder), "holdout", spec, CLASSES, "exact")


# ------------------------------------------------------------------ arrays


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images", "labels"),
        ("test_images", "test_labels"),
        ("x_test", "y_test"),
        ("X", "y"),
        ("val_images", "val_labels"),
        ("arr_0", "arr_1"),
        ("data", "targets"),
    ],
)
def test_names_of_arrays(tmp_path: Path, images: str, labels: str) -> None:
    np.savez(tmp_path / "x.npz", **{images: pixels(3), labels: np.array([2, 0, 1])})
    stream = opened(tmp_path / "x.npz")
    assert (values(stream), stream.labels.tolist(), stream.matched_by) == ([0, 1, 2], [2, 0, 1], "number")


def test_arrays_of_several_splits(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz",
        x_train=pixels(5), y_train=np.zeros(5, int), x_test=pixels(2), y_test=np.array([1, 2]),
    )  # fmt: skip
    assert "several splits: test, train" in refused(tmp_path / "x.npz").what
    stream = opened(tmp_path / "x.npz", "test")
    assert (stream.labels.tolist(), stream.split) == ([1, 2], "test")
    assert len(load(str(tmp_path / "x.npz"), "train", SPEC, CLASSES)) == 5


@pytest.mark.parametrize(
    "labels",
    [
        np.array([[2], [0], [1]]),
        np.array([[2, 0, 1]]),
        np.eye(3)[[2, 0, 1]],
        np.eye(3, dtype=np.uint8)[[2, 0, 1]],
        np.eye(3, dtype=bool)[[2, 0, 1]],
        np.asfortranarray(np.eye(3)[[2, 0, 1]]),
        np.array([2.0, 0.0, 1.0]),
        np.array(["sea_lion", "cat", "dog"]),
        np.array([b"sea lion", b"cat", b"dog"]),
    ],
)
def test_shapes_and_types_of_labels(tmp_path: Path, labels: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", images=pixels(3), labels=labels)
    stream = opened(tmp_path / "x.npz")
    assert stream.labels.tolist() == [2, 0, 1]
    assert stream.labels.dtype == np.int64


def test_class_names_in_an_npz_decide(tmp_path: Path) -> None:
    names = np.array(["sea lion", "cat", "dog"])
    np.savez(tmp_path / "x.npz", images=pixels(3), labels=np.array([0, 1, 2]), class_names=names)
    assert opened(tmp_path / "x.npz").labels.tolist() == [2, 0, 1]
    np.savez(tmp_path / "y.npz", x_test=pixels(2), y_test=np.eye(3)[[0, 1]], classes=names)
    assert opened(tmp_path / "y.npz").labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([1, 2, 3]), "run from 1 to 3"),
        (np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]]), "1 of 3 rows are not one-hot"),
        (np.full((3, 3), 1 / 3), "3 of 3 rows are not one-hot"),
        (np.zeros((3, 2)), "not one-hot rows of the 3 classes"),
        (np.zeros((3, 2, 2)), "one class number for each image"),
        (np.array([0, np.nan, 1]), "not integers"),
        (np.array([0, 1e300, 1]), "not valid class numbers"),
        (np.array([0, 2**63, 1], np.uint64), "not valid class numbers"),
        (np.array(["cat", "dog", "cow"]), "Only in the data"),
    ],
)
def test_labels_that_are_refused_with_the_reason(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "x.npz", images=pixels(3), labels=labels)
    assert message in str(refused(tmp_path / "x.npz"))


def test_arrays_that_could_both_be_the_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=pixels(3), data=pixels(3), labels=np.zeros(3, int))
    assert "could both be the images" in refused(tmp_path / "x.npz").why
    np.savez(tmp_path / "y.npz", pictures=pixels(3), labels=np.zeros(3, int))
    assert "among pictures, labels" in refused(tmp_path / "y.npz").why
