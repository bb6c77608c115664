"""A report as one HTML file that opens without a network, in light and dark, on a phone."""

import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from maskft.storage.files import atomic_write_text

_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.pairs th, .pairs td { text-align: left; vertical-align: top; }
.pairs td:last-child { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 1rem 0; background: #fff; border-radius: .4rem; padding: .4rem; max-width: 50rem; }
figcaption { color: #333; font-size: .85rem; padding: .3rem; }
a { color: inherit; text-decoration: underline dotted; }
figure svg { width: 100%; height: auto; display: block; }
pre { overflow-x: auto; font-size: .85rem; }
"""


class Link(NamedTuple):
    """A cell that leads somewhere: a file beside the page, or `#name` of a table in it."""

    text: str
    target: str


@dataclass(frozen=True)
class PageTable:
    """A table of a page: header and rows as text or links, with what stands around it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    title: str = ""
    caption: str = ""
    name: str = ""


class Picture(NamedTuple):
    """A picture as the text of an SVG file, and what it shows."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Page:
    """What a report's page shows, from top to bottom.

    Attributes:
        title: heading of the page.
        caption: a sentence below it: n, seeds, kind of interval.
        pictures: above the tables.
        tables: below the pictures.
        curves: each {title, x_label, y_label, lines: {name: [[x, y], ...]}}.
        interactive: figures as HTML of a drawing library, taken as they are.
        details: values by heading, folded away and shown as JSON.
    """

    title: str
    caption: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[PageTable] = ()
    curves: Sequence[dict[str, Any]] = ()
    interactive: Sequence[str] = ()
    details: dict[str, Any] = field(default_factory=dict)


def write_html(path: Path, page: Page) -> None:
    """Write the page as one file; text is escaped, pictures are inline."""
    title = html.escape(page.title)
    pictures = "".join(
        f"<figure>{_inline(picture.svg)}<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        for picture in page.pictures
    )
    tables = "".join(_table(table) for table in page.tables)
    figures = "".join(f"<figure>{drawn}</figure>" for drawn in (*map(_draw, page.curves), *page.interactive))
    details = "".join(
        f"<details><summary>{html.escape(name)}</summary>"
        f"<pre>{html.escape(json.dumps(value, indent=1, ensure_ascii=False))}</pre></details>"
        for name, value in page.details.items()
    )
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>{html.escape(page.caption)}</p>{pictures}{tables}{figures}{details}</body></html>\n"
    )
    atomic_write_text(path, text)


def _table(table: PageTable) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    name = f' id="{html.escape(table.name)}"' if table.name else ""
    title = f"<h2{name}>{html.escape(table.title)}</h2>" if table.title else ""
    caption = f"<p>{html.escape(table.caption)}</p>" if table.caption else ""
    kind = ' class="pairs"' if len(table.header) == 2 else ""  # a name, and what may be a sentence
    rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'{title}{caption}<div class="wide"><table{kind}>{rows}</table></div>'


def _cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f'<a href="{html.escape(cell.target)}">{html.escape(cell.text)}</a>'
    return html.escape(cell)


def _inline(svg: str) -> str:
    """An SVG file without its XML head, as it stands inside a page."""
    return svg[svg.index("<svg") :]


def _draw(curve: dict[str, Any]) -> str:
    buffer = io.StringIO()
    _figure(curve).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


def _figure(curve: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6.4, 3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name, points in curve["lines"].items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name)
    axes.set(title=curve["title"], xlabel=curve["x_label"], ylabel=curve["y_label"])
    axes.grid(alpha=0.3)
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    if len(curve["lines"]) > 1:
        axes.legend()
    return figure
