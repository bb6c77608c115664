"""The rows of a report as text, shared by the terminal's table and the HTML page."""

from typing import Any

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


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """One tuple of texts for each model, in the order of `HEADER`; accuracy in percent, intervals of 95 %."""
    return [
        (
            row["name"],
            f"{row['nll']['estimate']:.4f}",
            _interval(row.get("nll_difference"), 1, 4),
            _interval(row["accuracy"], 100, 1, sign=False),
            _interval(row.get("accuracy_difference"), 100, 1),
            f"{row['mcnemar_p']:.3f}" if "mcnemar_p" in row else "",
            f"{row['train_seconds']:.0f}" if row.get("train_seconds") is not None else "",
            f"{100 * row['share_left_out']:.3f} %" if row.get("share_left_out") is not None else "",
            f"{row['file_bytes'] / 1e6:.1f} MB" if row.get("file_bytes") is not None else "",
        )
        for row in report["models"]
    ]


def render_table(report: dict[str, Any]) -> Table:
    """The comparison as a table for the terminal."""
    table = Table(title=report["title"], caption=report["caption"])
    for name in HEADER:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in table_rows(report):
        table.add_row(*row)
    return table


def _interval(value: dict[str, Any] | None, scale: float, digits: int, *, sign: bool = True) -> str:
    if value is None:
        return ""
    plus = "+" if sign else ""
    low, high = scale * value["low"], scale * value["high"]
    return f"{scale * value['estimate']:{plus}.{digits}f} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]"
