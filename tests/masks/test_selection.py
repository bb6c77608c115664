import math
from collections.abc import Sequence
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import reference
import torch
from hypothesis import given, settings
from reference import FLOATS, MATRICES, matrices_of_one_dtype
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks import num_kept, pack_mask, select
from maskft.masks.radix import Shard, alone
from maskft.masks.selection import (
    _Rule,
    _select,
    hold_back,
    num_nan,
    select_packed,
    select_sharded,
    select_top,
)

transforms = st.sampled_from(["abs", "none"])
SELECTIONS = ["topk", "global_topk", "threshold"]


def by_digits(scores: list[Tensor], **rule) -> list[Tensor]:
    """The way of an accelerator, on the CPU."""
    return select_sharded([Shard(tensor, 0, tensor.numel()) for tensor in scores], alone, **rule)


@settings(deadline=None)
@given(
    scores=matrices_of_one_dtype(),
    selection=st.sampled_from(SELECTIONS),
    density=st.one_of(st.floats(0.001, 1.0), st.just(1.0)),
    threshold=FLOATS,
    score_transform=transforms,
)
@pytest.mark.parametrize("way", [select, by_digits])
def test_a_choice_is_the_sorted_reference(way, scores, selection, density, threshold, score_transform) -> None:
    # In the scores' dtype, in which PyTorch compares.
    threshold = float(torch.tensor(threshold, dtype=scores[0].dtype))
    rule = {"density": density, "threshold": threshold, "score_transform": score_transform}
    masks = way(scores, selection=selection, **rule)
    expected = reference.choose(scores, selection=selection, **rule)
    assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))
    if selection == "topk":
        assert [int(mask.sum()) for mask in masks] == [num_kept(s.numel(), density) for s in scores]


@given(scores=st.lists(MATRICES, min_size=1, max_size=4), share=st.floats(0, 1), score_transform=transforms)
def test_any_number_can_be_kept(scores: list[Tensor], share: float, score_transform) -> None:
    total = sum(s.numel() for s in scores)
    for k in {0, int(share * total), total}:
        masks = select_top(scores, k, score_transform)
        expected = reference.top(scores, k, score_transform)
        assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("score_transform", ["abs", "none"])
def test_a_choice_on_a_gpu_never_waits_for_it(selection, score_transform) -> None:
    # A meta tensor has no values: whatever would bring one to the host raises.
    scores = [torch.empty(30, 40, device="meta"), torch.empty(7, 5, device="meta")]
    masks = _select(scores, _Rule(selection, score_transform=score_transform))
    assert [(m.shape, m.dtype, m.device.type) for m in masks] == [(s.shape, torch.bool, "meta") for s in scores]
    packed, found = select_packed(scores, selection=selection, score_transform=score_transform)
    assert [(p.shape, p.device.type) for p in packed] == [((30, 5), "meta"), ((7, 1), "meta")]
    for unread in (found, num_nan(scores)):
        with pytest.raises(RuntimeError, match="meta"):
            unread.item()


@given(n=st.integers(1, 10**12), density=st.decimals("0.0001", "1", places=4))
def test_num_kept_is_exact_in_decimal(n: int, density) -> None:
    dropped = (1 - Fraction(str(density))) * n
    assert num_kept(n, float(density)) == n - dropped.numerator // dropped.denominator
    assert 1 <= num_kept(n, float(density)) <= n


@pytest.mark.parametrize("way", [select, by_digits])
@pytest.mark.parametrize(
    ("scores", "density", "expected"),
    [
        ([-0.25] * 12, 0.5, [True] * 6 + [False] * 6),  # of equal ones the earlier
        ([0.0], 0.1, [True]),  # the smallest tensor keeps its weight
        # In floating point (1 - 0.9) * 10 is below 1, and none would be dropped.
        *((range(1, 11), density, [False] * n + [True] * (10 - n)) for density, n in [(1, 0), (0.9999, 0), (0.9, 1)]),
        ([math.inf, -math.inf, 1.0, 0.5], 0.5, [True, True, False, False]),  # whose sum is NaN, and none of them
    ],
)
def test_examples(way, scores: Sequence[float], density: float, expected: list[bool]) -> None:
    assert way([torch.tensor([scores], dtype=torch.float32)], selection="topk", density=density)[0].tolist() == [
        expected
    ]


