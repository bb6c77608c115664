"""The Triton kernels beside the functions in PyTorch that they take the place of; interpreted where there is no GPU."""

import math
import sys

import pytest
import torch
from torch import Tensor

from maskft.masks import (
    acceleration,
    apply_mask,
    gradient,
    linear,
    masked_linear,
    num_flipped_bits,
    num_kept,
    pack_mask,
    select,
)
from maskft.masks.selection import kth_largest, select_packed

kernels = pytest.importorskip("maskft.masks.triton", reason="Triton is there on Linux alone")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES = [(60, 400), (24, 8), (40, 104)]


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """The first tensor is sampled, and its programs take several blocks; interpreted, each costs a millisecond."""
    if DEVICE == "cpu":
        sizes = {"_BLOCK": 1024, "_NUM_PROGRAMS": 4, "_ALL_PROGRAMS": 4, "_SAMPLE": 1024, "_LEAST_TO_SAMPLE": 4096}
        for name, value in sizes.items():
            monkeypatch.setattr(kernels, name, value)
    kernels._plan.cache_clear()


def scores_of(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {
        "normal": drawn,
        "a few values": (drawn * 2).round(),
        "all equal": torch.full_like(drawn, 0.02),
        "one step off": torch.where(drawn > 1, 0.021, torch.where(drawn < -1, 0.019, 0.02)),
        "sorted": drawn.flatten().sort().values.view(shape),
        "zeros and infinities": torch.where(drawn > 1, math.inf, torch.where(drawn < -1, -math.inf, drawn * 0.0)),
        "denormal": drawn * 1e-42,
    }[kind].to(DEVICE)


def is_chosen_as_by_the_reference(scores: list[Tensor], selection, density: float, score_transform) -> bool:
    sizes = [s.numel() for s in scores]
    ks = [num_kept(size, density) for size in ([sum(sizes)] if selection == "global_topk" else sizes)]
    threshold = 0.0195 if selection == "threshold" else None
    packed, num_nan = kernels.choose_packed(scores, ks, abs_=score_transform == "abs", threshold=threshold)
    settings = {"density": density, "threshold": 0.0195, "score_transform": score_transform}
    masks = select([s.cpu() for s in scores], selection=selection, **settings)
    return not num_nan and all(torch.equal(p.cpu(), pack_mask(m)) for p, m in zip(packed, masks, strict=True))


@pytest.mark.parametrize(
    "kind", ["normal", "a few values", "all equal", "one step off", "sorted", "zeros and infinities", "denormal"]
)
@pytest.mark.parametrize(
    ("selection", "score_transform"), [("topk", "abs"), ("topk", "none"), ("global_topk", "abs"), ("threshold", "none")]
)
def test_kernels_choose_as_the_reference_does(kind: str, selection, score_transform) -> None:
    scores = [scores_of(kind, shape, seed) for seed, shape in enumerate(SHAPES)]
    assert kernels.can_choose(scores, merge=selection == "global_topk")
    assert is_chosen_as_by_the_reference(scores, selection, 0.9, score_transform)


@pytest.mark.parametrize("density", [1e-4, 0.01, 0.5, 1.0])
def test_kernels_choose_any_share(density: float) -> None:
    assert is_chosen_as_by_the_reference([scores_of("normal", SHAPES[0], 0)], "topk", density, "abs")


@pytest.mark.parametrize("margin", [-3.0, 60.0], ids=["misses the k-th", "holds more than there is room for"])
@pytest.mark.parametrize("density", [0.9, 0.2])
def test_a_choice_is_exact_where_the_sample_serves_badly(margin: float, density: float, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_MARGIN", margin)
    scores = [scores_of("normal", shape, seed) for seed, shape in enumerate(SHAPES[:2])]
    assert is_chosen_as_by_the_reference(scores, "topk", density, "none")


def test_kernels_count_nan_and_leave_it_to_the_caller() -> None:
    scores = scores_of("normal", SHAPES[0], 0)
    scores[3, 5] = scores[59, 399] = math.nan
    _, num_nan = kernels.choose_packed([scores], [100], abs_=True)
    assert num_nan == 2


@pytest.mark.parametrize("score_transform", ["abs", "none"])
@pytest.mark.parametrize("k", [1, 20000, 28352])
def test_kernels_find_the_kth_score(k: int, score_transform) -> None:
    scores = [scores_of("normal", shape, seed) for seed, shape in enumerate(SHAPES)]
    found = kernels.kth_largest(scores, k, abs_=score_transform == "abs")
    assert found.cpu() == kth_largest([s.cpu() for s in scores], k, score_transform)


@pytest.mark.parametrize("shape", [(1, 4), (60, 400), (7, 4100)])
def test_kernels_count_flips(shape: tuple[int, int]) -> None:
    before, after = (
        torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    after[0, :2] = ~before[0, :2]
    found = kernels.num_flipped(before.to(DEVICE), after.to(DEVICE))
    assert found.dtype == torch.int64
    assert found.cpu() == num_flipped_bits(before, after)
    assert kernels.num_flipped(before.to(DEVICE), before.to(DEVICE)) == 0


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


def test_tensors_of_other_sizes_lie_where_int64_can_be_read(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_LOT", 7000)
    scores = [scores_of("normal", shape, seed) for seed, shape in enumerate([(5, 8), (16, 64), (60, 104), (1, 8)])]
    packed, _ = kernels.choose_packed(scores, [num_kept(s.numel(), 0.9) for s in scores], abs_=True)
    masks = select([s.cpu() for s in scores], selection="topk", density=0.9)
    assert all(torch.equal(p.cpu(), pack_mask(m)) for p, m in zip(packed, masks, strict=True))
    assert all(p.storage_offset() % 8 == 0 for p in packed)


def test_a_threshold_is_met_at_any_place(monkeypatch) -> None:
    scores = [torch.full((3, 8), 0.5, device=DEVICE), torch.full((2, 16), 0.5, device=DEVICE)]
    packed, _ = kernels.choose_packed(scores, [], abs_=False, threshold=0.5)
    assert all((mask == 255).all() for mask in packed)
    assert kernels._plan.cache_info().currsize == 1
    assert kernels._plan(*plan_key(scores)).tensors[:, 3].eq(0).all()  # each tensor's places begin anew


def plan_key(scores: list[Tensor]) -> tuple:
    sizes = tuple(s.numel() for s in scores)
    return tuple(s.data_ptr() for s in scores), sizes, (1,) * len(sizes), False, False, scores[0].device


def test_more_scores_than_a_signed_integer_counts_are_counted() -> None:
    parts = kernels._NUM_PARTS
    k = 2_200_000_100
    pools = torch.tensor([[k, 0, 0, 0, kernels._HIGHEST, 1]], device=DEVICE)
    states = torch.zeros((1, kernels._STATE.value), dtype=torch.int64, device=DEVICE)
    states[0, 1] = parts - 1  # parts of one rank each
    counts = torch.zeros((1, parts + 1), dtype=torch.int64)
    counts[0, parts], counts[0, 100:110] = 2_200_000_000, 20
    counts = counts.to(torch.uint32).view(torch.int32).to(DEVICE)
    kernels._narrow[(1,)](pools, 0, states, counts, EXACT=False, NUM_PARTS=parts)
    assert states[0, 0] == 105  # 110 of 20 from the top: 109, 108, 107, 106 and 105


def test_kernels_that_cannot_run_are_done_without(monkeypatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "try_on", fail)
    acceleration._kernels.cache_clear()
    with pytest.warns(UserWarning, match="without Triton, more slowly.*C compiler"):
        assert acceleration._kernels(torch.device("cuda")) is None
    acceleration._kernels.cache_clear()


@pytest.fixture
def interpreted(monkeypatch) -> None:
    """The kernels where they would be used on a GPU."""
    if DEVICE == "cpu":
        for module in (linear, gradient, sys.modules["maskft.masks.selection"]):
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
