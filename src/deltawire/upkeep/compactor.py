"""Folds and anchors, made off the trainer: what lets a reader that is k versions behind fetch O(log k) objects.

A fold of level L replaces the deltas between two multiples of L by their sum. Before a manifest is written, what it
lists is checked against committed roots on a mirror of the weights.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blake3 import blake3

from deltawire.buckets.base import Bucket
from deltawire.buckets.verified import hash_file
from deltawire.errors import (
    DAMAGE,
    AlreadyExists,
    BadDigest,
    BadSignature,
    Gap,
)
from deltawire.format import delta_file
from deltawire.format.checkpoint import TEXTS
from deltawire.read.bases import require_public
from deltawire.read.local_copy import LocalCopy
from deltawire.read.mirror import Mirror
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log, records, signing, writing
from deltawire.runlog.bounds import require_anchor
from deltawire.runlog.figures import figures
from deltawire.runlog.keys import anchor_hash, anchor_prefix, derived_key, fold_key, way_key
from deltawire.runlog.log import Filed
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import Commit, Derived, Payload, Position, Way, signed
from deltawire.runlog.signing import Trust
from deltawire.upkeep.inventory import Inventory
from deltawire.weights.delta import Delta
from deltawire.weights.digest import root as root_of

LEVELS = tuple(4**power for power in range(1, 12))
"""versions that a fold of each level spans: so many that few lead anywhere, however long the run is"""
PLAIN_LEVEL = 64
"""a longer fold is made only where its parts take less than half of a checkpoint; beyond, an anchor is better"""
Cadence = Literal["adaptive", "never"] | int
"""when an anchor is written: when catching up from the newest costs more bytes than it, never, or every N versions"""


@dataclass(frozen=True, slots=True)
class CompactReport:
    """One fold (`parent` to `version`) or anchor (`parent` None) that was written, and the bytes of its payload; for a
    fold also those of the deltas it stands for."""

    parent: int | None
    version: int
    wire_bytes: int
    replaced_bytes: int

    def as_metrics(self) -> dict[str, float]:
        """Its numbers as `deltawire/…`, for a trainer's logs."""
        return figures(self)


