"""Codecs `subset` (no base) and `class` (needs the old bits): one tensor's change as tiles of Rice-coded lists.

    encode(delta)       -> Coded: what the directory says of each tile, and the tiles' payloads
    decode(coded, spec) -> TensorDelta

`subset` has one class, so an element's rank is its position. `class` ranks a change among the elements of its old
exponent, which takes a third less. Both cut a tensor into tile jobs, which any number of threads may do.
docs/FORMAT.md §5.6, docs/FORMAT.md §5.7
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from deltawire.errors import FormatError, WrongBase
from deltawire.format.codecs import tiles, twins
from deltawire.format.codecs.classes import CLASSES, SCHEMES, Ranked, Scheme
from deltawire.format.codecs.lists import CHANGED, INVERTED, WRITTEN, Changes, ClassLists, Facts, full, short
from deltawire.format.codecs.live_rows import LiveRows, few_live_rows
from deltawire.format.codecs.tiles import Tile
from deltawire.format.codecs.twins import Twin
from deltawire.weights.bits import Positions, UInts, unsigned
from deltawire.weights.delta import TensorDelta, settle
from deltawire.weights.table import TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class TileEntry:
    """What the directory says of one tile: bytes of its payload (0 where nothing changes), rows without a change that
    the ranks leave out, and the lists of its classes."""

    nbytes: int
    dead: int
    lists: tuple[ClassLists, ...]

    @property
    def changed(self) -> int:
        """Changes in the tile."""
        return sum(row.changed for row in self.lists)


NOTHING = TileEntry(0, 0, ())
"""a tile without changes"""
NO_BYTES: UInts = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """One tensor's change in the codec: rows and columns of its tiles, an entry a tile, and their payloads in one.
    `by_class` says whether changes are ranked by the classes of the old bits."""

    tile: tuple[int, int]
    entries: tuple[TileEntry, ...]
    payload: UInts
    by_class: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads."""
        return self.payload.nbytes

    @property
    def changed(self) -> int:
        """Changes in the tensor."""
        return sum(entry.changed for entry in self.entries)


@dataclass(frozen=True, slots=True, eq=False)
class ToEncode:
    """One tile of a tensor's change. `old` are the tensor's bits before it, where changes are ranked by class."""

    tile: Tile
    delta: TensorDelta
    old: UInts | None
    scheme: Scheme | None


class Ranker(Protocol):
    """What changes in a tile, and how it is ranked."""

    @property
    def tile(self) -> Tile: ...
    @property
    def positions(self) -> Positions:
        """Ascending positions in the tile."""

    def ranked(self, twin: Twin) -> Ranked:
        """The changes by class and rank; in one class, where nothing is ranked by old bits."""

    def ranked_among(self, live: Positions, twin: Twin) -> Ranked | None:
        """The same in a tile of those rows alone, which hold all changes; None where that is not known."""


