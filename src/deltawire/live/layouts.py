"""A storage whose elements were put in another order after loading, and where a rectangle of it went.

Packing a weight for a kernel moves blocks of it about. Written in mixed radix, every digit of an element's offset
keeps a stride of its own, before and after. So rectangles stay rectangles, and nothing is kept per element.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deltawire.live.boxes import LiveBox, box_of
from deltawire.weights.bits import Positions

BACKWARDS = 16
"""elements or blocks that may stand in reverse order; each becomes a box of its own"""


class Digit(NamedTuple):
    """One digit of an offset in mixed radix: how many values it has, and its strides before and after."""

    size: int
    before: int
    after: int


class Stretch(NamedTuple):
    """A dimension, or a part of one, along which one digit moves. It takes so many `values`, `elements` of the
    dimension apart; each moves the digit by `move`."""

    values: int
    elements: int
    digit: int
    move: int


class Cut(NamedTuple):
    """A part of a dimension within which no digit carries: the elements before it, and its stretches."""

    skip: int
    stretches: tuple[Stretch, ...]


class Piece(NamedTuple):
    """A part of a box: where it starts in the checkpoint tensor and in the storage before. Each of its stretches has a
    stride in the checkpoint tensor."""

    source: int
    at: int
    stretches: tuple[Stretch, ...] = ()
    strides: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """Digits, most significant first: an offset before is the sum of digit times stride before; the same digits give
    the offset after, to which `start` is added."""

    digits: tuple[Digit, ...]
    start: int = 0

    def offset(self, before: int) -> int:
        """Where one element went."""
        return self.start + sum(before // digit.before % digit.size * digit.after for digit in self.digits)

    def carry(self, box: LiveBox) -> list[LiveBox] | None:
        """The boxes that a box became, together the same elements; None when they are no rectangles."""
        dims = sorted(zip(box.shape, box.source_strides, box.target_strides, strict=True), key=lambda dim: dim[2])
        pieces = [Piece(box.source_offset, box.target_offset)]
        for size, source, target in dims:
            grown: list[Piece] = []
            for piece in pieces:
                cuts = self._cut(piece.at, size, target)
                if cuts is None:
                    return None
                grown += [_lengthened(piece, cut, source, target) for cut in cuts]
            pieces = grown
        if not all(self._stays(piece) for piece in pieces):
            return None
        return [part for piece in pieces for part in self._boxes(box.parameter, piece)]

    def _cut(self, at: int, size: int, stride: int) -> list[Cut] | None:
        """A dimension that starts at offset `at`, cut where a digit would carry."""
        digit = next((n for n, digit in enumerate(self.digits) if stride >= digit.before), None)
        if digit is None or stride % self.digits[digit].before:
            return None
        radix, here, _ = self.digits[digit]
        move, first = stride // here, at // here % radix
        if size <= (radix - 1 - first) // move + 1:
            return [Cut(0, (Stretch(size, 1, digit, move),))]
        if digit == 0 or radix % move:
            return None
        period = radix // move
        head = (radix - 1 - first) // move + 1 if first >= move else 0
        cuts = [Cut(0, (Stretch(head, 1, digit, move),))] if head else []
        whole, tail = divmod(size - head, period)
        if whole:
            outer = self._cut(at + head * stride, whole, radix * here)
            if outer is None:
                return None
            inner = Stretch(period, 1, digit, move)
            cuts += [Cut(head + cut.skip * period, (*_widened(cut, period), inner)) for cut in outer]
        if tail:
            cuts.append(Cut(head + whole * period, (Stretch(tail, 1, digit, move),)))
        return cuts

    def _stays(self, piece: Piece) -> bool:
        """Whether no digit overflows anywhere in a piece, which makes its map linear."""
        highest = [piece.at // digit.before % digit.size for digit in self.digits]
        for stretch in piece.stretches:
            highest[stretch.digit] += (stretch.values - 1) * stretch.move
        return all(high < digit.size for high, digit in zip(highest, self.digits, strict=True))

    def _boxes(self, parameter: str, piece: Piece) -> list[LiveBox]:
        """A piece as a box; one for each value of a digit that runs backwards, which no view of a storage does."""
        boxes: list[tuple[tuple[tuple[int, int, int], ...], int, int]] = [((), piece.source, self.offset(piece.at))]
        for stretch, source_stride in zip(piece.stretches, piece.strides, strict=True):
            stride = stretch.move * self.digits[stretch.digit].after
            if stride > 0:
                boxes = [((*dims, (stretch.values, source_stride, stride)), here, there) for dims, here, there in boxes]
            else:
                boxes = [
                    (dims, here + n * source_stride, there + n * stride)
                    for dims, here, there in boxes
                    for n in range(stretch.values)
                ]
        return [box_of(dims, here, parameter, there) for dims, here, there in boxes]


def _lengthened(piece: Piece, cut: Cut, source: int, target: int) -> Piece:
    """A piece of one dimension more, of which this is a cut; with the dimension's strides."""
    return Piece(
        piece.source + cut.skip * source,
        piece.at + cut.skip * target,
        (*piece.stretches, *cut.stretches),
        (*piece.strides, *(stretch.elements * source for stretch in cut.stretches)),
    )


def _widened(cut: Cut, period: int) -> tuple[Stretch, ...]:
    """The stretches of a cut of which each element stands for a period of them."""
    return tuple(stretch._replace(elements=stretch.elements * period) for stretch in cut.stretches)


def fit(targets: Positions) -> Layout | None:
    """The layout that sends element `i` to `targets[i]`; None when digits do not explain it."""
    digits, rest, here = [], np.asarray(targets, np.int64), 1
    while rest.size > 1:
        stride = rest[1] - rest[0]
        breaks = np.flatnonzero(np.diff(rest) != stride)
        size = int(breaks[0]) + 1 if breaks.size else rest.size
        if rest.size % size:
            return None
        rows = rest.reshape(-1, size)
        if not (rows == rows[:, :1] + stride * np.arange(size)).all():
            return None
        if stride < 0 and size > BACKWARDS:
            return None
        digits.append(Digit(size, here, int(stride)))
        here, rest = here * size, rows[:, 0]
    return Layout(tuple(reversed(digits)), int(rest[0])) if rest.size else Layout(())
