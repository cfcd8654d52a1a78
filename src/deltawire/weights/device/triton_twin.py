"""The sweeps in Triton: a launch or two over all tensors, which a table of addresses leads to.

`torch_twin` has a twin of each, of the same name and with equal results. Blocks of a launch are dealt to the tensors in
their order. bf16 is rounded with integers: Triton's interpreter would cut. Every write is bounded by what its block
counted.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from deltawire.weights.device.carriers import Changes, Part, positions_for, written_meanwhile
from deltawire.weights.device.launches import KINDS, Launch, addresses, dealt, starts

BLOCK = 2048
"""elements that a program compares, or digests"""
FEW = 1024
"""elements that a program gathers, scatters or digests by their positions"""
_MODULUS = 1 << 64
Tensors = Sequence[torch.Tensor]
Put = Callable[[torch.Tensor, torch.Tensor], None]


@triton.jit
def _fmix64(h):  # type: ignore[no-untyped-def]
    """MurmurHash3's 64-bit finaliser (Appleby, public domain)."""
    h ^= h >> 33
    h *= 0xFF51AFD7ED558CCD
    h ^= h >> 33
    h *= 0xC4CEB9FE1A85EC53
    return h ^ (h >> 33)


@triton.jit
def _mixed(positions, bits, inside):  # type: ignore[no-untyped-def]
    """Sum of mix(positions, bits) over the elements inside, modulo 2^64."""
    h = _fmix64(_fmix64(positions.to(tl.uint64) + 0x9E3779B97F4A7C15) ^ bits.to(tl.uint64))
    return tl.sum(tl.where(inside, h, 0).to(tl.int64, bitcast=True))


