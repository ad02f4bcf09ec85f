"""Whether the model hub answers, asked once: its client asks again and again, for minutes where there is no network."""

from __future__ import annotations

PATIENCE = 10.0
"""seconds until an answer"""


def require(identifier: str, file: str = "config.json", revision: str | None = None) -> None:
    """Does nothing where a file is in the hub's cache, or the hub answers, or the user told its client to stay offline
    (which then says so itself).

    Args:
        identifier: owner/name.

    Raises:
        ConnectionError: the hub does not answer.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(identifier, file, revision=revision), str):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:
        raise ConnectionError(f"{constants.ENDPOINT} does not answer: {error}") from error
