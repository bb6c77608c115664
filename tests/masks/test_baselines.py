import hypothesis.strategies as st
import torch
from hypothesis import given

from maskft.masks import shuffled_mask

shapes = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(shape=shapes, seed=st.integers(0, 99))
def test_shuffling_keeps_the_count(shape: tuple[int, int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    shuffled = shuffled_mask(mask, torch.Generator().manual_seed(seed + 1))
    assert shuffled.shape == mask.shape
    assert shuffled.sum() == mask.sum()


def test_shuffling_moves_places() -> None:
    mask = torch.arange(64).view(8, 8) < 32
    assert not torch.equal(shuffled_mask(mask, torch.Generator().manual_seed(0)), mask)
