"""Reads class names from text, JSON, CSV and YAML files, and turns them into phrases for prompts.

Imports nothing heavy: a recipe that names a label file is read without torch.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nayer_edge.errors import UsageError, missing_extra
from nayer_edge.labels import wordnet
from nayer_edge.storage.files import decoded, is_lfs_pointer

Synonyms = Literal["first", "all", "average"]

MAX_BYTES = 16 * 2**20
MAX_LABELS = 100_000
DEEPEST = 50
"""lists within lists of a YAML file"""
BESIDE = (".labels.txt", ".labels.json", ".labels.csv")
"""suffixes of the label file beside an embedding file: clip.npy has clip.labels.txt"""
_ID_HEADINGS = ("class_id", "label_id", "class_index", "category_id", "id", "index", "idx", "number")
_NAME_HEADINGS = ("name", "class_name", "label_name", "label", "class", "classes", "labels", "title", "category")
"""headings of ids and of names, those that say most first"""
_ROW_HEADINGS = ("", "unnamed: 0")
"""headings of the row numbers that pandas writes"""
_NUMBER_FIRST = re.compile(r"\s*(\d+)(?:\s*[:,;=|)]\s*|\.\s+|\s+[-–]\s+|\s+)(\S.*)")
_NUMBER_LAST = re.compile(r"\s*(\S.*?)(?:\s*[:,;=|\t]\s*|\s+)(\d+)\s*")
_SYNSET_AND_NUMBER = re.compile(r"\s*n\d{8}\s+(\d+)\s+(\S.*)")
_COMMA = re.compile(r",(?![^(]*\))")
"""a comma outside brackets"""


# ------------------------------------------------------------------ phrases for prompts


def as_words(label: str) -> str:
    """A class name with underscores and runs of blanks replaced by single spaces.

    >>> as_words("aquarium_fish")
    'aquarium fish'
    """
    return " ".join(label.replace("_", " ").split())


def synonyms_of(label: str) -> tuple[str, ...]:
    """The comma-separated names of one class, as words; never empty.

    >>> synonyms_of("tench, Tinca tinca")
    ('tench', 'Tinca tinca')
    """
    parts = tuple(part for part in map(as_words, _COMMA.split(label)) if part)
    return parts or (as_words(label),)


def phrases(labels: Sequence[str], synonyms: Synonyms) -> list[tuple[str, ...]]:
    """The phrases that replace {label} in the prompt, per class; the embeddings of several phrases are averaged.

    Args:
        synonyms: first: the first of the comma-separated names, or the whole label if several classes share it
            ("maillot" and "maillot, tank suit"). all: the whole label. average: each name as its own phrase.
    """
    if synonyms == "average":
        return [synonyms_of(label) for label in labels]
    whole = [(as_words(label),) for label in labels]
    if synonyms == "all":
        return whole
    first = [synonyms_of(label)[:1] for label in labels]
    shared = {name for name, times in Counter(first).items() if times > 1}
    return [label if name in shared else name for name, label in zip(first, whole, strict=True)]


# ------------------------------------------------------------------ files


def read_labels(path: Path) -> tuple[str, ...]:
    """Reads the class names in a file, in the order of the classifier's outputs.

    `.json`: a list of names or of objects ([{"id": 0, "name": "cat"}, …], also under `categories`), {"0": "cat", …},
    {"cat": 0, …}, or a file with one of these under `id2label` (transformers' config.json), `label2id` or `classes`
    (nayer-edge model cards). `.csv`, `.tsv`: with or without a header, a column of names, or ids and names. `.yaml`:
    `names`, as in YOLO's data.yaml. Other files: one name per line, or ids and names ("0 cat", "0: cat", "0,cat",
    "cat 0", "n02119789 1 kit_fox"), or a dictionary or list as Python writes it. WordNet ids before names are left out;
    those without names are translated with timm's table, if timm is installed.

    Raises:
        UsageError: no such file, not a text file, or missing, empty or duplicate names; the message lists them.
        MissingError: the file has only WordNet ids, and timm is not installed.
    """
    text = _text_of(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        names = _from_json(path, text)
    elif suffix in (".csv", ".tsv"):
        names = _from_table(path, text, "\t" if suffix == ".tsv" else None)
    elif suffix in (".yaml", ".yml"):
        names = _from_yaml(path, text)
    elif text.lstrip().startswith(("{", "[")) and (value := _literal(text)) is not None:
        names = _from_value(path, value)
    else:
        names = _from_lines(path, text)
    names = _named(path, [unicodedata.normalize("NFC", name.strip()) for name in names])
    return checked(names, str(path))


def checked(names: Sequence[str], source: str) -> tuple[str, ...]:
    """Checks that class names are complete and distinct.

    Raises:
        UsageError: fewer than two names, too many, an empty one, or duplicates.
    """
    if empty := [number for number, name in enumerate(names) if not name.strip()]:
        raise UsageError(
            f"{source} has no name for {_classes(empty)}.",
            why="A text encoder needs a name for each class.",
            fix="Give every class a name.",
        )
    if not 2 <= len(names) <= MAX_LABELS:
        raise UsageError(
            f"{source} has {len(names)} class names; a classifier needs 2 to {MAX_LABELS:,}.",
            fix="Give one name for each output of the classifier, in order.",
        )
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        places.setdefault(name, []).append(number)
    if duplicates := {name: numbers for name, numbers in places.items() if len(numbers) > 1}:
        shown = "; ".join(f"'{name}' ({_classes(numbers)})" for name, numbers in list(duplicates.items())[:4])
        raise UsageError(
            f"{source} uses {len(duplicates)} name{'s' if len(duplicates) > 1 else ''} for several classes: {shown}.",
            why="Their embeddings would be equal, and the generator could not distinguish these classes.",
            fix="Make the names distinct, as in ImageNet's list: 'crane (bird)' and 'crane (machine)'.",
        )
    return tuple(names)


def labels_beside(path: Path) -> Path | None:
    """The label file beside an embedding file; None if there is none."""
    return next((found for suffix in BESIDE if (found := path.with_suffix(suffix)).is_file()), None)


def _classes(numbers: Sequence[int]) -> str:
    """ "class 3", or "classes 3, 5 and 6 more" (counted from 0)."""
    shown = ", ".join(map(str, numbers[:4])) + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")
    return f"class{'es' if len(numbers) > 1 else ''} {shown}"


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is too large for a file of class names (the limit is {MAX_BYTES >> 20} MiB).")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no file of class names at {path}.",
            fix="Correct the path. In a recipe, it starts at the recipe's folder; on the command line, at the current "
            "folder.",
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read.", why=f"System error: {error.strerror or error}.") from error
    if is_lfs_pointer(data):
        raise UsageError(
            f"{path} is a Git LFS pointer, not the class names themselves.",
            fix="In its repository, type: git lfs pull",
        )
    if re.match(rb"\s*<(!doctype html|html)", data, re.IGNORECASE):
        raise UsageError(f"{path} is a web page, not a file of class names.", fix="Download the file itself.")
    try:
        text = decoded(data)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}).",
            fix="Save it as UTF-8, for example with iconv -f latin1 -t utf-8.",
        ) from error
    if "\0" in text:
        raise UsageError(
            f"{path} is not a text file: it contains NUL characters.", fix="Give a text, JSON or CSV file."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _from_lines(path: Path, text: str) -> list[str]:
    lines = text.rstrip("\n\t ").split("\n")
    if not text.strip():
        raise UsageError(f"{path} is empty.", fix="Write one class name per line.")
    if empty := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
        raise UsageError(
            f"Line {empty[0]} of {path} is empty.",
            why="Names are assigned to the classifier's outputs in order, so an empty line may mean a missing name.",
            fix="Remove the line, or add the missing name.",
        )
    cells = [line.split("\t", 1) for line in lines]
    if all(len(row) == 2 and row[0].strip().isdecimal() for row in cells):
        return _ordered(path, [(int(number), name) for number, name in cells])
    if numbered := _numbered(lines):
        return _ordered(path, numbered)
    parts = [line.strip().split(None, 1) for line in lines]
    if all(len(part) == 2 and wordnet.is_id(part[0]) for part in parts):
        return [name for _, name in parts]
    return lines


def _numbered(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Ids and names, if every line has both; empty otherwise.

    A name may start or end with a number ("1 euro", "Airbus 320"), so the numbers must count from 0 or 1 without gaps,
    and the names must be distinct without them.
    """
    for pattern, number, name in ((_SYNSET_AND_NUMBER, 1, 2), (_NUMBER_FIRST, 1, 2), (_NUMBER_LAST, 2, 1)):
        found = [pattern.fullmatch(line) for line in lines]
        entries = [(int(match[number]), match[name]) for match in found if match is not None]
        if len(entries) < len(lines) or not _counting([number for number, _ in entries]):
            continue
        if len({name for _, name in entries}) == len(entries):
            return entries
    return []


