"""The inner loops, in Numba, each with a plain numpy twin of the same name in `plain` that says what it computes.

Every kernel releases the GIL and none is `parallel=True`: two Python threads inside one under Numba's workqueue abort
the process. Parallelism is a thread pool over chunks. They compile on first use (cached on disk); `warm_up` compiles
them ahead of time, so that nothing compiles inside a pause. Whoever needs them imports them inside the function that
does: numba costs half a second, and vLLM's start-up (0.32, CPU) looks into every loaded module and fails on llvmlite's.
"""

from types import SimpleNamespace

import numba
import numpy as np
from llvmlite import ir
from numba.core.cgutils import get_item_pointer
from numba.extending import intrinsic

from deltawire.bits import Positions, UInts, unsigned
from deltawire.errors import WrittenMeanwhile

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio: keeps element 0 from mixing to 0 (MurmurHash3's finaliser has a fixed point at 0)."""
M1 = 0xFF51AFD7ED558CCD
M2 = 0xC4CEB9FE1A85EC53
MASK = (1 << 64) - 1
CHUNK = 4096
"""words of eight bytes that are compared at a time: what is noted of them stays in the nearest cache"""
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
    there is not, as when another thread writes the arrays after they were counted."""
    (old, new), (old_words, new_words) = arrays, words
    k, lanes = 0, 8 // old.itemsize
    differing = np.empty(CHUNK + 1, np.int64)
    for start in range(0, old_words.size, CHUNK):
        found = 0
        for i in range(start, min(start + CHUNK, old_words.size)):
            differing[found] = i
            found += old_words[i] != new_words[i]
        for i in differing[:found]:
            if k + lanes > positions.size:
                return -1
            for j in range(i * lanes, (i + 1) * lanes):
                positions[k] = j
                steps[k] = new[j] - old[j]
                k += old[j] != new[j]
    for j in range(old_words.size * lanes, old.size):
        if k >= positions.size:
            return -1
        positions[k] = j
        steps[k] = new[j] - old[j]
        k += old[j] != new[j]
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

    Raises WrittenMeanwhile when an array is seen to change meanwhile; who cannot exclude it passes copies.
    """
    changed = int(_count_changed(old, new))
    room = changed + WORD
    positions, steps = np.empty(room, np.int64), np.empty(room, old.dtype)
    found = int(_collect((old, new), (_words(old), _words(new)), positions, steps)) if changed else 0
    if found != changed:
        raise WrittenMeanwhile("another thread wrote these weights while they were compared: stop it, or pass a copy")
    return positions[:changed], steps[:changed]


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


def warm_up() -> None:
    """Compile every kernel for every element width."""
    for dtype in ("U8", "U16", "U32", "U64"):
        old: UInts = np.zeros(2, unsigned(dtype))
        new: UInts = np.ones(2, unsigned(dtype))
        positions, steps = compare_and_collect(old, new)
        apply_with_digest(old, positions, steps)
        digest_sweep(old)
        digest_at(positions, steps)
        scatter(old, positions, gather(old, positions))


def _plain_mix(i: Positions, b: UInts) -> UInts:
    def fmix64(h: UInts) -> UInts:
        h = (h ^ (h >> np.uint64(33))) * np.uint64(M1)
        h = (h ^ (h >> np.uint64(33))) * np.uint64(M2)
        mixed: UInts = h ^ (h >> np.uint64(33))
        return mixed

    return fmix64(fmix64(i.astype(np.uint64) + np.uint64(GOLDEN)) ^ b.astype(np.uint64))


def _plain_digest_at(positions: Positions, bits: UInts) -> int:
    return int(_plain_mix(positions, bits).sum(dtype=np.uint64))


def _plain_digest_sweep(bits: UInts, start: int = 0) -> int:
    return _plain_digest_at(np.arange(start, start + bits.size), bits)


def _plain_compare_and_collect(old: UInts, new: UInts) -> tuple[Positions, UInts]:
    positions = np.flatnonzero(old != new)
    return positions, new[positions] - old[positions]


def _plain_apply_with_digest(bits: UInts, positions: Positions, steps: UInts, start: int = 0) -> tuple[int, int]:
    old = bits[positions]
    bits[positions] = old + steps
    return _plain_digest_at(start + positions, old), _plain_digest_at(start + positions, bits[positions])


def _plain_gather(bits: UInts, positions: Positions) -> UInts:
    return bits[positions]


def _plain_scatter(bits: UInts, positions: Positions, values: UInts) -> None:
    bits[positions] = values


plain = SimpleNamespace(
    digest_sweep=_plain_digest_sweep,
    digest_at=_plain_digest_at,
    compare_and_collect=_plain_compare_and_collect,
    apply_with_digest=_plain_apply_with_digest,
    gather=_plain_gather,
    scatter=_plain_scatter,
)
"""The numpy twins: slow, obvious, and what the tests hold the kernels to."""
