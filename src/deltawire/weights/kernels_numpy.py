"""The inner loops in numpy: what every loop computes, and what runs where Numba is not installed.

They work in chunks, so that their temporary memory stays under a few MiB whatever a tensor's size.
"""

import numpy as np

from deltawire.weights import speed
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.found import Found

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio: keeps element 0 from mixing to 0 (MurmurHash3's finaliser has a fixed point at 0)."""
M1 = 0xFF51AFD7ED558CCD
M2 = 0xC4CEB9FE1A85EC53
CHUNK = 1 << 15
"""elements at a time: their 64-bit numbers and a scratch copy fit the second-level cache"""
_MODULUS = 1 << 64


def digest_sweep(bits: UInts, start: int = 0) -> int:
    """Sum of mix(start + i, bits[i]) mod 2^64 over a flat array."""
    speed.slow(bits.size)
    total = 0
    for first in range(0, bits.size, CHUNK):
        part = bits[first : first + CHUNK]
        total += _mixed(np.arange(start + first, start + first + part.size, dtype=np.uint64), part)
    return total % _MODULUS


def digest_at(positions: Positions, bits: UInts) -> int:
    """Sum of mix(positions[k], bits[k]) mod 2^64: the part of a digest that some elements make."""
    speed.slow(positions.size)
    total = 0
    for first in range(0, positions.size, CHUNK):
        part = slice(first, first + CHUNK)
        total += _mixed(positions[part].astype(np.uint64), bits[part])
    return total % _MODULUS


def compare_and_collect(old: UInts, new: UInts) -> tuple[Positions, UInts]:
    """Where two equally long arrays differ, and by how much: (positions, steps) with steps = new - old mod 2^bits.

    Another thread may write `new` meanwhile: `old` plus the steps is what each element was at some moment.
    """
    speed.slow(old.size)
    found: list[tuple[Positions, UInts]] = []
    for first in range(0, old.size, CHUNK):
        was, own = old[first : first + CHUNK], new[first : first + CHUNK].copy()  # `new` is read once
        at = np.flatnonzero(was != own)
        if at.size:
            found.append((at + first, own[at] - was[at]))
    if not found:
        return np.empty(0, np.int64), np.empty(0, old.dtype)
    return np.concatenate([positions for positions, _ in found]), np.concatenate([steps for _, steps in found])


def collect(old: UInts, new: UInts, found: Found) -> None:
    """Append to `found` what `compare_and_collect` finds."""
    found.append(*compare_and_collect(old, new))


def apply_with_digest(bits: UInts, positions: Positions, steps: UInts, start: int = 0) -> tuple[int, int]:
    """`bits[positions] += steps` in place; the touched elements' part of the digest (before, after), where `bits` are
    those of a tensor from flat position `start` on."""
    speed.slow(positions.size)
    before = after = 0
    for first in range(0, positions.size, CHUNK):
        part = slice(first, first + CHUNK)
        at = positions[part]
        old = bits[at]
        new = old + steps[part]
        bits[at] = new
        numbers = (at + start).astype(np.uint64)
        before += _mixed(numbers.copy(), old)
        after += _mixed(numbers, new)
    return before % _MODULUS, after % _MODULUS


def gather(bits: UInts, positions: Positions) -> UInts:
    """`bits[positions]`, a copy."""
    speed.slow(positions.size)
    return bits[positions]


def scatter(bits: UInts, positions: Positions, values: UInts) -> None:
    """`bits[positions] = values` in place."""
    speed.slow(positions.size)
    bits[positions] = values


def _mixed(numbers: UInts, bits: UInts) -> int:
    """Sum of mix(numbers[k], bits[k]) mod 2^64. Overwrites `numbers`, which are uint64."""
    scratch = np.empty_like(numbers)
    numbers += np.uint64(GOLDEN)
    _fmix64(numbers, scratch)
    numbers ^= bits
    _fmix64(numbers, scratch)
    return int(numbers.sum(dtype=np.uint64))


def _fmix64(h: UInts, scratch: UInts) -> None:
    """MurmurHash3's 64-bit finaliser (Appleby, public domain), in place."""
    for factor in (M1, M2):
        np.right_shift(h, np.uint64(33), out=scratch)
        h ^= scratch
        h *= np.uint64(factor)
    np.right_shift(h, np.uint64(33), out=scratch)
    h ^= scratch
