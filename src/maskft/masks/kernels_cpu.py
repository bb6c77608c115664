"""Numba kernels for a CPU: choosing packed masks and applying them.

They have the interface of the Triton kernels, :mod:`maskft.masks.kernels`, and do what NumPy and PyTorch do where Numba
is not installed, which are their reference in the tests: :mod:`maskft.masks.selection_cpu`,
:func:`maskft.masks.apply_mask`, :func:`maskft.masks.num_flipped_bits`. There each elementary operation is a pass of its
own; here all of them are one, and the mask is written as the bits that are kept.

The functions of Numba hold no lock of Python's, so as many threads as PyTorch has share a large choice.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskft.masks.packing import GATHER_BITS, pack_mask, packed_shape
from maskft.masks.selection import num_nan
from maskft.masks.selection_cpu import Bracket, find_bracket, kept_places, kth_of

_BLOCK = 1 << 13  # scores whose marks stay in a core's nearest cache; a multiple of the bits in a word
_PIECE = 1 << 20  # scores that a thread takes at a time; a multiple of the block
_WORTH_THREADS = 1 << 22  # scores below which starting threads costs more than they save
_GATHER_BITS = np.uint64(GATHER_BITS)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at first use, and kept beside this file or in the user's cache where either can be written."""
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        compiled = numba.njit(nogil=True)(function)
    return compiled


@_compiled
def _num_ones(word):
    pairs = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bytes_ = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bytes_ * np.uint64(0x0101010101010101)) >> np.uint64(56))


@_compiled
def _pack(marks, words):
    """Bytes of 0 and 1, eight of them in an integer, as bits."""
    packed = words.view(np.uint8)
    for i in range(len(packed)):
        packed[i] = np.uint8((marks[i] * _GATHER_BITS) >> np.uint64(56))


