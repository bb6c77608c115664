"""Numba kernels for a CPU: choosing packed masks, applying them, and the gradient of the scores.

They have the interface of the Triton kernels, :mod:`maskft.masks.triton`, and do what NumPy and PyTorch do where Numba
is not installed, which are their reference in the tests: :mod:`maskft.masks.selection_cpu`,
:func:`maskft.masks.apply_mask`, :func:`maskft.masks.num_flipped_bits`, :func:`maskft.masks.straight_through_gradient`.
There each elementary operation is a pass of its own; here all of them are one, and the mask is written as the bits that
are kept.

The loops (:mod:`maskft.masks.loops_cpu`) hold no lock of Python's, so as many threads as PyTorch has share a large
choice.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskft.masks import loops_cpu as loops
from maskft.masks.packing import pack_mask, packed_shape
from maskft.masks.selection import num_nan
from maskft.masks.selection_cpu import Bracket, NotANumberError, find_bracket, kth_of, num_ties_of

_PIECE = 1 << 20  # scores that a thread takes at a time; a multiple of the bits in a word
_WORTH_THREADS = 1 << 22  # scores below which handing some to other threads costs more than it saves

_T = TypeVar("_T")
_R = TypeVar("_R")


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads that wait for the next task: to start them can take as long as to choose from a million scores."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="maskft")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay behind in the parent


def _each(function: Callable[[_T], _R], items: Sequence[_T], num_values: int) -> list[_R]:
    """What `function` returns of each, by as many threads as PyTorch has where there are many values to work on."""
    num_threads = torch.get_num_threads() if num_values >= _WORTH_THREADS else 1
    if num_threads == 1:
        return list(map(function, items))
    left, found = iter(enumerate(items)), {}

    def work() -> None:
        # Whoever is free takes the next: threads of PyTorch's that wait for work keep others from theirs.
        for i, item in left:
            found[i] = function(item)

    others = [_pool(num_threads - 1).submit(work) for _ in range(num_threads - 1)]
    try:
        work()
    finally:
        # They read memory that they do not hold. One that has not begun may stand behind this very call.
        wait([other for other in others if not other.cancel()])
    for other in others:
        if not other.cancelled():
            other.result()
    return [found[i] for i in range(len(items))]


def _around(
    pieces: Sequence[NDArray[Any]],
    words: Sequence[NDArray[np.uint64]],
    abs_: bool,
    low: np.floating,
    high: np.floating,
) -> Bracket:
    """What lies from `low` to `high`, and above; `words` take the bits of the latter."""

    def mark(piece: tuple[NDArray[Any], NDArray[np.uint64]]) -> tuple[int, NDArray[np.int32], NDArray[Any]]:
        values, words = piece
        places, inside = np.empty(len(values), np.int32), np.empty(len(values), values.dtype)
        num_above, num_inside, is_nan = loops.mark(values, low, high, abs_, words, places, inside)
        if is_nan:
            raise NotANumberError
        return num_above, places[:num_inside].copy(), inside[:num_inside].copy()

    marked = _each(mark, list(zip(pieces, words, strict=True)), sum(map(len, pieces)))
    nums_above, places, inside = zip(*marked, strict=True)
    return Bracket(sum(nums_above), places, inside)


def _flat(tensor: Tensor, dtype: Any) -> NDArray[Any]:
    """The tensor's own memory as flat numbers of `dtype`.

    By its address, since PyTorch could not free a storage that it has shown to NumPy, which FSDP does.
    """
    memory: Any = (ctypes.c_uint8 * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype)


def try_on(device: torch.device) -> None:
    """Compile each loop; raises whatever keeps one from running, such as a damaged cache or a full disk."""
    values = torch.arange(8 * loops.LANES, dtype=torch.float32).view(8, loops.LANES)
    masks, _ = choose_packed([values], [values.numel() // 2], abs_=True)
    choose_packed([values], [], abs_=True, threshold=1.0)
    num_flipped(masks[0], masks[0])
    apply_packed(values, masks[0], None, torch.empty_like(values))
    score_gradient(values, values, values, None, torch.empty_like(values), abs_=True)


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
    try:
        if threshold is not None:
            masks = [_reaching(tensor, threshold, abs_) for tensor in scores]
        elif len(ks) == len(scores):
            each, num_scores = list(zip(scores, ks, strict=True)), sum(t.numel() for t in scores)
            masks = _each(lambda one: _top([one[0]], one[1], abs_)[0], each, num_scores)
        else:
            masks = _top(scores, ks[0], abs_)
    except NotANumberError:
        return [], num_nan(scores)
    return masks, torch.zeros((), dtype=torch.int64)


def _reaching(scores: Tensor, threshold: float, abs_: bool) -> Tensor:
    dtype = _FLOATS[scores.dtype]
    values = _flat(scores, dtype)
    mask = _room(values)
    if loops.mark_reaching(values, dtype(threshold), abs_, mask):
        raise NotANumberError
    return _as_mask(mask, scores)


def _top(scores: Sequence[Tensor], k: int, abs_: bool) -> list[Tensor]:
    if k in (0, sum(t.numel() for t in scores)):
        if num_nan(scores):
            raise NotANumberError
        return [pack_mask(torch.full_like(t, k > 0, dtype=torch.bool)) for t in scores]
    found, masks, words = _find(scores, k, abs_)
    kth = kth_of(found, k)
    num_ties = num_ties_of(found, k, kth)
    for piece, places, inside in zip(words, found.places, found.values, strict=True):
        num_ties = loops.settle(piece, places, inside, kth, num_ties)
    return [_as_mask(mask, tensor) for mask, tensor in zip(masks, scores, strict=True)]


def _find(
    scores: Sequence[Tensor], k: int, abs_: bool
) -> tuple[Bracket, list[NDArray[np.uint64]], list[NDArray[np.uint64]]]:
    """A bracket with the k-th largest inside, and bits of what lies above it: of each tensor, and of each piece."""
    arrays = [_flat(tensor, _FLOATS[tensor.dtype]) for tensor in scores]
    masks = [_room(values) for values in arrays]
    pieces = [values[i : i + _PIECE] for values in arrays for i in range(0, len(values), _PIECE)]
    words = [mask[i : i + _PIECE // 64] for mask in masks for i in range(0, len(mask), _PIECE // 64)]
    return find_bracket(pieces, k, abs_, partial(_around, pieces, words, abs_)), masks, words


def _room(values: NDArray[Any]) -> NDArray[np.uint64]:
    return np.empty((len(values) + 63) // 64, np.uint64)


def _as_mask(words: NDArray[np.uint64], scores: Tensor) -> Tensor:
    shape = packed_shape((scores.shape[0], scores.shape[1]))
    return torch.from_numpy(words.view(np.uint8)[: shape[0] * shape[1]]).view(shape)


def kth_largest(scores: Sequence[Tensor], k: int, *, abs_: bool) -> Tensor:
    """The k-th largest score (or size) over all tensors for which :func:`can_choose` holds, k from 1; a scalar.

    Raises:
        NotANumberError: a score is NaN.
    """
    return torch.from_numpy(np.asarray(kth_of(_find(scores, k, abs_)[0], k)))


def num_flipped(before: Tensor, after: Tensor) -> Tensor:
    """Number of bits that differ between two masks of a multiple of four bytes; an int64 scalar."""
    return torch.tensor(loops.num_differing(_flat(before, np.uint32), _flat(after, np.uint32)))


_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def can_apply(result: Tensor) -> bool:
    """Whether :func:`apply_packed` writes there: whole vectors, from the start of a line of the cache on."""
    return result.numel() % loops.LANES == 0 and result.data_ptr() % loops.ALIGNMENT == 0


def apply_packed(weight: Tensor, packed: Tensor, reference: Tensor | None, result: Tensor) -> None:
    """Write `weight`, where `packed` has ones, and else +0.0 or `reference` to `result`; rows of whole bytes."""
    word = _WORDS[weight.element_size()]
    others = None if reference is None else _flat(reference, word)
    loops.apply(_flat(weight, word), _flat(packed, np.uint8), others, _flat(result, word))


# bfloat16 by its bits, for NumPy has no such number
_FACTORS = {torch.float32: np.float32, torch.bfloat16: np.uint16}


def can_multiply(grad_weight: Tensor, weight: Tensor, scores: Tensor, reference: Tensor | None) -> bool:
    """Whether :func:`score_gradient` takes these: whole vectors of float32 or bfloat16, for scores of float32.

    The result may lie where `grad_weight` does.
    """
    factors = [t for t in (grad_weight, weight, reference) if t is not None]
    return (
        scores.dtype == torch.float32
        and all(t.dtype in _FACTORS for t in factors)
        and scores.numel() % loops.LANES == 0
        and grad_weight.data_ptr() % loops.ALIGNMENT == 0
    )


def score_gradient(
    grad_weight: Tensor, weight: Tensor, scores: Tensor, reference: Tensor | None, result: Tensor, *, abs_: bool
) -> None:
    """`dL/dS` from `dL/d(W * M)`; all (out_features, in_features), contiguous; `can_multiply` holds.

    Written to `result`, a float32 tensor, which may be `grad_weight` itself.
    """
    factors = [None if t is None else _flat(t, _FACTORS[t.dtype]) for t in (grad_weight, weight, reference)]
    loops.gradient(*factors, _flat(scores, np.float32) if abs_ else None, _flat(result, np.float32))
