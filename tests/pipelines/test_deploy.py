"""What the run folder ships: the same function as the student, sound metadata, nothing of the machine."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from nayer_edge.config import InputSpec
from nayer_edge.data.datasets import digits
from nayer_edge.export.targets import TARGETS
from nayer_edge.models.load import load_classifier
from nayer_edge.pipelines.deploy import FP32, SyntheticSource, _unused, int8_file
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.runtime.progress import Silent
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

CHECKOUT = Path(__file__).resolve().parents[2]
CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GRAPHS = (FP32, int8_file("cpu"))


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (only,) = session.get_inputs()
    (logits,) = session.run(None, {only.name: images})
    return np.asarray(logits)


def images(count: int = 50) -> np.ndarray:
    spec = InputSpec(channels=1, height=16, width=16)
    return digits("holdout", spec).images[:count].numpy().astype(np.float32) / 255


@torch.no_grad()
def test_the_graph_is_the_student(tiny_run: Path) -> None:
    student = load_classifier(tiny_run / "student" / "student.safetensors")
    wanted = student(torch.from_numpy(images())).numpy()
    np.testing.assert_allclose(run_onnx(tiny_run / FP32, images()), wanted, atol=1e-4)
    for single in (images(1), images(3)):
        assert run_onnx(tiny_run / FP32, single).shape == (len(single), 10), "any batch"


@torch.no_grad()
def test_normalisation_is_in_the_graph(tiny_run: Path) -> None:
    """Raw images in [0, 1] go in; what the network itself sees is (x − 0.5) / 0.5."""
    student = load_classifier(tiny_run / "student" / "student.safetensors")
    assert (student.spec.mean, student.spec.std) == ((0.5,), (0.5,))
    by_hand = student.backbone(torch.from_numpy((images() - 0.5) / 0.5)).numpy()
    np.testing.assert_allclose(run_onnx(tiny_run / FP32, images()), by_hand, atol=1e-4)
    not_normalised = student.backbone(torch.from_numpy(images())).numpy()
    assert np.abs(not_normalised - by_hand).max() > 1e-3, "it would make a difference"


@pytest.mark.parametrize("name", GRAPHS)
def test_metadata_says_what_the_graph_eats_and_answers(tiny_run: Path, name: str) -> None:
    model = onnx.load(tiny_run / name)
    onnx.checker.check_model(model, full_check=True)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["nayer_edge.classes"]) == CLASSES
    given = InputSpec.model_validate_json(facts["nayer_edge.input"])
    assert given == InputSpec(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))
    assert facts["nayer_edge.model"] == "nayer:resnet8"
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    (only,) = model.graph.input
    shape = only.type.tensor_type.shape.dim
    assert shape[0].dim_param, "the batch is dynamic and has a name"
    assert [dim.dim_value for dim in shape[1:]] == [1, 16, 16]


@pytest.mark.parametrize("name", GRAPHS)
def test_one_file_without_external_data(tiny_run: Path, name: str) -> None:
    model = onnx.load(tiny_run / name, load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {path.suffix for path in (tiny_run / "export").iterdir()} == {".onnx", ".json"}


def test_the_quantized_graph_is_quantized(tiny_run: Path) -> None:
    kinds = {node.op_type for node in onnx.load(tiny_run / int8_file("cpu")).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert (tiny_run / int8_file("cpu")).stat().st_size < 0.5 * (tiny_run / FP32).stat().st_size
    record = json.loads((tiny_run / "export" / "quantization.json").read_text())
    assert record.keys() == {"cpu"}


def contents(path: Path) -> list[bytes]:
    """A file's bytes, those of an archive's members too, and base64 inside them decoded."""
    found = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found += [archive.read(name) for name in archive.namelist()]
    if path.suffix == ".html":
        text = found[0].decode()
        found += [base64.b64decode(part.split('"')[0]) for part in text.split("base64,")[1:]]
    return found


def test_nothing_says_where_it_was_made(tiny_run: Path) -> None:
    secrets = {str(CHECKOUT), str(tiny_run.parent), str(Path(torch.__file__).parents[1])}
    # A home folder of one letter, as containers have, would be found everywhere.
    secrets |= {home for home in (str(Path.home()),) if len(home) > 5}
    for path in tiny_run.rglob("*"):
        if path.is_file():
            for content in contents(path):
                for secret in secrets:
                    assert secret.encode() not in content, (path, secret)
                    assert secret.encode("utf-16-le") not in content, (path, secret)
                assert b"site-packages" not in content, path


def test_calibration_and_hold_outs_are_different_images(tiny_run: Path) -> None:
    run = RunFolder.open(tiny_run)
    recipe = recipe_of(run.manifest.recipe, run.root)
    source = SyntheticSource.open(*(run.artifact(name) for name in ("teacher", "lte", "student")), recipe, run)
    drawn = {name: source.draw(name, 20, Silent()) for name in ("calibration", "calibration hold-out", "validate")}
    seen: dict[bytes, str] = {}
    for name, batch in drawn.items():
        assert batch.shape == (20, 1, 16, 16)
        assert batch.min() >= 0
        assert batch.max() <= 1
        for image in batch:
            assert seen.setdefault(image.tobytes(), name) == name, "one image for two purposes"
        np.testing.assert_array_equal(source.draw(name, 20, Silent()), batch, "the same every time")
    bank = load_file(tiny_run / "bank.safetensors")
    banked = {(image.astype(np.float32) / 255).tobytes() for image in bank["images"]}
    assert not banked & set(seen), "nothing that was trained on calibrates or measures"


def test_calibration_images_are_class_balanced(tiny_run: Path) -> None:
    run = RunFolder.open(tiny_run)
    recipe = recipe_of(run.manifest.recipe, run.root)
    source = SyntheticSource.open(*(run.artifact(name) for name in ("teacher", "lte", "student")), recipe, run)
    _, labels = source.draw_labelled("calibration", 40, Silent())
    assert np.bincount(np.asarray(labels), minlength=10).tolist() == [4] * 10


def test_the_manifest_names_every_file(tiny_run: Path) -> None:
    run = RunFolder.open(tiny_run)
    assert run.unexpected_files() == []
    assert run.problems() == []
    assert MANIFEST not in run.manifest.files


def test_settings_that_a_runtimes_own_quantizer_does_not_use_are_named() -> None:
    given = load_recipe("digits", ["export.qat=true", "export.calibration_method=mse"])
    for name, target in TARGETS.items():
        by_itself = name in ("executorch", "litert")
        assert _unused(target, given) == (["qat", "calibration_method"] if by_itself else []), name
        assert _unused(target, load_recipe("digits")) == []
