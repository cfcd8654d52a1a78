"""Ranks within classes in Triton: one launch counts the classes of each block of all tiles, one ranks what changes.

Between them the blocks' counts are summed up. Within a block, sixteen counters of 16 bits run in four words.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from deltawire.format.codecs.ranks_plain import OldTile
from deltawire.weights.device.launches import KINDS, Launch, dealt

BLOCK = 2048
"""elements whose classes a program counts"""
FEW = 64
"""changes that a program ranks at a time"""
WARPS = 8
"""of a program that ranks: with 4 each thread takes 232 registers, and half as many warps run at a time"""
AT_ONCE = 1 << 28
"""elements whose blocks are counted before their changes are ranked: 16 MiB of counts, and as much of their sums"""
CLASSES = tl.constexpr(16)


@triton.jit
def _classes(tensors, table, n, is_live, KIND: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The classes of this program's elements, and which of them count."""
    tile, at, counts = dealt(tensors, table, n, BLOCK)
    width = tl.load(table + 3 * n + tile)
    stride = tl.load(table + 4 * n + tile)
    place = at
    if width != stride:
        place = at // width * stride + at % width
    bits = tl.load(tl.load(table + 2 * n + tile).to(tl.pointer_type(KIND)) + place, mask=counts, other=0)
    wide = bits.to(tl.uint64) if bits.dtype.primitive_bitwidth == 64 else bits.to(tl.uint32)
    shift, mask, lowest = table + 5 * n + tile, table + 6 * n + tile, table + 7 * n + tile
    exponents = (wide >> tl.load(shift).to(wide.dtype)).to(tl.int32) & tl.load(mask).to(tl.int32)
    classes = tl.minimum(tl.maximum(exponents - tl.load(lowest).to(tl.int32), 0), CLASSES - 1)
    if LIVE:
        rows = is_live + tl.load(table + 8 * n + tile)
        counts &= tl.load(rows + at // width, mask=counts, other=0) != 0
    return classes, counts


@triton.jit
def _ones(classes, counts, word):  # type: ignore[no-untyped-def]
    """A one in the counter of each element's class, for the four classes of a word."""
    mine = counts & ((classes >> 2) == word)
    return tl.where(mine, tl.full((), 1, tl.int64) << ((classes & 3) * 16).to(tl.int64), 0)


@triton.jit
def _count_classes(  # type: ignore[no-untyped-def]
    tensors, table, n, is_live, counted, KIND: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    classes, counts = _classes(tensors, table, n, is_live, KIND, LIVE, BLOCK)
    row = counted + tl.program_id(0).to(tl.int64) * CLASSES
    for word in tl.static_range(4):
        total = tl.sum(_ones(classes, counts, word))
        for c in tl.static_range(4):
            tl.store(row + 4 * word + c, ((total >> (16 * c)) & 0xFFFF).to(tl.int32))


@triton.jit
def _rank(  # type: ignore[no-untyped-def]
    tensors, table, n, is_live, before, bounds, inside, found, ranks,
    KIND: tl.constexpr, LIVE: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the class and the rank of each change in this program's block."""
    block = tl.program_id(0)
    first, end = tl.load(bounds + block), tl.load(bounds + block + 1)
    if first < end:
        classes, counts = _classes(tensors, table, n, is_live, KIND, LIVE, BLOCK)
        sums0 = tl.cumsum(_ones(classes, counts, 0), 0)
        sums1 = tl.cumsum(_ones(classes, counts, 1), 0)
        sums2 = tl.cumsum(_ones(classes, counts, 2), 0)
        sums3 = tl.cumsum(_ones(classes, counts, 3), 0)
        start = (block - tl.load(table + n + tl.load(tensors + block))) * BLOCK
        for at in range(first, end, FEW):
            change = at + tl.arange(0, FEW)
            here = change < end
            place = (tl.load(inside + change, mask=here, other=start) - start).to(tl.int32)
            c = tl.gather(classes, place, 0)
            low = tl.where((c >> 2) == 0, tl.gather(sums0, place, 0), tl.gather(sums1, place, 0))
            high = tl.where((c >> 2) == 2, tl.gather(sums2, place, 0), tl.gather(sums3, place, 0))
            sums = (tl.where(c < 8, low, high) >> ((c & 3) * 16).to(tl.int64)) & 0xFFFF
            earlier = tl.load(before + block.to(tl.int64) * CLASSES + c, mask=here, other=0)
            tl.store(ranks + change, earlier + sums.to(tl.int32) - 1, mask=here)
            tl.store(found + change, c.to(tl.uint8), mask=here)


def rank(
    tiles: Sequence[OldTile], counts: Sequence[int], inside: torch.Tensor, is_live: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ranks_plain.rank`."""
    population = torch.empty(len(tiles), CLASSES.value, dtype=torch.int32, device=inside.device)
    classes = torch.empty(inside.numel(), dtype=torch.uint8, device=inside.device)
    ranks = torch.empty(inside.numel(), dtype=torch.int32, device=inside.device)
    done = 0
    for span in _spans(tiles):
        own = slice(done, done + sum(counts[span]))
        _rank_span(tiles[span], counts[span], inside[own], is_live, population[span], classes[own], ranks[own])
        done = own.stop
    return population, classes, ranks


def _rank_span(
    tiles: Sequence[OldTile],
    counts: Sequence[int],
    inside: torch.Tensor,
    is_live: torch.Tensor | None,
    population: torch.Tensor,
    classes: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    launch = _launch(tiles, counts, inside.device)
    how: dict[str, Any] = {"KIND": KINDS[tiles[0].old.dtype], "LIVE": is_live is not None}
    rows = inside if is_live is None else is_live
    counted = launch.empty(torch.int32, CLASSES.value)
    launch.run(_count_classes, rows, counted, **how)
    before = counted.cumsum(0, dtype=torch.int32).sub_(counted)  # wraps, and a tile's own sums come out right
    first_blocks, last_blocks = launch.table[1], launch.table[1] + launch.table[-1] - 1
    before -= before[first_blocks[launch.tensors]]
    population.copy_(before[last_blocks] + counted[last_blocks])
    blocks = torch.repeat_interleave(first_blocks, launch.table[-2], output_size=inside.numel()) + inside // BLOCK
    bounds = torch.searchsorted(blocks, torch.arange(counted.shape[0] + 1, device=inside.device))
    launch.run(_rank, rows, before, bounds, inside, classes, ranks, **how, FEW=FEW, num_warps=WARPS)


def _launch(tiles: Sequence[OldTile], counts: Sequence[int], device: torch.device) -> Launch:
    parts = [own.tile for own in tiles]
    begins = [own.old.data_ptr() + own.tile.start * own.old.element_size() for own in tiles]
    strides = [part.width if part.contiguous else part.stride for part in parts]
    schemes = [[getattr(own.scheme, name) for own in tiles] for name in ("shift", "mask", "lowest")]
    facts = ([part.width for part in parts], strides, *schemes, [own.rows_at for own in tiles], counts)
    return Launch.over([part.size for part in parts], BLOCK, device, begins, *facts)


def _spans(tiles: Sequence[OldTile]) -> Iterator[slice]:
    """The tiles in runs of at most `AT_ONCE` elements, or of one tile."""
    first = size = 0
    for number, own in enumerate(tiles):
        if size and size + own.tile.size > AT_ONCE:
            yield slice(first, number)
            first, size = number, 0
        size += own.tile.size
    if size:
        yield slice(first, len(tiles))
