"""A report as one HTML file that opens without a network, in light and dark, on a phone."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from maskft.storage.files import atomic_write_text

# To be read and drawn under: a name with dollar signs is no formula.
plain_text = matplotlib.rc_context({"text.parse_math": False, "text.usetex": False})


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
        caption: a sentence below the title: n, seeds, kind of interval.
        verdict: what came out, in a sentence, before all else; the first curve stands right below it.
        curves: each {title, x_label, y_label, lines: {name: [[x, y], ...]}}; some have stars: {name: [x, y]} and y_top.
        details: values by heading, folded away and shown as JSON.
    """

    title: str
    caption: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[PageTable] = ()
    curves: Sequence[dict[str, Any]] = ()
    details: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""


def write_html(path: Path, page: Page) -> None:
    """Write the page as one file; text is escaped, pictures are inline."""
    loader = PackageLoader("maskft.report", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"draw": _draw, "inline": _inline, "pretty": _pretty}
    atomic_write_text(path, environment.get_template("page.html").render(page=page) + "\n")


def _inline(svg: str) -> Markup:
    """An SVG file without its XML head, as it stands inside a page."""
    return Markup(svg[svg.index("<svg") :])


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


@plain_text
def _draw(curve: dict[str, Any]) -> str:
    buffer = io.StringIO()
    _figure(curve).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _figure(curve: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6.4, 3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name, points in curve["lines"].items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name)
    for name, point in curve.get("stars", {}).items():
        axes.plot(*point, linestyle="", marker="*", markersize=15, zorder=5, label=name)
    axes.set(title=curve["title"], xlabel=curve["x_label"], ylabel=curve["y_label"])
    axes.set_ylim(top=curve.get("y_top"))
    axes.grid(alpha=0.3)
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    if len(curve["lines"]) + len(curve.get("stars", {})) > 1:
        axes.legend()
    return figure
