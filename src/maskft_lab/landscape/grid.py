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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Corner = tuple[int, ...]
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
    cells = _Cells(evaluate, low, high, num_dims, num_points)
    cells.start()
    while cells.split_some():
        pass
    return cells.grid()


class _Cells:
    """The points measured, and the cells between them by what is expected of splitting them.

    Points and corners are integers in units of the smallest cell.
    """

    def __init__(self, evaluate: Evaluate, low: float, high: float, num_dims: int, num_points: int) -> None:
        self.evaluate, self.low, self.high, self.num_dims, self.num_points = evaluate, low, high, num_dims, num_points
        self.known: dict[Corner, np.ndarray[Any, Any]] = {}
        self.queue: list[tuple[float, Corner, int]] = []

    def start(self) -> None:
        """Measure a uniform grid of at most half of the points."""
        depth = 1
        while 2 * ((1 << (depth + 1)) + 1) ** self.num_dims <= self.num_points and depth + 1 < _MAX_DEPTH:
            depth += 1
        width = _FULL >> depth
        self._measure(itertools.product(range(0, _FULL + 1, width), repeat=self.num_dims))
        for corner in itertools.product(range(0, _FULL, 2 * width), repeat=self.num_dims):
            self._push_parts(corner, 2 * width)

    def split_some(self) -> bool:
        """Split the worst quarter of the cells, or as many as there are points left for; whether there was one.

        Splits of one round do not know of each other's values, so that they can share passes.
        """
        chosen: list[tuple[float, Corner, int]] = []
        new: set[Corner] = set()
        most = max(1, len(self.queue) // 4)
        while self.queue and len(chosen) < most and self.queue[0][0] < 0:
            _, corner, width = self.queue[0]
            added = {point for point in _split(corner, width) if point not in self.known}
            if len(self.known) + len(new | added) > self.num_points:
                break
            chosen.append(heapq.heappop(self.queue))
            new |= added
        self._measure(new)
        for _, corner, width in chosen:
            if width > 2:
                self._push_parts(corner, width)
        return bool(chosen)

    def grid(self) -> Grid:
        """What was measured."""
        order = sorted(self.known)
        values = np.stack([self.known[point] for point in order])
        return Grid(self._coordinates(order), values, -self.queue[0][0] if self.queue else 0.0)

    def _measure(self, points: Iterable[Corner]) -> None:
        new = sorted({point for point in points if point not in self.known})
        if new:
            self.known.update(zip(new, self.evaluate(self._coordinates(new)), strict=True))

    def _coordinates(self, points: list[Corner]) -> np.ndarray[Any, Any]:
        return self.low + (self.high - self.low) * np.array(points, dtype=np.float64) / _FULL

    def _push_parts(self, corner: Corner, width: int) -> None:
        half = width // 2
        expected = _misfit(self.known, corner, width) / 4
        for offset in itertools.product((0, half), repeat=self.num_dims):
            part = tuple(c + o for c, o in zip(corner, offset, strict=True))
            heapq.heappush(self.queue, (-expected, part, half))


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
