"""Values as TOML: recipes on a run's page and from `init`, policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w


def to_toml(values: Mapping[str, Any]) -> str:
    """Values as TOML, written by tomli-w. None is left out, because TOML has no null.

    Invisible characters (control codes, bidirectional overrides) are escaped. A lone surrogate, which no TOML file can
    hold, becomes U+FFFD.
    """
    # Outside its strings tomli-w writes nothing invisible but line breaks, and inside them it escapes those.
    return "".join(map(_visible, tomli_w.dumps(_without_none(values))))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _visible(character: str) -> str:
    if character == "\n" or character.isprintable():
        return character
    number = ord(character)
    if 0xD800 <= number <= 0xDFFF:
        return "\N{REPLACEMENT CHARACTER}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"
