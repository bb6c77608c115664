"""The rows of a report as text, shared by the terminal's table and the HTML page."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

HEADER = (
    "model",
    "test NLL",
    "NLL - best FFT",
    "accuracy",
    "accuracy - best FFT",
    "McNemar p",
    "train s",
    "left out",
    "file",
)
CONTROL_HEADER = ("MFT minus", "test NLL", "accuracy", "McNemar p")


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """One tuple of texts for each model, in the order of `HEADER`; accuracy in percent, intervals of 95 %."""
    return [
        (
            row["name"],
            f"{row['nll']['estimate']:.4f}",
            interval_text(row.get("nll_difference")),
            interval_text(row["accuracy"], scale=100, digits=1, plus=""),
            interval_text(row.get("accuracy_difference"), scale=100, digits=1),
            f"{row['mcnemar_p']:.3f}" if "mcnemar_p" in row else "",
            f"{row['train_seconds']:.0f}" if row.get("train_seconds") is not None else "",
            f"{100 * row['share_left_out']:.3f} %" if row.get("share_left_out") is not None else "",
            f"{row['file_bytes'] / 1e6:.1f} MB" if row.get("file_bytes") is not None else "",
        )
        for row in report["models"]
    ]


def control_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """MFT against each of the others, as texts in the order of `CONTROL_HEADER`; paired intervals of 95 %."""
    return [
        (
            row["name"],
            interval_text(row["nll_difference"]),
            interval_text(row["accuracy_difference"], scale=100, digits=1),
            f"{row['mcnemar_p']:.3f}",
        )
        for row in report["controls"]
    ]


def render_tables(report: dict[str, Any]) -> Group:
    """The comparison as tables for a terminal of 80 columns; an interval stands below what it is of."""
    rows = [(*row[:-2], "\n".join(filter(None, row[-2:]))) for row in table_rows(report)]
    models = narrow_table(report["title"], (*HEADER[:-2], f"{HEADER[-2]}, {HEADER[-1]}"), rows)
    models.caption = report["caption"]
    return Group(models, narrow_table("MFT against its controls", CONTROL_HEADER, control_rows(report)))


def narrow_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal in which an interval stands below the number it is of; empty columns are left out."""
    table = Table(title=title, box=None, pad_edge=False, collapse_padding=True, header_style="bold underline")
    rows = [[cell.replace(" [", "\n[").replace(", ", ",\n ") for cell in row] for row in rows]
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    filled = [(name, column) for name, column in zip(header, columns, strict=True) if any(column) or not rows]
    for name, column in filled:
        width = max(len(part) for part in [*name.split(), *"\n".join(column).split("\n")])
        # On a terminal that is narrower still, digits go to the next line and none is lost.
        table.add_column(name, justify="left" if name == header[0] else "right", width=width, overflow="fold")
    for cells in zip(*(column for _, column in filled), strict=True):
        table.add_row(*cells)
    return table


def interval_text(value: dict[str, Any] | None, *, scale: float = 1, digits: int = 4, plus: str = "+") -> str:
    """`estimate [low, high]` of a value that holds these three; nothing of None."""
    if value is None:
        return ""
    estimate, low, high = (f"{scale * value[key]:{plus}.{digits}f}" for key in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
