"""Adaptive grids: known surfaces, the number of points, and where the points go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import griddata

from maskft_lab.landscape.grid import adaptive_grid


@pytest.mark.parametrize("num_points", [9, 25, 60, 200])
def test_a_quadratic_is_known_to_the_error_that_is_said(num_points: int) -> None:
    def bowl(points: np.ndarray) -> np.ndarray:
        return np.stack([3 * points[:, 0] ** 2 + points[:, 1] ** 2, points[:, 0] * 0 + 1], axis=1)

    grid = adaptive_grid(bowl, -1, 1, 2, num_points)
    assert len(grid.points) <= num_points
    np.testing.assert_allclose(grid.values, bowl(grid.points))
    # Linear interpolation of a x^2 over a width h errs by a h^2 / 4.
    draws = np.random.default_rng(0).uniform(-1, 1, (500, 2))
    error = np.abs(griddata(grid.points, grid.values[:, 0], draws) - bowl(draws)[:, 0])
    assert error.max() <= 2 * 4 * grid.largest_misfit + 1e-9
    assert error.max() < 16 / np.sqrt(num_points)


def test_points_go_where_it_bends() -> None:
    def kink(points: np.ndarray) -> np.ndarray:
        return np.abs(points - 0.3)

    grid = adaptive_grid(kink, -1, 1, 1, 33)
    uniform = np.linspace(-1, 1, 33)
    places = np.linspace(-1, 1, 999)

    def error(points: np.ndarray) -> float:
        return float(np.abs(np.interp(places, points, np.abs(points - 0.3)) - np.abs(places - 0.3)).max())

    assert error(grid.points[:, 0]) < error(uniform) / 4
    near = np.abs(grid.points[:, 0] - 0.3) < 0.1
    assert near.sum() > 0.1 * 33


def test_surfaces_share_points_and_the_one_that_bends_decides() -> None:
    def both(points: np.ndarray) -> np.ndarray:
        return np.concatenate([points * 2, np.exp(8 * points)], axis=1)

    grid = adaptive_grid(both, -1, 1, 1, 30)
    assert np.median(grid.points) > 0.5


def test_a_surface_that_ends_is_still_measured() -> None:
    grid = adaptive_grid(lambda p: np.where(p > 0, np.inf, p), -1, 1, 1, 40)
    assert np.isfinite(grid.values[grid.points[:, 0] <= 0]).all()
    assert 3 <= len(grid.points) <= 40


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), st.integers(9, 80), st.integers(0, 99))
def test_the_budget_is_kept_and_no_point_measured_twice(num_dims: int, num_points: int, seed: int) -> None:
    slope = np.random.default_rng(seed).normal(size=(num_dims, 2))
    asked: list[tuple[float, ...]] = []

    def surface(points: np.ndarray) -> np.ndarray:
        asked.extend(map(tuple, points))
        return np.sin(3 * points @ slope)

    grid = adaptive_grid(surface, -2, 1, num_dims, num_points)
    assert len(asked) == len(set(asked)) == len(grid.points) <= num_points
    assert grid.points.min() == -2
    assert grid.points.max() == 1
    again = adaptive_grid(lambda points: np.sin(3 * points @ slope), -2, 1, num_dims, num_points)
    np.testing.assert_array_equal(grid.points, again.points)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 9 points, got 8"):
        adaptive_grid(lambda points: points, -1, 1, 2, 8)
