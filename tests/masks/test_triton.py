"""The Triton kernels beside the functions in PyTorch that they take the place of; interpreted where there is no GPU."""

import math
import sys
from contextlib import nullcontext

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from reference import FLOATS
from torch import Tensor

from maskft.masks import acceleration, apply_mask, linear, masked_linear, num_kept, pack_mask, select
from maskft.masks.selection import select_packed, select_top

kernels = pytest.importorskip("maskft.masks.triton", reason="Triton is there on Linux alone")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES = [(60, 400), (3, 8), (40, 104), (1, 8)]


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """The first tensor's programs take several blocks; interpreted, each costs a millisecond."""
    if DEVICE == "cpu":
        for name, value in {"_BLOCK": 2048, "_NUM_PROGRAMS": 4, "_ALL_PROGRAMS": 4}.items():
            monkeypatch.setattr(kernels, name, value)
    kernels._plan.cache_clear()


KINDS = {
    "normal": lambda drawn: drawn,
    "a few values": lambda drawn: (drawn * 2).round(),
    "all equal": lambda drawn: torch.full_like(drawn, 0.02),
    "one step off": lambda drawn: torch.where(drawn > 1, 0.021, torch.where(drawn < -1, 0.019, 0.02)),
    "sorted": lambda drawn: drawn.flatten().sort().values.view(drawn.shape),
    "zeros and infinities": lambda d: torch.where(d > 1, math.inf, torch.where(d < -1, -math.inf, d * 0.0)),
    "denormal": lambda drawn: drawn * 1e-42,
}


