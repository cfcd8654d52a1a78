"""64 elements at a time, as plain LLVM vectors: no instruction set is asked for."""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_item_pointer
from numba.extending import intrinsic

LANES = 64
BLOCKS = 16
"""Blocks of 64 elements that a loop takes at a time. What it writes of them stays in the nearest cache, beside what it
reads: with 64 blocks a loop that compares and classifies took twice as long."""
CHUNK = BLOCKS * LANES
"""elements of those blocks"""
LINE = 8
"""words of a cache line"""


def address(context: Any, builder: Any, array: tuple[Any, Any], index: Any, kind: Any) -> Any:
    """The address of an array's element, as that of a `kind`. `array` is its type and its value."""
    made = context.make_array(array[0])(context, builder, array[1])
    found = get_item_pointer(context, builder, array[0], made, [index], wraparound=False)
    return builder.bitcast(found, kind.as_pointer())


@intrinsic
def differing(typing, old, new, at, steps, place):  # type: ignore[no-untyped-def]
    """A bit for each of 64 elements from `at` on: whether it differs. `new` is read once, and `new - old` written to
    the 64 elements of `steps` from `place` on."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lane = ir.IntType(signature.args[0].dtype.bitwidth)
        vector, align = ir.VectorType(lane, LANES), lane.width // 8

        def place(array: int, index: int) -> Any:
            return address(context, builder, (signature.args[array], arguments[array]), arguments[index], vector)

        before, after = (builder.load(place(array, 2), align=align) for array in (0, 1))
        builder.store(builder.sub(after, before), place(3, 4), align=align)
        return builder.bitcast(builder.icmp_unsigned("!=", before, after), ir.IntType(64))

    return types.uint64(old, new, types.int64, steps, types.int64), emit


@intrinsic
def zeros_below(typing, x):  # type: ignore[no-untyped-def]
    """How many zeros lie below the lowest one of x; 64 for 0."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], context.get_constant(types.boolean, False))

    return types.uint64(types.uint64), emit


@intrinsic
def count_ones(typing, x):  # type: ignore[no-untyped-def]
    """How many bits of x are ones."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), emit


@numba.njit(nogil=True, cache=True)
def aligned(words):  # type: ignore[no-untyped-def]
    """So many words of memory that begin at a cache line. A store of 64 elements then crosses no line, which made a
    loop with such a store for every 64 elements twice as fast."""
    memory = np.empty(words + LINE, np.uint64)
    start = -(memory.ctypes.data // 8) % LINE
    return memory[start : start + words]


@numba.njit(nogil=True, cache=True, inline="always", error_model="numpy")
def note_changes(old, new, start, blocks, steps, places):  # type: ignore[no-untyped-def]
    """Compare so many blocks of 64 elements from `start` on. How many differ; their places among the compared go to
    `places`, and `new - old` of every element to `steps`.

    Two places a block are written whether or not so many differ: what changed is not to be predicted, and a wrong guess
    of the processor costs more than a store. So `places` has room for two more.
    """
    found = np.uint64(0)
    for block in range(blocks):
        mask = differing(old, new, start + LANES * block, steps, LANES * block)
        origin, behind = np.uint64(LANES * block), found + count_ones(mask)
        places[found] = origin + zeros_below(mask)
        mask &= mask - np.uint64(1)
        places[found + np.uint64(1)] = origin + zeros_below(mask)
        mask &= mask - np.uint64(1)
        found += np.uint64(2)
        while mask:
            places[found] = origin + zeros_below(mask)
            mask &= mask - np.uint64(1)
            found += np.uint64(1)
        found = behind
    return found
