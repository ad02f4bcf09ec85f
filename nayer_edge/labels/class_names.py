"""Class names: read from text, JSON or CSV files as their owners have them, and turned into what a prompt says.

Nothing heavy is imported here: a recipe that names a file of labels is read without torch.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nayer_edge.errors import UsageError, missing_extra

Synonyms = Literal["first", "all", "average"]

MAX_BYTES = 16 * 2**20
MAX_LABELS = 100_000
BESIDE = (".labels.txt", ".labels.json", ".labels.csv")
"""how a file of labels is called that belongs to a file of embeddings: clip.npy has clip.labels.txt"""
_WORDNET = re.compile(r"n\d{8}")
_ID_HEADINGS = ("id", "index", "idx", "class_id", "label_id", "class_index", "number")
_NAME_HEADINGS = ("name", "class_name", "label_name", "label", "class", "classes", "labels", "title", "category")
_COMMA = re.compile(r",(?![^(]*\))")
"""not one inside brackets"""


# ------------------------------------------------------------------ what a prompt says


def spoken(label: str) -> str:
    """A class name as one would say it.

    >>> spoken("aquarium_fish")
    'aquarium fish'
    """
    return " ".join(label.replace("_", " ").split())


def synonyms_of(label: str) -> tuple[str, ...]:
    """The comma-separated names of one class, as one would say them; never empty.

    >>> synonyms_of("tench, Tinca tinca")
    ('tench', 'Tinca tinca')
    """
    parts = tuple(part for part in map(spoken, _COMMA.split(label)) if part)
    return parts or (spoken(label),)


def phrases(labels: Sequence[str], synonyms: Synonyms) -> list[tuple[str, ...]]:
    """What stands in place of {label} for each class; several phrases are averaged.

    Args:
        synonyms: first: the first of the comma-separated names; where classes share it ("maillot" and
            "maillot, tank suit"), the whole label. all: the whole label. average: every name by itself.
    """
    if synonyms == "average":
        return [synonyms_of(label) for label in labels]
    whole = [(spoken(label),) for label in labels]
    if synonyms == "all":
        return whole
    first = [synonyms_of(label)[:1] for label in labels]
    shared = {name for name, times in Counter(first).items() if times > 1}
    return [all_of_it if name in shared else name for name, all_of_it in zip(first, whole, strict=True)]


# ------------------------------------------------------------------ files


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names in a file, in the order of the classifier's outputs.

    `.json`: a list, {"0": "cat", …}, {"cat": 0, …}, or a file that holds one of these as `id2label` (transformers'
    config.json), `label2id` or `classes` (our model cards). `.csv`, `.tsv`: with or without a header, one column of
    names, or ids and names. Anything else: one name per line, after a tab or a WordNet id where there is one.
    A file of WordNet ids alone is translated with timm's table, where timm is installed.

    Raises:
        UsageError: no such file, no text, or names that are missing, empty or doubled; says which.
        MissingError: WordNet ids, and no timm.
    """
    text = _text_of(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        names = _from_json(path, text)
    elif suffix in (".csv", ".tsv"):
        names = _from_table(path, text, "\t" if suffix == ".tsv" else None)
    else:
        names = _from_lines(path, text)
    names = _named(path, [unicodedata.normalize("NFC", name.strip()) for name in names])
    return checked(names, str(path))


def checked(names: Sequence[str], source: str) -> tuple[str, ...]:
    """Class names that are all there and all different.

    Raises:
        UsageError: fewer than two, too many, an empty one, or one twice.
    """
    if empty := [number for number, name in enumerate(names) if not name.strip()]:
        raise UsageError(
            f"{source} has no name for {_classes(empty)}.",
            why="Nothing can be said of it to a text encoder.",
            fix="Give every class a name.",
        )
    if not 2 <= len(names) <= MAX_LABELS:
        raise UsageError(
            f"{source} holds {len(names)} class names; a classifier has 2 to {MAX_LABELS:,}.",
            fix="Give one name for each output of the classifier, in its order.",
        )
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        places.setdefault(name, []).append(number)
    if doubled := {name: numbers for name, numbers in places.items() if len(numbers) > 1}:
        shown = "; ".join(f"'{name}' ({_classes(numbers)})" for name, numbers in list(doubled.items())[:4])
        raise UsageError(
            f"{source} gives {len(doubled)} name{'s' if len(doubled) > 1 else ''} to more than one class: {shown}.",
            why="Their embeddings would be the same, and the generator could not tell these classes apart.",
            fix="Say what each of them is. In ImageNet's list, for example: 'crane (bird)' and 'crane (machine)'.",
        )
    return tuple(names)


def labels_beside(path: Path) -> Path | None:
    """The file of labels that belongs to a file of embeddings, if there is one."""
    return next((found for suffix in BESIDE if (found := path.with_suffix(suffix)).is_file()), None)


def _classes(numbers: Sequence[int]) -> str:
    """ "class 3", or "classes 3, 5 and 6 more" (counted from 0)."""
    shown = ", ".join(map(str, numbers[:4])) + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")
    return f"class{'es' if len(numbers) > 1 else ''} {shown}"


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than a file of class names can be ({MAX_BYTES >> 20} MiB).")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no file of class names at {path}.", fix="Mend the path; a relative one starts at the recipe."
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read.", why=f"The system says: {error.strerror or error}.") from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no UTF-8 text (byte {error.start}).",
            fix="Save it as UTF-8; iconv -f latin1 -t utf-8 turns an old Western text into one.",
        ) from error
    if "\0" in text:
        raise UsageError(f"{path} is no text: it holds NUL characters.", fix="Give a text, JSON or CSV file.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _from_lines(path: Path, text: str) -> list[str]:
    lines = text.rstrip("\n\t ").split("\n")
    if not text.strip():
        raise UsageError(f"{path} is empty.", fix="Write one class name per line.")
    if empty := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
        raise UsageError(
            f"Line {empty[0]} of {path} is empty.",
            why="Names are taken in the order of the classifier's outputs, so a gap may mean a name that was lost.",
            fix="Remove the line, or write the name that belongs there.",
        )
    cells = [line.split("\t", 1) for line in lines]
    if all(len(row) == 2 and row[0].strip().isdecimal() for row in cells):
        return _ordered(path, [(int(number), name) for number, name in cells])
    parts = [line.strip().split(None, 1) for line in lines]
    if all(len(part) == 2 and _WORDNET.fullmatch(part[0]) for part in parts):
        return [name for _, name in parts]
    return lines


def _from_table(path: Path, text: str, delimiter: str | None) -> list[str]:
    if delimiter is None:
        head = text.partition("\n")[0]
        delimiter = max(",;\t", key=head.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True) if any(row)]
    except csv.Error as error:
        raise UsageError(f"{path} is no CSV file.", why=f"{error}.", fix="Give one class name per line.") from error
    if not rows:
        raise UsageError(f"{path} is empty.", fix="Write one class name per line.")
    if odd := [number for number, row in enumerate(rows, start=1) if len(row) != len(rows[0])]:
        raise UsageError(
            f"Row {odd[0]} of {path} has {len(rows[odd[0] - 1])} cells, and the first has {len(rows[0])}.",
            fix="Put a name that holds a comma in double quotes, or use a text file with one name per line.",
        )
    heading = [cell.strip().lower() for cell in rows[0]]
    columns = list(zip(*rows, strict=True))
    ids = next((number for number, column in enumerate(columns) if _numbers(column[1:])), None)
    if ids is not None and len(columns) > 1:
        headed = not _numbers(columns[ids][:1])
    else:
        ids, headed = None, heading[0] in _NAME_HEADINGS or any(cell in _ID_HEADINGS for cell in heading)
    body = rows[1:] if headed else rows
    others = [number for number in range(len(columns)) if number != ids]
    named = [number for word in _NAME_HEADINGS for number in others if headed and heading[number] == word]
    names = (named or others)[0]
    if ids is None:
        return [row[names] for row in body]
    return _ordered(path, [(int(row[ids]), row[names]) for row in body])


