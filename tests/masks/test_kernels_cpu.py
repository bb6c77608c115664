"""The Numba kernels beside the functions in NumPy and PyTorch that they take the place of."""

import math
import os
import signal
import sys
import time

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from torch import Tensor

from maskft.masks import (
    acceleration,
    apply_mask,
    apply_packed,
    num_flipped_bits,
    num_kept,
    pack_mask,
    straight_through_gradient,
    unpack_mask,
)
from maskft.masks.selection import kth_largest, num_nan, select_packed, select_unchecked

kernels = pytest.importorskip("maskft.masks.kernels_cpu", reason="Numba is not installed")

# Ties, both zeros and infinities are common.
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, math.inf, -math.inf]), st.floats(width=32, allow_nan=False)
)
matrices = arrays(
    "float32", st.tuples(st.integers(1, 20), st.sampled_from([8, 40, 64, 72])), elements=values, fill=values
).map(torch.from_numpy)
transforms = st.sampled_from(["abs", "none"])


def packed_by_the_reference(scores: list[Tensor], **choice) -> list[Tensor]:
    return [pack_mask(mask) for mask in select_unchecked(scores, **choice)]


@settings(deadline=None)
@given(
    scores=st.lists(matrices, min_size=1, max_size=3),
    selection=st.sampled_from(["topk", "global_topk", "threshold"]),
    score_transform=transforms,
    density=st.sampled_from([0.001, 0.5, 0.9, 1.0]),
    threshold=st.sampled_from([-1.0, 0.0, 0.1, 1.0]),
)
def test_choices_are_those_of_the_reference(
    scores: list[Tensor], selection, score_transform, density: float, threshold: float
) -> None:
    sizes = [t.numel() for t in scores]
    ks = [num_kept(size, density) for size in ([sum(sizes)] if selection == "global_topk" else sizes)]
    border = threshold if selection == "threshold" else None
    assert kernels.can_choose(scores, merge=True)
    packed, found = kernels.choose_packed(scores, ks, abs_=score_transform == "abs", threshold=border)
    choice = {"density": density, "threshold": threshold, "score_transform": score_transform}
    expected = packed_by_the_reference(scores, selection=selection, **choice)
    assert found == 0
    assert all(torch.equal(mask, other) for mask, other in zip(packed, expected, strict=True))


@settings(deadline=None)
@given(scores=st.lists(matrices, min_size=1, max_size=3), share=st.floats(0, 1), abs_=st.booleans())
def test_the_kth_is_that_of_sorted_scores(scores: list[Tensor], share: float, abs_: bool) -> None:
    flat = torch.cat([t.flatten() for t in scores])
    ranked = (flat.abs() if abs_ else flat).sort(descending=True).values
    k = min(1 + int(share * len(ranked)), len(ranked))
    assert kernels.kth_largest(scores, k, abs_=abs_) == ranked[k - 1]


