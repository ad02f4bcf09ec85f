"""Recipes: found by name or path, extended, overridden, and refused with every problem at once."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from nayer_edge.config import InputSpec, Teacher
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.pipelines.recipes import preflight
from nayer_edge.pipelines.recipes.as_toml import to_toml
from nayer_edge.pipelines.recipes.loading import (
    Shipped,
    load_recipe,
    portable,
    recipe_of,
    shipped,
    with_input,
    without_local_paths,
)
from nayer_edge.pipelines.recipes.settings import apply_settings, make_recipe
from nayer_edge.pipelines.schemas import load
from nayer_edge.pipelines.steps import until
from nayer_edge.storage.run_folder import RunFolder

MINIMAL = """
[teacher]
model = "nayer:resnet20"
weights = "weights/teacher.safetensors"
classes = ["a", "b"]

[student]
model = "nayer:resnet8"
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(name: str | Path, *settings: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_recipe(str(name), list(settings))
    return caught.value


@pytest.mark.parametrize("entry", shipped(), ids=lambda entry: entry.name)
def test_shipped_recipes_hold(entry: Shipped) -> None:
    import jsonschema  # takes a second: not in every worker that collects this file

    recipe = load_recipe(entry.name)
    assert recipe.name == entry.name
    assert recipe.description
    jsonschema.validate(recipe.model_dump(mode="json", by_alias=True), load("recipe"))


@pytest.mark.parametrize("entry", shipped(), ids=lambda entry: entry.name)
def test_shipped_recipes_promise_full_int8_coverage(entry: Shipped) -> None:
    """But for `photos`, as `init` writes it: its accuracy search may leave layers in float."""
    assert load_recipe(entry.name).gate.int8.min_coverage == (None if entry.name == "photos" else 1.0)


def test_the_digits_recipe_fits_its_limits_to_its_images() -> None:
    recipe = load_recipe("digits")
    assert recipe.gate.accuracy.max_drop_vs_fp32 == 0.015
    assert recipe.gate.accuracy.max_drop_vs_teacher == 0.04
    assert recipe.teacher.classes[:3] == ("zero", "one", "two")
    assert len(recipe.teacher.classes) == 10


def test_the_file_names_the_recipe(tmp_path: Path) -> None:
    assert load_recipe(str(write(tmp_path / "mine.toml", MINIMAL))).name == "mine"
    assert load_recipe(str(write(tmp_path / "mine.toml", "name = 'other'\n" + MINIMAL))).name == "other"


def test_paths_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "project" / "mine.toml", MINIMAL + '[validate]\ndata = "held"\n')
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(path.relative_to(tmp_path)))
    assert recipe.teacher.weights == str(tmp_path / "project" / "weights" / "teacher.safetensors")
    assert recipe.validate_.data == str(tmp_path / "project" / "held")


def test_paths_typed_on_the_command_line_start_where_they_are_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "project" / "mine.toml", MINIMAL)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(str(path), ["validate.data=held", "teacher.weights=w.safetensors"])
    assert recipe.validate_.data == str(tmp_path / "here" / "held")
    assert recipe.teacher.weights == str(tmp_path / "here" / "w.safetensors")


def test_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "mine.toml", MINIMAL.replace("weights/", "$NAYER_EDGE_DATA/"))
    monkeypatch.setenv("NAYER_EDGE_DATA", str(tmp_path / "store"))
    assert load_recipe(str(path)).teacher.weights == str(tmp_path / "store" / "teacher.safetensors")
    monkeypatch.delenv("NAYER_EDGE_DATA")
    with pytest.raises(UsageError, match="NAYER_EDGE_DATA is not set"):
        preflight.check(load_recipe(str(path)), until("teacher"))


def test_unknown_names() -> None:
    assert "Did you mean 'digits'?" in refused("digts").what
    assert "nayer-edge recipes" in refused("digts").fix
    assert "There is no recipe file" in refused("nowhere.toml").what


