"""Confusion, mistakes and classes, against scikit-learn and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from nayer_edge.errors import IntegrityError
from nayer_edge.pipelines.report.predictions import Predictions, read_predictions

BARE = b"\x93NUMPY\x01\x00F\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }".ljust(79) + b"\n\x00"
"""an array that is in no archive"""
CLASSES = ["ant", "bee", "cat", "dog"]


def write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def drawn(count: int = 500) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    order = np.tile(np.arange(4, dtype=np.int32), (count, 1))
    ranks = {name: random.permuted(order, axis=1) for name in ("teacher", "x")}
    return {"labels": random.integers(0, 3, count).astype(np.int32), **ranks}


def test_confusion_is_scikit_learn_s(tmp_path: Path) -> None:
    arrays = drawn()
    found = read_predictions(write(tmp_path / "p.npz", **arrays), CLASSES)
    assert found.labelled
    expected = confusion_matrix(arrays["labels"], arrays["x"][:, 0], labels=range(4))
    assert (found.confusion("x") == expected).all()


def test_mistakes_are_the_largest_cells_off_the_diagonal(tmp_path: Path) -> None:
    found = read_predictions(write(tmp_path / "p.npz", **drawn()), CLASSES)
    counts = found.confusion("x")
    of = counts.sum(axis=1)
    pairs = [(t, a) for t, a in zip(*np.nonzero(counts), strict=True) if t != a]
    cells = sorted(((int(counts[t, a]), CLASSES[t], CLASSES[a], int(of[t])) for t, a in pairs), reverse=True)
    shown = found.mistakes("x", 5)
    assert [row["images"] for row in shown] == [cell[0] for cell in cells[:5]]
    assert {(row["images"], row["truth"], row["answer"], row["of"]) for row in found.mistakes("x", 99)} == set(cells)
    assert Predictions(found.truth, True, {"x": found.truth}, CLASSES).mistakes("x", 5) == []


def test_images_without_an_answer_are_wrong_and_of_no_class(tmp_path: Path) -> None:
    truth, answers = np.array([0, 0, 1, 2], np.int32), np.array([[0], [-1], [-1], [1]], np.int32)
    found = read_predictions(write(tmp_path / "p.npz", teacher=truth[:, None], x=answers), CLASSES)
    counts = found.confusion("x")
    assert (counts.sum(), counts[0, 0], counts[2, 1]) == (2, 1, 1)
    wrong = [(row["truth"], row["answer"]) for row in found.mistakes("x", 5)]
    assert sorted(wrong) == [("ant", "output not finite"), ("bee", "output not finite"), ("cat", "bee")]
    assert {row["label"]: row["rates"][0] for row in found.per_class(["x"])} == {
        "ant": 0.5, "bee": 0.0, "cat": 0.0, "dog": None,
    }  # fmt: skip


def test_classes_from_the_first_model_to_the_last() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 2])
    answers = {"teacher": np.array([0, 0, 0, 1, 1, 0, 2]), "int8": np.array([0, 1, 1, 1, 1, 1, 2])}
    rows = Predictions(truth, True, answers, CLASSES).per_class(["teacher", "int8"])
    assert [row["label"] for row in rows] == ["ant", "cat", "dog", "bee"], "the largest loss first"
    by_label = {row["label"]: row for row in rows}
    assert by_label["ant"] == {"label": "ant", "images": 4, "rates": [0.75, 0.25], "change": -0.5}
    assert by_label["bee"]["change"] == 0.5
    assert by_label["dog"] == {"label": "dog", "images": 0, "rates": [None, None], "change": None}


def test_without_labels_the_teacher_is_the_truth(tmp_path: Path) -> None:
    arrays = drawn()
    del arrays["labels"]
    found = read_predictions(write(tmp_path / "p.npz", **arrays), CLASSES)
    assert not found.labelled
    assert (found.truth == arrays["teacher"][:, 0]).all()


def test_very_many_classes_take_no_square_of_memory() -> None:
    truth = np.arange(1000)
    many = Predictions(truth, True, {"x": (truth + 1) % 100_000}, [str(n) for n in range(100_000)])
    assert len(many.mistakes("x", 12)) == 12
    assert len(many.per_class(["x"])) == 100_000


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"x": np.zeros((3, 1), "i4")}, "no predictions of the teacher"),
        ({"teacher": np.zeros((3, 1), "i4"), "x": np.zeros((2, 1), "i4")}, "not one class for each image"),
        ({"teacher": np.zeros((3, 1), "i4"), "labels": np.zeros(2, "i4")}, "not one class for each image"),
        ({"teacher": np.zeros((3, 1), "i4"), "labels": np.full(3, 4)}, "none of the 4"),
        ({"teacher": np.full((3, 1), -1)}, "none of the 4"),
        ({"teacher": np.zeros((0, 1), "i4")}, "not one class for each image"),
        ({"teacher": np.zeros((3, 1), "i4"), "labels": np.zeros(3)}, "not one class for each image"),
        ({"teacher": np.array([[None]], dtype=object)}, "not readable"),
    ],
)
def test_predictions_that_cannot_be(tmp_path: Path, arrays: dict[str, np.ndarray], why: str) -> None:
    with pytest.raises(IntegrityError, match=why):
        read_predictions(write(tmp_path / "p.npz", **arrays), CLASSES)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY", BARE])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.npz"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not readable as predictions"):
        read_predictions(path, CLASSES)


def test_an_altered_archive(tmp_path: Path) -> None:
    path = write(tmp_path / "p.npz", **drawn())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not readable as predictions"):
        read_predictions(path, CLASSES)
