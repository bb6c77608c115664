"""The compiled loops of :mod:`maskft.masks.kernels_cpu`, over flat arrays.

Numba makes a byte of each comparison, fetches nothing ahead and keeps in the cache what it writes. LLVM makes bits of
comparisons where it is told to compare a vector of 64, and does the others where it is told to; so the innermost steps
are written for LLVM. All of it is in this file, since Numba's cache on the disk looks for changes in the file of a loop
alone.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64
"""Values that are worked on at a time; as many as a word has bits."""

ALIGNMENT = 64
"""Bytes of a line of the cache; an address is a multiple of it where it is written past the cache."""

_AHEAD = 1024  # values; a core's own prefetching ends with each page of memory


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at first use, and kept beside this file or in the user's cache where either can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


def _vector_at(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Pointer to the 64 values of an array of Numba's from `start` on."""
    data = context.make_array(kind)(context, builder, array).data
    vector = ir.VectorType(context.get_value_type(kind.dtype), LANES)
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


def _load(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    loaded = builder.load(_vector_at(context, builder, kind, array, start))
    loaded.align = 1  # files are mapped to any address
    return loaded


def _write_past_the_cache(context: Any, builder: Any, kind: Any, array: Any, start: Any, vector: Any) -> None:
    """Write 64 values of an array from `start` on; the cache would read their place from memory first."""
    store = builder.store(vector, _vector_at(context, builder, kind, array, start))
    store.align = ALIGNMENT
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


def _bits_where(compare: Callable[[Any, Any, Any], Any]) -> Any:
    """A function of Numba: one bit for each of the 64 values from `start` on that compares so to `border`."""

    @intrinsic
    def bits(typing: Any, values: Any, start: Any, border: Any, abs_: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            array, start, border, abs_ = given
            found = _load(context, builder, signature.args[0], array, start)
            name = f"llvm.fabs.v{LANES}{found.type.element.intrinsic_name}"
            size = cgutils.get_or_insert_function(builder.module, ir.FunctionType(found.type, [found.type]), name)
            found = builder.select(abs_, builder.call(size, [found]), found)
            nothing = ir.Constant(found.type, ir.Undefined)
            borders = builder.insert_element(nothing, border, ir.Constant(ir.IntType(32), 0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
            borders = builder.shuffle_vector(borders, nothing, lanes)
            return builder.bitcast(compare(builder, found, borders), ir.IntType(LANES))

        return types.uint64(values, types.intp, values.dtype, types.boolean), build

    return bits


_bits_above = _bits_where(lambda builder, values, border: builder.fcmp_ordered(">", values, border))
_bits_reaching = _bits_where(lambda builder, values, border: builder.fcmp_ordered(">=", values, border))
_bits_nan = _bits_where(lambda builder, values, border: builder.fcmp_unordered("uno", values, border))


@intrinsic
def _prefetch(typing: Any, values: Any, start: Any) -> Any:
    """Have the 64 values from `start` on fetched into the cache; they may lie beyond the end."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        name = "llvm.prefetch.p0"
        fetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, number, number, number]), name
        )
        first = builder.bitcast(_vector_at(context, builder, signature.args[0], *given), byte)
        size = context.get_abi_sizeof(context.get_value_type(signature.args[0].dtype))
        for line in range(0, LANES * size, ALIGNMENT):
            # To read (0), soon again (3), data (1).
            builder.call(fetch, [builder.gep(first, [number(line)]), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(values, types.intp), build


@intrinsic
def _write_gradient(
    typing: Any, grad_weight: Any, weight: Any, reference: Any, scores: Any, result: Any, start: Any
) -> Any:
    """Write 64 values of the scores' gradient; see :func:`gradient`."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        *arrays, start = given
        kinds = signature.args

        def load(i: int) -> Any:
            loaded = _load(context, builder, kinds[i], arrays[i], start)
            if kinds[i].dtype == types.uint16:  # bfloat16, the upper half of a float32
                wide = ir.VectorType(ir.IntType(32), LANES)
                bits = builder.shl(builder.zext(loaded, wide), ir.Constant(wide, [16] * LANES))
                loaded = builder.bitcast(bits, ir.VectorType(ir.FloatType(), LANES))
            return loaded

        change = load(1)
        if kinds[2] != types.none:
            change = builder.fsub(change, load(2))
        gradient = builder.fmul(load(0), change)
        if kinds[3] != types.none:
            is_positive = builder.fcmp_ordered(">", load(3), ir.Constant(gradient.type, None))
            gradient = builder.select(is_positive, gradient, builder.fneg(gradient))
        _write_past_the_cache(context, builder, kinds[4], arrays[4], start, gradient)
        return context.get_dummy_value()

    return types.void(grad_weight, weight, reference, scores, result, types.intp), build


@intrinsic
def _write_masked(typing: Any, weight: Any, packed: Any, reference: Any, result: Any, start: Any) -> Any:
    """Write 64 values of a masked weight; see :func:`apply`."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        weight, packed, reference, result, start = given
        kinds = signature.args
        bytes_ = context.make_array(kinds[1])(context, builder, packed).data
        word = ir.IntType(LANES)
        bits = builder.load(builder.bitcast(builder.gep(bytes_, [builder.udiv(start, word(8))]), word.as_pointer()))
        bits.align = 1
        kept = _load(context, builder, kinds[0], weight, start)
        other = ir.Constant(kept.type, None)
        if kinds[2] != types.none:
            other = _load(context, builder, kinds[2], reference, start)
        masked = builder.select(builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES)), kept, other)
        _write_past_the_cache(context, builder, kinds[3], result, start, masked)
        return context.get_dummy_value()

    return types.void(weight, packed, reference, result, types.intp), build


@intrinsic
def _fence(typing: Any) -> Any:
    """Let no thread see what follows before what was written past the cache."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@_compiled
def _num_ones(word):
    pairs = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bytes_ = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bytes_ * np.uint64(0x0101010101010101)) >> np.uint64(56))


@_compiled
def _end(values):
    """The values after the last whole word of 64, and after them NaN, which is neither above nor below anything."""
    end = np.full(64, np.nan, values.dtype)
    start = len(values) // 64 * 64
    end[: len(values) - start] = values[start:]
    return end


@_compiled
def mark(values, low, high, abs_, above, places, inside):
    """Bits of the values above `high`, and places and values of those from `low` to `high`.

    How many there are of each, and how many are NaN.
    """
    num_above, num_inside = 0, 0
    num_nan = len(values) - 64 * len(above)
    end = _end(values)
    for i in range(len(above)):
        part, first = (values, 64 * i) if 64 * i + 64 <= len(values) else (end, 0)
        _prefetch(part, first + _AHEAD)
        above[i] = _bits_above(part, first, high, abs_)
        num_above += _num_ones(above[i])
        num_nan += _num_ones(_bits_nan(part, first, high, abs_))
        rest = _bits_reaching(part, first, low, abs_) & ~above[i]
        while rest:
            place = _num_ones((rest & (~rest + np.uint64(1))) - np.uint64(1))
            places[num_inside] = 64 * i + place
            inside[num_inside] = abs(part[first + place]) if abs_ else part[first + place]
            num_inside += 1
            rest &= rest - np.uint64(1)
    return num_above, num_inside, num_nan


@_compiled
def mark_reaching(values, low, abs_, reaching):
    """Bits of the values from `low` on; how many are NaN."""
    num_nan = len(values) - 64 * len(reaching)
    end = _end(values)
    for i in range(len(reaching)):
        part, first = (values, 64 * i) if 64 * i + 64 <= len(values) else (end, 0)
        _prefetch(part, first + _AHEAD)
        reaching[i] = _bits_reaching(part, first, low, abs_)
        num_nan += _num_ones(_bits_nan(part, first, low, abs_))
    return num_nan


@_compiled
def settle(words, places, inside, kth, num_ties):
    """Set the bits of those inside that are larger than the k-th, and of the first that equal it."""
    for i in range(len(places)):
        is_tie = (inside[i] == kth) & (num_ties > 0)
        num_ties -= is_tie
        # No branch: which way it went would be a guess each time.
        words[places[i] // 64] |= np.uint64(is_tie | (inside[i] > kth)) << np.uint64(places[i] % 64)
    return num_ties


@_compiled
def num_differing(before, after):
    num = 0
    for i in range(len(before)):
        num += _num_ones(np.uint64(before[i] ^ after[i]))
    return num


@_compiled
def apply(weight, packed, reference, result):
    """The weights that have a one in `packed`, and those of `reference`, or zero where it is None, that have none.

    Whole vectors of one kind of number; `result` lies at a multiple of `ALIGNMENT`.
    """
    for start in range(0, len(result), LANES):
        _write_masked(weight, packed, reference, result, start)
    _fence()


@_compiled
def gradient(grad_weight, weight, reference, scores, result):
    """`grad_weight * (weight - reference)`, with the sign of `scores`; neither where they are None.

    Whole vectors of float32, or of bfloat16 as uint16; `result` is float32 at a multiple of `ALIGNMENT`.
    """
    for start in range(0, len(result), LANES):
        _prefetch(grad_weight, start + _AHEAD)
        _prefetch(weight, start + _AHEAD)
        if reference is not None:
            _prefetch(reference, start + _AHEAD)
        if scores is not None:
            _prefetch(scores, start + _AHEAD)
        _write_gradient(grad_weight, weight, reference, scores, result, start)
    _fence()
