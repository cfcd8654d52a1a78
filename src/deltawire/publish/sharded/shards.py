"""What one rank of a sharded job holds of a tensor: its elements in a box, and which rank publishes them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deltawire.errors import ShapeMismatch
from deltawire.format.codecs import tiles
from deltawire.format.codecs.subset import NOTHING, Coded
from deltawire.prepare.names import View
from deltawire.weights.bits import UInts
from deltawire.weights.boxes import Box, Shape
from deltawire.weights.delta import Delta
from deltawire.weights.digest import digest_bits
from deltawire.weights.table import TensorEntry


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What one process holds of a tensor of shape `whole`: `tensor`, the rectangle of shape `shape` at `offset`.

    `copies` ranks hold these same elements. Exactly one of them has it `owned`, and publishes it. `sharded` says that
    it came as a DTensor, not as a plain tensor.
    """

    whole: Shape
    offset: Shape
    shape: Shape
    tensor: Any
    owned: bool
    copies: int
    sharded: bool = False

    @classmethod
    def all_of(cls, tensor: Any, *, owned: bool = True, copies: int = 1) -> "Shard":
        """A plain tensor, held whole."""
        shape = tuple(tensor.shape)
        return cls(shape, (0,) * len(shape), shape, tensor, owned, copies)

    @property
    def box(self) -> Box:
        """Which elements of the tensor these are."""
        return Box.within(self.whole, self.offset, self.shape)

    def is_placed_as(self, other: "Shard") -> bool:
        """Whether both are the same elements, published by the same rank."""
        same_elements = (self.whole, self.offset, self.shape) == (other.whole, other.offset, other.shape)
        return same_elements and self.owned == other.owned

    def is_moved_to(self, other: "Shard") -> bool:
        """Whether another is of other elements, or published by another rank; or a whole tensor where this was a
        DTensor. On one rank, or where ranks hold copies, the two are one box, and FSDP2's copy may be an old one."""
        return (self.sharded and not other.sharded) or not self.is_placed_as(other)

    def through(self, view: View) -> "Shard":
        """What it holds of a view of the tensor, in the view's own coordinates and over the same memory.

        The box is empty where the two do not meet, which needs a view that has a dimension.
        """
        met = tuple(
            (max(start, at) - at, min(stop, at + length) - at)
            for (start, stop), at, length in zip(view.box, self.offset, self.shape, strict=True)
        )
        if any(start >= stop for start, stop in met):
            none = (0,) * len(view.dims)
            empty = self.tensor[(slice(0),) * len(met)].reshape(none)
            return replace(self, whole=view.shape, offset=none, shape=none, tensor=empty)
        here = View(view.name, met, view.dims)
        begin = tuple(self.offset[dim] + met[dim][0] - view.box[dim][0] for dim in view.dims)
        return replace(self, whole=view.shape, offset=begin, shape=here.shape, tensor=here.of(self.tensor))


def moved(name: str, known: Shard, now: Shard) -> ShapeMismatch:
    """The error for a rank that gives another part of a tensor than before."""
    parts = [f"{list(part.shape)} at {list(part.offset)}" for part in (known, now)]
    if known.sharded and not now.sharded:
        parts = ["a DTensor", "a whole tensor"]
    return ShapeMismatch(
        f"{name}: this rank gave {parts[0]} before, and now {parts[1]}. Publish what the model shows after `reshard()` "
        "of every FSDPModule, as checkpoint_tensors(model) of deltawire.trainers.state does; a model that was sharded "
        "another way needs a new Publisher, which reads the new parts from the last commit"
    )


def spread(delta: Delta, boxes: Mapping[str, Box], table: Mapping[str, TensorEntry]) -> Delta:
    """A rank's changes, as changes of the whole tensors."""
    return Delta({name: boxes[name].spread(change, table[name].shape) for name, change in delta.items()})


def placed(coded: Coded, box: Box, whole: Shape) -> Coded:
    """What a box's change was encoded as, with its tiles where they are among those of the tensor."""
    height, width = coded.tile
    columns = tiles.matrix(whole)[1]
    starts = box.positions(np.array([tile.start for tile in tiles.grid(box.shape, coded.tile)], np.int64))
    numbers = starts // columns // height * -(-columns // width) + starts % columns // width
    entries = [NOTHING] * tiles.tiles_in(whole, coded.tile)
    for number, entry in zip(numbers.tolist(), coded.entries, strict=True):
        entries[number] = entry
    return replace(coded, entries=tuple(entries))


def part_digest(data: UInts, rank: int, size: int) -> int:
    """The part of a flat tensor's digest that falls to one of `size` ranks when each reads as much as the others."""
    start, stop = (data.size * at // size for at in (rank, rank + 1))
    return digest_bits(data[start:stop], start)
