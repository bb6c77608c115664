"""Triton kernels for one GPU: choosing packed masks, applying them, and the gradient of the scores.

Each does what a function in PyTorch beside it does, which is its reference in the tests and takes its place elsewhere:
:mod:`maskft.masks.radix` and :func:`maskft.masks.pack_mask`, :func:`maskft.masks.apply_mask`,
:func:`maskft.masks.gradient.straight_through_gradient`, :func:`maskft.masks.num_flipped_bits`.

A choice is exact and brings nothing back to the host. A score's rank is one 64-bit integer, its value above and its
place below, so that no two are equal. A sample of the scores gives an interval that holds the k-th largest rank almost
surely. One pass over all scores counts the ranks above it and gathers those inside, a fiftieth or so; passes over these
count how many lie in each part of the interval, and go on in the part where the k-th is. Where the interval misses it,
or a program gathers more than it has room for, these passes read all scores instead. As many as a choice could need at
worst are launched, and return at once when the border is known. All tensors go through one launch together, each with
an interval of its own, or with one for all. What follows from a pass is worked out by the last of its programs, since a
launch costs the host more than most passes cost the GPU.
"""

import math
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskft.masks.packing import packed_shape

_BLOCK = 512  # scores that a program reads at a time
_NUM_WARPS = 8
_NUM_PROGRAMS = 256  # for each tensor, at least; they take its blocks in turn
_ALL_PROGRAMS = 4096
_ROOM = 8  # one gathered rank for so many scores
_LOT = 1 << 30  # scores that are chosen together where they need not be
_PACKED = 16384  # scores whose bits a program packs
_ALIGNMENT = 16  # bytes to which each packed mask begins
_ELEMENTS = 2048  # that a program writes where each is made of those at its own place
_NUM_PARTS = 2048
_NUM_PASSES = math.ceil(64 / math.log2(_NUM_PARTS))
_SAMPLE = 16384
_SAMPLED_BITS = 52  # of a rank, from the highest: its value and a part of its place
_MARGIN = 4.0  # standard deviations of the k-th's place in the sample; what lies outside of them takes more passes
_LEAST_TO_SAMPLE = 4 * _SAMPLE
MAX_POOL = 1 << 32
"""Number of scores that can compete with each other."""

# A pool's state while its border is sought: both ends of the interval (the lower one is the border in the end), the
# binary logarithm of its parts' width, whether the border is found, whether the ranks inside are gathered, how many are
# above for certain, how many were inside at first, whether they had no room, and how many programs are through.
_STATE = tl.constexpr(16)
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1


@triton.jit
def _rank(values, places, ABS: tl.constexpr):
    """Integers in the order of the scores (of their sizes), and among equal ones the earlier place above."""
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if ABS:
        key = size
    else:
        key = tl.where(bits < 0, -size, bits)
    return (key.to(tl.int64) << 32) + (0xFFFFFFFF - places)


@triton.jit
def _tensor(tensors, i):
    """Address, size, pool and first place in the pool of a tensor; see `_Plan`. All are multiples of 8 but the pool."""
    row = tensors + 7 * i
    scores = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    return scores, tl.multiple_of(tl.load(row + 1), 8), tl.load(row + 2), tl.multiple_of(tl.load(row + 3), 8)


@triton.jit
def _is_last(pools, state, pool):
    """Whether all other programs for the pool are through; what they wrote can be read then, past the cache."""
    num_programs = tl.load(pools + 6 * pool + 5) * tl.num_programs(0)
    tl.debug_barrier()  # all warps of this one are
    is_last = tl.atomic_add(state + 8, 1, sem="acq_rel") == num_programs - 1
    if is_last:
        tl.store(state + 8, 0)
    return is_last


