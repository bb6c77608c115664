"""No name, row or error that comes from outside is more than text on any page."""

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import maskft
import maskft_lab
from maskft.report import Link, Page, PageTable, Picture, write_html
from maskft.training.report import write_reports
from maskft_lab import search
from maskft_lab.study.figure import draw_study
from maskft_lab.study.plan import RESULT
from maskft_lab.study.summary import write_summary

PAYLOADS = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</pre></details></svg></style><script>alert(1)</script>",
    "--><script>alert(1)</script><!--",
    "]]><svg onload=alert(1)>",
    "{{ 7 * 191 }}{% raw %}",
    "$\\href{javascript:alert(1)}{x}$",
]
TAGS = "html head meta title style body h1 h2 p div table thead tbody tr th td a details summary pre figure figcaption"
OF_PICTURES = (
    "svg defs g path use rect clippath metadata rdf:rdf cc:work dc:type dc:format dc:creator cc:agent dc:title"
)


class Checked(HTMLParser):
    """Refuses every tag and attribute that our own pages do not have; keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        assert tag in f"{TAGS} {OF_PICTURES}".split()
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "src") or re.match(r"#|[\w.\-]+(/|$)", str(value)), (name, value)

    def handle_data(self, data) -> None:
        self.text.append(data)


def parts(folder: Path, text: str) -> None:
    table = PageTable((text, text), [(text, Link(text, "a/b.json"))], title=text, caption=text, name=text)
    curve = {"title": text, "x_label": text, "y_label": text, "lines": {text: [[0, 1]], f"{text}2": [[0, 2]]}}
    svg = draw_study(summary_of(text))["svg"].decode()
    details = {text: {text: [text]}}
    write_html(folder / "report.html", Page(text, text, [Picture(svg, text)], [table], [curve], details))


def run(folder: Path, text: str) -> None:
    best = {"metric": text, "value": 1.0, "step": 1}
    report: dict[str, Any] = {"command": "train", "model_name_or_path": text, "settings": {text: text}, "best": best}
    report |= {"versions": {"maskft": text}, "machine": text, "seconds": 1.0, "verdict": {"sentence": text}}
    report |= {"data": {"train": {"n": 1}, "validation": {"n": 1}}, "data_sets": {text: {text: 1}}}
    report |= {"log_history": [{"step": 1, "loss": 1.0}], "mask": {"kept_share": 0.9, "num_weights": 10}}
    write_reports(folder, report)


def summary_of(text: str) -> dict[str, Any]:
    interval = {"estimate": 1.0, "low": 0.5, "high": 1.5, "n": 2}
    row = {"method": text, "seeds": [1], "best_steps": [1], "test_nll": interval, "kept_share": None}
    row["accuracy"] = interval
    panel = {"model": text, "domain": text, "n": 2, "num_items": 2, "best_fft_step": 0.0, "rows": [row]}
    panel["curves"] = {text: [{"step": 1, "nll": 1.0, "low": 0.5, "high": 1.5}]}
    panel["runs"] = [{"method": text, "seed": 1, "folder": "m/d/seed1/a", "test_nll": 1.0, "accuracy": None}]
    return {"name": text, "panels": [panel], "failed": [{"run": "m/d/seed1/b", "error": text}]}


def study(folder: Path, text: str) -> None:
    (folder / "m/d/seed1/a").mkdir(parents=True)
    (folder / "m/d/seed1/a" / RESULT).write_text(json.dumps({"seconds": 1.0}))
    write_summary(folder, summary_of(text), Console(quiet=True))


def searched(folder: Path, text: str) -> None:
    groups = [{"layers": [text, text], "saliency": 1.0}]
    search._write(folder, {"groups": groups, "num_rows": 1, "seconds": 1.0}, {text: text}, Console(quiet=True))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("write", [parts, run, study, searched])
def test_foreign_text_is_text(tmp_path, write, payload) -> None:
    write(tmp_path, payload)
    page = Checked()
    page.feed((tmp_path / "report.html").read_text())
    assert payload in "".join(page.text) or json.dumps(payload)[1:-1] in "".join(page.text)


def test_every_page_is_written_by_the_one_writer() -> None:
    """Which escapes; what it takes as it is are pictures that matplotlib drew, whose text is paths."""
    for package in (maskft, maskft_lab):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert path.name == "html.py" or not names & {"Markup", "Environment", "Template"}, path
        for path in Path(str(package.__file__)).parent.rglob("*.html"):
            assert not re.search(r"\|\s*safe|autoescape", path.read_text())
