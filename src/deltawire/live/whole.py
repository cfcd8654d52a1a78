"""A worker's live weights as whole checkpoint tensors, one at a time: what deltas of codec `class` are read against."""

from collections.abc import Iterator, Mapping

import numpy as np

from deltawire.errors import NeedsBase
from deltawire.live.digests import Place
from deltawire.live.live_weights import LiveWeights
from deltawire.weights.bits import Bits, count, zeros


def whole_tensors(live: LiveWeights) -> "WholeTensors | None":
    """The tensors that the run trains, where this worker holds each of them whole; None where it does not."""
    whole = WholeTensors(live)
    return whole if whole.are_all_here else None


class WholeTensors(Mapping[str, Bits]):
    """The tensors that the run trains, by name; each is read from live memory when it is asked for, and may be that
    memory itself, to look at now. Asking for one of which other workers hold a part raises NeedsBase."""

    def __init__(self, live: LiveWeights) -> None:
        self._live = live

    @property
    def are_all_here(self) -> bool:
        """Whether every one of them can be asked for."""
        return all(self._places(name) for name in self if count(self._live.table[name].shape))

    def __getitem__(self, name: str) -> Bits:
        entry, places = self._live.table[name], self._places(name)
        if not places:
            raise NeedsBase(
                f'this worker holds only a part of {name}, and deltas of codec "class" are read against all of it: '
                'publish with codec="subset", or run `deltawire compact`, whose folds and anchors need no weights'
            )
        (memory, box), *others = places
        if not others:
            return Bits(entry.dtype, entry.shape, memory.read(box))
        bits = zeros(entry.dtype, entry.shape)
        for memory, box in places:
            bits.data[box.at(np.arange(box.size))[0]] = memory.read(box)
        return bits

    def __iter__(self) -> Iterator[str]:
        return (name for name, entry in self._live.table.items() if entry.trainable)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _places(self, name: str) -> list[Place]:
        """Places that hold each element of a tensor once; none where some are not here."""
        places = {place.box.part: place for place in self._live.places(name)}
        size = count(self._live.table[name].shape)
        for place in places.values():
            if place.box.size == size:
                return [place]
        return [*places.values()] if sum(place.box.size for place in places.values()) == size else []
