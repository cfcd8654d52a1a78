"""A tile's changes written as Rice-coded lists, in Numba: one call a tile, bit for bit what `lists.pack` writes."""

import numpy as np

from deltawire.format.codecs.bits_numba import jit, length, plan_ladder, put, put_list, rice
from deltawire.format.codecs.lists import CHANGED, INVERTED, LADDER, WRITTEN, Changes, Facts, K, columns
from deltawire.weights.bits import Positions, UInts

_U = np.uint64
_NO_ROWS = np.empty(0, np.int64)


@jit
def _ladder(changed, steps, facts, ordinals, values):  # type: ignore[no-untyped-def]
    """Count the rungs into `facts`; the changes on the first as ordinals in their class, and their |step| - 1."""
    top, start, found = _U(1) << _U(8 * steps.itemsize - 1), 0, 0
    for c in range(changed.size):
        for i in range(changed[c]):
            step = _U(steps[start + i])
            value = step - _U(1) if step < top else top + top - step - _U(1)
            ordinals[found], values[found] = i, value
            found += value != 0
            facts[c, LADDER + length(value)] += 1
        start += changed[c]
        for level in range(facts.shape[1] - 2, LADDER - 1, -1):
            facts[c, level] += facts[c, level + 1]
    return found


@jit
def _plan(population, facts):  # type: ignore[no-untyped-def]
    """Fill the facts of the position lists; the bits of all LOW, of RAW, and at most of UNARY."""
    low = raw = unary = np.int64(0)
    for c in range(population.size):
        n, m = population[c], facts[c, LADDER]
        if m == 0:
            continue
        inverted = 2 * m > n
        written = n - m if inverted else m
        k = rice(n, written)
        facts[c, CHANGED], facts[c, WRITTEN], facts[c, K], facts[c, INVERTED] = m, written, k, inverted
        low, unary = low + written * k, unary + written + ((n - written) >> k)
        more_low, more_raw, more_unary = plan_ladder(facts, c)
        low, raw, unary = low + more_low, raw + more_raw, unary + more_unary
    return low, raw, unary


@jit
def _put_rungs(words, low, unary, facts, ordinals, values):  # type: ignore[no-untyped-def]
    """Write the lists of the ladder. `ordinals` and `values` are those of the first rung, and are used up."""
    for level in range(LADDER + 1, facts.shape[1]):
        read = kept = 0
        for c in range(facts.shape[0]):
            n, m = facts[c, level - 1], facts[c, level]
            if n == 0:
                continue
            if level > LADDER + 1:
                found = 0
                for i in range(n):
                    value = values[read + i]
                    if value >> _U(level - LADDER - 1):
                        ordinals[kept + found], values[kept + found] = i, value
                        found += 1
                read += n
            k = rice(n, min(m, n - m))
            low, unary = put_list(words, low, unary, k, ordinals[kept : kept + m], n, 2 * m > n)
            kept += m
        if kept == 0:
            break
    return unary


@jit
def _put_signs(words, at, steps):  # type: ignore[no-untyped-def]
    top, i = _U(8 * steps.itemsize - 1), 0
    for start in range(0, steps.size, 64):
        size, signs = min(64, steps.size - start), _U(0)
        for i in range(size):
            signs |= (_U(steps[start + i]) >> top) << _U(i)
        put(words, at + start, signs, size)


@jit
def _pack(population, facts, ranks, ordinals, values, rows, live):  # type: ignore[no-untyped-def]
    """The words of a payload, but for the signs; the first bit of those, and the bit behind all."""
    low_bits, raw_bits, unary_bits = _plan(population, facts)
    written = min(live.size, rows - live.size)
    k = rice(rows, written)
    if live.size:
        unary_bits += written * (k + 1) + (rows >> k)
    words = np.zeros((low_bits + raw_bits + ranks.size + unary_bits) // 64 + 4, np.uint64)
    low = np.int64(0)
    if live.size:
        _, low = put_list(words, 0, written * k, k, live, rows, 2 * live.size > rows)
    raw = low + low_bits
    sign = raw + raw_bits
    for i in range(values.size):
        width = length(values[i]) - 1
        put(words, raw, values[i] & ((_U(1) << _U(width)) - _U(1)), width)
        raw += width
    unary, start = sign + ranks.size, 0
    for c in range(population.size):
        own = ranks[start : start + facts[c, CHANGED]]
        if own.size:
            low, unary = put_list(words, low, unary, facts[c, K], own, population[c], facts[c, INVERTED] > 0)
        start += facts[c, CHANGED]
    return words, sign, _put_rungs(words, low, unary, facts, ordinals, values)


@jit
def _live_rows(positions, width, live):  # type: ignore[no-untyped-def]
    found, end = 0, np.int64(0)
    for position in positions:
        if position >= end:
            if found == live.size:
                return found + 1
            row = position // width
            live[found] = row
            found, end = found + 1, (row + 1) * width
    return found


def pack(changes: Changes) -> tuple[Facts, UInts]:
    """As `lists.pack`."""
    steps, ranks = changes.steps, changes.ranks
    facts = np.zeros((changes.population.size, columns(steps.itemsize)), np.int64)
    ordinals, values = np.empty(steps.size + 1, np.int64), np.empty(steps.size + 1, np.uint64)
    found = _ladder(changes.changed, steps, facts, ordinals, values)
    live = _NO_ROWS if changes.live is None else changes.live
    first = ordinals[:found], values[:found]
    words, sign, end = _pack(changes.population, facts, ranks, *first, changes.rows, live)
    _put_signs(words, sign, steps)
    return facts, words.view(np.uint8)[: (end + 7) // 8]


def live_rows(positions: Positions, width: int, limit: int) -> Positions:
    """The rows that hold a change, ascending; more than `limit` of them where there are more."""
    live = np.empty(limit + 1, np.int64)
    found: Positions = live[: int(_live_rows(positions, width, live))]
    return found
