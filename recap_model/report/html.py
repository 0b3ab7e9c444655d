"""One self-contained HTML file: pictures and video are embedded, nothing is fetched, it prints well.

Everything that comes from data is escaped here; `Section.body` is HTML made by the functions of this module.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_TYPES = {b"\x89PNG": "image/png", b"<?xm": "image/svg+xml", b"<svg": "image/svg+xml"}


@dataclass(frozen=True)
class Tile:
    """One number of the summary row. tone: "good", "bad" or "" (plain)."""

    label: str
    value: str
    hint: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Section:
    """A titled part of the page; body is HTML from this module's functions."""

    title: str
    body: str
    note: str = ""


def page(title: str, subtitle: str, tiles: Sequence[Tile], sections: Sequence[Section], footer: str = "") -> str:
    """The whole document."""
    parts = "".join(_section(section) for section in sections)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width,initial-scale=1'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body><main><header><h1>{html.escape(title)}</h1>"
        f"<p class='subtitle'>{html.escape(subtitle)}</p></header>{_tiles(tiles)}{parts}"
        f"<footer>{html.escape(footer)}</footer></main></body></html>\n"
    )


def write(path: Path, document: str) -> None:
    """Write through a temporary name, so that a reader never sees half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(document)
    temporary.replace(path)


def paragraph(text: str, tone: str = "") -> str:
    """tone "warning" frames the text."""
    return f"<p{_class(tone)}>{html.escape(text)}</p>"


def figure(picture: bytes, caption: str) -> str:
    """A PNG or SVG, embedded. The caption is also the alternative text."""
    kind = _TYPES.get(picture[:4])
    if kind is None:
        raise ValueError(f"figure {caption!r}: expected PNG or SVG bytes, got {picture[:4]!r}")
    data = base64.b64encode(picture).decode()
    text = html.escape(caption)
    return f"<figure><img alt='{text}' src='data:{kind};base64,{data}'><figcaption>{text}</figcaption></figure>"


def video(mp4: bytes, caption: str) -> str:
    """An H.264 file, embedded with controls."""
    data = base64.b64encode(mp4).decode()
    return (
        f"<figure><video controls muted loop playsinline src='data:video/mp4;base64,{data}'></video>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells; floats are shown to three digits."""
    lines = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    titles = "".join(f"<th>{html.escape(str(name))}</th>" for name in head)
    return f"<div class='scroll'><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"


def _cell(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"<td>{html.escape(text)}</td>"


def _section(section: Section) -> str:
    note = f"<p class='note'>{html.escape(section.note)}</p>" if section.note else ""
    return f"<section><h2>{html.escape(section.title)}</h2>{note}{section.body}</section>"


def _tiles(tiles: Sequence[Tile]) -> str:
    cells = "".join(
        f"<div{_class('tile ' + tile.tone)}><b>{html.escape(tile.value)}</b><span>{html.escape(tile.label)}</span>"
        f"<small>{html.escape(tile.hint)}</small></div>"
        for tile in tiles
    )
    return f"<div class='tiles'>{cells}</div>" if tiles else ""


def _class(names: str) -> str:
    return f" class='{html.escape(names.strip())}'" if names.strip() else ""


_STYLE = """
:root{--ink:#1c2733;--soft:#5d6b7a;--line:#e3e8ee;--good:#12756f;--bad:#b8432f;--paper:#fff;--back:#f6f8fa}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 28px 64px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.01em;margin:0}h2{font-size:20px;margin:0 0 6px}
.subtitle{color:var(--soft);margin:6px 0 24px}.note{color:var(--soft);margin:0 0 14px;max-width:72ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-bottom:24px}
.tile{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:14px}.tile small{color:var(--soft);font-size:12.5px}
.good b{color:var(--good)}.bad b{color:var(--bad)}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:22px 24px;margin-bottom:18px}
figure{margin:12px 0}img,video{max-width:100%;height:auto;display:block}
figcaption{color:var(--soft);font-size:14px;margin-top:4px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th{text-align:left;color:var(--soft);font-weight:600;border-bottom:2px solid var(--line);padding:6px 12px 6px 0}
td{border-bottom:1px solid var(--line);padding:6px 12px 6px 0}
.warning{border-left:4px solid #d99a2b;background:#fdf6e7;padding:8px 14px;border-radius:4px}
footer{color:var(--soft);font-size:13.5px}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
""".replace("\n", "")
