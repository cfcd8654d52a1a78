"""A tile's changes as Rice-coded lists, in numpy: the slow and obvious twin, which says what the fast ones compute.

One primitive codes all that is hard to say of a change: `list(n, m)`, which m of n things are meant. The changed ranks
of a class are such a list, and so are the larger among its steps, the largest among those, and the rows that hold any
change. docs/FORMAT.md §5.6 has the layout of the bits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deltawire.errors import FormatError
from deltawire.weights.bits import Positions, UInts

CHANGED, WRITTEN, K, INVERTED, LADDER = 0, 1, 2, 3, 4
"""columns of Facts; the ladder's first rung is column LADDER + 1, and column LADDER repeats the changes"""
Facts = npt.NDArray[np.int64]
"""What the directory says of a tile: one row a class, of its changes, the members written, k, whether the unchanged are
those written, and the changes on each rung of the ladder. A class without changes is a row of zeros."""
MAX_K = 47


class ClassLists(NamedTuple):
    """A row of Facts that has changes, in few bytes: which class, its changes, the members written, k, whether the
    unchanged are those written, and the changes on each rung of the ladder that has any."""

    number: int
    changed: int
    written: int
    k: int
    inverted: bool
    ladder: tuple[int, ...]


def short(facts: Facts) -> tuple[ClassLists, ...]:
    """The rows that have changes."""
    return tuple(
        ClassLists(
            number, row[CHANGED], row[WRITTEN], row[K], row[INVERTED] > 0, tuple(filter(None, row[LADDER + 1 :]))
        )
        for number, row in enumerate(facts.tolist())
        if row[CHANGED]
    )


def full(rows: Iterable[ClassLists], classes: int, itemsize: int) -> Facts:
    """The inverse of `short`."""
    facts = np.zeros((classes, columns(itemsize)), np.int64)
    for number, changed, written, k, inverted, ladder in rows:
        facts[number, : LADDER + 1 + len(ladder)] = changed, written, k, inverted, changed, *ladder
    return facts


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """A tile's changes, class by class. `population` counts the elements of each class in the live rows, `changed`
    those that change; `ranks` (ascending within a class) and `steps` are in the order of the classes. `rows` and `live`
    tell which rows the ranks count (ascending; None for all of them)."""

    population: npt.NDArray[np.int64]
    changed: npt.NDArray[np.int64]
    ranks: Positions
    steps: UInts
    rows: int = 1
    live: Positions | None = None


