"""The k largest of several CPU tensors, by counting around a sampled guess.

A sample of the values brackets the k-th; one pass counts what lies above the bracket and collects what lies inside.
Where the bracket missed it is widened, so the answer is exact whatever the sample was. NumPy does the passes, chunk
by chunk in the cache: its comparisons and counts are several times faster than PyTorch's on a CPU, and leave Python's
lock to other threads, of which there are as many as PyTorch uses.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskft.masks.keys import wide

_CHUNK_SIZE = 1 << 16
_WORD = 8  # truth values that one uint64 holds
_LEAST_FOR_A_THREAD = 1 << 18

Values = NDArray[np.floating]


def kth_largest_on_cpu(scores: Sequence[Tensor], k: int, *, abs_: bool) -> Tensor:
    """The k-th largest score (or size of one) over all tensors, k from 1; a float32 or float64 scalar."""
    return torch.as_tensor(_kth([_flat(tensor) for tensor in scores], k, abs_))


def top_on_cpu(scores: Sequence[Tensor], k: int, *, abs_: bool) -> list[Tensor]:
    """Masks of the k largest scores (or sizes) over all tensors, 0 < k < their number; of equal ones the earlier."""
    arrays = [_flat(tensor) for tensor in scores]
    kth = _kth(arrays, k, abs_)
    masks = [np.empty(len(values), dtype=np.bool_) for values in arrays]
    num_surplus = -k
    for values, mask in zip(arrays, masks, strict=True):
        for start, chunk in _chunks(values, abs_):
            kept = mask[start : start + _CHUNK_SIZE]
            np.greater_equal(chunk[: len(kept)], kth, out=kept)
            num_surplus += int(np.count_nonzero(kept))
    for values, mask in zip(reversed(arrays), reversed(masks), strict=True):
        if num_surplus == 0:
            break
        ties = np.flatnonzero(_size(values, abs_) == kth)
        dropped = ties[max(len(ties) - num_surplus, 0) :]
        mask[dropped] = False
        num_surplus -= len(dropped)
    return [torch.from_numpy(mask).view(tensor.shape) for mask, tensor in zip(masks, scores, strict=True)]


def _flat(tensor: Tensor) -> Values:
    values: Values = wide(tensor.detach()).reshape(-1).numpy()
    return values


def _size(values: Values, abs_: bool) -> Values:
    return np.abs(values) if abs_ else values


def _kth(arrays: Sequence[Values], k: int, abs_: bool) -> np.floating:
    num_values = sum(len(values) for values in arrays)
    # Twice as many as would make a sample cost what falls into its bracket does, for a sorted value costs less.
    stride = max(round(num_values ** (1 / 3) / 2), 1) | 1  # odd, so that it does not walk down one column
    sample = np.concatenate([_size(values[::stride], abs_) for values in arrays])
    sample.sort()
    sample = sample[::-1]
    share = k / num_values
    place = k * len(sample) // num_values
    slack = 3 * math.isqrt(int(len(sample) * share * (1 - share)) + 4)
    while True:
        first, last = place - slack, place + slack
        high = sample[first] if first >= 0 else sample.dtype.type(math.inf)
        low = sample[last] if last < len(sample) else sample.dtype.type(-math.inf)
        num_above, candidates = _around_in_threads(arrays, low, high, abs_)
        if num_above < k <= num_above + len(candidates):
            rank = len(candidates) - (k - num_above)
            kth: np.floating = np.partition(candidates, rank)[rank]
            return kth
        slack *= 8


def _around_in_threads(arrays: Sequence[Values], low: np.floating, high: np.floating, abs_: bool) -> tuple[int, Values]:
    num_values = sum(len(values) for values in arrays)
    num_threads = max(min(torch.get_num_threads(), num_values // _LEAST_FOR_A_THREAD), 1)
    if num_threads == 1:
        return _around(arrays, low, high, abs_)
    size = -(-num_values // (num_threads * _CHUNK_SIZE)) * _CHUNK_SIZE
    pieces = [values[start : start + size] for values in arrays for start in range(0, len(values), size)]
    shares: list[list[Values]] = [[] for _ in range(num_threads)]
    for piece in sorted(pieces, key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(piece)
    # No pool is kept: one would not survive a fork.
    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(lambda share: _around(share, low, high, abs_), shares))
    return sum(num for num, _ in found), np.concatenate([candidates for _, candidates in found])


def _around(arrays: Sequence[Values], low: np.floating, high: np.floating, abs_: bool) -> tuple[int, Values]:
    """How many values lie above `high`, and those from `low` to `high`."""
    num_above = 0
    found = []
    above, inside = np.empty((2, _CHUNK_SIZE), dtype=np.bool_)
    found.append(np.empty(0, dtype=low.dtype))
    for values in arrays:
        for _, chunk in _chunks(values, abs_):
            num = len(chunk)
            np.greater(chunk, high, out=above[:num])
            num_above += int(np.count_nonzero(above[:num]))
            np.greater_equal(chunk, low, out=inside[:num])
            np.bitwise_xor(inside[:num], above[:num], out=inside[:num])
            # Few are inside, and groups that hold one are found in an eighth of the time of single ones.
            groups = np.flatnonzero(inside[:num].view(np.uint64) != 0)
            candidates = chunk.reshape(-1, _WORD).take(groups, axis=0)
            found.append(candidates[inside[:num].reshape(-1, _WORD).take(groups, axis=0)])
    return num_above, np.concatenate(found)


def _chunks(values: Values, abs_: bool) -> Iterator[tuple[int, Values]]:
    """Place and content of each chunk, filled up to whole words with NaN, which no comparison takes in.

    Each is in the buffer of the last one.
    """
    buffer = np.empty(min(_CHUNK_SIZE, len(values) + _WORD), dtype=values.dtype)
    for start in range(0, len(values), _CHUNK_SIZE):
        chunk = values[start : start + _CHUNK_SIZE]
        filled = buffer[: -(-len(chunk) // _WORD) * _WORD]
        filled[len(chunk) :] = math.nan
        if abs_:
            np.abs(chunk, out=filled[: len(chunk)])
        else:
            filled[: len(chunk)] = chunk
        yield start, filled
