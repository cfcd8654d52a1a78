"""Comparing one publish, tensor by tensor, with what was captured last. One loop, for one process and for a rank."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deltawire.format.codecs.fused import Coding
from deltawire.publish.dtypes import Casting
from deltawire.publish.requirements import Table, require_all, require_due, require_shape
from deltawire.publish.sharded.shards import Shard
from deltawire.publish.ties import GivenTensor
from deltawire.publish.tracker import ChangeTracker
from deltawire.weights.bits import Bits


def hold_whole(given: GivenTensor) -> Shard:
    """What one process holds of a tensor: all of it."""
    return Shard.all_of(given.tensor)


def nothing_to_prepare(name: str, shard: Shard) -> None:
    """The baseline holds everything of a tensor already, so nothing is left to do."""


def not_yet(name: str, shard: Shard) -> None:
    """No change is encoded before its version is sent."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one publish is compared.

    `table` has the dtype and shape of each tensor of the run, and `trainable` the names that are due; None while the
    run begins. `hold` says what this process holds of a tensor. `prepare` is called before a tensor is compared.
    `coding` says how a change is encoded as it is found, if it is.
    """

    tracker: ChangeTracker
    casting: Casting
    table: Table
    trainable: set[str] | None
    hold: Callable[[GivenTensor], Shard] = hold_whole
    prepare: Callable[[str, Shard], None] = nothing_to_prepare
    coding: Callable[[str, Shard], Coding | None] = not_yet

    def run(self, tensors: Iterable[GivenTensor]) -> dict[str, str]:
        """Move the baseline to the tensors given. By its name in the run, the name under which each was given.

        Raises UnknownTensor, MissingTensor, ShapeMismatch, DtypeMismatch, CopiesDiffer. What was compared before the
        error stays in the baseline, and in what the next version covers.
        """
        seen: dict[str, str] = {}
        for given in tensors:
            name, shard = given.name, self.hold(given)
            if seen.get(name, given.alias) != given.alias:
                self.tracker.baseline.require_alike(given.alias, name, self._bits(given, shard))
                continue
            require_shape(name, shard.whole, self.table)
            require_due(name, seen, self.trainable)
            self.prepare(name, shard)
            coding = self.coding(name, shard) if shard.owned else None
            self.tracker.take(name, self._bits(given, shard), owned=shard.owned, coding=coding)
            seen[name] = given.alias
        require_all(seen, self.trainable)
        return seen

    def _bits(self, given: GivenTensor, shard: Shard) -> Bits:
        held_as = self.table[given.name].dtype
        return self.casting.cast(given.name, given.tensor, held_as, shard=shard.tensor)
