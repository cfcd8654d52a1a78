"""The edges of a way, read: their files, and what all of them change together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deltawire.read.adding import Moved, Part, add_up
from deltawire.read.opened import OpenedRun
from deltawire.runlog.ways import Hop
from deltawire.weights.delta import Delta
from deltawire.weights.kept import KeptParts

AT_ONCE = 1 << 28
"""bytes of files that are in memory together, where several are decoded tensor by tensor"""


class Hops(OpenedRun):
    """One run of a bucket, and what edges of it change. Options are `Subscriber`'s."""

    def added_up(
        self,
        hops: Sequence[Hop],
        weights: Mapping[str, Any] | None,
        kept: KeptParts | None = None,
        *,
        from_anchor: bool = False,
    ) -> tuple[Delta, dict[str, tuple[str, Delta]]]:
        """The changes of several edges as one, from the weights at the start of the first, or of what is `kept` of
        them. Beside it, by the key of its record, the record's hash and the change of each that cannot be decoded again
        from there. `from_anchor`: these weights are an anchor's, and whole beside what is kept.

        Raises BucketError, FormatError; NeedsBase without the weights that one needs, WrongBase where these cannot be
        they.
        """
        known = [self.at_hand(hop, kept, from_anchor=from_anchor) for hop in hops]
        needy = any(hop.needs_weights and change is None for hop, change in zip(hops, known, strict=True))
        delta, decoded = Delta(), dict[str, Delta]()
        if kept is None and not needy:
            for hop, change in zip(hops, known, strict=True):  # one file in memory at a time
                part = self.fetch_delta(hop.filed.record) if change is None else change
                delta += -part if hop.edge.undo else part
            return delta, {}
        for stretch in [hops] if from_anchor and kept is not None else _stretches(hops):
            parts = [self.part(hop, kept, from_anchor=from_anchor) for hop in stretch]
            change, decoded = add_up(parts, weights if weights is None else Moved(weights, delta, kept), kept)
            delta += change
        hashes = {hop.edge.record: hop.filed.hash for hop in hops}
        return delta, {key: (hashes[key], change) for key, change in decoded.items()}

    def part(self, hop: Hop, kept: KeptParts | None, *, from_anchor: bool) -> Part:
        """What an edge changes, as it is held or as its files have it."""
        change = self.at_hand(hop, kept, from_anchor=from_anchor)
        if change is not None:
            return Part(hop.edge.record, known=change, undo=hop.edge.undo)
        return Part(hop.edge.record, tuple(self.open_delta(hop.filed.record, kept)), undo=hop.edge.undo)

    def at_hand(self, hop: Hop, kept: KeptParts | None, *, from_anchor: bool) -> Delta | None:
        """What an edge changes, where it is held. From an anchor on, what a later delta is read against is moved whole:
        a change of what is kept does not help."""
        if from_anchor and kept is not None and not hop.edge.undo:
            return None
        return self._held.find(hop.edge.record, hop.filed.hash, kept)


def _stretches(hops: Sequence[Hop]) -> Iterator[list[Hop]]:
    """The edges of a way, as many at a time as there is memory for their files; at least one."""
    stretch: list[Hop] = []
    room = 0
    for hop in hops:
        room -= hop.filed.record.wire_bytes
        if stretch and room < 0:
            yield stretch
            stretch = []
        if not stretch:
            room = AT_ONCE - hop.filed.record.wire_bytes
        stretch.append(hop)
    yield stretch
