"""Losses at several temperatures, beside the plain cross entropy of divided logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from maskft.scoring.temperature import INVERSE_TEMPERATURES, losses_at, temperature_text


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 7, 16, 50]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    numbers=st.lists(st.floats(0.1, 3), min_size=1, max_size=5) | st.just(INVERSE_TEMPERATURES),
    seed=st.integers(0, 99),
)
def test_losses_are_those_of_divided_logits(num_tokens, spread, numbers, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num_tokens, 11, generator=generator) + 100
    targets = torch.randint(11, (num_tokens,), generator=generator)
    before = logits.clone()
    found = losses_at(logits, targets, numbers)
    assert found.shape == (len(numbers), num_tokens)
    expected = [F.cross_entropy(number * logits.double(), targets, reduction="none") for number in numbers]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-4)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("temperature", "text"), [(5.0, "at least 5.00"), (1 / 1.4, "0.71"), (1.0, "1.00"), (0.5, "at most 0.50")]
)
def test_a_temperature_at_an_end_is_a_bound(temperature: float, text: str) -> None:
    assert temperature_text(temperature) == text
    assert 1.0 in INVERSE_TEMPERATURES
    assert list(INVERSE_TEMPERATURES) == sorted(set(INVERSE_TEMPERATURES))


@pytest.mark.parametrize(("sureness", "expected"), [(0.6, 1.6), (2.0, 0.5), (5.0, 0.2), (20.0, 0.2)])
def test_how_sure_a_model_is_is_told_by_its_temperature(sureness: float, expected: float) -> None:
    """Targets drawn from a distribution, and logits that are less or more sure of it."""
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(4000, 5, generator=generator)
    targets = torch.multinomial(honest.softmax(-1), 1, generator=generator).squeeze(-1)
    best = losses_at(sureness * honest, targets, INVERSE_TEMPERATURES).sum(1).argmin()
    assert abs(INVERSE_TEMPERATURES[int(best)] - expected) <= 0.05