def rice(n: int, written: int) -> int:
    """K(n, w), for a list of w among n: the smallest k with 133 w 2^k >= 64 (n - w) + 32 w."""
    return (-(-(64 * (n - written) + 32 * written) // (133 * written)) - 1).bit_length() if written else 0


def columns(itemsize: int) -> int:
    """Columns of the facts about elements of so many bytes."""
    return LADDER + 8 * itemsize


def plan(population: npt.NDArray[np.int64], ladder: npt.NDArray[np.int64]) -> Facts:
    """The facts, from the elements of each class and a ladder [classes, rungs + 1] that begins with the changes."""
    facts = np.zeros((population.size, LADDER + ladder.shape[1]), np.int64)
    facts[:, LADDER:] = ladder
    for row, n, m in zip(facts, population.tolist(), ladder[:, 0].tolist(), strict=True):
        inverted = 2 * m > n
        written = n - m if inverted else m
        if m:
            row[:LADDER] = m, written, rice(n, written), inverted
    return facts


def rungs(facts: Facts) -> list[list[tuple[int, int, int, int]]]:
    """Rung by rung the lists of the ladder: (class, things to choose from, chosen, written) where there are any."""
    found = []
    for level in range(LADDER + 1, facts.shape[1]):
        tops, chosen = facts[:, level - 1].tolist(), facts[:, level].tolist()
        row = [(c, n, m, min(m, n - m)) for c, (n, m) in enumerate(zip(tops, chosen, strict=True)) if n]
        if not row:
            break
        found.append(row)
    return found


def magnitudes(steps: UInts) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Of each step: whether it is negative, |step| - 1, and how many bits that has."""
    bits = 8 * steps.itemsize
    negative = (steps >> steps.dtype.type(bits - 1)).astype(bool)
    low = np.where(negative, np.negative(steps), steps).astype(np.uint64) - np.uint64(1)
    lengths = np.zeros(steps.size, np.int64)
    for bit in range(bits - 1):
        lengths += (low >> np.uint64(bit)) != 0
    return negative, low, lengths


def ladder_of(changed: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int64]:
    """[classes, bits]: changes of each class, and those of at least 1, 2, … bits."""
    owner = np.repeat(np.arange(changed.size), changed)
    rung = [np.bincount(owner[lengths >= level], minlength=changed.size) for level in range(bits)]
    return np.stack(rung, axis=1)


def pack(changes: Changes) -> tuple[Facts, UInts]:
    """What the directory says of the tile, and its payload (uint8)."""
    negative, low, lengths = magnitudes(changes.steps)
    facts = plan(changes.population, ladder_of(changes.changed, lengths, 8 * changes.steps.itemsize))
    starts = np.concatenate([[0], np.cumsum(changes.changed)])
    lists = [
        _listed(changes.ranks[start : start + m], n, bool(inverted))
        for n, start, m, inverted in zip(
            changes.population.tolist(), starts.tolist(), facts[:, CHANGED].tolist(), facts[:, INVERTED], strict=False
        )
        if m
    ]
    coded = [_coded(gaps, int(k)) for gaps, k in zip(lists, facts[facts[:, CHANGED] > 0, K], strict=True)]
    for level, rung in enumerate(rungs(facts), 1):
        for c, n, m, written in rung:
            own = lengths[starts[c] : starts[c + 1]]
            chosen = np.flatnonzero(own[own >= level - 1] >= level)
            coded.append(_coded(_listed(chosen, n, 2 * m > n), rice(n, written)))
    head = [] if changes.live is None else list(_live_list(changes.rows, changes.live))
    raw = _fields(low, np.maximum(lengths - 1, 0))
    parts = [*head, *(low for low, _ in coded), raw, negative, *(unary for _, unary in coded)]
    return facts, np.packbits(np.concatenate(parts).astype(bool), bitorder="little")


def _live_list(rows: int, live: Positions) -> tuple[UInts, UInts]:
    return _coded(_listed(live, rows, 2 * live.size > rows), rice(rows, min(live.size, rows - live.size)))


def _listed(members: Positions, n: int, inverted: bool) -> Positions:
    """The gaps before the members, or before all others."""
    if inverted:
        others = np.ones(n, bool)
        others[members] = False
        members = np.flatnonzero(others)
    return np.diff(members, prepend=-1) - 1


def _coded(gaps: Positions, k: int) -> tuple[UInts, UInts]:
    """A list's LOW and UNARY bits."""
    low = (gaps[:, None] >> np.arange(k) & 1).astype(np.uint8).reshape(-1)
    ends = np.cumsum((gaps >> k) + 1)
    unary = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    unary[ends - 1] = 1
    return low, unary


def _fields(values: npt.NDArray[np.uint64], widths: npt.NDArray[np.int64]) -> UInts:
    """So many low bits of each value, least first, one after another."""
    out = np.zeros(int(widths.sum()), np.uint8)
    at = np.cumsum(widths) - widths
    for bit in range(int(widths.max(initial=0))):
        wide = widths > bit
        out[at[wide] + bit] = values[wide] >> np.uint64(bit) & np.uint64(1)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Unpacked:
    """A tile's changes as its bits tell them, without weights: `ranks` and `steps` in the order of the classes, and the
    listed rows, which are the live ones or (`dead_listed`) the others; None where all rows are live."""

    ranks: Positions
    steps: UInts
    rows: Positions | None = None
    dead_listed: bool = False


def unpack(
    facts: Facts, payload: UInts, *, most: int, kind: np.dtype[np.unsignedinteger], rows: int, dead: int
) -> Unpacked:
    """The inverse of `pack`, for steps of dtype `kind`. `most` is the number of elements in the live rows.

    Raises FormatError where the bits are not those of the facts; memory is spent only as the payload has bits.
    """
    bits = np.unpackbits(payload, bitorder="little").astype(np.int64)
    at, listed = 0, None
    if dead:
        written = min(dead, rows - dead)
        k = rice(rows, written)
        (listed,), at = _read_lists(bits, [(rows, written, k)], 0, written * k)
    rows_of_lists = [
        (m + w if inverted else most, w, k) for m, w, k, inverted in facts[facts[:, CHANGED] > 0, :LADDER].tolist()
    ]
    ladder = rungs(facts)
    rows_of_lists += [(n, w, rice(n, w)) for rung in ladder for _, n, _, w in rung]
    total = int(facts[:, CHANGED].sum())
    low_bits = sum(w * k for _, w, k in rows_of_lists)
    raw_at = at + low_bits
    sign_at = raw_at + int(facts[:, LADDER + 2 :].sum())
    lists, end = _read_lists(bits, rows_of_lists, at, sign_at + total)
    if (end + 7) // 8 != payload.size or bits[end:].any():
        raise FormatError("bits behind the last list of a tile")
    ranks = [
        _members(found, m, bool(inverted))
        for found, m, inverted in zip(
            lists, *facts[facts[:, CHANGED] > 0][:, [CHANGED, INVERTED]].T.tolist(), strict=False
        )
    ]
    lengths = _climb(facts, ladder, lists[len(ranks) :])
    steps = _steps(bits, raw_at, sign_at, lengths, kind)
    return Unpacked(np.concatenate(ranks), steps, listed, dead < rows - dead)


def _read_lists(
    bits: Positions, lists: list[tuple[int, int, int]], low_at: int, unary_at: int
) -> tuple[list[Positions], int]:
    """What each list (n, written, k) holds, their LOW from `low_at` and their UNARY from `unary_at` on; and the bit
    behind the last. Raises FormatError where they end early or leave their n."""
    total = sum(written for _, written, _ in lists)
    ones = np.flatnonzero(bits[unary_at:])[:total] if unary_at <= bits.size else bits[:0]
    if ones.size < total or unary_at > bits.size:
        raise FormatError("the payload of a tile ends inside its lists")
    quotients = np.diff(ones, prepend=-1) - 1
    found, done = [], 0
    for n, written, k in lists:
        own = quotients[done : done + written]
        low = bits[low_at : low_at + written * k].reshape(written, k) << np.arange(k)
        if (own > n >> k).any():
            raise FormatError("a list of a tile leaves what it chooses from")
        members = np.cumsum((own << k) + low.sum(axis=1) + 1) - 1
        if written and int(members.max()) >= n:
            raise FormatError("a list of a tile leaves what it chooses from")
        found.append(members)
        low_at, done = low_at + written * k, done + written
    return found, unary_at + (int(ones[-1]) + 1 if total else 0)


def _members(listed: Positions, m: int, inverted: bool) -> Positions:
    """Those meant by a list: the listed, or the m others."""
    if not inverted:
        return listed
    others = np.ones(m + listed.size, bool)
    others[listed] = False
    return np.flatnonzero(others)


def _climb(
    facts: Facts, ladder: list[list[tuple[int, int, int, int]]], lists: list[Positions]
) -> npt.NDArray[np.int64]:
    """How many bits |step| - 1 of each change has."""
    changed = facts[:, CHANGED]
    starts = np.cumsum(changed) - changed
    lengths = np.zeros(int(changed.sum()), np.int64)
    standing = [start + np.arange(m) for start, m in zip(starts.tolist(), changed.tolist(), strict=True)]
    for level, rung in enumerate(ladder, 1):
        for c, n, m, _ in rung:
            standing[c] = standing[c][_members(lists.pop(0), m, 2 * m > n)]
            lengths[standing[c]] = level
    return lengths


def _steps(
    bits: Positions, raw_at: int, sign_at: int, lengths: npt.NDArray[np.int64], kind: np.dtype[np.unsignedinteger]
) -> UInts:
    widths = np.maximum(lengths - 1, 0)
    at = raw_at + np.cumsum(widths) - widths
    low = np.where(lengths > 0, np.uint64(1) << widths.astype(np.uint64), np.uint64(0))
    for bit in range(int(widths.max(initial=0))):
        wide = widths > bit
        low[wide] |= bits[at[wide] + bit].astype(np.uint64) << np.uint64(bit)
    negative = bits[sign_at : sign_at + lengths.size].astype(bool)
    if (low[~negative] == np.uint64((1 << (8 * kind.itemsize - 1)) - 1)).any():
        raise FormatError("a step of half the range is written as a positive one")
    size = (low + np.uint64(1)).astype(kind)
    steps: UInts = np.where(negative, np.negative(size), size)
    return steps