@dataclass(frozen=True, slots=True, eq=False)
class TileChange:
    """A `Ranker` of which the old bits are at hand: `old` are the tile's, where changes are ranked by class."""

    tile: Tile
    positions: Positions
    steps: UInts
    old: UInts | None
    scheme: Scheme | None

    def ranked(self, twin: Twin) -> Ranked:
        if self.scheme is None or self.old is None:
            return Ranked(np.array([self.tile.size]), np.array([self.positions.size]), self.positions, self.steps)
        return twin.classify(self.old, self.positions, self.steps, self.scheme)

    def ranked_among(self, live: Positions, twin: Twin) -> Ranked:
        tile, width = replace(self.tile, rows=live.size), self.tile.width
        positions = np.searchsorted(live, self.positions // width) * width + self.positions % width
        old = None if self.old is None else self.old.reshape(self.tile.rows, width)[live].reshape(-1)
        return replace(self, tile=tile, positions=positions, old=old).ranked(twin)


@dataclass(frozen=True, slots=True, eq=False)
class ToDecode:
    """One tile's entry and payload; `old` as in `ToEncode`."""

    spec: TensorSpec
    tile: Tile
    entry: TileEntry
    payload: UInts
    old: UInts | None
    scheme: Scheme | None


def encode(
    delta: TensorDelta, old: UInts | None = None, *, tile: tuple[int, int] | None = None, twin: Twin | None = None
) -> Coded:
    """One tensor's change; by the classes of `old`, its bits before it, where they are given and its dtype has any.
    `twin` computes it (default: the Numba one)."""
    shape = tile or tiles.choose(delta.shape)
    twin = twin or twins.fast()
    jobs = to_encode(delta, old, shape)
    return coded(shape, jobs, [encode_tile(job, twin) for job in jobs])


def decode(found: Coded, spec: TensorSpec, old: UInts | None = None, *, twin: Twin | None = None) -> TensorDelta:
    """The inverse of `encode`; `old` where it was given there. Entries are those `directory.read` accepts for `spec`.

    Raises FormatError where the payload is not what the entries say, and WrongBase where it cannot be of `old`.
    """
    twin = twin or twins.fast()
    return decoded(spec, found.tile, [decode_tile(job, twin) for job in to_decode(found, spec, old)])


def to_encode(delta: TensorDelta, old: UInts | None, tile: tuple[int, int]) -> list[ToEncode]:
    """A job a tile, in the order of the grid."""
    scheme = SCHEMES.get(delta.dtype) if old is not None else None
    return [ToEncode(part, delta, old if scheme else None, scheme) for part in tiles.grid(delta.shape, tile)]


def coded(tile: tuple[int, int], jobs: Sequence[ToEncode], done: Sequence[tuple[TileEntry, UInts]]) -> Coded:
    """The jobs' results as one tensor's."""
    return joined(tile, done, by_class=any(job.scheme for job in jobs))


def joined(tile: tuple[int, int], done: Sequence[tuple[TileEntry, UInts]], *, by_class: bool) -> Coded:
    """The entries and payloads of a tensor's tiles as one."""
    payloads = [payload for _, payload in done] or [NO_BYTES]
    payload = payloads[0] if len(payloads) == 1 else np.concatenate(payloads)
    return Coded(tile, tuple(entry for entry, _ in done), payload, by_class)


def everywhere(tile: Tile) -> bool:
    """Whether the old bits of a tile are at hand, where all are."""
    return True


def to_decode(
    found: Coded, spec: TensorSpec, old: UInts | None, at_hand: Callable[[Tile], bool] = everywhere
) -> list[ToDecode]:
    """A job for each tile in which anything changes, of those that are `at_hand`. Raises FormatError for entries that
    are not all of the tensor."""
    scheme = SCHEMES.get(spec.dtype) if old is not None else None
    at, jobs = 0, []
    for part, entry in zip(tiles.grid(spec.shape, found.tile), found.entries, strict=True):
        payload = found.payload[at : at + entry.nbytes]
        at += entry.nbytes
        if entry.nbytes and at_hand(part):
            bits = part.cut(old) if scheme is not None and old is not None else None
            jobs.append(ToDecode(spec, part, entry, payload, bits, scheme))
    if at != found.payload.size or found.changed != spec.changed:
        raise FormatError(f"{spec.name}: its tiles are not what the directory says of it")
    return jobs


def decoded(spec: TensorSpec, tile: tuple[int, int], done: list[tuple[Positions, UInts]]) -> TensorDelta:
    """The jobs' results as one tensor's change."""
    done = done or [(np.empty(0, np.int64), np.empty(0, unsigned(spec.dtype)))]
    positions, steps = done[0] if len(done) == 1 else (np.concatenate(parts) for parts in zip(*done, strict=True))
    return settle(spec.dtype, spec.shape, *tiles.in_order(tile, spec.shape, positions, steps))


def changes_in(tile: Tile, delta: TensorDelta) -> tuple[Positions, UInts]:
    """A tile's changes, by their positions in it. Made when it is encoded: they take more memory than the tile
    itself."""
    if delta.positions is None:
        own = tile.cut(delta.steps)
        positions = np.flatnonzero(own)
        return positions, own[positions]
    positions, places = tile.inside(delta.positions)
    return positions, delta.steps[places]


def encode_tile(job: ToEncode, twin: Twin) -> tuple[TileEntry, UInts]:
    """One tile's entry and payload."""
    positions, steps = changes_in(job.tile, job.delta)
    if not positions.size:
        return NOTHING, NO_BYTES
    change = TileChange(job.tile, positions, steps, None if job.old is None else job.tile.cut(job.old), job.scheme)
    return encode_change(change, change.ranked(twin), twin)


def encode_change(change: Ranker, ranked: Ranked, twin: Twin) -> tuple[TileEntry, UInts]:
    """The entry and payload of a tile in which something changes: with all rows or, where that is shorter, without
    those in which nothing does."""
    rows = change.tile.rows
    every = _pack(ranked, rows, None, twin)
    live = few_live_rows(change.tile, change.positions, every[1].size, twin)
    among = None if live is None else change.ranked_among(live, twin)
    if among is None:
        return every
    some = _pack(among, rows, live, twin)
    return some if some[1].size < every[1].size else every


def _pack(ranked: Ranked, rows: int, live: Positions | None, twin: Twin) -> tuple[TileEntry, UInts]:
    facts, payload = twin.pack(Changes(*ranked, rows, live))
    return TileEntry(payload.size, 0 if live is None else rows - live.size, short(facts)), payload


def decode_tile(job: ToDecode, twin: Twin) -> tuple[Positions, UInts]:
    """One tile's changes: ascending positions in the tensor, and steps. Raises FormatError, WrongBase."""
    try:
        inside, steps = _unpack(job, twin)
    except (FormatError, WrongBase) as error:
        raise type(error)(f"{job.spec.name}: {error}") from None
    if job.tile.contiguous:
        inside += job.tile.start
        return inside, steps
    return job.tile.outside(inside), steps


def _unpack(job: ToDecode, twin: Twin) -> tuple[Positions, UInts]:
    tile, dead, kind = job.tile, job.entry.dead, unsigned(job.spec.dtype)
    most = (tile.rows - dead) * tile.width
    facts = full(job.entry.lists, CLASSES if job.scheme else 1, kind.itemsize)
    found = twin.unpack(facts, job.payload, most=most, kind=kind, rows=tile.rows, dead=dead)
    live = None if found.rows is None else LiveRows(found.rows, found.dead_listed)
    population, positions, steps = np.array([most]), found.ranks, found.steps
    if job.scheme is not None and job.old is not None:
        old = job.old if live is None else live.cut(job.old, tile.rows, tile.rows - dead)
        population, positions, steps = twin.locate(old, facts, positions, steps, job.scheme)
    _check_population(facts, population)
    return (positions if live is None else live.outside(positions, tile.width)), steps


def _check_population(facts: Facts, population: Positions) -> None:
    """A class whose unchanged elements are listed has no others than the listed and the changed."""
    inverted = facts[:, INVERTED] > 0
    if inverted.any() and (facts[inverted, CHANGED] + facts[inverted, WRITTEN] != population[inverted]).any():
        error = FormatError if facts.shape[0] == 1 else WrongBase
        raise error("the changed and the listed unchanged elements of a class are not all that it has")


def warm_up() -> None:
    """Compile the loops that read and write changes: without old weights for every element width, and by the classes of
    16-bit ones, which most servers hold."""
    for dtype, by_class in (("U8", False), ("BF16", False), ("BF16", True), ("F32", False), ("F64", False)):
        old = np.zeros(4, unsigned(dtype)) if by_class else None
        delta = TensorDelta(dtype, (2, 2), np.ones(1, np.int64), np.full(1, 7, unsigned(dtype)))
        decode(encode(delta, old), TensorSpec("warm-up", dtype, (2, 2), 1), old)
