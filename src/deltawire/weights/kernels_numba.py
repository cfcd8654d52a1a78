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

CHUNK = 1024
"""words of eight bytes that are compared at a time: what is noted of them, and their copy, stay in the nearest cache"""
WORD = 8
"""bytes, and the most elements, of a word"""
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
def _collect(arrays, words, positions, steps):  # type: ignore[no-untyped-def]
    """`words` are the two `arrays` eight bytes at a time: first the words that differ are listed, then their elements.
    Everything is written down and counted only if it differs, for where something changed is not to be predicted, and
    a wrong branch costs more than writing. So there must be room for a word more than there are changes; -1 where
    there is not, as when another thread writes `new` after it was counted. It is read once, into a copy in the nearest
    cache, and the steps lead to that copy."""
    (old, new), (old_words, new_words) = arrays, words
    k, lanes = 0, 8 // old.itemsize
    differing, own = np.empty(CHUNK + 1, np.int64), np.empty(CHUNK * lanes, old.dtype)
    own_words = own.view(np.uint64)
    for start in range(0, old_words.size, CHUNK):
        found, size, first = 0, min(CHUNK, old_words.size - start), start * lanes
        own_words[:size] = new_words[start : start + size]
        for i in range(size):
            differing[found] = i
            found += old_words[start + i] != own_words[i]
        for i in differing[:found]:
            if k + lanes > positions.size:
                return -1
            for j in range(i * lanes, (i + 1) * lanes):
                positions[k] = first + j
                steps[k] = own[j] - old[first + j]
                k += old[first + j] != own[j]
    for j in range(old_words.size * lanes, old.size):
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
    changed = int(_count_changed(old, new))
    if not changed:
        return np.empty(0, np.int64), np.empty(0, old.dtype)
    for room in (changed, old.size):  # the second time only if more was written since it was counted: all of it fits
        positions, steps = np.empty(room + WORD, np.int64), np.empty(room + WORD, old.dtype)
        found = int(_collect((old, new), (_words(old), _words(new)), positions, steps))
        if found >= 0:
            break
    return positions[:found], steps[:found]


def _words(data: UInts) -> UInts:
    """A flat array eight bytes at a time, less what is left at its end; a copy if it does not lie as words must."""
    words = np.ascontiguousarray(data[: data.size * data.itemsize // 8 * 8 // data.itemsize]).view(np.uint64)
    return words if words.flags.aligned else words.copy()


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
