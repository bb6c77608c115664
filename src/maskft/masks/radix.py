"""The k largest of several tensors digit by digit (radix selection): on an accelerator, and split over processes.

A score is an integer of the same order. From the top, 11 bits at a time, the scores whose upper digits are those of the
k-th are counted by their next one; float32 takes three passes. Equal scores are resolved in the same way by their
position, the earlier one is kept. Counts, digits and ranks stay tensors on the device and every shape is known
beforehand, so on one accelerator the host waits for nothing. Between processes only counts are sent: `reduce` sums
them, all pools together, so the number of all-reduces does not depend on the number of tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

Reduce = Callable[[Tensor], Tensor]
"""Sums an int64 tensor over the processes that hold the shards; every one of them gets the sum."""

_DIGIT_BITS = 11
_NUM_DIGITS = 1 << _DIGIT_BITS
_KEY_DTYPES = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Shard:
    """This process's part of a tensor: an unbroken run of its elements in row-major order.

    Attributes:
        values: the part, of any shape; empty where the process holds none.
        start: position of its first element in the whole tensor.
        num_total: number of elements of the whole tensor.
    """

    values: Tensor
    start: int
    num_total: int


def alone(counts: Tensor) -> Tensor:
    """The `Reduce` of a single process, which holds all tensors whole."""
    return counts


def all_reduce_sum(group: dist.ProcessGroup | None = None) -> Reduce:
    """The sum over the processes of `group` (default: all)."""

    def reduce(counts: Tensor) -> Tensor:
        dist.all_reduce(counts, group=group)
        return counts

    return reduce


def wide(values: Tensor) -> Tensor:
    """`values` in float32 where they are narrower; that loses nothing."""
    return values if values.dtype in _KEY_DTYPES else values.to(torch.float32)


def kth_of_shards(shards: Sequence[Shard], k: int, reduce: Reduce, *, abs_: bool) -> Tensor:
    """The k-th largest score (or size) over all tensors, k from 1; a float32 or float64 scalar on the device."""
    keys = [_ordered_key(shard.values, abs_) for shard in shards]
    (kth,), _, _ = _kth_keys([keys], _counts([k], keys[0]), 8 * keys[0].dtype.itemsize, reduce)
    key = kth.to(keys[0].dtype)
    dtype = wide(shards[0].values).dtype
    return torch.where(key < 0, key ^ torch.iinfo(key.dtype).max, key).view(dtype)


def top_of_shards(
    pools: Sequence[Sequence[Shard]], ks: Sequence[int], reduce: Reduce, *, abs_: bool
) -> list[list[Tensor]]:
    """Masks of the largest scores (or sizes) of each pool.

    Args:
        pools: parts that compete with each other, each `start` counted over all tensors of its pool; of one dtype.
        ks: how many are kept of each pool, from 1.
        reduce: sums counts over the processes, which all call this with the same pools.
        abs_: rank the sizes.

    Returns:
        By pool, boolean tensors of the shapes of the parts.
    """
    keys = [[_ordered_key(shard.values, abs_) for shard in pool] for pool in pools]
    like = keys[0][0]
    kths, num_wanted, num_equal = _kth_keys(keys, _counts(ks, like), 8 * like.dtype.itemsize, reduce)
    # Several processes wait for their counts anyway; one does not ask whether there are ties to resolve.
    if reduce is not alone and torch.equal(num_wanted, num_equal):
        kept = [[part >= kth for part in parts] for parts, kth in zip(keys, kths, strict=True)]
    else:
        kept = _resolve_ties(pools, keys, kths, num_wanted, reduce)
    return [
        [mask.view(shard.values.shape) for mask, shard in zip(masks, pool, strict=True)]
        for masks, pool in zip(kept, pools, strict=True)
    ]


def _resolve_ties(
    pools: Sequence[Sequence[Shard]], keys: list[list[Tensor]], kths: Tensor, num_wanted: Tensor, reduce: Reduce
) -> list[list[Tensor]]:
    """Flat masks of the keys above their pool's k-th, and of the first `num_wanted` of those equal to it."""
    lowest = torch.iinfo(torch.int64).min >> 1
    # Negative, so that the earliest is the largest.
    positions = [
        [
            torch.where(part == kth, -1 - shard.start - torch.arange(len(part), device=part.device), lowest)
            for shard, part in zip(pool, parts, strict=True)
        ]
        for pool, parts, kth in zip(pools, keys, kths, strict=True)
    ]
    num_bits = max(sum(shard.num_total for shard in pool) for pool in pools).bit_length() + 1
    lasts, _, _ = _kth_keys(positions, num_wanted, num_bits, reduce)
    return [
        [(part > kth) | (at >= last) for part, at in zip(parts, ats, strict=True)]
        for parts, ats, kth, last in zip(keys, positions, kths, lasts, strict=True)
    ]


def _kth_keys(
    keys: Sequence[Sequence[Tensor]], ks: Tensor, num_bits: int, reduce: Reduce
) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th largest of each pool of integer keys, how many equal to it are among the k largest, and of how many.

    `keys` by pool are flat; those that `num_bits` with a sign cannot hold are left out. All results are int64, one for
    each pool. `ks` may be more than a pool has where its masks have no meaning (NaN).
    """
    found = torch.full_like(ks, -1 << (num_bits - 1))
    num_equal = ks
    for shift in range((num_bits - 1) // _DIGIT_BITS * _DIGIT_BITS, -1, -_DIGIT_BITS):
        pools = zip(keys, found, strict=True)
        counts = [torch.stack([_histogram(part, low, shift) for part in parts]).sum(0) for parts, low in pools]
        from_top = reduce(torch.stack(counts)).flip(1)
        not_below = from_top.cumsum(1)
        column = (not_below < ks.unsqueeze(1)).sum(1, keepdim=True).clamp_(max=_NUM_DIGITS - 1)
        num_equal = from_top.gather(1, column).squeeze(1)
        ks = ks - (not_below.gather(1, column).squeeze(1) - num_equal)
        found = found + ((_NUM_DIGITS - 1 - column.squeeze(1)) << shift)
    return found, ks, num_equal


def _histogram(keys: Tensor, low: Tensor, shift: int) -> Tensor:
    """Number of keys for each value of the digit at `shift`, among those whose upper digits are those of `low`."""
    digits = ((keys >> shift) - (low >> shift)).clamp_(-1, _NUM_DIGITS)
    if digits.device.type == "cpu":
        return torch.bincount(digits + 1, minlength=_NUM_DIGITS + 2)[1:-1]
    # There, bincount would wait for the largest value.
    counts = torch.histc(digits.to(torch.int32), bins=_NUM_DIGITS + 1, min=0, max=_NUM_DIGITS + 1)
    return counts[:_NUM_DIGITS].to(torch.int64)


def _counts(numbers: Sequence[int], like: Tensor) -> Tensor:
    # Filled there: a copy from the host would wait for what the device is at.
    return torch.stack([torch.full((), number, dtype=torch.int64, device=like.device) for number in numbers])


def _ordered_key(values: Tensor, abs_: bool) -> Tensor:
    """Flat signed integers in the order of `values`; -0.0 and 0.0 are one. int32 for float32, int64 for float64."""
    flat = wide(values).reshape(-1)
    flat = flat.abs() if abs_ else flat + 0.0
    bits = flat.view(_KEY_DTYPES[flat.dtype])
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
