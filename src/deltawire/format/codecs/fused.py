"""Compare two versions of a tensor and encode what changed, tile by tile: the bits come from memory once.

    compare(old, new, by_class=True) -> (TensorDelta, Coded)

are the change, and what `subset.encode` makes of it. A tile's bits are compared, classified and ranked in one pass,
and packed while they are near. Threads share the tiles of a large tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deltawire.format.codecs import tiles, twins
from deltawire.format.codecs.classes import SCHEMES, Scheme
from deltawire.format.codecs.subset import NO_BYTES, NOTHING, Coded, TileChange, TileEntry, encode_change, joined
from deltawire.format.codecs.tiles import Tile
from deltawire.format.codecs.twins import Twin
from deltawire.weights import threads
from deltawire.weights.bits import Bits, Positions, UInts, unsigned
from deltawire.weights.delta import TensorDelta, check_same, settle
from deltawire.weights.found import Found, Scratch


class Coding(NamedTuple):
    """How a tensor's change is to be encoded: by the classes of its old bits, where its dtype has any, and in tiles of
    so many rows and columns (None: what `tiles.choose` gives)."""

    by_class: bool
    tile: tuple[int, int] | None = None


def compare(
    old: Bits, new: Bits, *, by_class: bool, tile: tuple[int, int] | None = None, twin: Twin | None = None
) -> tuple[TensorDelta, Coded]:
    """The change from one version of a tensor to the next, and its encoding, as a `Coding` says. Another thread may
    write `new` meanwhile: each element is read once.

    Raises DtypeMismatch, ShapeMismatch.
    """
    check_same("a tensor", old, new)
    shape = tile or tiles.choose(old.shape)
    pair = _Pair(old.data, new.data, SCHEMES.get(old.dtype) if by_class else None, twin or twins.fast())
    done = list(threads.run(pair.compare, _spans(list(tiles.grid(old.shape, shape)), threads.cores())))
    positions, steps = _all_of([found for found, _ in done])
    positions, steps = tiles.in_order(shape, old.shape, positions, steps)
    coded = [tile for _, own in done for tile in own]
    return settle(old.dtype, old.shape, positions, steps), joined(shape, coded, by_class=pair.scheme is not None)


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """Two versions of a tensor."""

    old: UInts
    new: UInts
    scheme: Scheme | None
    twin: Twin

    def compare(self, span: list[Tile]) -> tuple[Found, list[tuple[TileEntry, UInts]]]:
        """What changes in consecutive tiles, by positions in the tensor, and each tile's entry and payload."""
        found, scratch = Found(sum(tile.size for tile in span), self.old.dtype), Scratch()
        return found, [self._compare_tile(tile, found, scratch) for tile in span]

    def _compare_tile(self, tile: Tile, found: Found, scratch: Scratch) -> tuple[TileEntry, UInts]:
        from deltawire.weights import kernels

        old, new, first = tile.cut(self.old), tile.cut(self.new), found.count
        ranked = None
        if self.scheme is None:
            kernels.collect(old, new, found)
        else:
            ranked = self.twin.compare(old, new, self.scheme, found, scratch)
        if found.count == first:
            return NOTHING, NO_BYTES
        positions = found.positions[first : found.count]
        change = TileChange(tile, positions, found.steps[first : found.count], old, self.scheme)
        coded = encode_change(change, ranked or change.ranked(self.twin), self.twin)
        if tile.contiguous:
            positions += tile.start
        else:
            positions[:] = tile.outside(positions)
        return coded


def _spans(grid: list[Tile], most: int) -> list[list[Tile]]:
    """The tiles in at most so many runs, at least one. A run's changes lie in one piece of memory: where that is large,
    so are its pages."""
    many = max(1, -(-len(grid) // most))
    return [grid[start : start + many] for start in range(0, max(1, len(grid)), many)]


def _all_of(parts: list[Found]) -> tuple[Positions, UInts]:
    """Positions and steps of all parts."""
    if len(parts) == 1:
        return parts[0].take()
    positions = np.concatenate([part.positions[: part.count] for part in parts])
    return positions, np.concatenate([part.steps[: part.count] for part in parts])


def warm_up(dtypes: Iterable[str], *, by_class: bool) -> None:
    """Compile what a publish of tensors of these dtypes runs, so that none waits for it: some 5 seconds where Numba's
    cache on disk is empty, and one for each further width. A run of codec `class` writes `subset` as well."""
    ranked_last = sorted(dtypes, key=lambda dtype: (dtype in SCHEMES, dtype))  # of a width, one with classes stays
    for dtype in {unsigned(dtype): dtype for dtype in ranked_last}.values():
        old = Bits(dtype, (8, 64), np.ones(512, unsigned(dtype)))
        new = old.copy()
        new.data[:64] += 7  # one row alone changes, so that the others are left out
        for own in {False, by_class}:
            change, _ = compare(old, new, by_class=own)
        change.apply_(old.data)
