"""A version's changes as writes to live memory, tensor by tensor on the host and all together on an accelerator."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from deltawire.live.accelerator import Accelerator
from deltawire.live.boxes import LiveBox
from deltawire.live.digests import Place, digest_box
from deltawire.live.together import Located, Moved, add_together, locate, write_together
from deltawire.live.writes import Fill, Patch, Scatter
from deltawire.weights import threads
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.delta import TensorDelta
from deltawire.weights.digest import MODULUS, digest_at

DENSE = 4
"""one element in so many changed, and the whole part is written"""
PIECE = 1 << 16
"""elements that a thread writes at a time, a third of a millisecond's work"""
FEW = 1 << 20
"""elements of a tensor up to which a dense change goes to an accelerator as a sparse one: with all others"""

Batch = tuple[Accelerator, int]
"""an accelerator, and the bytes of an element there"""


@dataclass(slots=True, eq=False)
class LiveChanges:
    """The writes of one update, and by part what its digest was and is to be of the elements that change.

    What is queued for an accelerator is staged by `finish`.
    """

    writes: list[Patch] = field(default_factory=list)
    moved: dict[Hashable, Moved] = field(default_factory=dict)
    _sparse: dict[Batch, list[tuple[Hashable, Place, TensorDelta]]] = field(default_factory=dict)
    _known: dict[Batch, list[tuple[Located, UInts]]] = field(default_factory=dict)

    def add(self, part: Hashable, place: Place, own: TensorDelta) -> None:
        """Add increments to what lies at a place: those of its elements, in row-major order. `moved[part]` has its
        digests once all is finished.

        Raises DtypeMismatch for values that the server's dtype cannot hold.
        """
        memory = place.memory
        if (accelerator := memory.accelerator) and not memory.shift and _is_batched(own):
            batch = accelerator, memory.flat.element_size()
            self._sparse.setdefault(batch, []).append((part, place, own))
        elif own.positions is None:
            self.moved[part] = self._add_everywhere(place, own.increments)
        else:
            self.moved[part] = self._add_at(place, own.positions, own.increments)

    def make(self, place: Place, wanted: UInts) -> tuple[int, int]:
        """Make the elements of a place these bits, in row-major order, whatever they are now; the bits are kept. Its
        digest after it, and how many elements change. Raises DtypeMismatch for values that the server's dtype cannot
        hold."""
        memory, digest, changed = place.memory, 0, 0
        for box, new in _in_pieces(place, wanted):
            there = memory.lying(box)
            differ = memory.differing(there, new)
            if differ.size * DENSE > new.size:
                self._fill(Place(memory, box), there, new)
            elif differ.size:
                offsets, bits = box.at(differ)[1], memory.as_live(new[differ])
                self._scatter(Located(Place(memory, box), differ, offsets, bits), there[differ])
            digest += digest_box(new, box)
            changed += differ.size
        return digest % MODULUS, changed

    def finish(self) -> None:
        """Stage what was queued: all that an accelerator has of one width together."""
        for (accelerator, _), queued in self._sparse.items():
            located = list(threads.run(_locate, [(place, own) for _, place, own in queued]))
            write, moved = add_together(accelerator, located)
            self.writes.append(write)
            self.moved |= {part: own for (part, _, _), own in zip(queued, moved, strict=True)}
        for (accelerator, _), known in self._known.items():
            self.writes.append(write_together(accelerator, known))
        self._sparse, self._known = {}, {}

    def _add_everywhere(self, place: Place, increments: UInts) -> Moved:
        memory, before, after = place.memory, 0, 0
        for box, own in _in_pieces(place, increments):
            there = memory.lying(box)
            old = memory.as_checkpoint(there)
            new = old + own
            before, after = before + digest_box(old, box), after + digest_box(new, box)
            self._fill(Place(memory, box), there, new)
        return Moved(before % MODULUS, after % MODULUS)

    def _add_at(self, place: Place, positions: Positions, increments: UInts) -> Moved:
        memory, located = place.memory, locate(place, positions, increments)
        there = memory.gather(located.offsets)
        old = memory.as_checkpoint(there)
        new = old + located.bits
        before, after = digest_at(located.positions, old), digest_at(located.positions, new)
        self._scatter(located._replace(bits=memory.as_live(new)), there)
        return Moved(before, after)

    def _scatter(self, located: Located, there: UInts) -> None:
        """Put these bits, as they are to lie there, where others are; on the host in pieces, for threads to share."""
        memory = located.place.memory
        if memory.accelerator is not None:
            self._known.setdefault((memory.accelerator, memory.flat.element_size()), []).append((located, there))
            return
        for start in range(0, located.offsets.size, PIECE):
            own = slice(start, start + PIECE)
            self.writes.append(Scatter(memory, located.offsets[own], there[own], located.bits[own]))

    def _fill(self, place: Place, there: UInts, new: UInts) -> None:
        memory, box = place
        old = memory.owned(there)
        self.writes.append(Fill(memory, box, old, memory.kept(memory.as_live(new))))


def _in_pieces(place: Place, elements: UInts) -> Iterator[tuple[LiveBox, UInts]]:
    """A place in pieces that each cross at once, and of its elements those of each."""
    start = 0
    for box in place.memory.pieces(place.box):
        yield box, elements[start : start + box.size]
        start += box.size


def _is_batched(own: TensorDelta) -> bool:
    """Whether a change is staged with those of other tensors: one of few elements, if it is dense."""
    return own.positions is not None or own.increments.size <= FEW


def _locate(change: tuple[Place, TensorDelta]) -> Located:
    place, own = change
    return locate(place, *own.sparse())
