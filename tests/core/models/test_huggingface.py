"""Image classifiers of transformers: from a folder, rebuilt without it, and with inputs from their image processors."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nayer_edge.config import InputSpec, Teacher
from nayer_edge.errors import UsageError
from nayer_edge.models import huggingface, published
from nayer_edge.models.classifier import Classifier
from nayer_edge.models.load import build_classifier, load_classifier, load_teacher, save_classifier, untrained_teacher
from nayer_edge.models.names import parse
from nayer_edge.runtime.compute import seeded

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")

CLASSES = ("tench", "goldfish", "été")
SPEC = InputSpec(channels=3, height=32, width=32)


def transformers() -> Any:
    """The library. Not imported at the top: that takes seconds in every worker that collects this file."""
    return importlib.import_module("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet with random weights and BatchNorm statistics, saved by transformers with its image processor."""
    path = tmp_path_factory.mktemp("models") / "tiny-resnet"
    config = transformers().ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3,
        id2label=dict(enumerate(CLASSES)), label2id={label: n for n, label in enumerate(CLASSES)},
    )  # fmt: skip
    with seeded(0):
        network = transformers().ResNetForImageClassification(config)
        network.train()(torch.rand(8, 3, 32, 32))
    network.eval().save_pretrained(path)
    processor = transformers().ConvNextImageProcessor(
        size={"shortest_edge": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    processor.save_pretrained(path)
    return path


def teacher_of(folder: Path, **changes: Any) -> Teacher:
    return Teacher(model=f"hf:{folder}", classes=CLASSES, input=SPEC, **changes)


def loaded(config: Teacher) -> Classifier:
    return load_teacher(config, untrained_teacher(config))[0]


def test_a_folder_gives_the_logits_of_transformers(folder: Path) -> None:
    teacher = loaded(teacher_of(folder))
    images = torch.rand(4, *SPEC.shape)
    whole = transformers().AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), whole((images - 0.5) / 0.5).logits)
    assert teacher.model == "hf:tiny-resnet"


def test_a_card_rebuilds_it_without_the_folder(folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "gone"))
    teacher = loaded(teacher_of(mine))
    save_classifier(teacher, tmp_path / "t.safetensors", {})
    shutil.rmtree(mine)
    read = load_classifier(tmp_path / "t.safetensors")
    images = torch.rand(2, *SPEC.shape)
    assert torch.equal(read(images), teacher(images))
    assert read.identity == teacher.identity
    assert str(tmp_path) not in (tmp_path / "t.json").read_text()
    # And once more, from the copy.
    save_classifier(read, tmp_path / "again.safetensors", {})
    assert (tmp_path / "again.json").read_text() == (tmp_path / "t.json").read_text()


def test_a_student_of_the_same_kind_starts_untrained(folder: Path) -> None:
    spec = InputSpec(channels=4, height=20, width=28)
    student = build_classifier(f"hf:{folder}", spec, ("a", "b"), {"embedding_size": 6})
    assert student(torch.rand(2, *spec.shape)).shape == (2, 2)
    assert student.rebuild["config"]["id2label"] == {"0": "a", "1": "b"}
    assert student.rebuild["config"]["embedding_size"] == 6
    with pytest.raises(UsageError, match="has no wings"):
        build_classifier(f"hf:{folder}", spec, ("a", "b"), {"wings": 2})


