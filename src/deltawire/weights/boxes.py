"""A rectangle of a tensor: which elements it has, where they stand, what changes in it. Pure functions over numpy.

A box's elements in row-major order also stand in rising order in the whole tensor, where its strides fall. So a change
counted in the box becomes a change of the whole tensor when its positions are moved, and it stays sorted.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from deltawire.weights.bits import Bits, Positions, UInts
from deltawire.weights.delta import TensorDelta, settle
from deltawire.weights.digest import MODULUS, digest_at, digest_bits

Shape = tuple[int, ...]
TILE = 1 << 15
"""positions that are located at a time: what is computed of them stays in a core's cache"""


@dataclass(frozen=True)
class Box:
    """A rectangle of a flat tensor. It begins at element `offset`, and has a length and a stride for each dimension.

    Strides count elements of the whole tensor, and fall from one dimension to the next.
    """

    offset: int
    shape: Shape
    strides: Shape

    @classmethod
    def within(cls, whole: Shape, offset: Shape, shape: Shape) -> "Box":
        """The rectangle of shape `shape` that begins at `offset` in a tensor of shape `whole`: an entry a dimension."""
        strides = tuple(prod(whole[dim + 1 :]) for dim in range(len(whole)))
        start = sum(at * stride for at, stride in zip(offset, strides, strict=True))
        return cls(start, shape, strides)

    @classmethod
    def all_of(cls, shape: Shape) -> "Box":
        """The box that is the whole tensor."""
        return cls.within(shape, (0,) * len(shape), shape)

    @cached_property
    def size(self) -> int:
        """Elements in the box."""
        return prod(self.shape)

    @cached_property
    def joined(self) -> "Box":
        """The same elements in as few dimensions as describe them: one where they are neighbours.

        Boxes with the same elements, of one tensor and not empty, have equal `joined` boxes.
        """
        shape: list[int] = []
        strides: list[int] = []
        for length, stride in zip(self.shape, self.strides, strict=True):
            if shape and strides[-1] == length * stride:
                shape[-1], strides[-1] = shape[-1] * length, stride
            elif length != 1:
                shape.append(length)
                strides.append(stride)
        return Box(self.offset, tuple(shape), tuple(strides))

    @cached_property
    def is_run(self) -> bool:
        """Whether the elements are neighbours in the whole tensor, as those of a shard of rows are."""
        return self.joined.strides in ((), (1,))

    def positions(self, inside: Positions) -> Positions:
        """Flat positions in the whole tensor, for row-major positions in the box."""
        found: Positions = self.spots(inside)
        return found

    def spots(self, inside: Any) -> Any:
        """The same, of an array or of a torch tensor of int64."""
        found, rest = inside * 0 + self.offset, inside
        axes = [*zip(self.joined.shape, self.joined.strides, strict=True)]
        for number, (length, stride) in reversed([*enumerate(axes)]):
            rest, digit = (rest // length, rest % length) if number else (rest, rest)
            found += digit * stride
        return found

    def locate(self, positions: Positions) -> tuple[np.ndarray | slice, Positions]:
        """Which of these sorted flat positions in the whole tensor lie in the box (a slice or a mask), and their
        row-major positions in it."""
        if self.is_run or not self.size:
            first, end = np.searchsorted(positions, (self.offset, self.offset + self.size))
            here = positions[first:end]
            return slice(first, end), here - self.offset if self.offset else here
        inside, found = np.empty(positions.size, bool), np.empty(positions.size, np.int64)
        for start in range(0, positions.size, TILE):
            tile = slice(start, start + TILE)
            inside[tile], found[tile] = self._located(positions[tile])
        return inside, found[inside]

    def _located(self, positions: Positions) -> tuple[np.ndarray, Positions]:
        """Whether each of these positions lies in the box, and where."""
        rest = positions - self.offset
        inside = rest >= 0
        here: Positions = np.zeros(positions.size, np.int64)
        for length, stride in zip(self.joined.shape, self.joined.strides, strict=True):
            digit = rest // stride  # numpy divides by one number nine times as fast as divmod does
            rest = rest - digit * stride
            inside &= digit < length
            here = here * length + digit
        return inside & (rest == 0), here

    def pick(self, data: UInts) -> UInts:
        """The box's elements of a flat tensor, in row-major order; a copy."""
        if not self.size:
            return data[:0].copy()
        strides = tuple(stride * data.itemsize for stride in self.joined.strides)
        view = np.lib.stride_tricks.as_strided(data[self.offset :], self.joined.shape, strides, writeable=False)
        return np.array(view, order="C").reshape(-1)

    def cut(self, bits: Bits) -> Bits:
        """The box of a whole tensor; a copy."""
        return Bits(bits.dtype, self.shape, self.pick(bits.data))

    def restrict(self, change: TensorDelta) -> TensorDelta:
        """The part of a whole tensor's change that is in the box, counted in the box."""
        if change.positions is None:
            return settle(change.dtype, self.shape, None, self.pick(change.increments))
        which, here = self.locate(change.positions)
        return settle(change.dtype, self.shape, here, change.increments[which])

    def spread(self, change: TensorDelta, whole: Shape) -> TensorDelta:
        """A change counted in the box, as one of the tensor of shape `whole`."""
        positions, increments = change.sparse()
        return TensorDelta(change.dtype, whole, self.positions(positions), increments)

    def digest(self, data: UInts) -> int:
        """The part of the whole tensor's digest that these elements of the box make."""
        if not data.size:
            return 0
        total = 0
        run = self.joined.shape[-1] if self.joined.strides[-1:] == (1,) else 1
        starts = self.positions(np.arange(0, data.size, run))
        for number, start in enumerate(starts.tolist()):
            total += digest_bits(data[number * run : (number + 1) * run], start)
        return total % MODULUS

    def apply_(self, data: UInts, change: TensorDelta) -> tuple[int, int]:
        """Add a change to the box's elements in place; the touched elements' part of the digest, before and after."""
        inside, increments = change.sparse()
        if self.is_run:
            from deltawire.weights import kernels

            return kernels.apply_with_digest(data, inside, increments, self.offset)
        positions, old = self.positions(inside), data[inside]
        data[inside] += increments
        return digest_at(positions, old), digest_at(positions, data[inside])
