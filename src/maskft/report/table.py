"""Tables for the terminal, and numbers as their text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.table import Table
from rich.text import Text

from maskft.report.html import PageTable
from maskft.terminal import printable

_GAP = 2  # characters between columns
_LONGEST_WORD = 24  # of names, where a table has no room
_Column = list[str]  # header and cells


def narrow_table(table: PageTable, width: int = 80, *, num_keys: int = 1) -> Group:
    """A table for a terminal of `width` columns that breaks no number and no interval; empty columns are left out.

    Where it does not fit, long words lose their middles, which a legend gives. Then intervals go below their numbers,
    and columns that have no room stand below the others, beside the first `num_keys` again, which tell rows apart.
    """
    table = without_empty_columns(table, num_keys=num_keys)
    rows = [[printable(str(cell)) for cell in row] for row in table.rows]
    columns = [list(column) for column in zip(map(printable, table.header), *rows, strict=True)]
    legend: dict[str, str] = {}
    if _total(columns) > width:
        columns = [[" ".join(_shortened(word, legend) for word in cell.split(" ")) for cell in col] for col in columns]
    if _total(columns) > width:
        columns = [[column[0], *map(_stacked, column[1:])] for column in columns]
    parts = [_drawn(part, num_keys, width) for part in _parts(columns[:num_keys], columns[num_keys:], width)]
    title = [Text(printable(table.title), "bold")] if table.title else []
    notes = [table.caption, *(f"{name} = {word}" for name, word in legend.items())]
    below = [Text(printable(note), "dim", overflow="fold") for note in notes if note]
    return Group(*title, *[line for part in parts for line in ("", part)][1:], *below, "")


def without_empty_columns(table: PageTable, *, num_keys: int = 1) -> PageTable:
    """A table without the columns that hold no text, but for its first `num_keys`; one without rows keeps all."""
    rows = [list(row) for row in table.rows]
    filled = [i for i in range(len(table.header)) if i < num_keys or not rows or any(str(row[i]) for row in rows)]
    return replace(table, header=[table.header[i] for i in filled], rows=[[row[i] for i in filled] for row in rows])


def _stacked(cell: str) -> str:
    return cell.replace(" [", "\n[").replace(" - ", "\n- ")


def _width(column: _Column) -> int:
    """Of the longest line of its cells, or word of its header, which wraps."""
    return max(cell_len(line) for line in [*column[0].split(), *"\n".join(column[1:]).split("\n")])


def _total(columns: Sequence[_Column]) -> int:
    return sum(map(_width, columns)) + _GAP * (len(columns) - 1)


def _shortened(word: str, legend: dict[str, str]) -> str:
    """A word with letters that is too long, without its middle and unlike all others; the legend gets both."""
    if cell_len(word) <= _LONGEST_WORD or not any(map(str.isalpha, word)):
        return word
    head, tail = set_cell_size(word, 10).strip(), set_cell_size(word[::-1], 11)[::-1].strip()
    names = (f"{head}…{'' if n == 1 else f'{n}…'}{tail}" for n in range(1, len(legend) + 2))
    short = next(name for name in names if legend.get(name, word) == word)
    legend[short] = word
    return short


def _parts(keys: list[_Column], others: list[_Column], width: int) -> list[list[_Column]]:
    """The columns in tables that fit, each with the keys first."""
    parts = [[*keys]]
    for column in others:
        if len(parts[-1]) > len(keys) and _total([*parts[-1], column]) > width:
            parts.append([*keys])
        parts[-1].append(column)
    return parts


def _drawn(columns: list[_Column], num_keys: int, width: int) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold underline")
    left = width
    for i, column in enumerate(columns):
        # Sentences wrap; on a terminal that is narrower still, digits go to the next line and none is lost.
        room = _LONGEST_WORD + 2 if i < num_keys and _total(columns) > width else left
        size = min(_width(column), max(room, 8))
        left -= size + _GAP
        shown.add_column(column[0], justify="left" if i < num_keys else "right", width=size, overflow="fold")
    for cells in list(zip(*columns, strict=True))[1:]:
        shown.add_row(*map(Text, cells))
    return shown


def interval_text(value: dict[str, Any] | None, *, scale: float = 1, digits: int = 4, plus: str = "+") -> str:
    """`estimate [low, high]` of a value that holds these three; nothing of None."""
    if value is None:
        return ""
    estimate, low, high = (f"{scale * value[key]:{plus}.{digits}f}" for key in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
