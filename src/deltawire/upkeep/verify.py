"""Whether a bucket holds what its commits promise: every delta, fold and anchor of its run, read and recomputed."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deltawire.buckets.base import Bucket
from deltawire.buckets.temporary import TemporaryFolder
from deltawire.errors import BadDigest, Forked, Gap, NotFound, Unavailable, WrongBase, some
from deltawire.format import checkpoint
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.routes import PLANS
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log
from deltawire.runlog.figures import figures
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import Commit, Derived, Position
from deltawire.runlog.tags import read_tags
from deltawire.runlog.ways import as_numbers
from deltawire.upkeep.materialize import materialize
from deltawire.weights.delta import Delta
from deltawire.weights.digest import root as root_of
from deltawire.weights.table import aliases_of

OnRead = Callable[[Edge, int], None]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A run read from version `first` to `position` and found right: what was read of it, in bytes too, and seconds.
    `junk` counts what lies under keys of folds and anchors and is followed by no reader. `tagged` are the versions
    below, which tags keep; they were read, too."""

    position: Position
    first: int
    anchors: int
    deltas: int
    folds: int
    fetched_bytes: int
    seconds: float
    junk: int = 0
    tagged: tuple[int, ...] = ()

    def as_metrics(self) -> dict[str, float]:
        """Its numbers as `deltawire/…`, for a trainer's logs."""
        return figures(self)


def verify(
    bucket: Bucket,
    *,
    base: Path | str | None = None,
    trusted: Iterable[str | Path] = (),
    on_read: OnRead = lambda edge, total: None,
) -> VerifyReport:
    """Read all that the bucket's run holds, from its oldest anchor to its newest commit, and recompute every digest.

    The deltas are applied one after another to a copy of that anchor. A delta must lead to the digests that its commit
    promises. A fold must lead back to those of the version it starts from. An anchor must have those of its version. At
    the end the digests of all weights are recomputed. Takes twice the model's size in temporary files, three times it
    where tags keep older versions, and the memory of a delta and its negative. A bucket that is pruned meanwhile is
    read again from its new start. An object under the key of a fold or an anchor may not be its record, or not be
    signed by a trusted key. No reader follows it: it counts as junk. A tagged version below that start is materialized,
    which checks all of it.

    `trusted` are public keys, or files of them, one of which must have signed every record. `on_read` hears of each
    delta, fold and anchor, and of how many there are.

    Raises BadDigest, Forked or Gap, naming the first record that is wrong, Unavailable when the bucket changes faster
    than it is read, and what Subscriber.updates raises.
    """
    for _ in range(PLANS):
        with (
            Subscriber(bucket, base=base, trusted=trusted) as subscriber,
            TemporaryFolder() as folder,
        ):
            walk = _Walk(subscriber, folder)
            try:
                report = walk.whole(on_read)
                tagged = _tagged_below(subscriber, report.first)
                for version in tagged:
                    with TemporaryFolder() as own:
                        materialize(bucket, own / "weights", version, base=base, trusted=trusted)
                return replace(report, tagged=tagged)
            except (NotFound, Gap):
                if not walk.is_outdated():
                    raise
    raise Unavailable(f"{bucket.url}: its run was pruned while it was read, {PLANS} times; verify it again")


def _tagged_below(subscriber: Subscriber, first: int) -> tuple[int, ...]:
    """The tagged versions that are there below the first of a run's newest part."""
    tags = {tag.version for tag in read_tags(subscriber.bucket, subscriber.run.run, trust=subscriber.trust)}
    return tuple(version for version in subscriber.chain.versions() if version < first and version in tags)


