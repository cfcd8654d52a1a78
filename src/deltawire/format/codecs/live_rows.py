"""Which rows of a tile hold any change: where few do, ranks count the elements of those alone. FORMAT.md §5.6"""

import math
from dataclasses import dataclass

import numpy as np

from deltawire.format.codecs.tiles import Tile
from deltawire.format.codecs.twins import Twin
from deltawire.weights.bits import Positions, UInts

FEW_ROWS, WORTH = 0.75, 1 / 16
"""A writer tries without the idle rows where at most this share of the rows is live, and it would save so much of the
payload if the idle rows were like the others. At a tenth of a percent half of all rows are idle by chance, and say
nothing; and what the rows of a tensor differ in, the classes of the old bits tell already."""


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


def few_live_rows(tile: Tile, positions: Positions, nbytes: int, twin: Twin) -> Positions | None:
    """The rows that hold a change, where it is worth a try to leave the others out of a payload that has so many bytes
    with all rows."""
    limit = int(FEW_ROWS * tile.rows)
    live = twin.live_rows(positions, tile.width, limit)
    return live if live.size <= limit and _saved(tile.rows, live.size, positions.size) > WORTH * 8 * nbytes else None


def may_be_few(rows: int, live: int, changed: int) -> bool:
    """Whether `few_live_rows` may be found where so many rows of a tile hold so many changes, however long its payload
    is: of each change that has a bit at least, its sign."""
    return 0 < live <= int(FEW_ROWS * rows) and _saved(rows, live, changed) > WORTH * changed


def _saved(rows: int, live: int, changed: int) -> float:
    """Bits by which changes among the live rows alone are shorter to write, less those of the list of live rows."""
    share = live / rows
    listed = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return -changed * math.log2(share) - rows * listed
