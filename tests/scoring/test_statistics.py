import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.power import NormalIndPower

from maskft.errors import MaskftError
from maskft.scoring.statistics import (
    by_problem,
    detectable_difference,
    holm,
    mcnemar_detectable,
    mcnemar_exact,
    paired_detectable,
    paired_ratio_difference,
    ratio,
    share,
    sign_flip_test,
    unpaired_detectable,
    wilson,
)

pairs = arrays("float64", st.tuples(st.just(2), st.integers(2, 20)), elements=st.floats(-10, 10))
some = settings(max_examples=25, deadline=None)


@some
@given(pair=pairs, shift=st.floats(-3, 3))
def test_a_constant_shift_has_no_spread_and_swapping_the_models_mirrors_the_interval(pair, shift: float) -> None:
    (a, b), ones = pair, np.ones(pair.shape[1])
    same = paired_ratio_difference(a, a + shift, ones, num_resamples=99)
    np.testing.assert_allclose([same.low, same.estimate, same.high], shift, atol=1e-9)
    forth, back = (paired_ratio_difference(x, y, ones, num_resamples=99) for x, y in ((a, b), (b, a)))
    mirrored = [-back.estimate, -back.high, -back.low]
    np.testing.assert_allclose([forth.estimate, forth.low, forth.high], mirrored, atol=1e-9)
    assert forth.low - 1e-9 <= forth.high


def test_ratios_weigh_items_by_their_tokens_and_several_are_averaged_and_resampled_together() -> None:
    assert ratio(np.array([1.0, 9.0]), np.array([1, 3]), num_resamples=99).estimate == 2.5
    sums, counts = np.array([[1.0, 0, 1, 0], [2, 0, 1, 3]]), np.array([[1, 1, 1, 1], [2, 2, 2, 4]])
    result = ratio(sums, counts, num_resamples=999)
    assert (result.estimate, result.n) == (pytest.approx((0.5 + 0.6) / 2), 4)
    same = ratio(np.stack([sums[0]] * 2), np.stack([counts[0]] * 2), num_resamples=999)
    assert same == ratio(sums[0], counts[0], num_resamples=999)


def test_mcnemar_on_agrestis_approval_ratings() -> None:
    """Agresti, Categorical Data Analysis, table 10.1: 150 and 86 of 1600 changed their mind; p < 0.0001, z = -4.17."""
    first, second = np.repeat([[1, 1, 0, 0], [1, 0, 1, 0]], [794, 150, 86, 570], axis=1)
    assert mcnemar_exact(first, second) == pytest.approx(stats.binomtest(86, 86 + 150).pvalue)
    assert mcnemar_exact(first, second) < 1e-4
    assert mcnemar_exact(first, first) == 1
    assert (86 - 150) / np.sqrt(86 + 150) == pytest.approx(-4.17, abs=0.005)
    assert sign_flip_test(second - first, num_resamples=999) < 0.01
    # The bootstrap agrees with the normal interval there: -0.04 +- 1.96 * 0.0095.
    result = paired_ratio_difference(first, second, np.ones(1600))
    assert (result.estimate, result.low, result.high) == pytest.approx((-0.04, -0.0588, -0.0212), abs=0.001)


@settings(max_examples=20, deadline=None)
@given(only_a=st.integers(0, 6), only_b=st.integers(0, 6))
def test_flipping_signs_of_single_samples_is_mcnemars_test(only_a: int, only_b: int) -> None:
    a, b = np.repeat([[1, 0, 1, 0], [0, 1, 1, 0]], [only_a, only_b, 1, 1], axis=1)
    assert sign_flip_test(b - a) == pytest.approx(mcnemar_exact(a, b))


