"""`report.json` beside an independent recomputation, on a hold-out and on synthetic images."""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nayer_edge.config import InputSpec
from nayer_edge.data.datasets import digits
from nayer_edge.data.stream import ImageStream
from nayer_edge.errors import EXIT_USAGE, UsageError
from nayer_edge.pipelines.measurements import PREDICTIONS_PATH, REPORT_PATH, Dataset
from nayer_edge.pipelines.recipes.loading import recipe_of
from nayer_edge.pipelines.run import StepEvent, run_recipe
from nayer_edge.pipelines.schemas import load
from nayer_edge.pipelines.validation.validate import (
    BATCH_VALUES,
    batch_size,
    count_pairs,
    origin_of,
    ranked,
    run_over,
    same,
)
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.files import sha256_of
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

Invoke = Callable[..., Any]
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def report_of(root: Path) -> dict[str, Any]:
    return json.loads((root / REPORT_PATH).read_text(encoding="utf-8"))


def described(root: Path) -> dict[str, Any]:
    """What the report's data set is called, and how many images it has."""
    found = report_of(root)["dataset"]
    assert len(found["sha256"]) == 64
    return {key: found[key] for key in ("kind", "n", "name")}


def predictions_of(root: Path) -> dict[str, np.ndarray]:
    with np.load(root / PREDICTIONS_PATH, allow_pickle=False) as file:
        return dict(file)


def measured(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [artifact for artifact in report["artifacts"] if artifact["status"] == "measured"]


def assert_agrees(report: dict[str, Any], held: dict[str, np.ndarray]) -> None:
    """Every number of the report that predictions decide, counted image by image."""
    labels = held["labels"].tolist()
    first = {name: ranks[:, 0].tolist() for name, ranks in held.items() if name != "labels"}

    def top1(name: str) -> float:
        return sum(guess == label for guess, label in zip(first[name], labels, strict=True)) / len(labels)

    def agreement(name: str) -> float:
        return sum(a == b for a, b in zip(first[name], first["teacher"], strict=True)) / len(labels)

    def pairs(reference: str, name: str, chosen: int | None = None) -> dict[str, int]:
        counts = {"n": 0, "both_right": 0, "lost": 0, "gained": 0, "both_wrong": 0}
        for mine, other, label in zip(first[name], first[reference], labels, strict=True):
            if chosen is not None and label != chosen:
                continue
            counts["n"] += 1
            kind = {(1, 1): "both_right", (1, 0): "lost", (0, 1): "gained", (0, 0): "both_wrong"}
            counts[kind[other == label, mine == label]] += 1
        return counts

    assert report["dataset"]["n"] == len(labels)
    assert report["teacher"]["top1"] == pytest.approx(top1("teacher"))
    assert report["student"]["top1"] == pytest.approx(top1("student"))
    assert report["student"]["agreement"] == pytest.approx(agreement("student"))
    for artifact in measured(report):
        name = artifact["name"]
        assert artifact["top1"] == pytest.approx(top1(name))
        assert artifact["agreement"] == pytest.approx(agreement(name))
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(artifact["correct"]), np.uint8))
        assert bits[: len(labels)].tolist() == [
            guess == label for guess, label in zip(first[name], labels, strict=True)
        ]
        assert len(bits) - len(labels) < 8
        assert artifact["paired"] == {"vs_fp32": pairs("fp32", name), "vs_teacher": pairs("teacher", name)}
        assert artifact["paired_synthetic"] == {"vs_fp32": None, "vs_teacher": None}
        for number, each in enumerate(artifact["per_class"]):
            counts = pairs("fp32", name, number)
            assert each == {"label": CLASSES[number], **{key: counts[key] for key in ("n", "lost", "gained")}}


def test_the_report_is_what_the_predictions_say(tiny_run: Path) -> None:
    report, held = report_of(tiny_run), predictions_of(tiny_run)
    assert {artifact["name"] for artifact in measured(report)} == {"fp32", "int8.cpu"}
    assert held.keys() == {"labels", "teacher", "student", "fp32", "int8.cpu"}
    assert_agrees(report, held)


def test_the_labels_are_those_of_the_hold_out(tiny_run: Path) -> None:
    held, images = predictions_of(tiny_run), digits("holdout", InputSpec(channels=1, height=16, width=16))
    assert held["labels"].tolist() == images.labels.tolist()
    assert len(held["labels"]) == 600
    assert described(tiny_run) == {"kind": "holdout", "n": 600, "name": "digits (holdout)"}