@triton.jit
def _sample(
    tensors,
    pools,
    samples,
    states,
    ABS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BITS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Ranks at places drawn from equal stretches of a tensor, and from them the first interval of its pool."""
    scores, numel, pool, before = _tensor(tensors, tl.program_id(1))
    first = tl.load(tensors + 7 * tl.program_id(1) + 4)
    num_samples = tl.load(tensors + 7 * tl.program_id(1) + 5)
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    is_wanted = i < num_samples
    begin = i * numel // tl.maximum(num_samples, 1)
    length = tl.maximum((i + 1) * numel // tl.maximum(num_samples, 1) - begin, 1)
    # A multiplicative hash, so that scores which lie in a pattern are not always met at the same place of it.
    drawn = ((i * 2654435761) & 0xFFFFFFFF) * 40503 >> 8
    at = begin + (drawn & 0x7FFFFF) % length
    values = tl.load(scores + at, mask=is_wanted, other=0.0)
    tl.store(samples + pool * WIDTH + first + i, _rank(values, before + at, ABS), mask=is_wanted)
    state = states + _STATE * pool
    if _is_last(pools, state, pool):
        row = pools + 6 * pool
        ranks = tl.load(samples + pool * WIDTH + tl.arange(0, WIDTH), volatile=True)
        nth_high, nth_low = tl.load(row + 1), tl.load(row + 2)
        # The n-th largest are found bit by bit; the bits that are left open are all ones or all zeros.
        low = tl.full((), -0x8000000000000000, dtype=tl.int64)
        high = low
        for bit in range(NUM_BITS):
            step = tl.full((), 1, tl.int64) << (63 - bit)
            low = tl.where(tl.sum((ranks >= low + step).to(tl.int32), 0) >= nth_low, low + step, low)
            high = tl.where(tl.sum((ranks >= high + step).to(tl.int32), 0) >= nth_high, high + step, high)
        high += (tl.full((), 1, tl.int64) << (64 - NUM_BITS)) - 1
        low = tl.where(nth_low == 0, tl.load(row + 3), low)
        high = tl.where(nth_high == 0, tl.load(row + 4), high)
        _set_interval(state, low, high, low == high, NUM_PARTS)


@triton.jit
def _set_interval(state, low, high, is_found, NUM_PARTS: tl.constexpr):
    # The least width of a part with which there are no more than NUM_PARTS.
    width = (high - low).to(tl.uint64)
    part = tl.sum(((width >> tl.arange(0, 64).to(tl.uint64)) >= NUM_PARTS).to(tl.int64), 0)
    tl.store(state, low)
    tl.store(state + 1, high)
    tl.store(state + 2, part)
    tl.store(state + 3, is_found.to(tl.int64))


@triton.jit
def _room(tensors, i, numel, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """Where this program's room for gathered ranks begins, and how many have room."""
    num_programs = tl.minimum(tl.num_programs(0).to(tl.int64), (numel + BLOCK - 1) // BLOCK)
    num = numel // ROOM // num_programs
    return tl.load(tensors + 7 * i + 6) + tl.program_id(0) * num, num


@triton.jit
def _gather(
    tensors,
    pools,
    states,
    gathered,
    nums,
    ABS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Each program's ranks inside the interval and how many, and how many of the pool are above it and inside."""
    scores, numel, pool, before = _tensor(tensors, tl.program_id(1))
    state = states + _STATE * pool
    if tl.load(state + 3) == 0:
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        if begin < numel:
            low, high = tl.load(state), tl.load(state + 1)
            first, num_room = _room(tensors, tl.program_id(1), numel, BLOCK, ROOM)
            num = nums + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) + tl.zeros((BLOCK,), dtype=tl.int32)
            num_above = tl.zeros((BLOCK,), dtype=tl.int32)
            num_inside = tl.zeros((BLOCK,), dtype=tl.int32)
            while begin < numel:
                at = begin + tl.arange(0, BLOCK)
                is_there = at < numel
                rank = _rank(tl.load(scores + at, mask=is_there, other=0.0), before + at, ABS)
                is_inside = is_there & (rank >= low) & (rank <= high)
                place = tl.atomic_add(num, 1, mask=is_inside, sem="relaxed")
                tl.store(gathered + first + place, rank, mask=is_inside & (place < num_room))
                num_above += (is_there & (rank > high)).to(tl.int32)
                num_inside += is_inside.to(tl.int32)
                begin += tl.num_programs(0) * BLOCK
            found = tl.sum(num_inside, 0).to(tl.int64)
            tl.atomic_add(state + 5, tl.sum(num_above, 0).to(tl.int64), sem="relaxed")
            tl.atomic_add(state + 6, found, sem="relaxed")
            if found > num_room:
                tl.store(state + 7, 1)
        if _is_last(pools, state, pool):
            _settle(pools, pool, state, NUM_PARTS)


@triton.jit
def _settle(pools, pool, state, NUM_PARTS: tl.constexpr):
    """Whether to go on with the gathered ranks, and where the k-th is if it is not among them."""
    row = pools + 6 * pool
    k, low, high = tl.load(row), tl.load(state), tl.load(state + 1)
    num_above, num_inside = tl.load(state + 5, volatile=True), tl.load(state + 6, volatile=True)
    had_no_room = tl.load(state + 7, volatile=True)
    tl.debug_barrier()  # each warp has loaded what one of them is about to overwrite
    is_above, is_below = k <= num_above, k > num_above + num_inside
    has_all = ((is_above | is_below) == 0) & (had_no_room == 0)
    tl.store(state + 4, has_all.to(tl.int64))
    # Passes over all scores count those above anew.
    tl.store(state + 5, tl.where(has_all, num_above, 0))
    new_low = tl.where(is_above, high + 1, tl.where(is_below, tl.load(row + 3), low))
    new_high = tl.where(is_above, tl.load(row + 4), tl.where(is_below, low - 1, high))
    _set_interval(state, new_low, new_high, new_low == new_high, NUM_PARTS)


@triton.jit
def _count(
    tensors,
    pools,
    states,
    gathered,
    nums,
    counts,
    ABS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Number of ranks in each part of their pool's interval, and above it (in the last place); go on where the k-th is.

    A border is found where a part is wanted whole; with EXACT it has to be the k-th rank itself.
    """
    scores, numel, pool, before = _tensor(tensors, tl.program_id(1))
    state = states + _STATE * pool
    if tl.load(state + 3) == 0:
        own = counts + pool * (NUM_PARTS + 1)
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        if begin < numel:
            low, high, part = tl.load(state), tl.load(state + 1), tl.load(state + 2).to(tl.uint64)
            num_above = tl.zeros((BLOCK,), dtype=tl.int32)
            is_gathered = tl.load(state + 4) != 0
            end, stride = numel, tl.num_programs(0).to(tl.int64) * BLOCK
            first, _ = _room(tensors, tl.program_id(1), numel, BLOCK, ROOM)
            if is_gathered:
                begin = begin * 0
                end = tl.load(nums + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
                stride = stride * 0 + BLOCK
            while begin < end:
                at = begin + tl.arange(0, BLOCK)
                is_there = at < end
                if is_gathered:
                    rank = tl.load(gathered + first + at, mask=is_there, other=0)
                else:
                    rank = _rank(tl.load(scores + at, mask=is_there, other=0.0), before + at, ABS)
                place = ((rank - low).to(tl.uint64) >> part).to(tl.int32)
                tl.atomic_add(own + place, 1, mask=is_there & (rank >= low) & (rank <= high), sem="relaxed")
                num_above += (is_there & (rank > high)).to(tl.int32)
                begin += stride
            found = tl.sum(num_above, 0)
            if found > 0:
                tl.atomic_add(own + NUM_PARTS, found, sem="relaxed")
        if _is_last(pools, state, pool):
            _narrow(pools, pool, state, own, EXACT, NUM_PARTS)


@triton.jit
def _narrow(pools, pool, state, own, EXACT: tl.constexpr, NUM_PARTS: tl.constexpr):
    """Go on where the k-th rank lies. Counts become zero again."""
    k = tl.load(pools + 6 * pool) - tl.load(state + 5)
    low, high, part = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    places = tl.arange(0, NUM_PARTS)
    # No pool has more scores than 32 bits without a sign count.
    found = tl.load(own + places, volatile=True).to(tl.uint32, bitcast=True).to(tl.int64)
    num_above = tl.load(own + NUM_PARTS, volatile=True).to(tl.uint32, bitcast=True).to(tl.int64)
    tl.debug_barrier()  # each warp has loaded what one of them is about to overwrite
    tl.store(own + places, tl.zeros((NUM_PARTS,), dtype=tl.int32))
    tl.store(own + NUM_PARTS, 0)
    num_from = num_above + tl.sum(found, 0) - tl.cumsum(found, 0) + found  # in this part or above it
    place = tl.max(tl.where(num_from >= k, places, 0), 0).to(tl.int64)
    is_whole = tl.sum(tl.where(places == place, num_from, 0), 0) == k
    new_low = low + (place << part)
    new_high = new_low + ((tl.full((), 1, tl.int64) << part) - 1)
    # The interval may end before its last part does, whose end may be past the largest integer.
    new_high = tl.where((new_high > high) | (new_high < new_low), high, new_high)
    is_found = part == 0
    if not EXACT:
        is_found = is_found | is_whole
    _set_interval(state, new_low, new_high, is_found, NUM_PARTS)


@triton.jit
def _pack(
    tensors, borders, stride, packed, num_nan, ABS: tl.constexpr, NUM_BYTES: tl.constexpr, NUM_BLOCKS: tl.constexpr
):
    """Bits of the ranks from their pool's border on, little bit first; `borders` are `stride` apart."""
    scores, numel, pool, before = _tensor(tensors, tl.program_id(1))
    begin = tl.program_id(0).to(tl.int64) * (NUM_BYTES * NUM_BLOCKS)
    if begin * 8 < numel:
        border = tl.load(borders + pool * stride)
        first_byte = tl.load(tensors + 7 * tl.program_id(1) + 6)
        eight = tl.arange(0, 8)[None, :]
        nans = tl.zeros((NUM_BYTES, 8), dtype=tl.int32)
        for i in range(NUM_BLOCKS):
            byte = begin + i * NUM_BYTES + tl.arange(0, NUM_BYTES)
            at = byte[:, None] * 8 + eight
            values = tl.load(scores + at, mask=at < numel, other=0.0)
            is_kept = _rank(values, before + at, ABS) >= border
            bits = tl.sum(is_kept.to(tl.int32) << eight, 1)
            tl.store(packed + first_byte + byte, bits.to(tl.uint8), mask=byte * 8 < numel)
            nans += (values != values).to(tl.int32)
        found = tl.sum(tl.sum(nans, 1), 0)
        if found > 0:
            tl.atomic_add(num_nan, found, sem="relaxed")


@triton.jit
def _flips(before, after, result, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < numel
    bits = tl.load(before + at, mask=is_there, other=0) ^ tl.load(after + at, mask=is_there, other=0)
    # Pairs, then fours, then bytes are added up in place.
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = (bits & 0x00FF00FF) + ((bits >> 8) & 0x00FF00FF)
    tl.atomic_add(result, tl.sum((bits & 0xFF) + (bits >> 16), 0).to(tl.int64), sem="relaxed")


@triton.jit
def _apply(weight, packed, reference, result, numel, HAS_REFERENCE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < numel
    values = tl.load(weight + at, mask=is_there)
    bits = tl.load(packed + (at >> 3), mask=is_there, other=0)
    is_kept = ((bits.to(tl.int32) >> (at & 7).to(tl.int32)) & 1) != 0
    if HAS_REFERENCE:
        others = tl.load(reference + at, mask=is_there)
    else:
        others = tl.zeros((BLOCK,), dtype=values.dtype)
    tl.store(result + at, tl.where(is_kept, values, others), mask=is_there)


@triton.jit
def _gradient(
    grad_weight,
    weight,
    reference,
    scores,
    result,
    numel,
    ABS: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < numel
    change = tl.load(weight + at, mask=is_there, other=0).to(tl.float32)
    if HAS_REFERENCE:
        change -= tl.load(reference + at, mask=is_there, other=0).to(tl.float32)
    grad = tl.load(grad_weight + at, mask=is_there, other=0).to(tl.float32) * change
    if ABS:
        grad = tl.where(tl.load(scores + at, mask=is_there, other=0) > 0, grad, -grad)
    tl.store(result + at, grad, mask=is_there)


class _Plan(NamedTuple):
    """What a choice needs to know of its tensors, on their device.

    Attributes:
        tensors: for each its address, size, pool, first place in the pool, first place in the pool's sample, number of
            samples, and first byte of its packed mask.
        pools: for each k, the ranks in its sample of the first interval's ends, from 1 (0: there is none), the lowest
            and the highest rank that a score can have, and its number of tensors.
        num_blocks: blocks of the largest tensor.
        first_bytes: where each packed mask begins, and where the last one ends.
    """

    tensors: Tensor
    pools: Tensor
    num_blocks: int
    first_bytes: list[int]


@lru_cache(maxsize=32)
def _plan(
    addresses: tuple[int, ...], sizes: tuple[int, ...], ks: tuple[int, ...], abs_: bool, exact: bool, device: Any
) -> _Plan:
    """As many `ks` as tensors, or one for all of them together; `exact` as in `_borders`."""
    members = [[i] for i in range(len(sizes))] if len(ks) == len(sizes) else [list(range(len(sizes)))]
    rows: list[list[int]] = [[] for _ in sizes]
    pools = []
    first_bytes = [0]
    for size in sizes:
        first_bytes.append(first_bytes[-1] + triton.cdiv(size // 8, _ALIGNMENT) * _ALIGNMENT)
    for pool, (places, k) in enumerate(zip(members, ks, strict=True)):
        num_scores = sum(sizes[i] for i in places)
        before = first = 0
        for i in places:
            end = (before + sizes[i]) * _SAMPLE // num_scores
            rows[i] = [addresses[i], sizes[i], pool, before, first, end - first, first_bytes[i]]
            before, first = before + sizes[i], end
        nth_high = nth_low = 0
        lowest, highest = 0 if abs_ else _LOWEST, _HIGHEST
        if k in (0, num_scores) and not exact:  # any border does that keeps nothing, or everything
            lowest = highest = _HIGHEST if k == 0 else _LOWEST
        elif num_scores >= _LEAST_TO_SAMPLE:
            share = k / num_scores
            margin = _MARGIN * math.sqrt(_SAMPLE * share * (1 - share)) + 1
            nth_high = max(math.floor(share * _SAMPLE - margin), 0)
            nth_low = math.ceil(share * _SAMPLE + margin)
            nth_low = nth_low if nth_low <= _SAMPLE else 0
        pools.append([k, nth_high, nth_low, lowest, highest, len(places)])
    num_blocks = triton.cdiv(max(sizes), _BLOCK)
    return _Plan(torch.tensor(rows).to(device), torch.tensor(pools).to(device), num_blocks, first_bytes)


@lru_cache(maxsize=8)
def _border_of(threshold: float, device: Any) -> Tensor:
    bits = struct.unpack("<i", struct.pack("<f", threshold))[0]
    key = -(bits & 0x7FFFFFFF) if bits < 0 else bits
    return torch.tensor([key << 32]).to(device)


def try_on(device: torch.device) -> None:
    """Compile and launch the smallest kernel; raises whatever keeps it from running."""
    weight = torch.ones(16, device=device)
    apply_packed(weight, torch.zeros(2, dtype=torch.uint8, device=device), None, weight)


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
    return is_fit and (sum(sizes) if merge else max(sizes)) < MAX_POOL


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
    device = scores[0].device
    num_nan = torch.zeros((), dtype=torch.int64, device=device)
    masks: list[Tensor] = []
    with _on(scores[0]):
        if threshold is None and len(ks) < len(scores):
            return _choose(scores, tuple(ks), abs_, None, num_nan), num_nan
        for lot in _lots([t.numel() for t in scores]):
            wanted = tuple(ks[lot]) if threshold is None else (1,) * len(scores[lot])
            masks += _choose(scores[lot], wanted, abs_, threshold, num_nan)
    return masks, num_nan


def _lots(sizes: Sequence[int]) -> list[slice]:
    """Tensors that are chosen together: as many as there is temporary memory for, of a byte a score."""
    lots, begin, num_scores = [], 0, 0
    for i, size in enumerate(sizes):
        if num_scores and num_scores + size > _LOT:
            lots.append(slice(begin, i))
            begin, num_scores = i, 0
        num_scores += size
    return [*lots, slice(begin, len(sizes))]


def _choose(
    scores: Sequence[Tensor], ks: tuple[int, ...], abs_: bool, threshold: float | None, num_nan: Tensor
) -> list[Tensor]:
    device = scores[0].device
    plan = _plan(tuple(t.data_ptr() for t in scores), tuple(t.numel() for t in scores), ks, abs_, False, device)
    packed = torch.empty(plan.first_bytes[-1], dtype=torch.uint8, device=device)
    # One threshold is the border of all pools.
    borders, stride = (_borders(plan, abs_), _STATE.value) if threshold is None else (_border_of(threshold, device), 0)
    grid = (triton.cdiv(max(t.numel() for t in scores), _PACKED), len(scores))
    program = {"NUM_BYTES": _PACKED // 32, "NUM_BLOCKS": 4, "num_warps": 8}
    _pack[grid](plan.tensors, borders, stride, packed, num_nan, ABS=abs_, **program)
    shapes = [packed_shape((t.shape[0], t.shape[1])) for t in scores]
    return [
        packed[begin : begin + math.prod(shape)].view(shape)
        for begin, shape in zip(plan.first_bytes, shapes, strict=False)
    ]


def kth_largest(scores: Sequence[Tensor], k: int, *, abs_: bool) -> Tensor:
    """The k-th largest score (or size of one) over all tensors, k from 1; a float32 scalar on the device."""
    addresses, sizes = tuple(t.data_ptr() for t in scores), tuple(t.numel() for t in scores)
    plan = _plan(addresses, sizes, (k,), abs_, True, scores[0].device)
    with _on(scores[0]):
        rank = _borders(plan, abs_, exact=True)[0, 0]
    key = (rank >> 32).to(torch.int32)
    lowest = torch.iinfo(torch.int32).min
    return torch.where(key < 0, lowest - key, key).view(torch.float32)


def _borders(plan: _Plan, abs_: bool, *, exact: bool = False) -> Tensor:
    """For each pool the k-th rank, or one that parts it from the next; in the first of its state's columns."""
    tensors, pools, device = plan.tensors, plan.pools, plan.tensors.device
    num_pools, num_tensors = len(pools), len(tensors)
    grid = (min(plan.num_blocks, max(_NUM_PROGRAMS, _ALL_PROGRAMS // num_tensors)), num_tensors)
    program = {"ABS": abs_, "NUM_PARTS": _NUM_PARTS, "num_warps": _NUM_WARPS}
    passes = program | {"BLOCK": _BLOCK, "ROOM": _ROOM}
    samples = torch.empty((num_pools, _SAMPLE), dtype=torch.int64, device=device)
    states = torch.zeros((num_pools, _STATE.value), dtype=torch.int64, device=device)
    gathered = torch.empty(plan.first_bytes[-1] * 8 // _ROOM, dtype=torch.int64, device=device)
    nums = torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=device)
    counts = torch.zeros((num_pools, _NUM_PARTS + 1), dtype=torch.int32, device=device)
    drawn = program | {"WIDTH": _SAMPLE, "BLOCK": 1024, "NUM_BITS": _SAMPLED_BITS}
    _sample[(triton.cdiv(_SAMPLE, 1024), num_tensors)](tensors, pools, samples, states, **drawn)
    _gather[grid](tensors, pools, states, gathered, nums, **passes)
    for _ in range(_NUM_PASSES):
        _count[grid](tensors, pools, states, gathered, nums, counts, EXACT=exact, **passes)
    return states


def num_flipped(before: Tensor, after: Tensor) -> Tensor:
    """Number of bits in which two packed masks differ, contiguous and of whole words; an int64 scalar on the device."""
    result = torch.zeros((), dtype=torch.int64, device=before.device)
    words = before.view(-1).view(torch.int32), after.view(-1).view(torch.int32)
    with _on(before):
        _flips[(triton.cdiv(len(words[0]), _ELEMENTS),)](*words, result, len(words[0]), BLOCK=_ELEMENTS)
    return result


def apply_packed(weight: Tensor, packed: Tensor, reference: Tensor | None, result: Tensor) -> None:
    """Write `weight` with the left-out places at zero, or at `reference`, to `result`; contiguous, of whole bytes."""
    others = weight if reference is None else reference
    numel, options = weight.numel(), {"HAS_REFERENCE": reference is not None, "BLOCK": _ELEMENTS}
    with _on(weight):
        _apply[(triton.cdiv(numel, _ELEMENTS),)](weight, packed, others, result, numel, **options)


def score_gradient(
    grad_weight: Tensor, weight: Tensor, scores: Tensor, reference: Tensor | None, result: Tensor, *, abs_: bool
) -> None:
    """Write the straight-through gradient to `result`, float32, which may be `grad_weight`; all contiguous."""
    others = weight if reference is None else reference
    numel, options = weight.numel(), {"ABS": abs_, "HAS_REFERENCE": reference is not None, "BLOCK": _ELEMENTS}
    with _on(weight):
        _gradient[(triton.cdiv(numel, _ELEMENTS),)](grad_weight, weight, others, scores, result, numel, **options)
