"""What the tensors of one version are encoded in: a value that one capture holds to."""

from collections.abc import Container
from dataclasses import dataclass, field

from deltawire.format.body import DENSE_TRY_FROM
from deltawire.format.codecs import tiles
from deltawire.format.codecs.fused import Coding
from deltawire.publish.pending import Captured
from deltawire.publish.sharded.shards import Shard
from deltawire.runlog.cuts import Cuts, cut_at
from deltawire.weights.blocks import WHOLE, Cut, block_of, cut_of, together
from deltawire.weights.boxes import Box, Shape
from deltawire.weights.delta import Delta, TensorDelta


@dataclass(frozen=True, slots=True)
class Choice:
    """Codec `class`, or `subset`. `cuts` are where tiles of `class` must end, so that all who receive them can decode
    what they hold of a tensor by itself. With `whole` a tensor of which much changes is sent as an increment for each
    element, not compressed. `reason` says why, to people.
    """

    by_class: bool = False
    cuts: Cuts = field(default_factory=dict)
    whole: bool = False
    reason: str = ""

    def coding(self, name: str, shape: Shape, share: float = 0.0) -> Coding | None:
        """How a tensor is encoded, of which lately this share changed: one whose tiles cannot suit all is of `subset`,
        in a version of `class`, too. None for one that is expected to be sent `whole`."""
        if self.whole and share >= DENSE_TRY_FROM:
            return None
        tile = self._tile(name, shape, WHOLE)
        return Coding(tile is not None, tile)

    def stored(self, delta: Delta, coded: Container[str]) -> frozenset[str]:
        """Which tensors of a change are sent whole, of those that were not encoded as they were found."""
        if not self.whole:
            return frozenset()
        return frozenset(
            name for name, change in delta.items() if name not in coded and share_of(change) >= DENSE_TRY_FROM
        )

    def why(self, captured: Captured, *, on_device: bool) -> str:
        """Why a version came to be of its codec, once it is known where the baseline lies."""
        is_as_chosen = captured.codec == "class" or not (self.by_class or (self.whole and on_device))
        if is_as_chosen or not captured.delta:
            return self.reason
        if on_device:
            return SPARSE.reason if self.whole else UNRANKED
        return "no tiles of class that suit all: too small, or too many for one file"

    def of_shard(self, name: str, shard: Shard) -> Coding | None:
        """How what a rank holds of a tensor is encoded."""
        return self.coding_of(name, shard.whole, shard.box)

    def coding_of(self, name: str, shape: Shape, box: Box) -> Coding | None:
        """How a box of a tensor is encoded, in tiles none of which crosses its edges. None where it is encoded with
        the others of the tensor, as `subset`."""
        rows, columns = tiles.matrix(shape)
        block = block_of(box, columns) if box.size else None
        tile = self._tile(name, shape, cut_of([block], rows, columns)) if block is not None else None
        return None if tile is None else Coding(True, tile)

    def _tile(self, name: str, shape: Shape, own: Cut) -> tuple[int, int] | None:
        """Tiles that suit all who receive a tensor, and its own cut; None where it is not of `class`."""
        return tiles.choose_within(shape, together(cut_at(self.cuts, name), own)) if self.by_class else None


def share_of(change: TensorDelta) -> float:
    """Share of a tensor's elements that a change changes."""
    return change.changed / max(change.total, 1)


SUBSET = Choice()
UNRANKED = "the device had no memory to rank changes, or no tiles of class suit all"
SPARSE = Choice(reason="the baseline lies on a device, and of its tensors none is sent whole")
