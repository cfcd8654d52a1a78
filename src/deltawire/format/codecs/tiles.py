"""How a tensor is cut into tiles, and where the elements of a tile lie in it. FORMAT.md §5.6

A tensor is rows x columns, its last dimension being the columns; one of fewer dimensions is one row. Tiles form a grid
in row-major order. Each is coded by itself: a thread decodes its own tile, and so can a rank that holds only that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from deltawire.weights.bits import Positions, UInts

TARGET = 1 << 22
"""elements of a tile, about: a tile costs 10 to 60 bytes, and is what one thread does at a time"""
MOST = 1 << 12
"""tiles of a tensor, about"""
STEP = 64
"""a writer's tiles are a multiple of so many columns wide"""


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a tensor of `stride` columns: its first row and column, its rows and its width."""

    row: int
    column: int
    rows: int
    width: int
    stride: int

    @property
    def size(self) -> int:
        """Elements in the tile."""
        return self.rows * self.width

    @property
    def start(self) -> int:
        """The first element's number in the tensor."""
        return self.row * self.stride + self.column

    @property
    def contiguous(self) -> bool:
        """Whether its elements follow each other in the tensor."""
        return self.width == self.stride or self.rows == 1

    def outside(self, inside: Positions) -> Positions:
        """The elements' numbers in the tensor, from those in the tile."""
        if self.contiguous:
            return inside + self.start
        return self.start + inside // self.width * self.stride + inside % self.width

    def inside(self, positions: Positions) -> tuple[Positions, slice | Positions]:
        """Which of a tensor's ascending positions lie in the tile, as numbers in the tile, and their places among
        all."""
        if self.contiguous:
            first, last = np.searchsorted(positions, (self.start, self.start + self.size))
            return positions[first:last] - self.start, slice(first, last)
        row, column = positions // self.stride - self.row, positions % self.stride - self.column
        places = np.flatnonzero((row >= 0) & (row < self.rows) & (column >= 0) & (column < self.width))
        return row[places] * self.width + column[places], places

    def cut(self, bits: UInts) -> UInts:
        """The tile's own elements, flat, from the tensor's; a view where they follow each other."""
        if self.contiguous:
            return bits[self.start : self.start + self.size]
        rows = bits.reshape(-1, self.stride)[self.row : self.row + self.rows]
        return rows[:, self.column : self.column + self.width].reshape(-1)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, prod(shape))


def choose(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the tiles a writer makes of a tensor: whole, or blocks of rows."""
    rows, columns = matrix(shape)
    size = max(TARGET, -(-rows * columns // MOST // STEP) * STEP)
    if rows * columns <= 2 * size:
        return max(rows, 1), max(columns, 1)
    if rows == 1:
        return 1, size
    return max(1, size // columns), columns


def grid(shape: tuple[int, ...], tile: tuple[int, int]) -> Iterator[Tile]:
    """The tiles of a tensor, row-major; the last of a row or column may be smaller."""
    rows, columns = matrix(shape)
    for row in range(0, rows, tile[0]):
        for column in range(0, columns, tile[1]):
            yield Tile(row, column, min(tile[0], rows - row), min(tile[1], columns - column), columns)


def tiles_in(shape: tuple[int, ...], tile: tuple[int, int]) -> int:
    """How many tiles the grid has."""
    rows, columns = matrix(shape)
    return -(-rows // tile[0]) * -(-columns // tile[1])