class _Walk:
    """The weights of one version after another, in a folder, and all that joins these versions."""

    def __init__(self, subscriber: Subscriber, folder: Path) -> None:
        self._subscriber, self._chain, self._folder = subscriber, subscriber.chain, folder
        self._records: set[str] = set()
        self._weights: Checkpoint | None = None
        self._digests: dict[str, int] = {}

    def whole(self, on_read: OnRead) -> VerifyReport:
        """Walk from the chain's start to its end."""
        started, read, size = time.monotonic(), Counter[str](), 0
        commits = self._subscriber.commits()
        self._require_newest(commits[-1])
        edges = self._on_chain(commits)
        for edge in edges:
            if self._chain.is_junk(edge):
                read["junk"] += 1
                on_read(edge, len(edges))
                continue
            size += self._check(edge)
            read[edge.kind] += 1
            on_read(edge, len(edges))
        assert self._weights is not None
        self._weights.require_digests(self._digests, where=str(commits[-1].position))
        return VerifyReport(
            position=commits[-1].position,
            first=commits[0].version,
            anchors=read["anchor"],
            deltas=read["delta"],
            folds=read["fold"],
            fetched_bytes=size,
            junk=read["junk"],
            seconds=time.monotonic() - started,
        )

    def is_outdated(self) -> bool:
        """Whether something that was to be read is not listed any more: pruned, references before referents."""
        return not self._records <= {edge.record for edge in self._chain.edges()}

    def _require_newest(self, newest: Commit) -> None:
        hinted = log.read_head(self._subscriber.bucket).version
        if hinted > newest.version:
            url = self._subscriber.bucket.url
            raise Gap(f"{url}: HEAD.json names version {hinted}, but the newest commit listed is {newest.version}")

    def _on_chain(self, commits: list[Commit]) -> list[Edge]:
        """What lies between these commits, by where it ends: first the delta that leads there, then what was derived.
        Raises Gap when a listing lacks what the one before it had."""
        first, last = commits[0].version, commits[-1].version
        edges = [
            edge
            for edge in self._chain.edges(checked=True)
            if edge.end <= last and (edge.end if edge.start is None else edge.start) >= first
        ]
        deltas = {self._chain.commit(commit.version).key for commit in commits[1:]}
        self._records = deltas | {edge.record for edge in edges}
        if deltas != {edge.record for edge in edges if edge.kind == "delta"}:
            raise Gap(f"{self._subscriber.bucket.url}: two listings of run {commits[0].run} differ")
        order = ["delta", "fold", "anchor"]
        return sorted(edges, key=lambda edge: (edge.end, order.index(edge.kind)))

    def _check(self, edge: Edge) -> int:
        """Check what an edge leads to, and go there if it is a delta. The bytes of its payloads."""
        since = None if edge.start is None else self._chain.commit(edge.start).hash
        (hop,) = self._chain.read([edge], since)
        record = hop.filed.record
        if edge.start is None:
            self._check_anchor(edge, record)
        elif edge.kind == "delta":
            delta = self._delta_from_here(edge, record)
            self._digests = delta.digests_after(self._digests, self._here)
            self._require(self._digests, edge.end, edge)
            delta.apply_(self._here)
        else:
            back = -self._subscriber.fetch_delta(record)
            self._require(back.digests_after(self._digests, self._here), edge.start, edge)
        if isinstance(record, Derived):
            self._require_joined(edge, record, hop.ends_at)
        return record.wire_bytes

    def _delta_from_here(self, edge: Edge, record: Commit | Derived) -> Delta:
        try:
            return self._subscriber.fetch_delta(record, self._here)
        except WrongBase as error:
            where = f"{self._subscriber.bucket.url}/{edge.record}"
            raise BadDigest(f"{where}: made from other weights than those of version {edge.start}: {error}") from None

    def _check_anchor(self, edge: Edge, record: Commit | Derived) -> None:
        weights = self._subscriber.read_anchor(record)
        digests = weights.digests(self._subscriber.run.table)
        self._require(digests, edge.end, edge)
        if self._weights is None:
            aliases = aliases_of(self._subscriber.run.table)
            checkpoint.copy(checkpoint.files(weights.folder), self._folder, without=aliases)
            self._weights, self._digests = Checkpoint(self._folder, writable=True), digests
        self._subscriber.close()  # its files are as large as the model

    @property
    def _here(self) -> Checkpoint:
        assert self._weights is not None, "a chain starts at an anchor"
        return self._weights

    def _require_joined(self, edge: Edge, record: Derived, ends: str | None) -> None:
        """Raise Forked or BadDigest unless a fold or anchor says of its version, where the walk is, what is so."""
        commit, where = self._chain.commit(edge.end), f"{self._subscriber.bucket.url}/{edge.record}"
        if ends != commit.hash:
            raise Forked(f"{where} is the {edge.kind} of another commit {edge.end} than the one that is there")
        if record.root != commit.record.root or not as_numbers(record.digests).items() <= self._digests.items():
            raise BadDigest(f"{where}: its root or its digests are not those of version {edge.end}")

    def _require(self, digests: Mapping[str, int], version: int, edge: Edge) -> None:
        """Raise BadDigest unless these are the digests of a version."""
        if root_of(self._subscriber.run.table, digests) == self._chain.commit(version).record.root:
            return
        promised = self._subscriber.digests_at(version)
        wrong = [name for name, value in promised.items() if digests[name] != value]
        where = f"{self._subscriber.bucket.url}/{edge.record}"
        what = f"this {edge.kind} does not join version {version} as it was committed"
        raise BadDigest(f"{where}: {what}: {len(wrong)} tensors differ ({some(wrong)})")
