"""Label-text embeddings (LTE): E ∈ R^{K×D}, one prompt per class, encoded once by a text encoder (paper §3.2).

Cache files are named by the digest of encoder, revision and texts. The package ships embeddings for its recipes
(`lte_ready/`), so that these need no language model. One encoder never silently replaces another.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nayer_edge.config import LTE
from nayer_edge.errors import IntegrityError, UsageError
from nayer_edge.labels import precomputed, text_encoders
from nayer_edge.labels.class_names import Synonyms, phrases
from nayer_edge.runtime.compute import random_stream
from nayer_edge.storage.files import digest_of, expanded, home_folder
from nayer_edge.storage.tensors import save_tensors
from nayer_edge.text import inert

BASELINE_DIM = 512
"""dimension of `random` embeddings, the same as CLIP ViT-B/32"""
SAME = 1 - 1e-5
"""cosine similarity above which two embeddings count as equal"""
_CHUNK = 1024
"""rows of the similarity matrix computed at once"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelEmbeddings:
    """Embeddings and everything that they depend on.

    Attributes:
        embeddings: (K, D), float32.
        encoder, revision: the text encoder.
        prompt: the template with {label}; several templates, one per line, are averaged.
        labels: the K class names.
        synonyms: which of a label's comma-separated names went into the prompt (see config.LTE).
    """

    embeddings: Float[Tensor, "K D"]
    encoder: str
    revision: str
    prompt: str
    labels: tuple[str, ...]
    synonyms: Synonyms = "first"

    @property
    def digest(self) -> str:
        """Digest of the embeddings and their provenance; a run with another digest is a different run."""
        return digest_of({**self._facts, "labels": list(self.labels), "numbers": self.numbers_digest})

    @property
    def numbers_digest(self) -> str:
        """SHA-256 of the embedding matrix (float32, little-endian, row-major)."""
        return hashlib.sha256(self.embeddings.contiguous().numpy().astype("<f4").tobytes()).hexdigest()

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The encoder's input texts for each class."""
        return texts_of(self.labels, self.prompt.split("\n"), self.synonyms)

    @property
    def _facts(self) -> dict[str, str]:
        facts = {"encoder": self.encoder, "revision": self.revision, "prompt": self.prompt}
        return {**facts, "synonyms": self.synonyms}


def texts_of(labels: Sequence[str], templates: Sequence[str], synonyms: Synonyms) -> list[tuple[str, ...]]:
    """The prompts of each class: every phrase in every template."""
    return [
        tuple(template.replace("{label}", phrase) for phrase in of_class for template in templates)
        for of_class in phrases(labels, synonyms)
    ]


def cache_key(encoder: str, revision: str, texts: Sequence[Sequence[str]]) -> str:
    """The cache key: a digest of the encoder, its revision and its input texts."""
    return digest_of({"encoder": encoder, "revision": revision, "texts": [list(of_class) for of_class in texts]})


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/nayer-edge/lte; ~/.cache/nayer-edge/lte by default; a temporary one without a home."""
    base, home = os.environ.get("XDG_CACHE_HOME"), home_folder()
    if base or home is not None:
        return (Path(base) if base else Path(f"{home}") / ".cache") / "nayer-edge" / "lte"
    return Path(_own_folder().name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed at exit. Not one with a name that others can guess and fill."""
    return tempfile.TemporaryDirectory(prefix="nayer-edge-")