def _counting(numbers: Sequence[int]) -> bool:
    """Whether numbers count from 0 or 1 without gaps, in any order."""
    return sorted(numbers) in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))


def _literal(text: str) -> Any:
    """A dictionary or list as Python or JSON writes it; None if it is neither. Nothing is evaluated."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _from_yaml(path: Path, text: str) -> list[str]:
    """The `names` of YOLO's data.yaml: a list, or ids and names. Words such as `no` stay words."""
    try:
        import yaml
    except ImportError as error:
        raise missing_extra("yaml", "cpu", f"Reading {path.name}") from error
    try:
        # This loader makes only texts, lists and dictionaries.
        depth = 0
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases (*name) are not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                # The time that PyYAML takes grows with the square of the depth.
                raise ValueError(f"lists within lists are read to a depth of {DEEPEST}")
        loader = yaml.BaseLoader(text)
        root = loader.get_single_node()
        for node in (root, *(value for _, value in _pairs(root))):
            _unique_keys([(key.value, None) for key, _ in _pairs(node)])
        held = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(
            f"{path} is not valid YAML.",
            why=" ".join(f"{error}".split())[:200],
            fix="Write one class name per line into a text file.",
        ) from error
    held = held if isinstance(held, dict) else {}
    names = held.get("names", held.get("classes"))
    if isinstance(names, list) and names:
        return [_one_name(path, name) for name in names]
    if isinstance(names, dict) and names and all(_is_id(key) for key in names):
        return _ordered(path, [(int(key), _one_name(path, name)) for key, name in names.items()])
    raise UsageError(
        f"{path} contains no class names.",
        why="Of YAML files, only the key `names` is read, with a list, or with ids and names.",
        fix="Write one class name per line into a text file.",
    )


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a node of YAML; none of other nodes than mappings."""
    return node.value if getattr(node, "id", "") == "mapping" else []


def _from_table(path: Path, text: str, delimiter: str | None) -> list[str]:
    head, _, rest = text.partition("\n")
    if declared := re.fullmatch(r'"?sep=(.)"?', head.strip(" ")):
        # The first line of Excel's files.
        delimiter, text = declared[1], rest
    found = delimiter or max(",;\t", key=head.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=found, strict=True) if any(row)]
    except csv.Error as error:
        raise UsageError(
            f"{path} is not a valid CSV file.", why=f"{error}.", fix="Give one class name per line."
        ) from error
    if not rows:
        raise UsageError(f"{path} is empty.", fix="Write one class name per line.")
    if ragged := [number for number, row in enumerate(rows, start=1) if len(row) != len(rows[0])]:
        raise UsageError(
            f"Row {ragged[0]} of {path} has {len(rows[ragged[0] - 1])} cells, but the first row has {len(rows[0])}.",
            fix="Quote names that contain a comma, or use a text file with one name per line.",
        )
    return _from_columns(path, rows)


def _from_columns(path: Path, rows: Sequence[Sequence[str]]) -> list[str]:
    """Names from a table whose first row may be a heading."""
    heading = [cell.strip().lower() for cell in rows[0]]
    columns = list(zip(*rows, strict=True))
    numeric = [number for number, column in enumerate(columns) if _numbers(column[1:])]
    headed = any(not _numbers(columns[number][:1]) for number in numeric) or (
        not numeric and (heading[0] in _NAME_HEADINGS or any(cell in _ID_HEADINGS for cell in heading))
    )
    if len(columns) == 1:
        return [row[0] for row in (rows[1:] if headed or heading[0] in _NAME_HEADINGS else rows)]
    body = rows[1:] if headed else rows
    told = [number for word in _ID_HEADINGS for number in numeric if headed and heading[number] == word]
    # Other numbers are not ids unless they count: a table may hold the number of images of each class.
    counting = [number for number in numeric if _counting([int(row[number]) for row in body])]
    unheaded = [] if headed else numeric
    rank = {number: headed and heading[number] in _ROW_HEADINGS for number in counting}
    ids = next(iter([*told, *sorted(counting, key=lambda number: rank[number]), *unheaded]), None)
    others = [number for number in range(len(columns)) if number not in numeric] or [
        number for number in range(len(columns)) if number != ids
    ]
    named = [number for word in _NAME_HEADINGS for number in others if headed and heading[number] == word]
    names = (named or others)[0]
    if ids is None:
        return [row[names] for row in body]
    return _ordered(path, [(int(row[ids]), row[names]) for row in body])


def _numbers(cells: Sequence[str]) -> bool:
    return bool(cells) and all(cell.strip().isdecimal() for cell in cells)


def _from_json(path: Path, text: str) -> list[str]:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a valid JSON file of class names.", why=f"{error}") from error
    return _from_value(path, value)


def _from_value(path: Path, value: Any) -> list[str]:
    """Names from the lists and dictionaries of a JSON file, or of one that Python wrote."""
    if isinstance(value, dict):
        keys = ("id2label", "label2id", "classes", "categories", "labels", "names")
        inner = next((key for key in keys if key in value), None)
        if inner is not None and isinstance(value[inner], list | dict):
            value = value[inner]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _from_objects(path, value)
    if isinstance(value, dict) and value and not all(_is_id(key) for key in value):
        if all(_is_id(number) for number in value.values()):
            value = {int(number): name for name, number in _inverted(path, value)}
    elif isinstance(value, dict) and value and all(type(number) is int for number in value.values()):
        value = {number: name for name, number in _inverted(path, value)}
    if isinstance(value, dict) and value and all(_is_id(key) for key in value):
        return _ordered(path, [(int(key), _one_name(path, name)) for key, name in value.items()])
    if isinstance(value, list) and value:
        return [_one_name(path, name) for name in value]
    raise UsageError(
        f"{path} contains no class names.",
        fix='Give a list, ["cat", "dog"], or ids and names as in transformers\' config: {"0": "cat", "1": "dog"}.',
    )


def _is_id(value: Any) -> bool:
    """Whether a value is a number from 0, also as a word."""
    return (type(value) is int and value >= 0) or (isinstance(value, str) and value.strip().isdecimal())


def _from_objects(path: Path, items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names from objects with the same keys, as in COCO's `categories`."""
    keys = [key for key in items[0] if all(isinstance(item.get(key), str | int) for item in items)]
    rows = [keys, *([str(item[key]) for key in keys] for item in items)]
    if not any(key.lower() in _NAME_HEADINGS for key in keys):
        raise UsageError(
            f"The objects in {path} have no class names.",
            why=f"Their keys are {', '.join(list(items[0])[:6]) or 'none'}.",
            fix='Give objects with an id and a name: [{"id": 0, "name": "cat"}, …].',
        )
    return _from_columns(path, rows)


