"""Checks once whether the model hub is reachable: without a network, its client retries for minutes."""

from __future__ import annotations

PATIENCE = 10.0
"""timeout in seconds"""


def require(identifier: str, file: str = "config.json", revision: str | None = None) -> None:
    """Raises an error if a file is not in the hub's cache and the hub is not reachable.

    In the client's offline mode it does nothing: the client then raises its own error.

    Args:
        identifier: owner/name.

    Raises:
        ConnectionError: the hub is not reachable.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(identifier, file, revision=revision), str):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:
        raise ConnectionError(f"{constants.ENDPOINT} is not reachable: {error}") from error
