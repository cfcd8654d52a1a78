"""Which elements of a tensor one rank of a sharded job holds: a box. Pure functions over numpy.

A box's elements in row-major order stand in rising order in the whole tensor too, so a change counted in the box
becomes a change of the whole tensor by moving its positions, and stays sorted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from deltawire.prepare.names import View
from deltawire.weights.bits import Bits, Positions, UInts
from deltawire.weights.delta import Delta, TensorDelta, settle
from deltawire.weights.digest import MODULUS, digest_at, digest_bits


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor of shape `whole`: it begins at `offset` and has shape `shape`; an entry per dimension."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def all_of(cls, shape: tuple[int, ...]) -> "Box":
        """The box that is the whole tensor."""
        return cls(shape, (0,) * len(shape), shape)

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        """Elements of the whole tensor between neighbours, per dimension."""
        return tuple(prod(self.whole[dim + 1 :]) for dim in range(len(self.whole)))

    @cached_property
    def _start(self) -> int:
        return sum(at * stride for at, stride in zip(self.offset, self._strides, strict=True))

    @cached_property
    def _digits(self) -> tuple[tuple[int, int], ...]:
        """(length, stride) of as few dimensions as describe the box: one where its elements are neighbours."""
        joined: list[tuple[int, int]] = []
        for length, stride in zip(self.shape, self._strides, strict=True):
            if joined and joined[-1][1] == length * stride:
                joined[-1] = (joined[-1][0] * length, stride)
            elif length != 1:
                joined.append((length, stride))
        return tuple(joined)

    @property
    def _is_run(self) -> bool:
        """Whether the box's elements are neighbours in the whole tensor: a shard of rows is."""
        return len(self._digits) <= 1 and all(stride == 1 for _, stride in self._digits)

    @property
    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(at, at + length) for at, length in zip(self.offset, self.shape, strict=True))

    def positions(self, inside: Positions) -> Positions:
        """Flat positions in the whole tensor, by flat positions in the box."""
        found: Positions = np.full(inside.size, self._start, np.int64)
        rest = inside
        for number, (length, stride) in reversed([*enumerate(self._digits)]):
            rest, digit = np.divmod(rest, length) if number else (rest, rest)
            found += digit * stride
        return found

    def cut(self, bits: Bits) -> Bits:
        """The box of a whole tensor; a copy."""
        return Bits(bits.dtype, self.shape, _copied(bits.data, self))

    def restrict(self, change: TensorDelta) -> TensorDelta:
        """The part of a whole tensor's change that is in the box, counted in the box."""
        if change.positions is None:
            return settle(change.dtype, self.shape, None, _copied(change.steps, self))
        inside = np.ones(change.positions.size, bool)
        here: Positions = np.zeros(change.positions.size, np.int64)
        rest = change.positions
        for at, length, stride in zip(self.offset, self.shape, self._strides, strict=True):
            digit, rest = np.divmod(rest, stride)
            inside &= (digit >= at) & (digit < at + length)
            here = here * length + (digit - at)
        return settle(change.dtype, self.shape, here[inside], change.steps[inside])

    def spread(self, change: TensorDelta) -> TensorDelta:
        """A change counted in the box, as one of the whole tensor."""
        positions, steps = change.sparse()
        return TensorDelta(change.dtype, self.whole, self.positions(positions), steps)

    def digest(self, data: UInts) -> int:
        """The part of the whole tensor's digest that these elements of the box make."""
        if not data.size:
            return 0
        total = 0
        run = self._digits[-1][0] if self._digits and self._digits[-1][1] == 1 else 1
        starts = self.positions(np.arange(0, data.size, run))
        for number, start in enumerate(starts.tolist()):
            total += digest_bits(data[number * run : (number + 1) * run], start)
        return total % MODULUS

    def apply_(self, data: UInts, change: TensorDelta) -> tuple[int, int]:
        """Add a change to the box's elements in place; the touched elements' part of the digest, before and after."""
        inside, steps = change.sparse()
        if self._is_run:
            from deltawire.weights import kernels

            return kernels.apply_with_digest(data, inside, steps, self._start)
        positions, old = self.positions(inside), data[inside]
        data[inside] += steps
        return digest_at(positions, old), digest_at(positions, data[inside])


def _copied(data: UInts, box: Box) -> UInts:
    return np.ascontiguousarray(data.reshape(box.whole)[box._slices]).reshape(-1).copy()


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What one rank holds of one tensor: `tensor`, the elements in `box`. `copies` ranks hold these same elements, and
    exactly one of them has it `owned`: that one publishes it. `sharded`: it came as a DTensor, not as a plain one."""

    box: Box
    tensor: Any
    owned: bool
    copies: int
    sharded: bool = False

    def through(self, view: View) -> "Shard":
        """What it holds of a view of the tensor, in the view's own coordinates and over the same memory; an empty box
        where the two do not meet, which needs a view that has a dimension."""
        offset, shape = self.box.offset, self.box.shape
        met = tuple(
            (max(start, at) - at, min(stop, at + length) - at)
            for (start, stop), at, length in zip(view.box, offset, shape, strict=True)
        )
        if any(start >= stop for start, stop in met):
            none = (0,) * len(view.dims)
            empty = self.tensor[(slice(0),) * len(met)].reshape(none)
            return replace(self, box=Box(view.shape, none, none), tensor=empty)
        here = View(view.name, met, view.dims)
        begin = tuple(offset[dim] + met[dim][0] - view.box[dim][0] for dim in view.dims)
        return replace(self, box=Box(view.shape, begin, here.shape), tensor=here.of(self.tensor))


def spread(delta: Delta, boxes: Mapping[str, Box]) -> Delta:
    """A rank's changes, as changes of the whole tensors."""
    return Delta({name: boxes[name].spread(change) for name, change in delta.items()})


def share(data: UInts, rank: int, size: int) -> int:
    """The part of a flat tensor's digest that falls to one of `size` ranks when each reads as much as the others."""
    start, stop = (data.size * at // size for at in (rank, rank + 1))
    return digest_bits(data[start:stop], start)
