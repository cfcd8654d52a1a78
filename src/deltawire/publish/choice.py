"""What the tensors of one version are encoded in: a value that one capture holds to."""

from dataclasses import dataclass, field

from deltawire.format.codecs import tiles
from deltawire.format.codecs.fused import Coding
from deltawire.publish.sharded.shards import Shard
from deltawire.runlog.cuts import Cuts, cut_at
from deltawire.weights.blocks import WHOLE, Cut, block_of, cut_of, together
from deltawire.weights.boxes import Box, Shape


@dataclass(frozen=True, slots=True)
class Choice:
    """Codec `class`, or `subset`. `cuts` are where tiles of `class` must end, so that all who receive them can decode
    what they hold of a tensor by itself. `reason` says why, to people."""

    by_class: bool = False
    cuts: Cuts = field(default_factory=dict)
    reason: str = ""

    def coding(self, name: str, shape: Shape) -> Coding:
        """How a tensor is encoded: one whose tiles cannot suit all is of `subset`, in a version of `class`, too."""
        tile = self._tile(name, shape, WHOLE)
        return Coding(tile is not None, tile)

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


SUBSET = Choice()
UNRANKED = Choice(reason="the baseline lies on a device, where nothing is ranked by class")
