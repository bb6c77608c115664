"""Paired statistics on shared items; the estimators are scipy's and statsmodels'."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from maskft.errors import MaskftError

Array = np.ndarray[Any, Any]

ALPHA = 0.05
POWER = 0.8

NUM_FLIPS = 9999
# The least p-value of drawn sign flips: the data's own signs count as one draw, in both tails.
FLIPS_FLOOR = 2 / (NUM_FLIPS + 1)


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval over `n` items (or problems, where items were summed by problem)."""

    estimate: float
    low: float
    high: float
    n: int

    @property
    def has_width(self) -> bool:
        """Whether its ends differ; a bootstrap's do not where all items are alike, for it draws the same each time."""
        return not math.isclose(self.low, self.high, rel_tol=1e-9, abs_tol=1e-12)


def paired_ratio_difference(sums_a: Array, sums_b: Array, counts: Array, *, num_resamples: int = 9999) -> Interval:
    """`sum(b)/sum(counts) - sum(a)/sum(counts)`, by a percentile bootstrap over items.

    With counts of one for every item it is the difference of two means. Both models must have scored the same items.
    Arrays of shape (k, n) give the mean of the k differences, all of them over the same n items. Where all items differ
    alike the interval has no width, which says nothing of other items: :func:`paired_detectable` does.

    Raises:
        MaskftError: fewer than two items, or arrays of different length.
    """
    difference = np.asarray(sums_b, float) - np.asarray(sums_a, float)
    return ratio(difference, counts, num_resamples=num_resamples)


def ratio(sums: Array, counts: Array, *, num_resamples: int = 9999) -> Interval:
    """`sum(sums) / sum(counts)` with a percentile bootstrap interval over items.

    Arrays of shape (k, n) give the mean of the k ratios, all of them over the same n items. Items of which nothing was
    counted are left out.

    Raises:
        MaskftError: fewer than two items, or arrays of different length.
    """
    sums, counts = _counted(sums, counts)
    num_ratios, n = sums.shape

    def mean_of_ratios(*arrays: Array, axis: int = -1) -> Array:
        parts = [s.sum(axis) / c.sum(axis) for s, c in zip(arrays[:num_ratios], arrays[num_ratios:], strict=True)]
        return np.asarray(sum(parts)) / num_ratios

    interval = bootstrap((*sums, *counts), mean_of_ratios, num_resamples, paired=True).confidence_interval
    return Interval(float(mean_of_ratios(*sums, *counts)), float(interval.low), float(interval.high), n)


def bootstrap(
    arrays: Sequence[Array], statistic: Callable[..., Any], num_resamples: int, *, paired: bool = False
) -> Any:
    """scipy's percentile bootstrap of a vectorised statistic, with the same draws each time."""
    return stats.bootstrap(
        arrays,
        statistic,
        paired=paired,
        vectorized=True,
        method="percentile",
        n_resamples=num_resamples,
        batch=500,
        rng=np.random.default_rng(0),
    )


def share(sums: Array, counts: Array, *, num_resamples: int = 9999) -> tuple[Interval, str]:
    """`ratio` of scores in [0, 1] with an interval that has some width whatever was scored.

    Items that are right or wrong get Wilson's interval. So do items that all score alike, of which a bootstrap would
    draw the same each time: values in [0, 1] vary no more than right-or-wrong ones of the same mean (Bhatia and Davis
    2000, Amer. Math. Monthly 107, 353-357), so Wilson's interval bounds theirs. All others get `ratio`'s.

    Args:
        sums, counts: as in :func:`ratio`, 0 <= sums <= counts.

    Returns:
        The interval, and how it was made.

    Raises:
        MaskftError: fewer than two items, or arrays of different length.
    """
    sums, counts = _counted(sums, counts)
    if _is_binary(sums, counts):
        return wilson(float(sums.sum()), sums.size), "Wilson"
    interval = ratio(sums, counts, num_resamples=num_resamples)
    if interval.has_width:
        return interval, "bootstrap over problems"
    return wilson(interval.estimate * interval.n, interval.n), "Wilson, all problems alike"