def first_of_sorted(values: Tensor, density: float) -> Tensor:
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[values.sort(descending=True, stable=True).indices[: num_kept(len(values), density)]] = True
    return kept


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([None, 3, 1000]))
@pytest.mark.parametrize("way", [select, by_digits])
def test_large_tensors_take_the_sampled_path_to_the_same_mask(way, seed: int, levels: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(300, 401, generator=generator), torch.randn(7, 1000, generator=generator) * 3]
    if levels:
        scores = [(s * levels).round() / levels for s in scores]
    everything = torch.cat([s.reshape(-1) for s in scores]).abs()
    for density in (0.9, 0.999, 0.01):
        masks = way(scores, selection="global_topk", density=density)
        assert torch.equal(torch.cat([m.reshape(-1) for m in masks]), first_of_sorted(everything, density))


def test_a_sample_that_misleads_does_not_change_the_result() -> None:
    # Every sampled place holds a small score, every other one a large score.
    scores = torch.ones(1 << 17)
    stride = round((1 << 17) ** (1 / 3)) | 1
    scores[::stride] = torch.linspace(1e-6, 1e-5, len(scores[::stride]))
    assert torch.equal(select([scores], selection="topk", density=0.3)[0], first_of_sorted(scores, 0.3))


@pytest.mark.parametrize("choose", [select, select_packed, by_digits])
@pytest.mark.parametrize("shape", [(2, 8), (300, 304)])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_nan_scores_are_refused(choose, shape: tuple[int, int], selection) -> None:
    scores = torch.ones(shape)
    scores[1, 3] = math.nan
    with pytest.raises(MaskftError, match=f"1 of {scores.numel()} mask scores are NaN"):
        choose([scores], selection=selection)


@settings(deadline=None)
@given(seed=st.integers(0, 99), limit=st.integers(0, 40), levels=st.integers(1, 9), score_transform=transforms)
def test_scores_are_held_back_so_that_no_more_than_the_limit_flip(seed, limit, levels, score_transform) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes, threshold = [(3, 5), (7, 2)], 0.3
    drawn = [torch.randn(2, *shape, generator=generator).mul(levels).round() / levels for shape in shapes]  # with ties
    before, scores = ([pair[i].T.contiguous().T for pair in drawn] for i in (0, 1))

    def keeps(tensors: list[Tensor]) -> Tensor:
        chosen = select(tensors, selection="threshold", threshold=threshold, score_transform=score_transform)
        return torch.cat([mask.flatten() for mask in chosen])

    old, wanted, free = keeps(before), keeps(scores), torch.cat([tensor.flatten() for tensor in scores])
    held = [tensor.clone() for tensor in scores]
    masks = [pack_mask(part.view(shape)) for part, shape in zip(old.split([15, 14]), shapes, strict=True)]
    hold_back(held, masks, limit, threshold, score_transform)
    new, values = keeps(held), torch.cat([tensor.flatten() for tensor in held])
    distance = ((free.abs() if score_transform == "abs" else free) - threshold).abs()
    order = sorted((wanted != old).nonzero().flatten().tolist(), key=lambda i: -distance[i])  # stable
    assert (new != old).nonzero().flatten().tolist() == sorted(order[:limit])
    waiting = order[limit:]
    others = [i for i in range(29) if i not in waiting]
    assert torch.equal(values[others], free[others])
    torch.testing.assert_close(values[waiting].abs(), torch.full((len(waiting),), threshold))
    assert torch.equal(values.signbit()[waiting], free.signbit()[waiting]) or score_transform == "none"


@pytest.mark.parametrize("shape", [(2, 3), (300, 300)])
def test_more_values_than_are_numbers_cannot_be_kept(shape: tuple[int, int]) -> None:
    scores = torch.full(shape, math.nan)
    scores[0, 1] = 1
    assert select_top([scores], 1, "abs")[0].nonzero().tolist() == [[0, 1]]
    with pytest.raises(MaskftError, match=f"{scores.numel() - 1} of {scores.numel()} values are NaN"):
        select_top([scores], 2, "abs")
