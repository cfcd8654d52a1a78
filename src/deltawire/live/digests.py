"""Digests of live memory where it lies: on an accelerator in one sweep over all tensors, on the host by threads.

Nothing is copied to the host but numbers, unless an accelerator holds elements in another width than the checkpoint.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from deltawire.live.accelerator import Accelerator, Accelerators
from deltawire.live.boxes import LiveBox
from deltawire.live.memory import Memory, to_host
from deltawire.weights import threads
from deltawire.weights.bits import UInts
from deltawire.weights.device import sweeps
from deltawire.weights.device.sweeps import Part, Strip
from deltawire.weights.digest import MODULUS, digest_at, digest_bits

SHORT = 16
"""elements that lie in a row, below which positions are computed for each"""
CHUNK = 1 << 22
"""elements that a thread digests at a time, a millisecond's work"""


AT_ONCE = 1 << 28
"""elements of an accelerator that are digested in one sweep, which keeps 24 bytes of every 2,048"""
STRIPS = 1 << 12
"""strips of a box above which the host digests it: each costs a row of the sweep's table"""


class Place(NamedTuple):
    """A rectangle of live memory."""

    memory: Memory
    box: LiveBox


def digests_of(places: Sequence[Place]) -> list[int]:
    """The part of its tensor's digest that each place makes, of the bits as the checkpoint has them."""
    found = [0] * len(places)
    swept: dict[Accelerator, list[int]] = {}
    read: list[tuple[int, Place]] = []
    for number, (memory, box) in enumerate(places):
        if memory.accelerator is not None and not memory.shift and _strip_count(box) <= STRIPS:
            swept.setdefault(memory.accelerator, []).append(number)
        else:
            read += [(number, Place(memory, piece)) for piece in box.pieces(CHUNK)]
    for accelerator, numbers in swept.items():
        for number, total in zip(numbers, _sweep(accelerator, [places[own] for own in numbers]), strict=True):
            found[number] = total
    for other in {own for _, place in read if (own := place.memory.accelerator) is not None}:
        other.wait()  # the threads' streams know nothing of what this one has queued
    elements = sum(place.box.size for _, place in read)
    for (number, _), total in zip(read, threads.run(_read, read, worth=elements >= CHUNK), strict=True):
        found[number] = (found[number] + total) % MODULUS
    return found


def fingerprints(tensors: Mapping[str, torch.Tensor], accelerators: Accelerators) -> dict[str, int]:
    """By name, the digest of each tensor's bits in row-major order, in whatever order they lie. A tensor of several
    names is looked at once."""
    once = {id(tensor): tensor for tensor in tensors.values() if tensor.numel()}
    found: dict[int, int] = {}
    on_host = [tensor for tensor in once.values() if accelerators.of(tensor.device) is None]
    elements = sum(tensor.numel() for tensor in on_host)
    totals = threads.run(lambda tensor: digest_bits(to_host(tensor)), on_host, worth=elements >= CHUNK)
    found |= zip(map(id, on_host), totals, strict=True)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in once.values():
        if id(tensor) not in found:
            by_device.setdefault(tensor.device, []).append(tensor)
    for device, own in by_device.items():
        accelerator = accelerators.of(device)
        assert accelerator is not None
        places = [_all_of(tensor, accelerator) for tensor in own]
        found |= zip(map(id, own), _sweep(accelerator, places), strict=True)
    return {name: found.get(id(tensor), 0) for name, tensor in tensors.items()}


def digest_box(bits: UInts, box: LiveBox) -> int:
    """The part of a tensor's digest that a box makes; `bits` are its elements in row-major order."""
    run = 1
    for length, stride in reversed(list(zip(box.shape, box.source_strides, strict=True))):
        if stride != run:
            break
        run *= length
    starts = box.at(np.arange(0, box.size, run))[0]
    if starts.size * SHORT > box.size:
        return digest_at(box.at(np.arange(box.size))[0], bits)
    return sum(digest_bits(bits[n * run : (n + 1) * run], int(at)) for n, at in enumerate(starts)) % MODULUS


def _read(numbered: tuple[int, Place]) -> int:
    memory, box = numbered[1]
    return digest_box(memory.read(box), box)


def _all_of(tensor: torch.Tensor, accelerator: Accelerator) -> Place:
    """A tensor, as if it were one of a checkpoint."""
    rows = tuple(prod(tensor.shape[dim + 1 :]) for dim in range(tensor.dim()))
    box = LiveBox(tuple(tensor.shape), 0, rows, "", tensor.storage_offset(), tensor.stride())
    return Place(Memory(tensor, 0, accelerator), box)


def _sweep(accelerator: Accelerator, places: Sequence[Place]) -> list[int]:
    """Digests of places on one accelerator. What lies in another order than in its tensor is put into that order
    first, in the arena's window, as much as fits at a time."""
    totals = _Totals(len(places))
    with accelerator.beside():
        room = accelerator.arena.window()
        for number, (memory, box) in enumerate(places):
            for piece in _strips(box):
                view = memory.view(piece)
                if view.is_contiguous():
                    totals.note(number, view, piece)
                    continue
                for part in memory.pieces(piece):
                    if not room.holds(part.size, view.dtype):
                        totals.add()
                        room = accelerator.arena.window()
                    across = room.take(part.size, view.dtype)
                    across.view(part.shape).copy_(memory.view(part))
                    totals.note(number, across, part)
        totals.add()
    return totals.of


def _swept(parts: Sequence[Part]) -> list[int]:
    """The digests of all parts, in sweeps that each need little memory of torch's."""
    ends = np.cumsum([part.bits.numel() for part in parts])
    cuts = np.unique(np.searchsorted(ends, np.arange(AT_ONCE, ends[-1:].sum(), AT_ONCE))).tolist()
    found: list[int] = []
    for start, end in itertools.pairwise([0, *(cut for cut in cuts if cut), len(parts)]):
        found += sweeps.digest(parts[start:end])
    return found


class _Totals:
    """Digests that are added up, the noted parts of many in one sweep."""

    def __init__(self, count: int) -> None:
        self.of = [0] * count
        self._noted: list[tuple[int, Part]] = []

    def note(self, number: int, bits: torch.Tensor, box: LiveBox) -> None:
        """These bits, of a box that is a strip, are of that number's."""
        strip = _strip(box)
        assert strip is not None
        self._noted.append((number, Part(bits.reshape(-1), strip)))

    def add(self) -> None:
        """Sweep over what was noted."""
        noted, self._noted = self._noted, []
        for (number, _), total in zip(noted, _swept([part for _, part in noted]), strict=True):
            self.of[number] = (self.of[number] + total) % MODULUS


def _strip(box: LiveBox) -> Strip | None:
    """Where a box's elements stand in the checkpoint tensor, if a strip says it."""
    part = box.part
    if part.is_run:
        return Strip(part.offset)
    if len(part.shape) == 1:
        return Strip(part.offset, 1, part.strides[0])
    return Strip(part.offset, part.shape[1], part.strides[0]) if part.strides[1:] == (1,) else None


def _strips(box: LiveBox) -> Iterator[LiveBox]:
    """A box in pieces that stand as strips in the checkpoint tensor."""
    if _strip(box) is not None:
        yield box
        return
    for row in box.rows():
        yield from _strips(row)


def _strip_count(box: LiveBox) -> int:
    """How many pieces `_strips` gives."""
    return 1 if _strip(box) is not None else box.shape[0] * _strip_count(next(box.rows()))
