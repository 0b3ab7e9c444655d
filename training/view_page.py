"""What the pages to look at share: charts as part of the page, so that they follow its light or dark colours."""

import html as escape
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from numpy.typing import NDArray

from recap_model.report import plots

# text of data is never read as mathematics: a task may hold dollar signs
STYLE: Any = {**plots.STYLE, "text.parse_math": False, "svg.fonttype": "none", "figure.facecolor": "none",
              "axes.facecolor": "none"}  # fmt: skip
NEUTRAL = "#c9d2dc"
_VARIABLES = {
    plots.INK: "--ink", plots.SOFT: "--soft", plots.LINE: "--line", plots.GOOD: "--good", plots.BAD: "--bad",
    plots.ACCENT: "--accent", plots.HUMAN: "--human", NEUTRAL: "--neutral",
}  # fmt: skip
_COLOURS = re.compile("|".join(_VARIABLES))
_SCHEME = """<meta name='color-scheme' content='light dark'><style>
:root{--accent:#2f5d9b;--human:#d99a2b;--neutral:#c9d2dc}
svg{max-width:100%;height:auto;display:block}svg text{font-family:inherit!important}
code{overflow-wrap:anywhere}
@media screen and (prefers-color-scheme:dark){
:root{--ink:#e6ebf0;--soft:#9eabb8;--line:#343e4a;--good:#3fb8ac;--bad:#ee7c66;--accent:#7aaaea;--human:#e8b04c;
--neutral:#596675;--paper:#1b222b;--back:#12171d}
.warning{background:#3a2f17}}
</style></head>""".replace("\n", "")


@contextmanager
def style() -> Iterator[None]:
    """Draw with the colours of the reports on a transparent ground; text stays text."""
    with rc_context(STYLE):
        yield


def inline_svg(picture: bytes, caption: str) -> str:
    """An SVG as a part of the page; the reports' colours become variables of the page. The caption is also what a
    screen reader says. Only for pictures drawn here: the text in them has been escaped by the drawing library."""
    start = picture.find(b"<svg")
    if start < 0:
        raise ValueError(f"chart {caption!r}: expected SVG, got {picture[:8]!r}")
    body = _COLOURS.sub(lambda found: f"var({_VARIABLES[found.group()]})", picture[start:].decode())
    label = escape.escape(caption, quote=True)
    body = body.replace("<svg", f"<svg role='img' aria-label='{label}'", 1)
    return f"<figure>{body}<figcaption>{label}</figcaption></figure>"


def light_and_dark(document: str) -> str:
    """The page of `recap_model.report.html`, legible in both colour schemes; prints light."""
    head, mark, rest = document.partition("</head>")
    if not mark:
        raise ValueError("page: expected a document of recap_model.report.html, got one without </head>")
    return head + _SCHEME + rest


def runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(first, after last) of every stretch of True in `mask` [T], in order."""
    edges = np.flatnonzero(np.diff(np.r_[False, np.asarray(mask, bool), False].astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
