"""Rank changes by the classes of the old bits on the device where these lie: of many tensors at once.

    found = rank(tensors, positions)      on the device
    found.arrays()                        what has to cross to the host
    found.rankings(arrays)                a `Ranking` of each tensor, of what has crossed

It waits for the device to learn which tiles hold changes, and in how many of their rows. CUDA tensors are ranked by
Triton where it is installed, all others in plain torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from deltawire.format.codecs import ranks_plain, tiles
from deltawire.format.codecs.classes import SCHEMES
from deltawire.format.codecs.live_rows import may_be_few
from deltawire.format.codecs.ranking import Ranking, TileRanks
from deltawire.format.codecs.ranks_plain import OldTile
from deltawire.weights.boxes import Shape
from deltawire.weights.device import sweeps
from deltawire.weights.device.landing import landing


@dataclass(frozen=True, slots=True, eq=False)
class ToRank:
    """A tensor of which `count` elements change: its old bits, a carrier, and the rows and columns of its tiles. Its
    dtype has classes."""

    name: str
    dtype: str
    shape: Shape
    old: torch.Tensor
    tile: tuple[int, int]
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """Of each tile the elements of each class [tiles, 16], and of each change its class (uint8) and its rank."""

    population: torch.Tensor
    classes: torch.Tensor
    ranks: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """Tiles and how many changes each has, with their ranks."""

    tiles: Sequence[OldTile]
    counts: Sequence[int]
    ranks: Ranks

    def by_tile(self, arrays: Sequence[Any]) -> Iterator[tuple[OldTile, TileRanks]]:
        """What has crossed, tile by tile."""
        population, classes, ranks = arrays
        ends = np.cumsum([0, *self.counts]).tolist()
        for number, (own, (start, stop)) in enumerate(zip(self.tiles, pairwise(ends), strict=True)):
            row = population[16 * number : 16 * number + 16]
            yield own, TileRanks(row, classes[start:stop], ranks[start:stop])


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The ranks of several tensors' changes: among all elements and, of tiles that may be shorter so, among the rows
    that hold a change."""

    tensors: Sequence[ToRank]
    every: Half
    live: Half

    def arrays(self) -> list[torch.Tensor]:
        """All that is on the device."""
        halves = (self.every.ranks, self.live.ranks)
        return [part for own in halves for part in (own.population.view(-1), own.classes, own.ranks)]

    def rankings(self, arrays: Sequence[Any]) -> Mapping[str, Ranking]:
        """The ranking of each tensor, of the `arrays` as numpy's."""
        found: list[tuple[dict[int, TileRanks], dict[int, TileRanks]]] = [({}, {}) for _ in self.tensors]
        for which, half in enumerate((self.every, self.live)):
            for own, ranks in half.by_tile(arrays[3 * which : 3 * which + 3]):
                found[own.tensor][which][own.number] = ranks
        return {own.name: Ranking(own.tile, *ranks) for own, ranks in zip(self.tensors, found, strict=True)}


def rank(tensors: Sequence[ToRank], positions: torch.Tensor) -> Found:
    """Rank changes at `positions` (int64, ascending in each tensor, one tensor behind another). All carriers are of
    one width, and stand on one device. Waits for the stream."""
    grid = list(_tiles(tensors))
    tile_of, inside = _by_tile(tensors, positions)
    widths = _numbers([own.tile.width for own in grid], positions)[tile_of]
    rows_at = _numbers([own.rows_at for own in grid], positions)[tile_of]
    is_live = torch.zeros(grid[-1].rows_at + grid[-1].tile.rows, dtype=torch.uint8, device=positions.device)
    is_live[rows_at + inside // widths] = 1
    counts, live = _counted(grid, tile_of, is_live)
    changed = [number for number, count in enumerate(counts) if count]
    few = [number for number in changed if may_be_few(grid[number].tile.rows, live[number], counts[number])]
    every = _half(grid, counts, changed, inside, None)
    if few:
        is_few = torch.zeros(len(grid), dtype=torch.bool, device=positions.device)
        is_few[_numbers(few, positions)] = True
        inside = inside[is_few[tile_of]]
    return Found(tensors, every, _half(grid, counts, few, inside if few else inside[:0], is_live))


def _tiles(tensors: Sequence[ToRank]) -> Iterator[OldTile]:
    rows_at = 0
    for which, own in enumerate(tensors):
        for number, tile in enumerate(tiles.grid(own.shape, own.tile)):
            yield OldTile(which, number, tile, own.old, SCHEMES[own.dtype], rows_at)
            rows_at += tile.rows


def _by_tile(tensors: Sequence[ToRank], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The changes tile by tile: the number of each one's tile among those of all tensors, ascending, and its place
    there."""
    facts, first = [], 0
    for own in tensors:
        columns, (height, width) = tiles.matrix(own.shape)[1], own.tile
        across = -(-columns // width)
        facts.append((columns, height, min(width, columns), across, first))
        first += tiles.tiles_in(own.shape, own.tile)
    counts = _numbers([own.count for own in tensors], positions)
    numbers = torch.arange(len(tensors), device=counts.device)
    of = torch.repeat_interleave(numbers, counts, output_size=positions.numel())
    columns, height, width, across, first_tile = _numbers([*zip(*facts, strict=True)], positions)[:, of]
    row, column = positions // columns, positions % columns
    tile_of = first_tile + row // height * across + column // width
    own_width = torch.minimum(width, columns - column // width * width)
    inside = row % height * own_width + column % width
    if all(fact[3] == 1 or fact[1] == 1 for fact in facts):
        return tile_of, inside
    order = torch.argsort(tile_of, stable=True)
    return tile_of[order], inside[order]


def _counted(grid: Sequence[OldTile], tile_of: torch.Tensor, is_live: torch.Tensor) -> tuple[list[int], list[int]]:
    """How many changes each tile has, and how many of its rows hold one. Waits for the stream."""
    counts = torch.searchsorted(tile_of, torch.arange(len(grid) + 1, device=tile_of.device)).diff()
    sums = torch.nn.functional.pad(is_live.cumsum(0), (1, 0))
    begin = _numbers([own.rows_at for own in grid], tile_of)
    end = _numbers([own.rows_at + own.tile.rows for own in grid], tile_of)
    found: tuple[list[int], list[int]] = torch.stack([counts, sums[end] - sums[begin]]).tolist()
    return found


def _half(
    grid: Sequence[OldTile],
    counts: Sequence[int],
    which: Sequence[int],
    inside: torch.Tensor,
    is_live: torch.Tensor | None,
) -> Half:
    """The ranks of the changes of some tiles, at `inside`."""
    some, own = [grid[number] for number in which], [counts[number] for number in which]
    if some and sweeps.uses_triton(inside):
        from deltawire.format.codecs import ranks_triton

        return Half(some, own, Ranks(*ranks_triton.rank(some, own, inside, is_live)))
    return Half(some, own, Ranks(*ranks_plain.rank(some, own, inside, is_live)))


def _numbers(numbers: Sequence[Any], beside: torch.Tensor) -> torch.Tensor:
    """Numbers of the host on a tensor's device."""
    made = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    landed = landing(made.numel(), made.dtype, beside.device).view(made.shape).copy_(made)
    return landed.to(beside.device, non_blocking=True)
