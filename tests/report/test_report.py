import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from maskft.report import (
    CONTROL_HEADER,
    HEADER,
    Link,
    Page,
    PageTable,
    Picture,
    control_rows,
    render_tables,
    table_rows,
    training_curves,
    write_html,
)
from maskft.report.html import _figure


def interval(estimate: float) -> dict[str, float]:
    return {"estimate": estimate, "low": estimate - 0.01, "high": estimate + 0.01, "n": 300}


REPORT = {
    "title": "A <b>bold</b> title",
    "caption": "n = 300",
    "models": [
        {"name": "best FFT", "nll": interval(0.5), "accuracy": interval(0.4), "train_seconds": 12.3},
        {
            "name": "MFT",
            "nll": interval(0.4),
            "accuracy": interval(0.45),
            "nll_difference": interval(-0.1),
            "accuracy_difference": interval(0.05),
            "mcnemar_p": 0.0312,
            "share_left_out": 0.00123,
            "file_bytes": 1_770_000,
        },
    ],
    "controls": [
        {
            "name": "FFT continued",
            "nll_difference": interval(-0.2),
            "accuracy_difference": interval(0.07),
            "mcnemar_p": 0.25,
        }
    ],
}
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
        title=REPORT["title"],
        caption=REPORT["caption"],
        tables=[
            PageTable(HEADER, table_rows(REPORT), title="A & B", name="first"),
            PageTable(CONTROL_HEADER, [[Link("here", "#first"), Link("a<b", "x/y.json")]]),
            PageTable(CONTROL_HEADER, control_rows(REPORT)),
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
    assert "&lt;b&gt;bold" in text
    assert text.count("<svg") == 4
    assert "<?xml" not in text
    assert '<svg id="own"></svg><figcaption>its caption</figcaption>' in text
    assert '<h2 id="first">A &amp; B</h2>' in text
    assert '<a href="#first">here</a>' in text
    assert '<a href="x/y.json">a&lt;b</a>' in text
    for cell in ("best FFT", "0.4000", "-0.1000 [-0.1100, -0.0900]", "+5.0 [+4.0, +6.0]", "0.031", "0.123 %", "1.8 MB"):
        assert cell in text
    assert "-0.2000 [-0.2100, -0.1900]" in text


def test_sentences_wrap_in_tables_of_names_and_values_alone(tmp_path) -> None:
    tables = [
        PageTable(("", "result"), [("verdict", "A long sentence.")]),
        PageTable(("a", "b", "c"), [("1", "2", "3")]),
    ]
    write_html(tmp_path / "report.html", Page("", "", tables=tables))
    text = (tmp_path / "report.html").read_text()
    assert '<table class="pairs"><thead><tr><th></th><th>result' in text
    assert "<table><thead><tr><th>a" in text
    assert ".pairs td:last-child { white-space: normal;" in text


def test_no_label_is_longer_than_its_axis() -> None:
    for curve in training_curves({"MFT": [LOG[0] | LOG[1] | {"kept_share": 0.9}]}):
        figure = _figure(curve)
        figure.canvas.draw()
        (axes,) = figure.axes
        assert axes.yaxis.label.get_window_extent().height <= figure.bbox.height, curve["y_label"]


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_shows_the_same_values(width: int) -> None:
    console = Console(width=width)
    with console.capture() as shown:
        console.print(render_tables(REPORT))
    for row in (*table_rows(REPORT), *control_rows(REPORT)):
        for part in " ".join(row).split():
            assert part in shown.get()


def test_curves_hold_what_was_logged_and_nothing_else() -> None:
    curves = {curve["title"]: curve["lines"] for curve in training_curves({"MFT": LOG, "FFT": LOG[:1]})}
    assert curves == {
        "Training loss": {"MFT": [[5, 2.0], [10, 1.0]], "FFT": [[5, 2.0]]},
        "Validation loss": {"MFT": [[5, 1.5]]},
        "Flips since the last log": {"MFT": [[5, 3], [10, 4]], "FFT": [[5, 3]]},
    }


def test_a_loss_that_is_no_likelihood_has_no_unit() -> None:
    for is_nll in (True, False):
        labels = [curve["y_label"] for curve in training_curves({"MFT": LOG}, is_nll=is_nll)]
        assert labels == [*2 * ["NLL per token (nats),\nmean over batches" if is_nll else "loss"], "weights"]
