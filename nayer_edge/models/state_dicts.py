"""Reads users' checkpoints: nested, wrapped, averaged or half-precision state dicts. Nothing is unpickled.

`read_state_dict` finds the state dict in a file; `load_weights` matches it with a network key by key and reports what
it skipped. Ambiguous files are rejected with a list of choices, never guessed.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nayer_edge.errors import UsageError, nearest
from nayer_edge.models.checkpoint_files import SAVE_AGAIN, read_checkpoint
from nayer_edge.models.classifier import Classifier

KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "backbone")
"""keys under which files nest a state dict, in order of preference"""
AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?|polyak|shadow)([._]|$)", re.IGNORECASE)
"""names of averaged weights"""
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loop|callback|momentum", re.IGNORECASE)
AUXILIARY = re.compile(r"(^|\.)(AuxLogits|aux_?(logits|head|classifier)?\d*)\.", re.IGNORECASE)
"""auxiliary heads, used only in training"""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""parts of names added by torch.compile, FSDP, activation checkpointing and Lightning's wrappers"""
PARALLEL = "module"
"""the part added by DataParallel and DistributedDataParallel; a network may have a module of this name, too"""
COUNTER = "num_batches_tracked"
SHOWN = 4
DEPTH = 3


@dataclass(frozen=True)
class Loaded:
    """How weights were loaded from a file.

    Attributes:
        key: the prefix of the loaded tensors; empty for all.
        ignored: tensors that were skipped.
        notes: other remarks for the card.
    """

    key: str = ""
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The entries for the card."""
        found = {"prefix": self.key, "ignored": list(self.ignored), "notes": list(self.notes)}
        return {name: value for name, value in found.items() if value}


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors file, or from a PyTorch file with `weights_only=True`.

    Handles nested keys and the name prefixes of torch's wrappers.

    Args:
        key: key of the weights in the file ("model_ema", "state_dict.teacher"), or the prefix of their names; needed
            only if the file contains several sets.

    Raises:
        UsageError: there is no such file, or it contains no weights or several sets.
        IntegrityError: it is damaged, or a pickle that would run code (which was not run).
    """
    return _chosen(read_checkpoint(path), path, key)[0]


def key_taken(path: Path, key: str | None = None) -> str:
    """The key under which `read_state_dict` finds the weights; empty if they are the whole file."""
    return _chosen(read_checkpoint(path), path, key)[1]


def _chosen(content: Any, path: Path, key: str | None) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file's content, and its key."""
    found = dict(_state_dicts(content))
    if key:
        if key in found:
            return _unwrapped(found[key]), key
        inside = {}
        for place, tensors in found.items():
            for start in dict.fromkeys((key, key.removeprefix(f"{place}."))):
                if under := _under(tensors, f"{start}."):
                    inside[f"{place}.{start}".lstrip(".")] = under
        if key not in inside and not _all_equal(list(inside.values())):
            raise several_sets(path, list(inside))
        if inside:
            name = key if key in inside else next(iter(inside))
            return _unwrapped(inside[name]), name
        raise UsageError(
            f"{path} has no weights under '{key}'.{nearest(key, found)}",
            why=f"It has: {_listed(found)}." if found else "",
            fix="Correct teacher.weights_key.",
        )
    if not found:
        what = f" It is a {type(content).__name__}." if not isinstance(content, Mapping) else ""
        raise UsageError(f"{path} contains no state dict.{what}", fix=SAVE_AGAIN)
    if len(found) > 1:
        plain = [place for place in found if not AVERAGED.search(place)]
        known = [place for name in KEYS for place in plain if place.rpartition(".")[2] == name]
        if len(plain) == len(found) and known and not _differing(found, known[0]):
            return _unwrapped(found[known[0]]), known[0]
        raise UsageError(
            f"{path} contains {len(found)} sets of weights: {_listed(found)}.",
            why="They may differ, and only you know which are the teacher's. A running average (EMA) is usually the "
            "set that was evaluated.",
            fix=choose_key(next(iter(found))),
        )
    place, tensors = next(iter(found.items()))
    return _unwrapped(tensors), place


