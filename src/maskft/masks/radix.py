"""The k largest of several tensors digit by digit (radix selection): on an accelerator, and split over processes.

A score is an integer of the same order. From the top, 11 bits at a time, the scores whose upper digits are those of the
k-th are counted by their next one; float32 takes three passes. Equal scores are resolved in the same way by their
position, the earlier one is kept. Counts, digits and ranks stay tensors on the device and every shape is known
beforehand, so on one accelerator the host waits for nothing. Between processes only counts are sent: `reduce` sums
them, all pools together, so the number of all-reduces does not depend on the number of tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

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


def top_of_shards(shards: Sequence[Shard], ks: Sequence[int], reduce: Reduce, *, abs_: bool) -> list[Tensor]:
    """Masks of the largest scores (or sizes): boolean, of the shapes of the parts.

    Args:
        shards: this process's part of each tensor, all of one dtype.
        ks: how many are kept of each tensor, or one number for all tensors together; from 1.
        reduce: sums counts over the processes, which all call this with their parts of the same tensors.
        abs_: rank the sizes.
    """
    is_merged = len(ks) == 1
    pools = [0] * len(shards) if is_merged else range(len(shards))
    keys = [_ordered_key(shard.values, abs_) for shard in shards]
    kths, num_wanted, num_equal = _kth_keys(keys, pools, _filled(ks, keys[0]), 8 * keys[0].dtype.itemsize, reduce)
    # Several processes wait for their counts anyway; one does not ask whether there are ties to resolve.
    if reduce is not alone and torch.equal(num_wanted, num_equal):
        masks = [key >= kths[pool] for key, pool in zip(keys, pools, strict=True)]
    else:
        # Positions are counted on from one tensor to the next, and negative, so that the earliest is the largest.
        ends = list(accumulate(shard.num_total for shard in shards))
        num_bits = ends[-1].bit_length() + 1
        dtype = torch.int32 if num_bits < 32 else torch.int64
        positions = []
        for key, pool, shard, end in zip(keys, pools, shards, ends, strict=True):
            first = shard.start + (end - shard.num_total if is_merged else 0)
            position = -1 - first - torch.arange(len(key), dtype=dtype, device=key.device)
            positions.append(torch.where(key == kths[pool], position, torch.iinfo(dtype).min))
        lasts, _, _ = _kth_keys(positions, pools, num_wanted, num_bits, reduce)
        tied = zip(keys, positions, pools, strict=True)
        masks = [(key > kths[pool]) | (position >= lasts[pool]) for key, position, pool in tied]
    return [mask.view(shard.values.shape) for mask, shard in zip(masks, shards, strict=True)]


def _kth_keys(
    keys: Sequence[Tensor], pools: Sequence[int], ks: Tensor, num_bits: int, reduce: Reduce
) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th largest of each pool of integer keys, how many equal to it are among the k largest, and of how many.

    `keys` are flat, of the pools whose numbers are `pools`; those that `num_bits` with a sign cannot hold are left out.
    `ks` and all results are int64, one for each pool.
    """
    found, num_equal = torch.full_like(ks, -1 << (num_bits - 1)), ks
    for shift in range((num_bits - 1) // _DIGIT_BITS * _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = ks.new_zeros((len(ks), _NUM_DIGITS))
        for key, pool in zip(keys, pools, strict=True):
            counts[pool] += _histogram(key, found[pool], shift)
        from_top = reduce(counts).flip(1)
        not_below = from_top.cumsum(1)
        # No digit is past the last, whatever scores that are NaN, whose masks have no meaning, did to the counts.
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


def _filled(numbers: Sequence[int], like: Tensor) -> Tensor:
    # Filled there: a copy from the host would wait for what the device is at.
    return torch.stack([torch.full((), number, dtype=torch.int64, device=like.device) for number in numbers])


def _ordered_key(values: Tensor, abs_: bool) -> Tensor:
    """Flat signed integers in the order of `values`; -0.0 and 0.0 are one. int32 for float32, int64 for float64."""
    flat = wide(values).reshape(-1)
    flat = flat.abs() if abs_ else flat + 0.0
    bits = flat.view(_KEY_DTYPES[flat.dtype])
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
