"""Rice-coded lists bit by bit, in Numba: what writing and reading a tile are made of.

Two cursors run through a payload: one through the bits whose number the directory tells (LOW, RAW, SIGN), one through
UNARY behind them. Imported where it is used, for the reasons `deltawire.weights.kernels` gives.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from deltawire.format.codecs.lists import LADDER
from deltawire.weights.vectors_numba import zeros_below

jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
inline = numba.njit(nogil=True, cache=True, inline="always", error_model="numpy")
ENDS_EARLY, LEAVES, BEHIND, HALF = -1, -2, -3, -4
"""What can be wrong with a tile: its payload ends inside its lists, a list leaves what it chooses from, bits stand
behind the last list, a step of half the range is written as a positive one."""
_U = np.uint64


@intrinsic
def zeros_above(typing, x):  # type: ignore[no-untyped-def]
    """How many zeros lie above the highest one of x; 64 for 0."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctlz(arguments[0], context.get_constant(types.boolean, False))

    return types.uint64(types.uint64), emit


@inline
def length(x):  # type: ignore[no-untyped-def]
    """Bits of x; 0 for 0."""
    return 64 - np.int64(zeros_above(x))


@inline
def rice(n, written):  # type: ignore[no-untyped-def]
    k = 0
    while written and (133 * written) << k < 64 * (n - written) + 32 * written:
        k += 1
    return k


@inline
def put(words, at, value, width):  # type: ignore[no-untyped-def]
    word, shift = at >> 6, _U(at & 63)
    words[word] |= value << shift
    if (at & 63) + width > 64:
        words[word + 1] |= value >> (_U(64) - shift)


@inline
def get(words, at, width):  # type: ignore[no-untyped-def]
    word, shift = at >> 6, _U(at & 63)
    value = words[word] >> shift
    if (at & 63) + width > 64:
        value |= words[word + 1] << (_U(64) - shift)
    return value & ((_U(1) << _U(width)) - _U(1))


@jit
def put_list(words, low, unary, k, members, n, inverted):  # type: ignore[no-untyped-def]
    """Write the members, or all others below n; the cursors behind them."""
    last, mask, i = np.int64(-1), (np.int64(1) << k) - 1, 0
    for x in range(n if inverted else members.size):
        member = x if inverted else members[x]
        if inverted and i < members.size and members[i] == x:
            i += 1
            continue
        gap = member - last - 1
        last = np.int64(member)
        put(words, low, _U(gap & mask), k)
        low += k
        unary += gap >> k
        words[unary >> 6] |= _U(1) << _U(unary & 63)
        unary += 1
    return low, unary


@jit
def get_list(words, low, unary, end, k, listed, n):  # type: ignore[no-untyped-def]
    """Read as many members below n as `listed` has places; the cursor behind UNARY, or what is wrong."""
    if listed.size == 0:
        return unary
    word, words_left, last = unary >> 6, (end + 63) >> 6, np.int64(-1)
    ones, before = words[word] & (~_U(0) << _U(unary & 63)), unary - 1
    for i in range(listed.size):
        while ones == 0:
            word += 1
            if word >= words_left:
                return ENDS_EARLY
            ones = words[word]
        one = (word << 6) + np.int64(zeros_below(ones))
        ones &= ones - _U(1)
        quotient = one - before - 1
        before = one
        if quotient > n >> k:
            return LEAVES
        last += 1 + ((quotient << k) | np.int64(get(words, low, k)))
        low += k
        if last >= n:
            return LEAVES
        listed[i] = last
    return before + 1 if before < end else ENDS_EARLY


@jit
def others(listed, members):  # type: ignore[no-untyped-def]
    """Fill `members` with the first numbers that are not listed."""
    x = filled = 0
    for i in range(listed.size):
        while x < listed[i] and filled < members.size:
            members[filled] = x
            x += 1
            filled += 1
        x += 1
    while filled < members.size:
        members[filled] = x
        x += 1
        filled += 1


@jit
def plan_ladder(facts, c):  # type: ignore[no-untyped-def]
    low = raw = unary = np.int64(0)
    for level in range(LADDER + 1, facts.shape[1]):
        n, m = facts[c, level - 1], facts[c, level]
        if n == 0:
            break
        written = min(m, n - m)
        k = rice(n, written)
        low, unary = low + written * k, unary + written + ((n - written) >> k)
        if level > LADDER + 1:
            raw += m
    return low, raw, unary
