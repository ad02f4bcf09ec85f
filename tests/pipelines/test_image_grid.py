"""Rows of synthetic images: which classes, which pixels, any channels, any names."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nayer_edge.pipelines.image_grid import (
    COLUMNS,
    MAX_CLASSES,
    ROW_HEIGHT,
    STRIP_HEIGHT,
    class_strips,
    plain_name,
    write_grid,
)


def images(count: int, channels: int = 1, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_a_row_shows_the_pixels_of_its_images(tmp_path: Path, channels: int) -> None:
    given = images(2, channels, 5, 9)
    write_grid(given, [0, 0], ["a"], tmp_path / "new" / "grid.png")
    grid = pixels(tmp_path / "new" / "grid.png")
    scale = ROW_HEIGHT // 5
    assert grid.shape[0] == scale * 5 + 2 * 6
    shown = given[:, :3] if channels in (3, 4) else given[:, :1].repeat(3, axis=1)
    right = grid.shape[1] - 6
    for image, left in zip(shown, (right - scale * 19, right - scale * 9), strict=True):
        enlarged = image.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
        assert (grid[6:-6, left : left + scale * 9] == enlarged).all()
    assert (grid[:, right - scale * 10 : right - scale * 9] == 255).all(), "a gap between the images"
    assert (grid[:, : right - scale * 19] < 128).any(), "the name stands before them"


def test_one_row_for_each_class_that_has_images(tmp_path: Path) -> None:
    heights = []
    for classes in (1, 2, 3):
        labels = [number % classes for number in range(30)]
        write_grid(images(30), labels, ["a", "b", "c", "never drawn"], tmp_path / "grid.png")
        heights.append(pixels(tmp_path / "grid.png").shape[0])
    assert set(np.diff(heights)) == {ROW_HEIGHT + 6}


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    write_grid(images(1, 3, 224, 448), [0], ["a"], tmp_path / "grid.png")
    assert pixels(tmp_path / "grid.png").shape[0] == ROW_HEIGHT + 2 * 6


def test_flat_images_do_not_make_a_huge_picture(tmp_path: Path) -> None:
    """Signals of one row of pixels are images, too."""
    write_grid(images(COLUMNS, 1, 1, 300), [0] * COLUMNS, ["a"], tmp_path / "grid.png")
    assert pixels(tmp_path / "grid.png").shape[1] < 2 * COLUMNS * 300
    write_grid(images(COLUMNS, 1, 1, 9), [0] * COLUMNS, ["a"], tmp_path / "grid.png")
    assert pixels(tmp_path / "grid.png").shape[0] == 2000 // (10 * 10 - 1) + 2 * 6


def test_equal_pictures_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_grid(images(20), [0, 1] * 10, ["x", "y"], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("猫", "class 7"),
        ("Käfer", "Kafer"),
        ("Ka\u0308fer", "Kafer"),
        ("Żółw", "class 7"),
        ("sea lion’s", "sea lion’s"),
        ("é" * 19, "e" * 17 + "…"),
        ("\ud800", "class 7"),
        ("\x1b[2J", "class 7"),
        ("$x_2$", "$x_2$"),
        ("%s", "%s"),
        ("x" * 1000, "x" * 17 + "…"),
        ("", ""),
    ],
)
def test_any_name(tmp_path: Path, name: str, plain: str) -> None:
    assert plain_name(name, 7) == plain
    write_grid(images(2), [0, 1], [name, "b"], tmp_path / "grid.png")
    assert pixels(tmp_path / "grid.png").shape[0] == 2 * (ROW_HEIGHT + 6) + 6


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_strips_hold_the_images(channels: int) -> None:
    given = images(25, channels, 5, 9)
    strips = class_strips(given, [0, 3] * 12 + [7])
    assert COLUMNS == 10
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
