"""The picture of synthetic images: rows of classes, any channels, any names."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nayer_edge.pipelines.report.image_grids import (
    COLUMNS,
    MAX_CLASSES,
    STRIP_HEIGHT,
    class_strips,
    per_class_picture,
)


def images(count: int, channels: int = 1, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.verify()
        assert picture.format == "PNG"
        return picture.size


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    per_class_picture(images(6, channels, 5, 9), [0, 1] * 3, ["a", "b"], tmp_path / "new" / "p.png")
    assert size_of(tmp_path / "new" / "p.png")[0] == 960


def test_one_row_for_each_class_that_has_images(tmp_path: Path) -> None:
    heights = []
    for classes in (1, 2, 3):
        labels = [number % classes for number in range(30)]
        per_class_picture(images(30), labels, ["a", "b", "c", "never drawn"], tmp_path / "p.png")
        heights.append(size_of(tmp_path / "p.png")[1])
    steps = np.diff(heights)
    assert (steps > 50).all()
    assert abs(int(steps[0]) - int(steps[1])) <= 1


@pytest.mark.parametrize("classes", [MAX_CLASSES, MAX_CLASSES + 1, 100, 1000])
def test_at_most_twenty_rows(tmp_path: Path, classes: int) -> None:
    per_class_picture(images(classes), list(range(classes)), [str(n) for n in range(classes)], tmp_path / "p.png")
    assert size_of(tmp_path / "p.png")[1] <= 120 * (0.62 * MAX_CLASSES + 0.3) + 1


def test_the_pixels_are_the_images(tmp_path: Path) -> None:
    """A white image beside a black one: grey values are neither stretched nor mixed."""
    pair = np.stack([np.full((1, 8, 8), 255, np.uint8), np.zeros((1, 8, 8), np.uint8)])
    per_class_picture(pair, [0, 0], ["a"], tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        grey = np.asarray(picture.convert("L"))
    middle = grey[grey.shape[0] // 2]
    left = round(grey.shape[1] * (0.16 + 0.083 * 1.5))
    assert middle[left] == 0, "the second column is the black image"
    third = np.full((1, 1, 8, 8), 100, np.uint8)
    per_class_picture(third, [0], ["a"], tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert (np.asarray(picture.convert("L")) == 100).sum() > 1000


def test_equal_pictures_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        per_class_picture(images(20), [0, 1] * 10, ["x", "y"], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "name", ["猫", "🎱", "$x_2$", "$\\frac{", "\x1b[2J", "a\nb", "%s", "x" * 1000, "\ud800", "", "שש", "zwölf"]
)
def test_any_name(tmp_path: Path, name: str) -> None:
    """Warnings are errors here, so a character that the font lacks must not reach it."""
    per_class_picture(images(2), [0, 1], [name, "b"], tmp_path / "p.png")
    assert size_of(tmp_path / "p.png")


def test_more_images_than_columns(tmp_path: Path) -> None:
    per_class_picture(images(10 * COLUMNS), [0] * 10 * COLUMNS, ["a", "b"], tmp_path / "p.png")
    assert size_of(tmp_path / "p.png")[1] < 200


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_strips_hold_the_images(channels: int) -> None:
    given = images(25, channels, 5, 9)
    strips = class_strips(given, [0, 3] * 12 + [7])
    assert [(strip.number, strip.images) for strip in strips] == [(0, 10), (3, 10), (7, 1)]
    with Image.open(io.BytesIO(strips[1].png)) as picture:
        pixels = np.asarray(picture)
    shown = 3 if channels in (3, 4) else 1
    assert pixels.shape == (5, 10 * 10 - 1, shown + 1)
    for place, image in enumerate(given[1:21:2]):
        assert (pixels[:, 10 * place : 10 * place + 9, :shown] == image[:shown].transpose(1, 2, 0)).all()
    assert (pixels[:, 9, -1] == 0).all(), "clear between the images"


def test_strips_of_large_images_are_small() -> None:
    given = np.random.default_rng(0).integers(0, 256, (4, 3, 224, 448), dtype=np.uint8)
    (strip,) = class_strips(given, [0] * 4)
    with Image.open(io.BytesIO(strip.png)) as picture:
        assert picture.height == STRIP_HEIGHT
        assert picture.width == 4 * 2 * STRIP_HEIGHT + 3 * 3


@pytest.mark.parametrize("classes", [MAX_CLASSES, MAX_CLASSES + 1, 1000])
def test_at_most_twenty_strips(classes: int) -> None:
    assert len(class_strips(images(classes), range(classes))) <= MAX_CLASSES
