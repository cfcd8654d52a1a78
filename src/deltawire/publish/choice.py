"""What the tensors of one version are encoded in: a value that one capture holds to."""

from dataclasses import dataclass, field

from deltawire.format.codecs import tiles
from deltawire.format.codecs.fused import Coding
from deltawire.runlog.cuts import Cuts, cut_at
from deltawire.weights.boxes import Shape


@dataclass(frozen=True, slots=True)
class Choice:
    """Codec `class`, or `subset`. `cuts` are where tiles of `class` must end, so that all who receive them can decode
    what they hold of a tensor by itself."""

    by_class: bool = False
    cuts: Cuts = field(default_factory=dict)

    def coding(self, name: str, shape: Shape) -> Coding:
        """How a tensor is encoded: one whose tiles cannot suit all is of `subset`, in a version of `class`, too."""
        tile = tiles.choose_within(shape, cut_at(self.cuts, name)) if self.by_class else None
        return Coding(tile is not None, tile)


SUBSET = Choice()
