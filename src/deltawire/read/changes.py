"""What a reader of a run is given: one verified update after another, or one change straight to a version."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from deltawire.format.checkpoint import Checkpoint
from deltawire.read.adding import Part
from deltawire.runlog.records import Commit, Position
from deltawire.weights.delta import Delta
from deltawire.weights.kept import KeptParts


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One step of the chain, its bytes verified.

    `delta` leads from `parent` to `position`. The first update of a copy that starts from nothing has an `anchor`
    instead: every tensor at `position`, lazily mapped from files; its `parent` is None. `digests` are those of all
    tensors at `position`; the holder of the weights compares them with what it got.
    """

    position: Position
    parent: Position | None
    delta: Delta | None
    anchor: Checkpoint | None
    digests: Mapping[str, int]
    commit: Commit
    wire_bytes: int
    """bytes fetched for this update"""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What leads from `since` to `position` by the cheapest path: perhaps an anchor, then everything else as one delta.

    Bytes are verified, weights are not: their holder computes their digests after the change and compares the
    root over all with `position.root` before anything is written. `records` and `payloads` count objects read;
    `derived` are the keys of the folds' and anchors' records among them.
    """

    since: Position | None
    position: Position
    anchor: Checkpoint | None
    anchor_position: Position | None
    delta: Delta
    commit: Commit
    wire_bytes: int
    records: int
    payloads: int
    derived: tuple[str, ...] = ()
    kept: KeptParts | None = None
    """what of each tensor `delta` and `decoded` are of, counted in that; None: whole tensors"""
    decoded: Mapping[str, tuple[str, Delta]] = field(default_factory=dict)
    """by the key of a record, its hash and what it changes: deltas that cannot be decoded again from `position`"""
    parts: tuple[Part, ...] = ()
    """instead of `delta`, where that is to be decoded later: what follows upon `since`, or upon the anchor"""
