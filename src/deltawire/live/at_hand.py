"""A worker's live weights as checkpoint tensors, one at a time: what deltas of codec `class` are read against."""

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np

from deltawire.format.codecs.tiles import matrix
from deltawire.live.boxes import LiveBox
from deltawire.live.digests import Place
from deltawire.live.live_weights import LiveWeights
from deltawire.runlog import cuts
from deltawire.runlog.cuts import Cuts
from deltawire.weights.bits import Bits, UInts, count, zeros
from deltawire.weights.blocks import FINEST, WHOLE, Cut, block_of, cut_of, part_of


def cuts_of(live: LiveWeights) -> Cuts | None:
    """Where tiles must end that a worker is to decode from what it holds; empty where it holds tensors whole. None
    where that takes more words than a heartbeat has."""
    names = (name for name, entry in live.table.items() if entry.trainable)
    return cuts.said((name, _cut(live, name)) for name in names)


class TensorsAtHand(Mapping[str, Bits]):
    """The tensors that the run trains, by name; each is read from live memory when it is asked for, and may be that
    memory itself, to look at now. One of which a part is here, or nothing, is a `PartBits`."""

    def __init__(self, live: LiveWeights) -> None:
        self._live = live

    def __getitem__(self, name: str) -> Bits:
        entry, places = self._live.table[name], _places(self._live, name)
        if len(places) == 1 and places[0].box.size == count(entry.shape):
            memory, box = places[0]
            return Bits(entry.dtype, entry.shape, memory.read(box))
        bits = zeros(entry.dtype, entry.shape)
        for memory, box in places:
            _lay(memory.read(box), box, bits.data)
        if _are_whole(places, entry.shape):
            return bits
        return part_of(bits, [place.box.part for place in places], matrix(entry.shape)[1])

    def __iter__(self) -> Iterator[str]:
        return (name for name, entry in self._live.table.items() if entry.trainable)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _lay(part: UInts, box: LiveBox, whole: UInts) -> None:
    """Put the elements of a box where they are in its tensor."""
    strides = tuple(stride * whole.itemsize for stride in box.source_strides)
    np.lib.stride_tricks.as_strided(whole[box.source_offset :], box.shape, strides)[...] = part.reshape(box.shape)


def _places(live: LiveWeights, name: str) -> list[Place]:
    """Places that hold each element that is here once."""
    places = {place.box.part: place for place in live.places(name)}
    size = count(live.table[name].shape)
    for place in places.values():
        if place.box.size == size:
            return [place]
    return [*places.values()]


def _are_whole(places: list[Place], shape: tuple[int, ...]) -> bool:
    return sum(place.box.size for place in places) == count(shape)


def _cut(live: LiveWeights, name: str) -> Cut:
    """Of what all edges of a tensor's parts here are multiples."""
    shape, places = live.table[name].shape, _places(live, name)
    if not places or not prod(shape) or _are_whole(places, shape):
        return WHOLE
    rows, columns = matrix(shape)
    blocks = [block for place in places if (block := block_of(place.box.part, columns)) is not None]
    return cut_of(blocks, rows, columns) if len(blocks) == len(places) else FINEST
