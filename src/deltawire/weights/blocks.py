"""What a process holds of a tensor, seen as a matrix: blocks of rows and columns, and the bits that are there.

A tensor's last dimension is the columns; one of fewer than two dimensions is one row.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd

import numpy as np

from deltawire.weights.bits import Bits, Positions
from deltawire.weights.boxes import Box

Cut = tuple[int, int]
"""Rows and columns, of which all edges of some blocks are multiples. 0: there is no edge inside the matrix."""
WHOLE: Cut = (0, 0)
FINEST: Cut = (1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """In each run of `rows` rows, which begin at `starts`, `width` columns from `column` on."""

    starts: Positions
    rows: int
    column: int
    width: int

    @property
    def size(self) -> int:
        """Elements in the block."""
        return self.starts.size * self.rows * self.width

    def shared_with(self, row: int, column: int, rows: int, width: int) -> int:
        """How many elements of a rectangle are in the block."""
        across = min(column + width, self.column + self.width) - max(column, self.column)
        if across <= 0:
            return 0
        near = self.starts[slice(*np.searchsorted(self.starts, (row - self.rows + 1, row + rows)))]
        down = np.minimum(near + self.rows, row + rows) - np.maximum(near, row)
        return int(down.sum()) * across


def block_of(box: Box, columns: int) -> Block | None:
    """A box of a matrix of so many columns as a block; None for one that is no such thing, as every second column."""
    joined = box.joined
    row, column = divmod(joined.offset, max(columns, 1))
    down: list[tuple[int, int]] = []
    width = 1
    for length, stride in zip(joined.shape, joined.strides, strict=True):
        if stride % columns == 0:
            down.append((length, stride // columns))
        elif stride == 1 and column + length <= columns:
            width = length
        elif stride == 1 and column == 0 and length % columns == 0:
            down.append((length // columns, 1))
            width = columns
        else:
            return None
    rows = down.pop()[0] if down and down[-1][1] == 1 else 1
    starts = np.array([row], np.int64)
    for length, stride in down:
        starts = np.add.outer(starts, np.arange(length, dtype=np.int64) * stride).reshape(-1)
    return Block(starts, rows, column, width)


def cut_of(blocks: Iterable[Block], rows: int, columns: int) -> Cut:
    """The largest rows and columns of which all edges inside a matrix are multiples: the whole of each block then
    consists of tiles whose edges divide these."""
    found = WHOLE
    for block in blocks:
        edges = np.concatenate([block.starts, block.starts + block.rows])
        down = int(np.gcd.reduce(edges[edges != rows], initial=0))
        across = [edge for edge in (block.column, block.column + block.width) if edge != columns]
        found = together(found, (down, gcd(*across)))
    return found


def together(one: Cut, other: Cut) -> Cut:
    """What tiles must divide that are to suit both."""
    return gcd(one[0], other[0]), gcd(one[1], other[1])


@dataclass(frozen=True, slots=True, eq=False)
class PartBits(Bits):
    """A tensor of which the `blocks` are at hand: its other bits are zeros that say nothing. Where `blocks` is None,
    which those are cannot be said in rows and columns."""

    blocks: tuple[Block, ...] | None

    def copy(self) -> "PartBits":
        """The same bits in memory of their own."""
        return PartBits(self.dtype, self.shape, self.data.copy(), self.blocks)

    def held_of(self, row: int, column: int, rows: int, width: int) -> int | None:
        """How many elements of a rectangle are at hand; None where that cannot be said."""
        if self.blocks is None:
            return None
        return sum(block.shared_with(row, column, rows, width) for block in self.blocks)


def part_of(bits: Bits, held: Iterable[Box], columns: int) -> PartBits:
    """A tensor of which these boxes, none of which overlap, are at hand."""
    blocks = [block_of(box, columns) for box in held]
    known = tuple(block for block in blocks if block is not None)
    return PartBits(bits.dtype, bits.shape, bits.data, known if len(known) == len(blocks) else None)
