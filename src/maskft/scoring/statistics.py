"""Paired statistics on shared items; the estimators are scipy's and statsmodels'.

`sums` and `counts` have the shape (n,), or (k, n) for the mean of k ratios over the same n items; MaskftError refuses
what differs in length or counts anything in fewer than two items. Items of which nothing was counted are left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from maskft.errors import MaskftError

Array = np.ndarray[Any, Any]

ALPHA, POWER = 0.05, 0.8
NUM_DRAWS = 9999
# The least p-value of drawn sign flips: the data's own signs count as one draw, in both tails.
FLIPS_FLOOR = 2 / (NUM_DRAWS + 1)
_NOTHING = 1e-18  # the variance of values that are alike but for rounding


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


def paired_ratio_difference(sums_a: Array, sums_b: Array, counts: Array, *, num_resamples: int = NUM_DRAWS) -> Interval:
    """`sum(b)/sum(counts) - sum(a)/sum(counts)`, by :func:`ratio`; of no width where all items differ alike."""
    return ratio(np.asarray(sums_b, float) - np.asarray(sums_a, float), counts, num_resamples=num_resamples)


def ratio(sums: Array, counts: Array, *, num_resamples: int = NUM_DRAWS) -> Interval:
    """`sum(sums) / sum(counts)` with a percentile bootstrap interval over items."""
    sums, counts = _counted(sums, counts)
    k, n = sums.shape

    def mean_of_ratios(*arrays: Array, axis: int = -1) -> Array:
        return np.mean([s.sum(axis) / c.sum(axis) for s, c in zip(arrays[:k], arrays[k:], strict=True)], axis=0)

    interval = bootstrap((*sums, *counts), mean_of_ratios, num_resamples).confidence_interval
    return Interval(float(mean_of_ratios(*sums, *counts)), float(interval.low), float(interval.high), n)


def bootstrap(arrays: Sequence[Array], statistic: Callable[..., Any], num_resamples: int = NUM_DRAWS) -> Any:
    """scipy's percentile bootstrap of a vectorised statistic of paired arrays, with the same draws each time."""
    return stats.bootstrap(arrays, statistic, paired=True, method="percentile", **_drawn(num_resamples))


def _drawn(num_resamples: int) -> dict[str, Any]:
    return {"vectorized": True, "n_resamples": num_resamples, "batch": 500, "rng": np.random.default_rng(0)}


def share(sums: Array, counts: Array, *, num_resamples: int = NUM_DRAWS) -> tuple[Interval, str]:
    """`ratio` of scores in [0, 1], 0 <= sums <= counts, with some width whatever was scored; and how it was made.

    Items that are right or wrong get Wilson's interval. So do items that all score alike, whose bootstrap has no width:
    values in [0, 1] vary no more than right-or-wrong ones of the same mean (Bhatia and Davis 2000, Amer. Math. Monthly
    107, 353-357). All others get `ratio`'s.
    """
    sums, counts = _counted(sums, counts)
    if is_binary(sums, counts):
        return wilson(float(sums.sum()), sums.size), "Wilson"
    interval = ratio(sums, counts, num_resamples=num_resamples)
    if interval.has_width:
        return interval, "bootstrap over problems"
    return wilson(interval.estimate * interval.n, interval.n), "Wilson, all problems alike"


def wilson(num_right: float, n: int) -> Interval:
    """A share with Wilson's score interval, which stays honest where nothing or everything is right.

    Where `num_right` lies between two whole numbers, it reaches over the intervals of both.
    """
    whole = round(num_right, 6)  # a sum of shares is not quite whole
    low, high = (stats.binomtest(k, n).proportion_ci(method="wilson") for k in (math.floor(whole), math.ceil(whole)))
    return Interval(num_right / n, float(low.low), float(high.high), n)


def mcnemar_exact(correct_a: Array, correct_b: Array) -> float:
    """Two-sided p-value of McNemar's exact test: is one of two models right more often where only one is right?"""
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    return float(mcnemar([[0, (a & ~b).sum()], [(b & ~a).sum(), 0]], exact=True).pvalue)


def sign_flip_test(differences: Array, *, num_resamples: int = NUM_DRAWS) -> float:
    """Two-sided p-value of the paired permutation test on the sum of the differences, one for each problem.

    It is exact where all sign flips can be listed; on differences of -1, 0 and 1 it is McNemar's exact test.
    """
    moved = np.asarray(differences, float)
    moved = moved[moved != 0]
    total, rounding = moved.sum(), 1e-12 * np.abs(moved).sum()
    if len(moved) < 2 or abs(total) <= rounding:  # with one, both signs are equally extreme
        return 1.0

    def sums(flipped: Array, axis: int = -1) -> Array:
        # Scipy's own tolerance is relative to the total, which may be small beside what rounding leaves of the parts.
        of = flipped.sum(axis)
        return np.where(np.abs(of - total) <= rounding, total, of)

    return float(stats.permutation_test((moved,), sums, permutation_type="samples", **_drawn(num_resamples)).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for several comparisons by Holm's step-down method (Holm 1979, Scand. J. Statist. 6, 65)."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]] if len(p_values) else []


def detectable_difference(variance: float, n: int) -> float:
    """The smallest true difference that a paired comparison over `n` items finds with power 0.8 at level 0.05.

    `variance` is that of one item's paired difference (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640,
    section 5).
    """
    return float((stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)) * math.sqrt(variance / n))


