"""Which rows of a tile hold any change: where few do, ranks count the elements of those alone. FORMAT.md §5.6"""

import math
from dataclasses import dataclass

import numpy as np

from deltawire.format.codecs.tiles import Tile
from deltawire.format.codecs.twins import Twin
from deltawire.weights.bits import Positions, UInts

FEW_ROWS, FEWER_THAN_CHANCE = 0.75, 0.9
"""A writer tries without the idle rows where fewer than this share of the rows is live, and fewer than this share of
those that as many changes hit by chance: at a tenth of a percent half of all rows are idle, and say nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class LiveRows:
    """Numbers rows without those that hold no change. `listed` are the live rows, or (`dead`) all others: a list of few
    of them stands for any number of rows."""

    listed: Positions
    dead: bool

    def row(self, live: Positions) -> Positions:
        """The rows' numbers in the tile, from those among the live rows."""
        if not self.dead:
            return self.listed[live]
        return live + np.searchsorted(self.listed - np.arange(self.listed.size), live, side="right")

    def outside(self, ranks: Positions, width: int) -> Positions:
        """Elements' numbers in the tile, from those in the live rows."""
        return self.row(ranks // width) * width + ranks % width

    def cut(self, bits: UInts, rows: int, live: int) -> UInts:
        """The elements of the live rows, from those of the tile."""
        return bits.reshape(rows, -1)[self.row(np.arange(live))].reshape(-1)


def few_live_rows(tile: Tile, positions: Positions, twin: Twin) -> Positions | None:
    """The rows that hold a change, where they are clearly fewer than chance would hit."""
    by_chance = -math.expm1(tile.width * math.log1p(-positions.size / (tile.size + 1))) * tile.rows
    limit = int(min(FEW_ROWS * tile.rows, FEWER_THAN_CHANCE * by_chance))
    live = twin.live_rows(positions, tile.width, limit)
    return live if live.size <= limit else None
