"""Triton kernels for one GPU: choosing packed masks, applying them, and the gradient of the scores.

Each does what a function in PyTorch beside it does, which is its reference in the tests and takes its place elsewhere:
:mod:`maskft.masks.radix` and :func:`maskft.masks.pack_mask`, :func:`maskft.masks.apply_mask`,
:func:`maskft.masks.straight_through_gradient`. Flips are counted by PyTorch: a bit a weight is read, by the
bytes that move 1 to 3 ms of a step of 261 ms (8 x 2048 tokens, 872 million masked weights).

A choice is exact, and nothing waits for it. A score's rank is one 64-bit integer, its value above and its position
below, so that no two are equal. A launch counts, for all tensors together, the next 8 bits of the ranks whose upper
bits are those of their pool's k-th; what follows each program of the next launch works out for itself. Four read the
scores; the four over positions return at once unless scores tie at the border; one more packs the bits. Digits have 8
bits, not the 11 of :mod:`maskft.masks.radix`: a warp's histogram costs one popcount for each 32 bins.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # scores that a program reads at a time
_NUM_PROGRAMS = 256  # for each tensor, at least; they take its blocks in turn
_ALL_PROGRAMS = 4096
_NUM_BYTES = tl.constexpr(512)  # that a program packs at a time
_NUM_BLOCKS = tl.constexpr(4)
_ALIGNMENT = 16  # bytes to which each packed mask begins
_ELEMENTS = tl.constexpr(2048)  # that a program writes where each is made of those at its own position
_NUM_DIGITS = 8  # of 8 bits in a rank
_MAX_POOL = 1 << 31  # scores that can compete with each other


@triton.jit
def _rank(values, positions, ABS: tl.constexpr):
    """Integers in the order of the scores (of their sizes), and among equal ones the earlier position above."""
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = size if ABS else tl.where(bits < 0, -size, bits)
    return (key.to(tl.int64) << 32) + (0xFFFFFFFF - positions)


@triton.jit
def _tensor(tensors, i):
    """Address, size, pool and first position in the pool of a tensor; see `_plan`. All but the pool divide by 8."""
    row = tensors + 5 * i
    scores = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    return scores, tl.multiple_of(tl.load(row + 1), 8), tl.load(row + 2), tl.multiple_of(tl.load(row + 3), 8)


@triton.jit
def _narrow(states, counts, num_pools, pool, index):
    """A pool's state once `index` digits are counted: the lowest rank that has those of the k-th, and whether it parts
    the ranks that are kept from the others. All programs of a launch write the same."""
    state = states + 3 * (index * num_pools + pool)
    if index > 0:
        before = state - 3 * num_pools
        low, num_wanted, is_found = tl.load(before), tl.load(before + 1), tl.load(before + 2)
        if is_found == 0:
            digits = tl.arange(0, 256)
            num = tl.load(counts + 256 * ((index - 1) * num_pools + pool) + digits).to(tl.int64)
            num_from = tl.sum(num, 0) - tl.cumsum(num, 0) + num  # with this digit or a higher one
            digit = tl.max(tl.where(num_from >= num_wanted, digits, 0), 0)
            num_wanted -= tl.sum(tl.where(digits > digit, num, 0), 0)
            is_found = (tl.sum(tl.where(digits == digit, num, 0), 0) == num_wanted).to(tl.int64)
            low += digit.to(tl.int64) << (64 - 8 * index)
        tl.store(state, low)
        tl.store(state + 1, num_wanted)
        tl.store(state + 2, is_found)
    else:
        low, is_found = tl.load(state), tl.load(state + 2)
    return low, is_found


@triton.jit(do_not_specialize=["num_pools", "index"])
def _count(tensors, states, counts, num_pools, index, ABS: tl.constexpr, BLOCK: tl.constexpr):
    """How many ranks whose upper digits are those of their pool's k-th have each next digit."""
    scores, numel, pool, before = _tensor(tensors, tl.program_id(1))
    low, is_found = _narrow(states, counts, num_pools, pool, index)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    if (is_found == 0) & (begin < numel):
        own = counts + 256 * (index * num_pools + pool)
        num = tl.zeros((256,), dtype=tl.int32)
        shift = (56 - 8 * index).to(tl.uint64)
        while begin < numel:
            at = begin + tl.arange(0, BLOCK)
            is_there = at < numel
            rank = _rank(tl.load(scores + at, mask=is_there, other=0.0), before + at, ABS)
            digit = (rank - low).to(tl.uint64) >> shift
            is_candidate = is_there & (digit < 256)
            num_candidates = tl.sum(is_candidate.to(tl.int32), 0)
            # A histogram costs the same for few; atomics of many would wait for each other.
            if num_candidates > BLOCK // 32:
                num += tl.histogram(digit.to(tl.int32), 256, is_candidate)
            elif num_candidates > 0:
                tl.atomic_add(own + digit.to(tl.int32), 1, mask=is_candidate, sem="relaxed")
            begin += tl.num_programs(0) * BLOCK
        tl.atomic_add(own + tl.arange(0, 256), num, mask=num > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_pools", "index"])
def _pack(
    tensors,
    states,
    counts,
    num_pools,
    index,
    threshold,
    packed,
    num_nan,
    ABS: tl.constexpr,
    REACHING: tl.constexpr,
):
    """Bits of the ranks from their pool's border on, or of the scores that reach the threshold, little bit first."""
    scores, numel, pool, before = _tensor(tensors, tl.program_id(1))
    begin = tl.program_id(0).to(tl.int64) * (_NUM_BYTES * _NUM_BLOCKS)
    if begin * 8 < numel:
        if not REACHING:
            border, _ = _narrow(states, counts, num_pools, pool, index)
        first_byte = tl.load(tensors + 5 * tl.program_id(1) + 4)
        eight = tl.arange(0, 8)[None, :]
        nans = tl.zeros((_NUM_BYTES, 8), dtype=tl.int32)
        for i in range(_NUM_BLOCKS):
            byte = begin + i * _NUM_BYTES + tl.arange(0, _NUM_BYTES)
            at = byte[:, None] * 8 + eight
            values = tl.load(scores + at, mask=at < numel, other=0.0)
            if REACHING:
                is_kept = (tl.abs(values) if ABS else values) >= threshold
            else:
                is_kept = _rank(values, before + at, ABS) >= border
            bits = tl.sum(is_kept.to(tl.int32) << eight, 1)
            tl.store(packed + first_byte + byte, bits.to(tl.uint8), mask=byte * 8 < numel)
            nans += (values != values).to(tl.int32)
        found = tl.sum(tl.sum(nans, 1), 0)
        if found > 0:
            tl.atomic_add(num_nan, found, sem="relaxed")


@triton.jit
def _apply(weight, packed, reference, result, numel, HAS_REFERENCE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * _ELEMENTS + tl.arange(0, _ELEMENTS)
    is_there = at < numel
    values = tl.load(weight + at, mask=is_there)
    bits = tl.load(packed + (at >> 3), mask=is_there, other=0)
    is_kept = ((bits.to(tl.int32) >> (at & 7).to(tl.int32)) & 1) != 0
    others = tl.load(reference + at, mask=is_there) if HAS_REFERENCE else tl.zeros((_ELEMENTS,), dtype=values.dtype)
    tl.store(result + at, tl.where(is_kept, values, others), mask=is_there)


@triton.jit
def _gradient(grad_weight, weight, reference, scores, result, numel, ABS: tl.constexpr, HAS_REFERENCE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * _ELEMENTS + tl.arange(0, _ELEMENTS)
    is_there = at < numel
    change = tl.load(weight + at, mask=is_there, other=0).to(tl.float32)
    if HAS_REFERENCE:
        change -= tl.load(reference + at, mask=is_there, other=0).to(tl.float32)
    grad = tl.load(grad_weight + at, mask=is_there, other=0).to(tl.float32) * change
    if ABS:
        grad = tl.where(tl.load(scores + at, mask=is_there, other=0) > 0, grad, -grad)
    tl.store(result + at, grad, mask=is_there)


@lru_cache(maxsize=32)
def _plan(
    addresses: tuple[int, ...], sizes: tuple[int, ...], ks: tuple[int, ...], device: Any
) -> tuple[Tensor, Tensor, list[int]]:
    """What a choice needs to know of its tensors; kept, since what is copied to a GPU waits for it.

    There are as many `ks` as tensors, or one for all of them together.

    Returns:
        For each tensor its address, size, pool, first position in the pool, and first byte of its packed mask; by digit
        and pool the states of `_narrow`, of which the first is known; where packed masks begin, and the last one ends.
    """
    is_merged = len(ks) < len(sizes)
    first_bytes, before, rows = [0], 0, []
    for i, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
        rows.append([address, size, 0 if is_merged else i, before if is_merged else 0, first_bytes[-1]])
        before += size
        first_bytes.append(first_bytes[-1] + triton.cdiv(size // 8, _ALIGNMENT) * _ALIGNMENT)
    states = torch.zeros((_NUM_DIGITS + 1, len(ks), 3), dtype=torch.int64)
    states[0] = torch.tensor([[-1 << 63, k, 0] for k in ks])
    return torch.tensor(rows).to(device), states.to(device), first_bytes


def try_on(device: torch.device) -> None:
    """Compile and launch each kernel once; raises whatever keeps one from running."""
    scores = torch.ones((64, 64), device=device)
    (mask,), _ = choose_packed([scores], [9], abs_=True)
    if mask.flatten().tolist() != [255, 1] + 510 * [0]:
        raise RuntimeError("other scores than the first 9 of 4096 equal ones were kept")
    apply_packed(scores, mask, None, torch.empty_like(scores))
    score_gradient(scores, scores, scores, None, torch.empty_like(scores), abs_=True)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's GPU; Triton takes the current one. Its interpreter runs on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def can_choose(scores: Sequence[Tensor], *, merge: bool) -> bool:
    """Whether these can be chosen from here, of tensors for which :func:`kernels_for` has kernels.

    They have to be (rows, columns) of float32, the columns in whole bytes; with `merge` they compete with each other.
    """
    is_fit = all(
        t.dtype == torch.float32 and t.dim() == 2 and t.shape[1] % 8 == 0 and t.numel() > 0 and t.data_ptr() % 16 == 0
        for t in scores
    )
    sizes = [t.numel() for t in scores]
    return is_fit and (sum(sizes) if merge else max(sizes)) < _MAX_POOL


def choose_packed(
    scores: Sequence[Tensor], ks: Sequence[int], *, abs_: bool, threshold: float | None = None
) -> tuple[list[Tensor], Tensor]:
    """Packed masks of the largest scores (or sizes), and how many scores are NaN; nothing waits for the GPU.

    Args:
        scores: float32 tensors (rows, columns) for which :func:`can_choose` holds.
        ks: how many to keep of each tensor, or one number for all tensors together; of equal scores the earlier ones.
        abs_: rank the sizes.
        threshold: keep all that reach it instead; `ks` is not used.

    Returns:
        The masks, uint8 (rows, columns / 8), and an int64 scalar on the device. Without meaning where any is NaN.
    """
    device, sizes = scores[0].device, tuple(t.numel() for t in scores)
    tensors, known, first_bytes = _plan(tuple(t.data_ptr() for t in scores), sizes, tuple(ks), device)
    states, counts = known.clone(), torch.zeros((_NUM_DIGITS, len(ks), 256), dtype=torch.int32, device=device)
    packed = torch.empty(first_bytes[-1], dtype=torch.uint8, device=device)
    num_nan = torch.zeros((), dtype=torch.int64, device=device)
    num_programs = min(triton.cdiv(max(sizes), _BLOCK), max(_NUM_PROGRAMS, _ALL_PROGRAMS // len(sizes)))
    num_packing = triton.cdiv(max(sizes), 8 * _NUM_BYTES.value * _NUM_BLOCKS.value)
    chosen = (tensors, states, counts, len(ks))
    with _on(scores[0]):
        for index in range(_NUM_DIGITS if threshold is None else 0):
            _count[(num_programs, len(sizes))](*chosen, index, ABS=abs_, BLOCK=_BLOCK, num_warps=8)
        options = {"ABS": abs_, "REACHING": threshold is not None, "num_warps": 8}
        _pack[(num_packing, len(sizes))](*chosen, _NUM_DIGITS, threshold or 0.0, packed, num_nan, **options)
    shapes = [(t.shape[0], t.shape[1] // 8) for t in scores]
    begins = zip(first_bytes, shapes, strict=False)
    return [packed[begin : begin + math.prod(shape)].view(shape) for begin, shape in begins], num_nan


def _programs(numel: int) -> tuple[int]:
    return (triton.cdiv(numel, _ELEMENTS.value),)


def apply_packed(weight: Tensor, packed: Tensor, reference: Tensor | None, result: Tensor) -> None:
    """Write `weight` with the left-out places at zero, or at `reference`, to `result`; contiguous, of whole bytes."""
    others = weight if reference is None else reference
    numel, has_reference = weight.numel(), reference is not None
    with _on(weight):
        _apply[_programs(numel)](weight, packed, others, result, numel, HAS_REFERENCE=has_reference)


def score_gradient(
    grad_weight: Tensor, weight: Tensor, scores: Tensor, reference: Tensor | None, result: Tensor, *, abs_: bool
) -> None:
    """Write the straight-through gradient to `result`, float32, which may be `grad_weight`; all contiguous."""
    others = weight if reference is None else reference
    numel, options = weight.numel(), {"ABS": abs_, "HAS_REFERENCE": reference is not None}
    with _on(weight):
        _gradient[_programs(numel)](grad_weight, weight, others, scores, result, numel, **options)
