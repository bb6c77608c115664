"""Numba kernels for a CPU: choosing packed masks and applying them.

They have the interface of the Triton kernels, :mod:`maskft.masks.kernels`, and do what NumPy and PyTorch do where Numba
is not installed, which are their reference in the tests: :mod:`maskft.masks.selection_cpu`,
:func:`maskft.masks.apply_mask`, :func:`maskft.masks.num_flipped_bits`. There each elementary operation is a pass of its
own; here all of them are one, and the mask is written as the bits that are kept.

The functions of Numba hold no lock of Python's, so as many threads as PyTorch has share a large choice.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from maskft.masks.packing import pack_mask, packed_shape
from maskft.masks.selection import num_nan
from maskft.masks.selection_cpu import Bracket, find_bracket, kth_of

_PIECE = 1 << 20  # scores that a thread takes at a time; a multiple of the bits in a word
_WORTH_THREADS = 1 << 22  # scores below which handing some to other threads costs more than it saves

_T = TypeVar("_T")
_R = TypeVar("_R")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at first use, and kept beside this file or in the user's cache where either can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_compiled
def _num_ones(word):
    pairs = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bytes_ = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bytes_ * np.uint64(0x0101010101010101)) >> np.uint64(56))


def _bits_where(comparison: str) -> Any:
    """A function of Numba: one bit for each of the 64 values from `start` on that compares so to `border`.

    Numba makes a byte of each comparison; LLVM makes bits of them where it is told to compare a vector of 64.
    """

    @intrinsic
    def bits(typing: Any, values: Any, start: Any, border: Any, abs_: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            array, first, border, abs_ = given
            number = context.get_value_type(signature.args[0].dtype)
            vector, lanes = ir.VectorType(number, 64), ir.VectorType(ir.IntType(32), 64)
            data = context.make_array(signature.args[0])(context, builder, array).data
            found = builder.load(builder.bitcast(builder.gep(data, [first]), vector.as_pointer()))
            found.align = context.get_abi_sizeof(number)
            name = f"llvm.fabs.v64{number.intrinsic_name}"
            size = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), name)
            found = builder.select(abs_, builder.call(size, [found]), found)
            nothing = ir.Constant(vector, ir.Undefined)
            borders = builder.insert_element(nothing, border, ir.Constant(ir.IntType(32), 0))
            borders = builder.shuffle_vector(borders, nothing, ir.Constant(lanes, None))
            return builder.bitcast(builder.fcmp_ordered(comparison, found, borders), ir.IntType(64))

        return types.uint64(values, types.intp, values.dtype, types.boolean), build

    return bits


_bits_above, _bits_reaching = _bits_where(">"), _bits_where(">=")


@_compiled
def _end(values):
    """The values after the last whole word of 64, and after them NaN, which is neither above nor below anything."""
    end = np.full(64, np.nan, values.dtype)
    start = len(values) // 64 * 64
    end[: len(values) - start] = values[start:]
    return end


@_compiled
def _mark(values, low, high, abs_, above, places, inside):
    """Bits of the values above `high`, and places and values of those from `low` to `high`; how many of each."""
    num_above, num_inside = 0, 0
    end = _end(values)
    for i in range(len(above)):
        part, first = (values, 64 * i) if 64 * i + 64 <= len(values) else (end, 0)
        above[i] = _bits_above(part, first, high, abs_)
        num_above += _num_ones(above[i])
        rest = _bits_reaching(part, first, low, abs_) & ~above[i]
        while rest:
            place = _num_ones((rest & (~rest + np.uint64(1))) - np.uint64(1))
            places[num_inside] = 64 * i + place
            inside[num_inside] = abs(part[first + place]) if abs_ else part[first + place]
            num_inside += 1
            rest &= rest - np.uint64(1)
    return num_above, num_inside


@_compiled
def _mark_reaching(values, low, abs_, reaching):
    end = _end(values)
    for i in range(len(reaching)):
        part, first = (values, 64 * i) if 64 * i + 64 <= len(values) else (end, 0)
        reaching[i] = _bits_reaching(part, first, low, abs_)


@_compiled
def _settle(words, places, inside, kth, num_ties):
    """Set the bits of those inside that are larger than the k-th, and of the first that equal it."""
    for i in range(len(places)):
        is_tie = inside[i] == kth and num_ties > 0
        num_ties -= is_tie
        if is_tie or inside[i] > kth:
            words[places[i] // 64] |= np.uint64(1) << np.uint64(places[i] % 64)
    return num_ties


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


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads that wait for the next task: to start them can take as long as to choose from a million scores."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="maskft")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay behind in the parent


def _each(function: Callable[[_T], _R], items: Sequence[_T], num_values: int) -> list[_R]:
    """What `function` returns of each, by as many threads as PyTorch has where there are many values to work on."""
    num_threads = torch.get_num_threads() if num_values >= _WORTH_THREADS else 1
    shares = [items[i::num_threads] for i in range(num_threads)]

    def of(share: Sequence[_T]) -> list[_R]:
        return [function(item) for item in share]

    others = [_pool(num_threads - 1).submit(of, share) for share in shares[1:]]
    found = [of(shares[0])] + [other.result() for other in others]
    return [found[i % num_threads][i // num_threads] for i in range(len(items))]


def _around(
    arrays: Sequence[NDArray[Any]],
    masks: Sequence[NDArray[np.uint64]],
    abs_: bool,
    low: np.floating,
    high: np.floating,
) -> Bracket:
    """What lies from `low` to `high`, and above; `masks` take the bits of the latter."""
    pieces = [(i, start) for i, values in enumerate(arrays) for start in range(0, len(values), _PIECE)]

    def mark(piece: tuple[int, int]) -> tuple[int, NDArray[np.intp], NDArray[Any]]:
        i, start = piece
        values = arrays[i][start : start + _PIECE]
        places, inside = np.empty(len(values), np.intp), np.empty(len(values), values.dtype)
        words = masks[i][start // 64 : -(-(start + len(values)) // 64)]
        num_above, num_inside = _mark(values, low, high, abs_, words, places, inside)
        return num_above, places[:num_inside] + start, inside[:num_inside].copy()

    num_above = 0
    places: list[list[NDArray[np.intp]]] = [[] for _ in arrays]
    inside: list[list[NDArray[Any]]] = [[] for _ in arrays]
    marked = _each(mark, pieces, sum(map(len, arrays)))
    for (i, _), (num, found, values) in zip(pieces, marked, strict=True):
        num_above += num
        places[i].append(found)
        inside[i].append(values)
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
    mask = _room(values)
    _mark_reaching(values, dtype(threshold), abs_, mask)
    return _as_mask(mask, scores)


def _top(scores: Sequence[Tensor], k: int, abs_: bool) -> list[Tensor]:
    if k in (0, sum(t.numel() for t in scores)):
        return [pack_mask(torch.full_like(t, k > 0, dtype=torch.bool)) for t in scores]
    found, masks = _find(scores, k, abs_)
    kth, num_ties = kth_of(found, k)
    for mask, places, inside in zip(masks, found.places, found.values, strict=True):
        num_ties = _settle(mask, places, inside, kth, num_ties)
    return [_as_mask(mask, tensor) for mask, tensor in zip(masks, scores, strict=True)]


def _find(scores: Sequence[Tensor], k: int, abs_: bool) -> tuple[Bracket, list[NDArray[np.uint64]]]:
    """A bracket with the k-th largest inside, and bits of what lies above it."""
    arrays = [_flat(tensor, _FLOATS[tensor.dtype]) for tensor in scores]
    masks = [_room(values) for values in arrays]
    return find_bracket(arrays, k, abs_, partial(_around, arrays, masks, abs_)), masks


def _room(values: NDArray[Any]) -> NDArray[np.uint64]:
    return np.empty((len(values) + 63) // 64, np.uint64)


def _as_mask(words: NDArray[np.uint64], scores: Tensor) -> Tensor:
    shape = packed_shape((scores.shape[0], scores.shape[1]))
    return torch.from_numpy(words.view(np.uint8)[: shape[0] * shape[1]]).view(shape)


def kth_largest(scores: Sequence[Tensor], k: int, *, abs_: bool) -> Tensor:
    """The k-th largest score (or size) over all tensors for which :func:`can_choose` holds, k from 1; a scalar."""
    return torch.as_tensor(kth_of(_find(scores, k, abs_)[0], k)[0])


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