def _numbers(cells: Sequence[str]) -> bool:
    return bool(cells) and all(cell.strip().isdecimal() for cell in cells)


def _from_json(path: Path, text: str) -> list[str]:
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON file of class names.", why=f"{error}") from error
    if isinstance(value, dict):
        inner = next((key for key in ("id2label", "label2id", "classes", "labels", "names") if key in value), None)
        if inner is not None and isinstance(value[inner], list | dict):
            value = value[inner]
    if isinstance(value, dict) and value and all(type(number) is int for number in value.values()):
        value = {number: name for name, number in _inverted(path, value)}
    if isinstance(value, dict) and value and all(str(key).strip().isdecimal() for key in value):
        return _ordered(path, [(int(key), _one_name(path, name)) for key, name in value.items()])
    if isinstance(value, list) and value:
        return [_one_name(path, name) for name in value]
    raise UsageError(
        f"{path} holds no class names.",
        fix='Give a list, ["cat", "dog"], or ids and names as in transformers\' config: {"0": "cat", "1": "dog"}.',
    )


def _inverted(path: Path, value: Mapping[str, int]) -> list[tuple[str, int]]:
    if len(set(value.values())) != len(value):
        raise UsageError(f"{path} gives one id to two names.", fix="Give each class its own id.")
    return list(value.items())


