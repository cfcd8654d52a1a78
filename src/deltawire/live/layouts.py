"""A storage whose elements were put in another order after loading, and where a rectangle of it went.

Packing a weight for a kernel moves blocks of it about. Written in mixed radix, every digit of an element's offset keeps
a stride of its own, before and after; so rectangles stay rectangles and nothing is kept per element.
"""

from dataclasses import dataclass

import numpy as np

from deltawire.live.boxes import Box, box_of
from deltawire.weights.bits import Positions

Steps = tuple[tuple[int, int, int, int], ...]
"""of a cut: (count, elements of the dimension in one step, the digit that moves, by how much)"""

BACKWARDS = 16
"""elements or blocks that may stand in reverse order; each becomes a box of its own"""


@dataclass(frozen=True, slots=True)
class Layout:
    """Digits (size, stride before, stride after), most significant first: an offset before is the sum of digit times
    stride before; the same digits give the offset after, to which `start` is added."""

    digits: tuple[tuple[int, int, int], ...]
    start: int = 0

    def offset(self, before: int) -> int:
        """Where one element went."""
        return self.start + sum(before // here % size * there for size, here, there in self.digits)

    def carry(self, box: Box) -> list[Box] | None:
        """The boxes that a box became, together the same elements; None when they are no rectangles."""
        dims = sorted(zip(box.shape, box.source_strides, box.target_strides, strict=True), key=lambda dim: dim[2])
        pieces: list[tuple[int, int, Steps, tuple[int, ...]]] = [(box.source_offset, box.target_offset, (), ())]
        for size, source, target in dims:
            grown = []
            for source_offset, at, steps, sources in pieces:
                cuts = self._cut(at, size, target)
                if cuts is None:
                    return None
                for skip, more in cuts:
                    strides = tuple(step * source for _, step, _, _ in more)
                    start = source_offset + skip * source, at + skip * target
                    grown.append((*start, (*steps, *more), (*sources, *strides)))
            pieces = grown
        if not all(self._stays(at, steps) for _, at, steps, _ in pieces):
            return None
        return [part for piece in pieces for part in self._boxes(box.parameter, *piece)]

    def _cut(self, at: int, size: int, stride: int) -> list[tuple[int, Steps]] | None:
        """A dimension that starts at offset `at`, cut where a digit would carry: per piece, the elements before it."""
        digit = next((n for n, (_, here, _) in enumerate(self.digits) if stride >= here), None)
        if digit is None or stride % self.digits[digit][1]:
            return None
        radix, here, _ = self.digits[digit]
        move = stride // here
        first = at // here % radix
        if size <= (radix - 1 - first) // move + 1:
            return [(0, ((size, 1, digit, move),))]
        if digit == 0 or radix % move:
            return None
        period = radix // move
        head = (radix - 1 - first) // move + 1 if first >= move else 0
        cuts: list[tuple[int, Steps]] = [(0, ((head, 1, digit, move),))] if head else []
        whole, tail = divmod(size - head, period)
        if whole:
            outer = self._cut(at + head * stride, whole, radix * here)
            if outer is None:
                return None
            for skip, steps in outer:
                wider = tuple((count, step * period, which, by) for count, step, which, by in steps)
                cuts.append((head + skip * period, (*wider, (period, 1, digit, move))))
        if tail:
            cuts.append((head + whole * period, ((tail, 1, digit, move),)))
        return cuts

    def _stays(self, at: int, steps: Steps) -> bool:
        """Whether no digit overflows anywhere in a piece, which makes its map linear."""
        highest = [at // here % size for size, here, _ in self.digits]
        for count, _, digit, move in steps:
            highest[digit] += (count - 1) * move
        return all(high < size for high, (size, _, _) in zip(highest, self.digits, strict=True))

    def _boxes(self, parameter: str, source: int, at: int, steps: Steps, sources: tuple[int, ...]) -> list[Box]:
        """A piece as a box; one for each step along a digit that runs backwards, which no view of a storage does."""
        boxes: list[tuple[tuple[tuple[int, int, int], ...], int, int]] = [((), source, self.offset(at))]
        for (count, _, digit, by), source_stride in zip(steps, sources, strict=True):
            stride = by * self.digits[digit][2]
            if stride > 0:
                boxes = [((*dims, (count, source_stride, stride)), here, there) for dims, here, there in boxes]
            else:
                boxes = [
                    (dims, here + n * source_stride, there + n * stride)
                    for dims, here, there in boxes
                    for n in range(count)
                ]
        return [box_of(dims, here, parameter, there) for dims, here, there in boxes]


def fit(targets: Positions) -> Layout | None:
    """The layout that sends element `i` to `targets[i]`; None when digits do not explain it."""
    digits, rest, here = [], np.asarray(targets, np.int64), 1
    while rest.size > 1:
        step = rest[1] - rest[0]
        breaks = np.flatnonzero(np.diff(rest) != step)
        size = int(breaks[0]) + 1 if breaks.size else rest.size
        if rest.size % size:
            return None
        rows = rest.reshape(-1, size)
        if not (rows == rows[:, :1] + step * np.arange(size)).all():
            return None
        if step < 0 and size > BACKWARDS:
            return None
        digits.append((size, here, int(step)))
        here, rest = here * size, rows[:, 0]
    return Layout(tuple(reversed(digits)), int(rest[0])) if rest.size else Layout(())