def _differing(found: Mapping[str, Mapping[str, Tensor]], place: str) -> bool:
    """Whether the weights at a place are also elsewhere, with other values: the last ones and the best, for example."""
    known = _unwrapped(found[place])
    shapes = {name: value.shape for name, value in known.items()}
    for other, tensors in found.items():
        bare = _unwrapped(tensors)
        if other == place or {name: value.shape for name, value in bare.items()} != shapes:
            continue
        if not all(torch.equal(value, bare[name]) for name, value in known.items() if not name.endswith(COUNTER)):
            return True
    return False


def _all_equal(sets: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether they are copies of one set of weights."""
    return all(
        other.keys() == sets[0].keys() and all(torch.equal(value, other[name]) for name, value in sets[0].items())
        for other in sets[1:]
    )


def choose_key(key: str) -> str:
    """The fix for a file with several sets of weights."""
    typed = shlex.quote(key)
    return f"Choose, for example: init … --key {typed}; elsewhere --set teacher.weights_key={typed}"


def _state_dicts(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every state dict in nested dictionaries, with its dotted key; in an outermost list, the key is a number."""
    if depth == 0 and isinstance(content, list | tuple):
        content = {str(number): item for number, item in enumerate(content) if isinstance(item, Mapping)}
    if not isinstance(content, Mapping) or depth > DEPTH or NOT_WEIGHTS.search(place):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    nested = [
        found
        for name, value in content.items()
        if isinstance(name, str)
        for found in _state_dicts(value, f"{place}.{name}".lstrip("."), depth + 1)
    ]
    # A few tensors beside a state dict are values such as an epoch number or a loss, and a few inside it are parts of
    # it, unless both are the weights of one network.
    own = len(tensors) > max((len(inner) for _, inner in nested), default=0)
    if own or any(_alike(tensors, inner) for _, inner in nested):
        yield place, tensors
    yield from (found for found in nested if not own or _alike(tensors, found[1]))


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether most of the names of both are the same."""
    shared = unwrapped(one).keys() & unwrapped(other).keys()
    return len(shared) > max(len(one), len(other)) / 2


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {bare: tensors[name] for bare, name in unwrapped(tensors).items()}


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without the parts that torch's wrappers add → the names as given.

    "module" is such a part where it is the only child of a module ("features.module.0.weight"), or of the network.
    """
    names = list(names)
    found = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in names}
    if len(found) < len(names):
        return {name: name for name in names}
    for _ in range(DEPTH):
        children: dict[tuple[str, ...], set[str]] = {}
        split = {name: tuple(name.split(".")) for name in found}
        for parts in split.values():
            for count in range(len(parts)):
                children.setdefault(parts[:count], set()).add(parts[count])
        shorter = {
            ".".join(
                part
                for place, part in enumerate(parts)
                if part != PARALLEL or place == len(parts) - 1 or children[parts[:place]] != {PARALLEL}
            ): found[name]
            for name, parts in split.items()
        }
        if len(shorter) < len(found) or shorter.keys() == found.keys():
            break
        found = shorter
    return found


@dataclass(frozen=True)
class Alignment:
    """Which tensor of a file belongs to which tensor of a network, by their names.

    Attributes:
        names: name in the network → name in the file. Tensors that the network lacks are under their own names, without
            prefix and wrappers.
        prefix: the prefix in the file that was removed; empty if none was.
        outside: tensors of the file without that prefix, which belong to something else.
        rivals: prefixes under which the file holds these tensors, if there are several; then `names` are of the first.
    """

    names: dict[str, str]
    prefix: str = ""
    outside: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()


