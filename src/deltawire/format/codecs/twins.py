"""The three ways to compute the codecs `subset` and `class`: numpy says what, Numba is fast, torch runs where a tensor
lies. All write the same bytes."""

from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np

from deltawire.format.codecs import classes, lists
from deltawire.format.codecs.classes import Ranked, Scheme
from deltawire.format.codecs.lists import Changes, Facts, Unpacked
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.found import Found, Scratch
from deltawire.weights.kernels_numpy import collect
from deltawire.weights.speed import why_no_numba


class Twin(Protocol):
    """What each of them computes; `lists` and `classes` say it in numpy."""

    def pack(self, changes: Changes) -> tuple[Facts, UInts]: ...
    def unpack(
        self, facts: Facts, payload: UInts, *, most: int, kind: np.dtype[np.unsignedinteger], rows: int, dead: int
    ) -> Unpacked: ...
    def classify(self, old: UInts, positions: Positions, steps: UInts, scheme: Scheme) -> Ranked: ...
    def compare(self, old: UInts, new: UInts, scheme: Scheme, found: Found, scratch: Scratch) -> Ranked: ...
    def locate(
        self, old: UInts, facts: Facts, ranks: Positions, steps: UInts, scheme: Scheme
    ) -> tuple[Positions, Positions, UInts]: ...
    def live_rows(self, positions: Positions, width: int, limit: int) -> Positions: ...


class _Plain:
    pack = staticmethod(lists.pack)
    unpack = staticmethod(lists.unpack)
    classify = staticmethod(classes.classify)
    compare = staticmethod(classes.compare)
    locate = staticmethod(classes.locate)

    @staticmethod
    def live_rows(positions: Positions, width: int, limit: int) -> Positions:
        """The rows that hold a change, ascending; more than `limit` of them where there are more."""
        return np.unique(positions // width)


plain: Twin = _Plain()
"""slow, obvious, and what the others are held to"""


@cache
def fast() -> Twin:
    """The Numba twin, or without Numba the numpy one. It is imported where it is used: Numba costs half a second."""
    if why_no_numba() is not None:
        return plain
    from deltawire.format.codecs import classes_numba, pack_numba, unpack_numba

    class Fast:
        pack = staticmethod(pack_numba.pack)
        unpack = staticmethod(unpack_numba.unpack)
        classify = staticmethod(classes_numba.classify)
        compare = staticmethod(classes_numba.compare)
        locate = staticmethod(classes_numba.locate)
        live_rows = staticmethod(pack_numba.live_rows)

    return Fast()


def on_torch(device: str = "cpu") -> Twin:
    """The torch twin on a device, for arrays of numpy: they go there, and the results come back."""
    return OnTorch(device)


class OnTorch:
    """Arrays to tensors of a device and back; a tensor that lies there already is better given to `torch_twin`."""

    def __init__(self, device: str) -> None:
        from deltawire.format.codecs import torch_twin

        self._twin, self._device = torch_twin, device

    def _to(self, array: UInts | Positions) -> Any:
        import torch

        return torch.from_numpy(np.array(array)).to(self._device)

    def _bits(self, array: UInts) -> Any:
        """Elements as signed integers."""
        return self._to(array.view(f"<i{array.itemsize}"))

    def pack(self, changes: Changes) -> tuple[Facts, UInts]:
        live = None if changes.live is None else self._to(changes.live)
        steps = self._bits(changes.steps)
        facts, payload = self._twin.pack(replace(changes, ranks=self._to(changes.ranks), steps=steps, live=live))
        return facts, payload.cpu().numpy()

    def unpack(
        self, facts: Facts, payload: UInts, *, most: int, kind: np.dtype[np.unsignedinteger], rows: int, dead: int
    ) -> Unpacked:
        signed = self._bits(np.empty(0, kind)).dtype
        found: Any = self._twin.unpack(facts, self._to(payload), most=most, kind=signed, rows=rows, dead=dead)
        return Unpacked(
            found.ranks.cpu().numpy(),
            found.steps.cpu().numpy().view(kind),
            None if found.rows is None else found.rows.cpu().numpy(),
            found.dead_listed,
        )

    def classify(self, old: UInts, positions: Positions, steps: UInts, scheme: Scheme) -> Ranked:
        tensors = (self._bits(old), self._to(positions), self._bits(steps))
        population, changed, ranks, own = self._twin.classify(*tensors, scheme)
        return Ranked(population, changed, ranks.cpu().numpy(), own.cpu().numpy().view(steps.dtype))

    def compare(self, old: UInts, new: UInts, scheme: Scheme, found: Found, scratch: Scratch) -> Ranked:
        first = found.count
        collect(old, new, found)
        changes = (found.positions[first : found.count], found.steps[first : found.count])
        return self.classify(old, *changes, scheme)

    def locate(
        self, old: UInts, facts: Facts, ranks: Positions, steps: UInts, scheme: Scheme
    ) -> tuple[Positions, Positions, UInts]:
        tensors = (self._to(ranks), self._bits(steps))
        population, positions, own = self._twin.locate(self._bits(old), facts, *tensors, scheme)
        return population, positions.cpu().numpy(), own.cpu().numpy().view(steps.dtype)

    def live_rows(self, positions: Positions, width: int, limit: int) -> Positions:
        rows: Positions = self._twin.live_rows(self._to(positions), width, limit).cpu().numpy()
        return rows
