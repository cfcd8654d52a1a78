"""Comparing one publish with what was captured last. One loop, for one process and for a rank.

Each tensor is compared where its baseline lies: on the host one at a time, on a device many at once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deltawire.format.codecs import subset
from deltawire.format.codecs.fused import Coding
from deltawire.publish.devices import Place
from deltawire.publish.dtypes import Casting
from deltawire.publish.requirements import Table, require_all, require_due, require_shape
from deltawire.publish.sharded.shards import Shard
from deltawire.publish.ties import GivenTensor
from deltawire.publish.tracker import ChangeTracker
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import dtype_of, naming, require_castable

if TYPE_CHECKING:
    from deltawire.publish import on_device

Batch = Sequence[tuple[GivenTensor, Shard]]
"""tensors as they were given, and what this process holds of each"""
AT_ONCE = 32 << 20
"""bytes of device memory for copies of tensors that are compared together: of those that are strided, say"""
ELEMENTS = 1 << 30
"""Elements that are compared together: a sweep's numbers of them take 24 MiB, and changes 16 bytes each until they are
on the host. More would save a wait or two of a tenth of a millisecond."""


def hold_whole(given: GivenTensor) -> Shard:
    """What one process holds of a tensor: all of it."""
    return Shard.all_of(given.tensor)


def nothing_to_prepare(name: str, shard: Shard) -> None:
    """The baseline holds everything of a tensor already, so nothing is left to do."""


def not_yet(name: str, shard: Shard) -> None:
    """No change is encoded before its version is sent."""


class _Waiting:
    """Tensors on devices that are still to be compared: how many elements they have, and how many bytes the copies of
    those take that need one."""

    def __init__(self) -> None:
        self._held: list[tuple[GivenTensor, Shard]] = []
        self._copies = self._elements = 0

    @property
    def is_enough(self) -> bool:
        """Whether more should not be compared at once."""
        return self._copies > AT_ONCE or self._elements >= ELEMENTS

    def append(self, given: GivenTensor, shard: Shard, dtype: str) -> None:
        """One more tensor, which the run has as `dtype`."""
        self._held.append((given, shard))
        is_read_in_place = (dtype_of(shard.tensor), dtype) == ("F32", "BF16") or dtype_of(shard.tensor) == dtype
        if not is_read_in_place or not shard.tensor.is_contiguous():
            self._copies += shard.tensor.nbytes
        self._elements += shard.tensor.numel()

    def take(self) -> Batch:
        """All of them; none is left."""
        held = self._held
        self._held, self._copies, self._elements = [], 0, 0
        return held


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one publish is compared.

    `table` has the dtype and shape of each tensor of the run, and `trainable` the names that are due; None while the
    run begins. `place` says where each baseline lies. `hold` says what this process holds of a tensor. `prepare` is
    called before a tensor is compared. `coding` says how a change that is found on the host is encoded as it is found,
    and how one that is found on a device is ranked there, if it is. Tensors that `stay` keep their values when the
    next is asked for.
    """

    tracker: ChangeTracker
    casting: Casting
    table: Table
    trainable: set[str] | None
    place: Place
    hold: Callable[[GivenTensor], Shard] = hold_whole
    prepare: Callable[[str, Shard], None] = nothing_to_prepare
    coding: Callable[[str, Shard], Coding | None] = not_yet
    stay: bool = False
    _batch: _Waiting = field(default_factory=_Waiting, init=False)

    def run(self, tensors: Iterable[GivenTensor]) -> dict[str, str]:
        """Move the baseline to the tensors given. By its name in the run, the name under which each was given.

        Raises UnknownTensor, MissingTensor, ShapeMismatch, DtypeMismatch, CopiesDiffer, ConcurrentWrite. What was
        compared before the error stays in the baseline, and in what the next version covers.
        """
        seen: dict[str, str] = {}
        for given in tensors:
            name, shard = given.name, self.hold(given)
            if seen.get(name, given.alias) != given.alias:
                self._require_alike(given, shard)
                continue
            require_shape(name, shard.whole, self.table)
            require_due(name, seen, self.trainable)
            self.prepare(name, shard)
            if self.place.takes(shard.tensor, self.tracker.baseline):
                self._batch.append(given, shard, self.table[name].dtype)
                if not self.stay or self._batch.is_enough:
                    self._compare_batch()
            else:
                self._take(given, shard)
            seen[name] = given.alias
        self._compare_batch()
        require_all(seen, self.trainable)
        return seen

    def _take(self, given: GivenTensor, shard: Shard) -> None:
        if self.place.crosses(shard.tensor):
            self._take_crossing(given, shard)
        else:
            coding = self._coding_of(given.name, shard)
            self.tracker.take(given.name, self._bits(given, shard), owned=shard.owned, coding=coding)

    def _take_crossing(self, given: GivenTensor, shard: Shard) -> None:
        """Take a tensor of a device, whose baseline lies on the host, piece by piece."""
        from deltawire.publish import crossing

        through, name = self._through(given), given.name
        held = self.tracker.baseline.at_home(name)
        with naming(name):
            change = crossing.compare(shard.tensor, through, held)
        coding = self._ranking_of(name, shard)
        coded = subset.encode(change, held.data, tile=coding.tile) if coding is not None else None
        self.tracker.take_change(name, change, coded, owned=shard.owned)

    def _coding_of(self, name: str, shard: Shard) -> Coding | None:
        return self.coding(name, shard) if shard.owned else None

    def _ranking_of(self, name: str, shard: Shard) -> Coding | None:
        """How a tensor's change is ranked by class, if it is: not where some of it is left of a publish that failed."""
        coding = self._coding_of(name, shard) if name not in self.tracker.uncovered else None
        return coding if coding is not None and coding.by_class else None

    def _through(self, given: GivenTensor) -> str | None:
        """The dtype by way of which a tensor is cast. Raises DtypeMismatch, as a cast does."""
        held_as = self.table[given.name].dtype
        if dtype_of(given.tensor) != held_as:
            with naming(given.name):
                require_castable(given.tensor, held_as)
        return self.casting.through(given.name, given.tensor, held_as)

    def _bits(self, given: GivenTensor, shard: Shard) -> Bits:
        held_as = self.table[given.name].dtype
        return self.casting.cast(given.name, given.tensor, held_as, shard=shard.tensor)

    def _compare_batch(self) -> None:
        """Compare what waits for it. Where the device has no memory for that, the baseline comes home for good."""
        batch = self._batch.take()
        if not batch:
            return
        swept = self._sweep(batch)
        if swept is not None and self.tracker.take_swept(swept, {given.name for given, shard in batch if shard.owned}):
            return
        self.place.refuse()
        self.tracker.baseline.bring_home()
        for given, shard in batch if swept is None else ():
            self._take(given, shard)

    def _sweep(self, batch: Batch) -> "on_device.Swept | None":
        """What changed of tensors on devices; None where one has no memory for it."""
        from deltawire.publish import on_device

        asked = []
        for given, shard in batch:
            name, through = given.name, self._through(given)
            held = on_device.lend(self.tracker.baseline, name, shard.tensor.device)
            if held is None:
                return None
            box, coding = self.tracker.baseline.boxes.get(name), self._ranking_of(name, shard)
            asked.append(on_device.Asked(name, shard.tensor, through, held, box, coding))
        return on_device.compare(asked)

    def _require_alike(self, given: GivenTensor, shard: Shard) -> None:
        """Raise CopiesDiffer unless a tensor is given under a second name as it was under the first."""
        self._compare_batch()
        if self.place.takes(shard.tensor, self.tracker.baseline):
            swept = self._sweep([(given, shard)])
            if swept is not None and not swept.moved[given.name].change.changed:
                return
        self.tracker.baseline.require_alike(given.alias, given.name, self._bits(given, shard))
