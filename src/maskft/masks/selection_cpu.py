"""The k largest of several CPU tensors, by counting around a sampled guess.

A sample of the values brackets the k-th; one pass counts what lies above the bracket and collects what lies inside.
Where the bracket missed it is widened, so the answer is exact whatever the sample was. NumPy does the passes, chunk
by chunk in the cache: its comparisons and counts are several times faster than PyTorch's on a CPU.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskft.masks.keys import wide

_CHUNK_SIZE = 1 << 17

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
    size = _room(arrays)
    for values, mask in zip(arrays, masks, strict=True):
        for start in range(0, len(values), _CHUNK_SIZE):
            chunk = mask[start : start + _CHUNK_SIZE]
            np.greater_equal(_size(values[start : start + _CHUNK_SIZE], abs_, size), kth, out=chunk)
            num_surplus += int(np.count_nonzero(chunk))
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


def _room(arrays: Sequence[Values]) -> Values:
    return np.empty(_CHUNK_SIZE, arrays[0].dtype)


def _size(values: Values, abs_: bool, room: Values | None = None) -> Values:
    """What is ranked; sizes are written to `room`, since fresh memory for each chunk would take a tenth of the time."""
    return np.abs(values, out=None if room is None else room[: len(values)]) if abs_ else values


def _kth(arrays: Sequence[Values], k: int, abs_: bool) -> np.floating:
    num_values = sum(len(values) for values in arrays)
    # The cost of sorting the sample and that of what falls into the bracket grow alike.
    stride = max(round(num_values ** (1 / 3)), 1) | 1  # odd, so that it does not walk down one column
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
        num_above, candidates = _around(arrays, low, high, abs_)
        if num_above < k <= num_above + len(candidates):
            rank = len(candidates) - (k - num_above)
            kth: np.floating = np.partition(candidates, rank)[rank]
            return kth
        slack *= 8


def _around(arrays: Sequence[Values], low: np.floating, high: np.floating, abs_: bool) -> tuple[int, Values]:
    """How many values lie above `high`, and those from `low` to `high`."""
    num_above = 0
    found = []
    size, room = _room(arrays), np.empty((2, _CHUNK_SIZE), np.bool_)
    for values in arrays:
        for start in range(0, len(values), _CHUNK_SIZE):
            chunk = _size(values[start : start + _CHUNK_SIZE], abs_, size)
            above = np.greater(chunk, high, out=room[0, : len(chunk)])
            num_above += int(np.count_nonzero(above))
            inside = np.greater_equal(chunk, low, out=room[1, : len(chunk)])
            inside ^= above
            found.append(chunk[np.flatnonzero(inside)])
    return num_above, np.concatenate(found)
