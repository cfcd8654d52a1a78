"""Ranks within the classes of the old bits, in Numba: 64 elements at a time, what `classes` says one by one.

`compare` reads old and new bits once, and finds what changed, its class and its rank as it goes.
"""

import numba
import numpy as np

from deltawire.errors import WrongBase
from deltawire.format.codecs.classes import CLASSES, Ranked, Scheme
from deltawire.format.codecs.lists import CHANGED, INVERTED, Facts
from deltawire.format.codecs.vectors_numba import class_column, class_masks, class_planes, count_up_to
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.found import Found, Scratch, room_for, roomier
from deltawire.weights.vectors_numba import BLOCKS, CHUNK, LANES, aligned, count_ones, note_changes

_jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
_inline = numba.njit(nogil=True, cache=True, inline="always", error_model="numpy")
COLUMN = LANES * LANES
"""elements whose planes lie together"""
PLANES = 4 * LANES
"""planes of those"""
CLASS_AT = 48
"""A change's key is its rank, and from this bit on its class: a tensor has fewer elements than 2^48."""
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


@_inline
def _fill(old, start, scheme, planes, last):  # type: ignore[no-untyped-def]
    """The planes of a column's elements, from `start` on; what lies beyond the tensor is of class 0. `last` has room
    for 64 elements."""
    size = min(COLUMN, old.size - start)
    for block in range(size // LANES):
        class_planes(old, start + LANES * block, scheme, planes, block)
    if size < COLUMN:
        last[:] = 0
        for block in range(size // LANES, LANES):
            class_planes(last, 0, scheme, planes, block)
        if size % LANES:
            for i in range(size % LANES):
                last[i] = old[start + size // LANES * LANES + i]
            class_planes(last, 0, scheme, planes, size // LANES)


@_inline
def _class_of(bits, scheme):  # type: ignore[no-untyped-def]
    shift, mask, lowest = scheme
    return _U(min(max(np.int64((_U(bits) >> _U(shift)) & _U(mask)) - lowest, 0), CLASSES - 1))


@_inline
def _key(bits, place, scheme, masks, before):  # type: ignore[no-untyped-def]
    """The key of the change at a place of a chunk whose classes are known."""
    c = _class_of(bits, scheme)
    at = (place // _U(LANES)) * _U(CLASSES) + c
    below = (_U(1) << (place % _U(LANES))) - _U(1)
    return (c << _U(CLASS_AT)) | (before[at] + count_ones(masks[at] & below))


@_jit
def _compare(old, new, scheme, start, first, found, positions, steps, keys, counts):  # type: ignore[no-untyped-def]
    """As `_collect` of the kernels, with the keys of the changes from the `first` on; the elements of each class are
    added to `counts`."""
    own, places = aligned(CHUNK * old.itemsize // 8).view(old.dtype), np.empty(CHUNK + 2, np.uint32)
    masks, before, counted = aligned(BLOCKS * CLASSES), aligned(BLOCKS * CLASSES), aligned(CLASSES)
    counted[:] = counts
    whole, k, first = old.size // LANES * LANES, _U(found), _U(first)
    room = min(_U(positions.size), first + _U(keys.size))
    for at in range(start, whole, CHUNK):
        if k + _U(CHUNK) > room:
            counts[:] = counted
            return at, np.int64(k)
        blocks = min(BLOCKS, (whole - at) // LANES)
        many = note_changes(old, new, at, blocks, own, places)
        for block in range(blocks):
            class_masks(old, at + LANES * block, scheme, masks, before, counted, CLASSES * block)
        for i in range(many):
            place = _U(places[i])
            element = _U(at) + place
            positions[k + i], steps[k + i] = element, own[place]
            keys[k - first + i] = _key(old[element], place, scheme, masks, before)
        k += many
    counts[:] = counted
    if k + _U(LANES) > room:
        return max(start, whole), np.int64(k)
    for j in range(max(start, whole), old.size):
        c, step = _class_of(old[j], scheme), new[j] - old[j]
        positions[k], steps[k], keys[k - first] = j, step, (c << _U(CLASS_AT)) | counts[c]
        counts[c] += _U(1)
        k += _U(step != 0)
    return old.size, np.int64(k)


@_jit
def _rank(old, scheme, positions, keys, counts):  # type: ignore[no-untyped-def]
    """The keys of changes at ascending positions; the elements of each class are added to `counts`."""
    masks, before, counted = aligned(BLOCKS * CLASSES), aligned(BLOCKS * CLASSES), aligned(CLASSES)
    counted[:] = counts
    whole, k = old.size // LANES * LANES, _U(0)
    for at in range(0, whole, CHUNK):
        blocks = min(BLOCKS, (whole - at) // LANES)
        for block in range(blocks):
            class_masks(old, at + LANES * block, scheme, masks, before, counted, CLASSES * block)
        while k < _U(positions.size) and positions[k] < at + LANES * blocks:
            element = _U(positions[k])
            keys[k] = _key(old[element], element - _U(at), scheme, masks, before)
            k += _U(1)
    counts[:] = counted
    for j in range(whole, old.size):
        c = _class_of(old[j], scheme)
        if k < _U(positions.size) and positions[k] == j:
            keys[k] = (c << _U(CLASS_AT)) | counts[c]
            k += _U(1)
        counts[c] += _U(1)


@_jit
def _sort(keys, steps, changed, ranks, sorted_steps):  # type: ignore[no-untyped-def]
    """Ranks and steps class by class, each class in its old order; the changes of each class."""
    at = np.zeros(CLASSES, np.uint64)
    for key in keys:
        changed[key >> _U(CLASS_AT)] += 1
    for c in range(1, CLASSES):
        at[c] = at[c - 1] + _U(changed[c - 1])
    for p in range(keys.size):
        c = keys[p] >> _U(CLASS_AT)
        ranks[at[c]], sorted_steps[at[c]] = keys[p] & _U((1 << CLASS_AT) - 1), steps[p]
        at[c] += _U(1)


@_jit
def _find(old, scheme, facts, ranks, positions, order):  # type: ignore[no-untyped-def]
    """Ascending positions of changes that are given class by class, and the order that leads to them; the elements of
    each class whose unchanged are listed. Fewer positions than changes are found where ranks are beyond their class.

    Each step is a loop of its own. How many changes of a class a column has is not to be predicted, and a wrong guess
    costs least where nothing else waits for it."""
    planes, last = aligned(PLANES), aligned(LANES * old.itemsize // 8).view(old.dtype)
    masks, before = aligned(LANES * CLASSES), aligned(LANES * CLASSES // 4).view(np.uint16)
    firsts, counts = np.zeros(CLASSES, np.int64), np.zeros(CLASSES, np.int64)
    hits, items, done = aligned(LANES), np.empty(COLUMN, np.uint64), _U(0)
    at, ends = np.zeros(CLASSES, np.uint64), np.cumsum(facts[:, CHANGED])
    at[1:] = ends[:-1]
    for start in range(0, old.size, COLUMN):
        _fill(old, start, scheme, planes, last)
        for c in range(CLASSES):
            firsts[c] = counts[c]
            if facts[c, INVERTED] or at[c] < _U(ends[c]):
                counts[c] += class_column(planes, _U(c), masks, before)
        if start + COLUMN > old.size and counts[0] > firsts[0]:
            counts[0] -= start + COLUMN - old.size
        new = _U(0)
        for c in range(CLASSES):
            a, stop, first, end = at[c], _U(ends[c]), firsts[c], counts[c]
            while a < stop and ranks[a] < end:
                items[new] = (a << _U(16)) | _U(c << 12) | _U(ranks[a] - first)
                a, new = a + _U(1), new + _U(1)
            at[c] = a
        _place_items(items, new, masks, before, hits)
        done = _order_items(items, new, hits, before, start, done, positions, order)
    return counts, np.int64(done)


@_inline
def _place_items(items, new, masks, before, hits):  # type: ignore[no-untyped-def]
    """Put a change's place in the column (12 bits) for its class (4 bits) and its rank among those of the class in the
    column (12 bits), and mark it in `hits`."""
    hits[:] = 0
    for i in range(new):
        row, rank = _U(LANES) * ((items[i] >> _U(12)) & _U(CLASSES - 1)), items[i] & _U(COLUMN - 1)
        block = count_up_to(before, row, rank) - _U(1)
        place = _place(masks[row + block], rank - _U(before[row + block]), PLACES)
        hits[block] |= _U(1) << place
        items[i] = (items[i] >> _U(16) << _U(12)) | (block << _U(6)) | place


@_inline
def _order_items(items, new, hits, firsts, start, done, positions, order):  # type: ignore[no-untyped-def]
    """Write a column's changes from `done` on, by ascending positions; how many are written then."""
    total = _U(0)
    for block in range(LANES):
        firsts[block] = total
        total += count_ones(hits[block])
    for i in range(new):
        block, place = (items[i] >> _U(6)) & _U(LANES - 1), items[i] & _U(LANES - 1)
        k = done + _U(firsts[block]) + count_ones(hits[block] & ((_U(1) << place) - _U(1)))
        positions[k], order[k] = _U(start) + (items[i] & _U(COLUMN - 1)), items[i] >> _U(12)
    return done + total


def compare(old: UInts, new: UInts, scheme: Scheme, found: Found, scratch: Scratch) -> Ranked:
    """As `classes.compare`. Another thread may write `new` meanwhile: each of its elements is read once."""
    first, at, counts = found.count, 0, np.zeros(CLASSES, np.uint64)
    keys: UInts = scratch.array("keys", room_for(old.size), np.uint64)
    while True:
        arrays = (found.positions, found.steps, keys, counts)
        at, found.count = _compare(old, new, _numbers(scheme), at, first, found.count, *arrays)
        if at == old.size:
            return _ranked(counts, keys[: found.count - first], found.steps[first : found.count], scratch)
        if found.positions.size <= first + keys.size:  # one has no room left, and not for the other's sake more
            found.grow()
        else:
            keys = roomier(keys, found.count - first)


def classify(old: UInts, positions: Positions, steps: UInts, scheme: Scheme) -> Ranked:
    """As `classes.classify`."""
    keys, counts = np.empty(positions.size, np.uint64), np.zeros(CLASSES, np.uint64)
    _rank(old, _numbers(scheme), positions, keys, counts)
    return _ranked(counts, keys, steps, Scratch())


def _numbers(scheme: Scheme) -> tuple[int, int, int]:
    return scheme.shift, scheme.mask, scheme.lowest


def _ranked(counts: UInts, keys: UInts, steps: UInts, scratch: Scratch) -> Ranked:
    ranks, own = (scratch.array(name, keys.size, kind) for name, kind in (("ranks", np.int64), ("steps", steps.dtype)))
    changed = np.zeros(CLASSES, np.int64)
    _sort(keys, steps, changed, ranks, own)
    return Ranked(counts.astype(np.int64), changed, ranks, own)


def locate(
    old: UInts, facts: Facts, ranks: Positions, steps: UInts, scheme: Scheme
) -> tuple[Positions, Positions, UInts]:
    """As `classes.locate`."""
    positions, order = np.empty_like(ranks), np.empty_like(ranks)
    population, found = _find(old, _numbers(scheme), facts, ranks, positions, order)
    if found != ranks.size:
        raise WrongBase("a rank beyond its class: these are not the weights that the delta was made from")
    return population, positions, steps[order]