def wilson(num_right: float, n: int) -> Interval:
    """A share with Wilson's score interval, which stays honest where nothing or everything is right.

    Args:
        num_right: of `n`; between two whole numbers the interval reaches over those of both.
    """
    whole = round(num_right, 6)  # a sum of shares is not quite whole
    low, high = (
        stats.binomtest(number, n).proportion_ci(method="wilson") for number in (math.floor(whole), math.ceil(whole))
    )
    return Interval(num_right / n, float(low.low), float(high.high), n)


def mcnemar_exact(correct_a: Array, correct_b: Array) -> float:
    """Two-sided p-value of McNemar's exact test: is one of two models right more often where only one is right?"""
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    return float(mcnemar([[0, (a & ~b).sum()], [(b & ~a).sum(), 0]], exact=True).pvalue)


def sign_flip_test(differences: Array, *, num_resamples: int = NUM_FLIPS) -> float:
    """Two-sided p-value of the paired permutation test on the sum of the differences, one for each problem.

    It is exact where all sign flips can be listed, and then equals McNemar's exact test on differences of -1, 0 and 1.
    """
    differences = np.asarray(differences, float)
    moved = differences[differences != 0]
    total, rounding = moved.sum(), 1e-12 * np.abs(moved).sum()
    if len(moved) < 2 or abs(total) <= rounding:  # with one, both signs are equally extreme
        return 1.0

    def sums(flipped: Array, axis: int = -1) -> Array:
        # Scipy's own tolerance is relative to the total, which may be small beside what rounding leaves of the parts.
        of = flipped.sum(axis)
        return np.where(np.abs(of - total) <= rounding, total, of)

    result = stats.permutation_test(
        (moved,),
        sums,
        permutation_type="samples",
        vectorized=True,
        n_resamples=num_resamples,
        batch=500,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for several comparisons by Holm's step-down method (Holm 1979, Scand. J. Statist. 6, 65)."""
    if not len(p_values):
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]]


def detectable_difference(variance: float, n: int) -> float:
    """The smallest true difference that a paired comparison over `n` items finds with power 0.8 at level 0.05.

    `(z(1 - alpha/2) + z(power)) * sqrt(variance / n)`, where `variance` is that of one item's paired difference
    (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640, section 5).
    """
    z = stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)
    return float(z * math.sqrt(variance / n))


def mcnemar_detectable(n: int, discordance: Callable[[float], float], *, largest: float = 1.0) -> float | None:
    """The smallest true difference that McNemar's exact test over `n` items finds with power 0.8 at level 0.05.

    The power is the mean of the exact test's over the binomial number of discordant items (Duffy 1984, "Asymptotic and
    exact power for the McNemar test and its analogue with R controls per case", Biometrics 40, 1005-1015).

    Args:
        discordance: the share of the items on which only one model is right, given the difference of their shares.
        largest: the largest difference that there can be.

    Returns:
        The difference, in [0, `largest`]; None where not even the largest is found.
    """

    def found(difference: float) -> float:
        discordant = min(max(discordance(difference), difference), 1.0)
        low, high = stats.binom.ppf((1e-5, 1 - 1e-5), n, discordant)  # what lies outside changes no digit that is shown
        num_discordant = np.arange(low, high + 1)
        most = stats.binom.ppf(ALPHA / 2, num_discordant, 0.5)
        most -= stats.binom.cdf(most, num_discordant, 0.5) > ALPHA / 2  # of the rarer kind, where the test rejects
        rarer = (1 - difference / discordant) / 2 if discordant else 0.5
        both = stats.binom.cdf(most, num_discordant, rarer) + stats.binom.cdf(most, num_discordant, 1 - rarer)
        return float(both @ stats.binom.pmf(num_discordant, n, discordant))

    if found(largest) < POWER:
        return None
    return float(optimize.brentq(lambda difference: found(difference) - POWER, 0, largest, xtol=1e-5))


