"""The curves of training runs, from the log histories of their trainers."""

from typing import Any

_DRAWN = (
    ("Training loss", "loss", "NLL per token (nats)"),
    ("Validation loss", "eval_loss", "NLL per token (nats)"),
    ("Flips since the last log", "flips", "weights"),
    ("Kept share", "kept_share", "share of the masked layers"),
)


def training_curves(logs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Loss, validation, flips and kept share over the steps of each run, where the runs logged them.

    Args:
        logs: `trainer.state.log_history` by name of the run.

    Returns:
        Curves as :class:`maskft.report.Page` draws them.
    """
    curves = []
    for title, key, y_label in _DRAWN:
        lines = {name: [[e["step"], e[key]] for e in log if key in e] for name, log in logs.items()}
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            curves.append({"title": title, "x_label": "step", "y_label": y_label, "lines": lines})
    return curves
