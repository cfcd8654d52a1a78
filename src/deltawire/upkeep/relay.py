"""A bucket nearby that holds what another holds: one reader fetches, and every server of a host or region reads here.

Objects are copied byte for byte, in the order in which a trainer writes: payloads, commit, HEAD. So readers check the
same hashes and signatures, and a relay that is killed leaves a bucket that is merely older.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from deltawire.buckets.base import Bucket
from deltawire.buckets.temporary import TemporaryFolder
from deltawire.buckets.verified import download_verified
from deltawire.errors import DAMAGE, BadDigest, ChainError, DeltaWireError, NotFound, OtherRun
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log
from deltawire.runlog.keys import HEAD_KEY, payload_key
from deltawire.runlog.log import Filed
from deltawire.runlog.records import MAX_RECORD, Commit, Derived, Head, Payload, Run, hash_of, write
from deltawire.runlog.signing import Trust, trust
from deltawire.runlog.writing import put_payload
from deltawire.upkeep.passed_on import PassedOn

LOOK = 30.0
"""seconds that one wait for news lasts at most, and between two heartbeats of a replica that are passed on"""


@dataclass(frozen=True, slots=True)
class RelayReport:
    """What one step copied: versions after `since` (None: from nothing) to `version` of a run; objects and bytes."""

    run: str
    since: int | None
    version: int
    objects: int
    bytes: int


class Relay:
    """Copies the run of `source` to `target`, from its newest anchor on. `trusted` are as for a Subscriber.

    `target` must be a bucket of its own: a relay is its only writer, beside the heartbeats of those who read it.
    """

    def __init__(self, source: Bucket, target: Bucket, *, trusted: Iterable[str | Path] | Trust = ()) -> None:
        self.source, self.target = source, target
        self._trust = trusted if isinstance(trusted, Trust) else trust(trusted)
        self._subscriber: Subscriber | None = None
        self.beats = PassedOn(source, target)
        self._objects = self._bytes = 0

    def step(self) -> RelayReport | None:
        """Copy what is new; None where nothing is. A run that superseded it is copied beside it.

        Raises NotFound while nothing is published, BucketError, FormatError, ChainError."""
        subscriber = self._opened()
        try:
            newest = subscriber.latest()
        except OtherRun:
            self._subscriber = None
            subscriber = self._opened()
            newest = subscriber.latest()
        have = self._have(newest.run)
        if have is not None and have >= newest.version:
            return None
        self._objects = self._bytes = 0
        self._copy(subscriber, have, subscriber.chain.commit(newest.version))
        return RelayReport(newest.run, have, newest.version, self._objects, self._bytes)

    def run(
        self,
        on_step: Callable[[RelayReport], None],
        on_problem: Callable[[DeltaWireError], None],
        *,
        going: Callable[[], bool] = lambda: True,
        look: float = LOOK,
    ) -> None:
        """Go on as versions come, and pass heartbeats on, while `going()`. `on_problem` hears of trouble; then it is
        tried again."""
        tag = None
        while going():
            try:
                if (report := self.step()) is not None:
                    on_step(report)
            except DeltaWireError as error:
                on_problem(error)
                if self._subscriber is not None:
                    self._subscriber.refresh()
            try:
                self.beats.step()
            except DeltaWireError as error:
                on_problem(error)
            found = self.source.watch(HEAD_KEY, tag=tag, timeout=look)
            tag = found.tag if found is not None else tag

    def _opened(self) -> Subscriber:
        if self._subscriber is None:
            self._subscriber = Subscriber(self.source, trusted=self._trust)
        return self._subscriber

    def _have(self, run: str) -> int | None:
        """The newest version that is all there: HEAD is written last."""
        head = log.hinted(self.target)
        return head.version if head is not None and head.run == run else None

    def _copy(self, subscriber: Subscriber, have: int | None, newest: Filed[Commit]) -> None:
        commits = None if have is None else self._since(subscriber, have, newest)
        if commits is None:
            commits = subscriber.chain.between(self._begin(subscriber, newest), newest)
        for commit in commits:
            self._copy_payloads(commit.record)
            self._copy_record(commit)
        head = Head(newest.record.run, newest.record.version, newest.key)
        self.target.put(HEAD_KEY, write(head))

    def _since(self, subscriber: Subscriber, have: int, newest: Filed[Commit]) -> list[Filed[Commit]] | None:
        """The commits after a version; None where some of them are pruned, and it has to begin at an anchor."""
        try:
            return subscriber.chain.between(have, newest)
        except (NotFound, ChainError):
            return None

    def _begin(self, subscriber: Subscriber, newest: Filed[Commit]) -> int:
        """Copy the run's record and its newest anchor that is sound; the version it is of."""
        chain = subscriber.chain
        problem: DeltaWireError | None = None
        self._copy_record(chain.filed)
        for edge in reversed([edge for edge in chain.anchors() if edge.end <= newest.record.version]):
            try:
                (hop,) = chain.read([edge])
                anchor = hop.filed
                commit = chain.commit(edge.end)
                if anchor.record.root != commit.record.root:
                    raise BadDigest(f"{self.source.url}/{edge.record} is the anchor of other weights than its commit")
                self._copy_payloads(anchor.record)
            except DAMAGE as error:
                problem = problem or error
                continue
            if isinstance(anchor.record, Derived):
                self._copy_record(anchor)
            self._copy_record(commit)
            return edge.end
        raise problem or NotFound(f"{self.source.url}: run {subscriber.run.run} has no anchor to begin at")

    def _copy_payloads(self, record: Commit | Derived) -> None:
        for payload in record.payloads:
            self._copy_payload(payload_key(record.run, payload.key), payload)

    def _copy_payload(self, key: str, payload: Payload) -> None:
        with TemporaryFolder() as folder:
            path = folder / "payload"
            download_verified(self.source, key, path, size=payload.size, blake3=payload.blake3)
            put_payload(self.target, key, path)
        self._count(payload.size)

    def _copy_record(self, filed: Filed[Run] | Filed[Commit] | Filed[Derived]) -> None:
        data = self.source.get(filed.key, limit=MAX_RECORD)
        if hash_of(data) != filed.hash:
            raise BadDigest(f"{self.source.url}/{filed.key} was read in two ways; try again")
        put_payload(self.target, filed.key, data)
        self._count(len(data))

    def _count(self, size: int) -> None:
        self._objects, self._bytes = self._objects + 1, self._bytes + size
