"""A tile's changes read from Rice-coded lists, in Numba: every bound is checked, and what is wrong is said."""

import numpy as np

from deltawire.errors import FormatError
from deltawire.format.codecs.bits_numba import (
    BEHIND,
    ENDS_EARLY,
    HALF,
    LEAVES,
    get,
    get_list,
    jit,
    others,
    plan_ladder,
    rice,
)
from deltawire.format.codecs.lists import CHANGED, INVERTED, LADDER, WRITTEN, Facts, K, Unpacked
from deltawire.weights.bits import Positions, UInts

WRONG = {
    ENDS_EARLY: "the payload of a tile ends inside its lists",
    LEAVES: "a list of a tile leaves what it chooses from",
    BEHIND: "bits behind the last list of a tile",
    HALF: "a step of half the range is written as a positive one",
}
_U = np.uint64
_NO_ROWS = np.empty(0, np.int64)


@jit
def _get_rungs(words, low, unary, end, facts, lengths):  # type: ignore[no-untyped-def]
    """Read the lists of the ladder into the bits that |step| - 1 of each change has."""
    standing, chosen = np.arange(lengths.size), np.empty(lengths.size, np.int64)
    for level in range(LADDER + 1, facts.shape[1]):
        read = kept = 0
        for c in range(facts.shape[0]):
            n, m = facts[c, level - 1], facts[c, level]
            if n == 0:
                continue
            written = min(m, n - m)
            k = rice(n, written)
            members, listed = chosen[:m], np.empty(written if 2 * m > n else 0, np.int64)
            unary = get_list(words, low, unary, end, k, listed if 2 * m > n else members, n)
            if unary < 0:
                return unary
            if 2 * m > n:
                others(listed, members)
            low += written * k
            for i in range(m):
                change = standing[read + members[i]]
                standing[kept + i] = change
                lengths[change] = level - LADDER
            read, kept = read + n, kept + m
        if kept == 0:
            break
    return unary


@jit
def _get_steps(words, raw, sign, lengths, steps):  # type: ignore[no-untyped-def]
    half = (_U(1) << _U(8 * steps.itemsize - 1)) - _U(1)
    for i in range(steps.size):
        length, value = np.int64(lengths[i]), _U(0)
        if length:
            value = (_U(1) << _U(length - 1)) | get(words, raw, length - 1)
            raw += length - 1
        at = sign + i
        negative = (words[at >> 6] >> _U(at & 63)) & _U(1)
        if value == half and not negative:
            return HALF
        steps[i] = _U(0) - (value + _U(1)) if negative else value + _U(1)
    return 0


@jit
def _unpack(facts, words, nbytes, most, low, unary, ranks, lengths):  # type: ignore[no-untyped-def]
    """Fill the ranks, and how many bits |step| - 1 of each change has, from the two cursors on; 0, or what is wrong."""
    done, end = 0, 8 * nbytes
    for c in range(facts.shape[0]):
        m, written, k, inverted = facts[c, CHANGED], facts[c, WRITTEN], facts[c, K], facts[c, INVERTED] > 0
        if m == 0:
            continue
        members, listed = ranks[done : done + m], np.empty(written if inverted else 0, np.int64)
        unary = get_list(words, low, unary, end, k, listed if inverted else members, m + written if inverted else most)
        if unary < 0:
            return unary
        if inverted:
            others(listed, members)
        low, done = low + written * k, done + m
    unary = _get_rungs(words, low, unary, end, facts, lengths)
    if unary < 0:
        return unary
    if (unary + 7) >> 3 != nbytes or words[unary >> 6] >> _U(unary & 63):
        return BEHIND
    return 0


@jit
def _sizes(facts):  # type: ignore[no-untyped-def]
    """The changes, the bits of LOW, and those of RAW."""
    changed = low = raw = np.int64(0)
    for c in range(facts.shape[0]):
        more_low, more_raw, _ = plan_ladder(facts, c)
        changed += facts[c, CHANGED]
        low, raw = low + facts[c, WRITTEN] * facts[c, K] + more_low, raw + more_raw
    return changed, low, raw


def unpack(
    facts: Facts, payload: UInts, *, most: int, kind: np.dtype[np.unsignedinteger], rows: int, dead: int
) -> Unpacked:
    """As `lists.unpack`."""
    words = np.zeros(payload.size // 8 + 3, np.uint64)
    words.view(np.uint8)[: payload.size] = payload
    start, listed = _listed_rows(words, payload.size, rows, dead) if dead else (0, None)
    total, low_bits, raw_bits = _sizes(facts)
    raw = start + low_bits
    sign = raw + raw_bits
    wrong = start if start < 0 else ENDS_EARLY if sign + total > 8 * payload.size else 0
    if not wrong:
        ranks, steps, lengths = np.empty(total, np.int64), np.empty(total, kind), np.zeros(total, np.uint8)
        wrong = int(_unpack(facts, words, payload.size, most, start, sign + total, ranks, lengths))
    wrong = wrong or int(_get_steps(words, raw, sign, lengths, steps))
    if wrong:
        raise FormatError(WRONG[wrong])
    return Unpacked(ranks, steps, listed, dead < rows - dead)


def _listed_rows(words: UInts, nbytes: int, rows: int, dead: int) -> tuple[int, Positions]:
    """The rows that stand before everything else, and the bit behind them, or what is wrong."""
    written = min(dead, rows - dead)
    k = int(rice(rows, written))
    if written * (k + 1) > 8 * nbytes:
        return ENDS_EARLY, _NO_ROWS
    listed = np.empty(written, np.int64)
    return int(get_list(words, 0, written * k, 8 * nbytes, k, listed, rows)), listed