def scores_of(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    return KINDS[kind](torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("selection", "score_transform"), [("topk", "abs"), ("topk", "none"), ("global_topk", "abs"), ("threshold", "none")]
)
def test_kernels_choose_as_the_reference_does(kind: str, selection, score_transform) -> None:
    scores = [scores_of(kind, shape, seed) for seed, shape in enumerate(SHAPES)]
    assert kernels.can_choose(scores, merge=selection == "global_topk")
    sizes = [s.numel() for s in scores]
    ks = [num_kept(size, 0.9) for size in ([sum(sizes)] if selection == "global_topk" else sizes)]
    threshold = 0.0195 if selection == "threshold" else None
    packed, num_nan = kernels.choose_packed(scores, ks, abs_=score_transform == "abs", threshold=threshold)
    rule = {"selection": selection, "threshold": 0.0195, "score_transform": score_transform}
    masks = select([s.cpu() for s in scores], density=0.9, **rule)
    assert num_nan == 0
    assert all(p.storage_offset() % 8 == 0 for p in packed), "where int64 can be read"
    assert all(torch.equal(p.cpu(), pack_mask(m)) for p, m in zip(packed, masks, strict=True))


def test_kernels_count_nan_and_leave_it_to_the_caller() -> None:
    scores = scores_of("normal", SHAPES[0], 0)
    scores[3, 5] = scores[59, 399] = math.nan
    _, num_nan = kernels.choose_packed([scores], [100], abs_=True)
    assert num_nan == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("has_reference", [False, True])
def test_kernels_apply_a_mask_to_the_bit(dtype: torch.dtype, has_reference: bool) -> None:
    weight, other = (scores_of("normal", SHAPES[0], seed).to(dtype) for seed in (0, 1))
    weight[0, :3] = torch.tensor([math.inf, math.nan, -0.0])
    reference = other if has_reference else None
    mask = scores_of("normal", SHAPES[0], 2) > -1
    mask[0, :2] = False
    result = torch.empty_like(weight)
    kernels.apply_packed(weight, pack_mask(mask), reference, result)
    assert torch.equal(result.view(torch.uint8), apply_mask(weight, mask, reference).view(torch.uint8))


@pytest.mark.parametrize("abs_", [True, False])
@pytest.mark.parametrize("has_reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_make_the_gradient_of_the_scores(abs_: bool, has_reference: bool, dtype: torch.dtype) -> None:
    grad, weight, other = (scores_of("normal", SHAPES[0], seed).to(dtype) for seed in range(3))
    scores = scores_of("zeros and infinities", SHAPES[0], 3)
    change = weight.float() - other.float() if has_reference else weight.float()
    expected = grad.float() * change
    expected = torch.where(scores > 0, expected, -expected) if abs_ else expected
    result = grad if dtype == torch.float32 else torch.empty_like(scores)
    kernels.score_gradient(grad, weight, scores, other if has_reference else None, result, abs_=abs_)
    assert torch.equal(result, expected)


@settings(deadline=None, max_examples=25)
@given(arrays("float32", 200, elements=FLOATS).map(torch.from_numpy), st.booleans(), st.floats(0, 1), st.booleans())
def test_kernels_keep_any_number_of_any_scores(values: Tensor, merge: bool, share: float, abs_: bool) -> None:
    scores = [part.view(-1, 40).to(DEVICE) for part in values.split([80, 120])]
    pools = [scores] if merge else [[tensor] for tensor in scores]
    ks = [int(share * sum(t.numel() for t in pool)) for pool in pools]
    packed, _ = kernels.choose_packed(scores, ks, abs_=abs_)
    expected = [m for pool, k in zip(pools, ks, strict=True) for m in select_top(pool, k, "abs" if abs_ else "none")]
    assert all(torch.equal(mask, pack_mask(other)) for mask, other in zip(packed, expected, strict=True))


def test_scores_are_read_as_often_as_the_border_needs(monkeypatch) -> None:
    made, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: made.append(zeros(*args, **kwargs)) or made[-1])
    for kind in ("normal", "all equal"):
        kernels.choose_packed([scores_of(kind, SHAPES[0], 0)], [num_kept(24000, 0.9)], abs_=True)
    normal, all_equal = (int((counts.sum((1, 2)) > 0).sum()) for counts in made if counts.shape[-1:] == (256,))
    assert normal <= 4
    assert all_equal == 8


def test_more_scores_than_are_ranked_together_are_left_to_others() -> None:
    large = torch.empty(1, dtype=torch.float32).expand(1 << 15, 1 << 15)
    assert kernels.can_choose([large], merge=False)
    assert kernels.can_choose([large] * 2, merge=False)
    assert not kernels.can_choose([large] * 2, merge=True)
    for unfit in (torch.ones(2, 9), torch.ones(0, 8), torch.ones(2, 8).bfloat16(), torch.ones(17)[1:].view(2, 8)):
        assert not kernels.can_choose([torch.ones(2, 8), unfit], merge=False)


@pytest.mark.parametrize("error", [ImportError("No module named 'triton'"), RuntimeError("Failed to find C compiler")])
def test_kernels_that_cannot_run_are_done_without(monkeypatch, error: Exception) -> None:
    def fail(device: torch.device) -> None:
        raise error

    monkeypatch.setattr(kernels, "try_on", fail)
    acceleration._kernels.cache_clear()
    told = pytest.warns(UserWarning, match="without Triton, more slowly.*C compiler")
    with nullcontext() if isinstance(error, ImportError) else told:
        assert acceleration._kernels(torch.device("cuda")) is None
    acceleration._kernels.cache_clear()


def test_all_kernels_are_tried(monkeypatch) -> None:
    kernels.try_on(torch.device(DEVICE))
    monkeypatch.setattr(kernels, "_NUM_DIGITS", 7)  # too few to resolve ties
    kernels._plan.cache_clear()
    with pytest.raises(RuntimeError, match="other scores than the first 9"):
        kernels.try_on(torch.device(DEVICE))


@pytest.fixture
def interpreted(monkeypatch) -> None:
    """The kernels where they would be used on a GPU."""
    if DEVICE == "cpu":
        for module in (linear, sys.modules["maskft.masks.selection"]):
            monkeypatch.setattr(module, "kernels_for", lambda *_: kernels)


@pytest.mark.parametrize("selection", ["topk", "global_topk", "threshold"])
def test_a_choice_is_the_same_with_kernels_and_without(selection, interpreted) -> None:
    scores = [scores_of("normal", shape, seed) for seed, shape in enumerate(SHAPES[1:])]
    odd = [*scores, scores_of("normal", (7, 5), 5)]  # whose rows are no whole bytes
    for tensors in (scores, odd):
        packed, num_nan = select_packed(tensors, selection=selection, density=0.9, threshold=0.1)
        masks = select([t.cpu() for t in tensors], selection=selection, density=0.9, threshold=0.1)
        assert not num_nan
        assert all(torch.equal(p.cpu(), pack_mask(m)) for p, m in zip(packed, masks, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_learns_the_same_with_kernels_and_without(dtype: torch.dtype, interpreted) -> None:
    x, weight = scores_of("normal", (5, 104), 0).to(dtype), scores_of("normal", (40, 104), 1).to(dtype)
    scores = scores_of("normal", (40, 104), 2).requires_grad_()
    packed = pack_mask(scores.detach().abs() > 0.1)
    for _ in range(3):
        masked_linear(x, weight, scores, None, None, "abs", packed).square().sum().backward()
    masked = weight.double() * (scores.detach().abs() > 0.1)
    expected = 3 * (2 * (x.double() @ masked.T)).T @ x.double() * weight * scores.detach().sign()
    assert scores.grad is not None
    error = (scores.grad - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)