class Compactor:
    """Keeps a bucket's folds and anchors complete. One per bucket is enough; two write the same bytes.

    `folder` holds the mirror: it is made by the first step, and found again by the next process. `signing_key` is the
    trainer's, or one that run.json delegates to; a signed run needs it (BadSignature). `base` is a folder with the
    run's base checkpoint: its weights, config and tokenizer go into anchors. Of a base that only the bucket names, they
    do so where it is public on the Hub. Raises what `Subscriber` and `Mirror` raise.
    """

    def __init__(
        self,
        bucket: Bucket,
        folder: Path,
        *,
        levels: Iterable[int] = LEVELS,
        anchors: Cadence = "adaptive",
        base: Path | str | None = None,
        trusted: Iterable[str | Path] = (),
        signing_key: Path | str | None = None,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.bucket, self._copy = bucket, LocalCopy(folder)
        self._levels, self._cadence = tuple(sorted(levels)), anchors
        self._key = None if signing_key is None else signing.read_key(signing_key)
        self._subscriber = Subscriber(bucket, base=base, trusted=trusted)
        self._may_copy_base = base is not None
        self._sound: set[str] = set()
        self._known: Inventory | None = None
        self._way = b""
        self._on_step = on_step

    def __enter__(self) -> "Compactor":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mirror and of downloads."""
        self._copy.close()
        self._subscriber.close()

    def step(self) -> list[CompactReport]:
        """Write every fold and anchor that is due and not there; what was written. A repeated step writes nothing."""
        try:
            return self._step()
        except DAMAGE:
            self._subscriber.refresh()  # a record may have been damaged on its way, or pruned: look again next time
            self._known = None
            raise

    def _step(self) -> list[CompactReport]:
        target = self._subscriber.latest()
        self._require_key()
        known = self._known = self._looked_up(target)
        reports = []
        for end, start in sorted((end, -start) for start, end in known.due(self._levels)):
            if (report := self._fold(known, -start, end)) is not None:
                reports.append(report)
        known.folded_to(target.version)
        if self._wants_anchor(known, target.version):
            reports.append(self._anchor(known, target.version))
        self._leave_way(known)
        return reports

    def _looked_up(self, target: Position) -> Inventory:
        """What is there: listed once, then as far as it grew."""
        chain = self._subscriber.chain
        if self._known is None or self._known.run != chain.run.run:
            known = Inventory(chain.run.run)
            for edge in chain.edges():
                if self._is_sound(edge):
                    known.add(edge)
            if not known.anchors:
                raise Gap(f"{self.bucket.url}: run {chain.run.run} has no anchor to compact from")
            return known
        for filed in chain.between(self._known.newest, chain.commit(target.version)):
            self._known.add(chain.edge_of(filed))
        return self._known

    def _require_key(self) -> None:
        """A signed run is compacted with the trainer's key, or one it delegated to."""
        run = self._subscriber.run
        if run.signer is None:
            return
        allowed = {run.signer, *run.compactors}
        if self._key is None or self._key.public not in allowed:
            named = ", ".join(f"{key[:16]}…" for key in sorted(allowed))
            raise BadSignature(f"run {run.run} is signed: compact it with one of these keys: {named}")

    def _require_base_to_copy(self) -> None:
        """An anchor of a run that starts from a base holds files of that base."""
        base = self._subscriber.run.base
        if base is not None and base.revision is not None and not self._may_copy_base:
            require_public(base)
            self._may_copy_base = True

    def _to_copy(self, mirror: Mirror) -> list[Path]:
        """The files of the mirror that go into an anchor. In the folder of a base, texts may be anything."""
        based = self._subscriber.run.base is not None
        return [path for path in mirror.files if not based or path.suffix != ".txt" or path.name in TEXTS]

    def _is_sound(self, edge: Edge) -> bool:
        """Whether a manifest that is there is one, of its key, signed as its run is; each is read once."""
        run = self._subscriber.run
        if not edge.derived or edge.record in self._sound:
            return True
        trust = Trust(frozenset({run.signer, *run.compactors} if run.signer is not None else ()))
        try:
            record = log.load(self.bucket, Derived, edge.record, trust=trust).record
        except DAMAGE:
            return False
        if (record.run, record.parent, record.version) != (run.run, edge.start, edge.end):
            return False
        self._sound.add(edge.record)
        return True

    def _fold(self, known: Inventory, start: int, end: int) -> CompactReport | None:
        """Write a fold, unless one so long would be larger than it is worth."""
        parts = known.parts(start, end)
        whole = sum(entry.nbytes for entry in self._subscriber.run.table)
        if end - start > PLAIN_LEVEL and 2 * sum(edge.size for edge in parts) > whole:
            return None
        try:
            return self._write_fold(known, start, end, parts)
        except DAMAGE:
            derived = [edge for edge in parts if edge.derived]
            if rotten := not self._copy.is_sound():
                self._copy.discard()
            elif not derived:
                raise
            for edge in derived if not rotten else []:  # damaged, or gone: the fold is made of what they were made of
                known.drop(edge)
            self._subscriber.refresh()
            return self._fold(known, start, end)

    def _write_fold(self, known: Inventory, start: int, end: int, parts: list[Edge]) -> CompactReport:
        chain = self._subscriber.chain
        first, last = chain.settled(start), chain.settled(end)
        needs = any(edge.needs_weights for edge in parts)
        before = self._mirror_at(start).weights if needs else None
        delta = self._subscriber.added_up(chain.read(parts, first.hash), before)[0]
        mirror = self._checked_at(first, last, delta)
        data = delta_file.encode(delta, codec=chain.run.may_use[0], run=chain.run.run, parent=start, version=end)
        key = fold_key(start, end, blake3(data).hexdigest())
        record = Derived(
            run=chain.run.run,
            version=end,
            parent=start,
            root=last.record.root,
            digests={name: f"{mirror.digests[name]:016x}" for name in delta},
            payloads=(Payload(key, len(data), blake3(data).hexdigest()),) if delta else (),
            commit_hash=last.hash,
            parent_hash=first.hash,
        )
        known.add(Edge(start, end, record.wire_bytes, self._put(record, {key: data} if delta else {})))
        return CompactReport(start, end, record.wire_bytes, known.delta_bytes(start, end))

    def _checked_at(self, first: Filed[Commit], last: Filed[Commit], delta: Delta) -> Mirror:
        """The mirror at `last`, after a change was found to lead there from `first`. Raises BadDigest."""
        if self._copy.position != last.record.position:
            mirror = self._mirror_at(first.record.version)
            mirror.apply(delta, last.record.position)
            return mirror
        mirror = self._mirror_at(last.record.version)
        before = (-delta).digests_after(mirror.digests, mirror.weights)
        if root_of(mirror.table, before) != first.record.root:
            raise BadDigest(
                f"{self.bucket.url}: the deltas from {first.record.version} to {last.record.version} do not lead from "
                "one to the other"
            )
        return mirror

    def _anchor(self, known: Inventory, version: int) -> CompactReport:
        self._require_base_to_copy()
        mirror = self._mirror_at(version)
        if not self._copy.is_sound():  # it rotted on this disk: what others will begin at is not made of it
            self._copy.discard()
            mirror = self._mirror_at(version)
        chain = self._subscriber.chain
        hashes = {path: hash_file(path) for path in sorted(self._to_copy(mirror))}
        prefix = anchor_prefix(version, anchor_hash({path.name: value for path, value in hashes.items()}))
        record = Derived(
            run=chain.run.run,
            version=version,
            parent=None,
            root=mirror.position.root,
            digests={name: f"{value:016x}" for name, value in mirror.digests.items()},
            payloads=tuple(
                Payload(f"{prefix}/{path.name}", path.stat().st_size, value) for path, value in hashes.items()
            ),
            commit_hash=chain.settled(version).hash,
        )
        require_anchor(record, chain.run.table, str(mirror.folder))
        key = self._put(record, {f"{prefix}/{path.name}": path for path in hashes})
        known.add(Edge(None, version, record.wire_bytes, key))
        return CompactReport(None, version, record.wire_bytes, 0)

    def _put(self, record: Derived, payloads: Mapping[str, bytes | Path]) -> str:
        """Payloads, then their manifest; its key."""
        writing.put_payloads(self.bucket, record.run, payloads, on_step=self._on_step)
        key = derived_key(record.run, record.parent, record.version, record.payloads)
        data = records.write(signed(record, self._key))
        try:
            self.bucket.put_new(key, data)
        except AlreadyExists:
            if self._key is not None:  # nobody could use what was there, or we would not have made this
                self.bucket.put(key, data)
            else:
                with writing.surely_there(self.bucket, key):
                    self.bucket.stat(key)
        self._on_step("manifest")
        return key

    def _leave_way(self, known: Inventory) -> None:
        """Leave joiners, and those not far behind, a hint at what leads to the newest versions."""
        way = records.write(Way(known.run, known.way()))
        if known.derived and way != self._way:
            self.bucket.put(way_key(known.run), way)
            self._way = way

    def _mirror_at(self, version: int) -> Mirror:
        return self._copy.at(self._subscriber, version)[0]

    def _wants_anchor(self, known: Inventory, version: int) -> bool:
        newest = known.anchors[max(known.anchors)]
        if newest.end == version or self._cadence == "never":
            return False
        if isinstance(self._cadence, int):
            return version - newest.end >= self._cadence
        return sum(edge.size for edge in known.parts(newest.end, version)) > newest.size
