"""Paired statistics on shared items; the estimators are scipy's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from maskft.errors import MaskftError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval over `n` items."""

    estimate: float
    low: float
    high: float
    n: int


def paired_ratio_difference(
    sums_a: Array, sums_b: Array, counts: Array, *, confidence: float = 0.95, num_resamples: int = 9999, seed: int = 0
) -> Interval:
    """`sum(b)/sum(counts) - sum(a)/sum(counts)`, by a percentile bootstrap over items.

    With counts of one for every item it is the difference of two means. Both models must have scored the same items.

    Raises:
        MaskftError: fewer than two items, or arrays of different length.
    """
    difference = np.asarray(sums_b, float) - np.asarray(sums_a, float)
    return ratio(difference, counts, confidence=confidence, num_resamples=num_resamples, seed=seed)


def ratio(
    sums: Array, counts: Array, *, confidence: float = 0.95, num_resamples: int = 9999, seed: int = 0
) -> Interval:
    """`sum(sums) / sum(counts)` with a percentile bootstrap interval over items.

    Raises:
        MaskftError: fewer than two items, or arrays of different length.
    """
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    if len(sums) != len(counts) or len(sums) < 2:
        raise MaskftError(
            f"An interval needs at least 2 items and as many sums as counts, got {len(sums)} and {len(counts)}."
        )
    estimate: Callable[..., Any] = lambda s, c, axis=-1: s.sum(axis) / c.sum(axis)  # noqa: E731
    interval = stats.bootstrap(
        (sums, counts),
        estimate,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=num_resamples,
        batch=500,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(sums.sum() / counts.sum()), float(interval.low), float(interval.high), len(sums))


def mcnemar_exact(correct_a: Array, correct_b: Array) -> float:
    """Two-sided p-value of McNemar's exact test: is one of two models right more often where only one is right?"""
    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)