def test_the_input_matches_the_processor(folder: Path) -> None:
    found, origin = published.input_of(f"hf:{folder}", None)
    assert origin == "the image processor of hf:tiny-resnet"
    assert found == {
        "channels": 3, "height": 32, "width": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    # Larger by the margin that it crops, so that only the processor's interpolation makes a difference.
    theirs = transformers().AutoImageProcessor.from_pretrained(folder)
    flat = np.broadcast_to(image[0, 0], (64, 64, 3)).copy()
    pixels = theirs(images=flat, return_tensors="np")["pixel_values"][0]
    ours = (image[0, 0] / 255 - np.array(found["mean"])) / np.array(found["std"])
    np.testing.assert_allclose(pixels[:, 5, 5], ours, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # EfficientNet rescales to [-1, 1] if configured to.
        (
            lambda: transformers().EfficientNetImageProcessor(
                size={"height": 24, "width": 40}, crop_size={"height": 24, "width": 40},
                rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False,
            ),
            (24, 40, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ),
        (
            lambda: transformers().ViTImageProcessor(size={"height": 48, "width": 48}, do_normalize=False),
            (48, 48, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ),
    ],
)  # fmt: skip
def test_processors_of_other_kinds(make: Any, expected: tuple[Any, ...], folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "mine"))
    (mine / "preprocessor_config.json").unlink()
    make().save_pretrained(mine)
    found = huggingface.input_of(parse(f"hf:{mine}"))
    height, width, mean, std = expected
    assert (found["height"], found["width"]) == (height, width)
    assert found["mean"] == pytest.approx(mean, abs=1e-4)
    assert found["std"] == pytest.approx(std, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # By default, MobileViT's reverses the channels; a grey image does not show it.
        (lambda: transformers().MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size=32), "expects BGR"),
        (lambda: transformers().ViTImageProcessor(do_resize=False), "does not resize"),
        (lambda: transformers().ImageGPTImageProcessor(clusters=[[0.0, 0.0, 0.0]] * 2), "cannot read or use"),
    ],
)  # fmt: skip
def test_processors_that_need_a_decision(make: Any, message: str, folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "mine"))
    (mine / "preprocessor_config.json").unlink()
    make().save_pretrained(mine)
    with pytest.raises(UsageError, match=message) as caught:
        huggingface.input_of(parse(f"hf:{mine}"))
    assert caught.value.fix


def test_a_folder_without_a_processor(folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "mine"))
    (mine / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"no preprocessor_config\.json") as caught:
        huggingface.input_of(parse(f"hf:{mine}"))
    assert "[teacher.input]" in caught.value.fix


def test_class_names_in_another_order(folder: Path) -> None:
    config = teacher_of(folder)
    wrong = config.model_copy(update={"classes": ("goldfish", "tench", "été")})
    with pytest.raises(UsageError, match="in another order") as caught:
        loaded(wrong)
    assert "Number 0 is 'tench' there and 'goldfish' in the recipe" in caught.value.why
    loaded(config.model_copy(update={"classes": ("one", "two", "three")}))


def test_another_number_of_classes(folder: Path) -> None:
    with pytest.raises(UsageError, match="with 4 classes") as caught:
        loaded(teacher_of(folder).model_copy(update={"classes": ("a", "b", "c", "d")}))
    assert "Their head has 3 outputs, but the recipe has 4 classes" in caught.value.why
    assert "one name for each of the 3 outputs" in caught.value.fix


