"""Adaptive grids: more points where a surface bends, the same points for every surface.

The rule. A cell (an interval, or a square) is interpolated from its corners. Splitting it into halves along every axis
measures the midpoints of its edges and its centre; how far these lie from the mean of the corners around them is the
cell's misfit. Linear interpolation errs with the square of the width, so each part is expected to err by a quarter of
that misfit. Cells are split in the order of the expected error, largest first, the largest over all surfaces counting,
after a uniform start that spends at most half of the points. Where a surface is not finite nothing is refined.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Place = tuple[int, ...]
Evaluate = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]

_MAX_DEPTH = 12


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
    full = 1 << _MAX_DEPTH
    known: dict[Place, np.ndarray[Any, Any]] = {}

    def measure(places: list[Place]) -> None:
        new = sorted({place for place in places if place not in known})
        if new:
            points = low + (high - low) * np.array(new, dtype=np.float64) / full
            known.update(zip(new, evaluate(points), strict=True))

    depth = 1
    while 2 * ((1 << (depth + 1)) + 1) ** num_dims <= num_points and depth + 1 < _MAX_DEPTH:
        depth += 1
    width = full >> depth
    measure(list(itertools.product(range(0, full + 1, width), repeat=num_dims)))
    queue: list[tuple[float, Place, int]] = []

    def push_parts(corner: Place, width: int) -> None:
        half = width // 2
        expected = _misfit(known, corner, width) / 4
        for offset in itertools.product((0, half), repeat=num_dims):
            heapq.heappush(queue, (-expected, tuple(c + o for c, o in zip(corner, offset, strict=True)), half))

    for corner in itertools.product(range(0, full, 2 * width), repeat=num_dims):
        push_parts(corner, 2 * width)
    # Splits of one round do not know of each other's values, so that they can share passes.
    while queue:
        chosen: list[tuple[float, Place, int]] = []
        places: set[Place] = set()
        most = max(1, len(queue) // 4)
        while queue and len(chosen) < most and queue[0][0] < 0:
            cell = queue[0]
            added = {place for place in _split(cell[1], cell[2]) if place not in known}
            if len(known) + len(places | added) > num_points:
                break
            heapq.heappop(queue)
            places |= added
            chosen.append(cell)
        if not chosen:
            break
        measure(list(places))
        for _, corner, cell_width in chosen:
            if cell_width > 2:
                push_parts(corner, cell_width)
    order = sorted(known)
    left = -queue[0][0] if queue else 0.0
    points = low + (high - low) * np.array(order, dtype=np.float64) / full
    return Grid(points, np.stack([known[place] for place in order]), left)


def _split(corner: Place, width: int) -> list[Place]:
    """The 3 ** num_dims points of a cell that is halved along every axis."""
    steps = itertools.product((0, width // 2, width), repeat=len(corner))
    return [tuple(c + s for c, s in zip(corner, step, strict=True)) for step in steps]


def _misfit(known: dict[Place, np.ndarray[Any, Any]], corner: Place, width: int) -> float:
    """How far the inner points of a halved cell lie from the mean of the corners around them, at most."""
    worst = 0.0
    for place in _split(corner, width):
        sides = [(p,) if p in (c, c + width) else (c, c + width) for p, c in zip(place, corner, strict=True)]
        corners = list(itertools.product(*sides))
        if len(corners) > 1:
            with np.errstate(invalid="ignore"):
                misfit = float(np.max(np.abs(known[place] - np.mean([known[c] for c in corners], axis=0))))
            if not math.isfinite(misfit):
                return 0.0
            worst = max(worst, misfit)
    return worst
