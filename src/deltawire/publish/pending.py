"""A change that no commit covers yet: folded while it waits, frozen to exact bytes once it is sent."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blake3 import blake3
from msgspec import UNSET

from deltawire.buckets.base import size_of
from deltawire.buckets.verified import hash_file
from deltawire.errors import TooLarge
from deltawire.format import delta_file
from deltawire.format.body import encode_ranked
from deltawire.format.codecs.ranking import Ranking
from deltawire.format.codecs.subset import Coded
from deltawire.publish.sharded.shards import placed, spread
from deltawire.runlog.keys import delta_key, needs_weights, part_key
from deltawire.runlog.records import Commit, Payload, Run, hash_of, signed, write
from deltawire.runlog.signing import SigningKey
from deltawire.runlog.writing import Attempt
from deltawire.weights.boxes import Box
from deltawire.weights.delta import Delta
from deltawire.weights.digest import root as root_of

WAITED = "it waited for the store"
"""why a version is of a codec that needs no weights, where there was a choice"""


@dataclass(frozen=True, slots=True)
class Captured:
    """Versions captured and not yet sent, folded into one: the change, and what its commit will say.

    `parent` is None for a run's first version. That carries its anchor's files in `payloads` (key below the run ->
    bytes or file), or with a base nothing. A delta's payload is dropped when it folds, and made again when frozen: then
    in a codec that needs no weights, for those before it are gone.

    In a sharded job, `rank` captured what it owns, and its delta counts positions inside its `boxes`. The digests are
    those of whole tensors all the same. `reason` is why the delta was encoded as it was, where there was a choice.

    `coded` is what was encoded or ranked of a delta as it was found, against the weights of its parent, for the
    thread that makes its payload. It is dropped with the payload.
    """

    run: Run
    version: int
    parent: int | None
    versions: int
    delta: Delta
    digests: Mapping[str, int]
    created: float
    step: int | None
    metrics: Mapping[str, float]
    payloads: Mapping[str, bytes | Path] | None
    rank: int | None = None
    boxes: Mapping[str, Box] = field(default_factory=dict)
    reason: str = ""
    coded: Mapping[str, Coded | Ranking] | None = None

    @property
    def codec(self) -> str:
        """What its delta is written in, as it is now."""
        by_class = any(map(needs_weights, self.payloads or ())) or _is_by_class(self.delta, self.coded or {})
        return "class" if by_class else self.run.may_use[0]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payloads made so far."""
        return sum(size_of(data) for data in (self.payloads or {}).values())

    def waiting(self) -> "Captured":
        """The same once it waits, or folds with another: its file is made when it is sent."""
        return replace(self, payloads=None, coded=None, reason=self.reason and WAITED)

    @property
    def nbytes(self) -> int:
        """Bytes of memory: the change, what was encoded or ranked of it, and the payloads made so far that are not
        files."""
        encoded = sum(len(data) for data in (self.payloads or {}).values() if isinstance(data, bytes))
        return self.delta.nbytes + sum(own.nbytes for own in (self.coded or {}).values()) + encoded


def fold(earlier: Captured, later: Captured) -> Captured:
    """Two deltas captured one after the other, as one."""
    versions, delta = earlier.versions + later.versions, earlier.delta + later.delta
    return replace(later.waiting(), parent=earlier.parent, versions=versions, delta=delta)


@dataclass(frozen=True, slots=True)
class Shipment:
    """What one process gives to a commit, frozen.

    Its payloads by key below the run, their records, and the names of the tensors they change.
    """

    payloads: Mapping[str, bytes | Path]
    records: tuple[Payload, ...]
    names: tuple[str, ...]


def ship(captured: Captured) -> Shipment:
    """The exact bytes a process sends for a version, again and again until the outcome is known."""
    payloads = captured.payloads if captured.payloads is not None else encode(captured, captured.coded)
    records = tuple(
        Payload(key, size_of(data), blake3(data).hexdigest() if isinstance(data, bytes) else hash_file(data))
        for key, data in payloads.items()
    )
    return Shipment(payloads, records, tuple(captured.delta))


