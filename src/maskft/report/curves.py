"""The curves of training runs, from the log histories of their trainers."""

from typing import Any

_NLL = "NLL per token (nats),\nmean over batches"
_DRAWN = (
    ("Training loss", "loss", _NLL),
    ("Validation loss", "eval_loss", _NLL),
    ("Flips since the last log", "flips", "weights"),
    ("Kept share", "kept_share", "share of the masked layers"),
)


def training_curves(logs: dict[str, list[dict[str, Any]]], *, is_nll: bool = True) -> list[dict[str, Any]]:
    """Loss, validation, flips and kept share over the steps of each run, where the runs logged them.

    Args:
        logs: `trainer.state.log_history` by name of the run.
        is_nll: whether the losses are negative log-likelihoods of tokens.

    Returns:
        Curves as :class:`maskft.report.Page` draws them.
    """
    curves = []
    for title, key, y_label in _DRAWN:
        lines = {name: [[e["step"], e[key]] for e in log if key in e] for name, log in logs.items()}
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            label = "loss" if y_label == _NLL and not is_nll else y_label
            curves.append({"title": title, "x_label": "step", "y_label": label, "lines": lines})
    return curves
