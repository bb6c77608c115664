"""Losses at several temperatures, beside the plain cross entropy of divided logits."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from maskft.evaluation.temperature import INVERSE_TEMPERATURES, losses_at


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 7, 256, 300]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    first=st.floats(0.1, 2),
    step=st.floats(-0.02, 0.5),
    seed=st.integers(0, 99),
)
def test_losses_are_those_of_divided_logits(num_tokens, spread, first, step, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num_tokens, 11, generator=generator) + 100
    targets = torch.randint(11, (num_tokens,), generator=generator)
    numbers = [first + i * step for i in range(4)]
    before = logits.clone()
    found = losses_at(logits, targets, numbers)
    assert found.shape == (4, num_tokens)
    expected = [F.cross_entropy(number * logits.double(), targets, reduction="none") for number in numbers]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=2e-3)
    assert torch.equal(logits, before)


def test_temperature_one_is_among_those_that_are_tried() -> None:
    assert 1.0 in INVERSE_TEMPERATURES


def test_a_model_that_is_too_sure_is_told_by_its_temperature() -> None:
    """Targets drawn from a distribution, and logits that are twice as sure of it."""
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(4000, 5, generator=generator)
    targets = torch.multinomial(honest.softmax(-1), 1, generator=generator).squeeze(-1)
    best = losses_at(2 * honest, targets, INVERSE_TEMPERATURES).sum(1).argmin()
    assert abs(INVERSE_TEMPERATURES[int(best)] - 0.5) <= 0.05
