from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks import num_kept, select


def reference_topk(scores: list[Tensor], k: int, score_transform: str) -> list[Tensor]:
    """Sort all (score, position) pairs in plain Python and keep the first k."""
    flat = torch.cat([s.reshape(-1) for s in scores]).tolist()
    ranked = [abs(v) for v in flat] if score_transform == "abs" else flat
    order = sorted(range(len(ranked)), key=lambda i: (-ranked[i], i))
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[:k]] = True
    return [part.view(s.shape) for part, s in zip(kept.split([s.numel() for s in scores]), scores, strict=True)]


# Few distinct values, so that ties are common; both zeros and infinities are among them.
tie_prone = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e-30, float("inf"), float("-inf")])
floats = st.one_of(tie_prone, st.floats(width=32, allow_nan=False))
matrices = arrays("float32", st.tuples(st.integers(1, 7), st.integers(1, 9)), elements=floats).map(torch.from_numpy)
densities = st.floats(0.001, 1.0)


@given(scores=matrices, density=densities, score_transform=st.sampled_from(["abs", "none"]))
def test_topk_is_the_sorted_reference(scores: Tensor, density: float, score_transform) -> None:
    (mask,) = select([scores], selection="topk", density=density, score_transform=score_transform)
    k = num_kept(scores.numel(), density)
    assert mask.sum() == k
    assert torch.equal(mask, reference_topk([scores], k, score_transform)[0])


@given(scores=st.lists(matrices, min_size=1, max_size=4), density=densities)
def test_global_topk_is_topk_of_the_concatenation(scores: list[Tensor], density: float) -> None:
    masks = select(scores, selection="global_topk", density=density)
    k = num_kept(sum(s.numel() for s in scores), density)
    for mask, expected in zip(masks, reference_topk(scores, k, "abs"), strict=True):
        assert torch.equal(mask, expected)


@given(scores=matrices, threshold=floats)
def test_threshold_keeps_every_score_that_reaches_it(scores: Tensor, threshold: float) -> None:
    (mask,) = select([scores], selection="threshold", threshold=threshold, score_transform="none")
    assert mask.reshape(-1).tolist() == [value >= threshold for value in scores.reshape(-1).tolist()]


@given(n=st.integers(1, 10**12), density=st.decimals("0.0001", "1", places=4))
def test_num_kept_is_exact_in_decimal(n: int, density) -> None:
    dropped = (1 - Fraction(str(density))) * n
    assert num_kept(n, float(density)) == n - dropped.numerator // dropped.denominator
    assert 1 <= num_kept(n, float(density)) <= n


def test_binary_rounding_of_the_density_drops_no_weight_too_few() -> None:
    assert 1 - 0.9 < 0.1  # the trap: floor((1 - 0.9) * 10) is 0 in floating point
    assert num_kept(10, 0.9) == 9


@pytest.mark.parametrize(("density", "num_dropped"), [(1.0, 0), (0.9999, 0), (0.9, 1), (0.5, 5)])
def test_none_one_and_several_dropped_of_ten(density: float, num_dropped: int) -> None:
    (mask,) = select([torch.arange(1.0, 11.0).view(2, 5)], selection="topk", density=density)
    assert mask.view(-1).tolist() == [False] * num_dropped + [True] * (10 - num_dropped)


def test_equal_scores_keep_the_earlier_positions() -> None:
    (mask,) = select([torch.full((3, 4), -0.25)], selection="topk", density=0.5)
    assert mask.view(-1).tolist() == [True] * 6 + [False] * 6


def test_the_smallest_tensor_keeps_its_weight() -> None:
    assert select([torch.zeros(1, 1)], selection="topk", density=0.1)[0].item()


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([None, 3, 1000]))
def test_large_tensors_take_the_sampled_path_to_the_same_mask(seed: int, levels: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(300, 401, generator=generator), torch.randn(7, 1000, generator=generator) * 3]
    if levels:
        scores = [(s * levels).round() / levels for s in scores]
    everything = torch.cat([s.reshape(-1) for s in scores]).abs()
    for density in (0.9, 0.999, 0.01):
        k = num_kept(len(everything), density)
        order = everything.sort(descending=True, stable=True).indices
        expected = torch.zeros(len(everything), dtype=torch.bool)
        expected[order[:k]] = True
        masks = select(scores, selection="global_topk", density=density)
        assert torch.equal(torch.cat([m.reshape(-1) for m in masks]), expected)


def test_a_sample_that_misleads_does_not_change_the_result() -> None:
    # Every sampled place holds a small score, every other one a large score.
    scores = torch.ones(1 << 17)
    stride = (1 << 17) // (1 << 15) | 1
    scores[::stride] = torch.linspace(1e-6, 1e-5, len(scores[::stride]))
    (mask,) = select([scores], selection="topk", density=0.3)
    k = num_kept(len(scores), 0.3)
    expected = torch.zeros_like(mask)
    expected[scores.sort(descending=True, stable=True).indices[:k]] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_dtypes_rank_alike(dtype: torch.dtype) -> None:
    scores = torch.randn(9, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    (mask,) = select([scores], selection="topk", density=0.7)
    assert torch.equal(mask, reference_topk([scores], num_kept(scores.numel(), 0.7), "abs")[0])


def test_nan_scores_are_refused() -> None:
    scores = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(MaskftError, match="1 of 2 mask scores are NaN"):
        select([scores], selection="topk")


def test_infinite_scores_of_both_signs_are_no_nan() -> None:
    scores = torch.tensor([[float("inf"), float("-inf"), 1.0, 0.5]])
    assert select([scores], selection="topk", density=0.5)[0].tolist() == [[True, True, False, False]]


def test_unknown_selection_names_the_allowed_ones() -> None:
    with pytest.raises(MaskftError, match="topk, global_topk, threshold, got 'best'"):
        select([torch.ones(2, 2)], selection="best")  # type: ignore[arg-type]
