"""Ranks within the classes of the old bits, in Numba: 64 elements at a time, what `classes` says one by one."""

import numba
import numpy as np

from deltawire.errors import WrongBase
from deltawire.format.codecs.classes import CLASSES, Scheme
from deltawire.format.codecs.lists import CHANGED, INVERTED, Facts
from deltawire.format.codecs.vectors_numba import (
    LANES,
    class_column,
    class_masks,
    class_planes,
    count_ones,
    count_up_to,
)
from deltawire.weights.bits import Positions, UInts

_jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
_inline = numba.njit(nogil=True, cache=True, inline="always", error_model="numpy")
CHUNK = LANES * LANES
"""elements of a chunk"""
PLANES = 4 * LANES
"""planes of a chunk"""
_BYTES, _TOPS = 0x0101010101010101, 0x8080808080808080
_U = np.uint64


def _places() -> UInts:
    """[r, byte] flattened: the place of the r-th one of a byte."""
    table = np.zeros((8, 256), np.uint8)
    for byte in range(256):
        ones = [bit for bit in range(8) if byte >> bit & 1]
        table[: len(ones), byte] = ones
    return table.reshape(-1)


PLACES = _places()


@_inline
def _place(mask, r, places):  # type: ignore[no-untyped-def]
    """The place of the r-th one of a mask, without a branch: the sums of its bytes first, then a table."""
    s = mask - ((mask >> _U(1)) & _U(0x5555555555555555))
    s = (s & _U(0x3333333333333333)) + ((s >> _U(2)) & _U(0x3333333333333333))
    s = ((s + (s >> _U(4))) & _U(0x0F0F0F0F0F0F0F0F)) * _U(_BYTES)
    byte = count_ones(((r * _U(_BYTES) | _U(_TOPS)) - s) & _U(_TOPS)) << _U(3)
    rest = r - (((s << _U(8)) >> byte) & _U(255))
    return byte + _U(places[(rest << _U(8)) | ((mask >> byte) & _U(255))])


@_jit
def _fill(old, scheme, planes):  # type: ignore[no-untyped-def]
    """The planes of all elements, chunk by chunk; what lies beyond them is of class 0."""
    last, whole = np.zeros(LANES, old.dtype), old.size // LANES
    for block in range(whole):
        class_planes(old, LANES * block, scheme, planes, block // LANES * PLANES + block % LANES)
    if whole * LANES < old.size:
        for i in range(whole * LANES, old.size):
            last[i - whole * LANES] = old[i]
        class_planes(last, 0, scheme, planes, whole // LANES * PLANES + whole % LANES)


@_jit
def _rank(planes, size, positions, classes, ranks):  # type: ignore[no-untyped-def]
    """The class and the rank of each change; the elements of each class."""
    counts, masks, before = np.zeros(CLASSES, np.int64), np.empty(CLASSES, np.uint64), np.zeros(CLASSES, np.int64)
    p = 0
    for start in range(0, size, LANES):
        end = start + LANES
        at = start // CHUNK * PLANES + start % CHUNK // LANES
        if p == positions.size or positions[p] >= end:
            class_masks(planes, at, masks, counts)
            continue
        for c in range(CLASSES):
            before[c] = counts[c]
        class_masks(planes, at, masks, counts)
        while p < positions.size and positions[p] < end:
            place, own = _U(positions[p] - start), _U(0)
            for bit in range(4):
                own |= ((planes[at + LANES * bit] >> place) & _U(1)) << _U(bit)
            below = (_U(1) << place) - _U(1)
            classes[p], ranks[p] = own, before[own] + np.int64(count_ones(masks[own] & below))
            p += 1
    counts[0] -= -size % LANES
    return counts


@_jit
def _sort(classes, ranks, sorted_ranks, order):  # type: ignore[no-untyped-def]
    """The order by class, each class in its old order, and the ranks in it; the changes of each class."""
    changed, at = np.zeros(CLASSES, np.int64), np.zeros(CLASSES, np.int64)
    for c in classes:
        changed[c] += 1
    for c in range(1, CLASSES):
        at[c] = at[c - 1] + changed[c - 1]
    for p in range(classes.size):
        c = classes[p]
        sorted_ranks[at[c]], order[at[c]] = ranks[p], p
        at[c] += 1
    return changed


@_jit
def _find(planes, size, starts, whole, ranks, positions, order):  # type: ignore[no-untyped-def]
    """Ascending positions of changes that are given class by class, and the order that leads to them; the elements of
    each class that is `whole`. Fewer positions than changes are found where ranks are beyond their class."""
    masks, before, counts = np.empty(LANES, np.uint64), np.empty(LANES, np.uint16), np.zeros(CLASSES, np.int64)
    hits, firsts, found = np.zeros(LANES, np.uint64), np.empty(LANES, np.int64), np.empty(CHUNK, np.int64)
    at, done = starts[:-1].copy(), np.int64(0)
    for start in range(0, size, CHUNK):
        beyond, new = max(0, start + CHUNK - size), 0
        for c in range(CLASSES):
            a, stop = at[c], starts[c + 1]
            if a == stop and not whole[c]:
                continue
            first = counts[c]
            counts[c] += class_column(planes, start // CHUNK * PLANES, _U(c), masks, before) - beyond * (c == 0)
            while a < stop and ranks[a] < counts[c]:
                rank = ranks[a] - first
                block = count_up_to(before, rank) - _U(1)
                place = _place(masks[block], _U(rank - before[block]), PLACES)
                hits[block] |= _U(1) << place
                found[new] = a << 12 | np.int64(block << _U(6) | place)
                a, new = a + 1, new + 1
            at[c] = a
        for block in range(LANES):
            firsts[block] = done
            done = done + np.int64(count_ones(hits[block]))
        for i in range(new):
            block, place = _U(found[i] >> 6 & 63), _U(found[i] & 63)
            k = _U(firsts[block]) + count_ones(hits[block] & ((_U(1) << place) - _U(1)))
            positions[k], order[k] = start + (found[i] & 4095), found[i] >> 12
        for block in range(LANES):
            hits[block] = 0
    return counts, done


def _planes(old: UInts, scheme: Scheme) -> UInts:
    planes = np.zeros(-(-old.size // CHUNK) * PLANES, np.uint64)
    _fill(old, (scheme.shift, scheme.mask, scheme.lowest), planes)
    return planes


def classify(
    old: UInts, positions: Positions, steps: UInts, scheme: Scheme
) -> tuple[Positions, Positions, Positions, UInts]:
    """As `classes.classify`."""
    own, ranks = np.empty(positions.size, np.uint8), np.empty(positions.size, np.int64)
    population = _rank(_planes(old, scheme), old.size, positions, own, ranks)
    sorted_ranks, order = np.empty_like(ranks), np.empty_like(ranks)
    changed = _sort(own, ranks, sorted_ranks, order)
    return population, changed, sorted_ranks, steps[order]


def locate(
    old: UInts, facts: Facts, ranks: Positions, steps: UInts, scheme: Scheme
) -> tuple[Positions, Positions, UInts]:
    """As `classes.locate`."""
    starts, whole = np.concatenate([[0], np.cumsum(facts[:, CHANGED])]), facts[:, INVERTED].copy()
    positions, order = np.empty_like(ranks), np.empty_like(ranks)
    population, found = _find(_planes(old, scheme), old.size, starts, whole, ranks, positions, order)
    if found != ranks.size:
        raise WrongBase("a rank beyond its class: these are not the weights that the delta was made from")
    return population, positions, steps[order]
