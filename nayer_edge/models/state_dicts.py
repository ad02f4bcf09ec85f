"""Reads users' checkpoints: nested, wrapped, averaged or half-precision state dicts. Nothing is unpickled.

`read_state_dict` finds the state dict in a file; `load_weights` matches it with a network key by key and reports what
it skipped. Ambiguous files are rejected with a list of choices, never guessed.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nayer_edge.errors import IntegrityError, UsageError, nearest
from nayer_edge.models.classifier import Classifier
from nayer_edge.storage.tensors import load_tensors

KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "backbone")
"""keys under which files nest a state dict, in order of preference"""
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)", re.IGNORECASE)
"""names of averaged weights"""
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loop|callback|momentum", re.IGNORECASE)
AUXILIARY = re.compile(r"(^|\.)(AuxLogits|aux_?(logits|head|classifier)?\d*)\.", re.IGNORECASE)
"""auxiliary heads, used only in training"""
WRAPPERS = ("module.", "_orig_mod.")
"""name prefixes added by DataParallel, DistributedDataParallel and torch.compile"""
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
    return _chosen(_read(path), path, key)[0]


def key_taken(path: Path, key: str | None = None) -> str:
    """The key under which `read_state_dict` finds the weights; empty if they are the whole file."""
    return _chosen(_read(path), path, key)[1]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"There are no weights at {path}.", fix="Correct teacher.weights in the recipe.")
    if path.suffix == ".safetensors":
        return load_tensors(path, "model weights")
    try:
        with torch.serialization.safe_globals(_safe_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged or hostile file
        raise _unsafe(path, error) from error


def _safe_types() -> list[Any]:
    """Plain value types, besides tensors, that training scripts store in checkpoints: options and numbers."""
    import numpy as np

    kinds: list[Any] = [argparse.Namespace, np.dtype, np.ndarray]
    with contextlib.suppress(AttributeError):
        kinds += [np._core.multiarray.scalar]  # pyright: ignore[reportAttributeAccessIssue]
    return kinds + [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]


def _unsafe(path: Path, error: Exception) -> IntegrityError:
    text = str(error)
    found = re.search(r"GLOBAL (\S+) was not an allowed|Unsupported (?:global|class)[^`]*`?(?:GLOBAL )?(\S+)", text)
    why = text.splitlines()[0] if text else type(error).__name__
    if found:
        name = (found[1] or found[2]).strip("`.,")
        why = f"It is a pickle that would import and run {name}, not a file of tensors only."
    elif "TorchScript" in text:
        why = "It is a TorchScript archive, which is a program."
    return IntegrityError(
        f"{path} is not a state dict that can be read safely; nothing in it was run.",
        why=why,
        fix="Save it again at its source, with torch.save(model.state_dict(), …) or safetensors.",
    )


def _chosen(content: Any, path: Path, key: str | None) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file's content, and its key."""
    found = dict(_state_dicts(content))
    if key:
        if key in found:
            return _unwrapped(found[key]), key
        for place, tensors in found.items():
            under = _under(tensors, f"{key}.")
            if under:
                return _unwrapped(under), f"{place}.{key}".lstrip(".")
        raise UsageError(
            f"{path} has no weights under '{key}'.{nearest(key, found)}",
            why=f"It has: {_listed(found)}." if found else "",
            fix="Correct teacher.weights_key.",
        )
    if not found:
        raise UsageError(f"{path} contains no state dict.", fix="Save it with torch.save(model.state_dict(), …).")
    if len(found) > 1:
        plain = [place for place in found if not AVERAGED.search(place)]
        known = [place for name in KEYS for place in plain if place.rpartition(".")[2] == name]
        if len(plain) == len(found) and known:
            return _unwrapped(found[known[0]]), known[0]
        raise UsageError(
            f"{path} contains {len(found)} sets of weights: {_listed(found)}.",
            why="They may differ, and only you know which are the teacher's. A running average (EMA) is usually the "
            "set that was evaluated.",
            fix=f"Choose, for example: --set teacher.weights_key={next(iter(found))}",
        )
    place, tensors = next(iter(found.items()))
    return _unwrapped(tensors), place


def _state_dicts(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every state dict in nested dictionaries, with its dotted key."""
    if not isinstance(content, Mapping) or depth > DEPTH or NOT_WEIGHTS.search(place):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    nested = [
        found
        for name, value in content.items()
        if isinstance(name, str)
        for found in _state_dicts(value, f"{place}.{name}".lstrip("."), depth + 1)
    ]
    # A few tensors beside a state dict are values such as an epoch number or a loss.
    if len(tensors) > max((len(inner) for _, inner in nested), default=0):
        yield place, tensors
    else:
        yield from nested


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name.replace("._orig_mod.", "."): value for name, value in tensors.items()}
    for _ in range(DEPTH):
        for prefix in WRAPPERS:
            if found and all(name.startswith(prefix) for name in found):
                found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


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
    aligned, key, outside = _aligned(tensors, wanted, source)
    # Older checkpoints lack this counter, and nothing reads it.
    counter = "num_batches_tracked"
    optional = {n for n in wanted if n.endswith(counter) and n.replace(counter, "running_mean") in aligned}
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
    return Loaded(key, tuple(sorted([*heads, *outside])), tuple(notes))


def _one_number(a: Tensor, b: Tensor) -> bool:
    """Some checkpoints store counters as scalars, others as tensors of one element."""
    return a.numel() == b.numel() == 1


def _aligned(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Path
) -> tuple[dict[str, Tensor], str, list[str]]:
    """The tensors under the backbone's names, the removed prefix, and the names without that prefix."""
    tensors = _unwrapped(tensors)

    def matching(prefix: str) -> int:
        return len({name.removeprefix(prefix) for name in tensors if name.startswith(prefix)} & set(wanted))

    best = max(_prefixes(tensors), key=matching, default="")
    # A few names may match by chance, but not more than half.
    if matching(best) > max(matching(""), len(wanted) // 2):
        rivals = [other for other in _prefixes(tensors) if matching(other) == matching(best)]
        if len(rivals) > 1:
            names = [prefix.removesuffix(".") for prefix in rivals]
            raise UsageError(
                f"{source} contains {len(names)} sets of these weights: {', '.join(names)}.",
                fix=f"Choose, for example: --set teacher.weights_key={names[0]}",
            )
        taken = {name.removeprefix(best): value for name, value in tensors.items() if name.startswith(best)}
        return taken, best, [name for name in tensors if not name.startswith(best)]
    added = max(_prefixes(wanted), key=lambda prefix: len({prefix + n for n in tensors} & set(wanted)), default="")
    if len({added + name for name in tensors} & set(wanted)) > max(matching(""), len(wanted) // 2):
        return {added + name: value for name, value in tensors.items()}, "", []
    return dict(tensors), "", []


def _prefixes(names: Iterable[str]) -> list[str]:
    """Name prefixes that end with a dot, the shortest first."""
    split = [name.split(".") for name in names]
    found = {".".join(parts[:n]) + "." for parts in split for n in range(1, min(len(parts), DEPTH + 1))}
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
        channels = tensors[stem].shape[1]
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