def test_holms_method_on_a_published_example() -> None:
    """R's documentation of p.adjust and Holm (1979): p-values step down against n, n - 1, ... comparisons."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert (holm([0.2]), holm([])) == ([0.2], [])


@some
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=6), data=st.data())
def test_holm_knows_no_order_and_lies_between_none_and_bonferroni(p, data) -> None:
    order = data.draw(st.permutations(range(len(p))))
    corrected = holm(p)
    np.testing.assert_allclose([corrected[i] for i in order], holm([p[i] for i in order]))
    for before, after in zip(p, corrected, strict=True):
        assert before - 1e-12 <= after <= min(1.0, len(p) * before) + 1e-12


def test_the_detectable_difference_is_what_a_power_calculation_says() -> None:
    given = {"effect_size": None, "nobs1": 200, "alpha": 0.05, "power": 0.8, "ratio": 0, "alternative": "two-sided"}
    assert detectable_difference(0.25, 200) == pytest.approx(NormalIndPower().solve_power(**given) * 0.5, rel=1e-4)
    # Simulated: a paired difference of exactly this size is found four times in five.
    draws = np.random.default_rng(0).normal(detectable_difference(1.0, 100), 1.0, (4000, 100))
    assert (np.abs(draws.mean(1)) * 10 > 1.96).mean() == pytest.approx(0.8, abs=0.02)


def power_of_mcnemar(n: int, only_a: float, only_b: float) -> float:
    """By the probability of every 2x2 table that the test rejects at 5 %."""
    tables = [(x, y, n - x - y) for x in range(n + 1) for y in range(n + 1 - x)]
    rejected = [t for t in tables if sum(t[:2]) and stats.binomtest(t[0], t[0] + t[1]).pvalue <= 0.05]
    return float(stats.multinomial.pmf(rejected, n, [only_a, only_b, 1 - only_a - only_b]).sum())


@pytest.mark.parametrize(("n", "discordance"), [(20, 0.0), (20, 0.5), (50, 0.3)])
def test_mcnemars_test_has_the_power_that_its_detectable_difference_claims(n: int, discordance: float) -> None:
    d = mcnemar_detectable(n, lambda d: max(discordance, d))
    only = max(discordance, d)
    assert power_of_mcnemar(n, (only - d) / 2, (only + d) / 2) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("num_right", [0, 5, 45])
def test_an_unrelated_model_is_told_by_mcnemars_test(num_right: int) -> None:
    d = unpaired_detectable(np.arange(50) < num_right, np.ones(50))
    low = min((num_right + 2) / 54, 1 - (num_right + 2) / 54)
    assert power_of_mcnemar(50, low * (1 - low - d), (low + d) * (1 - low)) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("n", "points"), [(20, 36.6), (50, 15.4), (200, 3.9), (1000, 0.8), (10_000, 0.08)])
def test_models_that_agree_on_everything_need_six_discordant_items_to_differ(n: int, points: float) -> None:
    a = np.arange(n) % 2
    d = paired_detectable(a, a, np.ones(n))
    assert 100 * d == pytest.approx(points, abs=0.051)
    assert stats.binom.sf(5, n, d) == pytest.approx(0.8, abs=0.01)


def test_the_observed_discordance_counts_and_so_few_items_show_no_difference() -> None:
    a, b = np.repeat([[1, 0, 1], [0, 1, 1]], [3, 7, 40], axis=1)
    assert paired_detectable(a, b, np.ones(50)) == mcnemar_detectable(50, lambda d: max(0.2, d))
    five = np.array([1, 1, 0, 0, 0])  # five items all one way have p = 2 / 2**5 > 0.05
    assert paired_detectable(five, five, np.ones(5)) is unpaired_detectable(five, np.ones(5)) is None


def test_scores_that_are_not_right_or_wrong_go_by_their_variance() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5000))
    found = [paired_detectable(a, b, np.ones(5000)), unpaired_detectable(a, np.ones(5000))]
    assert found == pytest.approx([detectable_difference(2, 5000)] * 2, rel=0.05)


@pytest.mark.parametrize("tenths", [[1, 2, -3], [1, 2, -3] * 7, [1, 2, 3, -6] * 8, [*([1, 2, 3, -6] * 30), 1]])
def test_sums_that_differ_by_rounding_tie(tenths: list[int]) -> None:
    whole = np.array(tenths)
    assert (whole / 10).sum() != whole.sum() / 10
    p = sign_flip_test(whole / 10, num_resamples=999)
    assert p == (sign_flip_test(whole, num_resamples=999) if whole.sum() else 1)


@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abcd")), min_size=1, max_size=12), st.randoms())
def test_items_are_summed_by_problem_in_any_order(rows, random) -> None:
    expected = [sum(v for v, _ in g) for _, g in itertools.groupby(sorted(rows, key=lambda r: r[1]), lambda r: r[1])]
    for mixed in (list(rows), random.sample(rows, len(rows))):
        np.testing.assert_allclose(by_problem([v for v, _ in mixed], [p for _, p in mixed]), expected, atol=1e-9)


def test_one_long_name_takes_no_memory_for_the_others() -> None:
    assert by_problem(np.ones(3000), ["x" * 10**7, *map(str, range(2999))]).sum() == 3000


def test_wilsons_interval() -> None:
    # Its upper limit for 0 of n is z^2 / (n + z^2).
    interval = wilson(0, 50)
    assert (interval.estimate, interval.low) == (0, 0)
    assert interval.high == pytest.approx(1.96**2 / (50 + 1.96**2), abs=1e-4)
    between = wilson(2.5, 10)  # a sum of shares reaches over both whole numbers
    assert (between.estimate, between.low, between.high) == (0.25, wilson(2, 10).low, wilson(3, 10).high)


@pytest.mark.parametrize("value", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("counts", [np.ones(300), np.full(300, 4), np.tile([1, 3], 150), np.stack([np.ones(300)] * 2)])
def test_shares_that_are_all_alike_have_an_interval(value: float, counts) -> None:
    sums = value * counts
    interval, kind = share(sums, counts, num_resamples=99)
    assert interval == wilson(300 * value, 300)
    assert kind.startswith("Wilson")
    assert interval.low < interval.high
    right = unpaired_detectable(np.arange(300) < round(300 * value), np.ones(300))
    assert unpaired_detectable(sums, counts, are_shares=True) == pytest.approx(right)
    assert paired_detectable(sums, sums, counts, are_shares=True) == mcnemar_detectable(300, lambda d: d)


def test_right_or_wrong_items_have_wilsons_interval_and_clusters_a_bootstrap() -> None:
    right = np.array([1, 0, 0, 1, 1, 0, 0, 0])
    assert share(right, np.ones(8)) == share(right[None], np.ones((1, 8))) == (wilson(3, 8), "Wilson")
    twice = share(2 * right, np.full(8, 2), num_resamples=99)
    assert twice == (ratio(2 * right, np.full(8, 2), num_resamples=99), "bootstrap over problems")


def test_wilsons_interval_holds_the_mean_of_rare_parts_of_a_point() -> None:
    """Clusters of four draws, of which one in two hundred is right: samples without any must not claim certainty."""
    draws = np.random.default_rng(0).binomial(4, 0.005, (200, 30))
    held = [share(sums, np.full(30, 4), num_resamples=99)[0] for sums in draws if not sums.any()]
    assert len(held) > 50
    assert all(interval.low <= 0.005 <= interval.high for interval in held)


def test_items_without_a_count_are_left_out_and_one_item_has_no_interval() -> None:
    sums, counts = np.array([3.0, 0, 5, 0]), np.array([2, 0, 2, 0])
    result = ratio(sums, counts)
    assert (result, result.n) == (ratio(sums[::2], counts[::2]), 2)
    for function, alone in itertools.product((ratio, share), (np.ones(1), np.array([1, 0, 0]))):
        with pytest.raises(MaskftError, match="at least 2 items"):
            function(np.ones(len(alone)), alone)