def align(names: Collection[str], wanted: Collection[str]) -> Alignment:
    """Matches the names in a file with those of a network: without wrappers' parts, and with a prefix removed or added
    that only one of them has. The head may have another prefix than the rest ("backbone.conv1.weight",
    "head.fc.weight")."""
    held, own = unwrapped(names), unwrapped(wanted)
    best, rivals = _prefix(held, own)
    if best is None:
        added = max(_prefixes(own), key=lambda prefix: len({prefix + n for n in held} & own.keys()), default="")
        if len({added + name for name in held} & own.keys()) <= max(len(held.keys() & own.keys()), len(own) // 2):
            added = ""
        inside, outside = {added + name: held[name] for name in held}, {}
    else:
        inside = {name.removeprefix(best): held[name] for name in held if name.startswith(best)}
        outside = {name: held[name] for name in held if not name.startswith(best)}
    # The rest, usually the head, under one other prefix.
    missing = {name for name in own if name not in inside and not name.endswith(COUNTER)}
    spare = outside if best else {name: file for name, file in inside.items() if name not in own}
    if missing and len(missing) <= len(own) // 2:
        others = [prefix for prefix in _prefixes(spare) if all(prefix + name in spare for name in missing)]
        if len(others) == 1:
            for name in missing:
                file = spare.pop(others[0] + name)
                inside.pop(others[0] + name, None)
                inside[name] = file
    return Alignment({own.get(name, name): file for name, file in inside.items()}, best or "", tuple(outside.values()),
                     rivals)  # fmt: skip


def _prefix(held: Collection[str], own: Collection[str]) -> tuple[str | None, tuple[str, ...]]:
    """The prefix in the file under which most of the network's names are found, and all of these prefixes if there are
    several; None if names match better, or as well, without one."""
    # Some copies of a network lack the counters, which nothing reads.
    names = [name for name in held if not name.endswith(COUNTER)]
    known, wanted = set(names), {name for name in own if not name.endswith(COUNTER)}
    # A few names may match by chance, but not more than half.
    least = max(len(known & wanted), len(wanted) // 2)
    counts = {
        prefix: len({name.removeprefix(prefix) for name in names if name.startswith(prefix)} & wanted)
        for prefix in _prefixes(names, least)
    }
    most = max(counts.values(), default=0)
    if most <= least:
        return None, ()
    best = [prefix for prefix in counts if counts[prefix] == most]
    return best[0], tuple(best) if len(best) > 1 else ()


def load_weights(
    classifier: Classifier, tensors: Mapping[str, Tensor], source: Path, ignore: Iterable[str] = ()
) -> Loaded:
    """Loads weights into the backbone; all of its tensors must be present, with the right shapes.

    A name prefix that only the file or only the backbone has is removed or added. Auxiliary heads and `ignore` are
    skipped, and half or double precision is converted to the backbone's.

    Args:
        ignore: name prefixes of tensors that do not belong to the backbone ("projector.").

    Raises:
        UsageError: the weights belong to another architecture (the message lists the keys), or are not finite.
    """
    wanted = classifier.backbone.state_dict()
    alignment = align(tensors, wanted)
    if alignment.rivals:
        raise several_sets(source, alignment.rivals)
    aligned = {name: tensors[held] for name, held in alignment.names.items()}
    # Older checkpoints lack this counter, and nothing reads it.
    optional = {n for n in wanted if n.endswith(COUNTER) and n.replace(COUNTER, "running_mean") in aligned}
    missing = sorted(set(wanted) - set(aligned) - optional)
    extra = sorted(set(aligned) - set(wanted))
    heads = [n for n in extra if AUXILIARY.search(n) or any(n.startswith(start) for start in ignore)]
    extra = [name for name in extra if name not in heads]
    shared = sorted(set(wanted) & set(aligned))
    shapes = [n for n in shared if wanted[n].shape != aligned[n].shape and not _one_number(wanted[n], aligned[n])]
    if missing or extra or shapes:
        raise _other(classifier, source, aligned, missing, extra, shapes)
    found = {name: _cast(aligned[name], wanted[name], name, source) for name in shared}
    broken = [name for name, value in found.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise UsageError(
            f"{len(broken)} of {len(found)} tensors in {source} contain NaN or infinity: {_some(broken)}.",
            why="The network was saved after its training diverged, or the file is damaged.",
            fix="Use an earlier checkpoint.",
        )
    classifier.backbone.load_state_dict({**{name: wanted[name] for name in optional}, **found})
    kinds = sorted({str(aligned[n].dtype).removeprefix("torch.") for n in shared if aligned[n].is_floating_point()})
    notes = [f"stored as {', '.join(kinds)}"] if kinds not in ([], ["float32"]) else []
    return Loaded(alignment.prefix, tuple(sorted([*heads, *alignment.outside])), tuple(notes))


def _one_number(a: Tensor, b: Tensor) -> bool:
    """Some checkpoints store counters as scalars, others as tensors of one element."""
    return a.numel() == b.numel() == 1


def several_sets(source: Path, prefixes: Collection[str]) -> UsageError:
    """The error for a file that holds the same tensors under several prefixes."""
    names = sorted(prefix.removesuffix(".") for prefix in prefixes)
    return UsageError(
        f"{source} contains {len(names)} sets of these weights: {', '.join(names)}.",
        why="They may differ, and only you know which are the teacher's. A running average (EMA) is usually the set "
        "that was evaluated.",
        fix=choose_key(names[0]),
    )


def _prefixes(names: Iterable[str], least: int = 0) -> list[str]:
    """Prefixes of more than `least` names that end with a dot, the shortest first."""
    split = [name.split(".") for name in names]
    counts = Counter(".".join(parts[:n]) + "." for parts in split for n in range(1, min(len(parts), DEPTH + 1)))
    found = [prefix for prefix, count in counts.items() if count > least]
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _cast(value: Tensor, wanted: Tensor, name: str, source: Path) -> Tensor:
    # The reverse is a counter that was converted to half precision with everything else.
    if wanted.is_floating_point() and not value.is_floating_point():
        raise UsageError(
            f"{name} in {source} has the type {str(value.dtype).removeprefix('torch.')}.",
            why="The weights are already quantized; a teacher must have floating-point weights.",
            fix="Use the checkpoint from before quantization.",
        )
    return value.to(wanted.dtype).reshape(wanted.shape)


def _other(
    classifier: Classifier,
    source: Path,
    tensors: Mapping[str, Tensor],
    missing: list[str],
    extra: list[str],
    shapes: list[str],
) -> UsageError:
    """The error for weights that do not match, with the likely cause."""
    wanted, classes = classifier.backbone.state_dict(), len(classifier.classes)
    parts = []
    for kind, names in (("missing", missing), ("not in the model", extra), ("with another shape", shapes)):
        if names:
            parts.append(f"{len(names)} {kind} ({_some(names)})")
    what = f"The weights in {source} do not match {classifier.model} with {classes} classes."
    why = f"Keys: {'; '.join(parts)}."
    if shapes:
        first = shapes[0]
        why += f" {first} is {_shape(tensors[first])} in the file, {_shape(wanted[first])} in the model."
    if missing and (alike := nearest(missing[0], extra)):
        why += f" For {missing[0]}:{alike}"
    fix = "Use the architecture that they were trained with."
    head = _head(wanted, classes)
    stem = next((name for name, tensor in wanted.items() if tensor.ndim == 4), None)
    if not missing and not extra and head and set(shapes) <= head:
        outputs = tensors[shapes[0]].shape[0]
        why = f"Their head has {outputs} outputs, but the recipe has {classes} classes. {why}"
        fix = f"Give teacher.classes one name for each of the {outputs} outputs, in order."
    elif not extra and not shapes and head and set(missing) <= head:
        why = f"They have no classifier head: {why}"
        fix = "Use the weights of the whole classifier."
    elif stem and shapes == [stem] and not missing and not extra:
        # A convolution with groups stores the channels of one group.
        channels = tensors[stem].shape[1] * max(1, classifier.spec.channels // wanted[stem].shape[1])
        why = f"They were trained on images of {channels} channels. {why}"
        fix = f"Add --set teacher.input.channels={channels}"
    elif extra and not missing and not shapes:
        start = extra[0].partition(".")[0]
        fix += f" If the extra tensors do not belong to it, add --set 'teacher.weights_ignore=[\"{start}.\"]'"
    return UsageError(what, why=why, fix=fix)


def _head(wanted: Mapping[str, Tensor], classes: int) -> set[str]:
    """Tensor names of the last layer with one output per class."""
    last = [name for name, tensor in wanted.items() if tensor.ndim in (2, 4) and tensor.shape[0] == classes]
    if not last:
        return set()
    layer = last[-1].rpartition(".")[0]
    return {name for name in wanted if name.rpartition(".")[0] == layer}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _listed(found: Mapping[str, Mapping[str, Tensor]]) -> str:
    return ", ".join(f"{place or 'the whole file'} ({len(tensors)} tensors)" for place, tensors in found.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape) or "one number"