def _inverted(path: Path, value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if len({int(number) for number in value.values()}) != len(value):
        raise UsageError(f"{path} uses one id for two names.", fix="Give each class its own id.")
    return list(value.items())


def _one_name(path: Path, value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str) and wordnet.is_id(f"{value[0]}"):
        # Keras' imagenet_class_index.json: {"0": ["n01440764", "tench"], …}
        return value[1]
    if not isinstance(value, str):
        raise UsageError(
            f"{path} has {reprlib.repr(value)} in place of a class name.",
            fix='Give a list of names, ["cat", "dog"], or ids and names, {"0": "cat", "1": "dog"}.',
        )
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        duplicate = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"duplicate key '{duplicate}'")
    return found


def _ordered(path: Path, entries: Sequence[tuple[int, str]]) -> list[str]:
    """Names in the order of their ids, which must count from 0 or 1 without gaps."""
    numbers = sorted(number for number, _ in entries)
    start = numbers[0] if numbers and numbers[0] in (0, 1) else 0
    wanted = range(start, start + len(numbers))
    if numbers != list(wanted):
        duplicates = sorted(number for number, times in Counter(numbers).items() if times > 1)
        absent = sorted(set(wanted) - set(numbers))
        what = f"id {duplicates[0]} occurs twice" if duplicates else f"id {absent[0]} is missing"
        raise UsageError(
            f"The ids in {path} are not 0 to {len(numbers) - 1}: {what}.",
            fix="Give each output of the classifier one id and one name.",
        )
    return [name for _, name in sorted(entries, key=lambda entry: entry[0])]


def _named(path: Path, names: list[str]) -> list[str]:
    """Translates WordNet ids if all names are such ids; else returns the names unchanged."""
    if not names or not all(map(wordnet.is_id, names)):
        return names
    table = wordnet.synsets(names, f"Translating the {len(names)} WordNet ids in {path}")
    if unknown := next((number for number, synset in table.items() if synset is None), None):
        raise UsageError(f"{path} contains the WordNet id {unknown}, which is not an ImageNet class.")
    found = [synset for name in names if (synset := table[name]) is not None]
    # Two synsets may share a name ("crane"); their definitions distinguish them.
    shared = {name for name, times in Counter(synset.names for synset in found).items() if times > 1}
    return [
        f"{synset.names} ({re.split(r'[;,]', synset.definition)[0]})" if synset.names in shared else synset.names
        for synset in found
    ]
