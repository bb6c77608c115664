"""The figure of a study: performance over training steps for every method, one row for each model and domain."""

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from maskft.report import plain_text


@plain_text
def draw_study(summary: dict[str, Any]) -> dict[str, bytes]:
    """Draw the panels; returns the picture as `png` and as `svg`.

    Left, the test NLL at each checkpoint, the mean over seeds with its 95 % interval over items, the best FFT starred;
    masks that train nothing are lines. Right, where answers are checked, the accuracy of the checkpoints that
    validation chose.
    """
    panels = summary["panels"]
    figure = Figure(figsize=(11, 3.8 * len(panels)), layout="constrained")
    grid = figure.add_gridspec(len(panels), 3)
    for line, panel in enumerate(panels):
        colours = {row["method"]: f"C{i % 10}" for i, row in enumerate(panel["rows"])}
        checked = checked_rows(panel)
        _draw_curves(figure.add_subplot(grid[line, : 2 if checked else 3]), panel, colours)
        if checked:
            _draw_accuracy(figure.add_subplot(grid[line, 2]), checked, colours)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def _draw_curves(axes: Any, panel: dict[str, Any], colours: dict[str, str]) -> None:
    title = f"{panel['model']} on {panel['domain']}"
    axes.set(title=title, xlabel="training steps", ylabel="test NLL per token (nats)")
    drawn = []
    for name, curve in panel["curves"].items():
        if not curve:
            continue
        steps, nll, low, high = (np.array([p[key] for p in curve]) for key in ("step", "nll", "low", "high"))
        axes.plot(steps, nll, marker="o", markersize=3, color=colours[name], label=name)
        axes.fill_between(steps, low, high, color=colours[name], alpha=0.15, linewidth=0)
        # The base model is far off; what is compared happens near the best FFT.
        drawn += [*nll[steps >= panel["best_fft_step"] / 2]]
    for row in panel["rows"]:
        nll = row["test_nll"]["estimate"]
        if row["method"] == "fft":
            axes.plot(panel["best_fft_step"], nll, marker="*", markersize=15, color=colours["fft"], zorder=5)
            drawn.append(nll)
        elif not panel["curves"].get(row["method"]) and row["method"] != "base":
            axes.axhline(nll, linestyle="--", linewidth=1, color=colours[row["method"]], label=row["method"])
            drawn.append(nll)
    if drawn:
        margin = 0.2 * (max(drawn) - min(drawn)) + 1e-3
        axes.set_ylim(min(drawn) - 2 * margin, max(drawn) + 2 * margin)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:  # none where the base model alone is scored
        axes.legend(fontsize="small")


def checked_rows(panel: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows whose accuracy is drawn."""
    return [row for row in panel["rows"] if "accuracy" in row and row["method"] != "base"]


def _draw_accuracy(axes: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    axes.set(title="chosen checkpoints", xlabel="test accuracy (%)", yticks=range(len(rows)))
    axes.set_yticklabels([row["method"] for row in rows])
    for place, row in enumerate(rows):
        mean, low, high = (100 * row["accuracy"][key] for key in ("estimate", "low", "high"))
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colours[row["method"]], capsize=3)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