def freeze(
    captured: Captured,
    shipments: Sequence[Shipment] = (),
    *,
    parent_hash: str | None = None,
    writer: str | None = None,
    key: SigningKey | None = None,
) -> Attempt:
    """The exact bytes of an append, to be sent again unchanged until the outcome is known. Equal input, equal bytes.

    `shipments` are those of every process that trains, this one's first (by default it is the only one). `parent_hash`
    is that of the commit before (a run's first names its run.json). `writer` says who holds the run.
    """
    run, first = signed(captured.run, key), captured.parent is None
    own, *others = shipments or (ship(captured),)
    names = {name for shipment in (own, *others) for name in shipment.names}
    payloads = tuple(record for shipment in (own, *others) for record in shipment.records)
    changed = [entry.name for entry in run.table if first or entry.name in names]
    commit = Commit(
        run=run.run,
        version=captured.version,
        parent=captured.parent,
        root=root_of(run.table, captured.digests),
        digests={name: f"{captured.digests[name]:016x}" for name in changed},
        payloads=payloads,
        created=captured.created,
        step=captured.step,
        metrics=dict(captured.metrics),
        parent_hash=hash_of(write(run)) if first else parent_hash,
        writer=writer,
        choice=_choice(captured, payloads) or UNSET,
    )
    return Attempt(run, signed(commit, key), own.payloads)


def _choice(captured: Captured, payloads: Sequence[Payload]) -> str:
    """What a commit says of its codec: which, and why; nothing where there was no choice."""
    if not captured.reason or not payloads or captured.parent is None:
        return ""
    codec = "class" if any(needs_weights(payload.key) for payload in payloads) else captured.run.may_use[0]
    return f"{codec}: {captured.reason}"


def _is_by_class(delta: Delta, coded: Mapping[str, Coded | Ranking]) -> bool:
    return any(coded[name].by_class for name in delta if name in coded)


def _encoded(delta: Delta, coded: Mapping[str, Coded | Ranking]) -> dict[str, Coded]:
    """What was encoded of a change, with what was ranked, encoded now."""
    rankings = {name: own for name, own in coded.items() if isinstance(own, Ranking) and name in delta}
    return {name: own for name, own in coded.items() if isinstance(own, Coded)} | encode_ranked(delta, rankings)


def encode(
    captured: Captured, coded: Mapping[str, Coded | Ranking] | None = None, stored: Collection[str] = ()
) -> dict[str, bytes | Path]:
    """The delta's file under its key; nothing for a version in which nothing changed.

    `coded` are changes of it that were encoded or ranked as they were found, against the weights of its parent, by the
    tiles of a rank's boxes where a rank captured it. Where any of them is ranked by these weights, the file is of codec
    `class`; else of what its run writes. Tensors `stored` are written whole.
    """
    if not captured.delta:
        return {}
    delta, found = captured.delta, _encoded(captured.delta, coded or {})
    if captured.rank is not None:
        table, boxes = {entry.name: entry for entry in captured.run.table}, captured.boxes
        delta = spread(delta, boxes, table)
        found = {name: placed(own, boxes[name], table[name].shape) for name, own in found.items()}
    try:
        data, by_class = _file(captured, delta, found, stored)
    except TooLarge:  # tiles that suit all receivers may be too many for one file, and so may the classes of each
        data, by_class = _file(captured, delta, {}, stored)
    sealed = blake3(data).hexdigest()
    if captured.parent is None and captured.rank is not None:
        return {part_key(captured.version, sealed, captured.rank): data}
    return {delta_key(captured.version, sealed, captured.rank, by_class=by_class): data}


def _file(captured: Captured, delta: Delta, found: Mapping[str, Coded], stored: Collection[str]) -> tuple[bytes, bool]:
    """A change's file, and whether it is of codec `class`. Raises TooLarge where no reader would take it."""
    coded = {name: found[name] for name in delta if name in found}
    by_class = _is_by_class(delta, coded)
    codec = "class" if by_class else captured.run.may_use[0]
    run, parent, version = captured.run.run, captured.parent, captured.version
    data = delta_file.encode(
        delta, codec=codec, coded=coded or None, stored=stored, run=run, parent=parent, version=version
    )
    return data, by_class
