"""Tables for the terminal, and numbers as their text."""

from typing import Any

from rich.table import Table

from maskft.report.html import PageTable


def narrow_table(table: PageTable) -> Table:
    """A table for the terminal in which an interval stands below the number it is of; empty columns are left out."""
    shown = Table(title=table.title, caption=table.caption or None, box=None, pad_edge=False, collapse_padding=True)
    shown.header_style = "bold underline"
    rows = [[str(cell).replace(" [", "\n[").replace(", ", ",\n ") for cell in row] for row in table.rows]
    columns = zip(*rows, strict=True) if rows else [()] * len(table.header)
    filled = [(name, column) for name, column in zip(table.header, columns, strict=True) if any(column) or not rows]
    for name, column in filled:
        width = max(len(part) for part in [*name.split(), *"\n".join(column).split("\n")])
        # On a terminal that is narrower still, digits go to the next line and none is lost.
        shown.add_column(name, justify="left" if name == table.header[0] else "right", width=width, overflow="fold")
    for cells in zip(*(column for _, column in filled), strict=True):
        shown.add_row(*cells)
    return shown


def interval_text(value: dict[str, Any] | None, *, scale: float = 1, digits: int = 4, plus: str = "+") -> str:
    """`estimate [low, high]` of a value that holds these three; nothing of None."""
    if value is None:
        return ""
    estimate, low, high = (f"{scale * value[key]:{plus}.{digits}f}" for key in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