@pytest.fixture
def in_pieces(monkeypatch) -> None:
    """Several pieces, and threads for all of them."""
    monkeypatch.setattr(kernels, "_PIECE", 1 << 14)
    monkeypatch.setattr(kernels, "_WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_has_threads_of_its_own(in_pieces) -> None:
    items = list(range(7))

    def work(item: int) -> str:
        time.sleep(0.01)  # so that no thread does it all
        return str(item)

    assert kernels._each(work, items, 1) == list(map(str, items))
    time.sleep(0.1)
    child = os.fork()
    if child == 0:
        os._exit(0 if kernels._each(work, items, 1) == list(map(str, items)) else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_an_error_is_raised_when_no_thread_works_any_more(in_pieces) -> None:
    ended = []

    def work(item: int) -> None:
        if item == 3:
            raise kernels.NotANumberError
        time.sleep(0.01)
        ended.append(item)

    with pytest.raises(kernels.NotANumberError):
        kernels._each(work, range(9), 1)
    num_ended = len(ended)
    time.sleep(0.05)
    assert len(ended) == num_ended
    scores = torch.randn(431, 200)
    scores[430, 199] = math.nan
    assert kernels.choose_packed([scores], [9], abs_=True) == ([], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [None, 3])
def test_threads_share_a_choice(in_pieces, dtype: torch.dtype, levels: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(shape, generator=generator, dtype=dtype) for shape in [(431, 200), (7, 8), (90, 1000)]]
    if levels:
        scores = [(t * levels).round() / levels for t in scores]
    total = sum(t.numel() for t in scores)
    for density in (0.9, 0.01):
        k = num_kept(total, density)
        packed, _ = kernels.choose_packed(scores, [k], abs_=True)
        expected = packed_by_the_reference(scores, selection="global_topk", density=density)
        assert all(torch.equal(mask, other) for mask, other in zip(packed, expected, strict=True))
        flat = torch.cat([t.flatten() for t in scores]).abs()
        assert kernels.kth_largest(scores, k, abs_=True) == flat.sort(descending=True).values[k - 1]


def test_threads_take_a_tensor_each_and_its_pieces_too(in_pieces) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(300, 200, generator=generator) for _ in range(12)]
    ks = [num_kept(t.numel(), 0.9) for t in scores]
    for _ in range(20):  # whoever is first
        packed, _ = kernels.choose_packed(scores, ks, abs_=True)
        expected = packed_by_the_reference(scores, selection="topk", density=0.9)
        assert all(torch.equal(mask, other) for mask, other in zip(packed, expected, strict=True))


def test_a_sample_that_misleads_does_not_change_the_result() -> None:
    scores = torch.ones(512, 256)
    scores.view(-1)[::51] = 1e-6  # the places that are sampled
    (packed,), _ = kernels.choose_packed([scores], [num_kept(scores.numel(), 0.3)], abs_=False)
    assert torch.equal(packed, packed_by_the_reference([scores], selection="topk", density=0.3)[0])


@pytest.mark.parametrize("ks", [[20, 6], [24, 8], [0, 0], [20], [32]])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_scores_that_are_nan_are_counted_and_nothing_is_chosen(ks: list[int], threshold: float | None) -> None:
    scores = [torch.ones(3, 8), torch.tensor([[math.nan, 1.0, math.inf, -math.inf] * 2])]
    masks, found = kernels.choose_packed(scores, ks, abs_=True, threshold=threshold)
    assert (masks, found) == ([], num_nan(scores)) == ([], 2)


@settings(deadline=None)
@given(scores=matrices, share=st.floats(0, 1), threshold=st.one_of(st.none(), st.just(-math.inf)))
def test_a_single_nan_is_seen_wherever_it_is(scores: Tensor, share: float, threshold: float | None) -> None:
    scores = scores.clone()
    scores.view(-1)[int(share * (scores.numel() - 1))] = math.nan
    assert kernels.choose_packed([scores], [1], abs_=False, threshold=threshold) == ([], 1)


def test_other_dtypes_and_rows_that_are_no_whole_bytes_are_left_to_the_reference() -> None:
    assert not kernels.can_choose([torch.ones(2, 8).bfloat16()], merge=False)
    assert not kernels.can_choose([torch.ones(2, 8), torch.ones(2, 8).double()], merge=False)
    assert not kernels.can_choose([torch.ones(2, 9)], merge=False)
    assert not kernels.can_choose([torch.ones(0, 8)], merge=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("has_reference", [False, True])
def test_masks_are_applied_as_by_the_reference(dtype: torch.dtype, has_reference: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, reference = (torch.randn(40, 24, generator=generator).to(dtype) for _ in range(2))
    weight[0, :4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    packed = torch.randint(256, (121,), generator=generator, dtype=torch.uint8)[1:].view(40, 3)  # at an odd address
    result = torch.full_like(weight, 7)
    assert kernels.can_apply(result)
    kernels.apply_packed(weight, packed, reference if has_reference else None, result)
    expected = apply_mask(weight, unpack_mask(packed, 24), reference if has_reference else None)
    assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("abs_", [True, False])
@pytest.mark.parametrize("of_weight", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_grad", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_reference", [False, True])
def test_gradients_are_those_of_the_reference(
    monkeypatch, abs_: bool, of_weight: torch.dtype, of_grad: torch.dtype, has_reference: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    grad, weight, other = (torch.randn(40, 72, generator=generator) for _ in range(3))
    grad, weight, reference = grad.to(of_grad), weight.to(of_weight), other.to(of_weight) if has_reference else None
    scores = torch.randn(40, 72, generator=generator)
    for special in (grad, weight, scores):
        special.view(-1)[torch.randint(2880, (9,), generator=generator)] = torch.tensor(
            [math.inf, -math.inf, math.nan, -0.0, 0.0, 1e-40, -1e-40, 3e38, -3e38]
        ).to(special)
    monkeypatch.setattr(sys.modules["maskft.masks.gradient"], "kernels_for", lambda *_: None)
    expected = straight_through_gradient(grad.clone(), weight, scores, reference, abs_=abs_)
    assert kernels.can_multiply(grad, weight, scores, reference)
    result = grad if of_grad == torch.float32 else torch.full_like(scores, 7)
    kernels.score_gradient(grad, weight, scores, reference, result, abs_=abs_)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_no_mask_is_applied_but_to_whole_vectors_from_a_line_of_the_cache_on() -> None:
    assert not kernels.can_apply(torch.empty(30, 24))
    assert not kernels.can_apply(torch.empty(1 + 40 * 24)[1:].view(40, 24))


def test_gradients_of_other_dtypes_and_sizes_and_of_unaligned_memory_are_left_to_the_reference() -> None:
    grad, odd = torch.ones(2, 32), torch.ones(2, 31)
    assert kernels.can_multiply(grad, grad, grad, None)
    assert kernels.can_multiply(grad, grad, grad, grad.bfloat16())
    assert not kernels.can_multiply(grad, grad.half(), grad, None)
    assert not kernels.can_multiply(grad, grad, grad, grad.half())
    assert not kernels.can_multiply(grad, grad, grad.double(), None)
    assert not kernels.can_multiply(odd, odd, odd, None)
    assert not kernels.can_multiply(torch.ones(65)[1:].view(2, 32), grad, grad, None)


def test_flips_are_counted_as_by_the_reference() -> None:
    before, after = (torch.randint(256, (30, 4), dtype=torch.uint8) for _ in range(2))
    assert kernels.num_flipped(before, after) == num_flipped_bits(before, after)
    assert kernels.num_flipped(before, before) == 0


def test_large_tensors_take_the_kernels_and_all_else_does_not(monkeypatch) -> None:
    large = torch.randn(256, 256)
    assert acceleration.kernels_for(large) is kernels
    assert acceleration.kernels_for(large, large.bfloat16()) is kernels
    for other in (large[:255], large.T, large.to_sparse(), large.to("meta")):
        assert acceleration.kernels_for(other) is None
    with_kernels = select_packed([large], selection="topk"), kth_largest([large], 9, "abs")
    applied = apply_packed(large, with_kernels[0][0][0])
    gradient = straight_through_gradient(large.bfloat16(), large, large, abs_=True)
    for name in ("selection", "linear", "gradient"):
        monkeypatch.setattr(sys.modules[f"maskft.masks.{name}"], "kernels_for", lambda *_: None)
    without = select_packed([large], selection="topk"), kth_largest([large], 9, "abs")
    assert torch.equal(with_kernels[0][0][0], without[0][0][0])
    assert with_kernels[1] == without[1]
    assert torch.equal(applied, apply_packed(large, without[0][0][0]))
    assert torch.equal(gradient, straight_through_gradient(large.bfloat16(), large, large, abs_=True))


@pytest.mark.parametrize("error", [ImportError("No module named 'numba'"), RuntimeError("no such processor")])
def test_kernels_that_cannot_run_are_done_without(monkeypatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(acceleration, "import_module", fail)
    acceleration._kernels.cache_clear()
    if isinstance(error, ImportError):
        assert acceleration.kernels_for(torch.ones(256, 256)) is None
    else:
        with pytest.warns(UserWarning, match="without Numba, more slowly.*no such processor"):
            assert acceleration.kernels_for(torch.ones(256, 256)) is None
    acceleration._kernels.cache_clear()


def test_memory_that_a_kernel_read_can_be_freed() -> None:
    weight = torch.randn(256, 256)
    apply_packed(weight, pack_mask(weight > 0))
    weight.untyped_storage().resize_(0)  # as FSDP does; PyTorch refuses it for memory that NumPy was shown


def test_where_nothing_can_be_kept_kernels_are_compiled_in_each_process(monkeypatch) -> None:
    def njit(*, nogil: bool, cache: bool = False):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return plain(nogil=nogil)

    plain = kernels.loops.numba.njit
    monkeypatch.setattr(kernels.loops.numba, "njit", njit)
    assert kernels.loops._compiled(lambda value: value + 1)(1) == 2


@pytest.mark.parametrize("loop", ["mark", "mark_reaching", "settle", "num_differing", "apply", "gradient"])
def test_a_loop_that_cannot_be_compiled_is_found_out_before_work_starts(monkeypatch, loop: str) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(kernels.loops, loop, fail)
    acceleration._kernels.cache_clear()
    with pytest.warns(UserWarning, match="without Numba, more slowly.*No space left"):
        assert acceleration.kernels_for(torch.ones(256, 256)) is None
    acceleration._kernels.cache_clear()
