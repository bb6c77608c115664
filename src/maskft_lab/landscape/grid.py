"""Adaptive grids: more points where a surface bends, the same points for every surface.

The rule. A cell (an interval, or a square) is interpolated from its corners. Splitting it into halves along every axis
measures the midpoints of its edges and its centre; how far these lie from the mean of the corners around them is the
cell's misfit. Linear interpolation errs with the square of the width, so each part is expected to err by a quarter of
that misfit. Cells are split in the order of the expected error, largest first, the largest over all surfaces counting,
after a uniform start that spends at most half of the points. Where a surface is not finite nothing is refined.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Corner = tuple[int, ...]
Cell = tuple[float, Corner, int]
"""What splitting is expected to change, times -1, so that the worst sorts first; corner and width."""
Evaluate = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]

_MAX_DEPTH = 12
_FULL = 1 << _MAX_DEPTH


@dataclass(frozen=True)
class Grid:
    """Points and values of one or several surfaces.

    Attributes:
        points: (num_points, num_dims) float64, sorted.
        values: (num_points, num_surfaces) float64; NaN or infinite where a loss was.
        largest_misfit: the largest expected interpolation error that is left, in the unit of the values.
    """

    points: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]
    largest_misfit: float


def adaptive_grid(evaluate: Evaluate, low: float, high: float, num_dims: int, num_points: int) -> Grid:
    """Measure surfaces on [low, high] ** num_dims in at most `num_points` points (3 ** num_dims at least).

    Args:
        evaluate: takes points (n, num_dims), returns values (n, num_surfaces).
        low: lower border of every axis.
        high: upper border of every axis.
        num_dims: 1 or 2.
        num_points: most points to measure.
    """
    if num_points < 3**num_dims:
        raise ValueError(f"A grid in {num_dims} dimensions needs at least {3**num_dims} points, got {num_points}.")
    known: dict[Corner, np.ndarray[Any, Any]] = {}

    def coordinates(points: list[Corner]) -> np.ndarray[Any, Any]:
        return low + (high - low) * np.array(points, dtype=np.float64) / _FULL

    def measure(points: Iterable[Corner]) -> None:
        new = sorted({point for point in points if point not in known})
        known.update(zip(new, evaluate(coordinates(new)), strict=True))

    depth = 1
    while 2 * ((1 << (depth + 1)) + 1) ** num_dims <= num_points and depth + 1 < _MAX_DEPTH:
        depth += 1
    width = _FULL >> depth
    measure(itertools.product(range(0, _FULL + 1, width), repeat=num_dims))
    corners = itertools.product(range(0, _FULL, 2 * width), repeat=num_dims)
    cells = [part for corner in corners for part in _parts(known, corner, 2 * width)]
    # Splits of one round do not know of each other's values, so that they can share passes.
    while chosen := _worst(cells, known, num_points):
        measure(point for _, corner, width in chosen for point in _split(corner, width))
        del cells[: len(chosen)]
        cells += [part for _, corner, width in chosen if width > 2 for part in _parts(known, corner, width)]
    order = sorted(known)
    left = max((-expected for expected, *_ in cells), default=0.0)
    return Grid(coordinates(order), np.stack([known[point] for point in order]), left)


def _worst(cells: list[Cell], known: dict[Corner, np.ndarray[Any, Any]], num_points: int) -> list[Cell]:
    """Sort the cells; the worst quarter of them, or as many as there are points left for."""
    cells.sort()
    chosen: list[Cell] = []
    new: set[Corner] = set()
    for cell in cells[: max(1, len(cells) // 4)]:
        added = {point for point in _split(*cell[1:]) if point not in known}
        if cell[0] == 0 or len(known) + len(new | added) > num_points:
            break
        chosen.append(cell)
        new |= added
    return chosen


def _parts(known: dict[Corner, np.ndarray[Any, Any]], corner: Corner, width: int) -> list[Cell]:
    """The parts of a cell that is halved along every axis."""
    half = width // 2
    expected = _misfit(known, corner, width) / 4
    offsets = itertools.product((0, half), repeat=len(corner))
    return [(-expected, tuple(c + o for c, o in zip(corner, offset, strict=True)), half) for offset in offsets]


def _split(corner: Corner, width: int) -> list[Corner]:
    """The 3 ** num_dims points of a cell that is halved along every axis."""
    steps = itertools.product((0, width // 2, width), repeat=len(corner))
    return [tuple(c + s for c, s in zip(corner, step, strict=True)) for step in steps]


def _misfit(known: dict[Corner, np.ndarray[Any, Any]], corner: Corner, width: int) -> float:
    """How far the inner points of a halved cell lie from the mean of the corners around them, at most."""
    worst = 0.0
    for point in _split(corner, width):
        sides = [(p,) if p in (c, c + width) else (c, c + width) for p, c in zip(point, corner, strict=True)]
        corners = list(itertools.product(*sides))
        if len(corners) > 1:
            with np.errstate(invalid="ignore"):
                misfit = float(np.max(np.abs(known[point] - np.mean([known[c] for c in corners], axis=0))))
            if not math.isfinite(misfit):
                return 0.0
            worst = max(worst, misfit)
    return worst
