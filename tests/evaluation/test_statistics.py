import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from maskft.errors import MaskftError
from maskft.evaluation.statistics import mcnemar_exact, paired_ratio_difference, ratio

values = arrays("float64", st.integers(2, 20), elements=st.floats(-10, 10))


@settings(max_examples=25, deadline=None)
@given(a=values, shift=st.floats(-3, 3))
def test_a_constant_shift_has_no_spread(a, shift: float) -> None:
    result = paired_ratio_difference(a, a + shift, np.ones(len(a)), num_resamples=99)
    np.testing.assert_allclose([result.low, result.estimate, result.high], shift, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), a=values)
def test_swapping_the_models_mirrors_the_interval(data, a) -> None:
    b = data.draw(arrays("float64", len(a), elements=st.floats(-10, 10)))
    forth, back = (paired_ratio_difference(x, y, np.ones(len(a)), num_resamples=99) for x, y in ((a, b), (b, a)))
    np.testing.assert_allclose(
        [forth.estimate, forth.low, forth.high], [-back.estimate, -back.high, -back.low], atol=1e-9
    )
    assert forth.low - 1e-9 <= forth.high


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_items() -> None:
    draws = np.random.default_rng(0).normal(2.0, 3.0, 4000)
    result = ratio(draws, np.ones(4000))
    half = 1.96 * draws.std() / np.sqrt(4000)
    assert result.low == pytest.approx(draws.mean() - half, abs=0.02)
    assert result.high == pytest.approx(draws.mean() + half, abs=0.02)


def test_a_ratio_weighs_items_by_their_tokens() -> None:
    assert ratio(np.array([1.0, 9.0]), np.array([1, 3]), num_resamples=99).estimate == 2.5


def test_mcnemars_exact_test_is_a_binomial_on_the_discordant_items() -> None:
    # 1 against 9 discordant items: p = 2 * (C(10,0) + C(10,1)) / 2**10.
    a = np.array([1] * 1 + [0] * 9 + [1] * 5)
    b = np.array([0] * 1 + [1] * 9 + [1] * 5)
    assert mcnemar_exact(a, b) == pytest.approx(2 * 11 / 1024)
    assert mcnemar_exact(a, a) == 1.0


def test_one_item_has_no_interval() -> None:
    with pytest.raises(MaskftError, match="at least 2 items"):
        ratio(np.ones(1), np.ones(1))
