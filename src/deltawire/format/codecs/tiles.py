"""How a tensor is cut into tiles, and where the elements of a tile lie in it. FORMAT.md §5.6

A tensor is rows x columns, its last dimension being the columns; one of fewer dimensions is one row. Tiles form a grid
in row-major order. Each is coded by itself: a thread decodes its own tile, and so can a rank that holds only that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from deltawire.weights.bits import Positions, UInts
from deltawire.weights.blocks import WHOLE, Cut

TARGET = 1 << 22
"""elements of a tile, about: a tile costs 10 to 60 bytes, and is what one thread does at a time"""
MOST = 1 << 12
"""tiles of a tensor, about"""
LEAST = 1 << 18
"""elements of a tile that is made to suit a cut, at least, except where the tensor is smaller"""
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
        """The tile's own elements, flat and side by side, from the tensor's; a view where they follow each other."""
        if self.contiguous:
            return bits[self.start : self.start + self.size]
        rows = bits.reshape(-1, self.stride)[self.row : self.row + self.rows]
        return rows[:, self.column : self.column + self.width].flatten()  # reshape keeps one column a view with gaps


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, prod(shape))


def choose(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the tiles a writer makes of a tensor: whole, or blocks of rows."""
    rows, columns = matrix(shape)
    size = _usual(rows * columns)
    if rows * columns <= 2 * size:
        return max(rows, 1), max(columns, 1)
    if rows == 1:
        return 1, size
    return max(1, size // columns), columns


def choose_within(shape: tuple[int, ...], cut: Cut) -> tuple[int, int] | None:
    """The same, where all that is inside a cut's edges is to be a union of whole tiles. None where such tiles are too
    small to be worth it, or not a multiple of `STEP` columns wide."""
    rows, columns = matrix(shape)
    edges = tuple(edge if edge < whole else 0 for edge, whole in zip(cut, (rows, columns), strict=True))
    if edges == WHOLE:
        return choose(shape)
    size = _usual(rows * columns)
    width = _part(edges[1], 2 * size, STEP) if edges[1] else columns
    if edges[0]:
        height = _part(edges[0], 2 * size // max(width, 1), 1)
    else:
        height = rows if rows * width <= 2 * size else max(1, size // max(width, 1))
    return (height, width) if height * width >= max(LEAST, size * LEAST // TARGET) else None


def _usual(elements: int) -> int:
    """Elements of a tile of a tensor that has so many, about."""
    return max(TARGET, -(-elements // MOST // STEP) * STEP)


@lru_cache
def _part(edge: int, most: int, step: int) -> int:
    """The largest number up to `most` that divides an edge and is a multiple of `step`; 0 for none that counts."""
    for parts in range(max(1, -(-edge // max(most, 1))), min(edge, MOST * TARGET // LEAST) + 1):
        if edge % parts == 0 and edge // parts % step == 0:
            return edge // parts
    return 0


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


def in_order(
    tile: tuple[int, int], shape: tuple[int, ...], positions: Positions, steps: UInts
) -> tuple[Positions, UInts]:
    """Changes that were found tile by tile, by ascending positions: elements of tiles side by side take turns."""
    if tile[0] == 1 or tile[1] >= matrix(shape)[1]:
        return positions, steps
    order = np.argsort(positions, kind="stable")  # runs that rise, which it merges
    return positions[order], steps[order]