def test_a_recipe_in_a_folder_of_its_name_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits").name == "digits"


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = MINIMAL + "[distill]\nepoch = 3\nlr = -1\n[distil]\n[gate]\nartifact = ['x']\n"
    why = refused(write(tmp_path / "mine.toml", text)).why
    assert "unknown key 'distill.epoch'. Did you mean 'distill.epochs'?" in why
    assert "unknown key 'distil'. Did you mean 'distill'?" in why
    assert "unknown key 'gate.artifact'. Did you mean 'gate.artifacts'?" in why
    assert "distill.lr" in why
    assert len(why.splitlines()) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name = 3",
        "not toml at all",
        "\x00",
        MINIMAL.replace('["a", "b"]', '["a", "a"]'),
        MINIMAL.replace('["a", "b"]', '["a", " "]'),
        MINIMAL.replace('["a", "b"]', '["a"]'),
        MINIMAL + '[teach]\ndata = "digits"\n',
        MINIMAL.replace('weights = "weights/teacher.safetensors"\n', ""),
        MINIMAL + "[distill]\nepochs = 3\nwarmup_epochs = 3\n",
        MINIMAL + '[lte]\nprompt = "no label"\n',
        "name = '../evil'\n" + MINIMAL,
        "seed = -1\n" + MINIMAL,
        "[teacher]\ninput = { channels = 3, mean = [0.1, 0.2] }\n",
        MINIMAL + "[distill]\nlr = nan\n",
        MINIMAL + "[distill]\nlr = inf\n",
    ],
)
def test_recipes_that_do_not_hold(tmp_path: Path, text: str) -> None:
    error = refused(write(tmp_path / "mine.toml", text))
    assert error.what
    assert error.why


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not readable" in refused(path).what
    path.write_bytes(b"# " + b"x" * 2**20)
    assert "larger" in refused(path).what


def test_extending(tmp_path: Path) -> None:
    write(tmp_path / "_base.toml", MINIMAL + "[distill]\nepochs = 50\nlr = 0.1\n")
    path = write(tmp_path / "mine.toml", 'extends = "_base"\n[distill]\nepochs = 60\n')
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.distill.epochs, recipe.distill.lr) == ("mine", 60, 0.1)
    write(tmp_path / "_base.toml", MINIMAL + "[distill]\nepochs = 50\n[measured]\nstudent_top1 = 0.9\n")
    assert load_recipe(str(path)).measured.student_top1 is None, "it was not this recipe that was measured"
    assert "there is no" in refused(write(tmp_path / "orphan.toml", 'extends = "nothing"\n' + MINIMAL)).what
    write(tmp_path / "round.toml", 'extends = "round"\n' + MINIMAL)
    assert "circle" in refused(tmp_path / "round.toml").what
    assert refused(write(tmp_path / "odd.toml", "extends = 3\n" + MINIMAL)).what


def test_settings() -> None:
    recipe = load_recipe(
        "digits",
        ["distill.epochs=7", "teach.lr=0.5", "export.targets=['cpu', 'arm']", "description=plain words", "seed = 4"],
    )
    assert recipe.distill.epochs == 7
    assert recipe.teach is not None
    assert recipe.teach.lr == 0.5
    assert recipe.export.targets == ("cpu", "arm")
    assert recipe.description == "plain words"
    assert recipe.seed == 4
    assert load_recipe("digits", ["seed=1", "seed=2"]).seed == 2, "the last one counts"
    assert load_recipe("digits", ["description=a=b"]).description == "a=b"


@pytest.mark.parametrize("setting", ["x", "=3", "a..b=3", ".=3", "seed.deep=3", "distill=3", "distill.epochs=many", ""])
def test_settings_that_do_not_hold(setting: str) -> None:
    assert refused("digits", setting).exit_code == 2


def test_another_teacher_gets_its_own_normalisation(tmp_path: Path) -> None:
    """A run folder's recipe states the input that a library described, for that teacher only."""
    pytest.importorskip("timm")
    recipe = load_recipe("digits").model_copy(update={"teach": None})
    first = Teacher(model="timm:vit_tiny_patch16_224", weights="timm:augreg_in21k_ft_in1k", classes=("a", "b"))
    found = with_input(first)
    assert found.input.mean == (0.5, 0.5, 0.5)
    root = tmp_path / "run"
    values = portable(recipe.model_copy(update={"teacher": found}), root)
    RunFolder.create(root, values, 0, {}, {})
    again = load_recipe(str(root), ["teacher.model=torchvision:resnet18", "teacher.weights=torchvision:IMAGENET1K_V1"])
    assert (again.teacher.input.mean, again.teacher.input.height) == ((0.485, 0.456, 0.406), 224)
    assert "torchvision" in again.teacher.input_from
    # What the recipe itself stated stays.
    own = with_input(first.model_copy(update={"input": InputSpec.model_validate({"mean": [0.4]})}))
    values["teacher"] = own.model_dump(mode="json")
    RunFolder.create(tmp_path / "own", values, 0, {}, {})
    settings = ["teacher.model=torchvision:resnet18", "teacher.weights=torchvision:DEFAULT"]
    again = load_recipe(str(tmp_path / "own"), settings)
    assert (again.teacher.input.mean, again.teacher.input.std) == ((0.4,), (0.229, 0.224, 0.225))
    assert load_recipe(str(root), ["seed=3"]).teacher.input == found.input


