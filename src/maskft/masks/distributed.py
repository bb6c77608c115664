"""Selection over scores that are sharded across processes: the masks of :func:`maskft.masks.select`, bit for bit.

No score leaves its process. The k-th largest is found digit by digit (radix selection, 8 bits at a time): each process
counts its own scores by the next digit of an order-preserving integer, the counts are summed over the processes, and
the digit that holds the k-th is known to all. Equal scores are resolved in the same way by their position in the whole
tensor, the earlier one is kept. All tensors go through one round together, so a choice costs 5 all-reduces in
float32, or up to 10 where scores tie at the border, whatever the number of tensors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from maskft.errors import MaskftError
from maskft.masks.keys import ordered_key, value_of_key, wide
from maskft.masks.selection import SELECTIONS, ScoreTransform, Selection, num_kept, transform_scores

Reduce = Callable[[Tensor], Tensor]
"""Sums an int64 tensor over the processes that hold the shards; every one of them gets the sum."""

_DIGIT_BITS = 8
_NUM_DIGITS = 1 << _DIGIT_BITS


@dataclass(frozen=True)
class Shard:
    """This process's part of a tensor: an unbroken run of its elements in row-major order.

    Attributes:
        values: the part, of any shape; empty where the process holds none.
        start: place of its first element in the whole tensor.
        num_total: number of elements of the whole tensor.
    """

    values: Tensor
    start: int
    num_total: int


def all_reduce_sum(group: dist.ProcessGroup | None = None) -> Reduce:
    """The sum over the processes of `group` (default: all)."""

    def reduce(counts: Tensor) -> Tensor:
        dist.all_reduce(counts, group=group)
        return counts

    return reduce


def select_sharded(
    shards: Sequence[Shard],
    reduce: Reduce,
    *,
    selection: Selection,
    density: float = 0.9,
    threshold: float = 0.0,
    score_transform: ScoreTransform = "abs",
) -> list[Tensor]:
    """This process's parts of the masks that :func:`maskft.masks.select` makes of the whole tensors.

    Every process of `reduce` calls it with the same settings and with its parts of the same tensors, in one order.

    Args:
        shards: this process's part of each tensor, all of one dtype: float32, float64 or bfloat16.
        reduce: sums counts over the processes.
        selection: as in `select`; so are `density`, `threshold` and `score_transform`.

    Returns:
        Boolean tensors of the shapes of the parts; True is kept.

    Raises:
        MaskftError: a score of any process is NaN; raised on all of them.
    """
    if selection not in SELECTIONS:
        raise MaskftError(f"`selection` must be one of {', '.join(SELECTIONS)}, got {selection!r}.")
    if not shards:
        return []
    _refuse_nan(shards, reduce)
    values = [transform_scores(shard.values, score_transform) for shard in shards]
    if selection == "threshold":
        return [value >= threshold for value in values]
    pools = _pools(shards, values, merge=selection == "global_topk")
    ks = [num_kept(sum(part.num_total for part in pool), density) for pool in pools]
    return _choose(pools, ks, reduce)


def kth_largest_sharded(shards: Sequence[Shard], k: int, reduce: Reduce, score_transform: ScoreTransform) -> Tensor:
    """The k-th largest transformed score over all tensors (k counts from 1); a scalar, equal on all processes."""
    values = [wide(transform_scores(shard.values, score_transform)) for shard in shards]
    (found,) = _kth_keys([[ordered_key(value) for value in values]], [k], reduce)
    return value_of_key(found.value, values[0].dtype)


def _pools(shards: Sequence[Shard], values: Sequence[Tensor], *, merge: bool) -> list[list[Shard]]:
    """Parts that compete with each other, each with its place among them: one tensor, or all of them."""
    if not merge:
        return [[Shard(v, s.start, s.num_total)] for s, v in zip(shards, values, strict=True)]
    pool = []
    num_before = 0
    for shard, value in zip(shards, values, strict=True):
        pool.append(Shard(value, num_before + shard.start, shard.num_total))
        num_before += shard.num_total
    return [pool]


def _choose(pools: Sequence[Sequence[Shard]], ks: Sequence[int], reduce: Reduce) -> list[Tensor]:
    """Masks of the `ks` largest of each pool, for the parts of all pools in order."""
    keys = [[ordered_key(part.values) for part in pool] for pool in pools]
    found = _kth_keys(keys, ks, reduce)
    masks = [[key >= kth.value for key in pool_keys] for pool_keys, kth in zip(keys, found, strict=True)]
    tied = [i for i, kth in enumerate(found) if kth.num_wanted < kth.num_equal]
    if tied:
        _break_ties(
            [pools[i] for i in tied],
            [[(key == found[i].value).nonzero().squeeze(1) for key in keys[i]] for i in tied],
            [found[i].num_wanted for i in tied],
            reduce,
            [masks[i] for i in tied],
        )
    return [
        mask.view(part.values.shape)
        for pool, pool_masks in zip(pools, masks, strict=True)
        for part, mask in zip(pool, pool_masks, strict=True)
    ]


def _break_ties(
    pools: Sequence[Sequence[Shard]],
    ties: Sequence[Sequence[Tensor]],
    nums_wanted: Sequence[int],
    reduce: Reduce,
    masks: Sequence[Sequence[Tensor]],
) -> None:
    """Of the scores equal to the k-th, leave in the flat `masks` as many as are wanted, the earliest ones.

    `ties` are their places in each part, flattened.
    """
    num_places = max(sum(part.num_total for part in pool) for pool in pools)
    # The largest of these keys is the earliest place; none is negative.
    keys = [
        [num_places - (places + part.start) for part, places in zip(pool, pool_ties, strict=True)]
        for pool, pool_ties in zip(pools, ties, strict=True)
    ]
    lasts = _kth_keys(keys, nums_wanted, reduce, num_bits=num_places.bit_length())
    for pool_keys, pool_ties, pool_masks, last in zip(keys, ties, masks, lasts, strict=True):
        for key, places, mask in zip(pool_keys, pool_ties, pool_masks, strict=True):
            mask[places[key < last.value]] = False


@dataclass(frozen=True)
class _Kth:
    """The k-th largest key (a scalar), how many keys equal to it are among the k largest, and how many there are."""

    value: Tensor
    num_wanted: int
    num_equal: int


def _kth_keys(
    keys: Sequence[Sequence[Tensor]], ks: Sequence[int], reduce: Reduce, num_bits: int | None = None
) -> list[_Kth]:
    """The k-th largest of each pool of integer keys, over all processes.

    Args:
        keys: this process's keys by pool, flat, of one dtype.
        ks: the rank in each pool, from 1.
        reduce: sums counts over the processes.
        num_bits: width of the keys where none is negative; by default that of their dtype, with its sign.
    """
    dtype, device = keys[0][0].dtype, keys[0][0].device
    num_rounds = math.ceil((num_bits or 8 * dtype.itemsize) / _DIGIT_BITS)
    candidates = [list(pool) for pool in keys]
    wanted = torch.tensor(ks, dtype=torch.int64)
    found = torch.zeros(len(keys), dtype=torch.int64)
    for shift in range((num_rounds - 1) * _DIGIT_BITS, -1, -_DIGIT_BITS):
        # The topmost digit of a signed key is ordered as an unsigned one once its sign bit is flipped.
        flip = _NUM_DIGITS >> 1 if num_bits is None and shift == (num_rounds - 1) * _DIGIT_BITS else 0
        digits = [[((part >> shift) & (_NUM_DIGITS - 1)) ^ flip for part in pool] for pool in candidates]
        counts = torch.stack(
            [torch.stack([torch.bincount(d, minlength=_NUM_DIGITS) for d in pool]).sum(0) for pool in digits]
        )
        from_top = reduce(counts).cpu().flip(1)
        not_below = from_top.cumsum(1)
        column = (not_below < wanted.unsqueeze(1)).sum(1, keepdim=True)
        equal = from_top.gather(1, column).squeeze(1)
        wanted -= not_below.gather(1, column).squeeze(1) - equal
        digit = _NUM_DIGITS - 1 - column.squeeze(1)
        found |= (digit ^ flip) << shift
        if shift:
            candidates = [
                [part[d == chosen] for part, d in zip(pool, pool_digits, strict=True)]
                for pool, pool_digits, chosen in zip(candidates, digits, digit.tolist(), strict=True)
            ]
    # The digits fill the low bits of an int64; the cast to a narrower dtype gives the sign back.
    values = found.to(dtype).to(device)
    return [_Kth(*kth) for kth in zip(values, wanted.tolist(), equal.tolist(), strict=True)]


def _refuse_nan(shards: Sequence[Shard], reduce: Reduce) -> None:
    device = shards[0].values.device
    num_nan = int(
        reduce(torch.stack([s.values.isnan().sum() for s in shards]).to(device=device, dtype=torch.int64)).sum()
    )
    if num_nan:
        raise MaskftError(
            f"{num_nan} of {sum(s.num_total for s in shards)} mask scores are NaN, so no mask can be chosen; lower the "
            "learning rate or go back to an earlier checkpoint."
        )
