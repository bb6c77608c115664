import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks import num_kept, select
from maskft.masks.selection import kth_largest, num_nan, select_packed, select_unchecked
from maskft.masks.selection_device import kth_largest_on_device, top_on_device


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
transforms = st.sampled_from(["abs", "none"])


@given(scores=matrices, density=densities, score_transform=transforms)
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


@given(scores=st.lists(matrices, min_size=1, max_size=4), share=st.floats(0, 1), score_transform=transforms)
def test_digits_on_a_device_give_the_sorted_reference(scores: list[Tensor], share: float, score_transform) -> None:
    num_scores = sum(s.numel() for s in scores)
    k = min(1 + int(share * num_scores), num_scores)
    abs_ = score_transform == "abs"
    for mask, expected in zip(
        top_on_device(scores, k, abs_=abs_), reference_topk(scores, k, score_transform), strict=True
    ):
        assert torch.equal(mask, expected)
    assert kth_largest_on_device(scores, k, abs_=abs_) == kth_largest(scores, k, score_transform)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("abs_", [True, False])
def test_digits_of_other_dtypes_rank_alike(dtype: torch.dtype, abs_: bool) -> None:
    scores = torch.randn(90, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = reference_topk([scores], 7000, "abs" if abs_ else "none")[0]
    assert torch.equal(top_on_device([scores], 7000, abs_=abs_)[0], expected)


@pytest.mark.parametrize("selection", ["topk", "global_topk", "threshold"])
@pytest.mark.parametrize("score_transform", ["abs", "none"])
def test_a_choice_on_a_gpu_never_waits_for_it(selection, score_transform) -> None:
    # A meta tensor has no values: whatever would bring one to the host raises.
    scores = [torch.empty(30, 40, device="meta"), torch.empty(7, 5, device="meta")]
    masks = select_unchecked(scores, selection=selection, score_transform=score_transform)
    assert [(m.shape, m.dtype, m.device.type) for m in masks] == [(s.shape, torch.bool, "meta") for s in scores]
    with pytest.raises(RuntimeError, match="meta"):
        num_nan(scores).item()


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


@pytest.mark.parametrize("shape", [(2, 8), (300, 304)])
@pytest.mark.parametrize("selection", ["topk", "global_topk", "threshold"])
def test_packed_masks_of_nan_scores_are_refused(shape: tuple[int, int], selection) -> None:
    scores = torch.ones(shape)
    scores[1, 3] = math.nan
    with pytest.raises(MaskftError, match=f"1 of {scores.numel()} mask scores are NaN"):
        select_packed([scores], selection=selection)


@pytest.mark.parametrize("shape", [(2, 3), (300, 300)])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_kth_score_of_nan_scores_is_refused(shape: tuple[int, int], share: float) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scores.view(-1)[: math.ceil(share * scores.numel())] = math.nan
    with pytest.raises(MaskftError, match=f"{int(scores.isnan().sum())} of {scores.numel()} mask scores are NaN"):
        kth_largest([scores], 2, "none")


def test_infinite_scores_of_both_signs_are_no_nan() -> None:
    scores = torch.tensor([[float("inf"), float("-inf"), 1.0, 0.5]])
    assert select([scores], selection="topk", density=0.5)[0].tolist() == [[True, True, False, False]]


def test_unknown_selection_names_the_allowed_ones() -> None:
    with pytest.raises(MaskftError, match="topk, global_topk, threshold, got 'best'"):
        select([torch.ones(2, 2)], selection="best")  # type: ignore[arg-type]
