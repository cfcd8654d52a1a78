"""The inner loops in Numba. `kernels_numpy` has a twin of each, of the same name and with equal results.

Every loop releases the GIL and none is `parallel=True`: two Python threads inside one under Numba's workqueue abort
the process. Parallelism is a thread pool over chunks. They compile on first use and are cached on disk. Callers import
`deltawire.weights.kernels`, which chooses.
"""

import numba
import numpy as np
from llvmlite import ir
from numba.core.cgutils import get_item_pointer
from numba.extending import intrinsic

from deltawire.weights.bits import Positions, UInts
from deltawire.weights.kernels_numpy import GOLDEN, M1, M2
from deltawire.weights.vectors_numba import LANES, differing, zeros_below

GUESS = 64
"""A comparison first makes room for a change in so many elements: most steps of a trainer change fewer, and need not be
counted first. What is not written of that room takes no memory."""
AHEAD = 512
"""elements by which a gather or scatter fetches ahead; from 128 to 1,024 made no difference"""

_jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
_inline = numba.njit(nogil=True, cache=True, inline="always", error_model="numpy")


@_inline
def _fmix64(h):  # type: ignore[no-untyped-def]
    """MurmurHash3's 64-bit finaliser (Appleby, public domain)."""
    h ^= h >> np.uint64(33)
    h *= np.uint64(M1)
    h ^= h >> np.uint64(33)
    h *= np.uint64(M2)
    return h ^ (h >> np.uint64(33))


@_inline
def _mix(i, b):  # type: ignore[no-untyped-def]
    return _fmix64(_fmix64(np.uint64(i) + np.uint64(GOLDEN)) ^ np.uint64(b))


@_jit
def _digest_sweep(bits, start):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(bits.size):
        total += _mix(start + i, bits[i])
    return total


@_jit
def _digest_at(positions, bits):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for k in range(positions.size):
        total += _mix(positions[k], bits[k])
    return total


@_jit
def _count_changed(old, new):  # type: ignore[no-untyped-def]
    found = 0
    for i in range(old.size):
        found += old[i] != new[i]
    return found


@_jit
def _collect(old, new, positions, steps):  # type: ignore[no-untyped-def]
    """Fill positions and steps; how many there are, or -1 where there is no room for 64 more than there are, as when
    another thread writes `new` after it was counted. `new` is read once, into a copy in the nearest cache, and the
    steps lead to that copy. 64 elements are compared at a time: where something changed is not to be predicted, and
    ones of a mask cost fewer wrong branches than elements."""
    own, k, whole = np.empty(LANES, old.dtype), 0, old.size // LANES * LANES
    for start in range(0, whole, LANES):
        mask = differing(old, new, start, own)
        if mask and k + LANES > positions.size:
            return -1
        while mask:
            i = np.int64(zeros_below(mask))
            positions[k] = start + i
            steps[k] = own[i] - old[start + i]
            k += 1
            mask &= mask - np.uint64(1)
    for j in range(whole, old.size):
        if k >= positions.size:
            return -1
        own[0] = new[j]
        positions[k] = j
        steps[k] = own[0] - old[j]
        k += old[j] != own[0]
    return k


@_jit
def _apply(bits, positions, steps, start):  # type: ignore[no-untyped-def]
    before = np.uint64(0)
    after = np.uint64(0)
    for k in range(positions.size):
        i = positions[k]
        old = bits[i]
        before += _mix(start + i, old)
        bits[i] = old + steps[k]
        after += _mix(start + i, bits[i])
    return before, after


@intrinsic
def _fetch(typing, array, index):  # type: ignore[no-untyped-def]
    """Begin to bring an element's cache line as far as the second-level cache, and do not wait. A core waits for few
    lines of its nearest cache at a time, which bounds gathers and scatters; here it waits for more. LLVM's
    `llvm.prefetch`."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = signature.args[0]
        element = context.make_array(kind)(context, builder, arguments[0])
        address = get_item_pointer(context, builder, kind, element, [arguments[1]], wraparound=False)
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", (pointer,), ir.FunctionType(ir.VoidType(), (pointer, number, number, number))
        )
        to_read, second_level, data = number(0), number(2), number(1)
        builder.call(prefetch, (builder.bitcast(address, pointer), to_read, second_level, data))
        return context.get_dummy_value()

    return numba.void(array, index), emit


@_jit
def _gather(bits, positions, values):  # type: ignore[no-untyped-def]
    for k in range(positions.size):
        _fetch(bits, positions[min(k + AHEAD, positions.size - 1)])
        values[k] = bits[positions[k]]


@_jit
def _scatter(bits, positions, values):  # type: ignore[no-untyped-def]
    for k in range(positions.size):
        _fetch(bits, positions[min(k + AHEAD, positions.size - 1)])
        bits[positions[k]] = values[k]


def digest_sweep(bits: UInts, start: int = 0) -> int:
    """Sum of mix(start + i, bits[i]) mod 2^64 over a flat array."""
    return int(_digest_sweep(bits, start))


def digest_at(positions: Positions, bits: UInts) -> int:
    """Sum of mix(positions[k], bits[k]) mod 2^64: the part of a digest that some elements make."""
    return int(_digest_at(positions, bits))


def compare_and_collect(old: UInts, new: UInts) -> tuple[Positions, UInts]:
    """Where two equally long arrays differ, and by how much: (positions, steps) with steps = new - old mod 2^bits.

    Another thread may write `new` meanwhile: `old` plus the steps is what each element was at some moment.
    """
    kept = _collected(old, new, old.size // GUESS)
    if kept is None:  # the last room holds all, whatever is written after the count
        changed = int(_count_changed(old, new))
        kept = _collected(old, new, changed) or _collected(old, new, old.size)
    assert kept is not None
    return kept


def _collected(old: UInts, new: UInts, room: int) -> tuple[Positions, UInts] | None:
    """The changes; None where there are more than there is room for."""
    positions, steps = np.empty(room + LANES, np.int64), np.empty(room + LANES, old.dtype)
    found = int(_collect(old, new, positions, steps))
    if found < 0:
        return None
    if found < room:  # a view would keep all of it
        return positions[:found].copy(), steps[:found].copy()
    return positions[:found], steps[:found]


def apply_with_digest(bits: UInts, positions: Positions, steps: UInts, start: int = 0) -> tuple[int, int]:
    """`bits[positions] += steps` in place; the touched elements' part of the digest (before, after), where `bits` are
    those of a tensor from flat position `start` on."""
    before, after = _apply(bits, positions, steps, start)
    return int(before), int(after)


def gather(bits: UInts, positions: Positions) -> UInts:
    """`bits[positions]`, a copy."""
    values = np.empty(positions.size, bits.dtype)
    _gather(bits, positions, values)
    return values


def scatter(bits: UInts, positions: Positions, values: UInts) -> None:
    """`bits[positions] = values` in place."""
    _scatter(bits, positions, values)
