"""Changes that were ranked by class where a tensor's old bits lay, to be encoded where these are not. FORMAT.md §5.7"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deltawire.format.codecs import tiles
from deltawire.format.codecs.classes import CLASSES, Ranked
from deltawire.format.codecs.subset import NO_BYTES, NOTHING, TileEntry, changes_in, encode_change
from deltawire.format.codecs.tiles import Tile
from deltawire.format.codecs.twins import Twin
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.delta import TensorDelta


@dataclass(frozen=True, slots=True, eq=False)
class TileRanks:
    """The elements of each class of a tile, and of each change, in the order of positions, its class and its rank."""

    population: Positions
    classes: UInts
    ranks: Positions

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.population.nbytes + self.classes.nbytes + self.ranks.nbytes

    def by_class(self, steps: UInts) -> Ranked:
        """The changes class by class, with their steps."""
        order = np.argsort(self.classes, kind="stable")
        changed = np.bincount(self.classes, minlength=CLASSES)
        return Ranked(self.population, changed, self.ranks[order].astype(np.int64), steps[order])


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """One tensor's changes, ranked against its bits before them: rows and columns of its tiles and, by the number of
    each tile in which something changes, its ranks. `live` are those among rows that hold a change, of tiles that may
    be shorter so."""

    tile: tuple[int, int]
    every: Mapping[int, TileRanks]
    live: Mapping[int, TileRanks]
    by_class: ClassVar[bool] = True

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(ranks.nbytes for own in (self.every, self.live) for ranks in own.values())


@dataclass(frozen=True, slots=True, eq=False)
class ToPack:
    """One tile of a tensor's change, and its ranks, if anything changes there."""

    tile: Tile
    delta: TensorDelta
    every: TileRanks | None
    live: TileRanks | None


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """A `Ranker` of ranks that are known."""

    tile: Tile
    positions: Positions
    steps: UInts
    every: TileRanks
    live: TileRanks | None

    def ranked(self, twin: Twin) -> Ranked:
        return self.every.by_class(self.steps)

    def ranked_among(self, live: Positions, twin: Twin) -> Ranked | None:
        return None if self.live is None else self.live.by_class(self.steps)


def to_pack(delta: TensorDelta, ranking: Ranking) -> list[ToPack]:
    """A job a tile, in the order of the grid."""
    grid = enumerate(tiles.grid(delta.shape, ranking.tile))
    return [ToPack(tile, delta, ranking.every.get(number), ranking.live.get(number)) for number, tile in grid]


def pack_tile(job: ToPack, twin: Twin) -> tuple[TileEntry, UInts]:
    """One tile's entry and payload: what `subset.encode_tile` makes of the old bits."""
    if job.every is None:
        return NOTHING, NO_BYTES
    change = _Change(job.tile, *changes_in(job.tile, job.delta), job.every, job.live)
    return encode_change(change, change.ranked(twin), twin)
