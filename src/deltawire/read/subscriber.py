"""Read a bucket's run: verified updates in order, or the cheapest change from where a copy stands to a version."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from deltawire.errors import (
    DAMAGE,
    ChainError,
    DeltaWireError,
    Forked,
    FormatError,
    Gap,
    NotFound,
    OtherRun,
)
from deltawire.format.checkpoint import Checkpoint, files
from deltawire.read.changes import Change, Update
from deltawire.read.opened import OpenedRun
from deltawire.runlog import log, planner
from deltawire.runlog.keys import HEAD_KEY, run_key
from deltawire.runlog.log import Filed
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import Commit, Derived, Position
from deltawire.runlog.ways import Hop, as_numbers
from deltawire.weights.delta import Delta

PLANS = 3
"""times a path is planned again when something on it was pruned meanwhile"""
LOOK_BACK = 64
"""commits that are read to find out which version a copy of unknown origin is"""


class Subscriber(OpenedRun):
    """Follows one run in a bucket. Reading is all it does to the store.

    The run is the one HEAD names at first use; when HEAD moves to another run, OtherRun is raised, not followed.
    `base` is a folder with the base checkpoint, for runs whose version 0 refers to one this host has elsewhere.
    `trusted` are public keys, or files of them: then every record must be signed by one (BadSignature).
    """

    def __enter__(self) -> "Subscriber":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close()

    def latest(self) -> Position:
        """The newest committed position, never older than one seen before. Raises NotFound while nothing is published,
        OtherRun."""
        return self._newest().record.position

    def commits(self, after: int | None = None) -> list[Commit]:
        """Commits with a version above `after`, in chain order, each the child of the one before it.

        Raises OtherRun, Forked, Gap, BadDigest (a commit whose root is not that of its digests), FormatError.
        """
        self._newest()
        try:
            found = self.chain.commits()
        except (FormatError, ChainError):
            self.refresh()
            raise
        return [commit for commit in found if after is None or commit.version > after]

    def recent(self, most: int | None = None, *, since: float | None = None) -> list[Commit]:
        """The newest commits, oldest first, as far as they are there; nothing else of the run is read. `since` ends at
        the first that is older, in seconds since the epoch by the publisher's clock. Raises as `latest` does."""
        back = (filed.record for filed in self.chain.back(self._newest(), most=most))
        young = itertools.takewhile(lambda commit: since is None or commit.created >= since, back)
        return [*young][::-1]

    def position_at(self, version: int) -> Position:
        """Where a committed version stands. Raises Gap, which names what is there, for one never committed."""
        self._newest()
        try:
            return self.chain.commit(version).record.position
        except NotFound:
            raise self.chain.gap_at(version, self.chain.versions()) from None

    def position_of(self, root: str) -> Position | None:
        """The newest committed version whose weights have this root, or None. It looks at the newest commits, and at
        the anchors, where copies start."""
        for filed in self.chain.back(self._newest(), most=LOOK_BACK):
            if filed.record.root == root:
                return filed.record.position
        for starts in (self.chain.hint, self.chain.anchors):
            for edge in sorted((edge for edge in starts() if edge.start is None), key=lambda edge: -edge.end):
                with suppress(*DAMAGE):
                    if (commit := self.chain.commit(edge.end).record).root == root:
                        return commit.position
        return None

    def digests_at(self, version: int) -> dict[str, int]:
        """The digest of every tensor at a committed version. Raises Gap for a version never committed."""
        return self.chain.digests_at(version)

    def updates(self, since: Position | None = None, *, until: int | None = None) -> Iterator[Update]:
        """Verified updates in order from `since` (or from the newest anchor) to `until` (or to the newest commit).

        Raises BucketError; FormatError for damaged bytes; OtherRun, Gap or Forked when `since` is not on this chain.
        """
        newest = self._newest()
        if until is not None:
            self.digests_at(until)  # says which versions there are
        last = newest if until is None else self.chain.commit(until)
        if since is not None:
            digests, parent = self.digests_at(self._stand_on(since).version), since
        else:
            first, anchor = self._begin_at(last.record.version)
            digests, parent = as_numbers(first.record.digests), first.record.position
            delivered = self.chain.commit(parent.version).record
            yield Update(parent, None, None, anchor, digests, delivered, first.record.wire_bytes)
        for filed in self.chain.between(parent.version, last):
            commit, digests = filed.record, self.chain.moved(digests, filed)
            yield Update(commit.position, parent, self.fetch_delta(commit), None, digests, commit, commit.wire_bytes)
            parent = commit.position

    def change(self, since: Position | None, version: int, *, anchors: bool = True) -> Change:
        """The cheapest change that leads from `since` (None: from nothing) to a version, older or newer. An anchor may
        be cheaper than what lies between; without `anchors` only deltas and folds are taken.

        What was pruned while it was fetched is planned around. Raises BucketError, FormatError; Gap or Forked when
        `since` is not on this chain.
        """
        here = None if since is None else self._stand_on(since).version
        passed_over: set[str] = set()
        problem: DeltaWireError | None = None
        for attempt in range(PLANS):
            try:
                way = self._way(here, version, anchors or here is None, passed_over, problem)
            except DAMAGE as error:
                if not passed_over | self._wrong:
                    raise
                problem = problem or error
                break  # what was passed over with what is wrong may be all there is to begin at
            try:
                return self._fetch(since, version, way)
            except DAMAGE as error:
                # Folds and anchors only save bytes: without those on this way, damaged, signed by a stranger or gone,
                # there may be another. A stranger's must not stop anyone.
                derived = {edge.record for edge in way if edge.derived}
                if not derived and (attempt == PLANS - 1 or not isinstance(error, NotFound)):
                    self.refresh()
                    raise problem or error from None
                problem = problem or error
                passed_over |= derived
                self.refresh()
        return self._without_derived(since, version, anchors or since is None, problem)

    def pass_over(self, change: Change) -> bool:
        """Take the folds and anchors of a change for wrong: its weights were not what its commit says. False where it
        had none that was not blamed before: then it is not they who are to blame."""
        blamed, begun = set(change.derived) - self._wrong, change.anchor_position
        if begun is not None and begun == self.chain.commit(begun.version).record.position:
            blamed = {key for key in blamed if "/derived/anchor-" not in key}  # its digests were compared
        self._wrong |= blamed
        return bool(blamed)

    def anchor_files(self, version: int | None = None) -> list[Path]:
        """The files of the anchor that a version (the newest) is reached from, on this host, downloaded and verified if
        need be: a whole checkpoint. Those of a base may hold the run's aliases too, which no delta moves."""
        version = self._newest().record.version if version is None else version
        return files(self._begin_at(version)[1].folder)

    def _way(
        self,
        since: int | None,
        version: int,
        anchors: bool,
        passed_over: set[str],
        problem: DeltaWireError | None,
        *,
        forward: bool = False,
    ) -> list[Edge]:
        """A way without what was found wrong. Raises the problem that closed the last one, where there is no other."""
        without, hint = passed_over | self._wrong, problem is None
        try:
            return self.chain.way(since, version, anchors=anchors, forward=forward, without=without, hint=hint)
        except Gap:
            if problem is None:
                raise
            raise problem from None

    def _without_derived(
        self, since: Position | None, version: int, anchors: bool, problem: DeltaWireError | None
    ) -> Change:
        """The change by commits alone, after one way after another was closed: from where the reader stands, or from
        the newest anchor that is sound. However many records are junk, each is read once."""
        edges = self.chain.edges(checked=True)
        commits = [edge for edge in edges if not edge.derived and (anchors or edge.start is not None)]
        starts = [edge for edge in edges if edge.start is None and edge.derived and edge.end <= version and anchors]
        here = None if since is None else since.version
        for anchor in [None, *sorted(starts, key=lambda edge: -edge.end)]:
            usable = [*commits, *([anchor] if anchor is not None else [])]
            try:
                if anchor is not None and not self.chain.is_of_chain(anchor):
                    continue
                return self._fetch(since, version, planner.cheapest(usable, here, version))
            except DAMAGE as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _begin_at(self, version: int) -> tuple[Filed[Commit] | Filed[Derived], Checkpoint]:
        """The anchor that the cheapest way to a version starts at; one that is damaged or gone is passed over."""
        passed_over: set[str] = set()
        problem: DeltaWireError | None = None
        while True:
            first = self._way(None, version, True, passed_over, problem, forward=True)[0]
            try:
                (hop,) = self.chain.read([first])
                filed, commit = hop.filed, self.chain.commit(first.end)
                if hop.ends_at != commit.hash or filed.record.root != commit.record.root:
                    raise Forked(f"{self.bucket.url}/{first.record} is the anchor of another commit {first.end}")
                return filed, self.open_anchor(filed.record)
            except DAMAGE as error:
                if not first.derived:
                    raise
                problem = problem or error
                passed_over.add(first.record)

    def _fetch(self, since: Position | None, version: int, path: list[Edge]) -> Change:
        hops = self.chain.read(path, None if since is None else self.chain.commit(since.version).hash)
        commit = self.chain.commit(version)
        delta, anchor, anchor_position = Delta(), None, None
        for hop in hops:
            record = hop.filed.record
            if hop.edge.start is None:
                anchor, anchor_position = self.open_anchor(record), record.position
            else:
                part = self.fetch_delta(record)
                delta += -part if hop.edge.undo else part
        if hops and not _arrives(hops[-1], commit):
            raise Forked(f"{self.bucket.url}: the path to version {version} ends at another commit of that number")
        read = {hop.edge.record for hop in hops} | {commit.key}
        payloads = [payload for hop in hops for payload in hop.filed.record.payloads]
        return Change(
            since=None if anchor is not None else since,
            position=commit.record.position,
            anchor=anchor,
            anchor_position=anchor_position,
            delta=delta,
            commit=commit.record,
            wire_bytes=sum(payload.size for payload in payloads),
            records=len(read),
            payloads=len(payloads),
            derived=tuple(hop.edge.record for hop in hops if hop.edge.derived),
        )

    def _newest(self) -> Filed[Commit]:
        """The newest commit. Raises OtherRun where HEAD names a run that is there and is not ours."""
        run, head = self.run.run, log.hinted(self.bucket)
        if head is not None and head.run != run:
            try:
                self.bucket.stat(run_key(head.run))
            except NotFound:  # a damaged HEAD, and we know the run
                head = None
            else:
                raise OtherRun(
                    f"{self.bucket.url} moved from run {run} to run {head.run}, which does not continue it; "
                    "restart with a fresh position to follow the new run"
                )
        if head is None and not log.list_commits(self.bucket, run):
            raise NotFound(f"{self.bucket.url} has no {HEAD_KEY} and no commits of run {run}")
        return self.chain.newest(head)

    def _stand_on(self, since: Position) -> Position:
        if since.run != self.run.run:
            raise OtherRun(f"position {since} is of another run than {self.bucket.url}, which holds {self.run.run}")
        try:
            commit = self.chain.commit(since.version).record
        except NotFound:
            raise Gap(f"run {since.run}: no commit {since.version} to continue from") from None
        if commit.root != since.root:
            raise Forked(f"{since}: these weights have root {since.root[:12]}…, the commit says {commit.root[:12]}…")
        return since


def _arrives(last: Hop, commit: Filed[Commit]) -> bool:
    """Whether a way ends at a commit, by its hash and, going forward, by its root."""
    return last.ends_at in (None, commit.hash) and (last.edge.undo or last.filed.record.root == commit.record.root)
