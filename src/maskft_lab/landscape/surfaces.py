"""Pictures of a loss landscape: a PNG, and a page whose surfaces can be turned."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maskft.errors import MaskftError
from maskft.report import Page, PageTable, write_html

_LOSS = "NLL per token (nats)"
_COLOURS = ("#1f77b4", "#d62728")


def draw_landscape(result: dict[str, Any]) -> bytes:
    """`landscape.json` as a PNG: the lines above, the surfaces below on one colour scale, with the points measured."""
    names = result["names"]
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    (upper_left, upper_right), lower = figure.subplots(2, 2)
    x, losses = _points_and_losses(result["line"])
    for name, values, colour in zip(names, losses.T, _COLOURS, strict=False):
        upper_left.plot(x[:, 0], values, marker="o", markersize=3, color=colour, label=name)
    upper_left.set(title="along one direction", xlabel="filter norms", ylabel=_LOSS)
    upper_left.legend()
    if "between" in result:
        x, losses = _points_and_losses(result["between"])
        upper_right.plot(x[:, 0], losses[:, 0], marker="o", markersize=3, color="#444")
        for place, name, colour in zip((0, 1), names, _COLOURS, strict=True):
            upper_right.axvline(place, linestyle="--", linewidth=1, color=colour, label=name)
        upper_right.set(title="from unmasked to masked", xlabel="share of the way", ylabel=_LOSS)
        upper_right.legend()
        upper_right.grid(alpha=0.3)
    else:
        upper_right.set_axis_off()
    upper_left.grid(alpha=0.3)
    points, surfaces = _points_and_losses(result["plane"])
    finite = surfaces[np.isfinite(surfaces)]
    levels = np.linspace(finite.min(), max(finite.max(), finite.min() + 1e-9), 24)
    for axes, name, values in zip(lower, names, surfaces.T, strict=False):
        shown = np.isfinite(values)
        drawn = axes.tricontourf(*points[shown].T, values[shown], levels=levels)
        axes.plot(*points.T, ".", color="white", markersize=2, alpha=0.6)
        axes.plot(0, 0, "*", color="white", markersize=12)
        # In two lines, for a sentence is wider than the axes.
        title = f"{name}: sharpness\n{describe_sharpness(result['sharpness'][name])}"
        axes.set(title=title, xlabel="filter norms", ylabel="filter norms")
        figure.colorbar(drawn, ax=axes, label=_LOSS)
    for axes in lower[len(names) :]:
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def describe_sharpness(sharpness: dict[str, Any]) -> str:
    """The largest eigenvalue, or how much is known of it; `sharpness` is one of those of `landscape.json`."""
    value, num_products = f"{sharpness['eigenvalue']:.4g}", sharpness["num_iterations"]
    if sharpness["converged"]:
        return value
    # A Ritz value is a lower bound of the largest eigenvalue; its residual says nothing of how far above that lies.
    bound = f", at least {value}" if math.isfinite(sharpness["eigenvalue"]) else ""
    return f"not settled after {num_products} product{'s' if num_products > 1 else ''}{bound}"


def interactive_page(path: Path, result: dict[str, Any]) -> None:
    """Write the landscape as one HTML file without a network: surfaces to turn, numbers under the pointer."""
    objects = plotly()
    names = result["names"]
    lines = objects.Figure()
    x, losses = _points_and_losses(result["line"])
    for name, values, colour in zip(names, losses.T, _COLOURS, strict=False):
        lines.add_scatter(x=x[:, 0], y=values, name=name, mode="lines+markers", line_color=colour)
    lines.update_layout(title="Along one direction", xaxis_title="filter norms", yaxis_title=_LOSS)
    figures = [lines]
    points, surfaces = _points_and_losses(result["plane"])
    finite = surfaces[np.isfinite(surfaces)]
    for name, values in zip(names, surfaces.T, strict=True):
        shown = np.isfinite(values)
        surface = objects.Figure()
        surface.add_mesh3d(
            x=points[shown, 0],
            y=points[shown, 1],
            z=values[shown],
            intensity=values[shown],
            delaunayaxis="z",
            cmin=float(finite.min()),
            cmax=float(finite.max()),
            colorscale="Viridis",
        )
        surface.update_layout(
            title=f"Around {name}",
            scene={"zaxis": {"title": "NLL", "range": [float(finite.min()), float(finite.max())]}},
        )
        figures.append(surface)
    if "between" in result:
        between = objects.Figure()
        x, losses = _points_and_losses(result["between"])
        between.add_scatter(x=x[:, 0], y=losses[:, 0], mode="lines+markers", line_color="#444")
        between.update_layout(
            title="From unmasked (0) to masked (1)", xaxis_title="share of the way", yaxis_title=_LOSS
        )
        figures.append(between)
    parts: list[str] = []
    for figure in figures:
        figure.update_layout(margin={"l": 50, "r": 10, "t": 50, "b": 45}, template="plotly_white")
        library = not parts
        parts.append(
            figure.to_html(full_html=False, include_plotlyjs=library, config={"responsive": True, "displaylogo": False})
        )
    rows = []
    for name in names:
        sharpness = result["sharpness"][name]
        within = f"{sharpness['residual']:.2g}" if sharpness["converged"] else ""
        rows.append((name, describe_sharpness(sharpness), within, str(sharpness["num_iterations"])))
    write_html(
        path,
        Page(
            title="maskft landscape",
            caption=(
                f"Mean NLL over {result['num_tokens']} tokens of {result['num_rows']} rows; "
                f"{result['num_weights']:,} weights move in filter-normalised directions, the same for all."
            ),
            tables=[
                PageTable(
                    ("weights", "largest Hessian eigenvalue", "within", "products"),
                    rows,
                    title="Sharpness",
                    caption="An eigenvalue lies within the given distance of a number that has settled.",
                )
            ],
            interactive=parts,
            details={"Settings": {key: result[key] for key in ("settings", "versions", "machine", "seconds")}},
        ),
    )


def _points_and_losses(grid: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(num_points, num_directions), and (num_points, num_places) with NaN where a loss is not finite."""
    return np.array(grid["points"]), np.array(grid["losses"], dtype=np.float64)


def plotly() -> Any:
    """The `graph_objects` of plotly.

    Raises:
        MaskftError: it is not installed.
    """
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise MaskftError("The landscape's page needs plotly: pip install 'maskft[studies]'.") from error
    return graph_objects
