"""A report as one HTML file that opens without a network, in light and dark, on a phone."""

import html
import io
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from maskft.checkpoints.files import atomic_write_text
from maskft.report.table import HEADER, table_rows

_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; background: #fff; border-radius: .4rem; padding: .4rem; }
figure svg { width: 100%; height: auto; display: block; }
pre { overflow-x: auto; font-size: .85rem; }
"""


def write_html(path: Path, report: dict[str, Any]) -> None:
    """Write the report; its `curves` are lists of {title, x_label, y_label, lines: {name: [[x, y], ...]}}."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADER)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table_rows(report)
    )
    figures = "".join(f"<figure>{_draw(curve)}</figure>" for curve in report["curves"])
    samples = html.escape(json.dumps(report["samples"], indent=1, ensure_ascii=False))
    settings = html.escape(json.dumps(report["settings"], indent=1))
    title = html.escape(report["title"])
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>{html.escape(report['caption'])}</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{figures}'
        f"<details><summary>Sample answers</summary><pre>{samples}</pre></details>"
        f"<details><summary>Settings, versions and data</summary><pre>{settings}</pre></details></body></html>\n"
    )
    atomic_write_text(path, page)


def _draw(curve: dict[str, Any]) -> str:
    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name, points in curve["lines"].items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name)
    axes.set(title=curve["title"], xlabel=curve["x_label"], ylabel=curve["y_label"])
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