def with_config(folder: Path, copy: Path, **changes: Any) -> Path:
    """A copy of the folder with other values in its config.json."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems_than_one_class_per_image(folder: Path, tmp_path: Path, problem: str) -> None:
    changed = with_config(folder, tmp_path / "tagger", problem_type=problem)
    with pytest.raises(UsageError, match="is not a single-label classifier") as refused:
        loaded(teacher_of(changed))
    assert problem in refused.value.why
    single = with_config(folder, tmp_path / "single", problem_type="single_label_classification")
    assert loaded(teacher_of(single)).classes == CLASSES


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_weights_that_are_stored_in_half_precision(folder: Path, tmp_path: Path, kind: torch.dtype) -> None:
    """transformers builds a network in the type of its stored weights; ours compute in float32."""
    network = transformers().ResNetForImageClassification.from_pretrained(folder).to(kind)
    network.save_pretrained(tmp_path / "half")
    for name in ("preprocessor_config.json",):
        shutil.copy(folder / name, tmp_path / "half")
    teacher = loaded(teacher_of(tmp_path / "half"))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.isfinite(teacher(torch.rand(2, *SPEC.shape))).all()


@pytest.mark.parametrize("arguments", [{"depths": 3}, {"embedding_size": "x"}, {"embedding_size": -1}])
def test_values_of_the_wrong_kind(folder: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="transformers cannot build an image classifier"):
        untrained_teacher(teacher_of(folder, arguments=arguments))


def test_a_backbone_without_a_head(folder: Path, tmp_path: Path) -> None:
    """transformers would initialise a head at random."""
    config = transformers().ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.num_labels = 3
    transformers().ResNetModel(config).save_pretrained(tmp_path / "headless")
    with pytest.raises(UsageError, match="lack 2 tensors") as caught:
        loaded(teacher_of(tmp_path / "headless"))
    assert "classifier.1" in caught.value.why


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "mine"))
    (mine / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, mine / "pytorch_model.bin")
    with pytest.raises(UsageError, match="has no safetensors weights"):
        loaded(teacher_of(mine))


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "mine"))
    whole = (mine / "model.safetensors").read_bytes()
    (mine / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"are damaged|has no safetensors weights|cannot be loaded"):
        loaded(teacher_of(mine))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "toaster"}', '{"model_type": "bert"}', "{}"])
def test_invalid_configurations(content: str, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(content)
    with pytest.raises(UsageError):
        build_classifier(f"hf:{tmp_path}/odd", SPEC, CLASSES)


def test_code_of_a_repository_never_runs(folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "mine"))
    config = json.loads((mine / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForImageClassification": "theirs.Net"}}  # fmt: skip  # noqa: E501
    (mine / "config.json").write_text(json.dumps(config))
    (mine / "theirs.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'it_ran')!r}).touch()\n")
    with pytest.raises(UsageError, match="cannot build"):
        build_classifier(f"hf:{mine}", SPEC, CLASSES)
    assert not (tmp_path / "it_ran").exists()


def test_a_timm_network_inside_transformers(tmp_path: Path) -> None:
    (tmp_path / "wrapped").mkdir()
    (tmp_path / "wrapped" / "config.json").write_text(
        json.dumps(
            {"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 3, "label_names": ["a", "b", "c"]}
        )
    )
    with pytest.raises(UsageError, match="timm network wrapped by transformers") as caught:
        build_classifier(f"hf:{tmp_path}/wrapped", SPEC, CLASSES)
    assert "timm:resnet18" in caught.value.fix


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/absent", "./absent"):
        with pytest.raises(UsageError, match="There is no folder"):
            build_classifier(f"hf:{name}", SPEC, CLASSES)


@pytest.mark.slow
def test_an_unreachable_hub(tmp_path: Path) -> None:
    """In a process whose hub address is a closed port. The text encoder is here too, to start only one."""
    program = (
        "from nayer_edge.config import LTE, InputSpec\n"
        "from nayer_edge.labels.embeddings import build\n"
        "from nayer_edge.errors import MissingError\n"
        "from nayer_edge.models.names import parse\n"
        "from nayer_edge.models.load import build_classifier\n"
        "from nayer_edge.models import huggingface, published\n"
        "calls = [\n"
        "    lambda: build_classifier('hf:org/name', InputSpec(), ('a', 'b')),\n"
        "    lambda: huggingface.input_of(parse('hf:org/name')),\n"
        "    lambda: huggingface.own_weights(parse('hf:org/name')),\n"
        "    lambda: published.fetch('timm:resnet18', 'timm:a1_in1k'),\n"
        "]\n"
        "for call in calls:\n"
        "    try:\n"
        "        call()\n"
        "    except MissingError as error:\n"
        "        assert error.exit_code == 3\n"
        "        assert 'hf download' in error.fix, error.fix\n"
        "        assert 'not on this machine' in error.what, error.what\n"
        "    else:\n"
        "        raise AssertionError('it went on')\n"
        "try:\n"
        "    build(('a', 'b'), LTE(encoder='nobody/an-encoder-that-is-not-there'))\n"
        "except MissingError as error:\n"
        "    assert error.what.startswith('The text encoder \\'nobody/an-encoder'), error.what\n"
        "    assert 'local folder' in error.fix, error.fix\n"
        "else:\n"
        "    raise AssertionError('it went on')\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