def _one_name(path: Path, value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        # Keras' imagenet_class_index.json: {"0": ["n01440764", "tench"], …}
        return value[1]
    if not isinstance(value, str):
        raise UsageError(
            f"{path} holds {json.dumps(value)[:40]} where a class name should stand.",
            fix='Give a list of names, ["cat", "dog"], or ids and names, {"0": "cat", "1": "dog"}.',
        )
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        doubled = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key '{doubled}' stands there twice")
    return found


def _ordered(path: Path, entries: Sequence[tuple[int, str]]) -> list[str]:
    """Names in the order of their ids, which count from 0 or 1 without gaps."""
    numbers = sorted(number for number, _ in entries)
    start = numbers[0] if numbers and numbers[0] in (0, 1) else 0
    wanted = range(start, start + len(numbers))
    if numbers != list(wanted):
        doubled = sorted(number for number, times in Counter(numbers).items() if times > 1)
        absent = sorted(set(wanted) - set(numbers))
        what = f"id {doubled[0]} stands there twice" if doubled else f"id {absent[0]} is missing"
        raise UsageError(
            f"The ids in {path} are not 0 to {len(numbers) - 1}: {what}.",
            fix="Give each output of the classifier one id and one name.",
        )
    return [name for _, name in sorted(entries, key=lambda entry: entry[0])]


def _named(path: Path, names: list[str]) -> list[str]:
    """WordNet ids translated; other names as they are."""
    ids = [name for name in names if _WORDNET.fullmatch(name)]
    if not ids or len(ids) < len(names):
        return names
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError as error:
        raise missing_extra("timm", "timm", f"Translating the {len(ids)} WordNet ids in {path}") from error
    table = ImageNetInfo()
    try:
        found = [table.label_name_to_description(name) for name in ids]
        # Two synsets may have the same words ("crane"): their definitions tell them apart.
        shared = {name for name, times in Counter(found).items() if times > 1}
        told = [table.label_name_to_description(name, detailed=True).partition(": ")[2] for name in ids]
    except KeyError as error:
        raise UsageError(f"{path} holds the WordNet id {error.args[0]}, which is none of ImageNet's.") from error
    meant = [re.split(r"[;,]", text)[0] for text in told]
    return [f"{name} ({what})" if name in shared else name for name, what in zip(found, meant, strict=True)]
