import hypothesis.strategies as st
import torch
from hypothesis import given

from maskft.masks import magnitude_mask, num_kept, random_mask, shuffled_mask

shapes = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(shape=shapes, density=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_random_masks_keep_the_exact_count_and_repeat(shape: tuple[int, int], density: float, seed: int) -> None:
    first, again = (random_mask(shape, density, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert first.sum() == num_kept(first.numel(), density)
    assert torch.equal(first, again)


def test_random_masks_differ_by_seed_and_cover_all_places() -> None:
    masks = torch.stack([random_mask((8, 8), 0.5, torch.Generator().manual_seed(s)) for s in range(200)])
    share = masks.float().mean(0)
    assert (share > 0.3).all()
    assert (share < 0.7).all()


def test_magnitude_keeps_the_largest_elements() -> None:
    mask = magnitude_mask(torch.tensor([[0.1, -5.0, 0.3], [-0.2, 4.0, 0.0]]), 0.5)
    assert mask.tolist() == [[False, True, True], [False, True, False]]


@given(shape=shapes, seed=st.integers(0, 99))
def test_shuffling_keeps_the_count(shape: tuple[int, int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    shuffled = shuffled_mask(mask, torch.Generator().manual_seed(seed + 1))
    assert shuffled.shape == mask.shape
    assert shuffled.sum() == mask.sum()


def test_shuffling_moves_places() -> None:
    mask = torch.arange(64).view(8, 8) < 32
    assert not torch.equal(shuffled_mask(mask, torch.Generator().manual_seed(0)), mask)
