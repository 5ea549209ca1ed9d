"""What a report is made of: sections of sentences, notes, tables and pictures, as Markdown and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from launch.seeds.report import aligned


@dataclass(frozen=True)
class Table:
    """Rows of cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """whether a page shows it on demand only"""


@dataclass(frozen=True)
class Notes:
    """What to be careful with."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """One SVG, which pages alone have."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    title: str
    blocks: Sequence[str | Table | Notes | Picture]


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report without its pictures."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, str):
                lines += [block, ""]
            elif isinstance(block, Notes):
                lines += [*(f"- warning: {text}" for text in block.texts), ""] if block.texts else []
            elif isinstance(block, Table):
                lines += [*aligned(block.header, block.rows), ""]
    return "\n".join(lines)


def as_html(title: str, sections: Sequence[Section]) -> str:
    """One page that needs no other file, light or dark as the reader's system is."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    body.append("<nav>" + " ".join(f'<a href="#{_anchor(each)}">{html.escape(each.title)}</a>' for each in sections))
    body.append("</nav>")
    for section in sections:
        body.append(f'<section id="{_anchor(section)}"><h2>{html.escape(section.title)}</h2>')
        pictures: list[str] = []
        for block in section.blocks:
            if isinstance(block, Picture):
                caption = f"<figcaption>{html.escape(block.caption)}</figcaption>"
                pictures.append(f"<figure>{block.svg}{caption}</figure>")
                continue
            body += _gallery(pictures)
            pictures = []
            body.append(_block(block))
        body += [*_gallery(pictures), "</section>"]
    head = f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    about = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    start = f'<!DOCTYPE html>\n<html lang="en"><head>{about}{head}</head><body><main>'
    return "\n".join([start, *body, "</main></body></html>\n"])


def _gallery(figures: Sequence[str]) -> list[str]:
    return ['<div class="pictures">' + "".join(figures) + "</div>"] if figures else []


def _block(block: str | Table | Notes) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    if isinstance(block, Notes):
        return "".join(f'<p class="warning">{html.escape(text)}</p>' for text in block.texts)
    table = (
        '<div class="table"><table><thead>' + _row(block.header, "th") + "</thead><tbody>"
        + "".join(_row(row, "td") for row in block.rows) + "</tbody></table></div>"
    )  # fmt: skip
    return f"<details><summary>{len(block.rows)} rows</summary>{table}</details>" if block.folded else table


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _anchor(section: Section) -> str:
    return "-".join(section.title.lower().split())


STYLE = """
:root {
  color-scheme: light dark; --back: #fff; --text: #1c1e21; --faint: #5f646b; --line: #d8dbe0; --link: #0064b0;
  --warn: #fff3d6; --warn-line: #b97700
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #16181c; --text: #e4e6ea; --faint: #a0a4ab; --line: #3a3e45; --link: #6cb6ff;
    --warn: #382c10; --warn-line: #e0a030
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1200px; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem }
a { color: var(--link) }
p { max-width: 75ch; margin: .5rem 0 }
.warning { border-left: 4px solid var(--warn-line); background: var(--warn); padding: .4rem .8rem }
.table { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
td { white-space: nowrap }
th { color: var(--faint); font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.pictures {
  display: grid; gap: 1rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr))
}
figure { margin: 0; min-width: 0 }
figcaption { color: var(--faint); font-size: .875rem }
svg { width: 100%; height: auto; display: block }
svg text { fill: currentColor }
summary { cursor: pointer }
"""
