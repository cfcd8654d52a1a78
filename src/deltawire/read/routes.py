"""From where a copy of the weights stands to a version: by the cheapest way, or by another where that one fails."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from deltawire.errors import (
    DAMAGE,
    DeltaWireError,
    Forked,
    Gap,
    NeedsBase,
    NotFound,
    OtherRun,
)
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.adding import Moved, Part, add_up
from deltawire.read.changes import Change
from deltawire.read.opened import OpenedRun
from deltawire.runlog import log, planner
from deltawire.runlog.keys import HEAD_KEY, run_key
from deltawire.runlog.log import Filed
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import Commit, Derived, Position
from deltawire.runlog.ways import Hop
from deltawire.weights.delta import Delta

AT_ONCE = 1 << 28
"""bytes of files that are in memory together, where several are decoded tensor by tensor"""
PLANS = 3
"""times a path is planned again when something on it was pruned meanwhile"""


class Routes(OpenedRun):
    """One run of a bucket, and the ways that lead through it. Options are `Subscriber`'s."""

    def change(
        self, since: Position | None, version: int, *, weights: Mapping[str, Any] | None = None, anchors: bool = True
    ) -> Change:
        """The cheapest change that leads from `since` (None: from nothing) to a version, older or newer. An anchor may
        be cheaper than what lies between; without `anchors` only deltas and folds are taken.

        `weights` are the tensors at `since`, by name: deltas of codec `class` are read against them. One that is not
        at hand whole raises NeedsBase when it is asked for, and then, as without `weights`, another way is taken.

        What was pruned while it was fetched is planned around. Raises BucketError, FormatError; NeedsBase where every
        way needs weights that are not given, WrongBase where those given are not of `since`; Gap or Forked when `since`
        is not on this chain.
        """
        here = None if since is None else self._stand_on(since).version
        passed_over: set[str] = set()
        problem: DeltaWireError | None = None
        for attempt in range(PLANS):
            try:
                way = self._way(
                    here, version, anchors or here is None, passed_over, problem, weights=weights is not None
                )
            except DAMAGE as error:
                if not passed_over | self._wrong:
                    raise
                problem = problem or error
                break  # what was passed over with what is wrong may be all there is to begin at
            try:
                return self._fetch(since, version, way, weights)
            except NeedsBase as error:
                if weights is None:
                    raise
                weights, problem = None, problem or error
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
        return self._without_derived(since, version, anchors or since is None, problem, weights)

    def keep(self, change: Change) -> None:
        """Hold what a change decoded, as far as there is room: its weights are what its commit says, so it leads back
        from them."""
        self._held.keep(change.decoded)

    def pass_over(self, change: Change) -> bool:
        """Take the folds and anchors of a change for wrong: its weights were not what its commit says. False where it
        had none that was not blamed before: then it is not they who are to blame."""
        blamed, begun = set(change.derived) - self._wrong, change.anchor_position
        if begun is not None and begun == self.chain.commit(begun.version).record.position:
            blamed = {key for key in blamed if "/derived/anchor-" not in key}  # its digests were compared
        self._wrong |= blamed
        return bool(blamed)

    def _way(
        self,
        since: int | None,
        version: int,
        anchors: bool,
        passed_over: set[str],
        problem: DeltaWireError | None,
        *,
        forward: bool = False,
        weights: bool = True,
    ) -> list[Edge]:
        """A way without what was found wrong. Raises the problem that closed the last one, where there is no other."""
        ways = partial(
            self.chain.way,
            since,
            version,
            anchors=anchors,
            forward=forward,
            without=passed_over | self._wrong,
            hint=problem is None,
            held=self._held.keys(),
        )
        try:
            return ways(weights=weights)
        except Gap:
            if problem is not None:
                raise problem from None
            if weights:
                raise
            ways(weights=True)  # else they would not help
            raise NeedsBase(
                f'{self.bucket.url}: from version {since} to {version} lead deltas of codec "class", which are read '
                f"against the weights before them: pass those at {since} as weights=, or begin at an anchor"
            ) from None

    def _without_derived(
        self,
        since: Position | None,
        version: int,
        anchors: bool,
        problem: DeltaWireError | None,
        weights: Mapping[str, Any] | None,
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
                way = planner.cheapest(usable, here, version, weights=weights is not None)
                return self._fetch(since, version, way, weights)
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

    def _fetch(
        self, since: Position | None, version: int, path: list[Edge], weights: Mapping[str, Any] | None
    ) -> Change:
        hops = self.chain.read(path, None if since is None else self.chain.commit(since.version).hash)
        commit, fetched = self.chain.commit(version), [hop for hop in hops if self._at_hand(hop) is None]
        anchor, anchor_position, further = None, None, hops
        if hops and hops[0].edge.start is None:
            first, *further = hops
            anchor, anchor_position = self.open_anchor(first.filed.record), first.filed.record.position
        delta, decoded = self.added_up(further, weights if anchor is None else anchor)
        if hops and not _arrives(hops[-1], commit):
            raise Forked(f"{self.bucket.url}: the path to version {version} ends at another commit of that number")
        read = {hop.edge.record for hop in hops} | {commit.key}
        payloads = [payload for hop in fetched for payload in hop.filed.record.payloads]
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
            decoded=decoded,
        )

    def added_up(
        self, hops: Sequence[Hop], weights: Mapping[str, Any] | None
    ) -> tuple[Delta, dict[str, tuple[str, Delta]]]:
        """The changes of several edges as one, from the weights at the start of the first. Beside it, by the key of its
        record, the record's hash and the change of each that cannot be decoded again from there.

        Raises BucketError, FormatError; NeedsBase without the weights that one needs, WrongBase where these cannot be
        they.
        """
        known = [self._at_hand(hop) for hop in hops]
        if not any(hop.needs_weights and change is None for hop, change in zip(hops, known, strict=True)):
            delta = Delta()
            for hop, change in zip(hops, known, strict=True):  # one file in memory at a time
                part = self.fetch_delta(hop.filed.record) if change is None else change
                delta += -part if hop.edge.undo else part
            return delta, {}
        delta, decoded = Delta(), dict[str, Delta]()
        for stretch in _stretches(hops):
            parts = [self._part(hop) for hop in stretch]
            change, decoded = add_up(parts, weights if weights is None else Moved(weights, delta))
            delta += change
        hashes = {hop.edge.record: hop.filed.hash for hop in hops}
        return delta, {key: (hashes[key], change) for key, change in decoded.items()}

    def _part(self, hop: Hop) -> Part:
        """What an edge changes, as it is held or as its files have it."""
        change = self._at_hand(hop)
        if change is not None:
            return Part(hop.edge.record, known=change, undo=hop.edge.undo)
        return Part(hop.edge.record, tuple(self.open_delta(hop.filed.record)), undo=hop.edge.undo)

    def _at_hand(self, hop: Hop) -> Delta | None:
        """What an edge changes, where it is held."""
        return self._held.find(hop.edge.record, hop.filed.hash)

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


def _stretches(hops: Sequence[Hop]) -> Iterator[list[Hop]]:
    """The edges of a way, as many at a time as there is memory for their files; at least one."""
    stretch: list[Hop] = []
    room = 0
    for hop in hops:
        room -= hop.filed.record.wire_bytes
        if stretch and room < 0:
            yield stretch
            stretch = []
        if not stretch:
            room = AT_ONCE - hop.filed.record.wire_bytes
        stretch.append(hop)
    yield stretch


def _arrives(last: Hop, commit: Filed[Commit]) -> bool:
    """Whether a way ends at a commit, by its hash and, going forward, by its root."""
    return last.ends_at in (None, commit.hash) and (last.edge.undo or last.filed.record.root == commit.record.root)
