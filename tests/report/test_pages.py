"""Pages and tables show every value; no name, row or error that comes from outside is more than text on any page."""

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
from maskft.report import Link, Page, PageTable, Picture, interval_text, narrow_table, training_curves, write_html
from maskft.report.html import _figure
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


LOG = [{"step": 5, "loss": 2.0, "flips": 3}, {"step": 5, "eval_loss": 1.5}, {"step": 10, "loss": 1.0, "flips": 4}]


class Checked(HTMLParser):
    """Refuses tags and attributes that our own pages do not have, and ends out of order; keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        assert tag in f"{TAGS} {OF_PICTURES}".split()
        self.open += [tag] if tag not in ("meta", "path", "use", "rect") else []
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "src") or re.match(r"#|[\w.\-]+(/|$)", str(value)), (name, value)

    def handle_endtag(self, tag) -> None:
        assert tag in ("path", "use", "rect") or self.open.pop() == tag

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


def test_the_page_is_whole_escaped_and_needs_no_network(tmp_path) -> None:
    page = Page(
        title="A <b>bold</b> title",
        caption="n = 300",
        tables=[
            PageTable(("model", "left out", "file"), [("MFT", "0.123 %", "1.8 MB")], title="A & B", name="first"),
            PageTable(("a", "b", "c"), [[Link("here", "#first"), Link("a<b", "x/y.json")]], caption="of <all>"),
        ],
        pictures=[Picture('<?xml version="1.0"?><svg id="own"></svg>', "its caption")],
        curves=training_curves({"MFT": LOG, "FFT": LOG[:1]}),
        details={"Sample answers": [{"question": "1 < 2?", "MFT": "</pre><script>"}], "Settings": {"seed": 0}},
    )
    write_html(tmp_path / "report.html", page)
    text = (tmp_path / "report.html").read_text()
    parser = Checked()
    parser.feed(text)
    assert not parser.open
    assert text.count("<svg") == 4
    assert "<?xml" not in text
    for part in (
        "<h1>A &lt;b&gt;bold&lt;/b&gt; title</h1>",
        "<p>n = 300</p>",
        "<p>of &lt;all&gt;</p>",
        '<svg id="own"></svg><figcaption>its caption</figcaption>',
        '<h2 id="first">A &amp; B</h2>',
        '<a href="#first">here</a>',
        '<a href="x/y.json">a&lt;b</a>',
        "<td>MFT</td><td>0.123 %</td><td>1.8 MB</td>",
        "&#34;question&#34;: &#34;1 &lt; 2?&#34;",
    ):
        assert part in text


def test_sentences_wrap_in_tables_of_names_and_values_alone(tmp_path) -> None:
    tables = [
        PageTable(("", "result"), [("verdict", "A long sentence.")]),
        PageTable(("a", "b", "c"), [("1", "2", "3")]),
    ]
    write_html(tmp_path / "report.html", Page("", "", tables=tables))
    text = (tmp_path / "report.html").read_text()
    assert '<table class="pairs">\n<thead><tr><th></th><th>result' in text
    assert "<table>\n<thead><tr><th>a" in text
    assert ".pairs td:last-child { white-space: normal;" in text


def test_no_label_is_longer_than_its_axis() -> None:
    for curve in training_curves({"MFT": [LOG[0] | LOG[1] | {"kept_share": 0.9}]}):
        figure = _figure(curve)
        figure.canvas.draw()
        (axes,) = figure.axes
        assert axes.yaxis.label.get_window_extent().height <= figure.bbox.height, curve["y_label"]


@pytest.mark.parametrize("width", [30, 200])
def test_the_terminal_shows_every_value(width: int) -> None:
    interval = interval_text({"estimate": -0.1, "low": -0.11, "high": 0.09}, digits=1, scale=100)
    assert interval == "-10.0 [-11.0, +9.0]"
    console = Console(width=width)
    with console.capture() as shown:
        console.print(narrow_table(PageTable(("model", "empty", "accuracy"), [("MFT", interval_text(None), interval)])))
    for part in ("model", "accuracy", "MFT", *interval.split()):
        assert part in shown.get()
    assert "empty" not in shown.get()


@pytest.mark.parametrize(("is_nll", "unit"), [(True, "NLL per token (nats),\nmean over batches"), (False, "loss")])
def test_curves_hold_what_was_logged_and_nothing_else(is_nll: bool, unit: str) -> None:
    curves = training_curves({"MFT": LOG, "FFT": LOG[:1]}, is_nll=is_nll)
    assert [(curve["title"], curve["y_label"], curve["lines"]) for curve in curves] == [
        ("Training loss", unit, {"MFT": [[5, 2.0], [10, 1.0]], "FFT": [[5, 2.0]]}),
        ("Validation loss", unit, {"MFT": [[5, 1.5]]}),
        ("Flips since the last log", "weights", {"MFT": [[5, 3], [10, 4]], "FFT": [[5, 3]]}),
    ]