@_compiled
def _mark(values, low, high, abs_, above, inside):
    """Bits of the values above `high`, and of those from `low` to `high`; how many there are of each."""
    num_above, num_inside = 0, 0
    # Bytes first: comparisons become vector instructions only where each has a place of its own.
    is_above, reaches = np.zeros(_BLOCK, np.uint8), np.zeros(_BLOCK, np.uint8)
    for start in range(0, len(values), _BLOCK):
        part = values[start : start + _BLOCK]
        for i in range(len(part)):
            value = abs(part[i]) if abs_ else part[i]
            is_above[i] = value > high
            reaches[i] = value >= low
        for i in range(len(part), _BLOCK):
            is_above[i] = reaches[i] = 0
        words = slice(start // 64, (start + len(part) + 63) // 64)
        _pack(is_above.view(np.uint64), above[words])
        _pack(reaches.view(np.uint64), inside[words])
        for i in range(words.start, words.stop):
            inside[i] ^= above[i]
            num_above += _num_ones(above[i])
            num_inside += _num_ones(inside[i])
    return num_above, num_inside


@_compiled
def _collect(values, abs_, inside, places, found):
    """Places and values of the bits that are set."""
    n = 0
    for i in range(len(inside)):
        word = inside[i]
        while word:
            place = 64 * i + _num_ones((word & (~word + np.uint64(1))) - np.uint64(1))
            places[n] = place
            found[n] = abs(values[place]) if abs_ else values[place]
            n += 1
            word &= word - np.uint64(1)


@_compiled
def _set_bits(words, places):
    for place in places:
        words[place // 64] |= np.uint64(1) << np.uint64(place % 64)


@_compiled
def _num_differing(before, after):
    num = 0
    for i in range(len(before)):
        num += _num_ones(np.uint64(before[i] ^ after[i]))
    return num


@_compiled
def _apply(weight, packed, result):
    for i in range(len(packed)):
        byte = np.int64(packed[i])
        for j in range(8):
            result[8 * i + j] = weight[8 * i + j] & -((byte >> j) & 1)


@_compiled
def _apply_over(weight, packed, reference, result):
    for i in range(len(packed)):
        byte = np.int64(packed[i])
        for j in range(8):
            other = reference[8 * i + j]
            result[8 * i + j] = other ^ ((weight[8 * i + j] ^ other) & -((byte >> j) & 1))


class _Marks(NamedTuple):
    """The bits of an array's values: above a bracket, and inside of it. Words of 64, the last one padded with zeros."""

    above: NDArray[np.uint64]
    inside: NDArray[np.uint64]

    def part(self, start: int, size: int) -> "_Marks":
        words = slice(start // 64, (start + size + 63) // 64)
        return _Marks(self.above[words], self.inside[words])


def _around(
    arrays: Sequence[NDArray[Any]], marks: Sequence[_Marks], abs_: bool, low: np.floating, high: np.floating
) -> Bracket:
    """What lies from `low` to `high`, and above; `marks` take both."""
    pieces = [(i, start) for i, values in enumerate(arrays) for start in range(0, len(values), _PIECE)]

    def mark(piece: tuple[int, int]) -> tuple[int, NDArray[np.intp], NDArray[Any]]:
        i, start = piece
        values = arrays[i][start : start + _PIECE]
        part = marks[i].part(start, len(values))
        num_above, num_inside = _mark(values, low, high, abs_, *part)
        places, found = np.empty(num_inside, np.intp), np.empty(num_inside, values.dtype)
        _collect(values, abs_, part.inside, places, found)
        return num_above, places + start, found

    num_threads = torch.get_num_threads()
    if num_threads > 1 and sum(map(len, arrays)) >= _WORTH_THREADS:
        with ThreadPoolExecutor(num_threads) as pool:
            marked = list(pool.map(mark, pieces))
    else:
        marked = [mark(piece) for piece in pieces]
    places: list[list[NDArray[np.intp]]] = [[] for _ in arrays]
    inside: list[list[NDArray[Any]]] = [[] for _ in arrays]
    for (i, _), (_, found, values) in zip(pieces, marked, strict=True):
        places[i].append(found)
        inside[i].append(values)
    num_above = sum(num for num, _, _ in marked)
    return Bracket(num_above, [np.concatenate(each) for each in places], [np.concatenate(each) for each in inside])


def _flat(tensor: Tensor, dtype: Any) -> NDArray[Any]:
    """The tensor's own memory as flat numbers of `dtype`.

    By its address, since PyTorch could not free a storage that it has shown to NumPy, which FSDP does.
    """
    num_bytes = tensor.numel() * tensor.element_size()
    return np.asarray((ctypes.c_uint8 * num_bytes).from_address(tensor.data_ptr())).view(dtype)


def try_on(device: torch.device) -> None:
    """Compile the smallest kernel; raises whatever keeps it from running."""
    num_flipped(torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8))


_FLOATS = {torch.float32: np.float32, torch.float64: np.float64}


def can_choose(scores: Sequence[Tensor], *, merge: bool) -> bool:
    """Whether these can be chosen from here: (rows, columns) of float32 or float64, the columns in whole bytes."""
    return all(
        t.dtype in _FLOATS and t.dtype == scores[0].dtype and t.dim() == 2 and t.shape[1] % 8 == 0 and t.numel() > 0
        for t in scores
    )


def choose_packed(
    scores: Sequence[Tensor], ks: Sequence[int], *, abs_: bool, threshold: float | None = None
) -> tuple[list[Tensor], Tensor]:
    """Packed masks of the largest scores (or sizes), and how many scores are NaN.

    Args:
        scores: tensors (rows, columns) for which :func:`can_choose` holds.
        ks: how many to keep of each tensor, or one number for all tensors together; of equal scores the earlier ones.
        abs_: rank the sizes.
        threshold: keep all that reach it instead; `ks` is not used.

    Returns:
        The masks, uint8 (rows, columns / 8), and an int64 scalar. No masks where any is NaN.
    """
    found = num_nan(scores)
    if found:
        return [], found
    if threshold is not None:
        masks = [_reaching(tensor, threshold, abs_) for tensor in scores]
    elif len(ks) == len(scores):
        masks = [_top([tensor], k, abs_)[0] for tensor, k in zip(scores, ks, strict=True)]
    else:
        masks = _top(scores, ks[0], abs_)
    return masks, found


def _reaching(scores: Tensor, threshold: float, abs_: bool) -> Tensor:
    dtype = _FLOATS[scores.dtype]
    values = _flat(scores, dtype)
    above, inside = _room(values), _room(values)
    _mark(values, dtype(threshold), dtype(np.inf), abs_, above, inside)
    return _as_mask(inside, scores)


def _top(scores: Sequence[Tensor], k: int, abs_: bool) -> list[Tensor]:
    if k in (0, sum(t.numel() for t in scores)):
        return [pack_mask(torch.full_like(t, k > 0, dtype=torch.bool)) for t in scores]
    arrays = [_flat(tensor, _FLOATS[tensor.dtype]) for tensor in scores]
    marks = [_Marks(_room(values), _room(values)) for values in arrays]
    found = find_bracket(arrays, k, abs_, partial(_around, arrays, marks, abs_))
    for marked, places in zip(marks, kept_places(found, k), strict=True):
        _set_bits(marked.above, places)
    return [_as_mask(marked.above, tensor) for marked, tensor in zip(marks, scores, strict=True)]


def _room(values: NDArray[Any]) -> NDArray[np.uint64]:
    return np.empty((len(values) + 63) // 64, np.uint64)


def _as_mask(words: NDArray[np.uint64], scores: Tensor) -> Tensor:
    shape = packed_shape((scores.shape[0], scores.shape[1]))
    return torch.from_numpy(words.view(np.uint8)[: shape[0] * shape[1]]).view(shape)


def kth_largest(scores: Sequence[Tensor], k: int, *, abs_: bool) -> Tensor:
    """The k-th largest score (or size) over all tensors for which :func:`can_choose` holds, k from 1; a scalar."""
    arrays = [_flat(tensor, _FLOATS[tensor.dtype]) for tensor in scores]
    marks = [_Marks(_room(values), _room(values)) for values in arrays]
    return torch.as_tensor(kth_of(find_bracket(arrays, k, abs_, partial(_around, arrays, marks, abs_)), k))


def num_flipped(before: Tensor, after: Tensor) -> Tensor:
    """Number of bits that differ between two masks of a multiple of four bytes; an int64 scalar."""
    return torch.tensor(_num_differing(_flat(before, np.uint32), _flat(after, np.uint32)))


_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def apply_packed(weight: Tensor, packed: Tensor, reference: Tensor | None, result: Tensor) -> None:
    """Write `weight`, where `packed` has ones, and else +0.0 or `reference` to `result`; rows of whole bytes."""
    word, bits = _WORDS[weight.element_size()], _flat(packed, np.uint8)
    if reference is None:
        _apply(_flat(weight, word), bits, _flat(result, word))
    else:
        _apply_over(_flat(weight, word), bits, _flat(reference, word), _flat(result, word))