def test_a_recipe_survives_the_manifest() -> None:
    recipe = load_recipe("digits", ["seed=3"])
    values = json.loads(json.dumps(recipe.model_dump(mode="json", by_alias=True)))
    assert recipe_of(values, Path()) == recipe


def test_another_prior_brings_its_defaults() -> None:
    """A run folder's recipe states every key. The defaults of its prior do not stay; what was chosen does."""
    values = load_recipe("photos").model_dump(mode="json", by_alias=True)
    assert (values["synthesis"]["lambda_ce"], values["synthesis"]["lambda_adv"]) == (0.5, 1.33)

    def changed(*settings: str) -> tuple[float, float, int]:
        section = apply_settings(values, list(settings))["synthesis"]
        kept = recipe_of({**values, "synthesis": section}, Path()).synthesis
        return kept.lambda_ce, kept.lambda_adv, kept.g_steps

    assert changed("synthesis.prior=generator") == (1, 1, 10)
    assert changed("synthesis.lambda_ce=0.5", "synthesis.prior=generator") == (0.5, 1, 10)
    assert changed("synthesis.prior=batchnorm") == (0.5, 1.33, 10)
    values["synthesis"]["lambda_adv"] = 2.0
    assert changed("synthesis.prior=generator") == (1, 2, 10), "not a default, so it was chosen"
    values["synthesis"] = {**values["synthesis"], "prior": "procedural", "lambda_ce": 0.0, "g_steps": 1}
    assert changed("synthesis.prior=generator") == (1, 2, 30)
    with pytest.raises(UsageError, match=r"synthesis\.prior|Invalid recipe"):
        changed("synthesis.prior=unknown")


def test_weights_of_ones_own_take_the_place_of_training(tmp_path: Path) -> None:
    """--set teacher.weights=… and a recipe that extends another with weights drop the [teach] below them."""
    assert load_recipe("digits").teach is not None
    taken = load_recipe("digits", ["teacher.weights=mine.safetensors"])
    assert taken.teach is None
    assert taken.teacher.weights == str(Path.cwd() / "mine.safetensors")
    (tmp_path / "base.toml").write_text(
        '[teacher]\nmodel = "nayer:wrn_16_1"\nclasses = ["a", "b"]\n[teach]\ndata = "digits"\n'
        '[student]\nmodel = "nayer:resnet8"\n'
    )
    (tmp_path / "child.toml").write_text('extends = "base"\n[teacher]\nweights = "mine.safetensors"\n')
    child = load_recipe(str(tmp_path / "child.toml"))
    assert child.teach is None
    assert child.teacher.weights == str(tmp_path / "mine.safetensors")


def test_weights_and_training_at_once_stay_an_error() -> None:
    with pytest.raises(UsageError, match=r"either teacher.weights or a \[teach\] section"):
        load_recipe("digits", ["teacher.weights=mine.safetensors", "teach.data=digits"])


