"""Comparing on the device: what changed of many tensors is found there, and only changes cross to the host.

All runs on a stream of our own. It waits for what the trainer has queued, and what the trainer queues next waits until
the weights are read. Digests, bytes and the new baseline come from the same values, those that the comparison stored.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from deltawire.format.codecs import ranks, tiles
from deltawire.format.codecs.classes import SCHEMES
from deltawire.format.codecs.fused import Coding
from deltawire.format.codecs.ranking import Ranking
from deltawire.publish import crossing
from deltawire.publish.baseline import Baseline
from deltawire.publish.streams import beside_trainer, own_stream
from deltawire.weights.bits import Bits, UInts, unsigned
from deltawire.weights.boxes import Box, Shape
from deltawire.weights.delta import TensorDelta, cheaper
from deltawire.weights.device import sweeps
from deltawire.weights.device.carriers import CARRIERS, Changes
from deltawire.weights.device.landing import landing
from deltawire.weights.tensors import as_torch, naming

PINNED = 256 << 20
"""bytes of changes that cross into pinned memory and stay there until they are uploaded; more go to pageable memory"""
OutOfMemory = torch.OutOfMemoryError


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice:
    """A tensor's baseline on a device: a carrier, in memory that nothing else writes."""

    dtype: str
    shape: Shape
    flat: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return int(self.flat.nbytes)

    def home(self) -> Bits:
        """The same bits on the host. Takes no device memory."""
        with own_stream(self.flat.device):
            return Bits(self.dtype, self.shape, _bits_of(self.flat.to("cpu", copy=True), self.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A tensor to compare with its baseline `held`, cast to that one's dtype, by way of dtype `through` if there is
    one. `box` is what of the whole tensor it is, None for all. With a `coding` its changes are ranked by class."""

    name: str
    tensor: torch.Tensor
    through: str | None
    held: OnDevice
    box: Box | None
    coding: Coding | None = None

    def carrier(self) -> torch.Tensor:
        """Its bits, or float32, as a sweep compares them."""
        with naming(self.name):
            return crossing.carrier(self.tensor, self.through, self.held.dtype)


def lend(baseline: Baseline, name: str, device: torch.device) -> OnDevice | None:
    """The baseline of a tensor on a device, where it comes to lie if it lies elsewhere. None without room for it."""
    held = baseline.held[name]
    if isinstance(held, OnDevice) and held.flat.device == device:
        return held
    try:
        place = upload(baseline[name], device)
    except OutOfMemory:
        return None
    baseline.lend(name, place)
    return place


def upload(bits: Bits, device: torch.device) -> OnDevice:
    """The same bits on a device. Raises OutOfMemory."""
    with own_stream(device):
        flat = as_torch(Bits(bits.dtype, (bits.data.size,), bits.data)).to(device, copy=True)
        return OnDevice(bits.dtype, bits.shape, flat.view(CARRIERS[flat.element_size()]))


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """One tensor's change, and the part of its digest that the changed elements make, before and after. `ranking` is
    that of the change by the old bits, where it was asked for, and there was memory for it."""

    change: TensorDelta
    before: int
    after: int
    ranking: Ranking | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Swept:
    """What changed of several tensors, by name, and still the baseline's to become."""

    moved: Mapping[str, Moved]
    _left: Sequence[tuple[Sequence[Asked], Changes]]

    def advance(self) -> Mapping[str, Bits]:
        """Write the changes to the baselines. Those by name that had no room for it, on the host: with the changes."""
        home: dict[str, Bits] = {}
        for asked, changes in self._left:
            try:
                with own_stream(asked[0].held.flat.device):
                    flats = [own.held.flat for own in asked]
                    sweeps.scatter(flats, changes.counts, changes.positions, changes.bits)
            except OutOfMemory:
                home |= _written_at_home(asked, changes)
        return home


def compare(asked: Sequence[Asked]) -> Swept | None:
    """What changed of these tensors; nothing moves. None where a device has no memory for it. Raises ConcurrentWrite,
    and what torch raises for tensors that it cannot cast."""
    moved: dict[str, Moved] = {}
    left = []
    try:
        for own in _alike(asked):
            with beside_trainer(own[0].tensor.device):
                changes = sweeps.compare([each.carrier() for each in own], [each.held.flat for each in own])
                changes = replace(changes, positions=changes.positions.long())
                moved |= _brought_over(own, changes)
            left.append((own, changes))
    except OutOfMemory:
        return None
    return Swept(moved, left)


def _alike(asked: Sequence[Asked]) -> Iterator[list[Asked]]:
    """The tensors of each device and width."""
    groups: dict[Any, list[Asked]] = {}
    for own in asked:
        groups.setdefault((own.tensor.device, own.held.flat.dtype), []).append(own)
    yield from groups.values()


def _brought_over(asked: Sequence[Asked], changes: Changes) -> dict[str, Moved]:
    """The changes of each tensor on the host. Waits once for all of them to cross."""
    places = _places(asked, changes)
    before = sweeps.digest_at(changes.counts, places, changes.bits - changes.increments)
    after = sweeps.digest_at(changes.counts, places, changes.bits)
    ranked = _ranked(asked, changes)
    copies = _to_host(changes.positions, changes.increments, *(ranked.arrays() if ranked is not None else ()))
    positions, increments, *crossed = (np.asarray(np.from_dlpack(copy)) for copy in copies)
    rankings = ranked.rankings(crossed) if ranked is not None else {}
    ends = np.cumsum([0, *changes.counts]).tolist()
    moved = {}
    for own, (start, stop), was, now in zip(asked, pairwise(ends), before, after, strict=True):
        dtype, shape = own.held.dtype, own.held.shape
        at, steps = positions[start:stop].view(np.int64), increments[start:stop].view(unsigned(dtype))
        moved[own.name] = Moved(cheaper(dtype, shape, at, steps), was, now, rankings.get(own.name))
    return moved


def _ranked(asked: Sequence[Asked], changes: Changes) -> ranks.Found | None:
    """The ranks of those changes that are to be ranked. None where there are none, or no memory for it: then they are
    sent as `subset`."""
    tensors, parts = [], []
    for own, count, part in zip(asked, changes.counts, changes.positions.split(list(changes.counts)), strict=True):
        held, coding = own.held, own.coding
        if coding is not None and count and held.dtype in SCHEMES:
            tile = coding.tile or tiles.choose(held.shape)
            tensors.append(ranks.ToRank(own.name, held.dtype, held.shape, held.flat, tile, count))
            parts.append(part)
    try:
        return ranks.rank(tensors, torch.cat(parts) if len(parts) > 1 else parts[0]) if tensors else None
    except OutOfMemory:
        return None


def _places(asked: Sequence[Asked], changes: Changes) -> torch.Tensor:
    """Where the changed elements stand in the whole tensors."""
    if all(own.box is None for own in asked):
        return changes.positions
    parts = changes.positions.split(list(changes.counts))
    return torch.cat([part if own.box is None else own.box.spots(part) for own, part in zip(asked, parts, strict=True)])


def _to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies on the host, in pinned memory if they are few, once they are there."""
    device = tensors[0].device
    if device.type != "cuda" or sum(tensor.nbytes for tensor in tensors) > PINNED:
        return [tensor.cpu() for tensor in tensors]
    copies = [landing(tensor.numel(), tensor.dtype, device) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return copies


def _written_at_home(asked: Sequence[Asked], changes: Changes) -> dict[str, Bits]:
    """Baselines on the host with the changes in them, whether or not some are there already."""
    home = {}
    counts = list(changes.counts)
    for own, at, bits in zip(
        asked, changes.positions.cpu().split(counts), changes.bits.cpu().split(counts), strict=True
    ):
        home[own.name] = own.held.home()
        home[own.name].data[at.numpy()] = _bits_of(bits, own.held.dtype)
    return home


def _bits_of(flat: torch.Tensor, dtype: str) -> UInts:
    array: UInts = np.from_dlpack(flat).view(unsigned(dtype))
    return array
