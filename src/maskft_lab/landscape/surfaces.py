"""The picture of a loss landscape."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from maskft.report import plain_text

_LOSS = "NLL per token (nats)"
_COLOURS = ("#1f77b4", "#d62728")
_LINES = {
    "line": ("along one direction", "filter norms"),
    "between": ("from unmasked (0) to masked (1)", "share of the way"),
}


@plain_text
def draw_landscape(result: dict[str, Any], path: Path) -> None:
    """Draw what `landscape.json` holds: lines above, surfaces below on one colour scale, with their points."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    _draw_lines(figure, result)
    points, surfaces = _points_and_losses(result["plane"])
    finite = surfaces[np.isfinite(surfaces)]
    levels = np.linspace(finite.min(), max(finite.max(), finite.min() + 1e-9), 24)
    for place, (name, values) in enumerate(zip(result["names"], surfaces.T, strict=True), start=3):
        axes = figure.add_subplot(2, 2, place)
        shown = np.isfinite(values)
        drawn = axes.tricontourf(*points[shown].T, values[shown], levels=levels)
        axes.plot(*points.T, ".", color="white", markersize=2, alpha=0.6)
        axes.plot(0, 0, "*", color="white", markersize=12)
        # In two lines, for a sentence is wider than the axes.
        title = f"{name}: sharpness\n{describe_sharpness(result['sharpness'][name])}"
        axes.set(title=title, xlabel="filter norms", ylabel="filter norms")
        figure.colorbar(drawn, ax=axes, label=_LOSS)
    figure.savefig(path, dpi=150)


def _draw_lines(figure: Figure, result: dict[str, Any]) -> None:
    for place, (key, (title, unit)) in enumerate(_LINES.items(), start=1):
        if key not in result:
            continue
        axes = figure.add_subplot(2, 2, place)
        x, losses = _points_and_losses(result[key])
        for name, values, colour in zip(result["names"], losses.T, _COLOURS, strict=False):
            settings = {"color": colour, "label": name} if key == "line" else {"color": "#444"}
            axes.plot(x[:, 0], values, marker="o", markersize=3, **settings)
        if key == "between":
            for end, name, colour in zip((0, 1), result["names"], _COLOURS, strict=True):
                axes.axvline(end, linestyle="--", linewidth=1, color=colour, label=name)
        axes.set(title=title, xlabel=unit, ylabel=_LOSS)
        axes.grid(alpha=0.3)
        axes.legend()


def describe_sharpness(sharpness: dict[str, Any]) -> str:
    """The largest eigenvalue, or how much is known of it; `sharpness` is one of those of `landscape.json`."""
    value, num_products = f"{sharpness['eigenvalue']:.4g}", sharpness["num_iterations"]
    if sharpness["converged"]:
        return value
    # A Ritz value is a lower bound of the largest eigenvalue; its residual says nothing of how far above that lies.
    bound = f", at least {value}" if math.isfinite(sharpness["eigenvalue"]) else ""
    return f"not settled after {num_products} product{'s' if num_products > 1 else ''}{bound}"


def _points_and_losses(grid: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(num_points, num_directions), and (num_points, num_places) with NaN where a loss is not finite."""
    return np.array(grid["points"]), np.array(grid["losses"], dtype=np.float64)
