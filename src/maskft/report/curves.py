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


def tradeoff_curve(restore: dict[str, Any]) -> dict[str, Any]:
    """What the task pays for what comes back: the mask over its steps, and scaled changes, as a curve of a page.

    Args:
        restore: `wise_ft` and `mask`, lists of points with `task` and `retained`, and the `chosen` point or None.
    """
    points = {"scaled changes (WiSE-FT), those near the task": "wise_ft", "the mask, by step": "mask"}
    lines = {name: [[p["retained"], p["task"]] for p in restore[key]] for name, key in points.items()}
    chosen = restore["chosen"]
    return {
        "title": "What the task pays for what comes back",
        "x_label": "general rows: NLL per token (nats)",
        "y_label": "task: NLL per token (nats)",
        # The model before fine-tuning is far off; what is compared happens near the fine-tuned one.
        "y_top": 2 * max(y for _, y in lines["the mask, by step"]),
        "lines": lines,
        "stars": {f"chosen, step {chosen['step']}": [chosen["retained"], chosen["task"]]} if chosen else {},
    }
