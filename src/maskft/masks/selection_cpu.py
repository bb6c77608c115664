"""The k largest of several CPU tensors, by counting around a sampled guess.

A sample of the values brackets the k-th; one pass marks and counts what lies above the bracket and collects what lies
inside, of which alone the marks are still to be settled then. Where the bracket missed it is widened, so the answer is
exact whatever the sample was. NumPy does the passes, chunk by chunk in the cache: its comparisons and counts are
several times faster than PyTorch's on a CPU.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskft.masks.radix import wide

_CHUNK_SIZE = 1 << 17

_Values = NDArray[np.floating]


def kth_largest_on_cpu(scores: Sequence[Tensor], k: int, *, abs_: bool) -> Tensor:
    """The k-th largest score (or size of one) over all tensors, k from 1; a float32 or float64 scalar."""
    return torch.from_numpy(np.asarray(_kth_of(_bracket([_flat(tensor) for tensor in scores], k, abs_), k)))


def top_on_cpu(scores: Sequence[Tensor], k: int, *, abs_: bool) -> list[Tensor]:
    """Masks of the k largest scores (or sizes) over all tensors, k from 1; of equal ones the earlier. None is NaN."""
    bracket = _bracket([_flat(tensor) for tensor in scores], k, abs_)
    kth = _kth_of(bracket, k)
    num_ties = k - bracket.num_above - sum(int(np.count_nonzero(values > kth)) for values in bracket.values)
    for mask, indices, values in zip(bracket.masks, bracket.indices, bracket.values, strict=True):
        ties = np.flatnonzero(values == kth)[:num_ties]
        num_ties -= len(ties)
        mask[indices[values > kth]] = True
        mask[indices[ties]] = True
    return [torch.from_numpy(mask).view(tensor.shape) for mask, tensor in zip(bracket.masks, scores, strict=True)]


class _Bracket(NamedTuple):
    """What lies around the k-th largest value.

    Attributes:
        num_above: number of values that are larger than all of those inside.
        masks: of those above, for each array.
        indices: of those inside, in each array, ascending.
        values: those inside, of each array.
    """

    num_above: int
    masks: list[NDArray[np.bool_]]
    indices: list[NDArray[np.integer]]
    values: list[_Values]


def _flat(tensor: Tensor) -> _Values:
    values: _Values = wide(tensor.detach()).reshape(-1).numpy()
    return values


def _size(values: _Values, abs_: bool, room: _Values | None = None) -> _Values:
    """What is ranked; sizes are written to `room`, since fresh memory for each chunk would take a tenth of the time."""
    return np.abs(values, out=None if room is None else room[: len(values)]) if abs_ else values


def _bracket(arrays: Sequence[_Values], k: int, abs_: bool) -> _Bracket:
    """A narrow bracket with the k-th largest value (or size) inside."""
    num_values = sum(len(values) for values in arrays)
    # The cost of sorting the sample and that of what falls into the bracket grow alike.
    stride = max(round(num_values ** (1 / 3)), 1) | 1  # odd, so that it does not walk down one column
    sample = np.concatenate([_size(values[::stride], abs_) for values in arrays])
    sample.sort()
    sample = sample[::-1]
    share = k / num_values
    index = k * len(sample) // num_values
    slack = 3 * math.isqrt(int(len(sample) * share * (1 - share)) + 4)
    while True:
        first, last = index - slack, index + slack
        high = sample[first] if first >= 0 else sample.dtype.type(math.inf)
        low = sample[last] if last < len(sample) else sample.dtype.type(-math.inf)
        bracket = _around(arrays, abs_, low, high)
        if bracket.num_above < k <= bracket.num_above + sum(map(len, bracket.indices)):
            return bracket
        slack *= 8


def _kth_of(bracket: _Bracket, k: int) -> np.floating:
    """The k-th largest of all values, which lies inside."""
    values = np.concatenate(bracket.values)
    index = len(values) - (k - bracket.num_above)
    values.partition(index)
    kth: np.floating = values[index]
    return kth


def _around(arrays: Sequence[_Values], abs_: bool, low: np.floating, high: np.floating) -> _Bracket:
    """What lies from `low` to `high`, and above."""
    size = np.empty(_CHUNK_SIZE, arrays[0].dtype)
    room = np.empty(_CHUNK_SIZE, np.bool_)
    bracket = _Bracket(0, [np.empty(len(values), np.bool_) for values in arrays], [], [])
    num_above = 0
    for values, mask in zip(arrays, bracket.masks, strict=True):
        indices, inside_values = [np.empty(0, np.intp)], [values[:0]]
        for start in range(0, len(values), _CHUNK_SIZE):
            chunk = _size(values[start : start + _CHUNK_SIZE], abs_, size)
            above = np.greater(chunk, high, out=mask[start : start + len(chunk)])
            num_above += int(np.count_nonzero(above))
            inside = np.greater_equal(chunk, low, out=room[: len(chunk)])
            inside ^= above
            inner = np.flatnonzero(inside)
            inside_values.append(chunk[inner])
            inner += start
            indices.append(inner)
        bracket.indices.append(np.concatenate(indices))
        bracket.values.append(np.concatenate(inside_values))
    return bracket._replace(num_above=num_above)
