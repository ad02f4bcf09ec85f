"""Calibration images for our own and other tools, each loaded back."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nayer_edge.errors import UsageError
from nayer_edge.export.calibration_data import FORMATS, WRITTEN, write_calibration_data

CLASSES = ["cat", "größe/../x", "犬"]
IMAGES = np.random.default_rng(0).random((6, 3, 4, 5), np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def test_npz_holds_one_array_named_after_the_input(tmp_path: Path) -> None:
    path = write_calibration_data(IMAGES, LABELS, CLASSES, tmp_path, ["npz"])["npz"]
    with np.load(path, allow_pickle=False) as data:
        assert data.files == ["images"]
        np.testing.assert_array_equal(data["images"], IMAGES)


def test_npy_has_its_labels_beside_it(tmp_path: Path) -> None:
    path = write_calibration_data(IMAGES, LABELS, CLASSES, tmp_path, ["npy"])["npy"]
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), IMAGES)
    np.testing.assert_array_equal(np.load(path.with_suffix(".labels.npy"), allow_pickle=False), LABELS)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_a_folder_of_class_folders(tmp_path: Path, channels: int) -> None:
    from torchvision.datasets import ImageFolder

    folder = write_calibration_data(IMAGES[:, :channels], LABELS, CLASSES, tmp_path, ["png"])["png"]
    assert all(p.resolve().is_relative_to(folder.resolve()) for p in folder.rglob("*"))
    found = ImageFolder(str(folder))
    assert [label for _, label in found.samples] == [0, 0, 1, 1, 2, 2]
    first = np.asarray(Image.open(found.samples[0][0])).reshape(4, 5, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(first, np.rint(IMAGES[0, :channels] * 255))


def test_pictures_of_an_earlier_call_do_not_stay(tmp_path: Path) -> None:
    folder = write_calibration_data(IMAGES, LABELS, CLASSES, tmp_path, ["png"])["png"]
    mine = folder / "0_cat" / "00042.png"
    mine.write_bytes(b"not ours")
    write_calibration_data(IMAGES[:2], np.array([2, 2]), CLASSES, tmp_path, ["png"])
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert left == ["0_cat", "0_cat/00042.png", "2_犬", "2_犬/00000.png", "2_犬/00001.png", WRITTEN], "no empty folder"


def test_a_list_of_pictures_leads_nowhere_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    kept = [outside / "00000.png", tmp_path / "00001.png"]
    for path in kept:
        path.write_bytes(b"not ours")
    folder = tmp_path / "png"
    folder.mkdir()
    (folder / "7_linked").symlink_to(outside)
    listed = ["7_linked/00000.png", "../00001.png", "0_x/../../00001.png", str(kept[0]), 5, "8_missing/00000.png"]
    (folder / WRITTEN).write_text(json.dumps(listed))
    write_calibration_data(IMAGES, LABELS, CLASSES, tmp_path, ["png"])
    assert all(path.is_file() for path in kept)


def test_polygraphy_json_holds_one_feed_per_image(tmp_path: Path) -> None:
    path = write_calibration_data(IMAGES, LABELS, CLASSES, tmp_path, ["polygraphy"])["polygraphy"]
    feeds = json.loads(path.read_text())
    assert len(feeds) == 6
    for feed, image in zip(feeds, IMAGES, strict=True):
        assert feed["images"]["polygraphy_class"] == "ndarray"
        array = np.load(io.BytesIO(base64.b64decode(feed["images"]["array"])), allow_pickle=False)
        np.testing.assert_array_equal(array, image[None])


def test_polygraphy_reads_it(tmp_path: Path) -> None:
    polygraphy = pytest.importorskip("polygraphy.json")
    path = write_calibration_data(IMAGES, LABELS, CLASSES, tmp_path, ["polygraphy"])["polygraphy"]
    np.testing.assert_array_equal(polygraphy.load_json(str(path))[3]["images"], IMAGES[3:4])


def test_all_formats_are_written_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert set(write_calibration_data(IMAGES, LABELS, CLASSES, tmp_path / name)) == set(FORMATS)
    first, second = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("a", "b")
    )
    assert first == second


@pytest.mark.parametrize(
    ("images", "labels", "formats", "why"),
    [
        (IMAGES, LABELS, ["pgn"], "Did you mean 'png'"),
        (IMAGES, LABELS[:3], ["npz"], "do not match"),
        (IMAGES[:0], LABELS[:0], ["npz"], "do not match"),
        (IMAGES, LABELS + 1, ["npz"], "outside the 3 classes"),
        (IMAGES, LABELS, [], "No format is named"),
        (IMAGES[..., :0], LABELS, ["png"], "are empty"),
        (IMAGES * 255, LABELS, ["npz"], "outside \\[0, 1\\]"),
        (np.where(IMAGES > 0.5, np.nan, IMAGES), LABELS, ["npz"], "or NaN"),
        (IMAGES[:, :2], LABELS, ["png"], "1, 3 or 4 channels"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, formats: list[str], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        write_calibration_data(images, labels, CLASSES, tmp_path, formats)
    assert list(tmp_path.iterdir()) == []
