"""The baseline, and the part of its change that no version covers yet: the two move together, or not at all.

committed + frozen + waiting + uncovered == baseline
"""

from collections.abc import Container
from dataclasses import replace
from typing import TYPE_CHECKING

from deltawire.format.codecs.fused import Coding
from deltawire.format.codecs.ranking import Ranking
from deltawire.format.codecs.subset import Coded
from deltawire.publish.baseline import Baseline
from deltawire.publish.sharded.shards import Shard
from deltawire.publish.ties import Ties
from deltawire.weights.bits import Bits
from deltawire.weights.delta import TensorDelta

if TYPE_CHECKING:
    from deltawire.publish.on_device import Swept


class Transition:
    """Statements that only together take the state from one that agrees with itself to the next.

    `with transition: …`, or from `begin` to `end`. An exception in between, which a signal's handler may raise
    anywhere, leaves the state `unfinished` for good.
    """

    def __init__(self) -> None:
        self._open = 0

    @property
    def unfinished(self) -> bool:
        """Whether some of the statements may have been done, and others not."""
        return self._open > 0

    def begin(self) -> None:
        """Say so before the first of the statements."""
        self._open += 1

    def end(self) -> None:
        """Say so after the last."""
        self._open -= 1

    __enter__ = begin

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end()


class ChangeTracker:
    """The baseline, the change since the last version, and the digests that the baseline began with.

    `coded` has the encoding of those changes that were found in one piece, against the weights of the last version, or
    how a device ranked them.
    In a sharded job `shards` says by name what this rank holds of each tensor, without the tensor.
    """

    def __init__(self, transition: Transition, baseline: Baseline | None = None) -> None:
        self._transition = transition
        self.baseline = baseline if baseline is not None else Baseline()
        self.seeded = dict(self.baseline.digests)
        self.uncovered: dict[str, TensorDelta] = {}
        self.coded: dict[str, Coded | Ranking] = {}
        self.shards: dict[str, Shard] = {}

    def seed(self, name: str, bits: Bits, shard: Shard) -> None:
        """Take a rank's part of a tensor as captured, in memory of our own."""
        self.baseline.seed(name, bits, shard.box)
        self.seeded[name] = self.baseline.digests[name]
        self.shards[name] = replace(shard, tensor=None)

    def take(self, name: str, bits: Bits, *, owned: bool, coding: Coding | None = None) -> None:
        """Move the baseline to these bits, and keep the change if it is ours to publish. It is encoded, too, where a
        `coding` says how, unless some of it was left by a publish that failed.

        Raises UnknownTensor, ShapeMismatch, DtypeMismatch.
        """
        coded = None
        if coding is None or name in self.uncovered:
            change = self.baseline.compare(name, bits)
        else:
            change, coded = self.baseline.compare_and_encode(name, bits, coding)
        self.take_change(name, change, coded, owned=owned)

    def take_change(self, name: str, change: TensorDelta, coded: Coded | None, *, owned: bool) -> None:
        """Move the baseline by a change that was found, and maybe encoded, against it; keep it if it is ours."""
        with self._transition:
            if owned:
                self._keep(name, change, coded)
            self.baseline.advance(name, change)

    def take_swept(self, swept: "Swept", owned: Container[str]) -> bool:
        """Move baselines on devices by what a comparison there found, and keep the changes that are ours to publish.
        Whether all baselines are still there: one without memory for the changes lies on the host then."""
        with self._transition:
            for name, moved in swept.moved.items():
                if name in owned:
                    self._keep(name, moved.change, moved.ranking)
                self.baseline.move(name, moved.before, moved.after)
            home = swept.advance()
            for name, bits in home.items():
                self.baseline.lend(name, bits)
        return not home

    def take_back(self, name: str) -> None:
        """Undo what no version covers of a tensor."""
        with self._transition:
            self._code(name, None)
            self.baseline.advance(name, -self.uncovered.pop(name))

    def forget(self, name: str) -> None:
        """Let go of a tensor, as if it had never been seeded."""
        self.baseline.forget(name)
        for kept in (self.seeded, self.uncovered, self.coded, self.shards):
            kept.pop(name, None)

    def merge(self, aliases: Ties, given: set[str]) -> None:
        """Let go of what is a further name of another tensor.

        Where only that name was given, the other tensor becomes what is held under it.
        """
        for alias, name in aliases.items():
            if alias in given and name not in given:
                self._rename(alias, name)
            self.forget(alias)

    def cover(self) -> None:
        """A version covers everything from here on."""
        self.uncovered, self.coded = {}, {}

    def _rename(self, old: str, new: str) -> None:
        self.baseline.rename(old, new)
        self.seeded[new] = self.seeded.pop(old)
        self.uncovered.pop(new, None)
        self.coded.pop(new, None)
        if old in self.uncovered:
            self.uncovered[new] = self.uncovered.pop(old)
        if old in self.coded:
            self.coded[new] = self.coded.pop(old)
        if old in self.shards:
            self.shards[new] = self.shards.pop(old)

    def _keep(self, name: str, change: TensorDelta, coded: Coded | Ranking | None) -> None:
        """Keep a change to publish, and its encoding if no publish that failed left some of it."""
        left = self.uncovered.get(name)
        self.uncovered[name] = change if left is None else left + change
        self._code(name, coded if left is None else None)

    def _code(self, name: str, coded: Coded | Ranking | None) -> None:
        """Note what a tensor's whole change is encoded or ranked as; None where it is neither."""
        self.coded.pop(name, None)
        if coded is not None:
            self.coded[name] = coded