def build(labels: Sequence[str], config: LTE) -> LabelEmbeddings:
    """Loads embeddings from a file, the package or the user's cache, or else computes and caches them.

    Raises:
        MissingError: the encoder is not available.
        UsageError: the labels do not match the given embeddings.
        IntegrityError: the embedding file or the encoder's weights are damaged.
    """
    encoder, names, templates = config.encoder, tuple(labels), config.templates
    prompt = "\n".join(templates)
    if encoder in ("onehot", "random"):
        return LabelEmbeddings(_baseline(encoder, len(names)), encoder, "1", prompt, names, config.synonyms)
    if config.precomputed:
        return _from_file(expanded(encoder), names)
    found = text_encoders.find(encoder)
    texts = texts_of(names, templates, config.synonyms)

    def described(values: Tensor) -> LabelEmbeddings:
        return LabelEmbeddings(values, encoder, found.revision, prompt, names, config.synonyms)

    values = _ready(encoder, found.revision, texts)
    made = _cached_or_made(found, texts, described) if values is None else described(values)
    if same := duplicates(made):
        _log.warning(
            "%d classes share an embedding with another class, so the generator cannot distinguish them: %s. "
            "Use names that the encoder knows, or another encoder.",
            len(same),
            inert(", ".join(same[:4])) + (", …" if len(same) > 4 else ""),
        )
    return made


def check(labels: Sequence[str], config: LTE) -> None:
    """Checks, without loading an encoder, that `build` can run: the file exists and matches, the encoder is installed.

    Raises:
        NayerEdgeError: the error that `build` would raise, as far as it is known before loading an encoder.
    """
    encoder = config.encoder
    if config.precomputed:
        _from_file(expanded(encoder), tuple(labels))
    elif encoder == text_encoders.MINILM:
        texts = texts_of(labels, config.templates, config.synonyms)
        revision = text_encoders.MINILM_SHA256
        if _ready(encoder, revision, texts) is None and not _cache_file(cache_key(encoder, revision, texts)).is_file():
            text_encoders.require_minilm()
    elif encoder not in ("onehot", "random"):
        text_encoders.find(encoder)


def duplicates(embeddings: LabelEmbeddings) -> list[str]:
    """Labels that share their embedding with another label, up to rounding."""
    cosine, _ = nearest_labels(embeddings.embeddings)
    return [label for label, value in zip(embeddings.labels, cosine.tolist(), strict=True) if value > SAME]


def _baseline(encoder: str, count: int) -> Tensor:
    if encoder == "onehot":
        return torch.eye(count)
    return torch.randn(count, BASELINE_DIM, generator=random_stream(0, "lte"))


def _from_file(path: Path, names: tuple[str, ...]) -> LabelEmbeddings:
    """Precomputed embeddings, with rows selected by class name; the revision is the file's SHA-256."""
    found = precomputed.read(path)
    encoder, prompt = found.facts.get("encoder", path.name), found.facts.get("prompt", "")
    return LabelEmbeddings(found.rows_for(names, path), encoder, found.sha256, prompt, names, "all")


def averaged(encoded: Float[Tensor, "n D"], counts: Sequence[int]) -> Float[Tensor, "K D"]:
    """Averages the consecutive rows of each class's texts into one row per class.

    If every class has one text, the embeddings are returned unchanged. Otherwise each row is L2-normalised, averaged
    and L2-normalised again (prompt ensembling in embedding space, Radford et al. 2021, §3.1.4).
    """
    if all(count == 1 for count in counts):
        return encoded
    unit = torch.nn.functional.normalize(encoded, dim=1)
    return torch.stack(
        [
            torch.nn.functional.normalize(rows.mean(dim=0), dim=0) if len(rows) > 1 else rows[0]
            for rows in unit.split(list(counts))
        ]
    )


# ------------------------------------------------------------------ shipped and cached


def _ready(encoder: str, revision: str, texts: Sequence[tuple[str, ...]]) -> Tensor | None:
    """Rows of a shipped file that covers all texts, in any selection and order; None if there is none."""
    for path in sorted(Path(str(resources.files("nayer_edge.labels.lte_ready"))).glob("*.safetensors")):
        held = load(path)
        if (held.encoder, held.revision) == (encoder, revision):
            row_of = {text: row for row, text in enumerate(held.texts)}
            rows = [row_of.get(text) for text in texts]
            if None not in rows:
                return held.embeddings[[row for row in rows if row is not None]]
    return None


def _cache_file(key: str) -> Path:
    return cache_folder() / f"{key[:16]}.safetensors"


