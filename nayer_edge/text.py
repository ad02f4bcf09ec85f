"""Sanitises untrusted text (class names, file names, reasons) before it is displayed."""

from __future__ import annotations

import codecs
import re

# C0 and C1 controls (escape sequences, line breaks), bidirectional marks, embeddings, overrides and isolates,
# Unicode line separators, lone surrogates (not encodable), and the two code points that XML 1.0 forbids.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


_PLAIN = {
    "✓": "ok", "✗": "FAIL", "→": "->", "≤": "<=", "≥": ">=", "≈": "~", "±": "+-", "×": "x", "−": "-", "–": "-",
    "…": "...", "·": "-", "�": "?",
}  # fmt: skip


def inert(text: str) -> str:
    """Replaces control and formatting characters in `text` by U+FFFD.

    The result is a single line, valid UTF-8 and XML 1.0, and neither moves a terminal's cursor nor reorders the text
    around it.

    >>> inert("cat\\x1b[2J")
    'cat\ufffd[2J'
    """
    return _UNSAFE.sub("\ufffd", text)


def stand_in(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: ASCII for marks and signs, and Python's escapes for everything else, so that what
    differs still looks different ("→" becomes "->", "猫" becomes "\\u732b").

    >>> "✓ 3 ≤ 4".encode("cp1252", errors="nayer-edge")
    b'ok 3 <= 4'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


codecs.register_error("nayer-edge", stand_in)


def printed(text: str) -> str:
    """`inert` text that can start a line: it cannot contain a CI workflow command (`::`, `##[`).

    >>> printed("::error::x")
    ':\u200b:error:\u200b:x'
    """
    return re.sub(r":(?=:)|#(?=#\[)", "\\g<0>\N{ZERO WIDTH SPACE}", inert(text))
