"""The gate's promise, end to end through the command line: a worse model does not ship unnoticed, a good one ships.

A run with a good student is exported, validated and gated; then one layer of its INT8 model is damaged, with and
without the hashes brought up to date, and then it is exported anew. The student is trained on labelled images, which
takes seconds where distilling takes a minute; a slow test repeats it all with the real digits recipe.
"""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nayer_edge.config import Teach
from nayer_edge.errors import EXIT_FAILED, EXIT_INTEGRITY, EXIT_OK
from nayer_edge.pipelines.measurements import REPORT_PATH
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.pipelines.run import run_recipe
from nayer_edge.storage.files import sha256_of
from nayer_edge.storage.run_folder import RunFolder

INT8 = "export/student.int8.cpu.onnx"
Invoke = Callable[..., Any]


def bring_manifest_up_to_date(root: Path, *names: str) -> None:
    """What someone does who wants an altered file to look as if it had been made so."""
    run = RunFolder.open(root)
    for name in names:
        facts = {"sha256": sha256_of(root / name), "bytes": (root / name).stat().st_size}
        run.manifest.files[name] = run.manifest.files[name].model_copy(update=facts)
    run.save()


def teach_the_student(root: Path) -> None:
    """Puts a student that was trained on labels in the place of the one that was distilled for an instant."""
    from nayer_edge.data import datasets as data
    from nayer_edge.models.load import load_classifier, save_classifier
    from nayer_edge.runtime import compute
    from nayer_edge.train_teacher import teach

    path = root / "student" / "student.safetensors"
    student = load_classifier(path)
    images = data.load("digits", "train", student.spec, student.classes)
    settings = Teach(data="digits", epochs=5, batch=32, lr=0.1, augment={"pad": 1, "flip": False})
    teach(student, images, settings, compute.choose("cpu", "fp32"), seed=0)
    save_classifier(student.cpu(), path, {})
    bring_manifest_up_to_date(root, "student/student.safetensors", "student/student.json")


@pytest.fixture(scope="module")
def good(tiny_run: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A run whose student is good, exported and validated. Read only: copy it before changing anything."""

    def make(folder: Path) -> None:
        root = shutil.copytree(tiny_run, folder / "digits")
        teach_the_student(root)
        held = RunFolder.open(root).manifest.recipe
        # The tiny run's generator draws poor images to calibrate with; every layer is quantized all the same.
        held["export"] |= {"max_drop": None, "calibration_images": 100}
        run_recipe(recipe_of(held, root), root, last="validate")

    return once("release", make) / "digits"


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "runs" / "digits"))


def damage(root: Path) -> None:
    """One layer's weight scale is four times what it should be; the file stays a valid model."""
    model = onnx.load(root / INT8)
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    scales = [
        node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    ]
    chosen = scales[len(scales) // 2]
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == chosen]
    tensor.CopyFrom(numpy_helper.from_array(np.float32(4) * numpy_helper.to_array(tensor), chosen))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, root / INT8)


def test_a_good_release_passes(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    assert invoke("validate", run, "--data", "digits").code == EXIT_OK
    answer = invoke("gate", run, "--junit", tmp_path / "junit.xml", "--json-out", tmp_path / "verdict.json", "--json")
    assert answer.code == EXIT_OK, answer.out + answer.err
    assert json.loads(answer.out) == json.loads((tmp_path / "verdict.json").read_text())
    assert ET.parse(tmp_path / "junit.xml").getroot().get("failures") == "0"
    assert RunFolder.open(run).problems() == []


def test_a_damaged_model_is_measured_and_fails(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    before = json.loads((run / REPORT_PATH).read_text())
    damage(run)
    bring_manifest_up_to_date(run, INT8)
    assert invoke("gate", run).code == EXIT_INTEGRITY, "the report still speaks of the file before"
    assert invoke("validate", run).code == EXIT_OK
    report = json.loads((run / REPORT_PATH).read_text())
    old, new = ({a["name"]: a for a in values["artifacts"]} for values in (before, report))
    assert new["int8.cpu"]["sha256"] == sha256_of(run / INT8) != old["int8.cpu"]["sha256"]
    assert new["int8.cpu"]["top1"] < old["int8.cpu"]["top1"] - 0.03, "validate measures the damage"
    assert new["fp32"]["top1"] == old["fp32"]["top1"]
    answer = invoke("gate", run, "--junit", tmp_path / "junit.xml", "--json")
    assert answer.code == EXIT_FAILED
    value = json.loads(answer.out)
    assert value["verdict"] == "fail"
    (drop,) = [check for check in value["checks"] if check["name"] == "accuracy_drop_vs_fp32"]
    assert drop["verdict"] == "fail"
    assert drop["bound"] > drop["limit"]
    failures = [f.get("message") for f in ET.parse(tmp_path / "junit.xml").getroot().iter("failure")]
    assert any("loses" in str(message) for message in failures)


def test_the_same_file_under_the_old_manifest_is_tampering(invoke: Invoke, run: Path) -> None:
    damage(run)
    for command in ("gate", "verify"):
        answer = invoke(command, run)
        assert answer.code == EXIT_INTEGRITY, command
        assert INT8 in answer.err + answer.out


@pytest.mark.slow
def test_a_harmless_export_passes(invoke: Invoke, run: Path) -> None:
    before = sha256_of(run / "export" / "student.fp32.onnx")
    values = json.loads((run / "manifest.json").read_text())
    values["recipe"]["export"]["opset"] = 21
    (run / "manifest.json").write_text(json.dumps(values))
    assert invoke("export", run, "--int8").code == EXIT_OK
    assert sha256_of(run / "export" / "student.fp32.onnx") != before, "another file"
    assert invoke("gate", run).code == EXIT_INTEGRITY, "and not measured yet"
    assert invoke("validate", run).code == EXIT_OK
    answer = invoke("gate", run)
    assert answer.code == EXIT_OK, answer.out + answer.err


@pytest.mark.slow
def test_the_same_of_a_distilled_student(invoke: Invoke, tmp_path: Path) -> None:
    """All of the above, in one test: the run takes minutes to make."""
    run_recipe(load_recipe("digits"), tmp_path / "digits", last="validate")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "digits", tmp_path / name / "digits"))

    test_a_good_release_passes(invoke, copy("good"), tmp_path)
    test_a_damaged_model_is_measured_and_fails(invoke, copy("damaged"), tmp_path)
    test_the_same_file_under_the_old_manifest_is_tampering(invoke, copy("tampered"))
    test_a_harmless_export_passes(invoke, copy("exported"))
