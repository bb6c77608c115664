import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from maskft.report import Link, Page, PageTable, Picture, interval_text, narrow_table, training_curves, write_html
from maskft.report.html import _figure

LOG = [{"step": 5, "loss": 2.0, "flips": 3}, {"step": 5, "eval_loss": 1.5}, {"step": 10, "loss": 1.0, "flips": 4}]


class Balanced(HTMLParser):
    """Checks that tags close in the order they opened."""

    void = frozenset({"meta", "br", "img", "link", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


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
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert not re.search(r"(src|href)\s*=\s*[\"']https?:", text)
    assert "<script" not in text
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
