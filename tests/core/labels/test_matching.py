"""A data set's own class names beside the teacher's: which class each of them is, and what is refused."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from nayer_edge.errors import MissingError, UsageError
from nayer_edge.labels.matching import match_names


def matched(names: list[str], classes: list[str]) -> tuple[list[int], str]:
    found = match_names(names, classes, "The names")
    return [found.numbers[name] for name in names], found.by


def refused(names: list[str], classes: list[str]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        match_names(names, classes, "The names")
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("names", "classes", "numbers"),
    [
        (["dog", "cat"], ["cat", "mouse", "dog"], [2, 0]),
        (["Tabby_Cat", "DOG"], ["dog", "tabby cat"], [1, 0]),
        (["sea-lion", "T-shirt"], ["T shirt", "sea lion"], [1, 0]),
        (["tench", "crane bird"], ["tench, Tinca tinca", "crane (bird)"], [0, 1]),
        (["n02085620-Chihuahua"], ["dog", "Chihuahua"], [1]),
        (["n02085620_Chihuahua"], ["dog", "n02085620"], [1]),
        (["A", "a"], ["a", "A"], [1, 0]),
        (["Ａ４"], ["a3", "a4"], [1]),
    ],
)
def test_by_name(names: list[str], classes: list[str], numbers: list[int]) -> None:
    assert matched(names, classes) == (numbers, "name")


@pytest.mark.parametrize("word", ["été", "Ångström", "한국", "कि"])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_any_unicode_form(word: str, forms: tuple[str, str]) -> None:
    name, label = (unicodedata.normalize(form, word) for form in forms)
    assert matched([name], ["other", label]) == ([1], "name")


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat", "Cat"], ["cat", "dog"]),
        (["CAT", "Cat"], ["cat", "dog"]),
        (["cat"], ["Cat", "CAT"]),
        (["é", "e\u0301"], ["é", "dog"]),
        (["polecat"], ["polecat, fitch", "skunk, polecat"]),
    ],
)
def test_what_could_be_several_classes_is_no_match(names: list[str], classes: list[str]) -> None:
    if names == ["polecat"]:
        # The first of the synonyms decides.
        assert matched(names, classes) == ([0], "name")
    else:
        assert "are not the teacher's classes" in refused(names, classes).what


def test_the_differences_of_both_lists_are_shown() -> None:
    error = refused(["cat", "cow", "yak"], ["cat", "dog"])
    assert "Only in the data (2): cow, yak." in error.why
    assert "Only among the teacher's classes (1): dog." in error.why


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("names", "numbers"),
    [(["0", "1", "10"], [0, 1, 10]), (["00002", "00000"], [2, 0]), (["LABEL_3", "LABEL_11"], [3, 11])],
)
def test_numbers_alone_are_numbers(names: list[str], numbers: list[int]) -> None:
    classes = [f"class {letter}" for letter in "abcdefghijkl"]
    assert matched(names, classes) == (numbers, "number")


def test_numbers_that_are_the_teachers_names_are_names() -> None:
    """ImageFolder sorts "10" before "2", so a teacher's class "10" may be its second one."""
    assert matched(["2", "10"], ["0", "1", "10", "2"]) == ([3, 2], "name")


def test_numbers_from_one_are_refused_with_the_reason() -> None:
    error = refused(["1", "2", "3"], ["a", "b", "c"])
    assert "3 is not one of the 3 classes" in error.what
    assert error.why == "They run from 1."


def test_numbers_among_names_are_no_numbers() -> None:
    assert "Only in the data (2): 0, cow." in refused(["0", "cow"], ["cat", "dog"]).why
    assert "are not the teacher's" in refused(["1", "01"], ["cat", "dog"]).what


# ------------------------------------------------------------------ WordNet ids


def imagenet() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    return list(ImageNetInfo().label_names())


@pytest.fixture
def categories() -> list[str]:
    """torchvision's names of ImageNet's classes, in the order of its networks' outputs."""
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def test_imagenets_folders_are_torchvisions_classes(categories: list[str]) -> None:
    """All thousand, with two cranes, two maillots, two cardigans, and names that others have as synonyms."""
    pytest.importorskip("timm")
    ids = imagenet()
    assert matched(ids, categories) == (list(range(1000)), "WordNet id")
    assert matched(categories, ids) == (list(range(1000)), "WordNet id")
    assert matched(ids[::-1], categories[::-1]) == (list(range(1000)), "WordNet id")


def test_imagenets_folders_are_the_packages_classes() -> None:
    pytest.importorskip("timm")
    import json
    from importlib import resources

    from safetensors import safe_open

    path = resources.files("nayer_edge.labels.lte_ready") / "imagenet.all-MiniLM-L6-v2.safetensors"
    with safe_open(str(path), framework="np") as file:
        own = json.loads(file.metadata()["labels"])
    assert matched(imagenet(), own) == (list(range(1000)), "WordNet id")


def test_some_ids_of_a_part_of_imagenet() -> None:
    pytest.importorskip("timm")
    assert matched(["n02979186", "n03028079"], ["church", "cassette player"]) == ([1, 0], "WordNet id")
    assert matched(["n01440764", "n02012849"], ["crane (bird)", "tench, Tinca tinca"]) == ([1, 0], "WordNet id")
    # The bird, while the class may be the machine.
    assert "n02012849" in refused(["n02012849"], ["tench", "crane"]).why
    assert "n99999999" in refused(["n01440764", "n99999999"], ["tench", "dog"]).why


def test_ids_on_both_sides_need_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)
    assert matched(["n02012849", "n01440764"], ["n01440764", "n02012849"]) == ([1, 0], "name")
    with pytest.raises(MissingError) as caught:
        match_names(["n01440764"], ["tench"], "The class folders in held")
    assert "timm" in caught.value.what
    assert "the class folders in held" in caught.value.what
    assert "pip install" in caught.value.fix
