import io
import logging
import warnings

import pytest
from matplotlib.figure import Figure
from rich.table import Table

from maskft.report import PageTable, narrow_table, plain_text
from maskft.terminal import PlainConsole, print_plainly, printable

STEERING = ["\x00", "\x07", "\x1b", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u200f", "\u2028", "\ud800"]
FOREIGN = [
    "run[v1]",
    "m[/x]",
    "[red]a[/]",
    ":smile:",
    "$\\frac{1",
    "a\\[b]",
    "\x1b[31mred",
    "\x9b2J",
    "a\rb",
    "\u202edlrow",
    "a\ud800b",
]


@pytest.mark.parametrize("character", STEERING)
def test_what_steers_a_terminal_is_left_out_and_nothing_else(character) -> None:
    assert printable(f"a{character}b\tc\nd é 漢 👩‍🚀") == "ab\tc\nd é 漢 👩‍🚀"


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_is_printed_as_it_is_wherever_it_stands(name) -> None:
    console = PlainConsole(file=(file := io.StringIO()), width=200, force_terminal=True)
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    page = PageTable((name,), [(name,)], title=name, caption=name)
    for shown in (name, table, narrow_table(page)):
        console.print(shown)
    console.print(name, style="red")
    console.rule(name)
    text = file.getvalue()
    assert text.count(printable(name)) == 11
    # rich writes colours of its own.
    assert not any(c in text.replace("\x1b[", "") for c in STEERING)


def test_libraries_print_plainly_too(capsys, monkeypatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    try:
        print_plainly()
        record = logging.getLogger("transformers").makeRecord("t", 30, "f", 1, "type %s", ("\x1b[2J\u202ea",), None)
        assert record.getMessage() == "type [2Ja"
        assert "\x1b" not in warnings.formatwarning("\x1b[2J", UserWarning, "f", 1)
    finally:
        logging.setLogRecordFactory(factory)


def test_dollar_signs_are_no_formulas() -> None:
    def draw() -> None:
        figure = Figure()
        figure.subplots().set(title="a $\\frac{1 b$", xlabel="$x$ and $")
        figure.savefig(io.BytesIO(), format="svg")

    with pytest.raises(ValueError, match="frac"):
        draw()
    plain_text(draw)()
