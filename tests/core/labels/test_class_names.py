"""Class names in all supported formats, and every kind of invalid file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nayer_edge.errors import UsageError
from nayer_edge.labels.class_names import as_words, labels_beside, phrases, read_labels, synonyms_of

CATS = ("cat", "dog", "été, summer")


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.txt", "cat\ndog\nété, summer\n"),
        ("no end.txt", "cat\ndog\nété, summer"),
        ("spaces.txt", "  cat \ndog\t\nété, summer\n\n\n"),
        ("windows.txt", "cat\r\ndog\r\nété, summer\r\n"),
        ("old mac.txt", "cat\rdog\rété, summer\r"),
        ("bom.txt", "cat\ndog\nété, summer\n".encode("utf-8-sig")),
        ("utf-16.txt", "cat\r\ndog\r\nété, summer\r\n".encode("utf-16")),
        ("decomposed.txt", "cat\ndog\ne\u0301te\u0301, summer\n"),
        ("numbered.txt", "1\tdog\n0\tcat\n2\tété, summer\n"),
        ("synset_words.txt", "n02121808 cat\nn02084071 dog\nn15236475 été, summer\n"),
        ("classes", "cat\ndog\nété, summer\n"),
        ("list.json", '["cat", "dog", "été, summer"]'),
        ("id2label.json", '{"0": "cat", "2": "été, summer", "1": "dog"}'),
        ("label2id.json", '{"été, summer": 2, "cat": 0, "dog": 1}'),
        ("config.json", '{"model_type": "resnet", "id2label": {"0": "cat", "1": "dog", "2": "été, summer"}}'),
        ("card.json", '{"schema": "x", "classes": ["cat", "dog", "été, summer"]}'),
        ("keras.json", '{"0": ["n02121808", "cat"], "1": ["n02084071", "dog"], "2": ["n15236475", "été, summer"]}'),
        ("one.csv", 'cat\ndog\n"été, summer"\n'),
        ("headed.csv", 'name\ncat\ndog\n"été, summer"\n'),
        ("two.csv", '0,cat\n1,dog\n2,"été, summer"\n'),
        ("shuffled.csv", 'id,name\n2,"été, summer"\n0,cat\n1,dog\n'),
        ("turned.csv", 'label,class_id\n"été, summer",3\ncat,1\ndog,2\n'),
        ("wide.csv", 'index,wnid,name\n0,n1,cat\n1,n2,dog\n2,n3,"été, summer"\n'),
        ("german.csv", "id;name\n0;cat\n1;dog\n2;été, summer\n"),
        ("tab.tsv", "0\tcat\n1\tdog\n2\tété, summer\n"),
        ("gap.csv", 'id,name\n\n0,cat\n1,dog\n2,"été, summer"\n'),
    ],
)
def test_formats_of_one_list(tmp_path: Path, name: str, text: str | bytes) -> None:
    assert read_labels(write(tmp_path, name, text)) == CATS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # github.com/arthw/imagenet_label's README, in its two forms.
        ("number_space.txt", "0 cat\n1 dog\n2 été, summer\n"),
        ("synset_number_name.txt", "n02119789 3 été, summer\nn02100735 1 cat\nn02084071 2 dog\n"),
        ("number_colon.txt", "0: cat\n1: dog\n2: été, summer\n"),
        ("number_comma.txt", "2,été, summer\n0,cat\n1,dog\n"),
        ("number_dot.txt", "1. cat\n2. dog\n3. été, summer\n"),
        # UCF-101's classInd.txt counts from 1.
        ("classInd.txt", "1 cat\n2 dog\n3 été, summer\n"),
        ("number_last.txt", "dog 1\ncat 0\nété, summer 2\n"),
        ("number_last_tab.txt", "dog\t1\ncat\t0\nété, summer\t2\n"),
        # The gist imagenet1000_clsidx_to_labels.txt is a dictionary as Python prints it.
        ("python_dict.txt", "{0: 'cat',\n 1: 'dog',\n 2: 'été, summer'}\n"),
        ("python_list.txt", "['cat', 'dog', 'été, summer']\n"),
        ("json_in_text.txt", '{"cat": 0, "été, summer": 2, "dog": 1}'),
        # transformers' guide for image classification makes the numbers words.
        ("label2id_words.json", '{"cat": "0", "été, summer": "2", "dog": "1"}'),
        ("config_words.json", '{"label2id": {"cat": "0", "été, summer": "2", "dog": "1"}}'),
        ("objects.json", '[{"id": 1, "name": "dog"}, {"id": 0, "name": "cat"}, {"id": 2, "name": "été, summer"}]'),
        (
            "coco.json",
            '{"images": [], "categories": [{"supercategory": "a", "id": 2, "name": "dog"}, {"supercategory": "b", '
            '"id": 1, "name": "cat"}, {"supercategory": "c", "id": 3, "name": "été, summer"}]}',
        ),
        # pandas' to_csv with its index, which is not the class number.
        ("sorted_by_name.csv", ',name,class_id\n0,cat,0\n1,"été, summer",2\n2,dog,1\n'),
        ("reset_index.csv", 'index,name,class_id\n0,"été, summer",2\n1,cat,0\n2,dog,1\n'),
        ("unnamed.csv", 'Unnamed: 0,label\n0,cat\n1,dog\n2,"été, summer"\n'),
        ("with_counts.csv", 'class,images\ncat,500\ndog,480\n"été, summer",490\n'),
        ("excel.csv", "sep=;\r\nid;name\r\n1;dog\r\n0;cat\r\n2;été, summer\r\n"),
        ("yolo.yaml", "nc: 3  # classes\nnames:\n  0: cat\n  1: dog\n  2: été, summer\ntrain: images\n"),
        ("yolo_list.yaml", "names:\n- cat\n- 'dog'\n- été, summer\n"),
        ("yolo_inline.yaml", "names: [cat, dog,\n  'été, summer']\n"),
        ("utf-32.txt", "cat\ndog\nété, summer\n".encode("utf-32")),
        ("utf-16.json", '["cat", "dog", "été, summer"]'.encode("utf-16")),
    ],
)
def test_published_forms(tmp_path: Path, name: str, text: str | bytes) -> None:
    assert read_labels(write(tmp_path, name, text)) == CATS


def test_words_of_yaml_stay_words(tmp_path: Path) -> None:
    """YAML 1.1 reads `no` as a boolean (https://yaml.org/type/bool.html); as a class name it is a word."""
    assert read_labels(write(tmp_path, "data.yaml", "names: [no, yes, 'off']\n")) == ("no", "yes", "off")
    assert read_labels(write(tmp_path, "data.yaml", 'names: ["tench, Tinca", "gold"]\n')) == ("tench, Tinca", "gold")


@pytest.mark.parametrize(
    "text",
    [
        "names:\n  0: a\n  1: b\n  1: c\n",
        "names: [a]\nnames: [b]\n",
        "a: &a [x]\nnames: [*a, *a]\n",
        "names: [a, b",
        "names: !!python/object/apply:os.getcwd []",
        "[" * 100_000,
        "- " * 1000 + "a",
        "names: [[a]]",
    ],
)
def test_yaml_that_is_damaged_or_hostile(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        read_labels(write(tmp_path, "data.yaml", text))


@pytest.mark.parametrize("content", [{"0": ["cat", "kitty"]}, [["cat", "0"], ["dog", "1"]]])
def test_two_words_are_not_an_id_and_a_name(tmp_path: Path, content: object) -> None:
    """Keras' file has WordNet ids in the first place. Of other pairs, none is known to be the name."""
    with pytest.raises(UsageError, match="in place of a class name"):
        read_labels(write(tmp_path, "labels.json", json.dumps(content)))


def test_names_that_look_like_something_else(tmp_path: Path) -> None:
    numbers = tuple(str(number) for number in range(10))
    assert read_labels(write(tmp_path, "digits.txt", "\n".join(numbers))) == numbers
    assert read_labels(write(tmp_path, "digits.csv", "\n".join(numbers))) == numbers
    assert read_labels(write(tmp_path, "digits.json", json.dumps(numbers))) == numbers
    assert read_labels(write(tmp_path, "coins.txt", "1 euro\n2 euro\n")) == ("1 euro", "2 euro")
    assert read_labels(write(tmp_path, "planes.txt", "Airbus 320\nBoeing 737\n")) == ("Airbus 320", "Boeing 737")
    assert read_labels(write(tmp_path, "sizes.txt", "0.5 mm\n1.5 mm\n")) == ("0.5 mm", "1.5 mm")
    assert read_labels(write(tmp_path, "mnist.json", '{"label2id": {"0": 0, "1": 1}}')) == ("0", "1")
    assert read_labels(write(tmp_path, "some.txt", "n02121808 cat\ndog\n")) == ("n02121808 cat", "dog")
    assert read_labels(write(tmp_path, "cjk.txt", "猫\n犬\n🦆\nשלום\n")) == ("猫", "犬", "🦆", "שלום")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.txt", "\n \n", "is empty"),
        ("gap.txt", "cat\n\ndog\n", "Line 2 of .* is empty"),
        ("one.txt", "cat\n", "has 1 class names; a classifier needs 2"),
        ("twice.txt", "cat\ndog\ncat\n", r"'cat' \(classes 0, 2\)"),
        ("crane.txt", "crane\nx\ncrane\ny\ny\n", r"2 names for several classes: 'crane' .*; 'y'"),
        ("accents.txt", "été\ne\u0301te\u0301\n", "'été'"),
        ("latin.txt", "cat\nété\n".encode("latin-1"), r"not UTF-8 text \(byte 4\)"),
        ("binary.txt", b"\x00\x01\x02\n\x03", "not a text file"),
        ("list.json", '["cat", ""]', "no name for class 1"),
        ("list.json", '["cat", " ", "\\t"]', "no name for classes 1, 2"),
        ("list.json", '["cat", 3]', "has 3 in place of a class name"),
        ("list.json", "[]", "contains no class names"),
        ("list.json", "{}", "contains no class names"),
        ("list.json", '"cat"', "contains no class names"),
        ("list.json", '["cat"', "is not a valid JSON file"),
        ("deep.json", "[" * 100_000, "is not a valid JSON file"),
        ("ids.json", '{"0": "cat", "2": "dog"}', "id 1 is missing"),
        ("ids.json", '{"5": "cat", "6": "dog"}', "id 0 is missing"),
        ("ids.json", '{"0": "cat", "0": "dog"}', "is not a valid JSON file"),
        ("ids.json", '{"cat": 0, "dog": 0}', "one id for two names"),
        ("ids.csv", "0,cat\n0,dog\n", "id 0 occurs twice"),
        ("ids.csv", "0,cat\n2,dog\n", "id 1 is missing"),
        ("ragged.csv", "0,cat\n1,tench, Tinca tinca\n", "Row 2 of .* has 3 cells, but the first row has 2"),
        ("empty.csv", "", "is empty"),
        ("quote.csv", '0,"cat\n', "is not a valid CSV file"),
        ("empty.csv", "0,cat\n1,\n", "no name for class 1"),
        ("pointer.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 123\n", "a Git LFS pointer"),
        ("page.txt", "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "a web page"),
        ("other.yaml", "train: images\nval: images\n", "Of YAML files, only the key `names`"),
        ("objects.json", '[{"id": 0, "colour": "red"}, {"id": 1, "colour": "blue"}]', "Their keys are id, colour"),
    ],
)
def test_invalid_files(tmp_path: Path, name: str, text: str | bytes, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read_labels(write(tmp_path, name, text))
    assert caught.value.fix or caught.value.why


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file of class names"):
        read_labels(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        read_labels(tmp_path)
    with pytest.raises(UsageError, match="too large"):
        read_labels(write(tmp_path, "huge.txt", b"x\n" * (9 * 2**20)))


def test_wordnet_ids_are_translated(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    # Two ImageNet classes are named "crane"; their definitions distinguish them.
    path = write(tmp_path, "wnids.txt", "n01440764\nn02012849\nn03126707\n")
    tench, bird, machine = read_labels(path)
    assert tench == "tench, Tinca tinca"
    assert bird.startswith("crane (large long-necked wading bird")
    assert machine.startswith("crane (lifts and moves heavy objects")
    with pytest.raises(UsageError, match="n99999999"):
        read_labels(write(tmp_path, "wnids.txt", "n01440764\nn99999999\n"))


def test_wordnet_ids_without_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nayer_edge.errors import MissingError

    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)
    with pytest.raises(MissingError) as caught:
        read_labels(write(tmp_path, "wnids.txt", "n01440764\nn02012849\n"))
    assert ".[timm]" in caught.value.fix


def test_labels_beside_a_file(tmp_path: Path) -> None:
    assert labels_beside(tmp_path / "clip.npy") is None
    path = write(tmp_path, "clip.labels.csv", "a\nb\n")
    assert labels_beside(tmp_path / "clip.npy") == path


def test_synonyms() -> None:
    assert as_words("  aquarium__fish ") == "aquarium fish"
    assert synonyms_of("tench, Tinca tinca") == ("tench", "Tinca tinca")
    assert synonyms_of("great_white_shark,white shark,, man-eater ") == (
        "great white shark",
        "white shark",
        "man-eater",
    )
    assert synonyms_of("crane (bird, large)") == ("crane (bird, large)",)
    assert synonyms_of(",") == (",",)
    labels = ("tench, Tinca tinca", "maillot", "maillot, tank suit", "sea_bird")
    assert phrases(labels, "first") == [("tench",), ("maillot",), ("maillot, tank suit",), ("sea bird",)]
    assert phrases(labels, "all") == [(as_words(label),) for label in labels]
    assert phrases(labels, "average")[2] == ("maillot", "tank suit")