@triton.jit
def _digest(tensors, table, n, sums, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tensor, at, inside = dealt(tensors, table, n, BLOCK)
    bits = tl.load(tl.load(table + 2 * n + tensor).to(tl.pointer_type(KIND)) + at, mask=inside, other=0)
    run = tl.load(table + 4 * n + tensor)
    if run < tl.load(table + tensor):
        at = at // run * tl.load(table + 5 * n + tensor) + at % run
    tl.store(sums + tl.program_id(0), _mixed(at + tl.load(table + 3 * n + tensor), bits, inside))


@triton.jit
def _digest_at(tensors, table, n, positions, bits, sums, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tensor, at, inside = dealt(tensors, table, n, BLOCK)
    at += tl.load(table + 2 * n + tensor)
    values = tl.load(bits + at, mask=inside, other=0).to(KIND, bitcast=True)
    tl.store(sums + tl.program_id(0), _mixed(tl.load(positions + at, mask=inside, other=0), values, inside))


@triton.jit
def _pair(tensors, table, n, KIND: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The elements' numbers, their new bits and their old ones, and whether they differ."""
    tensor, at, inside = dealt(tensors, table, n, BLOCK)
    old = tl.load(tl.load(table + 3 * n + tensor).to(tl.pointer_type(KIND)) + at, mask=inside, other=0)
    address = tl.load(table + 2 * n + tensor)
    if ROUND:
        if tl.load(table + 4 * n + tensor) != 0:
            wide = tl.load(address.to(tl.pointer_type(tl.uint32)) + at, mask=inside, other=0)
            rounded = (wide + (((wide >> 16) & 1) + 0x7FFF)) >> 16
            new = tl.where((wide & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
        else:
            new = tl.load(address.to(tl.pointer_type(tl.uint16)) + at, mask=inside, other=0)
    else:
        new = tl.load(address.to(tl.pointer_type(KIND)) + at, mask=inside, other=0)
    return at, new, old, inside & (new != old)


@triton.jit
def _count(tensors, table, n, counts, KIND: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    _, _, _, differs = _pair(tensors, table, n, KIND, ROUND, BLOCK)
    tl.store(counts + tl.program_id(0), tl.sum(differs.to(tl.int64)))


@triton.jit
def _emit(  # type: ignore[no-untyped-def]
    tensors, table, n, counts, ends, positions, increments, bits, found,
    KIND: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what differs to the places that were counted for this block, and how many differ now to `found`."""
    block = tl.program_id(0)
    at, new, old, differs = _pair(tensors, table, n, KIND, ROUND, BLOCK)
    room = tl.load(counts + block)
    place = tl.cumsum(differs.to(tl.int32), 0) - 1
    fits = differs & (place < room)
    place += tl.load(ends + block) - room
    tl.store(positions + place, at.to(positions.dtype.element_ty), mask=fits)
    tl.store(increments + place, (new - old).to(increments.dtype.element_ty, bitcast=True), mask=fits)
    tl.store(bits + place, new.to(bits.dtype.element_ty, bitcast=True), mask=fits)
    tl.store(found + block, tl.sum(differs.to(tl.int64)))


@triton.jit
def _listed(tensors, table, n, offsets, bits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which elements of the lists this program moves and which of these there are, where each stands in its tensor, and
    whether that is inside of it.

    Further rows of the table are where each tensor's list begins, the tensors' addresses and their sizes.
    """
    tensor, at, inside = dealt(tensors, table, n, BLOCK)
    at += tl.load(table + 2 * n + tensor)
    offset = tl.load(offsets + at, mask=inside, other=0).to(tl.int64)
    here = inside & (offset >= 0) & (offset < tl.load(table + 4 * n + tensor))
    flat = tl.load(table + 3 * n + tensor).to(tl.pointer_type(bits.dtype.element_ty))
    return at, inside, flat + offset, here


@triton.jit
def _gather(tensors, table, n, offsets, bits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at, inside, there, here = _listed(tensors, table, n, offsets, bits, BLOCK)
    tl.store(bits + at, tl.load(there, mask=here, other=0), mask=inside)


@triton.jit
def _scatter(tensors, table, n, offsets, bits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at, inside, there, here = _listed(tensors, table, n, offsets, bits, BLOCK)
    tl.store(there, tl.load(bits + at, mask=inside, other=0), mask=here)


def digest(parts: Sequence[Part]) -> list[int]:
    """As `sweeps.digest`, of carriers of one width."""
    flats = [part.bits for part in parts]
    sizes = [flat.numel() for flat in flats]
    runs = [size if part.strip.is_run(size) else part.strip.run for part, size in zip(parts, sizes, strict=True)]
    rows = [[part.strip.offset for part in parts], runs, [part.strip.stride for part in parts]]
    launch = Launch.over(sizes, BLOCK, flats[0].device, addresses(flats), *rows)
    sums = launch.empty(torch.int64)
    launch.run(_digest, sums, KIND=KINDS[flats[0].dtype])
    return [total % _MODULUS for total in launch.per_tensor(sums)]


def digest_at(counts: Sequence[int], positions: torch.Tensor, bits: torch.Tensor) -> list[int]:
    """As `sweeps.digest_at`."""
    launch = Launch.over(counts, FEW, bits.device, starts(counts))
    sums = launch.empty(torch.int64)
    launch.run(_digest_at, positions, bits, sums, KIND=KINDS[bits.dtype])
    return [total % _MODULUS for total in launch.per_tensor(sums)]


def compare(new: Tensors, base: Tensors) -> Changes:
    """As `sweeps.compare`."""
    sizes, first = [flat.numel() for flat in base], base[0]
    wide = [int(flat.dtype == torch.float32) for flat in new]
    launch = Launch.over(sizes, BLOCK, first.device, addresses(new), addresses(base), wide)
    how = {"KIND": KINDS[first.dtype], "ROUND": any(wide)}
    counts, found = launch.empty(torch.int64), launch.empty(torch.int64)
    launch.run(_count, counts, **how)
    ends = counts.cumsum(0)
    changed = launch.per_tensor(counts)
    total = sum(changed)
    positions = torch.empty(total, dtype=positions_for(sizes), device=first.device)
    increments, bits = torch.empty_like(positions, dtype=first.dtype), torch.empty_like(positions, dtype=first.dtype)
    launch.run(_emit, counts, ends, positions, increments, bits, found, **how)
    if not torch.equal(counts, found):
        raise written_meanwhile()
    return Changes(tuple(changed), positions, increments, bits)


def gather(
    flats: Tensors, counts: Sequence[int], offsets: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As `sweeps.gather`."""
    bits = torch.empty_like(offsets, dtype=flats[0].dtype) if out is None else out
    _over_flats(flats, counts).run(_gather, offsets, bits)
    return bits


def scatter(flats: Tensors, counts: Sequence[int], offsets: torch.Tensor, bits: torch.Tensor) -> None:
    """As `sweeps.scatter`."""
    _over_flats(flats, counts).run(_scatter, offsets, bits)


def scattering(flats: Tensors, counts: Sequence[int], kind: torch.dtype) -> Put:
    """As `sweeps.scattering`. An offset that is nowhere is put to each tensor: that compiles and loads the kernel."""
    nowhere = torch.full((len(flats),), -1, dtype=kind, device=flats[0].device)
    scatter(flats, [1] * len(flats), nowhere, torch.zeros_like(nowhere, dtype=flats[0].dtype))
    return functools.partial(_over_flats(flats, counts).run, _scatter)


def _over_flats(flats: Tensors, counts: Sequence[int]) -> Launch:
    sizes = [flat.numel() for flat in flats]
    return Launch.over(counts, FEW, flats[0].device, starts(counts), addresses(flats), sizes)