def _cached_or_made(
    encoder: text_encoders.TextEncoder,
    texts: Sequence[tuple[str, ...]],
    described: Callable[[Tensor], LabelEmbeddings],
) -> LabelEmbeddings:
    """Embeddings from the user's cache, or else computed and cached.

    If several processes need the same embeddings, one computes them and the others wait.
    """
    key = cache_key(encoder.name, encoder.revision, texts)
    path = _cache_file(key)
    with _locked(path.with_suffix(".lock")):
        if path.is_file():
            try:
                return described(_from_cache(path, key, len(texts)))
            except IntegrityError as error:
                _log.warning("A damaged cache file is rebuilt: %s", inert(error.what))
        encoded = encoder.encode([text for of_class in texts for text in of_class])
        made = described(averaged(encoded, [len(of_class) for of_class in texts]).contiguous())
        try:
            save(made, path, {"key": key})
        except UsageError as error:
            _log.warning("The embeddings could not be cached: %s %s", inert(error.what), inert(error.why))
        return made


def _from_cache(path: Path, key: str, count: int) -> Tensor:
    held, facts = _read(path)
    if facts.get("key") != key or len(held.embeddings) != count:
        raise IntegrityError(f"{path} contains embeddings of other texts.")
    return held.embeddings


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock, which the kernel releases when the process ends; no lock if the folder does not allow one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError:
        yield
        return
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------ files


def save(embeddings: LabelEmbeddings, path: Path, more: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the provenance in its metadata."""
    provenance = {
        "encoder": embeddings.encoder,
        "revision": embeddings.revision,
        "prompt": embeddings.prompt,
        "synonyms": embeddings.synonyms,
        "labels": json.dumps(embeddings.labels, ensure_ascii=False),
        "sha256": embeddings.numbers_digest,
    }
    save_tensors(path, {"embeddings": embeddings.embeddings}, {**provenance, **(more or {})})


def load(path: Path) -> LabelEmbeddings:
    """Reads a file written by `save`.

    Raises:
        IntegrityError: the file is missing, damaged, or not an embedding file.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[LabelEmbeddings, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            values = file.get_tensor("embeddings").float()
        labels = tuple(json.loads(facts["labels"]))
        synonyms = facts.get("synonyms", "first")
        if synonyms not in ("first", "all", "average") or not all(isinstance(label, str) for label in labels):
            raise ValueError("invalid labels or synonyms in its metadata")
        found = LabelEmbeddings(values, facts["encoder"], facts["revision"], facts["prompt"], labels, synonyms)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{path} is not a file of label-text embeddings.", why=f"{error}") from error
    if values.ndim != 2 or values.shape[0] != len(labels) or not bool(torch.isfinite(values).all()):
        raise IntegrityError(f"{path} has embeddings of shape {tuple(values.shape)} for {len(labels)} labels.")
    if facts.get("sha256", found.numbers_digest) != found.numbers_digest:
        raise IntegrityError(f"{path} was altered: its embeddings do not match the stored SHA-256.")
    return found, facts


def cosines(embeddings: Float[Tensor, "K D"]) -> Float[Tensor, "K K"]:
    """Pairwise cosine similarity of the classes."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    return unit @ unit.T


def nearest_labels(embeddings: Float[Tensor, "K D"]) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """For each class, the cosine similarity to the most similar other class, and that class's index."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    values, places = [], []
    for start in range(0, len(unit), _CHUNK):
        similarity = unit[start : start + _CHUNK] @ unit.T
        similarity[torch.arange(len(similarity)), torch.arange(start, start + len(similarity))] = -2
        best = similarity.max(dim=1)
        values.append(best.values)
        places.append(best.indices)
    return torch.cat(values), torch.cat(places)


def mean_cosine(embeddings: Float[Tensor, "K D"]) -> float:
    """Mean cosine similarity over all pairs of different classes."""
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    count = len(unit)
    # The sum of u·v over all pairs is |Σu|².
    return float((unit.sum(dim=0).square().sum() - unit.square().sum()) / (count * (count - 1)))