def test_predictions_are_ranks(tiny_run: Path) -> None:
    for name, ranks in predictions_of(tiny_run).items():
        if name == "labels":
            continue
        assert ranks.shape == (600, 5)
        assert ranks.min() >= 0
        assert ranks.max() < 10
        assert all(len(set(row)) == 5 for row in ranks.tolist())


def test_the_report_follows_the_published_schema(tiny_run: Path) -> None:
    import jsonschema  # takes a second: not in every worker that collects this file

    report = report_of(tiny_run)
    jsonschema.validate(report, load("report"))
    assert report["schema"] == "nayer-edge/report/1"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report, "teacher": {"top1": 2.0, "params": 3}}, load("report"))


def test_files_hashes_and_sizes_are_true(tiny_run: Path) -> None:
    report = report_of(tiny_run)
    assert report["predictions_sha256"] == sha256_of(tiny_run / PREDICTIONS_PATH)
    for artifact in report["artifacts"]:
        path = tiny_run / artifact["file"]
        assert artifact["sha256"] == sha256_of(path)
        assert artifact["size_bytes"] == path.stat().st_size


def test_parameters_are_those_of_the_networks(tiny_run: Path) -> None:
    from safetensors.numpy import load_file

    report = report_of(tiny_run)
    for name in ("teacher", "student"):
        tensors = load_file(tiny_run / name / f"{name}.safetensors")
        trained = {
            key: value for key, value in tensors.items() if not key.endswith(("running_mean", "running_var", "tracked"))
        }
        assert report[name]["params"] == sum(value.size for value in trained.values())


def test_measurements_are_of_this_machine(tiny_run: Path) -> None:
    for artifact in measured(report_of(tiny_run)):
        assert 0 < artifact["latency_ms"]["p50"] <= artifact["latency_ms"]["p95"]
        assert artifact["threads"] >= 1
        assert artifact["precision_verified"]
        if artifact["name"] == "fp32":
            assert artifact["speedup_vs_fp32"] == pytest.approx(1)
            assert artifact["max_abs_diff"] < 1e-3
            assert artifact["int8_coverage"] is None
        else:
            assert artifact["int8_coverage"] == 1
            assert artifact["max_abs_diff"] > 1e-6, "INT8 is not FP32"


def test_synthetic_images_have_no_truth(invoke: Invoke, finished: Path) -> None:
    import jsonschema  # takes a second: not in every worker that collects this file

    values = json.loads((finished / MANIFEST).read_text())["recipe"]
    values["validate"] = {"data": None, "synthetic_images": 60}
    run_recipe(recipe_of(values, finished), finished, last="validate")
    report, held = report_of(finished), predictions_of(finished)
    jsonschema.validate(report, load("report"))
    assert described(finished) == {"kind": "synthetic", "n": 60, "name": "drawn from the trained generator"}
    assert "labels" not in held
    assert report["teacher"]["top1"] is None
    assert report["student"]["top1"] is None
    for artifact in measured(report):
        assert artifact["top1"] is None
        assert artifact["paired"] == {"vs_fp32": None, "vs_teacher": None}
        assert artifact["per_class"] == []
        agreed = held[artifact["name"]][:, 0] == held["teacher"][:, 0]
        assert artifact["agreement"] == pytest.approx(agreed.mean())
        fp32 = held["fp32"][:, 0] == held["teacher"][:, 0]
        assert artifact["paired_synthetic"] == {
            key: {
                "n": 60,
                "both_right": int((agreed & reference).sum()),
                "lost": int((reference & ~agreed).sum()),
                "gained": int((agreed & ~reference).sum()),
                "both_wrong": int((~agreed & ~reference).sum()),
            }
            for key, reference in (("vs_fp32", fp32), ("vs_teacher", np.ones(60, bool)))
        }

    answer = invoke("gate", finished, "--json")
    checks = json.loads(answer.out)["checks"]
    assert answer.code == 1
    for check in checks:
        if check["name"].startswith("accuracy"):
            assert check["synthetic"]
            assert "synthetic" in check["detail"]
    assert "synthetic" in invoke("gate", finished).out
    assert invoke("report", finished).code == 0
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "synthetic" in page
    number = next(i for i, artifact in enumerate(report["artifacts"]) if artifact["name"] == "int8.cpu")
    assert f'data-drop="/artifacts/{number}/paired_synthetic/vs_fp32"' in page
    assert "Paired counts, image by image, on synthetic images" in page