def test_what_goes_into_a_manifest_names_nobodys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$NAYER_EDGE_DATA first, then the run folder where both are on one side, then ~; all are found again."""
    home, store = tmp_path / "home" / "someone", tmp_path / "store"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NAYER_EDGE_DATA", str(store))
    root = tmp_path / "work" / "runs" / "mine"
    for path, wanted in (
        (store / "cifar10" / "test.parquet", "$NAYER_EDGE_DATA/cifar10/test.parquet"),
        (tmp_path / "work" / "held", "../../held"),
        (root / "inside", "inside"),
        (home / "held.npz", "~/held.npz"),
        (Path("/another-disk/held"), "/another-disk/held"),
    ):
        recipe = load_recipe("digits", [f"validate.data={path}"])
        values = portable(recipe, root)
        assert values["validate"]["data"] == wanted
        assert recipe_of(values, root).validate_.data == str(path)
    at_home = home / "runs" / "mine"
    assert (
        portable(load_recipe("digits", [f"validate.data={home / 'held'}"]), at_home)["validate"]["data"] == "../../held"
    )
    assert portable(load_recipe("digits"), root)["validate"]["data"] == "digits"
    assert portable(load_recipe("digits", ["validate.data=$NOWHERE/x"]), root)["validate"]["data"] == "$NOWHERE/x"


def test_a_model_of_ones_own_file_is_told_relative_too(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("")
    root = tmp_path / "runs" / "mine"
    recipe = load_recipe("digits", [f"student.model=python:{tmp_path / 'net.py'}:make"])
    values = portable(recipe, root)
    assert values["student"]["model"] == "python:../../net.py:make"
    assert recipe_of(values, root).student.model == recipe.student.model


def test_a_run_folder_holds_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was resolved, `--set` and all; its paths are still found from the folder; a shipped name goes before."""
    weights = tmp_path / "weights" / "teacher.safetensors"
    recipe = load_recipe(str(write(tmp_path / "mine.toml", MINIMAL)), ["distill.epochs=27"])
    root = tmp_path / "runs" / "mine"
    RunFolder.create(root, portable(recipe, root), recipe.seed, {}, {})
    again = load_recipe(str(root), ["distill.steps=3"])
    assert (again.name, again.distill.epochs, again.distill.steps) == ("mine", 27, 3)
    assert again.teacher.weights == str(weights.resolve())
    # A section that the run left out stands in its manifest as null, and is begun.
    assert apply_settings({"teach": None}, ["teach.epochs=2"]) == {"teach": {"epochs": 2}}
    monkeypatch.chdir(tmp_path / "runs")
    (tmp_path / "runs" / "mine").rename(tmp_path / "runs" / "digits")
    assert load_recipe("digits").distill.epochs != 27
    assert load_recipe("./digits").distill.epochs == 27
    assert RunFolder.open(Path("digits")).typed == "./digits"
    (tmp_path / "runs" / "digits" / "manifest.json").write_text("{}")
    with pytest.raises(IntegrityError):
        load_recipe("./digits")


@pytest.mark.parametrize("name", ["digits", "cifar10-w402-w161-e100"])
def test_shipped_recipes_survive_toml(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAYER_EDGE_DATA", str(tmp_path / "data"))
    here = load_recipe(name)
    values, beside = without_local_paths(here, tmp_path / "runs" / "x")
    (tmp_path / "again.toml").write_text(to_toml(values), encoding="utf-8")
    assert load_recipe(str(tmp_path / "again.toml")) == here
    assert beside == []


def test_what_toml_cannot_say_is_said_otherwise(tmp_path: Path) -> None:
    """TOML has no null: a key that may be None, with another default, would get that default back."""
    here = load_recipe("digits")
    here = here.model_copy(update={"export": here.export.model_copy(update={"max_drop": None})})
    values, _ = without_local_paths(here, tmp_path / "run")
    (tmp_path / "again.toml").write_text(to_toml(values), encoding="utf-8")
    again = load_recipe(str(tmp_path / "again.toml"))
    assert again.export.max_drop == 1.0, "no drop exceeds it"
    without = again.model_copy(update={"export": again.export.model_copy(update={"max_drop": None})})
    assert without == here


@pytest.mark.parametrize("recipe", ["digits", "photos"])
@pytest.mark.parametrize("setting", ["teacher.weights=mine.safetensors", "teacher.arguments={}"])
def test_figures_of_another_teacher_are_left_out(recipe: str, setting: str) -> None:
    """`validate` would refuse one's own teacher of 72 % because the recipe's reaches 92 %."""
    assert load_recipe(recipe).measured.teacher_top1 is not None
    assert load_recipe(recipe, ["distill.lr=0.1"]).measured.teacher_top1 is not None
    assert load_recipe(recipe, [setting]).measured.teacher_top1 is None


def test_paths_are_cut_to_their_last_part(tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "name": "x",
            "teacher": {
                "model": "python:/home/someone/net.py:make",
                "weights": "/home/someone/w.pt",
                "classes": ["a", "b"],
            },
            "student": {"model": "nayer:resnet8"},
            "lte": {"encoder": "/mnt/private/clip.npz"},
            "validate": {"data": "/mnt/private/holdout"},
        },
        "of this test",
    )
    values, beside = without_local_paths(recipe, tmp_path)
    text = to_toml(values)
    assert "someone" not in text
    assert "private" not in text
    assert beside == ["w.pt", "clip.npz", "holdout", "net.py"]
    read = tomllib.loads(text)
    assert (read["teacher"]["weights"], read["validate"]["data"]) == ("w.pt", "holdout")
    assert read["teacher"]["model"] == "python:net.py:make"
