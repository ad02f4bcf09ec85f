"""Plots as inline SVG: colours are the page's own in both themes, text is text, equal plots are equal bytes."""

from __future__ import annotations

import contextlib
import hashlib
import html
import io
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nayer_edge.errors import missing_extra
from nayer_edge.text import inert

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.0
"""inches: one column of a phone, so that nine-point text stays readable there"""

INK, SOFT, LINE = "#0a0b01", "#0a0b02", "#0a0b03"
GOOD, BAD = "#0a0b04", "#0a0b05"
SERIES = ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14")
"""colours for matplotlib that stand for the page's variables; see `_VARIABLES`"""

_VARIABLES = {
    INK: "currentColor",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    GOOD: "var(--good)",
    BAD: "var(--fail)",
    **{colour: f"var(--series{number})" for number, colour in enumerate(SERIES, 1)},
}
_TOKEN = re.compile(r"Zq(\d{4})n*")
_SIZE = re.compile(r' (?:width|height)="[^"]*"')


class Drawing:
    """A figure being drawn, and the texts from outside that it will show.

    matplotlib lays such texts out with its own font, which lacks most scripts, and reads dollars as formulas. So it
    is given a stand-in of the same width; the text itself is put, escaped, into the finished SVG.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self._texts: list[str] = []

    def text(self, text: str, longest: int = 14) -> str:
        """The stand-in for a text, which is cut to `longest` columns."""
        self._texts.append(shortened(inert(text), longest))
        return f"Zq{len(self._texts) - 1:04d}".ljust(_columns(self._texts[-1]), "n")

    def svg(self, alternative: str) -> str:
        """The finished SVG, with a sentence for those who do not see it."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        drawn = buffer.getvalue()
        drawn = drawn[drawn.index("<svg") :]
        # The style would be the whole page's; it stands in the page's own sheet.
        drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", drawn, flags=re.DOTALL)
        drawn = re.sub(r"<[^>]+>", lambda tag: _compact(tag[0]), drawn)
        drawn = re.sub(r">\s+<", "><", drawn).strip()
        drawn = _own_names(drawn, alternative)
        for colour, variable in _VARIABLES.items():
            drawn = drawn.replace(colour, variable)
        drawn = _TOKEN.sub(lambda token: html.escape(self._texts[int(token[1])]), drawn)
        head, rest = drawn.split(">", 1)
        return f'{_SIZE.sub("", head)} role="img" aria-label="{html.escape(inert(alternative))}">{rest}'


@contextlib.contextmanager
def drawing(height: float, *, width: float = WIDTH) -> Iterator[Drawing]:
    """A figure of the given size in inches, transparent, in the page's colours.

    Raises:
        MissingError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "cpu", "Drawing plots") from error
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "nayer-edge",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": INK,
        "text.parse_math": False,
        "axes.edgecolor": SOFT,
        "axes.facecolor": "none",
        "axes.labelcolor": INK,
        "axes.labelsize": 9,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "grid.color": LINE,
        "legend.frameon": False,
        "xtick.color": SOFT,
        "xtick.labelcolor": INK,
        "xtick.labelsize": 8.5,
        "ytick.color": SOFT,
        "ytick.labelcolor": INK,
        "ytick.labelsize": 8.5,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield Drawing(figure)


def shortened(text: str, longest: int) -> str:
    """The text, or its beginning and an ellipsis, in at most `longest` columns."""
    if _columns(text) <= longest:
        return text
    kept = ""
    for character in text:
        if _columns(kept + character) > longest - 1:
            break
        kept += character
    return kept + "…"


def _columns(text: str) -> int:
    """Columns of a terminal, a fair measure of width in any script: East Asian characters take two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _compact(tag: str) -> str:
    """A tag with at most two decimals, and without the names of fonts: the page has its own."""
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    return re.sub(r"font-family: [^;\"]*; ", "", tag)


def _own_names(drawn: str, alternative: str) -> str:
    """Names that nothing refers to are dropped, and the others made the figure's own: a page holds many figures.

    Two that look the same still differ in what they are of, which the alternative text says.
    """
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', drawn))
    names = {first or second for first, second in used}
    drawn = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in names else "", drawn)
    own = hashlib.sha256(f"{alternative}{drawn}".encode()).hexdigest()[:6]
    for name in sorted(names, key=len, reverse=True):
        drawn = re.sub(rf'(id="|#){re.escape(name)}(?=["\)])', rf"\g<1>f{own}-{name}", drawn)
    return drawn
