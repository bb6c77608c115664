"""The k largest of several CPU tensors, by counting around a sampled guess.

A sample of the values brackets the k-th; one pass marks and counts what lies above the bracket and collects what lies
inside, of which alone the marks are still to be settled then.
Where the bracket missed it is widened, so the answer is exact whatever the sample was. NumPy does the passes, chunk
by chunk in the cache: its comparisons and counts are several times faster than PyTorch's on a CPU.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskft.masks.keys import wide

_CHUNK_SIZE = 1 << 17

Values = NDArray[np.floating]


def kth_largest_on_cpu(scores: Sequence[Tensor], k: int, *, abs_: bool) -> Tensor:
    """The k-th largest score (or size of one) over all tensors, k from 1; a float32 or float64 scalar."""
    arrays = [_flat(tensor) for tensor in scores]
    return torch.from_numpy(np.asarray(kth_of(find_bracket(arrays, k, abs_, partial(_around, arrays, abs_, ())), k)))


def top_on_cpu(scores: Sequence[Tensor], k: int, *, abs_: bool) -> list[Tensor]:
    """Masks of the k largest scores (or sizes) over all tensors, 0 < k < their number; of equal ones the earlier."""
    arrays = [_flat(tensor) for tensor in scores]
    masks = [np.empty(len(values), dtype=np.bool_) for values in arrays]
    found = find_bracket(arrays, k, abs_, partial(_around, arrays, abs_, masks))
    kth = kth_of(found, k)
    num_ties = num_ties_of(found, k, kth)
    for mask, places, values in zip(masks, found.places, found.values, strict=True):
        ties = np.flatnonzero(values == kth)[:num_ties]
        num_ties -= len(ties)
        mask[places[values > kth]] = True
        mask[places[ties]] = True
    return [torch.from_numpy(mask).view(tensor.shape) for mask, tensor in zip(masks, scores, strict=True)]


def _flat(tensor: Tensor) -> Values:
    values: Values = wide(tensor.detach()).reshape(-1).numpy()
    return values


def _size(values: Values, abs_: bool, room: Values | None = None) -> Values:
    """What is ranked; sizes are written to `room`, since fresh memory for each chunk would take a tenth of the time."""
    return np.abs(values, out=None if room is None else room[: len(values)]) if abs_ else values


class NotANumberError(ArithmeticError):
    """A value is NaN, so that no order exists."""


class Bracket(NamedTuple):
    """What lies around the k-th largest value.

    Attributes:
        num_above: number of values that are larger than all of those inside.
        places: of those inside, in each array, ascending.
        values: those inside, of each array.
    """

    num_above: int
    places: Sequence[NDArray[np.integer]]
    values: Sequence[Values]


def find_bracket(
    arrays: Sequence[Values], k: int, abs_: bool, around: Callable[[np.floating, np.floating], Bracket]
) -> Bracket:
    """A narrow bracket with the k-th largest value (or size) inside.

    `around` makes the bracket of two ends, one pass over the arrays; it is called until the k-th lies inside.
    """
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
        found = around(low, high)
        if found.num_above < k <= found.num_above + sum(map(len, found.places)):
            return found
        slack *= 8


def kth_of(found: Bracket, k: int) -> np.floating:
    """The k-th largest of all values, which lies inside."""
    values = np.concatenate(found.values)
    place = len(values) - (k - found.num_above)
    values.partition(place)
    kth: np.floating = values[place]
    return kth


def num_ties_of(found: Bracket, k: int, kth: np.floating) -> int:
    """How many of those equal to the k-th largest are among the k largest."""
    return k - found.num_above - sum(int(np.count_nonzero(values > kth)) for values in found.values)


def _around(
    arrays: Sequence[Values], abs_: bool, masks: Sequence[NDArray[np.bool_]], low: np.floating, high: np.floating
) -> Bracket:
    """What lies from `low` to `high`, and above; `masks` take the latter."""
    size = np.empty(_CHUNK_SIZE, arrays[0].dtype)
    room = np.empty((2, _CHUNK_SIZE), np.bool_)
    num_above = 0
    all_places, all_values = [], []
    for number, values in enumerate(arrays):
        places, inside_values = [np.empty(0, np.intp)], [values[:0]]
        for start in range(0, len(values), _CHUNK_SIZE):
            chunk = _size(values[start : start + _CHUNK_SIZE], abs_, size)
            end = start + len(chunk)
            above = np.greater(chunk, high, out=masks[number][start:end] if masks else room[0, : len(chunk)])
            num_above += int(np.count_nonzero(above))
            inside = np.greater_equal(chunk, low, out=room[1, : len(chunk)])
            inside ^= above
            inner = np.flatnonzero(inside)
            inside_values.append(chunk[inner])
            inner += start
            places.append(inner)
        all_places.append(np.concatenate(places))
        all_values.append(np.concatenate(inside_values))
    return Bracket(num_above, all_places, all_values)
