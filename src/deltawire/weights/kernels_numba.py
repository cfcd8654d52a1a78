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
from deltawire.weights.found import Found
from deltawire.weights.kernels_numpy import GOLDEN, M1, M2
from deltawire.weights.vectors_numba import BLOCKS, CHUNK, LANES, aligned, note_changes

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
def _collect(old, new, start, found, positions, steps):  # type: ignore[no-untyped-def]
    """Fill positions and steps from `found` on with the changes from element `start` on, while there is room for a
    chunk's. The first element that was not compared, and how many changes there are. Each element of `new` is read
    once: another thread may write it."""
    own, places = aligned(CHUNK * old.itemsize // 8).view(old.dtype), np.empty(CHUNK + 2, np.uint32)
    whole, k = old.size // LANES * LANES, np.uint64(found)
    for at in range(start, whole, CHUNK):
        if k + np.uint64(CHUNK) > np.uint64(positions.size):
            return at, np.int64(k)
        many = note_changes(old, new, at, min(BLOCKS, (whole - at) // LANES), own, places)
        for i in range(many):
            place = np.uint64(places[i])
            positions[k + i], steps[k + i] = np.uint64(at) + place, own[place]
        k += many
    if k + np.uint64(LANES) > np.uint64(positions.size):
        return max(start, whole), np.int64(k)
    for j in range(max(start, whole), old.size):
        step = new[j] - old[j]
        positions[k], steps[k] = j, step
        k += np.uint64(step != 0)
    return old.size, np.int64(k)


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
def _apply(bits, positions, steps, start):  # type: ignore[no-untyped-def]
    before = np.uint64(0)
    after = np.uint64(0)
    for k in range(positions.size):
        _fetch(bits, positions[min(k + AHEAD, positions.size - 1)])
        i = positions[k]
        old = bits[i]
        before += _mix(start + i, old)
        bits[i] = old + steps[k]
        after += _mix(start + i, bits[i])
    return before, after


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
    found = Found(old.size, old.dtype)
    collect(old, new, found)
    return found.take()


def collect(old: UInts, new: UInts, found: Found) -> None:
    """Append to `found` what `compare_and_collect` finds."""
    at = 0
    while True:
        at, found.count = _collect(old, new, at, found.count, found.positions, found.steps)
        if at == old.size:
            return
        found.grow()


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
