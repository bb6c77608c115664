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
_TITLES = {"line": "Along one direction", "between": "From unmasked (0) to masked (1)"}
_UNITS = {"line": "filter norms", "between": "share of the way"}


def draw_landscape(result: dict[str, Any]) -> bytes:
    """`landscape.json` as a PNG: the lines above, the surfaces below on one colour scale, with the points measured."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 2)
    for axes in (*upper, *lower):
        axes.set_axis_off()
    _draw_lines(upper, result)
    points, surfaces = _points_and_losses(result["plane"])
    finite = surfaces[np.isfinite(surfaces)]
    levels = np.linspace(finite.min(), max(finite.max(), finite.min() + 1e-9), 24)
    for axes, name, values in zip(lower, result["names"], surfaces.T, strict=False):
        axes.set_axis_on()
        shown = np.isfinite(values)
        drawn = axes.tricontourf(*points[shown].T, values[shown], levels=levels)
        axes.plot(*points.T, ".", color="white", markersize=2, alpha=0.6)
        axes.plot(0, 0, "*", color="white", markersize=12)
        # In two lines, for a sentence is wider than the axes.
        title = f"{name}: sharpness\n{describe_sharpness(result['sharpness'][name])}"
        axes.set(title=title, xlabel="filter norms", ylabel="filter norms")
        figure.colorbar(drawn, ax=axes, label=_LOSS)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw_lines(upper: Any, result: dict[str, Any]) -> None:
    for axes, key in zip(upper, ("line", "between"), strict=True):
        if key not in result:
            continue
        axes.set_axis_on()
        x, losses = _points_and_losses(result[key])
        for name, values, colour in zip(result["names"], losses.T, _COLOURS, strict=False):
            settings = {"color": colour, "label": name} if key == "line" else {"color": "#444"}
            axes.plot(x[:, 0], values, marker="o", markersize=3, **settings)
        axes.set(title=_TITLES[key].lower(), xlabel=_UNITS[key], ylabel=_LOSS)
        axes.grid(alpha=0.3)
    upper[0].legend()
    if "between" in result:
        for end, name, colour in zip((0, 1), result["names"], _COLOURS, strict=True):
            upper[1].axvline(end, linestyle="--", linewidth=1, color=colour, label=name)
        upper[1].legend()


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
    figures = [_line_figure(result, "line"), *_surface_figures(result)]
    if "between" in result:
        figures.append(_line_figure(result, "between"))
    parts: list[str] = []
    for figure in figures:
        figure.update_layout(margin={"l": 50, "r": 10, "t": 50, "b": 45}, template="plotly_white")
        settings = {"responsive": True, "displaylogo": False}
        parts.append(figure.to_html(full_html=False, include_plotlyjs=not parts, config=settings))
    rows = []
    for name, sharpness in result["sharpness"].items():
        within = f"{sharpness['residual']:.2g}" if sharpness["converged"] else ""
        rows.append((name, describe_sharpness(sharpness), within, str(sharpness["num_iterations"])))
    table = PageTable(
        ("weights", "largest Hessian eigenvalue", "within", "products"),
        rows,
        title="Sharpness",
        caption="An eigenvalue lies within the given distance of a number that has settled.",
    )
    caption = (
        f"Mean NLL over {result['num_tokens']} tokens of {result['num_rows']} rows; {result['num_weights']:,} weights "
        "move in filter-normalised directions, the same for all."
    )
    details = {"Settings": {key: result[key] for key in ("settings", "versions", "machine", "seconds")}}
    write_html(path, Page("maskft landscape", caption, tables=[table], interactive=parts, details=details))


def _line_figure(result: dict[str, Any], key: str) -> Any:
    figure = plotly().Figure()
    x, losses = _points_and_losses(result[key])
    for name, values, colour in zip(result["names"], losses.T, _COLOURS, strict=False):
        settings = {"name": name, "line_color": colour} if key == "line" else {"line_color": "#444"}
        figure.add_scatter(x=x[:, 0], y=values, mode="lines+markers", **settings)
    figure.update_layout(title=_TITLES[key], xaxis_title=_UNITS[key], yaxis_title=_LOSS)
    return figure


def _surface_figures(result: dict[str, Any]) -> list[Any]:
    points, surfaces = _points_and_losses(result["plane"])
    finite = surfaces[np.isfinite(surfaces)]
    low, high = float(finite.min()), float(finite.max())
    figures = []
    for name, values in zip(result["names"], surfaces.T, strict=True):
        shown = np.isfinite(values)
        (x, y), z = points[shown].T, values[shown]
        figure = plotly().Figure()
        colours = {"intensity": z, "cmin": low, "cmax": high, "colorscale": "Viridis"}
        figure.add_mesh3d(x=x, y=y, z=z, delaunayaxis="z", **colours)
        figure.update_layout(title=f"Around {name}", scene={"zaxis": {"title": "NLL", "range": [low, high]}})
        figures.append(figure)
    return figures


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
