"""Who answered what: confusion and per-class rates, counted again from the stored predictions."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nayer_edge.errors import IntegrityError

from ..measurements import NO_ANSWER

TEACHER = "teacher"


@dataclass(frozen=True)
class Predictions:
    """The first choices of every model on the same n images.

    Attributes:
        truth: (n,), what counts as right: the label, or on synthetic images the teacher's prediction.
        labelled: the truth is the label.
        answers: model → (n,), its top-1 class, or -1 where its output is not finite.
        classes: their names.
    """

    truth: np.ndarray
    labelled: bool
    answers: Mapping[str, np.ndarray]
    classes: Sequence[str]

    def confusion(self, name: str) -> np.ndarray:
        """(K, K), images by truth (rows) and by the model's answer (columns)."""
        side = len(self.classes)
        answered = self.answers[name] >= 0
        pairs = self.truth[answered].astype(np.int64) * side + self.answers[name][answered]
        return np.bincount(pairs, minlength=side * side).reshape(side, side)

    def mistakes(self, name: str, most: int) -> list[dict[str, Any]]:
        """The most frequent wrong predictions: truth, prediction, images, and how many of the class there are."""
        answers = self.answers[name]
        wrong = answers != self.truth
        # Pairs that occur, not all K² of them: there may be very many classes.
        pairs, images = np.unique(np.stack([self.truth[wrong], answers[wrong]], axis=1), axis=0, return_counts=True)
        of_class = np.bincount(self.truth, minlength=len(self.classes))
        return [
            {
                "truth": self.classes[pairs[place, 0]],
                "answer": "output not finite" if pairs[place, 1] < 0 else self.classes[pairs[place, 1]],
                "images": int(images[place]),
                "of": int(of_class[pairs[place, 0]]),
            }
            for place in np.argsort(-images, kind="stable")[:most]
        ]

    def per_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """For each class: its images, each model's rate of right answers, and how the last differs from the first.

        Rates are fractions, None for a class without images. The largest losses come first; ties in the order of
        the classes.
        """
        side = len(self.classes)
        images = np.bincount(self.truth, minlength=side)
        hits = {name: np.bincount(self.truth[self.answers[name] == self.truth], minlength=side) for name in names}
        rows = []
        for number, label in enumerate(self.classes):
            count = int(images[number])
            rates = [int(hits[name][number]) / count if count else None for name in names]
            first, last = rates[0], rates[-1]
            change = None if first is None or last is None else last - first
            rows.append({"label": label, "images": count, "rates": rates, "change": change})
        return sorted(rows, key=lambda row: 0.0 if row["change"] is None else row["change"])


def read_predictions(path: Path, classes: Sequence[str]) -> Predictions:
    """Reads `predictions.npz`.

    Raises:
        IntegrityError: it is damaged, or holds other classes or sizes than its run.
    """
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("It is a bare array.")
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} is not readable as predictions.", why=f"{error}") from error
    # Each row has the classes of one image, the likeliest first.
    answers = {name: array[:, 0] for name, array in arrays.items() if array.ndim == 2 and array.dtype.kind in "iu"}
    labels = arrays.get("labels")
    if TEACHER not in answers:
        raise IntegrityError(f"{path} holds no predictions of the teacher.")
    truth = answers[TEACHER] if labels is None else labels
    for name, found in (*answers.items(), ("labels", truth)):
        if found.shape != truth.shape or found.dtype.kind not in "iu" or found.size == 0:
            raise IntegrityError(f"{path} holds '{name}' of shape {found.shape}, not one class for each image.")
        if int(found.min()) < (0 if found is truth else NO_ANSWER) or int(found.max()) >= len(classes):
            raise IntegrityError(f"{path} holds a class in '{name}' that is none of the {len(classes)}.")
    return Predictions(truth, labels is not None, answers, classes)
