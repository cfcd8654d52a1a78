"""The sparse changes of all tensors on one accelerator, staged there together: they cross once, are added to what lies
there, and are digested before and after.

Offsets are computed on the host, where most boxes need an addition. What has no room in the arena is staged through its
window and kept in host memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from deltawire.live.accelerator import Accelerator
from deltawire.live.arena import Room, bytes_for, most_in
from deltawire.live.digests import Place
from deltawire.live.writes import Run, ScatterTogether
from deltawire.weights import threads
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.device import sweeps
from deltawire.weights.device.carriers import positions_for
from deltawire.weights.digest import MODULUS

WORTH = 1 << 18
"""elements below which one thread copies them"""


class Located(NamedTuple):
    """Elements of a place: where they stand in the checkpoint tensor and in the storage, and as many bits of each."""

    place: Place
    positions: Positions
    offsets: Positions
    bits: UInts


class Moved(NamedTuple):
    """The part of a digest that elements made before a change, and make after it."""

    before: int
    after: int


def locate(place: Place, positions: Positions, increments: UInts) -> Located:
    """The change of a place, by row-major positions in its box."""
    return Located(place, *place.box.at(positions), increments)


def add_together(accelerator: Accelerator, changes: Sequence[Located]) -> tuple[ScatterTogether, list[Moved]]:
    """The write that adds increments to what lies at places of one width, and of each place the elements' digest before
    and after. Nothing is written yet."""
    crossing = _Crossing.of(accelerator, changes)
    with accelerator.beside():
        return crossing.staged(accelerator)


def write_together(accelerator: Accelerator, changes: Sequence[tuple[Located, UInts]]) -> ScatterTogether:
    """The write that puts bits known already (as they are to lie there) at places of one width; with what is there.
    They stay in host memory."""
    crossing = _Crossing.of(accelerator, [change for change, _ in changes])
    index, kind = crossing.offsets.dtype, crossing.bits.dtype
    home = _Home(crossing.offsets, _joined(accelerator, [there for _, there in changes], kind), crossing.bits)
    with accelerator.beside():
        cuts = _cuts(crossing.counts, most_in(accelerator.arena.window_bytes, index, kind))
        return ScatterTogether(accelerator, [home.run(crossing, cut) for cut in cuts], None)


class _Cut(NamedTuple):
    """A part of the elements of several places, one place behind another: which, and how many of which places."""

    all: slice
    places: list[int]
    counts: list[int]


def _cuts(counts: Sequence[int], most: int) -> list[_Cut]:
    """All elements in parts of at most so many."""
    ends = np.cumsum([0, *counts])
    cuts = []
    for start in range(0, int(ends[-1]), most):
        end = min(start + most, int(ends[-1]))
        first, last = np.searchsorted(ends, start, "right") - 1, np.searchsorted(ends, end, "left")
        bounds = np.clip(ends[first : last + 1], start, end)
        cuts.append(_Cut(slice(start, end), list(range(first, last)), np.diff(bounds).tolist()))
    return cuts


@dataclass(slots=True, eq=False)
class _Crossing:
    """Changes of places of one width, one place behind another, in host memory from where they cross fast."""

    flats: list[torch.Tensor]
    counts: list[int]
    positions: torch.Tensor
    offsets: torch.Tensor
    bits: torch.Tensor

    @classmethod
    def of(cls, accelerator: Accelerator, changes: Sequence[Located]) -> "_Crossing":
        flats = [change.place.memory.flat for change in changes]
        ends = [int(change.positions[-1]) + 1 for change in changes if change.positions.size]
        kind = positions_for([*ends, *(flat.numel() for flat in flats)])
        return cls(
            flats,
            [change.offsets.size for change in changes],
            _joined(accelerator, [change.positions for change in changes], kind),
            _joined(accelerator, [change.offsets for change in changes], kind),
            _joined(accelerator, [change.bits for change in changes], flats[0].dtype),
        )

    def flats_of(self, cut: _Cut) -> list[torch.Tensor]:
        return [self.flats[number] for number in cut.places]

    def staged(self, accelerator: Accelerator) -> tuple[ScatterTogether, list[Moved]]:
        """Cross, gather, add and digest."""
        index, kind, total = self.offsets.dtype, self.bits.dtype, sum(self.counts)
        room = accelerator.arena.room(bytes_for(total, index, kind, kind))
        home = _Home.in_room(room, self) if room else _Home.on_host(accelerator, self)
        crossing = (index,) if room else (index, index, kind, kind)
        before, after = [0] * len(self.counts), [0] * len(self.counts)
        cuts = _cuts(self.counts, most_in(accelerator.arena.window_bytes, *crossing))
        for cut in cuts:
            window = accelerator.arena.window()
            positions = window.take(sum(cut.counts), index)
            positions.copy_(self.positions[cut.all], non_blocking=True)
            here = home.part(cut.all) if room else _Home.in_room(window, self, cut.all)
            sweeps.gather(self.flats_of(cut), cut.counts, here.offsets, out=here.old)
            here.new.add_(here.old)
            for sums, bits in ((before, here.old), (after, here.new)):
                for number, made in zip(cut.places, sweeps.digest_at(cut.counts, positions, bits), strict=True):
                    sums[number] = (sums[number] + made) % MODULUS
            if not room:
                home.old[cut.all].copy_(here.old, non_blocking=True)
                home.new[cut.all].copy_(here.new, non_blocking=True)
        runs = [home.run(self, cut) for cut in (_cuts(self.counts, max(total, 1)) if room else cuts)]
        return ScatterTogether(accelerator, runs, room), [*map(Moved, before, after)]


@dataclass(slots=True, eq=False)
class _Home:
    """Where elements' offsets, old and new bits are kept."""

    offsets: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor

    @classmethod
    def in_room(cls, room: Room, crossing: _Crossing, own: slice = slice(None)) -> "_Home":
        """In a room of the arena; offsets and increments, in the place of the new bits, are on their way there."""
        offsets, bits = crossing.offsets[own], crossing.bits[own]
        count = offsets.numel()
        home = cls(room.take(count, offsets.dtype), room.take(count, bits.dtype), room.take(count, bits.dtype))
        home.offsets.copy_(offsets, non_blocking=True)
        home.new.copy_(bits, non_blocking=True)
        return home

    @classmethod
    def on_host(cls, accelerator: Accelerator, crossing: _Crossing) -> "_Home":
        """In host memory, the old and new bits to be filled in."""
        count, kind = crossing.bits.numel(), crossing.bits.dtype
        return cls(crossing.offsets, accelerator.pinned(count, kind), accelerator.pinned(count, kind))

    def part(self, own: slice) -> "_Home":
        return _Home(self.offsets[own], self.old[own], self.new[own])

    def run(self, crossing: _Crossing, cut: _Cut) -> Run:
        """What is kept of these elements, to be written in one launch that is made ready now: not in the pause."""
        own, flats = self.part(cut.all), crossing.flats_of(cut)
        scattering = sweeps.scattering(flats, cut.counts, own.offsets.dtype)
        return Run(flats, cut.counts, own.offsets, own.old, own.new, scattering)


def _joined(accelerator: Accelerator, parts: Sequence[UInts | Positions], kind: torch.dtype) -> torch.Tensor:
    """Arrays one behind another, in host memory from where they cross fast. Several threads copy them."""
    ends = np.cumsum([0, *(part.size for part in parts)]).tolist()
    joined = accelerator.pinned(ends[-1], kind)
    whole = joined.numpy()

    def copy(number: int) -> None:
        part = parts[number]
        own = part.view(whole.dtype) if part.itemsize == whole.itemsize else part
        np.copyto(whole[ends[number] : ends[number + 1]], own, casting="same_kind")

    list(threads.run(copy, range(len(parts)), worth=ends[-1] >= WORTH))
    return joined
