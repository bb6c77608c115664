import re
from html.parser import HTMLParser

from maskft.report import render_table, write_html


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
    "curves": [{"title": "Loss", "x_label": "step", "y_label": "NLL", "lines": {"FFT": [[1, 2.0], [2, 1.0]]}}],
    "samples": [{"question": "1 < 2?", "MFT": "</pre><script>"}],
    "settings": {"seed": 0},
}


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
    write_html(tmp_path / "report.html", REPORT)
    page = (tmp_path / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"(src|href)\s*=\s*[\"']https?:", page)
    assert "<script" not in page
    assert "&lt;b&gt;bold" in page
    assert "<svg" in page
    for text in ("best FFT", "0.4000", "-0.1000 [-0.1100, -0.0900]", "+5.0 [+4.0, +6.0]", "0.031", "0.123 %", "1.8 MB"):
        assert text in page


def test_the_terminal_shows_the_same_rows() -> None:
    table = render_table(REPORT)
    assert table.row_count == 2
    assert table.columns[0].header == "model"
    assert "-0.1000 [-0.1100, -0.0900]" in list(table.columns[2].cells)