def test_the_command_chooses_the_images(invoke: Invoke, finished: Path) -> None:
    values = json.loads((finished / MANIFEST).read_text())
    assert values["recipe"]["validate"]["data"] == "digits"
    assert invoke("validate", finished, "--synthetic").code == 0
    assert report_of(finished)["dataset"]["kind"] == "synthetic"
    assert report_of(finished)["dataset"]["n"] == values["recipe"]["validate"]["synthetic_images"]
    assert invoke("validate", finished, "--data", "digits").code == 0
    assert report_of(finished)["dataset"]["kind"] == "holdout"
    run = RunFolder.open(finished)
    assert run.problems() == []
    assert run.manifest.steps["student"].digest == values["steps"]["student"]["digest"]


def test_synthetic_images_are_drawn_alike_every_time(finished: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    values = json.loads((finished / MANIFEST).read_text())["recipe"]
    values["validate"] = {"data": None, "synthetic_images": 30}
    for root in (finished, other):
        run_recipe(recipe_of(values, root), root, last="validate")
    assert sha256_of(finished / PREDICTIONS_PATH) == sha256_of(other / PREDICTIONS_PATH)


# What the hold-out is


def facts_of(root: Path) -> dict[str, Any]:
    """What the report says about the hold-out, beside its name and size."""
    keys = ("split", "matched_by", "left_out", "duplicates", "contradictory", "doubts")
    return {key: report_of(root)["dataset"][key] for key in keys}


def write_digits(path: Path, order: Sequence[int] = range(10), count: int = 600) -> None:
    """The digits' hold-out as an npz whose label numbers stand in another order."""
    found = digits("holdout", InputSpec(channels=1, height=16, width=16))
    labels = np.array(order)[found.labels.numpy()]
    np.savez(path, images=found.images.numpy()[:count], labels=labels[:count])


def test_the_report_says_how_labels_were_assigned(tiny_run: Path) -> None:
    assert facts_of(tiny_run) == {
        "split": "test", "matched_by": "number", "left_out": [], "duplicates": 0, "contradictory": 0, "doubts": [],
    }  # fmt: skip


def test_a_report_of_an_earlier_version_is_read() -> None:
    old = {"kind": "holdout", "n": 600, "name": "digits (holdout)", "sha256": "0" * 64}
    assert Dataset.model_validate(old).matched_by is None


def test_labels_in_another_order_stop_the_measurement(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    before = (finished / MANIFEST).read_bytes()
    alphabetical = [sorted(CLASSES).index(name) for name in CLASSES]
    for name, order in (("alphabetical", alphabetical), ("two", [1, 0, *range(2, 10)]), ("shift", [*range(1, 10), 0])):
        write_digits(tmp_path / f"{name}.npz", order)
        answer = invoke("validate", finished, "--data", tmp_path / f"{name}.npz")
        assert answer.code == EXIT_USAGE, name
        for words in (f"do not match the labels of {name}.npz", "normalisation", "channels", "--allow-implausible"):
            assert words in " ".join(answer.err.split()), name
        assert (finished / MANIFEST).read_bytes() == before
    answer = invoke("validate", finished, "--data", tmp_path / "two.npz", "--allow-implausible")
    assert answer.code == 0, answer.err
    (doubt,) = facts_of(finished)["doubts"]
    assert "'zero' → 'one'" in doubt
    assert "another order" in answer.out
    assert "The hold-out is doubtful" in " ".join(invoke("gate", finished).out.split())
    assert invoke("validate", finished).code == 0, "the choice stays while the images do"
    write_digits(tmp_path / "right.npz")
    assert invoke("validate", finished, "--data", tmp_path / "right.npz").code == 0
    write_digits(tmp_path / "two.npz", [1, 0, *range(2, 10)])
    assert invoke("validate", finished, "--data", tmp_path / "two.npz").code == EXIT_USAGE, "and not beyond them"


def test_a_split_is_chosen(invoke: Invoke, finished: Path) -> None:
    assert invoke("validate", finished, "--data", "digits", "--split", "train").code == 0
    assert (described(finished)["n"], facts_of(finished)["split"]) == (1197, "train")
    answer = invoke("validate", finished, "--data", "digits", "--split", "validation")
    assert answer.code == EXIT_USAGE
    assert "test, train" in answer.err
    assert invoke("validate", finished, "--synthetic", "--split", "test").code == EXIT_USAGE
    assert invoke("validate", finished, "--data", "digits").code == 0
    assert facts_of(finished)["split"] == "test"


def test_the_choice_of_a_fit_holds_for_its_images_only(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    for name in ("small", "other"):
        np.savez(tmp_path / f"{name}.npz", images=pixels(20, (8, 8)), labels=np.arange(20) % 10)
    words = ("--data", tmp_path / "small.npz", "--allow-implausible")
    assert invoke("validate", finished, *words, "--fit", "stretch").code == 0
    report = json.loads((finished / REPORT_PATH).read_text())
    assert report["dataset"]["fit"] == "stretch"
    answer = invoke("validate", finished, "--data", tmp_path / "other.npz", "--allow-implausible")
    assert answer.code == EXIT_USAGE
    assert "--fit" in answer.err


def test_copies_and_files_left_out_are_counted(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("zero/a", "zero/b", "nine/c", "zero/.hidden/a", "zero/notes.txt")):
        path = tmp_path / "held" / f"{name}.png" if "txt" not in name else tmp_path / "held" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # a, b and c are the same picture, c under another label; what is not read is another one.
        Image.fromarray(pixels(2)[number // 3]).save(path, "PNG")
    answer = invoke("validate", finished, "--data", tmp_path / "held")
    assert answer.code == 0, answer.err
    assert facts_of(finished) == {
        "split": None,
        "matched_by": "name",
        "left_out": [
            {"reason": "hidden", "count": 1, "first": "zero/.hidden/a.png"},
            {"reason": "not a picture (.txt)", "count": 1, "first": "zero/notes.txt"},
        ],
        "duplicates": 2,
        "contradictory": 3,
        "doubts": [],
    }
    assert "zero/.hidden/a.png" in answer.out
    assert "exact copies 2" in answer.out
    assert "2 of the 3 images are exact copies of others" in " ".join(invoke("gate", finished).out.split())
    assert invoke("report", finished).code == 0
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "zero/.hidden/a.png" in page
    assert "assigned to classes by <bdi>name</bdi>" in page


# Hold-outs of the user


def pixels(count: int = 20, shape: tuple[int, ...] = (16, 16)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def test_an_npz_of_the_user(invoke: Invoke, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    labels = np.arange(20) % 10
    np.savez(tmp_path / "held.npz", images=pixels(), labels=labels)
    answer = invoke("validate", finished, "--data", "held.npz", "--allow-implausible")
    assert answer.code == 0, answer.err
    report, held = report_of(finished), predictions_of(finished)
    assert described(finished) == {"kind": "holdout", "n": 20, "name": "held.npz"}
    assert held["labels"].tolist() == labels.tolist()
    assert_agrees(report, held)


def test_a_folder_of_class_folders(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("nine", "zero")):
        (tmp_path / "held" / name).mkdir(parents=True)
        for index, image in enumerate(pixels(2 + number)):
            Image.fromarray(image).save(tmp_path / "held" / name / f"{index}.png")
    assert invoke("validate", finished, "--data", tmp_path / "held").code == 0
    assert described(finished) == {"kind": "holdout", "n": 5, "name": "held"}
    assert sorted(predictions_of(finished)["labels"].tolist()) == [0, 0, 0, 9, 9]
    assert_agrees(report_of(finished), predictions_of(finished))


def bad(folder: Path) -> dict[str, Path]:
    """Hold-outs that cannot be used, by what is wrong with them."""
    labels = np.arange(20) % 10
    np.savez(folder / "size.npz", images=pixels(20, (8, 8)), labels=labels)
    np.savez(folder / "float.npz", images=pixels().astype(np.float32), labels=labels)
    np.savez(folder / "outside.npz", images=pixels(), labels=labels + 1)
    np.savez(folder / "negative.npz", images=pixels(), labels=labels - 1)
    np.savez(folder / "short.npz", images=pixels(), labels=labels[:-1])
    np.savez(folder / "none.npz", images=pixels(0), labels=labels[:0])
    np.savez(folder / "names.npz", pictures=pixels(), labels=labels)
    np.savez(folder / "object.npz", images=np.array([object()]), labels=np.array([0]))
    np.savez(folder / "real.npz", images=pixels(), labels=labels / 2)
    (folder / "garbage.npz").write_bytes(b"garbage")
    (folder / "garbage.parquet").write_bytes(b"garbage")
    (folder / "empty").mkdir()
    (folder / "unknown" / "ten").mkdir(parents=True)
    (folder / "bare" / "nine").mkdir(parents=True)
    (folder / "broken" / "nine").mkdir(parents=True)
    (folder / "broken" / "nine" / "1.png").write_bytes(b"no picture")
    (folder / "text.txt").write_text("text")
    return {path.name: path for path in sorted(folder.iterdir())}


def test_hold_outs_that_cannot_be_used(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    before = RunFolder.open(finished).manifest
    found = bad(tmp_path / "bad")
    assert len(found) == 16
    for name, path in {**found, "nowhere": tmp_path / "nowhere"}.items():
        answer = invoke("validate", finished, "--data", path)
        assert answer.code == EXIT_USAGE, name
        assert "Traceback" not in answer.err, name
        assert name.split(".")[0] in answer.err, name
        assert RunFolder.open(finished).manifest == before, f"{name}: what was measured before is kept"
    assert RunFolder.open(finished).problems() == []
    assert invoke("gate", finished).code == 1


# The small functions


def test_ranks_break_ties_by_class() -> None:
    logits = np.array([[0.0, 2.0, 2.0, 1.0, 2.0, -1.0, 0.5]])
    assert ranked(logits).tolist() == [[1, 2, 4, 3, 6]]
    assert ranked(np.array([[1.0, 3.0]])).tolist() == [[1, 0]]
    assert ranked(np.array([[np.nan, np.nan], [2.0, np.inf], [2.0, 1.0]])).tolist() == [[-1, -1], [-1, -1], [0, 1]]


def test_pairs() -> None:
    reference = np.array([True, True, True, False, False, False])
    artifact = np.array([True, False, False, True, False, False])
    counts = count_pairs(reference, artifact)
    assert (counts.n, counts.both_right, counts.lost, counts.gained, counts.both_wrong) == (6, 1, 2, 1, 2)


def test_same() -> None:
    assert same(np.array([[1, 2], [3, 4]]), np.array([[1, 9], [4, 3]])) == 0.5


# Large hold-outs


class Counting:
    """A network that answers by the pixels, and keeps account of what it was given at once."""

    name, provider, threads = "counting", "none", 1

    def __init__(self, shift: float = 0.0) -> None:
        self.shift, self.largest, self.calls = shift, 0, 0

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def infer(self, images: np.ndarray) -> np.ndarray:
        self.largest, self.calls = max(self.largest, len(images)), self.calls + 1
        return images.mean(axis=(2, 3))[:, :3] + np.float32([self.shift, 0, 0])


def test_one_pass_in_batches_gives_what_one_array_would() -> None:
    """Ranks, differences and digest do not depend on the size of the batches."""
    pixels = np.random.default_rng(0).integers(0, 256, (130, 3, 4, 4), dtype=np.uint8)
    labels = np.arange(130) % 3
    live: list[int] = []

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, 130, min(size, 50)):
            live.append(start)
            yield pixels[start : start + min(size, 50)]

    runners = {"student": Counting(), "fp32": Counting(0.25)}
    stream = ImageStream("x", labels, batches)
    seen = run_over(runners, stream, (3, 4, 4), 3, Silent())
    assert live == [0, 50, 100]
    assert [runner.largest for runner in runners.values()] == [50, 50]
    logits = (pixels / np.float32(255)).mean(axis=(2, 3))
    assert (seen.ranks["student"][:, 0] == logits.argmax(axis=1)).all()
    assert seen.max_abs_diff["fp32"] == pytest.approx(0.25)
    once = ImageStream("x", labels, lambda _size: iter([pixels]))
    assert run_over(runners, once, (3, 4, 4), 3, Silent()).sha256 == seen.sha256
    other = ImageStream("x", labels[::-1], lambda _size: iter([pixels]))
    assert run_over(runners, other, (3, 4, 4), 3, Silent()).sha256 != seen.sha256


@pytest.mark.parametrize("count", [129, 131])
def test_images_that_change_while_they_are_read(count: int) -> None:
    stream = ImageStream("x", np.zeros(130, int), lambda _size: iter([np.zeros((count, 3, 4, 4), np.uint8)]))
    with pytest.raises(UsageError, match="changed while it was read"):
        run_over({"student": Counting()}, stream, (3, 4, 4), 3, Silent())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 224, 224), (3, 4096, 4096)])
def test_a_batch_fits_whatever_the_size(shape: tuple[int, int, int]) -> None:
    assert 1 <= batch_size(shape) <= 256
    assert batch_size(shape) == 1 or batch_size(shape) * math.prod(shape) <= BATCH_VALUES
    assert batch_size(shape) == 256 or (batch_size(shape) + 1) * math.prod(shape) > BATCH_VALUES, (
        "no smaller than need be"
    )


def test_answers_that_are_no_numbers_are_counted() -> None:
    class Broken(Counting):
        def infer(self, images: np.ndarray) -> np.ndarray:
            logits = super().infer(images)
            logits[0, 1] = np.nan
            return logits

    stream = ImageStream("x", np.zeros(6, int), lambda _size: iter([np.zeros((3, 3, 4, 4), np.uint8)] * 2))
    seen = run_over({"student": Counting(), "int8.cpu": Broken()}, stream, (3, 4, 4), 3, Silent())
    assert seen.not_finite == {"student": 0, "int8.cpu": 2}
    assert seen.max_abs_diff == {"student": 0.0, "int8.cpu": None}
    # All images are of class 0, and so would be an answer sorted from NaN.
    assert seen.ranks["int8.cpu"][:, 0].tolist() == [-1, *seen.ranks["student"][1:3, 0]] * 2


@pytest.mark.slow
def test_a_large_set_passes_in_bounded_memory(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    """900 images through the whole command: what Python and numpy hold at most is less than half of the set as the
    networks see it (float32), and does not grow with it."""
    peaks = []
    for count in (300, 900):
        np.savez_compressed(tmp_path / f"{count}.npz", images=pixels(count), labels=np.arange(count) % 10)
        tracemalloc.start()
        answer = invoke("validate", finished, "--data", tmp_path / f"{count}.npz", "--allow-implausible")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert answer.code == 0, answer.err
        assert described(finished)["n"] == count
    assert peaks[1] < peaks[0] + 900 * 16 * 16 * 4 / 2
    assert predictions_of(finished)["int8.cpu"].shape == (900, 5)
    assert_agrees(report_of(finished), predictions_of(finished))


# A hold-out is what is in it, not where it lies


def test_a_changed_hold_out_is_noticed_and_a_moved_one_is_not_measured_again(finished: Path, tmp_path: Path) -> None:
    def validated(path: Path) -> str:
        values = json.loads((finished / MANIFEST).read_text())["recipe"]
        values["validate"]["data"] = str(path)
        events: list[StepEvent] = []
        run_recipe(recipe_of(values, finished), finished, last="validate", on_event=events.append)
        return next(event.state for event in events if event.step.name == "validate" and event.state != "started")

    def write(path: Path, seed: int) -> Path:
        for number in range(3):
            (path / "zero").mkdir(parents=True, exist_ok=True)
            image = np.random.default_rng(seed + number).integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(image).save(path / "zero" / f"{number}.png", compress_level=0)
        return path

    held = write(tmp_path / "held", 0)
    assert validated(held) == "finished"
    assert validated(held) == "kept"
    write(held, 7)
    assert validated(held) == "finished", "other pixels under the same names, of the same size"
    (held / "zero" / "0.png").rename(held / "zero" / "9.png")
    assert validated(held) == "finished"
    moved = held.rename(tmp_path / "moved")
    assert validated(moved) == "kept"
    shutil.rmtree(moved)
    assert validated(moved) == "kept", "what is not at hand counts as what it was"


def test_no_path_of_this_machine_travels_with_a_run(
    invoke: Invoke, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "someone"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for place in (home / "held.npz", tmp_path / "beside.npz"):
        np.savez(place, images=pixels(), labels=np.arange(20) % 10)
        assert invoke("validate", finished, "--data", place, "--allow-implausible").code == 0
        assert "someone" not in (finished / MANIFEST).read_text()
        assert str(tmp_path) not in (finished / MANIFEST).read_text()
        assert invoke("validate", finished).code == 0, "the manifest's own path is found again"
        assert described(finished)["n"] == 20
    assert not [path for path in finished.rglob("*.json") if str(tmp_path) in path.read_text()]


@pytest.mark.parametrize(
    ("reserved", "drawn", "generator", "name"),
    [
        (2000, 0, True, "reserved during distillation"),
        (1400, 600, True, "1,400 reserved during distillation, 600 drawn from the trained generator"),
        (1400, 600, False, "1,400 reserved during distillation, 600 drawn procedurally"),
        (0, 2000, True, "drawn from the trained generator"),
    ],
)
def test_synthetic_images_are_named_after_where_they_come_from(
    reserved: int, drawn: int, generator: bool, name: str
) -> None:
    assert origin_of(reserved, drawn, generator=generator) == name
