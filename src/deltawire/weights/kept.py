"""What a reader keeps of a tensor: some rectangles, and of a change what is in them. Pure functions over numpy."""

import itertools
from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np

from deltawire.weights.bits import Bits, UInts, count
from deltawire.weights.blocks import Block, block_of, part_of
from deltawire.weights.boxes import Box, Shape
from deltawire.weights.delta import TensorDelta, cheaper, settle


class Kept:
    """The kept elements of a tensor of shape `whole`: those of one box after another, each in row-major order.

    A change is kept as one of these elements alone: flat, with positions counted in them. Equal boxes are kept once,
    and elements of boxes that overlap once in each.
    """

    def __init__(self, whole: Shape, boxes: Iterable[Box]) -> None:
        self.whole = whole
        self.boxes = tuple(dict.fromkeys(box.joined for box in boxes))
        self._bounds = [0, *itertools.accumulate(box.size for box in self.boxes)]

    @property
    def size(self) -> int:
        """How many elements are kept."""
        return self._bounds[-1]

    @property
    def is_whole(self) -> bool:
        """Whether that is the tensor itself."""
        return len(self.boxes) == 1 and self.boxes[0].is_run and self.size == count(self.whole)

    def pick(self, data: UInts) -> UInts:
        """The kept elements of a flat tensor; a copy."""
        return np.concatenate([data[:0], *(box.pick(data) for box in self.boxes)])

    def cut(self, change: TensorDelta) -> TensorDelta:
        """What is kept of the whole tensor's change."""
        shape = (self.size,)
        if self.is_whole:
            return TensorDelta(change.dtype, shape, change.positions, change.increments)
        if change.positions is None:
            return settle(change.dtype, shape, None, self.pick(change.increments))
        positions, increments = [change.positions[:0]], [change.increments[:0]]
        for start, box in zip(self._bounds, self.boxes, strict=False):
            which, inside = box.locate(change.positions)
            positions.append(inside + start if start else inside)
            increments.append(change.increments[which])
        return cheaper(change.dtype, shape, np.concatenate(positions), np.concatenate(increments))

    def split(self, change: TensorDelta) -> dict[Box, TensorDelta]:
        """A change of the kept elements, by box; each counted in its box."""
        if len(self.boxes) == 1:
            return {self.boxes[0]: change}
        bounds = zip(self.boxes, itertools.pairwise(self._bounds), strict=True)
        return {box: change.restrict(start, stop) for box, (start, stop) in bounds}

    def spread(self, change: TensorDelta) -> TensorDelta:
        """A change of the kept elements, as one of the whole tensor."""
        spread = [box.spread(own, self.whole).sparse() for box, own in self.split(change).items()]
        positions = np.concatenate([positions for positions, _ in spread])
        increments = np.concatenate([increments for _, increments in spread])
        if len(spread) > 1:
            positions, first = np.unique(positions, return_index=True)
            increments = increments[first]
        return TensorDelta(change.dtype, self.whole, positions, increments)

    def among(self, bits: Bits) -> Bits:
        """A tensor of which only what is kept is at hand; over the same memory."""
        if any(box.is_run and box.size == bits.data.size for box in self.boxes):
            return bits
        return part_of(bits, self.boxes, self._columns)

    def meets(self, row: int, column: int, rows: int, width: int) -> bool:
        """Whether anything of a rectangle may be kept, of the tensor seen as a matrix; its last dimension is the
        columns, and one of fewer than two dimensions is one row."""
        blocks = self._blocks
        return blocks is None or any(block.shared_with(row, column, rows, width) for block in blocks)

    @property
    def _columns(self) -> int:
        return self.whole[-1] if len(self.whole) > 1 else count(self.whole)

    @cached_property
    def _blocks(self) -> list[Block] | None:
        """The boxes as blocks; None where they cannot be said so."""
        blocks = [block_of(box, self._columns) for box in self.boxes if box.size]
        known = [block for block in blocks if block is not None]
        return known if len(known) == len(blocks) else None


KeptParts = Mapping[str, Kept]
"""by name, what a reader keeps of each tensor; of one that is not there, nothing"""
