"""Rectangles of checkpoint tensors, the live memory that holds them, and what makes a tensor unfit to be patched there.

Pure values over sizes and strides: how they are learned is in `placement`.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import numpy as np

from deltawire.errors import EngineUnsupported, some
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.boxes import TILE, Box, Shape


@dataclass(frozen=True, slots=True)
class LiveBox:
    """A rectangle of a checkpoint tensor and the rectangle of a live storage that holds it. Offsets and strides count
    elements: `source_*` in the flat checkpoint tensor, `target_*` in the storage behind `parameter`. Dimensions stand
    by falling source stride. Live elements are `shift` bits wider (below 0: narrower), at the low end, where all bits
    are zero."""

    shape: Shape
    source_offset: int
    source_strides: Shape
    parameter: str
    target_offset: int
    target_strides: Shape
    shift: int = 0

    @property
    def size(self) -> int:
        """Elements in the box."""
        return prod(self.shape)

    @property
    def part(self) -> Box:
        """The rectangle of the checkpoint tensor, written the one way in which equal rectangles are equal."""
        return Box(self.source_offset, self.shape, self.source_strides).joined

    def at(self, index: Positions) -> tuple[Positions, Positions]:
        """Flat checkpoint positions and storage offsets of elements named by their row-major index in the box. Either
        may be the index itself."""
        if self.is_contiguous:
            return _moved(index, self.source_offset), _moved(index, self.target_offset)
        source, target = np.empty(index.size, np.int64), np.empty(index.size, np.int64)
        for start in range(0, index.size, TILE):
            tile = slice(start, start + TILE)
            source[tile], target[tile] = self._at(index[tile])
        return source, target

    def _at(self, index: Positions) -> tuple[Positions, Positions]:
        source, target = np.full(index.size, self.source_offset), np.full(index.size, self.target_offset)
        for dim in reversed(range(len(self.shape))):
            rest = index // self.shape[dim] if dim else index * 0
            digit = index - rest * self.shape[dim]
            index = rest
            source += digit * self.source_strides[dim]
            target += digit * self.target_strides[dim]
        return source, target

    def pick(self, whole: UInts) -> UInts:
        """The box's elements of a flat checkpoint tensor, in row-major order; a copy."""
        return self.part.pick(whole)

    @property
    def is_contiguous(self) -> bool:
        """Whether the box's elements lie one after the other, in the checkpoint tensor and in the storage."""
        rows = tuple(prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        return self.source_strides == self.target_strides == rows

    def pieces(self, most: int) -> "Iterator[LiveBox]":
        """The box in pieces of at most so many elements, in row-major order."""
        if self.size <= most:
            yield self
        elif (row := self.size // self.shape[0]) > most:
            for inner in self.rows():
                yield from inner.pieces(most)
        else:
            rows = most // row
            for start in range(0, self.shape[0], rows):
                yield self._from(start, (min(rows, self.shape[0] - start), *self.shape[1:]))

    def rows(self) -> "Iterator[LiveBox]":
        """The boxes of one dimension less that the box consists of, in row-major order."""
        for start in range(self.shape[0]):
            yield self._from(start, self.shape[1:])

    def _from(self, row: int, shape: Shape) -> "LiveBox":
        """The box of such a shape, of as many dimensions or one less, that begins at a row."""
        first = len(self.shape) - len(shape)
        return replace(
            self,
            shape=shape,
            source_offset=self.source_offset + row * self.source_strides[0],
            source_strides=self.source_strides[first:],
            target_offset=self.target_offset + row * self.target_strides[0],
            target_strides=self.target_strides[first:],
        )

    @property
    def extent(self) -> tuple[int, int]:
        """First and last storage offset the box touches."""
        return extent_of(self.target_offset, self.shape, self.target_strides)


def _moved(index: Positions, by: int) -> Positions:
    return index + by if by else index


def box_of(dims: Iterable[tuple[int, int, int]], source: int, parameter: str, target: int, shift: int = 0) -> LiveBox:
    """A box of (length, source stride, target stride) in any order; dimensions of one element are left out."""
    kept = sorted((dim for dim in dims if dim[0] != 1), key=lambda dim: -dim[1])
    shape, sources, targets = zip(*kept, strict=True) if kept else ((), (), ())
    return LiveBox(shape, source, sources, parameter, target, targets, shift)


@dataclass(slots=True)
class Placement:
    """Boxes by checkpoint name, and for names that cannot be patched in place, why. `computed` says of names of which
    something did not arrive as a copy what wrote it instead."""

    boxes: dict[str, list[LiveBox]] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)

    def require(self, names: Iterable[str]) -> None:
        """Raise EngineUnsupported, naming each tensor that cannot be patched in place and why."""
        refuse({name: self.unfit[name] for name in names if name in self.unfit})

    @property
    def parts(self) -> dict[str, list[Box]]:
        """Which rectangles of each checkpoint tensor are here."""
        return {name: [box.part for box in boxes] for name, boxes in self.boxes.items()}


def refuse(reasons: Mapping[str, str]) -> None:
    """Raise EngineUnsupported for tensors that cannot be patched; nothing when there are none."""
    if reasons:
        first = some(f"{name} ({reason})" for name, reason in reasons.items())
        raise EngineUnsupported(
            f"{len(reasons)} tensors cannot be patched in place on this server: {first}. "
            "Serve this model with weights that the server keeps as they are loaded"
        )


class OtherWrite(NamedTuple):
    """A loader's write other than a copy of a checkpoint tensor: the operation, and the first and last offset that it
    touches behind a parameter."""

    parameter: str
    first: int
    last: int
    operation: str


def overwritten(boxes: Mapping[str, list[LiveBox]], writes: Iterable[OtherWrite]) -> dict[str, str]:
    """Names whose memory some operation other than their own copy would write."""
    by_parameter: dict[str, list[tuple[str, LiveBox]]] = {}
    for name, parts in boxes.items():
        for box in parts:
            by_parameter.setdefault(box.parameter, []).append((name, box))
    return {
        name: f"its loader also runs {write.operation} over it"
        for write in writes
        for name, box in by_parameter.get(write.parameter, [])
        if write.first <= box.extent[1] and box.extent[0] <= write.last
    }


def shared(boxes: Mapping[str, list[LiveBox]]) -> dict[str, str]:
    """Names that land, somewhere, where another name landed before: only one of the two can be read back."""
    faults: dict[str, str] = {}
    by_parameter: dict[str, list[tuple[str, LiveBox]]] = {}
    for name, parts in boxes.items():
        for box in parts:
            by_parameter.setdefault(box.parameter, []).append((name, box))
    for parameter, tenants in by_parameter.items():
        ends = sorted(box.extent for _, box in tenants)
        if all(stop < start for (_, stop), (start, _) in itertools.pairwise(ends)):
            continue
        taken = np.zeros(1 + max(stop for _, stop in ends), bool)
        for name, box in tenants:
            region = np.lib.stride_tricks.as_strided(taken[box.target_offset :], box.shape, box.target_strides)
            if region.any():
                faults[name] = (
                    f"another tensor of the run lands in the same part of {parameter}: this server ties what are two "
                    "tensors in the run; begin a run that gives the tied tensor once, as model.named_parameters() does"
                )
            region[...] = True
    return faults


def extent_of(offset: int, shape: Shape, strides: Shape) -> tuple[int, int]:
    """First and last offset of a rectangle."""
    return offset, offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def is_inside(part: Box, size: int) -> bool:
    """Whether a rectangle is one of a tensor of so many elements."""
    if len(part.shape) != len(part.strides) or min((part.offset, *part.shape, *part.strides)) < 0:
        return False
    return 0 in part.shape or extent_of(part.offset, part.shape, part.strides)[1] < size
