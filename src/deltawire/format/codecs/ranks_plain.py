"""Ranks within classes in plain torch, tile by tile: what each twin computes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltawire.format.codecs import torch_twin
from deltawire.format.codecs.classes import Scheme
from deltawire.format.codecs.tiles import Tile


@dataclass(frozen=True, slots=True, eq=False)
class OldTile:
    """A tile's old bits, in those of its tensor, and where its rows begin among the rows of all tiles."""

    tensor: int
    number: int
    tile: Tile
    old: torch.Tensor
    scheme: Scheme
    rows_at: int


def rank(
    some: Sequence[OldTile], counts: Sequence[int], inside: torch.Tensor, is_live: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The elements of each class of each tile (int32, 16 a tile), and each change's class (uint8) and rank (int32).

    `counts` changes of each tile are at `inside`, int64 and ascending, tile by tile. `is_live` flags rows of all tiles,
    a byte for each: with it elements of other rows do not count.
    """
    kinds = (torch.int32, torch.uint8, torch.int32)
    found = [[torch.empty(0, dtype=kind, device=inside.device)] for kind in kinds]
    for own, places in zip(some, inside.split(list(counts)), strict=True):
        tile, at = own.tile, places
        bits = own.old.view(-1, tile.stride)[tile.row :][: tile.rows, tile.column : tile.column + tile.width]
        if is_live is not None:
            live = is_live[own.rows_at : own.rows_at + tile.rows].bool()
            bits, at = bits[live], (live.cumsum(0) - 1)[places // tile.width] * tile.width + places % tile.width
        ranked = torch_twin.ranked(bits.reshape(-1), at, own.scheme)
        for parts, part, kind in zip(found, ranked, kinds, strict=True):
            parts.append(part.to(kind))
    population, classes, ranks = map(torch.cat, found)
    return population, classes, ranks
