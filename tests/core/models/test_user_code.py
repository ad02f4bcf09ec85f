"""The user's own code runs only if it is trusted, and errors in it are reported with a reason."""

from __future__ import annotations

import importlib.util
import py_compile
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.models.load import build_classifier, load_classifier, save_classifier
from nayer_edge.models.user_code import trusting

SPEC = InputSpec(channels=2, height=8, width=8)
CLASSES = ("a", "b", "c")
CODE = """
from pathlib import Path
from torch import nn
from widths import WIDTH

Path(__file__).with_name("it_ran").touch()

class Net(nn.Module):
    def __init__(self, in_chans, num_classes, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_chans, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.head(self.body(x).mean(dim=(2, 3)))
        return (x, x * 0) if self.training else {"logits": x, "features": x}

def make(in_chans, num_classes, width=WIDTH):
    return Net(in_chans, num_classes, width)

def wrong():
    return "no module"

def broken(num_classes):
    raise RuntimeError("no such luck")

THREE = 3
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "nets.py").write_text(CODE)
    (folder / "widths.py").write_text("WIDTH = 5\n")
    sys.modules.pop("widths", None)
    return folder / "nets.py"


def test_nothing_runs_without_trust(code: Path) -> None:
    with pytest.raises(IntegrityError, match="runs only with --trust-code") as caught:
        build_classifier(f"python:{code}:make", SPEC, CLASSES)
    assert caught.value.exit_code == 4
    assert "--trust-code" in caught.value.fix
    assert not code.with_name("it_ran").exists(), "the code ran"


def test_trust_ends(code: Path) -> None:
    with trusting():
        build_classifier(f"python:{code}:make", SPEC, CLASSES)
    with trusting(False), pytest.raises(IntegrityError):
        build_classifier(f"python:{code}:make", SPEC, CLASSES)
    with pytest.raises(IntegrityError):
        build_classifier(f"python:{code}:make", SPEC, CLASSES)


def test_a_file(code: Path) -> None:
    path = list(sys.path)
    with trusting():
        network = build_classifier(f"python:{code}:make", SPEC, CLASSES)
    assert sys.path == path
    assert network.model == "python:nets.py:make", "no local folder"
    assert network.backbone.get_submodule("body.0").weight.shape == (5, 2, 3, 3)
    images = torch.rand(4, *SPEC.shape)
    for training in (False, True):
        assert network.train(training)(images).shape == (4, 3), "the logits are in a dictionary or tuple"


@pytest.mark.parametrize("helper", ["widths.py", "widths/__init__.py", "widths/inner.py"])
def test_the_source_is_what_runs(code: Path, tmp_path: Path, helper: str) -> None:
    """Compiled files beside it may be of another source: their invalidation can be switched off."""
    mine = CODE.replace("from widths", "from widths.inner") if helper == "widths/inner.py" else CODE
    code.write_text(mine)
    code.with_name("widths.py").unlink()
    (code.parent / helper).parent.mkdir(exist_ok=True)
    (code.parent / helper).write_text("WIDTH = 5\n")
    for name, source in (("nets.py", mine.replace("touch", "mkdir")), (helper, "WIDTH = 9\n")):
        other = tmp_path / "other.py"
        other.write_text(source)
        planted = Path(importlib.util.cache_from_source(str(code.parent / name)))
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(other), cfile=str(planted), doraise=True, invalidation_mode=mode)
    with trusting():
        network = build_classifier(f"python:{code}:make", SPEC, CLASSES)
    assert code.with_name("it_ran").is_file()
    assert network.backbone.get_submodule("body.0").weight.shape[0] == 5


@pytest.mark.parametrize("marked", [True, False])
def test_helpers_of_one_name_are_each_models_own(code: Path, tmp_path: Path, marked: bool) -> None:
    """In folders with `__init__.py` and without."""
    models = {code: 5}
    for name, width in (("others", 4), ("third", 3)):
        helpers = tmp_path / name / "widths" / "deeper"
        helpers.mkdir(parents=True)
        (helpers / "inner.py").write_text(f"WIDTH = {width}\n")
        for folder in (helpers.parent, helpers) if marked else ():
            (folder / "__init__.py").touch()
        path = tmp_path / name / "nets.py"
        path.write_text(CODE.replace("from widths import", "from widths.deeper.inner import"))
        models[path] = width
    with trusting():
        for path, width in (*models.items(), *models.items()):
            network = build_classifier(f"python:{path}:make", SPEC, CLASSES)
            assert network.backbone.get_submodule("body.0").weight.shape[0] == width
    assert sys.modules["torch"] is torch


def test_a_folder_without_init_does_not_hide_an_installed_package(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of pictures, for example, that has the name of a library."""
    monkeypatch.delitem(sys.modules, "wsgiref", raising=False)
    code.with_name("wsgiref").mkdir()
    code.write_text(f"import wsgiref\nassert wsgiref.__file__\n{CODE}")
    with trusting():
        build_classifier(f"python:{code}:make", SPEC, CLASSES)


def test_a_module(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(code.parent)
    with trusting():
        network = build_classifier("python:nets:make", SPEC, CLASSES, {"width": 7})
    assert network.backbone.get_submodule("body.0").weight.shape == (7, 2, 3, 3)
    assert network.rebuild == {"arguments": {"width": 7}}
    for name in ("nets", "widths"):
        sys.modules.pop(name, None)


def test_a_saved_one_is_rebuilt_only_with_trust(code: Path, tmp_path: Path) -> None:
    with trusting():
        network = build_classifier(f"python:{code}:make", SPEC, CLASSES, {"width": 6}).eval()
        path = tmp_path / "student.safetensors"
        save_classifier(network, path, {})
        images = torch.rand(2, *SPEC.shape)
        assert torch.equal(load_classifier(path)(images), network(images))
    with pytest.raises(IntegrityError, match="--trust-code"):
        load_classifier(path)
    code.write_text(CODE + "\n# changed\n")
    with trusting(), pytest.raises(IntegrityError, match="not the file that the model was built with"):
        load_classifier(path)
    code.unlink()
    with trusting(), pytest.raises(UsageError, match=r"nets\.py of .* is missing"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nets.py:mak", "Did you mean 'make'"),
        ("nets.py:THREE", "no function 'THREE'"),
        ("nets.py:wrong", "returned a str"),
        ("nets.py:broken", "failed when called with num_classes=3"),
        ("absent.py:make", "is missing"),
        ("syntax.py:make", "cannot be imported"),
        ("needy.py:make", "needs a module that is not installed"),
    ],
)
def test_code_that_does_not_work(code: Path, target: str, message: str) -> None:
    (code.parent / "syntax.py").write_text("def make(:\n")
    (code.parent / "needy.py").write_text("import no_such_module_anywhere\n")
    with trusting(), pytest.raises(UsageError, match=message):
        build_classifier(f"python:{code.parent / target}", SPEC, CLASSES)


@pytest.mark.parametrize("name", ["python:", "python:nets", "python:nets.py", "python::make", "python:nets:a b"])
def test_names_without_a_factory(name: str) -> None:
    with trusting(), pytest.raises(UsageError, match="does not name a factory"):
        build_classifier(name, SPEC, CLASSES)


def test_a_missing_module() -> None:
    with trusting(), pytest.raises(UsageError, match=r"no module 'no_such_package\.nets'"):
        build_classifier("python:no_such_package.nets:make", SPEC, CLASSES)


def test_a_class_is_a_factory(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Linear):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__(8, classes)\n"
    )
    with trusting():
        assert isinstance(build_classifier(f"python:{tmp_path}/own.py:Own", SPEC, CLASSES).backbone, nn.Linear)
