"""Which class each of a data set's own class names is: by name, by WordNet id, or by number if it has only numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nayer_edge.errors import UsageError
from nayer_edge.labels import wordnet
from nayer_edge.labels.class_names import synonyms_of

MatchedBy = Literal["name", "WordNet id", "number"]

_BETWEEN_WORDS = re.compile(r"[\s_\-,;.()]+")
_BRACKETS = re.compile(r"\([^()]*\)")
_LEADING_ID = re.compile(r"(n\d{8})[\s_-]+(.+)")
_NUMBER = re.compile(r"(?:label_|class_)?(\d{1,9})", re.IGNORECASE)
_SHOWN = 5

_Keys = tuple[frozenset[str], ...]
"""what a name is recognised by, from the strictest form to the loosest"""


@dataclass(frozen=True)
class Matched:
    """The class number of each name of a data set.

    Attributes:
        numbers: name → class number.
        by: how they were found.
    """

    numbers: Mapping[str, int]
    by: MatchedBy


def match_names(names: Sequence[str], classes: Sequence[str], what: str) -> Matched:
    """Finds the class of each name.

    Names are compared exactly (in Unicode's form NFC), then as words without regard to case, underscores and
    punctuation, then by their comma-separated synonyms. If one side has WordNet ids and the other words, the ids are
    translated. At each of these steps a pair counts only if neither side has another candidate.

    Args:
        names: the data set's, distinct.
        classes: the teacher's, in the order of its outputs.
        what: the subject of the error: "The class folders in holdout".

    Raises:
        UsageError: a name is no class, or could be several; the message has the differences of both lists.
        MissingError: there are WordNet ids to translate, and timm is not installed.
    """
    found = _pairs([_keys(name) for name in names], [_keys(label) for label in classes])
    if len(found) == len(names):
        return Matched({names[name]: number for name, number in found.items()}, "name")
    if all(map(wordnet.is_id, names)):
        translated = _by_id(names, classes, what)
        if len(translated) == len(names):
            return Matched(translated, "WordNet id")
        found = {number: translated[name] for number, name in enumerate(names) if name in translated}
    elif all(map(wordnet.is_id, classes)):
        ids = _by_id(classes, names, what)
        if len(ids) == len(names):
            number_of = {label: number for number, label in enumerate(classes)}
            return Matched({names[name]: number_of[label] for label, name in ids.items()}, "WordNet id")
    if not found and (numbers := as_numbers(names, len(classes), what)) is not None:
        return Matched(numbers, "number")
    raise _differences(names, classes, found, what)


def as_numbers(names: Sequence[str], count: int, what: str) -> dict[str, int] | None:
    """Names that are mere numbers ("7", "007", "LABEL_7") as class numbers; None if some are not.

    Raises:
        UsageError: there is no class of such a number.
    """
    parsed = [_NUMBER.fullmatch(name.strip()) for name in names]
    if not all(parsed):
        return None
    numbers = {name: int(match[1]) for name, match in zip(names, parsed, strict=True) if match}
    if len(set(numbers.values())) < len(numbers):
        return None
    if outside := sorted(number for number in numbers.values() if number >= count):
        raise UsageError(
            f"{what} are numbers, and {outside[0]} is not one of the {count} classes, which are numbered from 0.",
            why="They run from 1." if min(numbers.values()) == 1 and outside == [count] else "",
            fix="Name them like the classes, or number them from 0 in the order of the class names.",
        )
    return numbers


def _words(name: str) -> str:
    return _BETWEEN_WORDS.sub(" ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _forms(name: str) -> frozenset[str]:
    """A name and its synonyms as words, each with and without text in brackets."""
    names = (name, *synonyms_of(name))
    return frozenset(_words(form) for each in names for form in (each, _BRACKETS.sub("", each))) - {""}


def _keys(name: str) -> _Keys:
    exact, own_id = unicodedata.normalize("NFC", name).strip(), _LEADING_ID.fullmatch(name.strip())
    number, text = (own_id[1], own_id[2]) if own_id else (exact, exact)
    words = _set(_words(text))
    return _set(exact), _set(number), _set(synonyms_of(text)[0]), words, words, _first(text), _forms(text)


def _keys_of_id(number: str, synset: wordnet.Synset) -> _Keys:
    """Of two synsets called "crane", the definition ("… wading bird …") tells which one is the class "crane (bird)"."""
    names = synset.names
    defined = frozenset(f"{_words(synonyms_of(names)[0])} {word}" for word in _words(synset.definition).split())
    return (
        _set(names), _set(number), _set(synonyms_of(names)[0]), _set(_words(names)), defined, _first(names),
        _forms(names),
    )  # fmt: skip


def _set(name: str) -> frozenset[str]:
    return frozenset({name} - {""})


def _first(name: str) -> frozenset[str]:
    return _set(_words(synonyms_of(name)[0]))


def _by_id(ids: Sequence[str], names: Sequence[str], what: str) -> dict[str, int]:
    """WordNet id → place of its name, for those that have one."""
    purpose = f"Translating WordNet ids ({what[0].lower()}{what[1:]})"
    # Compared with all of ImageNet's classes, so that "crane" is ambiguous even if the data has only one crane.
    every = list(dict.fromkeys((*ids, *wordnet.imagenet_ids(purpose))))
    known = {number: synset for number, synset in wordnet.synsets(every, purpose).items() if synset is not None}
    found = _pairs([_keys_of_id(*entry) for entry in known.items()], [_keys(name) for name in names])
    order = list(known)
    translated = {order[place]: name for place, name in found.items()}
    return {number: translated[number] for number in ids if number in translated}


def _pairs(left: Sequence[_Keys], right: Sequence[_Keys]) -> dict[int, int]:
    """Pairs that share a key of the same level, where neither has another candidate; strictest level first."""
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    progress = True
    while progress:
        progress = False
        for level in range(len(left[0]) if left else 0):
            ours = _places(left, level, pairs.keys())
            theirs = _places(right, level, taken)
            partners: dict[int, set[int]] = {}
            suitors: dict[int, set[int]] = {}
            for key in ours.keys() & theirs.keys():
                for one in ours[key]:
                    partners.setdefault(one, set()).update(theirs[key])
                for other in theirs[key]:
                    suitors.setdefault(other, set()).update(ours[key])
            sure = [(one, *others) for one, others in partners.items() if len(others) == 1]
            for one, other in sure:
                if len(suitors[other]) == 1:
                    pairs[one] = other
                    taken.add(other)
                    progress = True
    return pairs


def _places(entries: Sequence[_Keys], level: int, without: Container[int]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, keys in enumerate(entries):
        if place not in without:
            for key in keys[level]:
                places.setdefault(key, []).append(place)
    return places


def _differences(names: Sequence[str], classes: Sequence[str], found: Mapping[int, int], what: str) -> UsageError:
    ours = [name for number, name in enumerate(names) if number not in found]
    theirs = [label for number, label in enumerate(classes) if number not in found.values()]
    return UsageError(
        f"{what} are not the teacher's classes.",
        why=f"Only in the data ({len(ours)}): {_listed(ours)}.\n"
        f"Only among the teacher's classes ({len(theirs)}): {_listed(theirs)}.",
        fix=f"Name them like the classes: {', '.join(classes[:_SHOWN])}{', …' if len(classes) > _SHOWN else ''}",
    )


def _listed(names: Sequence[str]) -> str:
    return (", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")) or "none"