def unpaired_detectable(sums: Array, counts: Array, *, are_shares: bool = False) -> float | None:
    """The smallest true difference to an unrelated model that as many items find; None where they find none.

    Answers of related models agree on many items, so the difference that a real comparison can show is smaller.
    Right-or-wrong scores go by :func:`mcnemar_detectable`, against a model that differs towards one half, which is the
    harder to tell. Two right and two wrong items are added to them (Agresti and Coull 1998), so that a score of nothing
    or everything has a discordance. So do shares that are all alike, which vary no more (see :func:`share`). All others
    go by :func:`detectable_difference`, with twice the variance of one item.

    Args:
        sums, counts: shape (n,) or (k, n), as in :func:`ratio`.
        are_shares: whether they are scores in [0, 1].
    """
    variance = _linearised_variance(sums, counts)
    if not _is_binary(sums, counts) and not (are_shares and _is_zero(variance)):
        return detectable_difference(2 * variance, np.shape(sums)[-1])
    sums, counts = _counted(sums, counts)
    n = sums.shape[1]
    mean = ((sums.sum(1) / counts.sum(1)).mean() * n + 2) / (n + 4)
    mean = min(mean, 1 - mean)
    return mcnemar_detectable(n, lambda d: mean * (1 - mean - d) + (mean + d) * (1 - mean), largest=1 - mean)


def paired_detectable(sums_a: Array, sums_b: Array, counts: Array, *, are_shares: bool = False) -> float | None:
    """The smallest true difference between two models that as many items find; None where they find none.

    Right-or-wrong scores go by :func:`mcnemar_detectable`, with the observed discordance or, where that is less, all
    discordant items one way: models that agree on every item have a difference too. So do shares that all differ alike,
    which vary no more. All others go by :func:`detectable_difference`, with the observed variance.

    Args:
        sums_a, sums_b, counts: shape (n,) or (k, n), as in :func:`ratio`.
        are_shares: whether they are scores in [0, 1].
    """
    difference = np.asarray(sums_b, float) - np.asarray(sums_a, float)
    variance = _linearised_variance(difference, counts)
    are_binary = _is_binary(sums_a, counts) and _is_binary(sums_b, counts)
    if not are_binary and not (are_shares and _is_zero(variance)):
        return detectable_difference(variance, difference.shape[-1])
    difference, counts = _counted(difference, counts)
    discordance = float(np.abs((difference / counts).mean(0)).mean())
    return mcnemar_detectable(difference.shape[1], lambda d: max(discordance, d))


def _counted(sums: Array, counts: Array) -> tuple[Array, Array]:
    """Both as (k, n) floats, without the items of which no ratio counts anything.

    Raises:
        MaskftError: fewer than two items are left, or the arrays differ in length.
    """
    sums, counts = np.atleast_2d(np.asarray(sums, float)), np.atleast_2d(np.asarray(counts, float))
    are_counted = (counts != 0).any(0)
    if sums.shape != counts.shape or are_counted.sum() < 2:
        raise MaskftError(
            "An interval needs at least 2 items of which something is counted, and as many sums as counts, got "
            f"{sums.shape[1]} and {counts.shape[1]}, with {are_counted.sum()} counted."
        )
    return sums[:, are_counted], counts[:, are_counted]


def _is_zero(variance: float) -> bool:
    return math.isclose(variance, 0, abs_tol=1e-18)


def _is_binary(sums: Array, counts: Array) -> bool:
    sums, counts = np.atleast_2d(sums), np.atleast_2d(counts)
    return len(sums) == 1 and bool(np.isin(sums, (0, 1)).all() and (counts == 1).all())


def _linearised_variance(sums: Array, counts: Array) -> float:
    """Variance of one item's part in a ratio of sums, by the delta method."""
    sums, counts = np.atleast_2d(np.asarray(sums, float)), np.atleast_2d(np.asarray(counts, float))
    ratios = sums.sum(1, keepdims=True) / counts.sum(1, keepdims=True)
    parts = (sums - ratios * counts) / counts.mean(1, keepdims=True)
    return float(parts.mean(0).var(ddof=1))


def by_problem(values: Array, problems: Sequence[str]) -> Array:
    """Sums over the items of each problem, problems in sorted order: what is drawn independently is the problem.

    Args:
        values: shape (n,) or (k, n).
        problems: the problem that each of the n items belongs to.
    """
    _, places = np.unique(np.asarray(problems), return_inverse=True)
    rows = [np.bincount(places, weights=row) for row in np.atleast_2d(np.asarray(values, float))]
    return rows[0] if np.ndim(values) == 1 else np.stack(rows)