def mcnemar_detectable(n: int, discordance: Callable[[float], float], *, largest: float = 1.0) -> float | None:
    """The smallest true difference, up to `largest`, that McNemar's exact test over `n` items finds; None for none.

    `discordance` gives the share of items on which only one model is right from the difference of their shares. The
    power is the mean of the exact test's over the binomial number of such items (Duffy 1984, Biometrics 40, 1005-1015).
    """

    def power(difference: float) -> float:
        discordant = min(max(discordance(difference), difference), 1.0)
        low, high = stats.binom.ppf((1e-5, 1 - 1e-5), n, discordant)  # what lies outside changes no digit that is shown
        num_discordant = np.arange(low, high + 1)
        most = stats.binom.ppf(ALPHA / 2, num_discordant, 0.5)
        most -= stats.binom.cdf(most, num_discordant, 0.5) > ALPHA / 2  # of the rarer kind, where the test rejects
        rarer = (1 - difference / discordant) / 2 if discordant else 0.5
        both = stats.binom.cdf(most, num_discordant, rarer) + stats.binom.cdf(most, num_discordant, 1 - rarer)
        return float(both @ stats.binom.pmf(num_discordant, n, discordant))

    if power(largest) < POWER:
        return None
    return float(optimize.brentq(lambda difference: power(difference) - POWER, 0, largest, xtol=1e-5))


def unpaired_detectable(sums: Array, counts: Array, *, are_shares: bool = False) -> float | None:
    """The smallest true difference to an unrelated model that as many items find; None where they find none.

    Right-or-wrong scores go by :func:`mcnemar_detectable`, against a model that differs towards one half, which is the
    harder to tell; with two right and two wrong items more (Agresti and Coull 1998), so that a score of nothing has a
    discordance. So do shares (`are_shares`) that are all alike. All others go by :func:`detectable_difference`, with
    twice the variance of one item.
    """
    sums, counts = _counted(sums, counts)
    n, variance = sums.shape[1], _linearised_variance(sums, counts)
    if not is_binary(sums, counts) and not (are_shares and variance < _NOTHING):
        return detectable_difference(2 * variance, n)
    mean = ((sums.sum(1) / counts.sum(1)).mean() * n + 2) / (n + 4)
    mean = min(mean, 1 - mean)
    return mcnemar_detectable(n, lambda d: mean * (1 - mean - d) + (mean + d) * (1 - mean), largest=1 - mean)


def paired_detectable(sums_a: Array, sums_b: Array, counts: Array, *, are_shares: bool = False) -> float | None:
    """The smallest true difference between two models that as many items find; None where they find none.

    Right-or-wrong scores, and shares that all differ alike, go by :func:`mcnemar_detectable`, with the observed
    discordance or, where that is less, all discordant items one way; others by the observed variance.
    """
    are_binary = is_binary(sums_a, counts) and is_binary(sums_b, counts)
    difference, counts = _counted(np.asarray(sums_b, float) - np.asarray(sums_a, float), counts)
    n, variance = difference.shape[1], _linearised_variance(difference, counts)
    if not are_binary and not (are_shares and variance < _NOTHING):
        return detectable_difference(variance, n)
    discordance = float(np.abs((difference / counts).mean(0)).mean())
    return mcnemar_detectable(n, lambda d: max(discordance, d))


def _counted(sums: Array, counts: Array) -> tuple[Array, Array]:
    """Both as (k, n) floats, without the items of which no ratio counts anything."""
    sums, counts = np.atleast_2d(np.asarray(sums, float)), np.atleast_2d(np.asarray(counts, float))
    are_counted = (counts != 0).any(0)
    if sums.shape != counts.shape or are_counted.sum() < 2:
        got = f"{sums.shape[1]} sums and {counts.shape[1]} counts, {are_counted.sum()} of them above 0"
        raise MaskftError(f"An interval needs at least 2 items of which something is counted, got {got}.")
    return sums[:, are_counted], counts[:, are_counted]


def is_binary(sums: Array, counts: Array) -> bool:
    """Whether each item is right or wrong, once."""
    sums, counts = np.atleast_2d(sums), np.atleast_2d(counts)
    return len(sums) == 1 and bool(np.isin(sums, (0, 1)).all() and (counts == 1).all())


def _linearised_variance(sums: Array, counts: Array) -> float:
    """Variance of one item's part in a ratio of sums, by the delta method; both (k, n)."""
    ratios = sums.sum(1, keepdims=True) / counts.sum(1, keepdims=True)
    parts = (sums - ratios * counts) / counts.mean(1, keepdims=True)
    return float(parts.mean(0).var(ddof=1))


def by_problem(values: Array, problems: Sequence[str]) -> Array:
    """Sums of values, (n,) or (k, n), over the items of each problem, in the order of the sorted names `problems`."""
    order = {name: place for place, name in enumerate(sorted(set(problems)))}
    places = [order[name] for name in problems]  # as an array of texts, each would take the longest one's memory
    rows = [np.bincount(places, weights=row) for row in np.atleast_2d(np.asarray(values, float))]
    return rows[0] if np.ndim(values) == 1 else np.stack(rows)
