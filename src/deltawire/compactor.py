"""Folds and anchors, made off the trainer: what lets a reader that is k versions behind fetch O(log k) objects.

A fold of level L replaces the deltas between two multiples of L by their sum. Before a manifest is written, what it
lists is checked against committed roots on a mirror of the weights.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from blake3 import blake3

from deltawire import log, manifests, paths, signing, wire
from deltawire.buckets.base import Bucket
from deltawire.copies import LocalCopy
from deltawire.digest import root as root_of
from deltawire.errors import (
    AlreadyExists,
    BadDigest,
    BadSignature,
    ChainError,
    FormatError,
    NotFound,
)
from deltawire.manifests import Derived, Payload, anchor_hash, anchor_prefix, derived_key, fold_key, signed
from deltawire.mirror import Mirror
from deltawire.paths import Edge
from deltawire.pending import hash_file
from deltawire.signing import Trust
from deltawire.subscriber import Subscriber

LEVELS = (4, 16, 64)
"""versions that a fold of each level spans"""
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


class Compactor:
    """Keeps a bucket's folds and anchors complete. One per bucket is enough; two write the same bytes.

    `folder` holds the mirror: it is made by the first step, and found again by the next process. `signing_key` is the
    trainer's, or one that run.json delegates to; a signed run needs it (BadSignature). Raises what `Subscriber` and
    `Mirror` raise.
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
        self._sound: set[str] = set()
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
        except (FormatError, ChainError):
            self._subscriber.refresh()  # a record may have been damaged on its way: read it again next time
            raise

    def _step(self) -> list[CompactReport]:
        target = self._subscriber.latest()
        self._require_key()
        edges = self._edges()
        there = {(edge.start, edge.end) for edge in edges}
        reports = []
        for level in self._levels:  # a level is made of the one below it
            for start, end in due(self._versions(edges), level):
                if (start, end) not in there:
                    reports.append(self._fold(start, end, edges))
                    there.add((start, end))
        edges = self._edges() if reports else edges
        if self._wants_anchor(edges, target.version) and (None, target.version) not in there:
            reports.append(self._anchor(target.version))
        return reports

    def _require_key(self) -> None:
        """A signed run is compacted with the trainer's key, or one it delegated to."""
        run = self._subscriber.run
        if run.signer is None:
            return
        allowed = {run.signer, *run.compactors}
        if self._key is None or self._key.public not in allowed:
            named = ", ".join(f"{key[:16]}…" for key in sorted(allowed))
            raise BadSignature(f"run {run.run} is signed: compact it with one of these keys: {named}")

    def _edges(self) -> list[Edge]:
        """What leads somewhere for those who trust the run's keys."""
        return [edge for edge in self._subscriber.chain.edges() if self._is_sound(edge)]

    def _is_sound(self, edge: Edge) -> bool:
        """Whether a manifest that is there is signed as its run is; each is read once."""
        run = self._subscriber.run
        if run.signer is None or not edge.derived or edge.record in self._sound:
            return True
        try:
            log.load(self.bucket, Derived, edge.record, trust=Trust(frozenset({run.signer, *run.compactors})))
        except (FormatError, NotFound):
            return False
        self._sound.add(edge.record)
        return True

    def _versions(self, edges: list[Edge]) -> list[int]:
        start = min((edge.end for edge in edges if edge.start is None), default=0)
        return [version for version in self._subscriber.chain.versions() if version >= start]

    def _fold(self, start: int, end: int, edges: list[Edge]) -> CompactReport:
        chain = self._subscriber.chain
        first, last = chain.settled(start), chain.settled(end)
        change = self._subscriber.change(first.record.position, end, anchors=False)
        mirror = self._mirror_at(end)
        before = (-change.delta).digests_after(mirror.digests, mirror.weights)
        if root_of(chain.run.table, before) != first.record.root:
            raise BadDigest(f"{self.bucket.url}: the deltas from {start} to {end} do not lead from one to the other")
        data = wire.encode(change.delta, run=chain.run.run, parent=start, version=end)
        key = fold_key(start, end, blake3(data).hexdigest())
        record = Derived(
            run=chain.run.run,
            version=end,
            parent=start,
            root=last.record.root,
            digests={name: f"{mirror.digests[name]:016x}" for name in change.delta},
            payloads=(Payload(key, len(data), blake3(data).hexdigest()),) if change.delta else (),
            commit_hash=last.hash,
            parent_hash=first.hash,
        )
        self._put(record, {key: data} if change.delta else {})
        replaced = sum(edge.size for edge in edges if edge.kind == "delta" and start < edge.end <= end)
        return CompactReport(start, end, record.wire_bytes, replaced)

    def _anchor(self, version: int) -> CompactReport:
        chain, mirror = self._subscriber.chain, self._mirror_at(version)
        hashes = {path: hash_file(path) for path in sorted(mirror.files)}
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
        self._put(record, {f"{prefix}/{path.name}": path for path in hashes})
        return CompactReport(None, version, record.wire_bytes, 0)

    def _put(self, record: Derived, payloads: dict[str, bytes] | dict[str, Path]) -> None:
        """Payloads, then their manifest. A key holds its content's hash: what is there already is ours."""
        for key, data in payloads.items():
            with suppress(AlreadyExists):
                self.bucket.put_new(f"runs/{record.run}/{key}", data)
            self._on_step("payload")
        key = derived_key(record.run, record.parent, record.version, record.payloads)
        data = manifests.write(signed(record, self._key))
        try:
            self.bucket.put_new(key, data)
        except AlreadyExists:
            if self._key is not None:  # nobody could use what was there, or we would not have made this
                self.bucket.put(key, data)
        self._on_step("manifest")

    def _mirror_at(self, version: int) -> Mirror:
        return self._copy.at(self._subscriber, version)[0]

    def _wants_anchor(self, edges: list[Edge], version: int) -> bool:
        newest = max((edge for edge in edges if edge.start is None), key=lambda edge: edge.end)
        if isinstance(self._cadence, int):
            return version - newest.end >= self._cadence
        if self._cadence == "never":
            return False
        way = paths.cheapest([edge for edge in edges if edge.start is not None], newest.end, version)
        return sum(edge.size for edge in way) > newest.size


def due(versions: list[int], level: int) -> list[tuple[int, int]]:
    """The folds of a level that a chain of committed versions (ascending, from its start) calls for: between the last
    version up to each multiple of the level and the last up to the next one, where they span several commits."""
    if not versions:
        return []
    bounds = range(-(-versions[0] // level) * level, versions[-1] + 1, level)
    at = [max(version for version in versions if version <= bound) for bound in bounds]
    return [(start, end) for start, end in pairwise(at) if sum(start < version <= end for version in versions) > 1]
